"""Where a run stands, and what happened between two lines of its log."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class State:
    """Where a run is: `step` steps of epoch `epoch` are done."""

    epoch: int = 0
    step: int = 0
    best: float | None = None
    seconds: float = 0.0


@dataclass
class Interval:
    """What happened between two lines of the log."""

    began: float = field(default_factory=time.monotonic)
    clips: int = 0
    waited: float = 0.0

    def figures(self) -> dict[str, float]:
        """Clips per second of all processes together, and the share of the time spent waiting for data."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        return {"clips_per_second": self.clips / seconds, "data_wait": self.waited / seconds}


def due(count: int, every: int | None) -> bool:
    """Whether something that happens every so many epochs or steps (None: never) happens after so many."""
    return every is not None and count % every == 0
