"""Mixup and CutMix of a batch on the training device, and the soft targets that belong to it.

Own code rather than timm's `Mixup`, because draws here must be keyed, timm takes seconds to import, and it refuses odd batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omnivision.data.batch import Batch
from omnivision.utils.errors import UserError

Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class MixupCutmix:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), one draw for the whole batch and all its frames.

    `partner_index` says which samples are mixed. A batch of one sample is not mixed.

    Args:
        mixup_alpha, cutmix_alpha: the share of a sample is drawn from Beta(alpha, alpha); 0 leaves that kind out.
        prob: chance that a batch is mixed at all.
        switch_prob: chance of CutMix where both kinds are in use.
        label_smoothing: share of a target that is spread evenly over all classes, whether the batch is mixed or not.

    Raises UserError for settings out of range.
    """

    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    prob: float = 1.0
    switch_prob: float = 0.5
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        alphas = (self.mixup_alpha, self.cutmix_alpha)
        if not all(0 <= alpha < math.inf for alpha in alphas) or not any(alphas):
            raise UserError(
                f"mixup_alpha is {self.mixup_alpha} and cutmix_alpha {self.cutmix_alpha}; expected numbers of at least 0, one "
                "of them above. Change trainer.task.mixing, or set it to null to mix nothing."
            )
        for name in ("prob", "switch_prob", "label_smoothing"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UserError(
                    f"{name} is {value}; expected a share between 0 and 1. Change trainer.task.mixing.{name}."
                )

    def __call__(
        self,
        video: Tensor,
        label: Tensor,
        num_classes: int,
        rng: np.random.Generator,
        partner: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Floating point (B, C, T, H, W), or images (B, C, H, W), and int64 (B,) -> mixed, and float32 (B, num_classes) twice:
        the targets, and without label smoothing the share of each class, to count hits.

        `partner`: pixels and labels to mix these with, of the same shapes; None takes them from this batch. The input is not
        changed. Everything is drawn on the host, so a device does not have to wait.
        """
        pixels, labels = partner or (None, None)
        share, box = self.draw(video.shape[-2], video.shape[-1], rng)
        targets, shares = (mixed_targets(label, num_classes, s, share, labels) for s in (self.label_smoothing, 0))
        return mix(video, share, box, pixels), targets, shares

    def draw(self, height: int, width: int, rng: np.random.Generator) -> tuple[float, Box | None]:
        """A sample's own share of its mixture, and the box that CutMix replaces (None for mixup and for no mixing)."""
        if rng.random() >= self.prob:
            return 1.0, None
        cutmix = self.cutmix_alpha > 0 and (self.mixup_alpha == 0 or rng.random() < self.switch_prob)
        if not cutmix:
            return float(rng.beta(self.mixup_alpha, self.mixup_alpha)), None
        share = float(rng.beta(self.cutmix_alpha, self.cutmix_alpha))
        box = cutmix_box(height, width, share, int(rng.integers(height)), int(rng.integers(width)))
        return kept_share(height, width, box), box


class Mixing(MixupCutmix):
    """The former name of `MixupCutmix`, for the `_target_` of earlier runs."""


def cutmix_box(height: int, width: int, share: float, row: int, column: int) -> Box:
    """The box about (row, column) that leaves `share` of a frame, clipped at its border; odd sides lose one, as published."""
    half_height, half_width = (int(side * math.sqrt(1 - share)) // 2 for side in (height, width))
    top, left = max(row - half_height, 0), max(column - half_width, 0)
    return top, left, min(row + half_height, height) - top, min(column + half_width, width) - left


def kept_share(height: int, width: int, box: Box) -> float:
    """The share of a frame outside the box: what CutMix leaves of a sample once its box was clipped."""
    return 1 - box[2] * box[3] / (height * width)


def partner_index(size: int, device: torch.device | str = "cpu") -> Tensor:
    """The position of each sample's partner, int64 (size,): the last for the first, the last but one for the second, ...

    A batch of odd size is paired so without its last sample, whose partner is the first one.
    """
    even = size // 2 * 2
    return torch.arange(size - 1, -1, -1, device=device).sub(size - even).clamp(min=0)


def partners(batch: Batch) -> Batch:
    """The samples to mix a micro-batch with, from the batch that it was split from."""
    parent = batch.parent
    assert parent is not None
    return parent.select(partner_index(len(parent), parent.label.device)[batch.offset : batch.offset + len(batch)])


def mix(video: Tensor, share: float, box: Box | None, partner: Tensor | None = None) -> Tensor:
    """Samples and their partners: a weighted sum, or with a box the partner's pixels inside it. (B, C, ..., H, W) -> same."""
    assert video.is_floating_point(), video.dtype
    if share == 1 or (partner is None and len(video) == 1):
        return video
    if partner is None:
        partner = video[partner_index(len(video), video.device)]
    if box is None:
        return video.mul(share).add_(partner.mul(1 - share))
    top, left, height, width = box
    inside = (..., slice(top, top + height), slice(left, left + width))
    mixed = video.clone()
    mixed[inside] = partner[inside]
    return mixed


def mixed_targets(
    label: Tensor, num_classes: int, smoothing: float, share: float, partner: Tensor | None = None
) -> Tensor:
    """float32 (B, num_classes): smoothed targets, mixed as `mix` mixes pixels; `partner` are the labels of the partners.

    A sample without a label (-1) gives nothing to a mixture, which then sums to its partner's share.
    """
    if partner is None:
        partner = label[partner_index(len(label), label.device)]
    own, other = (soft_targets(each, num_classes, smoothing) for each in (label, partner))
    return own * share + other * (1 - share)


def soft_targets(label: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """int64 (B,) -> float32 (B, num_classes): 1 - smoothing for the label and smoothing spread over all classes.

    Label -1 gives zeros, so that an ignored sample adds nothing to a cross-entropy.
    """
    spread = smoothing / num_classes
    targets = torch.full((len(label), num_classes), spread, device=label.device)
    targets.scatter_(1, label.clamp(min=0)[:, None], 1 - smoothing + spread)
    return targets.masked_fill_((label < 0)[:, None], 0.0)
