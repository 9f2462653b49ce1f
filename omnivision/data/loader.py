"""Batches for training and evaluation, and the worker processes that decode them."""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from omnivision.data.batch import Batch, Sample, collate
from omnivision.data.dataset import ClipDataset
from omnivision.data.sampling import AnyRequest, EpochPlan, Request
from omnivision.utils.errors import DataWorkerError, UserError
from omnivision.utils.signals import exit_with_parent, kill_data_workers, signals_blocked

MAX_FILES_SHOWN = 8


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are loaded.

    Args:
        num_workers: worker processes; 0 decodes in this process.
        prefetch: batches that each worker prepares ahead.
        pin_memory: put batches into page-locked memory, for an accelerator.
        timeout: maximum seconds to wait for a batch.
    """

    num_workers: int = 0
    prefetch: int = 2
    pin_memory: bool = False
    timeout: float = 600.0


@dataclass(frozen=True)
class TrainData:
    """Clips to train on, and the plan of the steps."""

    dataset: ClipDataset
    config: LoaderConfig
    plan: EpochPlan

    def batches(self, start: tuple[int, int], epochs: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield a rank's batches from `start` = (epoch, step) to the end of epoch `epochs` - 1, without pausing between epochs.

        Raises DataWorkerError.
        """
        return load_batches(self.dataset, self.requests(start, epochs, rank, world), self.config)

    def requests(self, start: tuple[int, int], epochs: int, rank: int = 0, world: int = 1) -> Iterator[list[Request]]:
        """Yield the requests of each of these batches."""
        first_epoch, first_step = start
        for epoch in range(first_epoch, epochs):
            for step in range(first_step if epoch == first_epoch else 0, self.plan.steps):
                yield self.plan.requests(epoch, step, rank, world)


@dataclass(frozen=True)
class ValData:
    """Videos to evaluate on, and how many each rank puts into a batch."""

    dataset: ClipDataset
    config: LoaderConfig
    videos_per_batch: int

    def batches(self, limit: int | None = None, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield every video of every source once over all ranks: rank r takes videos r, r + world, ...

        Batches never mix sources, which take turns; `limit` bounds the batches of each rank. Raises DataWorkerError.
        """
        return load_batches(self.dataset, self.requests(limit, rank, world), self.config)

    def requests(self, limit: int | None = None, rank: int = 0, world: int = 1) -> Iterator[list[Request]]:
        """Yield the requests of each of these batches."""
        step = self.videos_per_batch * world

        def of_source(source: int, size: int) -> Iterator[list[Request]]:
            for first in range(rank, size, step):
                yield [Request(source, index, epoch=0) for index in range(first, min(first + step, size), world)]

        by_source = [of_source(source, len(split)) for source, split in enumerate(self.dataset.splits)]
        in_turn = (batch for turn in itertools.zip_longest(*by_source) for batch in turn if batch is not None)
        return itertools.islice(in_turn, limit)


class _WorkerTimeout(threading.Thread):
    """Kill the data workers if a batch takes longer than `seconds`; torch then reports that they died.

    DataLoader's own timeout does not detect dead workers.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(daemon=True, name="worker-timeout")
        self.seconds, self.deadline = seconds, math.inf
        self.expired, self.finished = False, threading.Event()

    def run(self) -> None:
        while not self.finished.wait(1):
            if time.monotonic() > self.deadline:
                self.expired = True
                kill_data_workers()
                return

    def next_batch(self, batches: Iterator[Batch | UserError]) -> Batch | UserError | None:
        self.deadline = time.monotonic() + self.seconds
        batch = next(batches, None)
        self.deadline = math.inf
        return batch

    def describe(self) -> str:
        if self.expired:
            return (
                f"The data workers have returned nothing for {self.seconds / 60:.3g} minutes (trainer.data.timeout_minutes; "
                "perhaps a file system does not answer)"
            )
        return "A data worker was killed (perhaps out of memory: lower num_workers or trainer.data.prefetch)"


def load_batches(dataset: ClipDataset, requests: Iterator[list[Any]], config: LoaderConfig) -> Iterator[Batch]:
    """Yield a batch for each list of requests, in order.

    Raises DataWorkerError, which names the files of the batch, if a worker was killed or returns nothing for too long.
    """
    pending: deque[list[AnyRequest]] = deque()  # requests handed to workers

    def sent() -> Iterator[list[AnyRequest]]:
        for batch in requests:
            pending.append(batch)
            yield batch

    fetched = iter(data_loader(dataset, sent(), config))
    timeout = _WorkerTimeout(config.timeout)
    if config.num_workers:
        timeout.start()
    try:
        while (batch := timeout.next_batch(fetched)) is not None:
            if isinstance(batch, UserError):
                raise batch
            pending.popleft()
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        # Reading a tensor may need the worker that sent it, which may have died.
        gone = isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker (pid" in str(error)
        if not (gone or timeout.expired):
            raise
        lost = pending[0][:MAX_FILES_SHOWN] if pending else []
        paths = [dataset.splits[request.source].path(request.sample_index) for request in lost]
        raise DataWorkerError(
            f"{timeout.describe()} while it read {', '.join(paths)}. The same command resumes from the last checkpoint. "
            f"({error})"
        ) from error
    finally:
        timeout.finished.set()


def _safe_collate(samples: Sequence[Sample]) -> Batch | UserError:
    """Return the batch, or the error: torch would add a worker's traceback to a raised one."""
    try:
        return collate(samples)
    except UserError as error:
        return error


def worker_init(pid: int, worker: int) -> None:
    """Make a data worker exit with the training process `pid`; torch watches the fork server instead."""
    exit_with_parent(pid)


def data_loader(dataset: ClipDataset, batches: Iterator[list[Any]], config: LoaderConfig) -> DataLoader:
    """Return a loader whose workers have one thread each and start from a forkserver.

    A forked worker would inherit sockets of the communication backend and delay the detection of a dead peer.
    """
    context = None
    if config.num_workers:
        warnings.filterwarnings("ignore", "This DataLoader will create")  # the run has its own warning
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["omnivision.data.dataset"])
        # SLURM signals every process of a job, and a run still needs its workers while it saves. (Start the resource tracker
        # first: starting it unblocks SIGTERM.)
        multiprocessing.resource_tracker.ensure_running()
        with signals_blocked():
            multiprocessing.forkserver.ensure_running()
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=_safe_collate,
        num_workers=config.num_workers,
        prefetch_factor=config.prefetch if config.num_workers else None,
        multiprocessing_context=context,
        worker_init_fn=functools.partial(worker_init, os.getpid()) if config.num_workers else None,
        pin_memory=config.pin_memory,
    )
