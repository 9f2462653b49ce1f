"""`logs/metrics.jsonl`: one strictly valid JSON object a line, and no step twice after a resume."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from omnivision.reporting.run_directory import finite
from omnivision.utils.io import append_line, write_atomically


class MetricsLog:
    def __init__(self, path: Path) -> None:
        self.path = path

    def truncate_after(self, step: int, replay: str = "") -> None:
        """Forget what was logged after `step`, and of that step the phase or event `replay`: the run goes on from there.

        A last line cut by a crash goes as well.
        """
        if self.path.exists():
            kept = [
                json.dumps(finite(line), allow_nan=False) + "\n"
                for line in read_lines(self.path)
                if _step(line) < step or (_step(line) == step and replay not in (line.get("phase"), line.get("event")))
            ]
            write_atomically(self.path, "".join(kept))

    def write(self, event: str, phase: str, epoch: int, step: int, **values: Any) -> None:
        line = {"event": event, "phase": phase, "epoch": epoch, "step": step, "time": time.time(), **values}
        append_line(self.path, json.dumps(finite(line), allow_nan=False))


def _step(line: dict[str, Any]) -> float:
    step = line.get("step")
    return step if isinstance(step, int) else math.inf


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a log, one a line; a line that a crash cut, or that is none of ours, is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines
