"""The ledger of files that did not decode (`logs/bad_samples.jsonl`), and the budget that bounds them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omnivision.data.batch import BadSample
from omnivision.reporting.metrics_log import read_lines
from omnivision.utils.errors import UserError
from omnivision.utils.io import append_line


class BadSampleLedger:
    """Counts each bad sample once. `files` are all that the run could meet; at most `budget` (a share) may be bad."""

    def __init__(self, path: Path, files: int, budget: float) -> None:
        self.path, self.files, self.budget = path, files, budget
        self._known: dict[tuple[str, str, int], tuple[str, str]] = {}  # (path, reason) by source, split and index
        if path.exists():
            for entry in read_lines(path):
                source, index = entry.get("source"), entry.get("index")
                if _is_mended(entry):
                    continue
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
                    append_line(self.path, json.dumps(asdict(sample) | {"time": time.time()}))
        if samples and len(self) > self.budget * self.files:
            listed = "\n".join(f"  {path}: {reason}" for path, reason in list(self._known.values())[:20])
            raise UserError(
                f"{len(self)} of {self.files} samples could not be decoded, more than the budget of {self.budget:.2%} "
                "(trainer.data.bad_sample_budget). omnivision check-data finds all of them. Mend them or take them out of "
                "the split (delete them, and run the same omnivision prepare again), or raise it; if none is found, change "
                f"datasets.NAME.prefix. All are in {self.path}:\n{listed}",
                on_all_ranks=True,
            )


def _is_mended(entry: Mapping[str, Any]) -> bool:
    """Whether a file was changed after it was found bad, or is there again, because its disk was mounted, say."""
    try:
        changed = os.stat(str(entry.get("path"))).st_ctime
    except (OSError, ValueError):
        return False
    found = entry.get("time")
    return bool(entry.get("missing")) or (isinstance(found, (int, float)) and changed > found)
