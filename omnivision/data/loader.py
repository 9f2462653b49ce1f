"""Batches of training and of evaluation, and the worker processes that fetch them."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import DataLoader

from omnivision.data.batch import Batch, Sample, collate
from omnivision.data.dataset import ClipDataset
from omnivision.data.sampling import EpochPlan, Request
from omnivision.distributed.process_group import Dist, exit_with_parent
from omnivision.utils.errors import DataWorkerError, UserError
from omnivision.utils.signals import end_workers, signals_blocked

MAX_FILES_SHOWN = 8


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are fetched: worker processes, batches each prepares ahead, page-locked memory for an accelerator, and
    seconds after which a batch that does not come is an error.
    """

    num_workers: int = 0
    prefetch: int = 2
    pin_memory: bool = False
    timeout: float = 600.0


@dataclass(frozen=True)
class TrainData:
    """Clips to train on, and which of them make the batch of each step."""

    dataset: ClipDataset
    workers: LoaderConfig
    plan: EpochPlan

    def batches(self, start: tuple[int, int], epochs: int, dist: Dist) -> Iterator[Batch]:
        """Of this process; see `train_batches`."""
        return train_batches(self.dataset, self.plan, start, epochs, dist.rank, dist.world_size, self.workers)


@dataclass(frozen=True)
class ValData:
    """Videos to evaluate on, so many at a time on each process."""

    dataset: ClipDataset
    workers: LoaderConfig
    videos_per_batch: int

    def batches(self, dist: Dist, limit: int | None) -> Iterator[Batch]:
        """Of this process; see `evaluation_batches`."""
        rank, world = dist.rank, dist.world_size
        return evaluation_batches(self.dataset, self.videos_per_batch, rank, world, self.workers, limit)


class _Steps:
    """Batch sampler over the steps from (epoch, step) to the end of the run; handed to the DataLoader."""

    def __init__(self, plan: EpochPlan, start: tuple[int, int], epochs: int, rank: int, world: int) -> None:
        self.plan, self.start, self.epochs, self.rank, self.world = plan, start, epochs, rank, world

    def __iter__(self) -> Iterator[list[Request]]:
        first_epoch, first_step = self.start
        for epoch in range(first_epoch, self.epochs):
            for step in range(first_step if epoch == first_epoch else 0, self.plan.steps):
                yield self.plan.requests(epoch, step, self.rank, self.world)


class _Videos:
    """Batch sampler over all videos of sources of these sizes, those of one process; made as it is asked for."""

    def __init__(self, sizes: Sequence[int], per_batch: int, rank: int, world: int, limit: int | None) -> None:
        self.sizes, self.per_batch, self.rank, self.world, self.limit = sizes, per_batch, rank, world, limit

    def __iter__(self) -> Iterator[list[Request]]:
        by_source = [self._of(source, size) for source, size in enumerate(self.sizes)]
        in_turn = (batch for turn in itertools.zip_longest(*by_source) for batch in turn if batch is not None)
        return itertools.islice(in_turn, self.limit)

    def _of(self, source: int, size: int) -> Iterator[list[Request]]:
        step = self.per_batch * self.world
        for first in range(self.rank, size, step):
            yield [Request(source, video, epoch=0) for video in range(first, min(first + step, size), self.world)]


def train_batches(
    dataset: ClipDataset,
    plan: EpochPlan,
    start: tuple[int, int],
    epochs: int,
    rank: int,
    world: int,
    workers: LoaderConfig,
) -> Iterator[Batch]:
    """Batches from the step `start` = (epoch, step) to the end of epoch `epochs` - 1, without a pause between epochs.

    Raises DataWorkerError.
    """
    return _iterate(dataset, _Steps(plan, start, epochs, rank, world), workers)


