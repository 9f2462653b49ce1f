"""Augmentations of a labelled view: RandAugment and random erasing of uint8 frames (T, C, H, W), one draw for all frames.

Random numbers come from a generator that the caller keys. Pixels stay uint8: a worker hands on a quarter of what floats take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omnivision.models.patches import unnormalize_pixels
from omnivision.utils.errors import UserError

MAX_LEVEL = 10
OPERATIONS = (
    "AdjustBrightness",
    "AdjustContrast",
    "AdjustSaturation",
    "AdjustSharpness",
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)
ERASING_TRIES = 100


@dataclass(frozen=True)
class RandAugment:
    """`num_layers` different operations out of 14, one after the other (Cubuk et al. 2020, with the recipe's ranges).

    Args:
        magnitude: mean strength of an operation, 0 to 10.
        num_layers: operations drawn for a clip, all different.
        prob: chance that a drawn operation is applied.
        std: standard deviation of the strength, which is drawn anew for each operation and clamped to 0 .. 10.

    Raises UserError for settings out of range.
    """

    magnitude: float = 7
    num_layers: int = 4
    prob: float = 0.5
    std: float = 0.5

    def __post_init__(self) -> None:
        setting = "Change trainer.data.view.rand_augment"
        if not 0 <= self.magnitude <= MAX_LEVEL:
            raise UserError(
                f"RandAugment's magnitude is {self.magnitude}; expected 0 to {MAX_LEVEL}. {setting}.magnitude."
            )
        if not 1 <= self.num_layers <= len(OPERATIONS):
            raise UserError(
                f"RandAugment's num_layers is {self.num_layers}; expected 1 to {len(OPERATIONS)}, because the operations of "
                f"a clip are all different. {setting}.num_layers."
            )
        if not 0 <= self.prob <= 1:
            raise UserError(f"RandAugment's prob is {self.prob}; expected a share between 0 and 1. {setting}.prob.")
        if not 0 <= self.std < math.inf:
            raise UserError(f"RandAugment's std is {self.std}; expected a number of at least 0. {setting}.std.")

    def __call__(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        """uint8 RGB (T, 3, H, W) -> the same shape and type; the input is not changed."""
        for operation, argument in self.plan(rng):
            frames = apply_operation(operation, frames, argument)
        return frames

    def plan(self, rng: np.random.Generator) -> list[tuple[str, float]]:
        """The operations of one clip with their arguments, in the order in which they are applied."""
        plan = []
        for number in rng.permutation(len(OPERATIONS))[: self.num_layers]:
            if rng.random() < self.prob:
                level = min(max(rng.normal(self.magnitude, self.std), 0.0), float(MAX_LEVEL))
                sign = 1 if rng.random() < 0.5 else -1
                plan.append((OPERATIONS[number], operation_argument(OPERATIONS[number], level, sign)))
        return plan


@dataclass(frozen=True)
class RandomErasing:
    """Noise in one rectangle over all frames, fresh for each pixel, channel and frame (Zhong et al. 2020).

    The published noise is standard normal after normalisation. Here pixels stay uint8, so the noise is un-normalised with
    ImageNet's mean and deviation, rounded, and clamped to 0 .. 255. That cuts its tails where black and white lie: below
    -1.8 to -2.1 and above 2.2 to 2.6 deviations, depending on the channel.

    Args:
        prob: chance that a clip is erased.
        area: share of a frame, drawn uniformly.
        aspect: height / width, drawn log-uniformly.

    Raises UserError for settings out of range.
    """

    prob: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)

    def __post_init__(self) -> None:
        setting = "Change trainer.data.view.erasing"
        if not 0 <= self.prob <= 1:
            raise UserError(f"Random erasing's prob is {self.prob}; expected a share between 0 and 1. {setting}.prob.")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise UserError(
                f"Random erasing's area is {tuple(self.area)}; expected 0 < low <= high <= 1. {setting}.area."
            )
        if not 0 < self.aspect[0] <= self.aspect[1] < math.inf:
            raise UserError(
                f"Random erasing's aspect is {tuple(self.aspect)}; expected 0 < low <= high. {setting}.aspect."
            )

    def __call__(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        """uint8 RGB (T, 3, H, W) -> the same shape and type; the input is not changed."""
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
        """(top, left, height, width) of the rectangle; None when the clip stays as it is."""
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
    """Height and width of a rectangle with that share of a frame and aspect; None unless both are smaller than the frame's."""
    pixels = area * height * width
    h, w = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
    return (h, w) if h < height and w < width else None


def operation_argument(operation: str, level: float, sign: int) -> float:
    """What an operation of RandAugment is called with at a level of 0 to 10; 0 for those that take nothing."""
    share = level / MAX_LEVEL
    match operation:
        case "AdjustBrightness" | "AdjustContrast" | "AdjustSaturation" | "AdjustSharpness":
            return 1 + sign * share * 0.9  # factor; 1 changes nothing
        case "Rotate":
            return sign * share * 30  # degrees, counter-clockwise
        case "Posterize":
            return 4 - int(share * 4)  # bits that are kept
        case "Solarize":
            return 1 - share  # from this brightness on, of 1, pixels are inverted
        case "ShearX" | "ShearY":
            return sign * share * 0.3  # pixels sideways for each pixel down
        case "TranslateX" | "TranslateY":
            return sign * share * 0.45  # of the width or height; the picture moves left or up
    assert operation in ("AutoContrast", "Equalize", "Invert"), operation
    return 0.0


def apply_operation(operation: str, frames: Tensor, argument: float) -> Tensor:
    """One operation of RandAugment on RGB frames (T, 3, H, W), uint8 or floats in [0, 1]; what moves in is grey.

    Auto-contrast and equalize look at each frame by itself, contrast at the mean of each frame, as published.
    """
    # Here and not above: the import takes longer than a second, and the workers of a masked autoencoder never need it.
    from torchvision.transforms.v2 import functional as kernels

    white = 1.0 if frames.is_floating_point() else 255.0
    height, width = frames.shape[-2:]
    match operation:
        case "AdjustBrightness":
            return kernels.adjust_brightness(frames, argument)
        case "AdjustContrast":
            return kernels.adjust_contrast(frames, argument)
        case "AdjustSaturation":
            return kernels.adjust_saturation(frames, argument)
        case "AdjustSharpness":
            return adjust_sharpness(frames, argument)
        case "AutoContrast":
            return kernels.autocontrast(frames)
        case "Equalize":
            return _from_bytes(kernels.equalize(_to_bytes(frames)), frames.dtype)
        case "Invert":
            return kernels.invert(frames)
        case "Posterize":
            return _from_bytes(kernels.posterize(_to_bytes(frames), int(argument)), frames.dtype)
        case "Solarize":
            return kernels.solarize(frames, argument * white)
        case "Rotate":
            return _move(frames, angle=-argument)  # the kernel turns clockwise
        case "ShearX":
            return _move(frames, shear=(_degrees(argument), 0.0))
        case "ShearY":
            return _move(frames, shear=(0.0, _degrees(argument)))
        case "TranslateX":
            return _move(frames, translate=(-argument * width, 0.0))
        case "TranslateY":
            return _move(frames, translate=(0.0, -argument * height))
    raise AssertionError(operation)


def adjust_sharpness(frames: Tensor, factor: float) -> Tensor:
    """Blend of a smoothed frame (factor 0) and the frame (1), and beyond; the outermost pixels stay. Types as above.

    The smoothing filter is 1/13 around and 5/13 in the middle (PIL's). It is a box of ones and four times the middle, and
    the box is a sum of rows and then of columns: over ten times as fast as torchvision's convolution, hence not its kernel.
    """
    pixels = frames.clone() if frames.is_floating_point() else frames.float()
    inner = pixels[..., 1:-1, 1:-1]  # a view: what is added to it ends up in `pixels`
    rows = pixels[..., :-2, :] + pixels[..., 1:-1, :]
    rows += pixels[..., 2:, :]
    smooth = rows[..., :-2] + rows[..., 1:-1]
    smooth += rows[..., 2:]
    smooth.add_(inner, alpha=4).mul_(1 / 13)
    inner.add_(smooth.sub_(inner), alpha=1 - factor)
    if frames.is_floating_point():
        return pixels.clamp_(0, 1)
    return pixels.round_().clamp_(0, 255).to(frames.dtype)


def _degrees(slope: float) -> float:
    return math.degrees(math.atan(slope))


def _move(
    frames: Tensor,
    angle: float = 0.0,
    translate: tuple[float, float] = (0.0, 0.0),
    shear: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """Rotate about the centre, move by pixels, or shear about the upper left corner; bilinear, with grey from outside."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as kernels

    return kernels.affine(
        frames,
        angle=angle,
        translate=list(translate),
        scale=1.0,
        shear=list(shear),
        interpolation=InterpolationMode.BILINEAR,
        fill=[0.5 if frames.is_floating_point() else 127.5],  # the kernel rounds bytes at the end: 128
        center=[0.0, 0.0] if any(shear) else None,
    )


def _to_bytes(frames: Tensor) -> Tensor:
    """Floats in [0, 1] cut to bytes, as the published operations that count grey levels do; bytes stay."""
    return (frames * 255).to(torch.uint8) if frames.is_floating_point() else frames


def _from_bytes(frames: Tensor, dtype: torch.dtype) -> Tensor:
    return frames.to(dtype) / 255 if dtype.is_floating_point else frames
