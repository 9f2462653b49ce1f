"""Tasks whose labels are a row of numbers for each sample: what multi-label classification and regression share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from omnivision.data.batch import Batch
from omnivision.data.catalog import LabelSets
from omnivision.data.mixing import MixupCutmix, mixed_values
from omnivision.models.average import AveragedClassifier
from omnivision.tasks.base import StepOutput, Task
from omnivision.tasks.classify import average_views, mix_batch


class Targets(Task):
    """A loss for each of K targets. A sample's loss is the mean over its known targets (not NaN); without any, none counts.

    Args:
        labels: the head of each source.
        mixing: mixup and CutMix of a training batch, which mix the targets too; None trains on plain samples.
    """

    def __init__(self, labels: LabelSets, mixing: MixupCutmix | None = None) -> None:
        self.labels = labels
        self.mixing = mixing

    def losses(self, logits: Tensor, target: Tensor, head: int) -> Tensor:
        """Return the loss of each target, (B, K), from logits (B, K) and targets (B, K) without NaN."""
        raise NotImplementedError

    def scores(self, logits: Tensor, head: int) -> Tensor:
        """Return what predictions hold, (B, K): logits, or values in the units of the targets."""
        return logits

    def smoothed(self, target: Tensor) -> Tensor:
        return target

    def training_step(self, model: nn.Module, batch: Batch) -> StepOutput:
        """Train on a batch, mixed if that is configured."""
        head = self.labels.head[batch.source]
        video, depth, target = batch.video, batch.depth, batch.label
        if self.mixing is not None:
            video, depth, lam, partner_labels = mix_batch(self.mixing, batch)
            target = mixed_values(target, lam, partner_labels)
        logits = model(video, head, depth)
        if logits.ndim == 3:  # an attentive probe, alone
            [logits] = logits
        loss, count = self._mean_loss(logits, self.smoothed(target), head)
        return StepOutput(loss, count, {"loss": loss.detach() * count})

    def evaluation_step(self, model: nn.Module, batch: Batch) -> StepOutput:
        """Evaluate a batch, averaging logits over the views of each video."""
        head = self.labels.head[batch.source]
        logits = average_views(model(batch.video, head, batch.depth).float(), batch.views, "logits")
        loss, count = self._mean_loss(logits, batch.label[:: batch.views], head)
        return StepOutput(loss, int(count), {"loss": loss * count}, self.scores(logits, head))

    def _mean_loss(self, logits: Tensor, target: Tensor, head: int) -> tuple[Tensor, Tensor]:
        """Return the mean loss over the samples with a known target, and their number."""
        known = target.isfinite()
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = torch.where(known, self.losses(wide, target.nan_to_num(), head), 0).sum(1) / known.sum(1).clamp(min=1)
        count = known.any(1).sum()
        return losses.sum() / count.clamp(min=1), count

    def epoch_metrics(self, model: nn.Module) -> dict[str, Any]:
        """Return the mixing weights of a learned average."""
        return model.mixing_metrics() if isinstance(model, AveragedClassifier) else {}
