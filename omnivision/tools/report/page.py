"""The HTML page of a report."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from omnivision.checkpoint.fingerprint import used_settings
from omnivision.tools.report import figures, mistakes
from omnivision.tools.report.collect import Predicted, Run, differing, lineage, result
from omnivision.tools.report.paper import table

CLIPS = 8  # mistakes of each kind
MAX_CLASSES = 500  # in a confusion matrix that a browser can draw
KIND = ("model", "trunk", "sources", "pretrained")  # runs of one kind have the same
WITH_CLIPS = 8  # runs whose mistakes are shown as clips, the best ones
CURVES = (
    ("Loss, training", "loss", "loss", "step"),
    ("Loss, validation", "loss", "loss", "val"),
    ("Top-1, validation", "top1", "top-1, %", "val"),
    ("Mean class accuracy, validation", "mean_class_accuracy", "%", "val"),
    ("Learning rate", "lr", "learning rate", "step"),
    ("Norm of the gradient", "grad_norm", "norm", "step"),
    ("Clips a second", "clips_per_second", "clips a second", "step"),
    ("Waiting for data", "data_wait", "share of the time", "step"),
)


def render(runs: Sequence[Run], title: str, clips: bool = True) -> str:
    """Return the page of some runs as HTML, with all names escaped. `clips`: with clips of their mistakes."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("omnivision.tools.report", "."), autoescape=True)
    evaluated = [(run, source, found) for run in runs for source, found in run.predicted.items()]
    shown = sorted({run.name: run for run, _, _ in evaluated}.values(), key=_quality, reverse=True)[:WITH_CLIPS]
    different = differing(runs) if len(runs) > 1 else {}
    commits = [" -> ".join(_facts(run).get("commits") or []) for run in runs]
    # Runs of one kind, on the same data from the same start, differ by what was swept.
    swept = different if len({str([_facts(run).get(each) for each in KIND]) for run in runs}) == 1 else {}
    content: dict[str, Any] = {
        "title": title,
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "script": Markup(figures.script()),  # plotly's
        "runs": [run.name for run in runs],
        "overview": [_row(run) for run in runs],
        "reasons": [
            (run.name, run.summary.get("exit_reason"))
            for run in runs
            if run.summary.get("status") not in ("finished", "running") and run.summary.get("exit_reason")
        ],
        "paper": table(runs),
        "curves": _curves(runs),
        "pictures": _pictures(runs),
        "evaluations": [
            _evaluation(run, source, found, number, clips=clips and run in shown)
            for number, (run, source, found) in enumerate(evaluated)
        ],
        "with_clips": WITH_CLIPS,
        "unshown": clips and len({run.name for run, _, _ in evaluated}) - len(shown),
        "lineages": [(run.name, found) for run in runs if (found := lineage(run, runs))],
        "differences": [*different.items(), *([("git commit", commits)] if len(set(commits)) > 1 else [])],
        "results": [f"{metric[1]:.4g}" if (metric := result(run)) else "" for run in runs],
        "judged_by": " or ".join(dict.fromkeys(metric[0] for run in runs if (metric := result(run)))),
        "sweep": bool(swept),
        "swept": [(name, Markup(drawn)) for name, values in swept.items() if (drawn := figures.against(runs, values))],
        "all_settings": [
            (run.name, [("git commit", commit), *sorted(used_settings(run.settings).items())])
            for run, commit in zip(runs, commits, strict=True)
        ],
    }
    sections = [("Runs", "runs")]
    named = {
        "sweep": ("What differs", "differs"),
        "swept": ("What was swept", "swept"),
        "paper": ("Downstream", "table"),
        "curves": ("Curves", "curves"),
        "pictures": ("Reconstructions", "reconstructions"),
    }
    sections += [where for key, where in named.items() if content[key]]
    sections += [(f"{each['run']}: {each['source']}", each["anchor"]) for each in content["evaluations"]]
    sections += [("Lineage", "lineage")] if content["lineages"] else []
    return environment.get_template("page.html.j2").render(content, sections=[*sections, ("Settings", "settings")])


def _facts(run: Run) -> dict[str, Any]:
    return run.summary.get("run") or {}


