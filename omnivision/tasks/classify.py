"""Action recognition: cross-entropy, with mixup and CutMix in training; evaluation over several views per video."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omnivision.data.batch import Batch
from omnivision.data.catalog import LabelSets
from omnivision.data.mixing import MixupCutmix, mixed_targets, partner_batch, soft_targets
from omnivision.models.attentive import AttentiveClassifier
from omnivision.models.patches import normalize_pixels
from omnivision.tasks.base import StepOutput, Task
from omnivision.tasks.metrics import topk_hits
from omnivision.utils.errors import UserError


class Classify(Task):
    """Cross-entropy with soft targets; samples with label -1 do not count.

    Args:
        labels: the head of each source.
        mixing: mixup and CutMix of a training batch; None trains on plain samples with hard labels. All micro-batches of a
            step get the same draw, with partners from the whole batch.
        average: what is averaged over the views of a video at evaluation, "logits" (as published) or "softmax".
        class_weights: factors of the classes in the training loss, in the order of their labels; or "balanced", N / (K n) for a
            class with n of N training samples, K classes having any. The loss of an evaluation has no weights.
        label_counts: training samples of each class, by head, for "balanced".

    Raises UserError for weights that do not fit the classes.
    """

    def __init__(
        self,
        labels: LabelSets,
        mixing: MixupCutmix | None = None,
        average: Literal["logits", "softmax"] = "logits",
        class_weights: list[float] | Literal["balanced"] | None = None,
        label_counts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.labels = labels
        self.mixing = mixing
        self.average = average
        self.class_weights: list[Tensor] | None = None  # by head
        if class_weights == "balanced":
            assert label_counts is not None
            self.class_weights = [balanced_weights(counts) for counts in label_counts]
        elif class_weights is not None:
            numbers = class_weights if isinstance(class_weights, list) else []
            valid = all(type(number) in (int, float) and 0 <= number < 1e9 for number in numbers) and any(numbers)
            if labels.classes != [len(numbers)] or not valid:
                raise UserError(
                    "trainer.task.class_weights must be balanced, or a number from 0 to 1e9 for each class of the only head "
                    f"({labels.classes}), not all 0; got {class_weights}. Change it."
                )
            self.class_weights = [torch.tensor(numbers, dtype=torch.float32)]

    def training_step(self, model: nn.Module, batch: Batch) -> StepOutput:
        """Train on a batch, mixed if that is configured."""
        head = self.labels.head[batch.source]
        classes, depth = self.labels.classes[head], batch.depth
        if self.mixing is None:
            video, target = batch.video, soft_targets(batch.label, classes, smoothing=0)
            class_weights = target
        else:
            video, depth, lam, partner_labels = mix_batch(self.mixing, batch)
            target, class_weights = (
                mixed_targets(batch.label, classes, smoothing, lam, partner_labels)
                for smoothing in (self.mixing.label_smoothing, 0)
            )
        logits = model(video, head, depth)
        weights = self._weights(head, logits.device)
        count = target.any(1).sum()  # a mixture counts if one of its two samples has a label
        if logits.ndim == 3:  # a grid of probes: each has its own loss, and the log shows the means
            loss = torch.stack([soft_cross_entropy(own, target, weights) for own in logits]).sum()
            hits = [_hits(own, class_weights) for own in logits.detach()]
            sums = {name: torch.stack([own[name] for own in hits]).mean() for name in hits[0]}
            mean = loss.detach() / len(logits)
            return StepOutput(loss, count, {"loss": mean * count} | sums, logged_loss=mean)
        loss = soft_cross_entropy(logits, target, weights)
        return StepOutput(loss, count, {"loss": loss.detach() * count} | _hits(logits.detach(), class_weights))

    def _weights(self, head: int, device: torch.device) -> Tensor | None:
        """Return the class weights of a head, which stay on the device."""
        if self.class_weights is None:
            return None
        self.class_weights[head] = self.class_weights[head].to(device)
        return self.class_weights[head]

    def evaluation_step(self, model: nn.Module, batch: Batch) -> StepOutput:
        """Evaluate a batch, averaging over the views of each video."""
        logits = model(batch.video, self.labels.head[batch.source], batch.depth).float()
        logits, label = average_views(logits, batch.views, self.average), batch.label[:: batch.views]
        known = label >= 0
        loss = soft_cross_entropy(logits, soft_targets(label, logits.shape[1], smoothing=0))
        count = int(known.sum())
        return StepOutput(loss, count, {"loss": loss * count} | _hits(logits[known], label[known]), logits)

    def held_out_step(self, model: nn.Module, batch: Batch) -> StepOutput:
        """Evaluate a batch of the held-out part of the training split; of a grid of probes, each."""
        if not isinstance(model, AttentiveClassifier):
            return replace(self.evaluation_step(model, batch), scores=None)
        logits = model(batch.video, self.labels.head[batch.source], batch.depth, every=True).float()
        label = batch.label[:: batch.views]
        known = label >= 0
        averaged = [average_views(own, batch.views, self.average)[known] for own in logits]
        sums = {f"top1_{number}": _hits(own, label[known])["top1"] for number, own in enumerate(averaged)}
        for number, own in enumerate(averaged):
            sums[f"loss_{number}"] = torch.nn.functional.cross_entropy(own, label[known], reduction="sum")
        return StepOutput(logits.new_zeros(()), int(known.sum()), sums)

    def choose(self, model: nn.Module, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Choose by the metrics of the held-out part; return the metrics to log. Of equal top-1, the loss decides."""
        if not isinstance(model, AttentiveClassifier):
            return dict(metrics)
        top1 = [float(metrics.get(f"top1_{number}", 0.0)) for number in range(len(model.grid))]
        loss = [float(metrics.get(f"loss_{number}", 0.0)) for number in range(len(model.grid))]
        best = max(range(len(top1)), key=lambda number: (top1[number], -loss[number]))
        model.selected.fill_(best)
        lr, weight_decay = model.grid[best]
        chosen = {"top1": top1[best], "probe": best, "lr_factor": lr, "weight_decay_factor": weight_decay}
        return chosen | {"top1_by_probe": top1, "videos": metrics["videos"]}


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """Return N / (K n) for each class with n of N samples, K classes having any, and 1 for classes without samples."""
    number = torch.tensor(counts, dtype=torch.float32)
    weights = number.sum() / (number.clamp(min=1) * max(1, int((number > 0).sum())))
    return torch.where(number > 0, weights, 1.0)


