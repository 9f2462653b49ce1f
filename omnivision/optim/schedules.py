"""Schedules: functions of progress in [0, 1], the fraction of optimizer steps already done.

A configuration may use any other callable of progress, e.g. fvcore's param schedulers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from omnivision.utils.errors import UserError

Schedule = Callable[[float], float]
BOUNDARY_TOLERANCE = 1e-6  # a boundary between phases belongs to the later one, despite rounding


@dataclass(frozen=True)
class Constant:
    """The same value throughout."""

    value: float

    def __call__(self, progress: float) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """A straight line from `start` to `end`."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `start` to `end` (Loshchilov & Hutter 2017, without restarts)."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Scaled:
    """A schedule times a number."""

    schedule: Schedule
    by: float

    def __call__(self, progress: float) -> float:
        return self.schedule(progress) * self.by


def peak(schedule: Schedule) -> float:
    """Return the highest value of a schedule over a run."""
    return max(schedule(i / 10_000) for i in range(10_001))


class SequentialSchedule:
    """Schedules in sequence, each stretched over its fraction of the run; `shares` sum to 1."""

    def __init__(self, schedules: Sequence[Schedule], shares: Sequence[float]) -> None:
        fits = len(schedules) == len(shares) and min(shares) >= 0 and shares[-1] > 0 and abs(sum(shares) - 1) < 1e-6
        if not fits:
            raise UserError(
                f"shares of {len(schedules)} schedules must be >= 0, the last > 0, and sum to 1, got {list(shares)}. Set them "
                "in trainer.optim.options."
            )
        self.schedules, self.shares = list(schedules), list(shares)

    def __call__(self, progress: float) -> float:
        phase, start = 0, 0.0
        while phase < len(self.shares) - 1 and progress + BOUNDARY_TOLERANCE > start + self.shares[phase]:
            start += self.shares[phase]
            phase += 1
        return self.schedules[phase]((progress - start) / self.shares[phase])


Phases = SequentialSchedule  # the `_target_` of earlier configurations


class WarmupCosine(SequentialSchedule):
    """Linear from `start` to `peak` over the first `warmup` fraction of the run, then half a cosine to `end`."""

    def __init__(self, start: float, peak: float, end: float, warmup: Annotated[float, Field(ge=0, lt=1)]) -> None:
        super().__init__([Linear(start, peak), Cosine(peak, end)], [warmup, 1 - warmup])
