"""`logs/metrics.jsonl`: one strictly valid JSON object a line, and no step twice after a resume."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from omnivision.files import write_atomically
from omnivision.reporting.run_folder import finite


class MetricsLog:
    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: the run goes on from there. A last line cut by a crash goes as well."""
        if self.path.exists():
            kept = [json.dumps(line, allow_nan=False) + "\n" for line in read_lines(self.path) if line["step"] <= step]
            write_atomically(self.path, "".join(kept))

    def write(self, event: str, phase: str, epoch: int, step: int, **values: Any) -> None:
        line = {"event": event, "phase": phase, "epoch": epoch, "step": step, "time": time.time(), **values}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(line), allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics log; an unfinished last line is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
