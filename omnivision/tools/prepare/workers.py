"""A function over many items, by processes that may die: a file that kills its reader costs that file, not the run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_GREETING = "ready"


@dataclass(frozen=True)
class Died:
    """Instead of a result: the process that worked on the item ended."""

    reason: str


def default_workers() -> int:
    """As many as there are cores for this process, but no more than 16."""
    return min(len(os.sched_getaffinity(0)), 16)


def in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Generator[tuple[int, Result | Died], None, None]:
    """(position, function(item)) of each item, as they are done, by so many processes; 0: one after the other in this one.

    `function` must be importable by name. What it raises ends the iteration, as a RuntimeError with its traceback.
    Dist do not outlive the iteration, nor, for longer than an item takes, this process.
    """
    if workers == 0:
        yield from ((position, function(item)) for position, item in enumerate(items))
        return
    context = multiprocessing.get_context("forkserver")  # not forked: the caller may hold threads
    context.set_forkserver_preload([function.__module__])  # imported once, not by each process
    todo = iter(enumerate(items))
    team: dict[Connection, _Worker] = {}
    try:
        for job in islice(todo, workers):
            _start(context, function, team, job)
        while team:
            for ready in wait(list(team)):
                assert isinstance(ready, Connection)
                worker = team[ready]
                try:
                    message = ready.recv()
                except (EOFError, ConnectionResetError):
                    del team[ready]
                    worker.process.join()
                    how = _how(worker.process.exitcode)
                    if not worker.greeted:
                        raise RuntimeError(f"a process to work with died before it began ({how})") from None
                    if following := next(todo, None):
                        _start(context, function, team, following)
                    yield worker.position, Died(f"the process that read it died ({how})")
                    continue
                if message == _GREETING:
                    worker.greeted = True
                    continue
                done, value = message
                if not done:
                    raise RuntimeError(value)
                position = worker.position
                if following := next(todo, None):
                    worker.position = following[0]
                    with contextlib.suppress(BrokenPipeError):  # it was killed since: the next turn finds out
                        ready.send(following[1])
                else:
                    del team[ready]
                    ready.close()
                    worker.process.join()
                yield position, value
    finally:
        for worker in team.values():
            worker.process.kill()  # SIGTERM may be blocked where a fork server of training workers is shared
        for worker in team.values():
            worker.process.join()


@dataclass
class _Worker:
    process: ForkServerProcess
    position: int  # of the item that it works on
    greeted: bool = False


def _start(
    context: ForkServerContext,
    function: Callable[[Any], Any],
    team: dict[Connection, _Worker],
    job: tuple[int, Any],
) -> None:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, function), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    team[ours] = _Worker(process, job[0])
    with contextlib.suppress(BrokenPipeError):  # it died: the next read tells
        ours.send(job[1])


def _work(connection: Connection, function: Callable[[Any], Any]) -> None:
    """Serve one item after the other, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    connection.send(_GREETING)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            answer = True, function(item)
        except Exception:
            answer = False, traceback.format_exc()
        try:
            connection.send(answer)
        except BrokenPipeError:  # nobody is there to hear it
            return


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return (
            f"killed by {signal.Signals(-exit_code).name}; out of memory?"
            if exit_code == -9
            else (signal.Signals(-exit_code).name)
        )
    return f"exit code {exit_code}"