def evaluation_batches(
    dataset: ClipDataset, videos_per_batch: int, rank: int, world: int, workers: LoaderConfig, limit: int | None = None
) -> Iterator[Batch]:
    """Every video of every source once, whatever the number of processes: process r takes videos r, r + world, ...

    Batches never mix sources, which take turns; `limit` bounds the batches of each process. Raises DataWorkerError.
    """
    sizes = [len(split) for split in dataset.splits]
    return _iterate(dataset, _Videos(sizes, videos_per_batch, rank, world, limit), workers)


def _iterate(dataset: ClipDataset, batches: _Steps | _Videos, workers: LoaderConfig) -> Iterator[Batch]:
    """Batches from workers; one that was killed or does not answer is told with the files that it had to read."""
    loader = data_loader(dataset, batches, workers)
    if not workers.num_workers:
        yield from map(_unwrap, loader)
        return
    worker_timeout, asked = _WorkerTimeout(workers.timeout), iter(batches)
    try:
        fetched = iter(loader)
        while True:
            with worker_timeout:
                batch = next(fetched, None)
            if batch is None:
                return
            next(asked)
            yield _unwrap(batch)
    except (RuntimeError, OSError, EOFError) as error:
        # What a worker sent may have to be fetched from it, and it is gone.
        gone = isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker (pid" in str(error)
        if not (gone or worker_timeout.over):
            raise
        splits, requests = dataset.splits, next(asked, [])
        files = ", ".join(splits[request.source].path(request.video) for request in requests[:MAX_FILES_SHOWN])
        what = (
            f"The data workers have given nothing for {workers.timeout / 60:.3g} minutes (trainer.data.timeout_minutes; a file "
            "system that does not answer, perhaps)"
            if worker_timeout.over
            else "A data worker was killed (by the system for want of memory, perhaps: lower num_workers or "
            "trainer.data.prefetch)"
        )
        raise DataWorkerError(
            f"{what} while this batch was read: {files}{', ...' * (len(requests) > MAX_FILES_SHOWN)}. The same command goes on "
            f"from the last checkpoint. ({error})"
        ) from error
    finally:
        worker_timeout.end()


def _safe_collate(samples: Sequence[Sample]) -> Batch | UserError:
    """A batch, or what is wrong with it: torch would add a worker's traceback to what a worker raises."""
    try:
        return collate(samples)
    except UserError as error:
        return error


def _unwrap(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch


class _WorkerTimeout:
    """Ends the workers when a batch does not come for so long (seconds); torch then tells that they are gone. By itself it
    either waits for ever, or does not look whether they live.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.over = seconds, False
        self._since: float | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="data-workers").start()

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._since = None

    def end(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 10)):
            since = self._since
            if since is not None and time.monotonic() - since > self.seconds:
                self.over = True
                end_workers()
                return


def worker_init(pid: int, worker: int) -> None:
    """Set up a data worker that ends with the training process `pid`.

    torch watches the fork server instead, which lives as long as its workers.
    """
    exit_with_parent(pid)


def data_loader(dataset: ClipDataset, batches: _Steps | _Videos, workers: LoaderConfig) -> DataLoader:
    """Worker processes with one thread each, started from a clean server process: a forked worker would inherit sockets
    of the communication backend and delay the notice of a dead peer."""
    context = None
    if workers.num_workers:
        warnings.filterwarnings("ignore", "This DataLoader will create")  # said once, before the run
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["omnivision.data.dataset"])
        # SLURM signals every process of a job. A worker that ended then would end the run, which still has to save. (Python's
        # resource tracker comes first, since starting it unblocks SIGTERM.)
        multiprocessing.resource_tracker.ensure_running()
        with signals_blocked():
            multiprocessing.forkserver.ensure_running()
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=_safe_collate,
        num_workers=workers.num_workers,
        prefetch_factor=workers.prefetch if workers.num_workers else None,
        multiprocessing_context=context,
        worker_init_fn=functools.partial(worker_init, os.getpid()) if workers.num_workers else None,
        pin_memory=workers.pin_memory,
    )
