"""The HTML page of a report."""

from __future__ import annotations

import glob
import math
import time
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from omnivision.config.flat import used_settings
from omnivision.probing.xray import VERDICTS
from omnivision.reporting.predictions import Predictions
from omnivision.tasks.metrics import PREDICTION_METRICS, expected_precisions, prediction_metrics
from omnivision.tools.report import figures
from omnivision.tools.report.collect import Run, Xray, find_differing_settings, paper_table, probe_tables
from omnivision.tools.runs import TEXTS, describe_run, end_reason, select_columns

MISTAKES = 8  # clips shown for each kind of mistake
MAX_CLASSES = 500  # browsers cannot draw larger confusion matrices
MAX_RUNS_WITH_CLIPS = 8  # only the best runs get clips
RANKME = "rankme"  # the end of such a metric's name
XRAY_COLUMNS = ("intact", "middle frame", "background", "no background", "shuffled")  # of the table by class
# Heading, axis label, and event, phase and name in the log.
CURVES = (
    ("Loss, training", "loss", ("step", "train", "loss")),
    ("Loss, validation", "loss", ("epoch", "val", "loss")),
    ("Top-1, validation", "top-1, %", ("epoch", "val", "top1")),
    *(
        (
            f"{words[:1].upper() if words != 'mAP, %' else 'm'}{words[1:].removesuffix(', %')}, validation",
            words,
            ("epoch", "val", name),
        )
        for metrics in PREDICTION_METRICS.values()
        for name, words in metrics.items()
    ),
    ("Learning rate", "learning rate", ("step", "train", "lr")),
    ("Gradient norm", "norm", ("step", "train", "grad_norm")),
    ("Clips per second", "clips per second", ("step", "train", "clips_per_second")),
    ("Waiting for data", "fraction of the time", ("step", "train", "data_wait")),
)


def render(runs: Sequence[Run], title: str, clips: bool = True, intro: str = "") -> str:
    """Return the page as HTML, with all names escaped.

    clips: include clips of mistakes. intro: HTML above the runs, as Markup.
    """
    environment = jinja2.Environment(loader=jinja2.PackageLoader("omnivision.tools.report", "."), autoescape=True)
    evaluated = sorted((run for run in runs if run.predictions), key=_quality, reverse=True)
    with_clips = evaluated[:MAX_RUNS_WITH_CLIPS] if clips else []
    commits = [" -> ".join(run.metadata.get("commits") or []) for run in runs]
    differences = find_differing_settings(runs) | ({"git commit": commits} if len(set(commits)) > 1 else {})
    return environment.get_template("page.html.j2").render(
        title=title,
        intro=intro,
        created=time.strftime("%Y-%m-%d %H:%M"),
        script=Markup(get_plotlyjs()),
        names=[run.name for run in runs],
        overview=_overview(runs),
        texts=TEXTS,
        reasons=[(run.name, reason) for run in runs if (reason := end_reason(run.summary))],
        paper=paper_table(runs),
        probes=probe_tables(runs),
        differences=differences,
        results=[f"{run.result[1]:.4g} ({run.result[0]})" if run.result else "" for run in runs],
        curves=_curves(runs),
        reconstructions=[found for run in runs if (found := _reconstruction(run))],
        xrays=[_xray(run, source, found) for run in runs for source, found in run.xrays.items()],
        evaluations=[_evaluation(run, source, run in with_clips) for run in runs for source in run.predictions],
        without_clips=clips and len(evaluated) - len(with_clips),
        settings=[
            (run.name, {"git commit": commit} | dict(sorted(used_settings(run.settings).items())))
            for run, commit in zip(runs, commits, strict=True)
        ],
    )


def standalone(title: str, body: Markup) -> str:
    """Return a page with one figure, as HTML."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("omnivision.tools.report", "."), autoescape=True)
    return environment.get_template("figure.html.j2").render(title=title, body=body, script=Markup(get_plotlyjs()))


def _overview(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return the runs' cells in the first table, by heading: as in `omnivision runs`, with epochs."""
    rows = [describe_run(run.summary | {"name": run.name}) for run in runs]
    for run, cells in zip(runs, rows, strict=True):
        last = run.last.get("val_epoch")
        for heading, epoch in (
            ("top-1 %", last),
            ("mAP %", last),
            ("MAE", last),
            ("best %", run.summary.get("best_epoch")),
        ):
            if cells[heading] and epoch is not None:
                cells[heading] += f"\nepoch {epoch}"
    columns = [column for column in select_columns(rows) if column != "age"]
    return [{column: cells[column] for column in columns} for cells in rows]


