"""Regression: one or several numbers per video, such as a duration, a distance or a score."""

from __future__ import annotations

import torch
from torch import Tensor

from omnivision.data.catalog import LabelSets
from omnivision.data.mixing import MixupCutmix
from omnivision.tasks.targets import TargetTask
from omnivision.utils.errors import UserError


class Regress(TargetTask):
    """Squared error of each target, standardized by the mean and deviation in the catalog, so that each counts alike.

    Raises UserError if label smoothing is set.
    """

    def __init__(self, labels: LabelSets, mixing: MixupCutmix | None = None) -> None:
        super().__init__(labels, mixing)
        self._scales = [(torch.tensor(mean), torch.tensor(std)) for mean, std in labels.scales]
        if mixing is not None and mixing.label_smoothing:
            raise UserError(
                f"trainer.task.mixing.label_smoothing must be 0 for regression, got {mixing.label_smoothing:g}. Set it to 0."
            )

    def compute_losses(self, logits: Tensor, target: Tensor, head: int) -> Tensor:
        mean, std = self._scale(head, logits.device)
        return (logits - (target - mean) / std) ** 2

    def to_scores(self, logits: Tensor, head: int) -> Tensor:
        mean, std = self._scale(head, logits.device)
        return logits * std + mean

    def _scale(self, head: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the targets of a head, which stay on the device."""
        mean, std = self._scales[head]
        self._scales[head] = mean.to(device), std.to(device)
        return self._scales[head]
