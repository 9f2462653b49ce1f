"""Multi-label classification: any number of classes per video."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from omnivision.tasks.targets import TargetTask


class MultiLabel(TargetTask):
    """Binary cross-entropy of each class. Label smoothing moves targets towards 0.5."""

    def compute_losses(self, logits: Tensor, target: Tensor, head: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none")

    def smooth(self, target: Tensor) -> Tensor:
        smoothing = 0.0 if self.mixing is None else self.mixing.label_smoothing
        return target * (1 - smoothing) + smoothing / 2