def soft_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean over the samples of `-sum_c weights_c target_c log softmax(logits)_c`; (B, classes) twice -> scalar.

    Samples without a label (a row of zeros) do not count; a batch without any label gives 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    terms = target * F.log_softmax(logits, dim=-1)
    total = -(terms if weights is None else terms * weights).sum()
    return total / target.any(1).sum().clamp(min=1)


def average_views(logits: Tensor, views: int, average: str) -> Tensor:
    """Average logits (videos x views, classes), with adjacent views of a video, to logits (videos, classes).

    `average` is "logits" or "softmax". For "softmax", the result is the logarithm of the mean probabilities, so that its
    softmax is that mean.
    """
    if average == "logits":
        return logits.unflatten(0, (-1, views)).mean(1)
    return logits.log_softmax(-1).unflatten(0, (-1, views)).logsumexp(1) - math.log(views)


def mix_batch(mixing: MixupCutmix, batch: Batch) -> tuple[Tensor, Tensor | None, float, Tensor | None]:
    """Mix the pixels of a batch, or of a micro-batch with partners from the whole batch.

    Returns the video, its depth, lambda, and the labels of the partners (None: those of this batch, see `partner_index`).
    """
    rng = np.random.default_rng(torch.initial_seed())  # the trainer seeds torch anew for each step
    partner = None if batch.parent is None else partner_batch(batch)
    video, lam = mixing(_pixels(batch), rng, None if partner is None else _pixels(partner))
    labels = None if partner is None else partner.label
    return (video, None, lam, labels) if batch.depth is None else (video[:, :3], video[:, 3:], lam, labels)


def _pixels(batch: Batch) -> Tensor:
    """Return the pixels to mix: normalized, with depth as a fourth channel if there is any."""
    pixels = normalize_pixels(batch.video, channel_dim=1)
    return pixels if batch.depth is None else torch.cat([pixels, batch.depth], dim=1)


def _hits(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return the sums of top-1 and top-5 accuracy, in percent."""
    return {f"top{k}": 100 * topk_hits(logits, target, k).sum() for k in (1, 5)}
