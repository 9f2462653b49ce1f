"""The ledger of files that did not decode (`logs/bad_samples.jsonl`), and the budget that bounds them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from omnivision.data.batch import BadSample
from omnivision.errors import UserError
from omnivision.reporting.metrics_log import read_lines


class BadSampleLedger:
    """Counts each bad sample once. `files` are all that the run could meet; at most `budget` (a share) may be bad."""

    def __init__(self, path: Path, files: int, budget: float) -> None:
        self.path, self.files, self.budget = path, files, budget
        self._known: dict[tuple[str, str, int], tuple[str, str]] = {}  # (path, reason) by source, split and index
        self._cut = False  # a crash cut the last line
        if path.exists():
            self._cut = not path.read_bytes().endswith(b"\n")
            for entry in read_lines(path):
                source, index = entry.get("source"), entry.get("index")
                if entry.get("missing") and os.path.exists(str(entry.get("path"))):
                    continue  # it is back, with the disk that it lies on perhaps
                if isinstance(source, str) and isinstance(index, int):
                    self._known[source, str(entry.get("split")), index] = (
                        str(entry.get("path")),
                        str(entry.get("reason")),
                    )

    def __len__(self) -> int:
        return len(self._known)

    def add(self, samples: Sequence[BadSample], write: bool) -> None:
        """Note bad samples, of all processes, in every process; one writes. Raises UserError once the budget is passed."""
        for sample in samples:
            key = sample.source, sample.split, sample.index
            if key not in self._known:
                self._known[key] = sample.path, sample.reason
                if write:
                    with open(self.path, "a", encoding="utf-8", errors="surrogateescape") as file:
                        file.write("\n" * self._cut + json.dumps(asdict(sample)) + "\n")
                    self._cut = False
        if samples and len(self) > self.budget * self.files:
            listed = "\n".join(f"  {path}: {reason}" for path, reason in list(self._known.values())[:20])
            raise UserError(
                f"{len(self)} of {self.files} files could not be decoded, more than the budget of {self.budget:.2%} "
                "(trainer.data.bad_sample_budget). Mend them or take them out of the split, or raise it; if none is found, "
                f"change datasets.NAME.prefix. All are in {self.path}:\n{listed}",
                everywhere=True,
            )
