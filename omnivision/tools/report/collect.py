"""The runs of a report: files, settings, and their results as the paper's table."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from omnivision.config.flat import read_flat_file
from omnivision.reporting.logs import read_lines
from omnivision.reporting.predictions import Predictions, read_predictions
from omnivision.reporting.run_directory import RunDir
from omnivision.tools.runs import read_summaries
from omnivision.utils.streams import warn

MAX_POINTS = 2000  # per curve
RESULTS = (
    ("val_top1", "top-1, %"),
    ("val_map", "mAP, %"),
    ("val_loss", "loss, validation"),
    ("loss", "loss, training"),
)


class ProbeResult(BaseModel):
    """Top-1 (%) of one method, and its spread."""

    method: str
    top1: float
    spread: float
    videos: int


class ProbeRow(BaseModel):
    """What the features of a model are worth on a dataset: an entry of a probe.json."""

    model: dict[str, str]
    dataset: str
    chance: float
    train_videos: int
    views: str = ""  # missing in older files
    rank: float
    results: list[ProbeResult]


Percent = tuple[float, float]  # a value and its standard error


class XrayClass(BaseModel):
    """What the recognition of one class relies on; informedness by change."""

    videos: int
    verdict: str
    informedness: dict[str, Percent]


class Xray(BaseModel):
    """What a classifier looks at in the videos of one source: an entry of an xray.json."""

    videos: int
    chance: float
    verdict: str
    views: str = ""  # missing in older files
    top1: dict[str, Percent]
    loss: dict[str, Percent]
    classes: dict[str, XrayClass]


@dataclass(eq=False)
class Run:
    """One run: flat `settings` as saved, `lines` of `metrics.jsonl`, `pretrained` weights with path and SHA-256."""

    name: str
    folder: RunDir
    summary: dict[str, Any]
    settings: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)
    predictions: dict[str, Predictions] = field(default_factory=dict)
    pretrained: list[dict[str, Any]] = field(default_factory=list)
    probes: list[ProbeRow] = field(default_factory=list)
    xrays: dict[str, Xray] = field(default_factory=dict)  # by source

    @property
    def last(self) -> dict[str, Any]:
        """The last logged metrics."""
        return self.summary.get("last") or {}

    @property
    def metadata(self) -> dict[str, Any]:
        """Model, data and start of the run, from its summary."""
        return self.summary.get("run") or {}

    @property
    def has_result(self) -> bool:
        """Whether the run finished training; a running, interrupted or validation-only run has no result."""
        return self.summary.get("status") == "finished" and bool(self.summary.get("epochs"))

    @property
    def result(self) -> tuple[str, float] | None:
        """Name and value of the metric that ranks a run: top-1 or mAP (%), else a loss."""
        found = [(label, self.last[name]) for name, label in RESULTS if self.last.get(name) is not None]
        return found[0] if found else None

    def curve(self, event: str, phase: str, metric: str) -> list[tuple[int, float]]:
        """Return (step, value) of a metric in the log; a long curve is thinned out, keeping the last point."""
        points = [
            (line["step"], line[metric])
            for line in self.lines
            if line.get("event") == event and line.get("phase") == phase and line.get(metric) is not None
        ]
        return points[: -1 : -(-len(points) // MAX_POINTS) or 1] + points[-1:]


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs in run directories, or in folders of them, by start time. Raises UserError for a folder without runs."""
    found = {summary["path"].resolve(): summary for folder in folders for summary in read_summaries(folder)}
    common = os.path.commonpath([path.parent for path in found])
    runs = [_read_run(path, path.relative_to(common).as_posix(), summary) for path, summary in found.items()]
    return sorted(runs, key=lambda run: run.metadata.get("started") or 0)


def _read_run(path: Path, name: str, summary: dict[str, Any]) -> Run:
    folder = RunDir(path)
    log, starts = folder.logs / "metrics.jsonl", folder.logs / "pretrained.json"
    run = Run(name, folder, summary, read_flat_file(path / "config.yaml") or {})
    run.lines = read_lines(log) if log.is_file() else []
    if (watched := folder.logs / "watch.jsonl").is_file():
        by_step = {line.get("step"): line for line in read_lines(watched)}  # a resumed run may have repeated a step
        run.lines += [by_step[step] for step in sorted(by_step, key=lambda step: step or 0)]
    run.pretrained = json.loads(starts.read_text(encoding="utf-8")) if starts.is_file() else []
    for file in sorted(folder.predictions.glob("*.npz")):
        try:
            run.predictions[file.stem] = read_predictions(file)
        except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
            warn(f"{file} cannot be read ({error}). It is left out.")
    for file in sorted((path / "features").glob("*/probe.json"), key=lambda file: file.stat().st_mtime):
        try:
            run.probes += [ProbeRow.model_validate(row) for row in json.loads(file.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError) as error:
            _warn_left_out(file, error)
    if (file := path / "xray" / "xray.json").is_file():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))["datasets"]
            run.xrays = {source: Xray.model_validate(found) for source, found in content.items()}
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            _warn_left_out(file, error)
    return run


