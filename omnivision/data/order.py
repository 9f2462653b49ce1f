"""The order of samples and the random draws: functions of (seed, epoch, sample, view) and of nothing else.

So they depend neither on the number of workers or processes nor on where a run was interrupted, and the order of ten
million samples costs no memory: a position of the shuffled order is computed when it is asked for.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 8


def draws(seed: int, *key: int) -> np.random.Generator:
    """A random generator of its own for each (seed, key)."""
    return np.random.Generator(np.random.Philox(_entropy(seed, key)))


def permuted(positions: np.ndarray, size: int, seed: int, *key: int) -> np.ndarray:
    """Where the elements at `positions` of a shuffled order of `size` come from: int64 in, int64 of the same shape out.

    For each (seed, key) this is a bijection of 0 .. size - 1: a Feistel network over the next power of four, walked
    until it falls inside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = _entropy(seed, key).generate_state(ROUNDS, np.uint64)
    values = np.asarray(positions).astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= size
    return values.astype(np.int64)


def _entropy(seed: int, key: tuple[int, ...]) -> np.random.SeedSequence:
    # With its length, because numpy takes (1,) and (1, 0) for the same.
    return np.random.SeedSequence([seed, len(key), *key])


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every bit of the input moves about half the bits of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
