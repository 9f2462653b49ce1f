"""Mixup and CutMix of a batch on the training device, and its targets.

timm's `Mixup` is not used, because draws must be keyed, timm takes seconds to import, and it rejects odd batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from omnivision.config.schema import Fraction
from omnivision.data.batch import Batch
from omnivision.data.views import Box
from omnivision.utils.errors import UserError

Alpha = Annotated[float, Field(ge=0, le=1e6)]


@dataclass(frozen=True)
class MixupCutmix:
    """Apply mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), with one draw for the whole batch and all its frames.

    `partner_index` pairs the samples. A batch of one sample is not mixed.

    Args:
        mixup_alpha, cutmix_alpha: the weight of a sample is drawn from Beta(alpha, alpha); 0 disables that kind.
        prob: chance that a batch is mixed at all.
        switch_prob: chance of CutMix if both kinds are enabled.
        label_smoothing: fraction of a target that is spread evenly over all classes, whether the batch is mixed or not (for
            multi-label targets: by which they move towards 0.5).

    Raises UserError if both kinds are disabled.
    """

    mixup_alpha: Alpha = 0.8
    cutmix_alpha: Alpha = 1.0
    prob: Fraction = 1.0
    switch_prob: Fraction = 0.5
    label_smoothing: Fraction = 0.1

    def __post_init__(self) -> None:
        if not (self.mixup_alpha or self.cutmix_alpha):
            raise UserError(
                "trainer.task.mixing: mixup_alpha and cutmix_alpha must not both be 0. Set trainer.task.mixing=null to mix "
                "nothing."
            )

    def __call__(
        self, video: Tensor, rng: np.random.Generator, partner_pixels: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """Mix float (B, C, T, H, W), or images (B, C, H, W); return the pixels, and lambda, by which to mix the targets.

        `partner_pixels`: what to mix these with; None takes them from this batch. The input is not changed. Everything is
        drawn on the host, so the device does not have to wait.
        """
        lam, box = self.draw(video.shape[-2], video.shape[-1], rng)
        return mix(video, lam, box, partner_pixels), lam

    def draw(self, height: int, width: int, rng: np.random.Generator) -> tuple[float, Box | None]:
        """Draw lambda, a sample's own share of its mixture, and the box that CutMix replaces (None without CutMix)."""
        if rng.random() >= self.prob:
            return 1.0, None
        cutmix = self.cutmix_alpha > 0 and (self.mixup_alpha == 0 or rng.random() < self.switch_prob)
        if not cutmix:
            return float(rng.beta(self.mixup_alpha, self.mixup_alpha)), None
        lam = float(rng.beta(self.cutmix_alpha, self.cutmix_alpha))
        box = cutmix_box(height, width, lam, int(rng.integers(height)), int(rng.integers(width)))
        return kept_share(height, width, box), box


class Mixing(MixupCutmix):
    """The former name of `MixupCutmix`, in the `_target_` of earlier runs."""


def cutmix_box(height: int, width: int, lam: float, row: int, column: int) -> Box:
    """Return the box around (row, column) that leaves `lam` of a frame, clipped at its border; odd sides lose a pixel."""
    half_height, half_width = (int(side * math.sqrt(1 - lam)) // 2 for side in (height, width))
    top, left = max(row - half_height, 0), max(column - half_width, 0)
    return top, left, min(row + half_height, height) - top, min(column + half_width, width) - left


def kept_share(height: int, width: int, box: Box) -> float:
    """Return the fraction of a frame outside the (clipped) box."""
    return 1 - box[2] * box[3] / (height * width)


def partner_index(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return each sample's partner, int64 (size,): the batch reversed; the last of an odd batch is paired with the first."""
    even = size // 2 * 2
    return torch.arange(size - 1, -1, -1, device=device).sub(size - even).clamp(min=0)


def partner_batch(batch: Batch) -> Batch:
    """Return the samples to mix a micro-batch with, from its parent."""
    parent = batch.parent
    assert parent is not None
    return parent.select(partner_index(len(parent), parent.label.device)[batch.offset : batch.offset + len(batch)])


def mix(video: Tensor, lam: float, box: Box | None, partner_pixels: Tensor | None = None) -> Tensor:
    """Add samples and partners (B, C, ..., H, W), weighted; with a box, take the partner's pixels inside it instead."""
    assert video.is_floating_point(), video.dtype
    if lam == 1 or (partner_pixels is None and len(video) == 1):
        return video
    if partner_pixels is None:
        partner_pixels = video[partner_index(len(video), video.device)]
    if box is None:
        return video.mul(lam).add_(partner_pixels.mul(1 - lam))
    top, left, height, width = box
    inside = (..., slice(top, top + height), slice(left, left + width))
    mixed = video.clone()
    mixed[inside] = partner_pixels[inside]
    return mixed


def mixed_targets(
    label: Tensor, num_classes: int, smoothing: float, lam: float, partner_labels: Tensor | None = None
) -> Tensor:
    """Return smoothed targets, float32 (B, num_classes), mixed as `mix` mixes pixels.

    A sample without a label (-1) adds nothing, so its row sums to the partner's share.
    """
    if partner_labels is None:
        partner_labels = label[partner_index(len(label), label.device)]
    own, other = (soft_targets(labels, num_classes, smoothing) for labels in (label, partner_labels))
    return own * lam + other * (1 - lam)


def mixed_values(values: Tensor, lam: float, partner_values: Tensor | None = None) -> Tensor:
    """Mix targets that are numbers, float32 (B, K), as `mix` mixes pixels. A mixed value is NaN if either value is."""
    if lam == 1:
        return values
    if partner_values is None:
        partner_values = values[partner_index(len(values), values.device)]
    return values * lam + partner_values * (1 - lam)


def soft_targets(label: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Smooth int64 labels (B,) to float32 (B, num_classes): 1 - smoothing, and smoothing spread over all; -1: zeros."""
    spread = smoothing / num_classes
    targets = torch.full((len(label), num_classes), spread, device=label.device)
    targets.scatter_(1, label.clamp(min=0)[:, None], 1 - smoothing + spread)
    return targets.masked_fill_((label < 0)[:, None], 0.0)
