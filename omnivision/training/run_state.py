"""Progress of a run, and the throughput between two lines of its log."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from omnivision.tasks.metrics import Meter


@dataclass
class RunState:
    """Progress of a run: `step` steps of epoch `epoch` (from 0) are done."""

    steps_per_epoch: int = 1
    epoch: int = 0
    step: int = 0
    best: float | None = None  # top-1 (%) or loss of the evaluation that best.pt holds
    best_loss: float | None = None
    best_epoch: int | None = None  # counted from 1
    seconds: float = 0.0  # until `start_time`
    start_time: float = field(default_factory=time.monotonic)
    last_metrics: dict[str, Any] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)  # sums of the current epoch

    @property
    def global_step(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def weights_epoch(self) -> int:
        """The last epoch, from 0, that the weights were trained in; between epochs `epoch` is the next one."""
        return self.epoch if self.step else max(0, self.epoch - 1)

    def count_seconds(self) -> None:
        """Add the time since the last call to `seconds`."""
        now = time.monotonic()
        self.seconds, self.start_time = self.seconds + now - self.start_time, now

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
class ThroughputMeter:
    """Clips and waiting time between two lines of the log."""

    start_time: float = field(default_factory=time.monotonic)
    clips: int = 0  # of all ranks
    data_seconds: float = 0.0

    def metrics(self, device: torch.device) -> dict[str, float]:
        """Clips per second of all ranks, the share of time spent waiting for data, and this process's peak memory in GB."""
        seconds = max(time.monotonic() - self.start_time, 1e-9)
        return {
            "clips_per_second": self.clips / seconds,
            "data_wait": self.data_seconds / seconds,
            "memory_gb": peak_memory(device) / 1e9,
        }


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: reserved on its GPU, or resident on the host."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def is_due(count: int, every: int | None) -> bool:
    """Whether something done every so many epochs or steps (None: never) is due after `count`."""
    return every is not None and count % every == 0
