"""Views of a clip: crops of uint8 frames (T, C, H, W). Random numbers come from a generator that the caller keys.

Pixels stay uint8 here; they are normalised on the training device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from omnivision.data.augment import RandAugment, RandomErasing
from omnivision.utils.errors import UserError

LARGEST_SIDE = 4096  # pixels of a view or of the short side that it is cut from

Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class PretrainView:
    """Short side to `short_side`, then a random resized crop of `size` x `size`; no flip (the MAE recipe).

    `scale` is the crop's share of the area, `ratio` its width / height, drawn log-uniformly.
    """

    size: int
    short_side: int = 256
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        for name, side in (("size", self.size), ("short_side", self.short_side)):
            if not 0 < side <= LARGEST_SIDE:
                raise UserError(
                    f"{name} of a view is {side}; expected 1 to {LARGEST_SIDE} pixels. Change image_size or short_side, or "
                    f"trainer.data.view.{name}."
                )
        if not (
            all(_is_range(values) for values in (self.scale, self.ratio))
            and 0 < self.scale[0] <= self.scale[1] <= 1
            and 1 / 16 <= self.ratio[0] <= self.ratio[1] <= 16
        ):
            raise UserError(
                f"crop scale is {self.scale} and ratio {self.ratio}; expected two numbers low <= high each, scales above 0 up "
                "to 1, ratios from 1/16 to 16. Change trainer.data.view.scale or trainer.data.view.ratio."
            )

    def prepare(self, frames: Tensor) -> Tensor:
        """What all views of a clip share, done once."""
        return resize_short_side(frames, self.short_side)

    # (T, C, H, W) -> (T, C, size, size); `number` tells several views of a clip apart where they are not random
    def __call__(self, frames: Tensor, rng: np.random.Generator, number: int = 0) -> Tensor:
        return self.crop(frames, rng, number)

    def crop(self, frames: Tensor, rng: np.random.Generator, number: int = 0) -> Tensor:
        """The place of the view alone: what goes with the frames (depth) is cut with a generator of the same key."""
        top, left, height, width = random_crop_box(frames.shape[-2], frames.shape[-1], self.scale, self.ratio, rng)
        return resize(frames[..., top : top + height, left : left + width], self.size, self.size)


@dataclass(frozen=True)
class FinetuneView(PretrainView):
    """As `PretrainView`, then RandAugment and random erasing, each one draw for all frames (Align, fine-tuning, probing)."""

    rand_augment: RandAugment | None = None
    erasing: RandomErasing | None = None

    def __call__(self, frames: Tensor, rng: np.random.Generator, number: int = 0) -> Tensor:
        frames = self.crop(frames, rng, number)
        for change in (self.rand_augment, self.erasing):
            if change is not None:
                frames = change(frames, rng)
        return frames


@dataclass(frozen=True)
class EvalView:
    """Short side to `size`, then crops along the long side: the centre (`crops` 1), or both ends and the centre (3)."""

    size: int
    crops: int = 1

    def __post_init__(self) -> None:
        if self.crops not in (1, 3):
            raise UserError(f"crops is {self.crops}; expected 1 (centre) or 3. Change trainer.data.val_view.crops.")

    def prepare(self, frames: Tensor) -> Tensor:
        return resize_short_side(frames, self.size)

    def __call__(self, frames: Tensor, rng: np.random.Generator, number: int = 0) -> Tensor:
        return self.crop(frames, rng, number)

    def crop(self, frames: Tensor, rng: np.random.Generator, number: int = 0) -> Tensor:
        top, left = crop_offsets(frames.shape[-2], frames.shape[-1], self.size, self.crops)[number]
        return frames[..., top : top + self.size, left : left + self.size]


View = PretrainView | FinetuneView | EvalView


def crop_offsets(height: int, width: int, size: int, crops: int) -> list[tuple[int, int]]:
    """(top, left) of 1 (centre) or 3 crops (left, centre, right; of a tall picture top, middle, bottom) of size x size."""
    top, left = math.ceil((height - size) / 2), math.ceil((width - size) / 2)
    if crops == 1:
        return [(top, left)]
    if height > width:
        return [(0, left), (top, left), (height - size, left)]
    return [(top, 0), (top, left), (top, width - size)]


def _is_range(values: object) -> bool:
    numbers = values if isinstance(values, (list, tuple)) else ()
    return len(numbers) == 2 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers)


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, half-pixel centres, no antialias, as the published transforms resized; unchanged sizes cost nothing."""
    if frames.shape[-2:] == (height, width):
        return frames
    return F.interpolate(frames, (height, width), mode="bilinear", align_corners=False)


def resize_short_side(frames: Tensor, side: int) -> Tensor:
    """The short side becomes `side`, the long one floor(float(long) / short * side), in this order of operations."""
    height, width = frames.shape[-2:]
    if height < width:
        return resize(frames, side, math.floor(float(width) / height * side))
    return resize(frames, math.floor(float(height) / width * side), side)


def random_crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """A box of random area and aspect inside height x width; after ten misses the largest allowed one in the centre.

    The rule of torchvision's RandomResizedCrop (Szegedy et al. 2015), with random numbers of our own.
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
