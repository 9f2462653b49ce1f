"""Which samples make the batch of a step, for every process.

`EpochPlan` answers for any (epoch, step) directly, so resuming at step k costs what starting at step 0 costs, and the
samples of a step depend neither on the number of workers nor, as a set, on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from omnivision.data.order import permuted
from omnivision.utils.errors import UserError

# Purposes of a shuffle; see dataset.Draw.
BATCH_ORDER, SAMPLE_ORDER = 100, 101


class Request(NamedTuple):
    """One video of one epoch. `occurrence` counts its appearances in an epoch when a source is repeated."""

    source: int
    video: int
    epoch: int
    occurrence: int = 0


@dataclass(frozen=True)
class SourcePlan:
    """How an epoch goes through one source.

    Args:
        size: samples of the source.
        videos: decoded samples of a step, all processes together.
        views: views of each sample; a source gives `repeat * size / (videos * views)` steps, so that an epoch holds as many
            views as the source has samples.
        repeat: how often an epoch goes through the source (may be a fraction).
        pieces: pieces that a batch is worked through in.
    """

    size: int
    videos: int
    views: int = 1
    repeat: float = 1
    pieces: int = 1

    @property
    def clips(self) -> int:
        """Clips of a step, all processes together."""
        return self.videos * self.views


class EpochPlan:
    """The steps of an epoch over several sources; each step takes its samples from one of them.

    Args:
        sources: by name.
        seed: of the order.
        limit: at most this many steps an epoch.

    Raises UserError for a source that would give no step.
    """

    def __init__(self, sources: Mapping[str, SourcePlan], seed: int, limit: int | None = None) -> None:
        self.sources, self.seed = dict(sources), seed
        counts = [int(source.repeat * source.size / source.clips + 1e-9) for source in sources.values()]
        for (name, source), count in zip(sources.items(), counts, strict=True):
            if count == 0:
                raise UserError(
                    f"Source {name} has {source.size} samples and a repeat factor of {source.repeat}, fewer than one batch "
                    f"of {source.clips}: an epoch would not see it. Lower batch_size, or see it more often: "
                    f"++trainer.data.repeats.{name}={math.ceil(1000 * source.clips / source.size) / 1000}."  # rounded up
                )
        self._in_order = list(sources.values())
        self._ends = np.cumsum(counts)
        self.total_steps = int(self._ends[-1])
        self.steps = self.total_steps if limit is None else min(limit, self.total_steps)

    def requests(self, epoch: int, step: int, rank: int, world: int) -> list[Request]:
        """The videos that process `rank` of `world` decodes for a step; processes take equal, adjoining parts."""
        batch = int(permuted(np.array([step]), self.total_steps, self.seed, BATCH_ORDER, epoch)[0])
        source = int(np.searchsorted(self._ends, batch, side="right"))
        size, videos = self._in_order[source].size, self._in_order[source].videos
        first = (batch - (int(self._ends[source - 1]) if source else 0)) * videos
        share = videos // world
        positions = np.arange(first + rank * share, first + (rank + 1) * share)
        found = []
        for lap in np.unique(positions // size):  # a repeated source is shuffled anew on each lap
            places = positions[positions // size == lap] % size
            chosen = permuted(places, size, self.seed, SAMPLE_ORDER, epoch, source, int(lap))
            found += [Request(source, int(video), epoch, int(lap)) for video in chosen]
        return found
