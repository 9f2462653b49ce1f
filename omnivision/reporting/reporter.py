"""Everything that a run tells: console, `metrics.jsonl`, TensorBoard, pictures. Only process 0 has one that speaks."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from omnivision.evaluation import Predictions
from omnivision.reporting import pictures, predictions
from omnivision.reporting.console import ProgressLine
from omnivision.reporting.metrics_log import MetricsLog
from omnivision.reporting.run_folder import RunFolder
from omnivision.tasks.base import Pictures

LOG = logging.getLogger("omnivision")


class Reporter:
    """Tells of a run from process 0; with `enabled=False` (the other processes) it is silent and writes nothing."""

    def __init__(self, folder: RunFolder, enabled: bool, console: Console | None = None) -> None:
        self.folder, self.enabled = folder, enabled
        self.console = console or Console(quiet=not enabled)
        self._metrics = MetricsLog(folder.logs / "metrics.jsonl")
        self._board: SummaryWriter | None = None
        self._progress: ProgressLine | None = None

    def start(self, step: int, total_steps: int, again: str = "") -> None:
        """Begin at a step; whatever was logged after it is forgotten, and of it the phase or event that comes `again`."""
        if self.enabled:
            self._metrics.rewind(step, again)
            self._board = SummaryWriter(str(self.folder.tensorboard), purge_step=step + 1 if step else None)
            self._progress = ProgressLine(total_steps, step, self.console)

    def say(self, text: str) -> None:
        if self.enabled:
            LOG.info(text)
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def step(self, epoch: int, epochs: int, step: int, figures: dict[str, float]) -> None:
        """The figures of a training step; those of `metrics.jsonl` are named in the documentation of the run folder."""
        if self._may_write():
            self._metrics.write("step", "train", epoch, step, **figures)
            self._scalars("train", figures, step)
            assert self._progress is not None
            self._progress.step(epoch, epochs, step, figures["loss"], figures["clips_per_second"], figures["data_wait"])

    def epoch(self, phase: str, epoch: int, step: int, figures: dict[str, Any]) -> None:
        if self._may_write():
            self._metrics.write("epoch", phase, epoch, step, **figures)
            flat = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
            self._scalars(f"{phase}_epoch", flat, step)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in flat.items())
            self.say(f"epoch {epoch + 1} {phase}: {shown}")

    def pictures(self, name: str, what: Pictures, step: int) -> None:
        """Write PNG and GIF to `pictures/`, and the GIF to TensorBoard, which moves it. Process 0 alone makes pictures."""
        animation = pictures.save(what, self.folder.pictures, name)
        if self._board is not None:
            _add_gif(self._board, "pictures", animation, step)

    def predictions(self, source: str, made: Predictions, class_names: Sequence[str], step: int) -> None:
        """Write what was predicted for each video of a source, and its confusion matrix as a picture."""
        if self._may_write():
            predictions.write(self.folder.predictions, source, made, class_names)
            picture = predictions.confusion_picture(made.confusion(), class_names, f"{source}, step {step}")
            self.folder.pictures.mkdir(exist_ok=True)
            picture.save(self.folder.pictures / f"confusion_{source}.png")
            assert self._board is not None
            self._board.add_image(f"confusion/{source}", np.asarray(picture), step, dataformats="HWC")

    def _may_write(self) -> bool:
        """Whether this is the process that tells, and the run folder is still its own."""
        return self.enabled and not self.folder.lost()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._board is not None:
            self._board.close()

    def _scalars(self, prefix: str, figures: dict[str, float], step: int) -> None:
        assert self._board is not None
        for name, value in figures.items():
            self._board.add_scalar(f"{prefix}/{name}", value, step)


def _add_gif(board: SummaryWriter, tag: str, data: bytes, step: int) -> None:
    """TensorBoard shows GIF bytes moving; its own `add_video` would need another package to encode them."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Image.open(io.BytesIO(data)) as opened:
        width, height = opened.size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
    writer = board._get_file_writer()
    writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
