"""Token masks for masked autoencoding: bool arrays over the token grid (T', H', W'), True = hidden from the encoder.

Each kind hides the same number of tokens in every sample, so that visible tokens stack into one tensor. A ratio is turned
into a count by truncation, as published: int(0.9 * 8 * 14 * 14) = 1411.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omnivision.utils.errors import check_range

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class _RatioMask:
    ratio: float

    def __post_init__(self) -> None:
        check_range("mask_ratio", self.ratio, 0, 1)


class RandomMask(_RatioMask):
    """Random tokens of the clip (the recipe's mask)."""

    def __call__(self, grid: Grid, rng: np.random.Generator) -> np.ndarray:
        return _random_mask(grid, int(self.ratio * grid[0] * grid[1] * grid[2]), rng)


class TubeMask(_RatioMask):
    """One random frame mask, repeated over time (VideoMAE)."""

    def __call__(self, grid: Grid, rng: np.random.Generator) -> np.ndarray:
        frames, height, width = grid
        slot = _random_mask((1, height, width), int(self.ratio * frames * height * width / frames), rng)
        return np.repeat(slot, frames, axis=0)


class FrameMask(_RatioMask):
    """Whole time slots."""

    def __call__(self, grid: Grid, rng: np.random.Generator) -> np.ndarray:
        slots = _random_mask((grid[0], 1, 1), int(self.ratio * grid[0]), rng)
        return np.broadcast_to(slots, grid).copy()


class CausalMask(_RatioMask):
    """The last tokens in raster order: the model sees a clip up to a moment and completes it."""

    def __call__(self, grid: Grid, rng: np.random.Generator) -> np.ndarray:
        total = grid[0] * grid[1] * grid[2]
        mask = np.arange(total) >= total - int(self.ratio * total)
        return mask.reshape(grid)


class BlockMask(_RatioMask):
    """Rectangles of one frame, repeated over time (BEiT, section 2.3): blocks of at least 4 tokens, aspect 0.3 to 3.3."""

    def __call__(self, grid: Grid, rng: np.random.Generator) -> np.ndarray:
        frames, height, width = grid
        wanted = int(self.ratio * height * width)
        slot = np.zeros((height, width), dtype=bool)
        while (left := wanted - int(slot.sum())) > 0:
            area = rng.uniform(min(4, left), left) if left > 1 else 1.0
            aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
            rows = min(height, max(1, round((area * aspect) ** 0.5)))
            columns = min(width, max(1, round((area / aspect) ** 0.5)))
            top, side = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
            block = slot[top : top + rows, side : side + columns]
            fresh = np.argwhere(~block)[:left]  # a block that would hide too many is cut short, row by row
            block[tuple(fresh.T)] = True
        return np.repeat(slot[None], frames, axis=0)


Mask = RandomMask | TubeMask | FrameMask | CausalMask | BlockMask


def _random_mask(shape: Grid, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return a mask of `shape` with exactly `count` random entries set."""
    mask = np.zeros(shape, dtype=bool)
    mask.reshape(-1)[rng.permutation(mask.size)[:count]] = True
    return mask
