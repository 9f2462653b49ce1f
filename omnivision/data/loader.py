"""Which samples make the batch of a step, for every process, and the workers that fetch them.

`EpochPlan` answers for any (epoch, step) directly, so resuming at step k costs what starting at step 0 costs, and the
samples of a step depend neither on the number of workers nor, as a set, on the number of processes.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader

from omnivision.data.batch import Batch, collate
from omnivision.data.dataset import ClipDataset, Request
from omnivision.data.order import permuted
from omnivision.distributed import leave_with
from omnivision.errors import UserError

# Purposes of a shuffle; see dataset.Draw.
BATCH_ORDER, SAMPLE_ORDER = 100, 101


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
                    f"of {source.clips}: an epoch would not see it. Lower batch_size, or raise trainer.data.repeats.{name} "
                    f"to at least {math.ceil(1000 * source.clips / source.size) / 1000}."  # rounded up, so that it is enough
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
    dataset: ClipDataset,
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
    dataset: ClipDataset, videos_per_batch: int, rank: int, world: int, workers: Workers, limit: int | None = None
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


@dataclass(frozen=True)
class LeaveWithTrainer:
    """Ends a worker when the process that trains is gone. torch's own watch sees the fork server, which workers keep alive."""

    pid: int

    def __call__(self, worker: int) -> None:
        leave_with(self.pid)


def data_loader(dataset: ClipDataset, batches: _Steps | Sequence[list[Request]], workers: Workers) -> DataLoader:
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
        worker_init_fn=LeaveWithTrainer(os.getpid()) if workers.num_workers else None,
        pin_memory=workers.pin_memory,
    )
