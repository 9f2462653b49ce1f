"""Several processes of a run on this machine: started together, watched, and ended together."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnivision.launch.exit import exit_code_and_reason, first_failure
from omnivision.launch.launcher import Job, run_folder
from omnivision.reporting.run_directory import own_job, own_restarts
from omnivision.utils.errors import (
    EXIT_ANNOUNCED,
    EXIT_FAULT,
    EXIT_HUNG_UP,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EXIT_USER,
    StopRequested,
)
from omnivision.utils.signals import SIGNALS, signals_ignored

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from omnivision.distributed.process_group import RankInfo

# Exit codes of runs that somebody ended.
INTERRUPTED = (EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_ANNOUNCED, EXIT_HUNG_UP)
GRACE_SECONDS = 15.0  # that the other processes have to leave after one has failed


def run_local_processes(job: Job, count: int) -> int:
    """Start `count` ranks here and wait; returns the exit code. When one fails, the others are ended, too.

    Signals are forwarded to them. What killed a rank is written into `summary.json`, if that rank could not.
    """
    from omnivision.distributed.process_group import RankInfo

    context = multiprocessing.get_context("spawn")
    with rendezvous_dir() as meeting:
        places = [RankInfo(rank, count, rank, count, f"file://{meeting}/store") for rank in range(count)]
        processes = [context.Process(target=_local_process, args=(job, place)) for place in places]
        for process in processes:
            process.start()
        try:
            with forward_signals(processes) as received:
                code, reason = wait_for_processes(processes)
            if received and (code in INTERRUPTED or any(process.exitcode == -received[0] for process in processes)):
                code, reason = exit_code_and_reason(StopRequested(signal.Signals(received[0]).name))
        except KeyboardInterrupt as error:
            with signals_ignored():
                send(processes, signal.SIGINT)
                wait_for_processes(processes)
            code, reason = exit_code_and_reason(error)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
    if code not in (0, EXIT_USER):
        folder, pids = run_folder(job), [process.pid for process in processes if process.pid is not None]
        reason = first_failure(folder, own_job(), own_restarts(), pids=pids) or reason
        folder.note_silent_end(reason, interrupted=code in INTERRUPTED)
    return code


@contextlib.contextmanager
def rendezvous_dir() -> Iterator[str]:
    """Make a directory in which local processes meet; those that killed runs have left behind are removed."""
    for old in Path(tempfile.gettempdir()).glob("omnivision-rendezvous-*"):
        with contextlib.suppress(OSError), open(old / "lock", "r+") as lock:  # none: it is being made
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of a dead process's
            shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix="omnivision-rendezvous-") as name, open(Path(name, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield name


@contextlib.contextmanager
def forward_signals(processes: list[SpawnProcess]) -> Iterator[list[int]]:
    """Forward signals to `processes` inside this block; yields a list of those received."""
    received: list[int] = []

    def hand_on(number: int, frame: Any) -> None:
        received.append(number)
        send(processes, number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def send(processes: list[SpawnProcess], number: int) -> None:
    for process in processes:
        if process.pid is not None and process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def wait_for_processes(processes: list[SpawnProcess]) -> tuple[int, str]:
    """Wait for processes to end; when one fails, the others have a while to leave. Its exit code counts.

    The second value says what happened, for a run that could not say it: which process was killed, or ended how.
    """
    failed: int | None = None
    deadline = float("inf")
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        for process in processes:
            process.join(timeout=0.1)
            if process.exitcode and failed is None:
                failed, deadline = process.exitcode, time.monotonic() + GRACE_SECONDS
    if failed is None:  # the last one may have ended between two looks
        failed = next((process.exitcode for process in processes if process.exitcode), 0)
    killed = [
        f"process {rank} was killed by {signal.Signals(-process.exitcode).name}"
        for rank, process in enumerate(processes)
        if process.exitcode is not None and process.exitcode < 0
    ]
    reason = ", ".join(killed) or f"a process ended with exit code {failed}"
    return failed if failed >= 0 else EXIT_FAULT, reason


def _local_process(job: Job, place: RankInfo) -> None:
    from omnivision.distributed.process_group import exit_with_parent
    from omnivision.launch.run import run_rank

    exit_with_parent(os.getppid())
    sys.exit(run_rank(job, place))
