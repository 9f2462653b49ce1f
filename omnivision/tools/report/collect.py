"""What a report needs of each run directory."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omnivision.checkpoint.fingerprint import flat_file
from omnivision.data.catalog import are_segments
from omnivision.reporting.logs import read_lines
from omnivision.reporting.run_directory import RunDir
from omnivision.tasks.metrics import confusion_matrix
from omnivision.utils.errors import UserError

MAX_BYTES = 30_000_000  # of a picture; of predictions more, if their file is as large


@dataclass
class Predicted:
    """Predictions of the last evaluation for each validation video of a source."""

    labels: np.ndarray  # int64 (V,), -1 where there is none
    shares: np.ndarray  # probabilities, float32 (V, classes)
    paths: list[str]
    names: list[str]  # of the classes
    segments: np.ndarray | None = None  # float64 (V, 2), seconds; None for whole videos

    @property
    def known(self) -> np.ndarray:
        """bool (V,): whether a video has a label."""
        return self.labels >= 0

    @property
    def guesses(self) -> np.ndarray:
        return self.shares.argmax(1)

    def confusion(self) -> np.ndarray:
        """Return int64 (classes, classes): rows are labels, columns predictions."""
        return confusion_matrix(self.labels, self.guesses, self.shares.shape[1])

    def by_class(self) -> list[tuple[str, int, float]]:
        """Return name, number of videos and accuracy (%) of each class that has a video, worst first."""
        found = self.confusion()
        counts = found.sum(1)
        rows = [
            (self.names[label], int(counts[label]), float(100 * found[label, label] / counts[label]))
            for label in range(len(counts))
            if counts[label]
        ]
        return sorted(rows, key=lambda row: (row[2], row[0]))


@dataclass(eq=False)
class Run:
    """One run. `settings`: flat, as saved; `lines`: those of `metrics.jsonl`."""

    name: str
    folder: RunDir
    summary: dict[str, Any]
    settings: dict[str, Any]
    lines: list[dict[str, Any]]
    predicted: dict[str, Predicted] = field(default_factory=dict)
    pretrained: list[dict[str, Any]] = field(default_factory=list)  # path and SHA-256 of what it started from

    @property
    def last(self) -> dict[str, Any]:
        return self.summary.get("last") or {}

    def steps(self) -> list[dict[str, Any]]:
        """Return the lines about training steps."""
        return [line for line in self.lines if line.get("event") == "step" and isinstance(line.get("step"), int)]

    def epochs(self, phase: str) -> list[dict[str, Any]]:
        """Return the lines about epochs of training ("train") or evaluations ("val")."""
        found = [line for line in self.lines if line.get("event") == "epoch" and line.get("phase") == phase]
        return [line for line in found if isinstance(line.get("step"), int)]

    def pictures(self, suffix: str) -> list[Path]:
        """Return the reconstructions, oldest first."""
        found = [path for path in self.folder.pictures.glob(f"*{suffix}") if not path.name.startswith("confusion_")]
        # Plain files: a link may lead out of the folder, and the page is handed on.
        found = [path for path in found if path.is_file() and not path.is_symlink() and path.stat().st_size < MAX_BYTES]
        return sorted(found, key=lambda path: (path.stem == "last", path.name))


def find_runs(given: Sequence[Path]) -> list[Run]:
    """Return the runs in run directories, or in folders of them, by start time.

    Raises UserError for a folder without a run.
    """
    folders: dict[Path, str] = {}
    for path in given:
        if not is_folder(path):
            raise UserError(
                f"{str(path)[:200]} is no folder; expected a run directory, or a folder of them. Change RUN."
            )
        found = sorted(file.parent for file in path.rglob("summary.json") if file.is_file())
        if not found:
            raise UserError(f"There is no run in {path}: no summary.json was found. Change RUN.")
        for folder in found:
            name = folder.relative_to(path).as_posix() if folder != path else folder.resolve().name
            folders.setdefault(folder.resolve(), name)
    runs = [read_run(folder, name) for folder, name in distinct_names(folders).items()]
    return sorted(runs, key=lambda run: (run.summary.get("run") or {}).get("started") or 0)


def is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long, or none
        return False


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # not ours to look at, or a name too long
        return False


def distinct_names(folders: dict[Path, str]) -> dict[Path, str]:
    """Return a distinct name for each folder; equal names get the parent folder in front."""
    counts = Counter(folders.values())
    names = {folder: name if counts[name] == 1 else f"{folder.parent.name}/{name}" for folder, name in folders.items()}
    if len(set(names.values())) == len(names):
        return names
    return {folder: name if counts[folders[folder]] == 1 else str(folder) for folder, name in names.items()}


def read_run(path: Path, name: str) -> Run:
    folder = RunDir(path)
    log = folder.logs / "metrics.jsonl"
    return Run(
        name,
        folder,
        folder.read_summary(),
        flat_file(path / "config.yaml") or {},
        _lines(log),
        {f.stem: found for f in sorted(folder.predictions.glob("*.npz")) if f.is_file() and (found := _predicted(f))},
        _pretrained(folder.logs / "pretrained.json"),
    )


def _lines(log: Path) -> list[dict[str, Any]]:
    """Return the logged lines; none if the log cannot be read."""
    try:
        return read_lines(log) if log.is_file() else []
    except OSError:
        return []


def _predicted(file: Path) -> Predicted | None:
    """Return the predictions in a file; None if it is damaged or expands to more than it should."""
    try:
        with zipfile.ZipFile(file) as archive:  # arrays are stored as they are
            if sum(part.file_size for part in archive.infolist()) > max(MAX_BYTES, 2 * file.stat().st_size):
                return None
        with np.load(file, allow_pickle=False) as found, np.errstate(over="ignore", invalid="ignore"):
            scores, labels = np.asarray(found["scores"], np.float32), np.asarray(found["label"], np.int64)
            paths, names = [str(path) for path in found["path"]], [str(name) for name in found["class_names"]]
            segments = np.asarray(found["segment"], np.float64) if "segment" in found else None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ):
        return None
    if scores.ndim != 2 or labels.ndim != 1 or not len(scores) == len(labels) == len(paths):
        return None
    if not 0 < len(names) == scores.shape[1] or not -1 <= labels.min(initial=-1) <= labels.max(initial=-1) < len(names):
        return None
    if not np.isfinite(scores).all() or (segments is not None and not are_segments(segments, len(paths))):
        return None
    return Predicted(labels, torch.from_numpy(scores).softmax(1).numpy(), paths, names, segments)


def _pretrained(file: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return []
    return (
        [each for each in found if isinstance(each, dict) and _is_path(each.get("path"))]
        if isinstance(found, list)
        else []
    )


def _is_path(text: object) -> bool:
    if not isinstance(text, str) or "\0" in text or len(text) > 4000:
        return False
    try:
        return bool(os.fsencode(text))
    except UnicodeEncodeError:
        return False


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings that differ between runs, with the value in each; the run directory does not count."""
    found: dict[str, list[str]] = {}
    for name in {name: None for run in runs for name in run.settings}:
        values = [str(run.settings.get(name, "")) for run in runs]
        if len(set(values)) > 1 and name != "launcher.experiment_log_dir":
            found[name] = values
    return found


