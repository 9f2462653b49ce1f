"""Everything that a run tells: console, `metrics.jsonl`, TensorBoard and its like, pictures. Only that of process 0 speaks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from omnivision.reporting import images as pictures
from omnivision.reporting import predictions
from omnivision.reporting.console import DataStallWarning, ProgressLine
from omnivision.reporting.loggers import Logger, loggers
from omnivision.reporting.metrics_log import MetricsLog
from omnivision.reporting.predictions import Predictions
from omnivision.reporting.run_directory import RunDir
from omnivision.tasks.base import Visualization
from omnivision.utils.streams import wrap

LOG = logging.getLogger("omnivision")
GLUE = "\0"  # a space at which no line is broken


class Reporter:
    """Tells of a run from process 0; with `enabled=False` (the other processes) it is silent and writes nothing.

    `also` are loggers beside TensorBoard (`trainer.logging.also`), which are told the `settings` of the run.
    """

    def __init__(
        self,
        folder: RunDir,
        enabled: bool,
        console: Console | None = None,
        also: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.enabled = folder, enabled
        self.console = console or Console(quiet=not enabled)
        self.also, self.settings = also, settings or {}
        self._metrics = MetricsLog(folder.logs / "metrics.jsonl")
        self._loggers: list[Logger] | None = None
        self._progress: ProgressLine | None = None
        self._starvation = DataStallWarning()

    def connect(self, step: int) -> None:
        """Begin with the loggers, after a step. Raises UserError for one that cannot be begun."""
        if self.enabled and self._loggers is None:
            self._loggers = loggers(self.also, self.folder, self.settings, step)

    def start(self, step: int, total_steps: int, replay: str = "") -> None:
        """Begin at a step; whatever was logged after it is forgotten, and of it the phase or event that comes `replay`."""
        self.connect(step)
        if self.enabled:
            self._metrics.truncate_after(step, replay)
            self._progress = ProgressLine(total_steps, step, self.console)

    def info(self, text: str) -> None:
        if self.enabled:
            LOG.info(text.replace(GLUE, " "))
            wrapped = wrap(text, self.console.width) if self.console.is_terminal else text
            self.console.print(wrapped.replace(GLUE, " "), highlight=False, soft_wrap=True, markup=False)

    def step(self, epoch: int, epochs: int, step: int, figures: dict[str, float]) -> None:
        """The figures of a training step; those of `metrics.jsonl` are named in the documentation of the run folder."""
        if self._may_write():
            self._metrics.write("step", "train", epoch, step, **figures)
            self._scalars("train", figures, step)
            assert self._progress is not None
            self._progress.step(epoch, epochs, step, figures)
            if verdict := self._starvation.update(figures["data_wait"]):
                self.info(verdict)

    def epoch(self, phase: str, epoch: int, step: int, figures: dict[str, Any]) -> None:
        if self._may_write():
            self._metrics.write("epoch", phase, epoch, step, **figures)
            flat = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
            self._scalars(f"{phase}_epoch", flat, step)
            shown = "  ".join(f"{name}{GLUE}{value:.4g}" for name, value in flat.items())
            self.info(
                f"{f'epoch {epoch + 1} ' if step else ''}{phase}: {shown}"
            )  # at step 0 weights are of another run

    def visualization(self, name: str, what: Visualization, step: int) -> None:
        """Write PNG and GIF to `pictures/`, and hand the GIF on. Process 0 alone makes pictures."""
        if self._may_write():
            pictures.save(what, self.folder.pictures, name)
            self._tell(lambda logger: logger.picture("pictures", self.folder.pictures / f"{name}.gif", step))

    def predictions(self, source: str, made: Predictions, class_names: Sequence[str], step: int) -> None:
        """Write what was predicted for each video of a source, and its confusion matrix as a picture."""
        if self._may_write():
            predictions.write(self.folder.predictions, source, made, class_names)
            picture = predictions.confusion_picture(made.confusion(), class_names, f"{source}, step {step}")
            self.folder.pictures.mkdir(exist_ok=True)
            file = self.folder.pictures / f"confusion_{source}.png"
            picture.save(file)
            self._tell(lambda logger: logger.picture(f"confusion/{source}", file, step))

    def _may_write(self) -> bool:
        """Whether this is the process that tells, and the run folder is still its own."""
        return self.enabled and not self.folder.lost()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        if self._progress is not None:
            self._progress.close()
        self._tell(lambda logger: logger.close(failed))

    def _scalars(self, prefix: str, figures: dict[str, float], step: int) -> None:
        told = {f"{prefix}/{name}": value for name, value in figures.items()}
        self._tell(lambda logger: logger.scalars(told, step))

    def _tell(self, what: Callable[[Logger], None]) -> None:
        """Tell all loggers. One that fails (its server, its disk) is told nothing more; the run has a log of its own."""
        for logger in list(self._loggers or []):
            try:
                what(logger)
            except Exception as error:
                assert self._loggers is not None
                self._loggers.remove(logger)
                self.info(
                    f"warning: {type(logger).__name__} fails, and is told nothing more: {type(error).__name__}: {error}"
                )
