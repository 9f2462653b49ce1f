"""Token masks for masked autoencoding: bool arrays over the token grid (T', H', W'), True = hidden from the encoder.

Each kind hides the same number of tokens in every sample, so that visible tokens stack into one tensor. As published, counts
are truncated: int(0.9 * 8 * 14 * 14) = 1411.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np

from omnivision.config.schema import Fraction

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class _RatioMask:
    ratio: Fraction


class RandomMask(_RatioMask):
    """Hide random tokens of the clip (the recipe's mask)."""

    def __call__(self, grid: Grid, rng: np.random.Generator) -> np.ndarray:
        return _random_mask(grid, int(self.ratio * grid[0] * grid[1] * grid[2]), rng)


class TubeMask(_RatioMask):
    """Hide random tokens of a frame, the same at all times (VideoMAE)."""

    def __call__(self, grid: Grid, rng: np.random.Generator) -> np.ndarray:
        frames, height, width = grid
        count = int(self.ratio * frames * height * width / frames)  # published order of operations: it rounds
        return np.repeat(_random_mask((1, height, width), count, rng), frames, axis=0)


class FrameMask(_RatioMask):
    """Hide all tokens at random times."""

    def __call__(self, grid: Grid, rng: np.random.Generator) -> np.ndarray:
        chosen = _random_mask((grid[0], 1, 1), int(self.ratio * grid[0]), rng)
        return np.broadcast_to(chosen, grid).copy()


class CausalMask(_RatioMask):
    """Hide the last tokens in raster order: the model sees the start of a clip and completes it."""

    def __call__(self, grid: Grid, rng: np.random.Generator) -> np.ndarray:
        total = grid[0] * grid[1] * grid[2]
        mask = np.arange(total) >= total - int(self.ratio * total)
        return mask.reshape(grid)


class BlockMask(_RatioMask):
    """Hide rectangles of a frame, the same at all times (BEiT, section 2.3): at least 4 tokens, aspect 0.3 to 3.3."""

    def __call__(self, grid: Grid, rng: np.random.Generator) -> np.ndarray:
        frames, height, width = grid
        num_masked = int(self.ratio * height * width)
        frame = np.zeros((height, width), dtype=bool)
        while (remaining := num_masked - int(frame.sum())) > 0:
            area = rng.uniform(min(4, remaining), remaining) if remaining > 1 else 1.0
            aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
            rows = min(height, max(1, round((area * aspect) ** 0.5)))
            columns = min(width, max(1, round((area / aspect) ** 0.5)))
            top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
            block = frame[top : top + rows, left : left + columns]
            fresh = np.argwhere(~block)[:remaining]  # a block that would hide too many is cut short, row by row
            block[tuple(fresh.T)] = True
        return np.repeat(frame[None], frames, axis=0)


Mask = RandomMask | TubeMask | FrameMask | CausalMask | BlockMask
MASKS: dict[str, Callable[[float], Mask]] = {mask.__name__: mask for mask in get_args(Mask)}


def _random_mask(shape: Grid, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return a mask of `shape` with exactly `count` random entries set."""
    mask = np.zeros(shape, dtype=bool)
    mask.reshape(-1)[rng.permutation(mask.size)[:count]] = True
    return mask
