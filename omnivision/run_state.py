"""Where a run stands, and what happened between two lines of its log."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, field

import torch


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

    def figures(self, device: torch.device) -> dict[str, float]:
        """Clips per second of all processes together, the share of the time spent waiting for data, and the most memory that
        this process has had so far: of its accelerator, or of its own.
        """
        seconds = max(time.monotonic() - self.began, 1e-9)
        return {
            "clips_per_second": self.clips / seconds,
            "data_wait": self.waited / seconds,
            "memory_gb": most_memory(device) / 1e9,
        }


def most_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: of a GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def due(count: int, every: int | None) -> bool:
    """Whether something that happens every so many epochs or steps (None: never) happens after so many."""
    return every is not None and count % every == 0
