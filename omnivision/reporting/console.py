"""Progress on the console: a live bar on a terminal, plain lines that grep likes everywhere else."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LOG = logging.getLogger("omnivision")


STARVED = 0.3  # share of the time spent waiting for data from which on it is worth a word
LOOKS = 5  # lines of the log before a verdict: the first batches always come late
AGAIN_SECONDS = 1800.0


class DataStallWarning:
    """Says so when a run waits for data more than it computes should let it; again after half an hour at the earliest."""

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=LOOKS)
        self._said = float("-inf")

    def update(self, data_wait: float) -> str | None:
        """The share of the time since the last line; a verdict when there is one to give."""
        self._waits.append(data_wait)
        share = statistics.median(self._waits)  # not the mean: the start of the workers is one long wait
        if len(self._waits) < LOOKS or share < STARVED or time.monotonic() - self._said < AGAIN_SECONDS:
            return None
        self._said = time.monotonic()
        return (
            f"{share:.0%} of the time is spent waiting for data: raise num_workers (a core each), or make the films quicker to "
            "read with omnivision prepare --short-side 256 --gop 12."
        )


class ProgressLine:
    """Progress through the steps of a run. `seconds_between_lines` bounds how often plain lines appear."""

    def __init__(self, total_steps: int, done: int, console: Console, seconds_between_lines: float = 5.0) -> None:
        self.console, self.total, self.between = console, total_steps, seconds_between_lines
        self.began, self.first = time.monotonic(), done
        self.last_line = float("-inf")
        self._bar: Progress | None = None
        self._bar_width = max(8, min(40, console.width - 100))
        self._task: TaskID | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(self._bar_width),
                MofNCompleteColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=console,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=done, figures="")
            self._bar.start()

    def step(self, epoch: int, epochs: int, step: int, told: Mapping[str, float]) -> None:
        """`told` are the figures of a step: loss, clips_per_second, data_wait, and memory_gb and mfu where they are known."""
        parts = [f"loss {told['loss']:.4f}", f"{told['clips_per_second']:.1f} clips/s"]
        parts.append(f"waiting for data {told['data_wait']:.0%}")
        parts += [f"{told['memory_gb']:.1f} GB"] if "memory_gb" in told else []
        parts += [f"{told['mfu']:.0%} of the peak"] if "mfu" in told else []
        described = f"epoch {epoch + 1}/{epochs}"
        if self._bar is not None and self._task is not None:
            beside = len(f"{described} {self.total}/{self.total} ETA 00:00:00 ") + self._bar_width + 1
            shown = parts.copy()
            while len(shown) > 1 and len("  ".join(shown)) > self.console.width - beside:  # rich would cut a number
                shown.pop()
            self._bar.update(self._task, completed=step, description=described, figures="  ".join(shown))
        if time.monotonic() - self.last_line >= self.between or step == self.total:
            self.last_line = time.monotonic()
            line = f"{described}  step {step}/{self.total}  {'  '.join(parts)}  ETA {self._eta(step)}"
            LOG.info(line)
            if self._bar is None:
                self.console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _eta(self, step: int) -> str:
        done = step - self.first
        if done <= 0:
            return "unknown"
        left = (time.monotonic() - self.began) / done * (self.total - step)
        return str(timedelta(seconds=round(left)))
