"""Augmentation of a labelled view: RandAugment and random erasing on uint8 frames (T, C, H, W), one draw for all frames.

Random numbers come from a generator that the caller keys. Pixels stay uint8, which takes a quarter of the memory of floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from omnivision.config.schema import Area, Ascending, Fraction
from omnivision.models.patches import unnormalize_pixels

MAX_LEVEL = 10
ERASING_TRIES = 100
Aspect = Annotated[float, Field(ge=1e-6, le=1e6)]


class Operation(NamedTuple):
    """An operation of RandAugment."""

    argument: Callable[[float, int], float]  # takes a share (0 to 1) of the highest level, and a sign (+1 or -1)
    apply: Callable[[Tensor, float], Tensor]  # takes RGB frames (T, 3, H, W), uint8 or floats in [0, 1]


def _kernels() -> Any:
    # Imported lazily: it takes over a second, and the data workers of a masked autoencoder never need it.
    from torchvision.transforms.v2 import functional

    return functional


def _signed(width: float, middle: float = 0.0) -> Callable[[float, int], float]:
    return lambda share, sign: middle + sign * share * width


FACTOR = _signed(0.9, middle=1)  # 1 changes nothing
SLOPE = _signed(0.3)  # pixels sideways per pixel down
SHIFT = _signed(0.45)  # fraction of the width or height, to the left or up
UNUSED = _signed(0)
# As published, auto-contrast and equalize use the histogram of each frame, contrast the mean of each frame.
OPERATIONS = {
    "AdjustBrightness": Operation(FACTOR, lambda frames, factor: _kernels().adjust_brightness(frames, factor)),
    "AdjustContrast": Operation(FACTOR, lambda frames, factor: _kernels().adjust_contrast(frames, factor)),
    "AdjustSaturation": Operation(FACTOR, lambda frames, factor: _kernels().adjust_saturation(frames, factor)),
    "AdjustSharpness": Operation(FACTOR, lambda frames, factor: adjust_sharpness(frames, factor)),
    "AutoContrast": Operation(UNUSED, lambda frames, _: _kernels().autocontrast(frames)),
    "Equalize": Operation(UNUSED, lambda frames, _: _on_bytes(_kernels().equalize, frames)),
    "Invert": Operation(UNUSED, lambda frames, _: _kernels().invert(frames)),
    "Rotate": Operation(_signed(30), lambda frames, degrees: _move(frames, angle=-degrees)),  # counter-clockwise
    "Posterize": Operation(
        lambda share, sign: 4 - int(share * 4),  # bits to keep
        lambda frames, bits: _on_bytes(lambda levels: _kernels().posterize(levels, int(bits)), frames),
    ),
    "Solarize": Operation(
        lambda share, sign: 1 - share,  # invert pixels at or above this brightness (of 1)
        lambda frames, share: _kernels().solarize(frames, share * (1.0 if frames.is_floating_point() else 255.0)),
    ),
    "ShearX": Operation(SLOPE, lambda frames, slope: _move(frames, shear=(math.degrees(math.atan(slope)), 0.0))),
    "ShearY": Operation(SLOPE, lambda frames, slope: _move(frames, shear=(0.0, math.degrees(math.atan(slope))))),
    "TranslateX": Operation(SHIFT, lambda frames, shift: _move(frames, translate=(-shift * frames.shape[-1], 0.0))),
    "TranslateY": Operation(SHIFT, lambda frames, shift: _move(frames, translate=(0.0, -shift * frames.shape[-2]))),
}


@dataclass(frozen=True)
class RandAugment:
    """Apply `num_layers` different operations out of 14, one after the other (Cubuk et al. 2020, with the recipe's ranges).

    Args:
        magnitude: mean strength of an operation, 0 to 10.
        num_layers: operations drawn for a clip, all different.
        prob: chance that a drawn operation is applied.
        std: standard deviation of the strength, which is drawn anew for each operation and clamped to 0 .. 10.
    """

    magnitude: Annotated[float, Field(ge=0, le=MAX_LEVEL)] = 7
    num_layers: Annotated[int, Field(ge=1, le=len(OPERATIONS))] = 4
    prob: Fraction = 0.5
    std: Annotated[float, Field(ge=0, le=1e6)] = 0.5

    def __call__(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        """Augment uint8 RGB (T, 3, H, W) to the same shape and type; the input is not changed."""
        for operation, argument in self.plan(rng):
            frames = OPERATIONS[operation].apply(frames, argument)
        return frames

    def plan(self, rng: np.random.Generator) -> list[tuple[str, float]]:
        """Draw the operations for one clip with their arguments, in the order of application."""
        plan, names = [], list(OPERATIONS)
        for number in rng.permutation(len(names))[: self.num_layers]:
            if rng.random() < self.prob:
                level = min(max(rng.normal(self.magnitude, self.std), 0.0), float(MAX_LEVEL))
                sign = 1 if rng.random() < 0.5 else -1
                plan.append((names[number], OPERATIONS[names[number]].argument(level / MAX_LEVEL, sign)))
        return plan


@dataclass(frozen=True)
class RandomErasing:
    """Fill one rectangle of all frames with noise, drawn for each pixel, channel and frame (Zhong et al. 2020).

    The published noise is standard normal after normalization. Here pixels stay uint8, so the noise is un-normalized with
    ImageNet's mean and standard deviation, rounded and clamped to 0 .. 255. Depending on the channel, that cuts its tails
    below -1.8 to -2.1 and above 2.2 to 2.6 standard deviations.

    Args:
        prob: chance that a clip is erased.
        area: fraction of a frame, drawn uniformly.
        aspect: height / width, drawn log-uniformly.
    """

    prob: Fraction = 0.25
    area: Annotated[tuple[Area, Area], Ascending] = (0.02, 1 / 3)
    aspect: Annotated[tuple[Aspect, Aspect], Ascending] = (0.3, 1 / 0.3)

    def __call__(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        """Augment uint8 RGB (T, 3, H, W) to the same shape and type; the input is not changed."""
        box = self.box(frames.shape[-2], frames.shape[-1], rng)
        if box is None:
            return frames
        top, left, height, width = box
        noise = torch.from_numpy(rng.standard_normal((*frames.shape[:2], height, width), dtype=np.float32))
        noise = unnormalize_pixels(noise, channel_dim=1).mul_(255).round_().clamp_(0, 255)
        erased = frames.clone()
        erased[..., top : top + height, left : left + width] = noise.to(torch.uint8)
        return erased

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int] | None:
        """Draw (top, left, height, width) of the rectangle; None if the clip is not erased."""
        if rng.random() >= self.prob:
            return None
        for _ in range(ERASING_TRIES):
            area = rng.uniform(*self.area)
            aspect = math.exp(rng.uniform(math.log(self.aspect[0]), math.log(self.aspect[1])))
            if (size := erased_size(height, width, area, aspect)) is not None:
                h, w = size
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        return None


def erased_size(height: int, width: int, area: float, aspect: float) -> tuple[int, int] | None:
    """Return the height and width of a rectangle that covers `area` of a frame; None unless both are below the frame's."""
    pixels = area * height * width
    h, w = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
    return (h, w) if h < height and w < width else None


def _on_bytes(count_levels: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
    """Apply an operation that counts grey levels: floats are cut to bytes, as published."""
    if not frames.is_floating_point():
        return count_levels(frames)
    return count_levels((frames * 255).to(torch.uint8)).to(frames.dtype) / 255


def adjust_sharpness(frames: Tensor, factor: float) -> Tensor:
    """Blend a smoothed frame (factor 0) with the frame (1), or extrapolate (above 1); the outermost pixels stay.

    Takes uint8, or floats in [0, 1]; returns the same dtype. The filter is PIL's, 5/13 in the middle and 1/13 around, computed
    as a box of ones (rows, then columns) plus four times the middle: over ten times as fast as torchvision's convolution.
    """
    pixels = frames.clone() if frames.is_floating_point() else frames.float()
    inner = pixels[..., 1:-1, 1:-1]  # a view: adding to it changes `pixels`
    rows = pixels[..., :-2, :] + pixels[..., 1:-1, :]
    rows += pixels[..., 2:, :]
    smooth = rows[..., :-2] + rows[..., 1:-1]
    smooth += rows[..., 2:]
    smooth.add_(inner, alpha=4).mul_(1 / 13)
    inner.add_(smooth.sub_(inner), alpha=1 - factor)
    if frames.is_floating_point():
        return pixels.clamp_(0, 1)
    return pixels.round_().clamp_(0, 255).to(frames.dtype)


def _move(
    frames: Tensor,
    angle: float = 0.0,
    translate: tuple[float, float] = (0.0, 0.0),
    shear: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """Rotate about the center, move by pixels, or shear about the upper left corner; bilinear; uncovered pixels become grey."""
    from torchvision.transforms.v2 import InterpolationMode

    return _kernels().affine(
        frames,
        angle=angle,
        translate=list(translate),
        scale=1.0,
        shear=list(shear),
        interpolation=InterpolationMode.BILINEAR,
        fill=[0.5 if frames.is_floating_point() else 127.5],  # the kernel rounds bytes at the end: 128
        center=[0.0, 0.0] if any(shear) else None,
    )
