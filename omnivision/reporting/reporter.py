"""All output of a run: console, `metrics.jsonl`, loggers, images. Only rank 0's is enabled."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from omnivision.reporting import images
from omnivision.reporting.loggers import Logger, start_loggers
from omnivision.reporting.logs import MetricsLog
from omnivision.reporting.predictions import (
    IMAGE_PREFIXES,
    Predictions,
    draw_predictions,
    image_name,
    write_predictions,
)
from omnivision.reporting.run_directory import RunDir
from omnivision.tasks.base import Visualization
from omnivision.utils.streams import print_text

LOG = logging.getLogger("omnivision")
MAX_DATA_WAIT = 0.3  # fraction of time waiting for data that causes a warning
MIN_LOG_LINES = 5  # log lines before a warning: the first batches are always late
REPEAT_SECONDS = 1800.0


class Reporter:
    """Output of a run; with `enabled=False` (on all ranks but 0) it writes nothing.

    Args:
        extra_loggers: names of loggers besides TensorBoard (`trainer.logging.also`).
        settings: flat settings of the run, for these loggers.
    """

    def __init__(
        self,
        run_dir: RunDir,
        enabled: bool,
        console: Console | None = None,
        extra_loggers: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_dir, self.enabled = run_dir, enabled
        self.console = console or Console(quiet=not enabled)
        self.extra_loggers, self.settings = extra_loggers, settings or {}
        self._metrics = MetricsLog(run_dir.logs / "metrics.jsonl")
        self._loggers: list[Logger] = []
        self._progress: ProgressLine | None = None
        self._data_stall = DataStallWarning()

    def connect(self, step: int) -> None:
        """Start the loggers, continuing after `step`. Raises UserError for one that cannot be started."""
        if self.enabled and not self._loggers:
            self._loggers = start_loggers(self.extra_loggers, self.run_dir, self.settings, step)

    def start(self, step: int, total_steps: int, replay: str = "") -> None:
        """Start logging at `step`. Drops later entries, and entries at `step` whose phase or event is `replay`."""
        self.connect(step)
        if self.enabled:
            self._metrics.truncate_after(step, replay)
            self._progress = ProgressLine(total_steps, step, self.console)

    def info(self, text: str) -> None:
        """Print a text and log it."""
        if self.enabled:
            LOG.info(text)
            print_text(text, self.console)

    def log_step(self, epoch: int, epochs: int, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of a training step."""
        if self._may_write():
            self._metrics.write("step", "train", epoch, step, **metrics)
            self._log_scalars("train", metrics, step)
            if self._progress is not None:
                self._progress.step(epoch, epochs, step, metrics)
            if warning := self._data_stall.update(metrics["data_wait"]):
                self.info(warning)

    def log_epoch(self, phase: str, epoch: int, step: int, metrics: dict[str, Any]) -> None:
        """Log the metrics of a training epoch or of an evaluation."""
        if self._may_write():
            self._metrics.write("epoch", phase, epoch, step, **metrics)
            numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
            self._log_scalars(f"{phase}_epoch", numbers, step)
            text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            self.info(f"{f'epoch {epoch + 1} ' if step else ''}{phase}: {text}")  # step 0: pretrained weights

    def save_visualization(self, name: str, what: Visualization, step: int) -> None:
        """Write PNG and GIF to `pictures/`, and pass the GIF to the loggers."""
        if self._may_write():
            images.save(what, self.run_dir.pictures, name)
            self._log(lambda logger: logger.log_image("pictures", self.run_dir.pictures / f"{name}.gif", step))

    def save_predictions(self, source: str, predictions: Predictions, step: int) -> None:
        """Write the predictions for each video of a source, and draw them."""
        if self._may_write():
            write_predictions(self.run_dir.predictions, source, predictions)
            self.run_dir.pictures.mkdir(exist_ok=True)
            file = self.run_dir.pictures / image_name(predictions.label_type, source)
            draw_predictions(predictions, f"{source}, step {step}").save(file)
            self._log(lambda logger: logger.log_image(f"{IMAGE_PREFIXES[predictions.label_type]}/{source}", file, step))

    def _may_write(self) -> bool:
        """Return whether this is rank 0 and still holds the lock of the run directory."""
        return self.enabled and not self.run_dir.lock_lost()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        if self._progress is not None:
            self._progress.close()
        self._log(lambda logger: logger.close(failed))

    def _log_scalars(self, prefix: str, metrics: dict[str, float], step: int) -> None:
        named = {f"{prefix}/{name}": value for name, value in metrics.items()}
        self._log(lambda logger: logger.log_scalars(named, step))

    def _log(self, what: Callable[[Logger], None]) -> None:
        """Call all loggers; drop one that fails (its server, its disk) with a warning."""
        for logger in list(self._loggers):
            try:
                what(logger)
            except Exception as error:
                self._loggers.remove(logger)
                self.info(f"warning: {type(logger).__name__} failed and is dropped: {type(error).__name__}: {error}")


