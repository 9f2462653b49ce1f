"""Base of multi-label classification and regression, whose samples have a row of labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omnivision.data.batch import Batch
from omnivision.data.catalog import LabelSets
from omnivision.data.mixing import MixupCutmix, mixed_values
from omnivision.tasks.base import StepOutput, Task
from omnivision.tasks.classify import average_views, mix_batch


class TargetTask(Task):
    """Average the losses of K targets. Unknown targets (NaN), and samples without a known target, do not count.

    Args:
        labels: the head of each source.
        mixing: mixup and CutMix of a training batch, which mix the targets too; None trains on plain samples.
    """

    def __init__(self, labels: LabelSets, mixing: MixupCutmix | None = None) -> None:
        self.labels = labels
        self.mixing = mixing

    def compute_losses(self, logits: Tensor, target: Tensor, head: int) -> Tensor:
        """Return the loss of each target, (B, K), from logits (B, K) and targets (B, K) without NaN."""
        raise NotImplementedError

    def to_scores(self, logits: Tensor, head: int) -> Tensor:
        """Return what predictions hold, (B, K): logits, or values in the units of the targets."""
        return logits

    def smooth(self, target: Tensor) -> Tensor:
        """Apply label smoothing to the targets of a training batch, (B, K)."""
        return target

    def training_step(self, model: nn.Module, batch: Batch) -> StepOutput:
        """Train on a batch, mixed if that is configured."""
        head = self.labels.head[batch.source]
        video, depth, target = batch.video, batch.depth, batch.label
        if self.mixing is not None:
            video, depth, lam, partner_labels = mix_batch(self.mixing, batch)
            target = mixed_values(target, lam, partner_labels)
        logits = model(video, head, depth)
        if logits.ndim == 3:  # a single attentive probe
            [logits] = logits
        loss, count = self._mean_loss(logits, self.smooth(target), head)
        return StepOutput(loss, count, {"loss": loss.detach() * count})

    def evaluation_step(self, model: nn.Module, batch: Batch) -> StepOutput:
        """Evaluate a batch, averaging logits over the views of each video."""
        head = self.labels.head[batch.source]
        logits = average_views(model(batch.video, head, batch.depth).float(), batch.views, "logits")
        loss, count = self._mean_loss(logits, batch.label[:: batch.views], head)
        return StepOutput(loss, int(count), {"loss": loss * count}, self.to_scores(logits, head))

    def _mean_loss(self, logits: Tensor, target: Tensor, head: int) -> tuple[Tensor, Tensor]:
        """Return the mean loss over the samples with a known target, and their number."""
        known = target.isfinite()
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = torch.where(known, self.compute_losses(wide, target.nan_to_num(), head), 0)
        count = known.any(1).sum()
        return (losses.sum(1) / known.sum(1).clamp(min=1)).sum() / count.clamp(min=1), count
