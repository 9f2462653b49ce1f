"""Which samples make the batch of a step, for every process, and the workers that fetch them.

`EpochPlan` answers for any (epoch, step) directly, so resuming at step k costs what starting at step 0 costs, and the
samples of a step depend neither on the number of workers nor, as a set, on the number of processes.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader

from omnivision.data.batch import Batch, collate
from omnivision.data.dataset import Request, VideoDataset
from omnivision.data.order import permuted
from omnivision.errors import UserError

# Purposes of a shuffle; see dataset.Draw.
BATCH_ORDER, SAMPLE_ORDER = 100, 101


class EpochPlan:
    """The steps of an epoch over several sources; each step takes its samples from one of them.

    Args:
        sizes: samples of each source by name.
        repeats: how often an epoch goes through a source (may be a fraction); 1 where not named.
        videos_per_step: decoded videos of a step, all processes together.
        views_per_clip: views of each; a source gives `repeat * size / (videos * views)` steps, so that an epoch holds
            as many views as the source has videos.
        limit: at most this many steps an epoch.

    Raises UserError for a source that would give no step, or a repeat factor without a source.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        repeats: Mapping[str, float],
        videos_per_step: int,
        views_per_clip: int,
        seed: int,
        limit: int | None = None,
    ) -> None:
        self.sizes, self.videos, self.seed = list(sizes.values()), videos_per_step, seed
        batch = videos_per_step * views_per_clip
        if unknown := sorted(set(repeats) - set(sizes)):
            raise UserError(
                f"trainer.data.repeats names {', '.join(unknown)}; the sources are {', '.join(sizes)}. Change "
                "trainer.data.repeats."
            )
        counts = [int(repeats.get(name, 1) * size / batch + 1e-9) for name, size in sizes.items()]
        for (name, size), count in zip(sizes.items(), counts, strict=True):
            if count == 0:
                raise UserError(
                    f"Source {name} has {size} samples and a repeat factor of {repeats.get(name, 1)}, fewer than one batch "
                    f"of {batch}: an epoch would not see it. Lower batch_size, or raise trainer.data.repeats.{name} to at "
                    f"least {math.ceil(1000 * batch / size) / 1000}."  # rounded up, so that it is enough
                )
        self._ends = np.cumsum(counts)
        self.total_steps = int(self._ends[-1])
        self.steps = self.total_steps if limit is None else min(limit, self.total_steps)

    def requests(self, epoch: int, step: int, rank: int, world: int) -> list[Request]:
        """The videos that process `rank` of `world` decodes for a step; processes take equal, adjoining parts."""
        batch = int(permuted(np.array([step]), self.total_steps, self.seed, BATCH_ORDER, epoch)[0])
        source = int(np.searchsorted(self._ends, batch, side="right"))
        first = (batch - (int(self._ends[source - 1]) if source else 0)) * self.videos
        share = self.videos // world
        positions = np.arange(first + rank * share, first + (rank + 1) * share)
        size, found = self.sizes[source], []
        for lap in np.unique(positions // size):  # a repeated source is shuffled anew on each lap
            places = positions[positions // size == lap] % size
            videos = permuted(places, size, self.seed, SAMPLE_ORDER, epoch, source, int(lap))
            found += [Request(source, int(video), epoch, int(lap)) for video in videos]
        return found


@dataclass(frozen=True)
class Workers:
    """How batches are fetched: worker processes, batches each prepares ahead, page-locked memory for an accelerator."""

    num_workers: int = 0
    prefetch: int = 2
    pin_memory: bool = False


class _Steps:
    """Batch sampler over the steps from (epoch, step) to the end of the run; handed to the DataLoader."""

    def __init__(self, plan: EpochPlan, start: tuple[int, int], epochs: int, rank: int, world: int) -> None:
        self.plan, self.start, self.epochs, self.rank, self.world = plan, start, epochs, rank, world

    def __iter__(self) -> Iterator[list[Request]]:
        first_epoch, first_step = self.start
        for epoch in range(first_epoch, self.epochs):
            for step in range(first_step if epoch == first_epoch else 0, self.plan.steps):
                yield self.plan.requests(epoch, step, self.rank, self.world)


def train_batches(
    dataset: VideoDataset,
    plan: EpochPlan,
    start: tuple[int, int],
    epochs: int,
    rank: int,
    world: int,
    workers: Workers,
) -> Iterator[Batch]:
    """Batches from the step `start` = (epoch, step) to the end of epoch `epochs` - 1, without a pause between epochs."""
    return iter(data_loader(dataset, _Steps(plan, start, epochs, rank, world), workers))


def evaluation_batches(
    dataset: VideoDataset, videos_per_batch: int, rank: int, world: int, workers: Workers, limit: int | None = None
) -> DataLoader:
    """Every video of every source once, whatever the number of processes: process r takes videos r, r + world, ...

    Batches never mix sources, which take turns; `limit` bounds the batches of each process.
    """
    by_source = [
        [
            [Request(source, int(i), epoch=0) for i in range(first, min(first + step, len(split)), world)]
            for first in range(rank, len(split), step)
        ]
        for source, split in enumerate(dataset.splits)
        for step in [videos_per_batch * world]
    ]
    batches = [batch for turn in itertools.zip_longest(*by_source) for batch in turn if batch is not None]
    return data_loader(dataset, batches[:limit], workers)


def data_loader(dataset: VideoDataset, batches: _Steps | Sequence[list[Request]], workers: Workers) -> DataLoader:
    """Worker processes with one thread each, started from a clean server process: a forked worker would inherit sockets
    of the communication backend and delay the notice of a dead peer."""
    context = None
    if workers.num_workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["omnivision.data.dataset"])
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers.num_workers,
        prefetch_factor=workers.prefetch if workers.num_workers else None,
        multiprocessing_context=context,
        pin_memory=workers.pin_memory,
    )
