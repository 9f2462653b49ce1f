"""Multi-label classification: any number of classes per video, each with its own yes or no."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from omnivision.tasks.targets import Targets


class MultiLabel(Targets):
    """Binary cross-entropy of each class. Mixed samples have mixed targets; smoothing draws targets towards 0.5."""

    label_type = "multi_label"

    def losses(self, logits: Tensor, target: Tensor, head: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none")

    def smoothed(self, target: Tensor) -> Tensor:
        smoothing = 0.0 if self.mixing is None else self.mixing.label_smoothing
        return target * (1 - smoothing) + smoothing / 2
