"""Progress on the console: a live bar on a terminal, plain lines that grep likes everywhere else."""

from __future__ import annotations

import logging
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LOG = logging.getLogger("omnivision")


class ProgressLine:
    """Progress through the steps of a run. `seconds_between_lines` bounds how often plain lines appear."""

    def __init__(self, total_steps: int, done: int, console: Console, seconds_between_lines: float = 5.0) -> None:
        self.console, self.total, self.between = console, total_steps, seconds_between_lines
        self.began, self.first = time.monotonic(), done
        self.last_line = float("-inf")
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=console,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=done, figures="")
            self._bar.start()

    def step(self, epoch: int, epochs: int, step: int, loss: float, clips_per_second: float, data_wait: float) -> None:
        figures = f"loss {loss:.4f}  {clips_per_second:.1f} clips/s  waiting for data {data_wait:.0%}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=f"epoch {epoch + 1}/{epochs}", figures=figures)
        if time.monotonic() - self.last_line >= self.between or step == self.total:
            self.last_line = time.monotonic()
            line = f"epoch {epoch + 1}/{epochs}  step {step}/{self.total}  {figures}  ETA {self._eta(step)}"
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
