"""A function over many items in worker processes: an item that crashes its worker costs that item, not the command."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import islice
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerCrashedError(RuntimeError):
    """The process that worked on an item ended before it had a result."""


def default_workers() -> int:
    """Return the number of cores of this process, but at most 16."""
    return min(len(os.sched_getaffinity(0)), 16)


def run_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Generator[tuple[int, Result | WorkerCrashedError], None, None]:
    """Yield (position, function(item)) of each item as it is done, in `workers` processes; 0: in this one.

    The result of an item whose process crashed is a WorkerCrashedError. An exception of `function`, which must be importable
    by name, ends the iteration. The processes end with the iteration.
    """
    if workers == 0:
        yield from ((position, function(item)) for position, item in enumerate(items))
        return
    context = multiprocessing.get_context("forkserver")  # not forked: the caller may hold threads
    context.set_forkserver_preload([function.__module__])  # imported once, not by each process
    pool = ProcessPool(max_workers=max(1, min(workers, len(items))), context=context)
    remaining = iter(enumerate(items))
    running: dict[Future[Any], int] = {}

    def submit(count: int) -> None:
        for position, item in islice(remaining, count):
            running[pool.schedule(function, args=[item])] = position

    try:
        submit(workers)  # not all at once: there may be millions
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                position = running.pop(future)
                submit(1)
                yield position, _result(future)
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
