"""Map a function over items in worker processes, where a crash costs only one item, and show progress."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool
from rich import progress
from rich.console import Console

Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_PENDING = 1000  # items scheduled at a time; there may be millions


class WorkerCrashedError(RuntimeError):
    """The process that worked on an item died before it returned a result."""


def run_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int | None
) -> Generator[Result | WorkerCrashedError, None, None]:
    """Yield function(item) for each item, in order.

    workers: number of processes; 0: run in this one; None: one per core, at most 16.
    If a process crashes, its item's result is a WorkerCrashedError. An exception raised by `function`, which must be importable
    by name, ends the iteration. The processes end with the iteration.
    """
    if workers == 0:
        yield from map(function, items)
        return
    workers = min(len(os.sched_getaffinity(0)), 16) if workers is None else workers
    context = multiprocessing.get_context("forkserver")  # not forked: the caller may hold threads
    context.set_forkserver_preload(
        [getattr(function, "func", function).__module__]
    )  # imported once, not by each process
    pool = ProcessPool(max_workers=max(1, min(workers, len(items))), context=context)
    pending: deque[Future[Any]] = deque()
    try:
        for item in items:
            pending.append(pool.schedule(function, args=[item]))
            if len(pending) == MAX_PENDING:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())
        pool.close()
    except BaseException:
        pool.stop()
        raise
    finally:
        pool.join()


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    except ProcessExpired as error:
        code = error.exitcode
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        return WorkerCrashedError(f"the process that read it died ({how}{'; out of memory?' if code == -9 else ''})")


def track(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Yield the items, and show progress on standard error: a bar on a terminal, else a line every 10 %."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from progress.track(items, what, total, console=console)
        return
    for done, item in enumerate(items, start=1):
        yield item
        if 10 * done // total > 10 * (done - 1) // total:
            console.print(f"{what}: {done} of {total}", highlight=False, soft_wrap=True)