class DataStallWarning:
    """Warn when steps wait for data too long, at most once per half hour."""

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=MIN_LOG_LINES)
        self._next_warning = float("-inf")

    def update(self, data_wait: float) -> str | None:
        """Add the fraction of time spent waiting since the last log line; return a warning if it is due."""
        self._waits.append(data_wait)
        share = statistics.median(self._waits)  # not the mean: starting the workers is one long wait
        is_due = len(self._waits) == MIN_LOG_LINES and time.monotonic() >= self._next_warning
        if not is_due or share < MAX_DATA_WAIT:
            return None
        self._next_warning = time.monotonic() + REPEAT_SECONDS
        return (
            f"{share:.0%} of the time is spent waiting for data: raise num_workers (one core each), or make the videos faster "
            "to read with omnivision prepare --short-side 256 --gop 12."
        )


class ProgressLine:
    """Progress through the steps of a run: a live bar on a terminal, plain lines elsewhere.

    `seconds_between_lines` bounds how often plain lines appear.
    """

    def __init__(self, total_steps: int, done: int, console: Console, seconds_between_lines: float = 5.0) -> None:
        self.console = console
        self.total = total_steps
        self.seconds_between_lines = seconds_between_lines
        self._next_line = float("-inf")
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
            speed_estimate_period=float("inf"),  # use all samples that rich keeps (1000), evaluations included
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=done, metrics="")
        self._bar.start()

    def step(self, epoch: int, epochs: int, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step: loss, clips_per_second, data_wait, and memory_gb and mfu where they are known."""
        parts = [f"loss {metrics['loss']:.4f}", f"{metrics['clips_per_second']:.1f} clips/s"]
        parts.append(f"waiting for data {metrics['data_wait']:.0%}")
        parts += [f"{metrics['memory_gb']:.1f} GB"] if "memory_gb" in metrics else []
        parts += [f"{metrics['mfu']:.0%} of the peak"] if "mfu" in metrics else []
        epoch_text = f"epoch {epoch + 1}/{epochs}"
        self._bar.update(self._task, completed=step)
        eta = TimeRemainingColumn().render(self._bar.tasks[0])
        line = f"{epoch_text}  step {step}/{self.total}  {'  '.join(parts)}  ETA {eta}"
        room = self.console.width - self._bar_width - len(f"{epoch_text} {self.total}/{self.total} ETA 00:00:00 ") - 1
        while len(parts) > 1 and len("  ".join(parts)) > room:  # rich would cut a number
            parts.pop()
        self._bar.update(self._task, description=epoch_text, metrics="  ".join(parts))
        if time.monotonic() >= self._next_line or step == self.total:
            self._next_line = time.monotonic() + self.seconds_between_lines
            LOG.info(line)
            if not self.console.is_terminal:
                self.console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()
