"""The interface of a task. A new task is a new file beside this one; `_target_` in `trainer.task` names its class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from omnivision.data.batch import Batch
from omnivision.models.average import AveragedClassifier


@dataclass(frozen=True)
class StepOutput:
    """Loss to differentiate (the mean over `count` samples) and, for the logs, sums over these samples.

    Micro-batches and ranks are weighted by their `count`, so that a step follows the mean over all counted samples.
    `scores`, when evaluating: float (videos, classes), averaged over the views of a video: logits, or for regression the
    targets in their units. `logged_loss`: what a step's log line shows, if it is not `loss`.
    """

    loss: Tensor
    count: int | Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None
    logged_loss: Tensor | None = None


@dataclass(frozen=True)
class Visualization:
    """Named columns of frames, each uint8 (T, H, W, 3), and the frames that a still image shows."""

    columns: dict[str, np.ndarray]
    frames: list[int]


class Task(Protocol):
    """What a step computes. A subclass needs only the two step methods."""

    def compile(self) -> None:
        """Compile what a step computes besides the model, if worthwhile."""

    def training_step(self, model: nn.Module, batch: Batch) -> StepOutput: ...

    def evaluation_step(self, model: nn.Module, batch: Batch) -> StepOutput: ...

    def held_out_step(self, model: nn.Module, batch: Batch) -> StepOutput:
        """Evaluate a batch of the held-out part of the training split (`trainer.data.hold_out`)."""
        return self.evaluation_step(model, batch)

    def choose(self, model: nn.Module, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Choose by the metrics of the held-out part, if there is a choice; return the metrics to log."""
        return dict(metrics)

    def epoch_metrics(self, model: nn.Module) -> dict[str, Any]:
        """Return metrics of the model to log after a training epoch, besides averages: numbers, lists or mappings.

        By default, the mixing weights of a learned average.
        """
        return model.mixing_metrics() if isinstance(model, AveragedClassifier) else {}

    def visualize(self, model: nn.Module, batch: Batch) -> Visualization | None:
        """Visualize the first clip of a batch; None for tasks without images."""
        return None