def _warn_left_out(file: Path, error: Exception) -> None:
    warn(f"{file} cannot be read ({' '.join(str(error).split())[:200]}). It is left out.")


def find_differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings that differ between runs, except for the run directory, with each run's value."""
    names = {name: None for run in runs for name in run.settings if name != "launcher.experiment_log_dir"}
    found = {name: [str(run.settings.get(name, "")) for run in runs] for name in names}
    return {name: values for name, values in found.items() if len(set(values)) > 1}


Column = tuple[str, str]  # task, FT or LP


class Table(NamedTuple):
    """The paper's table. `rows`: start -> column -> a text, and whether it is the best in its column."""

    columns: list[Column]
    rows: dict[str, dict[Column, tuple[str, bool]]]
    left_out: list[str]  # runs whose top-1 is not a final result yet


def paper_table(runs: Sequence[Run]) -> Table | None:
    """Return final top-1 by start and task, fine-tuned (FT) and linearly probed (LP); None for fewer than two results.

    Several runs with the same start and column are averaged if only their seeds differ; otherwise the best one counts.
    """
    ranked = [run for run in runs if run.last.get("val_top1") is not None and run.metadata.get("trunk")]
    results = [run for run in ranked if run.has_result]
    if len(results) < 2:
        return None
    starts = _name_starts(results)
    groups: dict[tuple[str, Column], list[Run]] = {}
    for run in results:
        frozen = "attentive" if run.metadata.get("model") == "attentive" else "LP"
        column = " + ".join(run.metadata.get("sources") or []), "FT" if run.metadata["trunk"] == "trained" else frozen
        groups.setdefault((starts[run], column), []).append(run)
    values, texts = {}, {}
    for key, members in groups.items():
        top1 = [run.last["val_top1"] for run in members]
        is_mean = set(find_differing_settings(members)) <= {"trainer.seed_value"}
        values[key] = sum(top1) / len(top1) if is_mean else max(top1)
        count = f" ({'mean' if is_mean else 'best'} of {len(top1)})" if len(top1) > 1 else ""
        texts[key] = f"{values[key]:.1f}{count}"
    tasks = list(dict.fromkeys(task for _, (task, _) in groups))
    columns = sorted({column for _, column in groups}, key=lambda column: (tasks.index(column[0]), column[1]))
    rows: dict[str, dict[Column, tuple[str, bool]]] = {start: {} for start in starts.values()}
    for start, column in groups:
        best = max(value for (_, other), value in values.items() if other == column)
        rows[start][column] = texts[start, column], values[start, column] == best
    return Table(columns, rows, [run.name for run in ranked if not run.has_result])


class ProbeTable(NamedTuple):
    """Top-1 on one dataset. `rows`: a model, a cell per method (a text, and whether it is the column's best), the rank."""

    dataset: str
    train_videos: int
    val_videos: int
    chance: float
    methods: list[str]
    rows: list[tuple[str, list[tuple[str, bool]], str]]


def probe_tables(runs: Sequence[Run]) -> list[ProbeTable]:
    """Return a table for each dataset on which `omnivision probe` measured features of some run."""
    named = [(row.model.get("name", run.name), run.name, row) for run in runs for row in run.probes]
    tables = []
    for dataset in dict.fromkeys(row.dataset for *_, row in named):
        members = {  # the newest of each run; random weights are a row beside it
            f"{run}, {name}" if re.fullmatch(r"random(:\d+)?", name) else run: row
            for name, run, row in named
            if row.dataset == dataset and row.results
        }
        if len({row.views for row in members.values()}) > 1:
            members = {f"{name} ({row.views or 'unknown views'})": row for name, row in members.items()}
        first = next(iter(members.values()))
        methods = list(dict.fromkeys(result.method for row in members.values() for result in row.results))
        found = {name: {result.method: result for result in row.results} for name, row in members.items()}
        best = {method: max(own[method].top1 for own in found.values() if method in own) for method in methods}
        rows = [
            (
                name,
                [
                    (f"{own[m].top1:.1f} ± {own[m].spread:.1f}", own[m].top1 == best[m]) if m in own else ("", False)
                    for m in methods
                ],
                f"{members[name].rank:.0f}",
            )
            for name, own in found.items()
        ]
        videos = first.results[0].videos
        tables.append(ProbeTable(dataset, first.train_videos, videos, first.chance, methods, rows))
    return tables


def _name_starts(runs: Sequence[Run]) -> dict[Run, str]:
    """Return the name of what each run started from, with a digest if other weights have the same name."""
    names, digests = {}, {}
    for run in runs:
        parts = (run.metadata.get("pretrained") or "nothing").split(" + ")
        names[run] = " + ".join(Path(part).name for part in parts) + (
            " (average)" * ("average" in run.metadata["trunk"])
        )
        digests[run] = "+".join(str(start.get("sha256"))[:12] for start in run.pretrained)
    ambiguous = {name for name in names.values() if len({digests[run] for run in runs if names[run] == name}) > 1}
    return {run: f"{name} ({digests[run] or 'unknown'})" if name in ambiguous else name for run, name in names.items()}
