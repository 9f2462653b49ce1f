"""Tubelets: splitting a video into tokens and back, and fixed positional embeddings.

A *tubelet* is a box of pixels (pt, ph, pw) over all channels. Tokens are in raster order t, h, w; the values of a
tubelet are in the order (t, h, w, c), channel fastest, wherever they are predicted or compared.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from omnivision.utils.errors import UserError

Triple = tuple[int, int, int]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def token_grid(size: Triple, tubelet: Triple) -> Triple:
    """Return the number of tokens along (T, H, W) for a video of `size` (T, H, W).

    Raises UserError when a side is not a multiple of the tubelet's: the rest would be cut off silently.
    """
    for name, side, patch in zip(("frames", "height", "width"), size, tubelet, strict=True):
        if patch <= 0 or side <= 0 or side % patch:
            raise UserError(
                f"{name} must be a positive multiple of {patch}, got {side} (a video of {size[0]} x {size[1]} x {size[2]}, "
                f"tubelets of {tubelet[0]} x {tubelet[1]} x {tubelet[2]}). Set num_frames, image_size or tubelet."
            )
    return size[0] // tubelet[0], size[1] // tubelet[1], size[2] // tubelet[2]


def split_tubelets(video: Tensor, tubelet: Triple) -> Tensor:
    """View (B, C, T, H, W) as (B, T', H', W', C, pt, ph, pw); no pixel is copied."""
    batch, channels, frames, height, width = video.shape
    (pt, ph, pw), (nt, nh, nw) = tubelet, token_grid((frames, height, width), tubelet)
    return video.reshape(batch, channels, nt, pt, nh, ph, nw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)


def pick_tubelets(video: Tensor, tubelet: Triple, tokens: Tensor) -> Tensor:
    """Return the pixels of the tokens at `tokens`: (B, C, T, H, W) and indices (B, K) -> (B, K, C, pt, ph, pw)."""
    boxes = split_tubelets(video, tubelet)
    _, _, height, width = boxes.shape[:4]
    rows = torch.arange(len(video), device=video.device)[:, None]
    return boxes[rows, tokens // (height * width), tokens // width % height, tokens % width]


def patchify(video: Tensor, tubelet: Triple) -> Tensor:
    """Turn (B, C, T, H, W) into (B, N, pt * ph * pw, C), tokens in raster order, channel last."""
    boxes = split_tubelets(video, tubelet)  # (B, T', H', W', C, pt, ph, pw)
    return boxes.permute(0, 1, 2, 3, 5, 6, 7, 4).flatten(4, 6).flatten(1, 3)


def unpatchify(patches: Tensor, grid: Triple, tubelet: Triple) -> Tensor:
    """Invert `patchify`: (B, N, pt * ph * pw, C) or (B, N, pt * ph * pw * C) -> (B, C, T, H, W)."""
    boxes = patches.reshape(len(patches), *grid, *tubelet, -1)  # (B, T', H', W', pt, ph, pw, C)
    boxes = boxes.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, T', pt, H', ph, W', pw)
    (nt, nh, nw), (pt, ph, pw) = grid, tubelet
    return boxes.reshape(len(patches), -1, nt * pt, nh * ph, nw * pw)


def sinusoid_positions(positions: int, width: int) -> Tensor:
    """Return the fixed positional embedding over flattened tokens: float32 (1, positions, width).

    Entry [p, j] is sin (even j) or cos (odd j) of p / 10000^(2 (j // 2) / width), computed in float64
    (Vaswani et al. 2017, section 3.5; over flattened tokens as in OmniMAE).
    """
    # On the meta device, torch.arange would import torch's compiler, which takes two seconds.
    column = torch.arange(width, dtype=torch.float64, device="cpu")
    angle = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] / 10000 ** (2 * (column // 2) / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()[None].to(torch.get_default_device())


def image_positions(table: Tensor, grid: Triple, height: int, width: int) -> Tensor:
    """Return the positions for one image of `height` x `width` tokens: (1, height * width, D).

    They are taken from time slot 0 of the video table (1, N, D) over `grid`; another size is interpolated bicubically
    (half-pixel centers, no antialiasing), the published rule for images in a video model.
    """
    slot = table[:, : grid[1] * grid[2]]
    if (height, width) == grid[1:]:
        return slot
    plane = slot.reshape(1, grid[1], grid[2], -1).permute(0, 3, 1, 2)
    plane = F.interpolate(plane, size=(height, width), mode="bicubic", align_corners=False)
    return plane.permute(0, 2, 3, 1).flatten(1, 2)


def resized_positions(table: Tensor, grid: Triple, new_grid: Triple) -> Tensor:
    """Interpolate positions trilinearly in (t, h, w) for another token grid: (1, N', D). The same grid returns the table."""
    if new_grid == grid:
        return table
    volume = table.reshape(1, *grid, -1).permute(0, 4, 1, 2, 3)
    volume = F.interpolate(volume, size=new_grid, mode="trilinear", align_corners=False)
    return volume.permute(0, 2, 3, 4, 1).flatten(1, 3)


@functools.cache  # copying them to the device at every step would make the host wait
def _statistics(device: torch.device, channel_dim: int, ndim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ImageNet's mean and standard deviation of RGB in [0, 1], shaped to broadcast along `channel_dim` of `ndim`."""
    shape = [1] * ndim
    shape[channel_dim] = 3
    mean, std = (
        torch.tensor(values, dtype=dtype).reshape(shape).to(device) for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return mean, std


def normalize_pixels(pixels: Tensor, channel_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert uint8 RGB in 0..255, of any shape with RGB along `channel_dim`, to ImageNet-normalized `dtype`."""
    mean, std = _statistics(pixels.device, channel_dim, pixels.ndim, dtype)
    return (pixels.to(dtype) / 255 - mean) / std


def unnormalize_pixels(video: Tensor, channel_dim: int) -> Tensor:
    """Return pixels in [0, 1] from uint8 in 0..255 or from ImageNet-normalized floating point."""
    if video.dtype == torch.uint8:
        return video.float() / 255
    mean, std = _statistics(video.device, channel_dim, video.ndim, video.dtype)
    return video * std + mean
