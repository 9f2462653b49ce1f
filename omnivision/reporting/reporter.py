"""All output of a run: console, `metrics.jsonl`, loggers, images. Only that of rank 0 is enabled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from omnivision.reporting import images
from omnivision.reporting.console import DataStallWarning, ProgressLine
from omnivision.reporting.loggers import Logger, start_loggers
from omnivision.reporting.logs import MetricsLog
from omnivision.reporting.predictions import Predictions, confusion_image, write_predictions
from omnivision.reporting.run_directory import RunDir
from omnivision.tasks.base import Visualization
from omnivision.utils.streams import wrap

LOG = logging.getLogger("omnivision")
NO_BREAK = "\0"  # a space at which no line is broken


class Reporter:
    """Output of a run; with `enabled=False` (on all ranks but 0) it writes nothing.

    Args:
        extra_loggers: names of loggers beside TensorBoard (`trainer.logging.also`).
        settings: flat settings of the run, for these loggers.
    """

    def __init__(
        self,
        folder: RunDir,
        enabled: bool,
        console: Console | None = None,
        extra_loggers: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.enabled = folder, enabled
        self.console = console or Console(quiet=not enabled)
        self.extra_loggers, self.settings = extra_loggers, settings or {}
        self._metrics = MetricsLog(folder.logs / "metrics.jsonl")
        self._loggers: list[Logger] = []
        self._progress: ProgressLine | None = None
        self._data_stall = DataStallWarning()

    def connect(self, step: int) -> None:
        """Start the loggers after a step. Raises UserError for one that cannot be started."""
        if self.enabled and not self._loggers:
            self._loggers = start_loggers(self.extra_loggers, self.folder, self.settings, step)

    def start(self, step: int, total_steps: int, replay: str = "") -> None:
        """Start logging at `step`. Drops later entries, and entries at `step` whose phase or event is `replay`."""
        self.connect(step)
        if self.enabled:
            self._metrics.truncate_after(step, replay)
            self._progress = ProgressLine(total_steps, step, self.console)

    def info(self, text: str) -> None:
        """Print a text and log it."""
        if self.enabled:
            LOG.info(text.replace(NO_BREAK, " "))
            wrapped = wrap(text, self.console.width) if self.console.is_terminal else text
            self.console.print(wrapped.replace(NO_BREAK, " "), highlight=False, soft_wrap=True, markup=False)

    def step(self, epoch: int, epochs: int, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of a training step."""
        if self._may_write():
            self._metrics.write("step", "train", epoch, step, **metrics)
            self._scalars("train", metrics, step)
            if self._progress is not None:
                self._progress.step(epoch, epochs, step, metrics)
            if warning := self._data_stall.update(metrics["data_wait"]):
                self.info(warning)

    def epoch(self, phase: str, epoch: int, step: int, metrics: dict[str, Any]) -> None:
        """Log the metrics of an epoch of training, or of an evaluation."""
        if self._may_write():
            self._metrics.write("epoch", phase, epoch, step, **metrics)
            numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
            self._scalars(f"{phase}_epoch", numbers, step)
            text = "  ".join(f"{name}{NO_BREAK}{value:.4g}" for name, value in numbers.items())
            self.info(f"{f'epoch {epoch + 1} ' if step else ''}{phase}: {text}")  # at step 0 weights are of another run

    def visualization(self, name: str, what: Visualization, step: int) -> None:
        """Write PNG and GIF to `pictures/`, and give the GIF to the loggers."""
        if self._may_write():
            images.save(what, self.folder.pictures, name)
            self._log(lambda logger: logger.image("pictures", self.folder.pictures / f"{name}.gif", step))

    def predictions(self, source: str, predictions: Predictions, step: int) -> None:
        """Write the predictions for each video of a source, and its confusion matrix as an image."""
        if self._may_write():
            write_predictions(self.folder.predictions, source, predictions)
            self.folder.pictures.mkdir(exist_ok=True)
            file = self.folder.pictures / f"confusion_{source}.png"
            confusion_image(predictions, f"{source}, step {step}").save(file)
            self._log(lambda logger: logger.image(f"confusion/{source}", file, step))

    def _may_write(self) -> bool:
        """Whether this is rank 0, and the run directory is still its own."""
        return self.enabled and not self.folder.lost()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        if self._progress is not None:
            self._progress.close()
        self._log(lambda logger: logger.close(failed))

    def _scalars(self, prefix: str, metrics: dict[str, float], step: int) -> None:
        named = {f"{prefix}/{name}": value for name, value in metrics.items()}
        self._log(lambda logger: logger.scalars(named, step))

    def _log(self, what: Callable[[Logger], None]) -> None:
        """Call all loggers; one that fails (its server, its disk) is dropped with a warning."""
        for logger in list(self._loggers):
            try:
                what(logger)
            except Exception as error:
                self._loggers.remove(logger)
                self.info(f"warning: {type(logger).__name__} fails and is dropped: {type(error).__name__}: {error}")
