"""Progress on the console: a live bar on a terminal, plain lines that grep likes everywhere else."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG = logging.getLogger("omnivision")

MAX_DATA_WAIT = 0.3  # share of the time
MIN_LOG_LINES = 5  # before a warning: the first batches are always late
REPEAT_SECONDS = 1800.0


class DataStallWarning:
    """Warn when steps wait for data too long; at most once in half an hour."""

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=MIN_LOG_LINES)
        self._next_warning = float("-inf")

    def update(self, data_wait: float) -> str | None:
        """Add the share of time that was spent waiting since the last line; return a warning if it is due."""
        self._waits.append(data_wait)
        share = statistics.median(self._waits)  # not the mean: the start of the workers is one long wait
        is_due = len(self._waits) == MIN_LOG_LINES and time.monotonic() >= self._next_warning
        if not is_due or share < MAX_DATA_WAIT:
            return None
        self._next_warning = time.monotonic() + REPEAT_SECONDS
        return (
            f"{share:.0%} of the time is spent waiting for data: raise num_workers (a core each), or make the videos faster to "
            "read with omnivision prepare --short-side 256 --gop 12."
        )


class ProgressLine:
    """Progress through the steps of a run. `seconds_between_lines` bounds how often plain lines appear."""

    def __init__(self, total_steps: int, done: int, console: Console, seconds_between_lines: float = 5.0) -> None:
        self.console, self.total, self.seconds_between_lines = console, total_steps, seconds_between_lines
        self.start_time, self.first_step = time.monotonic(), done
        self.next_line = float("-inf")
        self._bar_width = max(8, min(40, console.width - 100))
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(self._bar_width),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=done, metrics="")
        self._bar.start()

    def step(self, epoch: int, epochs: int, step: int, metrics: Mapping[str, float]) -> None:
        """`metrics` of a step: loss, clips_per_second, data_wait, and memory_gb and mfu where they are known."""
        parts = [f"loss {metrics['loss']:.4f}", f"{metrics['clips_per_second']:.1f} clips/s"]
        parts.append(f"waiting for data {metrics['data_wait']:.0%}")
        parts += [f"{metrics['memory_gb']:.1f} GB"] if "memory_gb" in metrics else []
        parts += [f"{metrics['mfu']:.0%} of the peak"] if "mfu" in metrics else []
        epoch_text = f"epoch {epoch + 1}/{epochs}"
        line = f"{epoch_text}  step {step}/{self.total}  {'  '.join(parts)}  ETA {self._eta(step)}"
        room = self.console.width - self._bar_width - len(f"{epoch_text} {self.total}/{self.total} ETA 00:00:00 ") - 1
        while len(parts) > 1 and len("  ".join(parts)) > room:  # rich would cut a number
            parts.pop()
        self._bar.update(self._task, completed=step, description=epoch_text, metrics="  ".join(parts))
        if time.monotonic() >= self.next_line or step == self.total:
            self.next_line = time.monotonic() + self.seconds_between_lines
            LOG.info(line)
            if not self.console.is_terminal:
                self.console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()

    def _eta(self, step: int) -> str:
        done = step - self.first_step
        if done <= 0:
            return "unknown"
        return str(timedelta(seconds=round((time.monotonic() - self.start_time) / done * (self.total - step))))
