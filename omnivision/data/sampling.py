"""Sample order, epoch plan, clip times and keyed random numbers.

Everything is a function of (seed, epoch, step, sample): it depends neither on the number of workers or ranks nor on where a
run was interrupted. The shuffled order takes no memory, because each position is computed when it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np

from omnivision.utils.errors import UserError, VideoDecodeError

Spacing = Literal["ends", "published"]
Segment = tuple[float, float]  # [start, end) of a sample in its video, seconds
SEGMENT_END_TOLERANCE = 1.0  # seconds that a segment may extend past its video: ends are often rounded up
FEISTEL_ROUNDS = 8
MAX_ADVISED_REPEATS = 100


class Draw(IntEnum):
    """The purpose of a random number; part of its key, so that no two purposes share numbers."""

    CLIP = 0
    VIEW = 1
    MASK = 2
    REPLACEMENT = 3
    BATCH_ORDER = 100
    SAMPLE_ORDER = 101
    CLASS_ORDER = 102
    MODEL = 200


def keyed_rng(seed: int, *key: int) -> np.random.Generator:
    """Return the random generator of (seed, key)."""
    return np.random.Generator(np.random.Philox(_entropy(seed, key)))


def shuffled_index(positions: np.ndarray, size: int, seed: int, *key: int) -> np.ndarray:
    """Return the elements at `positions` of a shuffled 0 .. size - 1: int64 in, int64 of the same shape out.

    A bijection for each (seed, key): a Feistel network over the next power of four, iterated until the value is in range
    (cycle walking; Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = _entropy(seed, key).generate_state(FEISTEL_ROUNDS, np.uint64)
    values = np.asarray(positions).astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= size
    return values.astype(np.int64)


def _entropy(seed: int, key: tuple[int, ...]) -> np.random.SeedSequence:
    # Length included: SeedSequence treats (1,) and (1, 0) alike.
    return np.random.SeedSequence([seed, len(key), *key])


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_splitmix64(right ^ key) & mask)
    return (left << shift) | right


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Apply the finaliser of SplitMix64: every bit of the input moves about half the bits of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Request(NamedTuple):
    """One sample (video or image) of one epoch. `repeat_index` counts the passes through a repeated source."""

    source: int
    sample_index: int
    epoch: int
    repeat_index: int = 0


class WindowRequest(NamedTuple):
    """Windows `first` .. `first + number - 1` of one sample; see `window_starts`."""

    source: int
    sample_index: int
    first: int
    number: int


AnyRequest = Request | WindowRequest