def _curves(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """Draw the metrics, with separate figures for autoencoders and classifiers, whose losses cannot be compared."""
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        kinds.setdefault(run.metadata.get("model") or "other", []).append(run)
    probed = dict.fromkeys(name for run in runs for line in run.lines if line.get("phase") == "online" for name in line)
    online = [
        (f"Probe while training, {name}", "rank" if name.endswith(RANKME) else "top-1, %", ("epoch", "online", name))
        for name in probed
        if "_" in name
    ]
    drawn = [
        (f"{heading}: {kind}" if len(kinds) > 1 else heading, figures.curves(members, curve, label, runs))
        for heading, label, curve in (*CURVES, *online)
        for kind, members in kinds.items()
    ]
    return [(heading, figure) for heading, figure in drawn if figure]


def _reconstruction(run: Run) -> tuple[str, str, str] | None:
    """Return a run's last animated reconstruction: run name, file name, data URL."""
    files = sorted(run.folder.pictures.glob("*.gif"), key=lambda file: (file.stem == "last", file.name))
    return (run.name, files[-1].name, figures.data_url(files[-1].read_bytes(), "image/gif")) if files else None


def _xray(run: Run, source: str, found: Xray) -> dict[str, Any]:
    """Return the content of a section about what a classifier looks at; changes as rows."""
    examples = sorted((run.folder.path / "xray").glob(f"{glob.escape(source)}_[0-9].gif"))
    return {
        "title": f"{run.name}: {source}",
        "found": found,
        "verdict": VERDICTS.get(found.verdict, ""),
        "examples": [figures.data_url(file.read_bytes(), "image/gif") for file in examples],
        "shown": [change for change in XRAY_COLUMNS if change in found.top1],
    }


def _quality(run: Run) -> float:
    if run.result is None:
        return -math.inf
    return run.result[1] if run.result[0].endswith("%") else -run.result[1]


def _evaluation(run: Run, source: str, clips: bool) -> dict[str, Any]:
    predictions = run.predictions[source]
    entry = {key: run.settings.get(f"datasets.{source}.{key}") for key in ("fps", "prefix", "frame_pattern")}
    last, best = run.last.get("val_epoch"), run.summary.get("best_epoch")
    held = ", which best.pt also holds" if best == last else f"; best.pt is of epoch {best}"
    accuracy, drawn = _summarize(predictions)
    return {
        "title": f"{run.name}: {source}",
        "accuracy": accuracy,
        # The last evaluation writes the predictions; best.pt may be from an earlier one.
        "epoch": f"By the last evaluation{f', after epoch {last}' if last else ''}{held if best else ''}.",
        "figures": drawn,
        "mistakes": figures.mistakes(predictions, MISTAKES, entry) if clips else {},
    }


def _summarize(predictions: Predictions) -> tuple[str, list[tuple[str, Markup | str]]]:
    """Return how good predictions are in a sentence, and figures with their headings."""
    names, videos = predictions.class_names, len(predictions.index)
    metrics = prediction_metrics(predictions.label_type, predictions.label, predictions.scores)
    if predictions.label_type == "multi_label":
        expected = expected_precisions(predictions.label)
        guess = 100 * expected[np.isfinite(expected)].mean() if np.isfinite(expected).any() else math.nan
        text = f"mAP over {videos} videos: {metrics['map']:.1f} %. Guessing would give {guess:.1f} %."
        return text, [("By class", figures.class_precision(predictions))]
    if predictions.label_type == "regression":
        text = (
            f"Over {videos} videos, the mean absolute error is {metrics['mae']:.4g}, the correlation {metrics['pearson']:.3f}"
            f"{' (means over the targets)' if len(names) > 1 else ''}."
        )
        return text, [
            ("Labels and predictions", figures.values(predictions)),
            ("By target", figures.errors(predictions)),
        ]
    counts = predictions.confusion()
    right, known = int(counts.trace()), int(counts.sum())
    text = f"{right} of {known} videos are right: {100 * right / max(1, known):.1f} %. Guessing would give "
    confusion = figures.confusion(predictions) if len(names) <= MAX_CLASSES else "Too many classes to draw."
    by_class = figures.class_accuracy(predictions) if known else ""
    return f"{text}{100 / len(names):.1f} %.", [("By class", by_class), ("Confusion matrix", confusion)]
