"""JSON-lines logs of a run: metrics, and files that could not be decoded, which a budget bounds."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnivision.config.messages import prefix_settings
from omnivision.utils.errors import UserError
from omnivision.utils.io import append_line, to_json, write_atomically

if TYPE_CHECKING:
    from omnivision.data.batch import BadSample  # imports torch, for which `omnivision runs` should not wait


class MetricsLog:
    """JSON objects, one per line, each with `event`, `phase`, `epoch`, `step` and `time`; no step twice after a resume."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def truncate_after(self, step: int, replay: str = "") -> None:
        """Drop lines after `step`, lines at `step` whose phase or event is `replay`, and a line truncated by a crash."""
        if self.path.exists():
            kept = [
                json.dumps(line) + "\n"
                for line in read_lines(self.path)
                if (at := line.get("step", math.inf)) < step
                or (at == step and replay not in (line.get("phase"), line.get("event")))
            ]
            write_atomically(self.path, "".join(kept))

    def write(self, event: str, phase: str, epoch: int, step: int, **values: Any) -> None:
        """Append a line; numbers that JSON lacks (NaN, infinity) become null."""
        line = {"event": event, "phase": phase, "epoch": epoch, "step": step, "time": time.time(), **values}
        append_line(self.path, to_json(line))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSON objects of a log, one per line; truncated and foreign lines are left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict)]


class BadSampleLedger:
    """`logs/bad_samples.jsonl`: bad samples, each counted once; at most a share `budget` of `files` may be bad."""

    def __init__(self, path: Path, files: int, budget: float) -> None:
        self.path = path
        self.files = files
        self.budget = budget
        self._known: dict[tuple[str, str, int], str] = {}  # path and reason by source, split and index
        for entry in read_lines(path) if path.exists() else []:
            if {"source", "index", "path"} <= entry.keys() and not _is_fixed(entry):
                key = entry["source"], entry.get("split", "train"), entry["index"]
                self._known[key] = f"{entry['path']}: {entry.get('reason')}"

    def __len__(self) -> int:
        return len(self._known)

    def add(self, samples: Sequence[BadSample], write: bool) -> None:
        """Add the bad samples of all ranks; every rank calls this, one writes. Raises UserError once the budget is spent."""
        for sample in samples:
            key = sample.source, sample.split, sample.index
            if key not in self._known:
                self._known[key] = f"{sample.path}: {sample.reason}"
                if write:
                    append_line(self.path, json.dumps(asdict(sample) | {"time": time.time()}))
        if samples and len(self) > self.budget * self.files:
            first = "".join(f"\n  {text}" for text in list(self._known.values())[:20])
            prefixes = prefix_settings(source for source, _, _ in self._known)
            raise UserError(
                f"{len(self)} of {self.files} samples could not be decoded; trainer.data.bad_sample_budget is "
                f"{self.budget:.2%}. Delete the files and run the same omnivision prepare again, raise the budget, or check "
                f"{prefixes}. omnivision check-data finds all; {self.path} has these:{first}",
                on_all_ranks=True,
            )


def _is_fixed(entry: Mapping[str, Any]) -> bool:
    """Return whether a file was changed after it was recorded as bad, or exists again (e.g. its disk was mounted)."""
    try:
        changed = os.stat(entry["path"]).st_ctime
    except OSError:
        return False
    return bool(entry.get("missing")) or changed > entry.get("time", math.inf)
