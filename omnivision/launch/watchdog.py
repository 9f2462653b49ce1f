"""Ends a process that stands still: one that was asked to stop and does not get to it, and one whose peers are gone silent.

A thread does it, since the main one may be inside a collective operation that never returns. It writes what every thread was
doing to `logs/rank_<N>_stacks.txt`, and leaves.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from omnivision.reporting.run_directory import host_id, process_start
from omnivision.utils.errors import PeerLostError, StopRequested
from omnivision.utils.signals import SECONDS_OF_ONE_REQUEST, SIGNALS, StopSignal

GRACE_SECONDS = 25.0  # SLURM kills 30 seconds after SIGTERM
SECOND_REQUEST_SECONDS = 4.0
BEAT_SECONDS = 10.0
SILENT_BEATS = 3  # without a sign of life, before a process is suspected


class Watchdog:
    """A process that was asked to stop ends within its grace: else `leave` is called with why, and does not come back. After a
    second SIGTERM it has a few seconds; `leave` is then told to be quick.

    Args:
        grace: seconds that it has at least; longer if ending a step and saving have taken long.
    """

    def __init__(
        self, stop: StopSignal, leave: Callable[[BaseException, bool], None], grace: float = GRACE_SECONDS
    ) -> None:
        self.stop, self.leave, self.grace = stop, leave, grace
        self.answered = False  # the main thread has heard; from then on only a second request counts

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """For the main thread, which signals go to; elsewhere nothing is watched."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        receiver, sender = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Python notes a signal there as it comes, whatever the main thread is in; its own handler waits for that.
        before = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, args=(receiver,), daemon=True, name="watchdog")
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(sender)
            thread.join()
            os.close(receiver)

    def _watch(self, receiver: int) -> None:
        came: dict[int, float] = {}  # when each signal came first
        last = float("inf")  # to leave, after a second request
        while True:
            # A while at a time: what the grace is changes as steps and saving are measured.
            ready, _, _ = select.select([receiver], [], [], 0.5 if came else None)
            numbers = os.read(receiver, 64) if ready else b""
            if ready and not numbers:
                return  # the block has ended
            now = time.monotonic()
            for number in SIGNALS:
                if number in numbers:
                    first = came.setdefault(number, now)
                    again = number == signal.SIGTERM and now - first > SECONDS_OF_ONE_REQUEST
                    last = min(last, now + SECOND_REQUEST_SECONDS) if again else last
            waited = now - min(came.values(), default=now)
            if now > last or (not self.answered and waited > max(self.grace, self.stop.time_to_leave)):
                error = StopRequested(signal.Signals(min(came, key=lambda number: came[number])).name)
                error.add_note(f"it had not left {waited:.0f} s later, {at(self.stop.doing, self.stop.step)}")
                self.leave(error, now > last)


class PeerMonitor:
    """The processes of a run tell one another that they live, each by a file of its own in `logs/`.

    Process 0 watches all, the others watch process 0. `leave` is called with a PeerLostError that names one silent for as long
    as collective operations may take, and what it did last.
    """

    def __init__(
        self,
        logs: Path,
        rank: int,
        world: int,
        stop: StopSignal,
        timeout: float,
        leave: Callable[[BaseException, bool], None],
    ) -> None:
        """`timeout` in seconds."""
        self.logs, self.rank, self.stop, self.timeout, self.leave = logs, rank, stop, timeout, leave
        self.watched = [other for other in (range(world) if rank == 0 else [0]) if other != rank]
        self.seconds = min(BEAT_SECONDS, timeout / 4)
        self._over = threading.Event()
        if self.watched:
            self._beat()

    def start(self) -> None:
        """From here on all have given a first sign, and silence means something."""
        if self.watched:
            threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def end(self) -> None:
        """This process leaves: silence means nothing any more."""
        self._over.set()
        self._file(self.rank).unlink(missing_ok=True)

    def find_dead_peers(self, seconds: float | None = None) -> PeerLostError | None:
        """An error that names those that are watched and gave no sign of life for so long, by default a few beats, or whose
        process is gone; None if all live.
        """
        seconds = SILENT_BEATS * self.seconds if seconds is None else seconds
        if not self._over.is_set():
            self._beat()
        found, one_is_gone = [], False
        try:
            own = (
                self._file(self.rank).stat().st_mtime
            )  # by the clock of the file system, which may be another machine's
        except OSError:
            return None
        for rank in self.watched:
            try:
                said = json.loads(self._file(rank).read_text(encoding="utf-8"))
                age = own - self._file(rank).stat().st_mtime
            except (OSError, ValueError):
                continue
            if not isinstance(said, dict):
                continue
            gone = said.get("machine") == host_id() and process_start(said.get("pid", 0)) is None
            one_is_gone = one_is_gone or gone
            if gone or age >= seconds:
                what = "is gone" if gone else f"has given no sign of life for {age:.0f} s"
                place = at(said.get("doing"), said.get("step"))
                who = f"process {rank} (pid {said.get('pid')} on {said.get('host')})"
                found.append(f"{who} {what}; last seen {place}, {age:.0f} s before")
        if not found:
            return None
        own_place = f"process {self.rank} was {at(self.stop.doing, self.stop.step)}"
        return PeerLostError("; ".join([*found, own_place]), one_is_gone)

    def _file(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.alive"

    def _beat(self) -> None:
        sign = {"step": self.stop.step, "doing": self.stop.doing, "pid": os.getpid()}
        sign |= {"host": socket.gethostname(), "machine": host_id()}
        with contextlib.suppress(OSError):  # a file system that does not answer for once ends nothing
            self._file(self.rank).write_text(json.dumps(sign) + "\n", encoding="utf-8")

    def _watch(self) -> None:
        while not self._over.wait(self.seconds):
            self._beat()
            # When all were suspended together, the others get the time to give a sign, too.
            if (
                self.find_dead_peers(self.timeout)
                and not self._over.wait(self.seconds)
                and (lost := self.find_dead_peers(self.timeout))
            ):
                self.leave(lost, False)


def is_peer_lost(error: BaseException) -> bool:
    """Return whether an error says that another process is gone, and nothing about this one.

    NCCL and the store have exception types; gloo raises a RuntimeError, in a function of torch.distributed or, while gradients
    are reduced, in the backward pass, where its text alone tells it from an error of the model.
    """
    if isinstance(error, PeerLostError):
        return True
    if not isinstance(error, RuntimeError):
        return False  # without importing torch: SLURM kills what does not leave in time
    import torch.distributed as dist

    frames = traceback.extract_tb(error.__traceback__)
    in_collective = bool(frames) and Path(frames[-1].filename).name == "distributed_c10d.py"
    texts = ("gloo", "pair closure", "Connection closed by peer", "Connection reset by peer", "NCCL")
    return isinstance(error, dist.DistError) or in_collective or any(text in str(error) for text in texts)


def at(doing: object, step: object) -> str:
    return f"{doing}, after step {step}"


def write_stacks(file: Path) -> None:
    """What every thread of this process is doing, on the console and as a file."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        faulthandler.dump_traceback(all_threads=True)
    with contextlib.suppress(OSError), open(file, "w", encoding="utf-8") as opened:
        faulthandler.dump_traceback(opened, all_threads=True)