@dataclass(frozen=True)
class ClassBalance:
    """How often a pass over N samples draws each class. Within a class, each sample is drawn equally often, to within one.

    Args:
        members: int64 (N,), the samples ordered by class.
        sizes: int64 (K,), samples of each class; samples without a label (-1) are the first class.
        draws: int64 (K,), draws of each class in a pass; they add up to N.
    """

    members: np.ndarray
    sizes: np.ndarray
    draws: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, balance: float) -> ClassBalance:
        """Draw classes in proportion to size^(1 - balance): 0 as they occur, 1 all alike. Samples without a label keep their
        share.
        """
        present, sizes = np.unique(labels, return_counts=True)
        labelled = present >= 0
        weights = np.where(labelled, sizes.astype(float) ** (1 - balance), 0)
        wanted = np.where(labelled, weights * sizes[labelled].sum() / max(weights.sum(), 1e-12), sizes)
        draws = np.floor(wanted).astype(np.int64)
        missing = len(labels) - int(draws.sum())
        draws[np.argsort(draws - wanted, kind="stable")[:missing]] += 1  # the largest remainders
        return cls(np.argsort(labels, kind="stable"), sizes.astype(np.int64), draws)

    @property
    def passes(self) -> int:
        """How often the most frequent sample is drawn."""
        return int(np.ceil(self.draws / self.sizes).max())

    def samples(self, draws: np.ndarray, seed: int, *key: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples of draws 0 .. N - 1, and how often each was drawn before in this pass: int64 of the same shape."""
        classes = np.searchsorted(np.cumsum(self.draws), draws, side="right")
        turn = draws - (np.cumsum(self.draws) - self.draws)[classes]
        place, earlier = turn % self.sizes[classes], turn // self.sizes[classes]
        first = np.cumsum(self.sizes) - self.sizes
        chosen = np.empty_like(place)
        for own, count in {*zip(classes.tolist(), earlier.tolist(), strict=True)}:
            same = (classes == own) & (earlier == count)
            shuffled = shuffled_index(place[same], int(self.sizes[own]), seed, Draw.CLASS_ORDER, *key, own, count)
            chosen[same] = self.members[first[own] + shuffled]
        return chosen, earlier


@dataclass(frozen=True)
class SourcePlan:
    """How an epoch reads one source.

    Args:
        num_samples: samples in the source.
        videos_per_step: samples decoded per step over all ranks.
        views_per_video: views per sample; a source gives `repeat * num_samples / clips_per_step` steps, so that an epoch
            holds as many views as the source has samples.
        repeat: passes of an epoch over the source (may be a fraction).
        micro_batches: equal parts of a batch, whose gradients are accumulated.
        balance: which samples a pass draws; None: each once.
    """

    num_samples: int
    videos_per_step: int
    views_per_video: int = 1
    repeat: float = 1
    micro_batches: int = 1
    balance: ClassBalance | None = None

    @property
    def clips_per_step(self) -> int:
        """Clips per step over all ranks."""
        return self.videos_per_step * self.views_per_video


class EpochPlan:
    """The steps of an epoch over several sources (by name); each step takes its samples from one of them.

    `limit` bounds the steps of an epoch. Raises UserError for a source that would give no step.
    """

    def __init__(self, sources: Mapping[str, SourcePlan], seed: int, limit: int | None = None) -> None:
        self.sources, self.seed = dict(sources), seed
        counts = [int(source.repeat * source.num_samples / source.clips_per_step + 1e-9) for source in sources.values()]
        for (name, source), count in zip(sources.items(), counts, strict=True):
            if count == 0:
                repeats = math.ceil(1000 * source.clips_per_step / source.num_samples) / 1000
                raise UserError(
                    f"Source {name} has {source.num_samples} samples and a repeat factor of {source.repeat}, fewer than one "
                    f"batch of {source.clips_per_step}: an epoch would not see it. Lower batch_size"
                    + (
                        f", or set ++trainer.data.repeats.{name}={repeats:g}."
                        if repeats <= MAX_ADVISED_REPEATS
                        else "."
                    )
                )
        self._in_order = list(sources.values())
        self._ends = np.cumsum(counts)
        self.total_steps = int(self._ends[-1])
        self.steps = self.total_steps if limit is None else min(limit, self.total_steps)

    def requests(self, epoch: int, step: int, rank: int, world: int) -> list[Request]:
        """Return the samples that `rank` of `world` decodes for a step; ranks take equal, consecutive parts."""
        batch = int(shuffled_index(np.array([step]), self.total_steps, self.seed, Draw.BATCH_ORDER, epoch)[0])
        source = int(np.searchsorted(self._ends, batch, side="right"))
        size, videos = self._in_order[source].num_samples, self._in_order[source].videos_per_step
        first = (batch - (int(self._ends[source - 1]) if source else 0)) * videos
        per_rank = videos // world
        positions = np.arange(first + rank * per_rank, first + (rank + 1) * per_rank)
        requests = []
        for repeat_index in np.unique(positions // size):  # a repeated source is shuffled anew on each pass
            places = positions[positions // size == repeat_index] % size
            key = epoch, source, int(repeat_index)
            chosen = shuffled_index(places, size, self.seed, Draw.SAMPLE_ORDER, *key)
            repeats = np.full(len(chosen), repeat_index)
            if (balance := self._in_order[source].balance) is not None:
                chosen, earlier = balance.samples(chosen, self.seed, *key)
                repeats = repeats * balance.passes + earlier  # so that no two clips of a sample have the same draws
            pairs = zip(chosen.tolist(), repeats.tolist(), strict=True)
            requests += [Request(source, index, epoch, repeat) for index, repeat in pairs]
        return requests


def random_clip_start(duration: float, clip_duration: float, u: float) -> float:
    """Return the start (s) of a clip inside the video, 0 if the video is shorter; the caller draws `u` from [0, 1)."""
    return max(0.0, duration - clip_duration) * u


def uniform_clip_starts(
    duration: float, clip_duration: float, num_clips: int, spacing: Spacing = "ends"
) -> list[float]:
    """Return the starts (s) of the clips of an evaluation, in ascending order.

    "ends" spreads them from the first to the last clip of the video (a single clip starts at 0). "published" is the rule
    of the published code: `k * last / num_clips`, which omits the end of the video.
    """
    last = max(0.0, duration - clip_duration)
    if spacing == "published":
        return [k * last / num_clips for k in range(num_clips)]
    steps = max(1, num_clips - 1)
    return [last * (k / steps) for k in range(num_clips)]  # k / steps is exactly 1 for the last clip


def window_starts(duration: float, window: float, stride: float) -> list[float]:
    """Return the starts (s) of windows every `stride` seconds, and of one that ends with the video.

    Raises VideoDecodeError for a video shorter than the window.
    """
    last = duration - window
    if last < 0:
        raise VideoDecodeError(f"its {duration:.3f} s are shorter than the window of {window:g} s")
    starts = [k * stride for k in range(math.floor(last / stride) + 1)]
    return starts if last - starts[-1] < 1e-3 else [*starts, last]


def sample_duration(duration: float, segment: Segment | None) -> float:
    """Return the duration (s) of a video, or of its `segment`.

    Raises VideoDecodeError for a segment beyond the end of the video.
    """
    if segment is None:
        return duration
    start, end = segment
    if start >= duration or end > duration + SEGMENT_END_TOLERANCE:
        raise VideoDecodeError(
            f"its segment from {start:g} to {end:g} s is beyond the end of the video at {duration:.3f} s"
        )
    return min(end, duration) - start


def clip_window(start: float, clip_duration: float, segment: Segment | None = None) -> tuple[Fraction, Fraction]:
    """Return the window [start, start + clip_duration) (s), with the sum of the two floats unrounded.

    In a `segment`, `start` counts from the segment's start, and the window ends with the segment at the latest.

    As doubles, 8.0 + 2.7 is a little below 10.7, so a 30 fps clip would lose the frame at 10.7 s, which a clip starting
    at 1.0 keeps. With the exact sum, every clip that starts on a frame holds 82 frames.
    """
    first, last = (Fraction(0), None) if segment is None else map(Fraction, segment)
    end = first + Fraction(start) + Fraction(clip_duration)
    return first + Fraction(start), end if last is None else min(end, last)