def is_result(run: Run) -> bool:
    """Return whether a run trained to its end; a running, interrupted or validation-only run has no result."""
    return run.summary.get("status") == "finished" and bool(run.summary.get("epochs"))


def result(run: Run) -> tuple[str, float] | None:
    """Return the name and value of the metric that ranks a run: top-1 (%), else a loss; None without either."""
    for name, label in (("val_top1", "top-1, %"), ("val_loss", "loss, validation"), ("loss", "loss, training")):
        if isinstance(value := run.last.get(name), (int, float)):
            return label, float(value)
    return None


def lineage(run: Run, known: Sequence[Run]) -> list[str]:
    """Return the checkpoints that a run started from, nearest first, as far as their run directories exist."""
    found, seen = [], {run.folder.path.resolve()}
    by_folder = {each.folder.path.resolve(): each for each in known}
    current: Run | None = run
    while current is not None and current.pretrained:
        paths = [Path(str(each.get("path"))) for each in current.pretrained]
        digests = [str(each.get("sha256"))[:12] for each in current.pretrained]
        found.append(" + ".join(f"{path} (SHA-256 {digest})" for path, digest in zip(paths, digests, strict=True)))
        folder = paths[0].parent.parent.resolve()
        current = by_folder.get(folder)
        if current is None and folder not in seen and is_file(folder / "summary.json"):
            current = read_run(folder, folder.name)
        if folder in seen:
            break
        seen.add(folder)
    return found
