"""Views of a clip: crops of uint8 frames (T, C, H, W). Random numbers come from a generator that the caller keys.

Pixels stay uint8 here; they are normalized on the training device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from omnivision.config.schema import Area, Ascending, Pixels
from omnivision.data.augment import RandAugment, RandomErasing

Aspect = Annotated[float, Field(ge=1 / 16, le=16)]
Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class PretrainView:
    """Resize the short side to `short_side`, then take a random resized crop of `size` x `size`; no flip (the MAE recipe).

    `scale` is the range of the crop's fraction of the area, `ratio` that of its width / height, drawn log-uniformly.
    """

    size: Pixels
    short_side: Pixels = 256
    scale: Annotated[tuple[Area, Area], Ascending] = (0.08, 1.0)
    ratio: Annotated[tuple[Aspect, Aspect], Ascending] = (3 / 4, 4 / 3)

    def prepare(self, frames: Tensor) -> Tensor:
        """Resize once what all views of a clip share."""
        return resize_short_side(frames, self.short_side)

    def __call__(self, frames: Tensor, rng: np.random.Generator, crop_index: int = 0) -> Tensor:
        """Crop (T, C, H, W) to (T, C, size, size); `crop_index` selects one of several fixed crops."""
        return self.crop(frames, rng, crop_index)

    def crop(self, frames: Tensor, rng: np.random.Generator, crop_index: int = 0) -> Tensor:
        """Only crop; with a generator of the same key, depth gets the same crop as the frames."""
        top, left, height, width = random_crop_box(frames.shape[-2], frames.shape[-1], self.scale, self.ratio, rng)
        return resize(frames[..., top : top + height, left : left + width], self.size, self.size)


@dataclass(frozen=True)
class FinetuneView(PretrainView):
    """`PretrainView`, then RandAugment and random erasing, each one draw for all frames (alignment, fine-tuning, probing)."""

    rand_augment: RandAugment | None = None
    erasing: RandomErasing | None = None

    def __call__(self, frames: Tensor, rng: np.random.Generator, crop_index: int = 0) -> Tensor:
        frames = self.crop(frames, rng, crop_index)
        for change in (self.rand_augment, self.erasing):
            frames = frames if change is None else change(frames, rng)
        return frames


@dataclass(frozen=True)
class EvalView:
    """Resize the short side to `size`, then crop along the long side: the center (`crops` 1), or both ends and center (3)."""

    size: Pixels
    crops: Literal[1, 3] = 1

    def prepare(self, frames: Tensor) -> Tensor:
        return resize_short_side(frames, self.size)

    def __call__(self, frames: Tensor, rng: np.random.Generator, crop_index: int = 0) -> Tensor:
        return self.crop(frames, rng, crop_index)

    def crop(self, frames: Tensor, rng: np.random.Generator, crop_index: int = 0) -> Tensor:
        top, left = crop_offsets(frames.shape[-2], frames.shape[-1], self.size, self.crops)[crop_index]
        return frames[..., top : top + self.size, left : left + self.size]


View = PretrainView | FinetuneView | EvalView


def crop_offsets(height: int, width: int, size: int, crops: int) -> list[tuple[int, int]]:
    """Return (top, left) of 1 (center) or 3 crops of size x size (left, center, right; top, middle, bottom if tall)."""
    top, left = math.ceil((height - size) / 2), math.ceil((width - size) / 2)
    if crops == 1:
        return [(top, left)]
    if height > width:
        return [(0, left), (top, left), (height - size, left)]
    return [(top, 0), (top, left), (top, width - size)]


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Resize bilinearly with half-pixel centers and no antialiasing, as published; an unchanged size costs nothing."""
    if frames.shape[-2:] == (height, width):
        return frames
    return F.interpolate(frames, (height, width), mode="bilinear", align_corners=False)


def resize_short_side(frames: Tensor, side: int) -> Tensor:
    """Resize the short side to `side` and the long one to floor(float(long) / short * side), in this order of operations."""
    height, width = frames.shape[-2:]
    if height < width:
        return resize(frames, side, math.floor(float(width) / height * side))
    return resize(frames, math.floor(float(height) / width * side), side)


def random_crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draw a box of random area and aspect inside height x width; after ten misses, take the largest allowed one in the center.

    This is the rule of torchvision's RandomResizedCrop (Szegedy et al. 2015), with keyed random numbers.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w