def _row(run: Run) -> list[tuple[str, str]]:
    facts = _facts(run)
    started = facts.get("pretrained") or "nothing"
    last = run.last
    numbers = (
        _evaluated(last.get("val_top1"), last.get("val_epoch")),
        _evaluated(run.summary.get("best"), run.summary.get("best_epoch")) if "val_top1" in last else "",
        _number(last.get("val_loss"), 4),
        _number(last.get("loss"), 4),
        str(run.summary.get("epochs", "")),
        _number((run.summary.get("wall_time") or 0) / 60, 1),
    )
    before, behind = (
        (run.name, str(run.summary.get("status", "?"))),
        (str(started), ", ".join(facts.get("sources") or [])),
    )
    return [(t, "") for t in before] + [(n, "number") for n in numbers] + [(t, "") for t in behind]


def _evaluated(top1: Any, epoch: Any) -> str:
    """Format a top-1 with its epoch, if known."""
    return _number(top1, 1) + (f" (epoch {epoch})" if top1 is not None and isinstance(epoch, int) else "")


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else ""


def _curves(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        kinds.setdefault(str(_facts(run).get("model") or "other"), []).append(run)
    found = []
    for heading, what, label, where in CURVES:
        lines = Run.steps if where == "step" else functools.partial(Run.epochs, phase="val")
        # The losses of an autoencoder and of a classifier have nothing to do with each other.
        for kind, members in kinds.items() if what == "loss" and len(kinds) > 1 else [("", runs)]:
            found.append((f"{heading}: {kind}" if kind else heading, figures.curves(members, what, label, lines, runs)))
    found += [(f"{run.name}: how much each source of the average counts", figures.mixing(run)) for run in runs]
    return [(heading, Markup(drawn)) for heading, drawn in found if drawn]


def _pictures(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Return the last animated reconstruction of each run: (run, caption, data URL)."""
    found = []
    for run in runs:
        if files := run.pictures(".gif"):
            with contextlib.suppress(OSError):  # not ours to read
                data = files[-1].read_bytes()
                if data.startswith(b"GIF8"):
                    url = mistakes.data_url(data, "image/gif")
                    found.append((run.name, f"{files[-1].name}, of {len(files)}", url))
    return found


def _quality(run: Run) -> float:
    metric = result(run)
    return -math.inf if metric is None else metric[1] if "top-1" in metric[0] else -metric[1]


def _evaluation(run: Run, source: str, predicted: Predicted, number: int, clips: bool) -> dict[str, Any]:
    entry = [run.settings.get(f"datasets.{source}.{key}") for key in ("fps", "prefix", "frame_pattern")]
    known = predicted.known
    right = int((predicted.guesses[known] == predicted.labels[known]).sum())
    share = 100 * right / max(1, int(known.sum()))
    return {
        "anchor": f"evaluation-{number}",
        "run": run.name,
        "source": source,
        "of_epoch": _of_epoch(run),
        "accuracy": f"{right} of {int(known.sum())} videos are right: {share:.1f} %. Guessing would give "
        f"{100 / len(predicted.names):.1f} %.",
        "by_class": Markup(figures.by_class(predicted)) if known.any() else "",
        "confusion": Markup(figures.confusion(predicted)) if len(predicted.names) <= MAX_CLASSES else "",
        "mistakes": _mistakes(predicted, *entry) if clips else [],
    }


def _of_epoch(run: Run) -> str:
    """Say which epoch the predictions belong to: the last evaluation writes them, best.pt may be from an earlier one."""
    last, best = run.last.get("val_epoch"), run.summary.get("best_epoch")
    if not isinstance(last, int):
        return "As the last evaluation of the run had it."
    other = f"; best.pt is of epoch {best}" if isinstance(best, int) and best != last else ", which best.pt holds, too"
    return f"By the last evaluation, after epoch {last}{other if isinstance(best, int) else ''}."


def _mistakes(predicted: Predicted, *entry: Any) -> list[tuple[str, list[mistakes.Mistake]]]:
    """Return the most confident and the worst mistakes with headings; one list if both hold the same videos."""
    confident = mistakes.most_confident(predicted, CLIPS, *entry)
    worst = mistakes.worst(predicted, CLIPS, *entry)
    if {each.path for each in confident} == {each.path for each in worst}:
        return [("The mistakes, the most confident first", confident)]
    return [("The most confident mistakes", confident), ("The worst: where the true class was left the least", worst)]
