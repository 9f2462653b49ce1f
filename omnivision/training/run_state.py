"""Where a run stands, and what happened between two lines of its log."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass
class State:
    """Where a run is: `step` steps of epoch `epoch` are done."""

    epoch: int = 0
    step: int = 0
    best: float | None = None  # top-1 (%) or loss of the evaluation that best.pt holds
    best_loss: float | None = None
    best_epoch: int | None = None  # counted from 1
    seconds: float = 0.0

    def update_best(self, metrics: Mapping[str, float]) -> bool:
        """Keep an evaluation of the current epoch unless an earlier one is better; return whether it was kept.

        Higher top-1 is better (lower loss where there is no top-1), then lower loss, then the later epoch.
        """
        top1, loss = metrics.get("top1"), metrics.get("loss", math.nan)
        value = loss if top1 is None else top1
        if not math.isfinite(value):
            return False
        sign = -1 if top1 is None else 1
        known = loss if math.isfinite(loss) else math.inf
        before = math.inf if self.best_loss is None else self.best_loss  # checkpoints of older versions lack it
        if self.best is not None and (sign * value, -known) < (sign * self.best, -before):
            return False
        self.best, self.best_loss, self.best_epoch = value, known, self.epoch + 1
        return True


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
