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


MAX_DATA_WAIT = 0.3  # share of the time
MIN_LOG_LINES = 5  # before a warning: the first batches are always late
REPEAT_SECONDS = 1800.0


class DataStallWarning:
    """Warn when steps wait for data too long; at most once in half an hour."""

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=MIN_LOG_LINES)
        self._last_warning = float("-inf")

    def update(self, data_wait: float) -> str | None:
        """Add the share of time that was spent waiting since the last line; return a warning if it is due."""
        self._waits.append(data_wait)
        share = statistics.median(self._waits)  # not the mean: the start of the workers is one long wait
        if (
            len(self._waits) < MIN_LOG_LINES
            or share < MAX_DATA_WAIT
            or time.monotonic() - self._last_warning < REPEAT_SECONDS
        ):
            return None
        self._last_warning = time.monotonic()
        return (
            f"{share:.0%} of the time is spent waiting for data: raise num_workers (a core each), or make the videos faster to "
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

    def step(self, epoch: int, epochs: int, step: int, metrics: Mapping[str, float]) -> None:
        """`metrics` of a step: loss, clips_per_second, data_wait, and memory_gb and mfu where they are known."""
        parts = [f"loss {metrics['loss']:.4f}", f"{metrics['clips_per_second']:.1f} clips/s"]
        parts.append(f"waiting for data {metrics['data_wait']:.0%}")
        parts += [f"{metrics['memory_gb']:.1f} GB"] if "memory_gb" in metrics else []
        parts += [f"{metrics['mfu']:.0%} of the peak"] if "mfu" in metrics else []
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
