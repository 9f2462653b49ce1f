"""Watchdogs: abort a process that hangs after a stop request, or whose peers stopped sending heartbeats.

They run in threads, because the main thread may be inside a collective operation that never returns.
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
from typing import Any

from omnivision.utils.errors import PeerLostError, StopRequested, is_out_of_memory
from omnivision.utils.host import host_id, process_start
from omnivision.utils.signals import SIGNAL_DEBOUNCE_SECONDS, STOP_SIGNALS, StopSignal, seconds_to_exit

GRACE_SECONDS = 25.0  # SLURM kills 30 seconds after SIGTERM
SECOND_REQUEST_SECONDS = 4.0
BEAT_SECONDS = 10.0
KILL_SECONDS = 1.0  # a killed process closes its connections some time before its id is gone
SUSPECT_BEATS = 2  # missed heartbeats that make a peer suspect; SLURM leaves 30 seconds to decide
HEARTBEAT_TIMEOUT = 300.0  # seconds without a heartbeat before the run is aborted
COLLECTIVES = ("/torch/distributed/", "/torch/nn/parallel/")  # torch code that fails only through other ranks

Abort = Callable[[BaseException], None]  # does not return


class Watchdog:
    """Abort a process `grace` seconds after a stop request, or 4 s after a second SIGTERM.

    `grace` is extended if steps and saves have been measured to take longer.
    """

    def __init__(self, stop: StopSignal, abort: Abort, grace: float = GRACE_SECONDS) -> None:
        self.stop = stop
        self.abort = abort
        self.grace = grace

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the main thread, which receives the signals; does nothing in other threads."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        receiver, sender = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # The wakeup fd is written even while the main thread is blocked.
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
        arrivals: dict[int, float] = {}  # when the first signal of each kind arrived
        last = float("inf")  # when to abort after a second request
        while True:
            ready, _, _ = select.select([receiver], [], [], 0.5 if arrivals else None)
            numbers = os.read(receiver, 64) if ready else b""
            if ready and not numbers:
                return  # the block has ended
            now = time.monotonic()
            for number in STOP_SIGNALS:
                if number in numbers:
                    first = arrivals.setdefault(number, now)
                    if number == signal.SIGTERM and now - first > SIGNAL_DEBOUNCE_SECONDS:
                        last = min(last, now + SECOND_REQUEST_SECONDS)
            waited = now - min(arrivals.values(), default=now)
            grace = max(self.grace, seconds_to_exit(self.stop.step_seconds, self.stop.save_seconds))
            if now > last or waited > grace:
                error = StopRequested(signal.Signals(min(arrivals, key=lambda number: arrivals[number])).name)
                error.add_note(f"it had not exited {waited:.0f} s later, {self.stop.phase}")
                self.abort(error)


class PeerMonitor:
    """Heartbeats between ranks, one file per rank in `logs/`. Rank 0 watches all ranks; the others watch rank 0.

    If a peer sends no heartbeat for `timeout` seconds, `abort` is called with a PeerLostError that names its last phase.
    """

    def __init__(self, logs: Path, rank: int, world: int, stop: StopSignal, timeout: float, abort: Abort) -> None:
        self.logs = logs
        self.rank = rank
        self.stop = stop
        self.timeout = timeout
        self.abort = abort
        self.watched = [other for other in (range(world) if rank == 0 else [0]) if other != rank]
        self.seconds = min(BEAT_SECONDS, timeout / 4)
        self._started = False  # every peer has sent a first heartbeat
        self._over = threading.Event()
        if self.watched:
            self._beat()

    def start(self) -> None:
        """Start watching the peers; each must have sent a first heartbeat."""
        self._started = True
        if self.watched:
            threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def end(self) -> None:
        """Stop watching, because this process is about to exit."""
        self._over.set()
        self._file(self.rank).unlink(missing_ok=True)

    def find_dead_peers(self, seconds: float | None = None, may_leave: bool = False) -> PeerLostError | None:
        """Return an error naming peers that died or missed heartbeats for `seconds` (default: a few beats).

        Peers that exited count as dead unless `may_leave`.
        """
        seconds = SUSPECT_BEATS * self.seconds if seconds is None else seconds
        if not self._over.is_set():
            self._beat()
        dead, one_is_gone = [], False
        for rank in self.watched:
            peer, age = self._read_beat(rank)
            gone = peer.get("machine") == host_id() and process_start(peer.get("pid", 0)) is None
            left = age is None and self._started and not may_leave
            one_is_gone = one_is_gone or gone or left
            if left:
                dead.append(f"rank {rank} has exited")
            elif age is not None and (gone or age >= seconds):
                what = "is gone" if gone else f"has sent no heartbeat for {age:.0f} s"
                who = f"rank {rank} (pid {peer.get('pid')} on {peer.get('host')})"
                dead.append(f"{who} {what}; last seen {peer.get('phase')}, {age:.0f} s before")
        if not dead:
            return None
        dead.append(f"rank {self.rank} was {self.stop.phase}")
        return PeerLostError("; ".join(dead), one_is_gone)

    def wait_for_dead_peers(self, seconds: float | None = None) -> PeerLostError | None:
        """Poll `find_dead_peers` for `seconds`, by default until peers are dead or proven alive.

        A peer on this machine is checked by its process id, one on another machine by its heartbeat.
        """
        if seconds is None:
            here = all(self._read_beat(rank)[0].get("machine") == host_id() for rank in self.watched)
            seconds = KILL_SECONDS if here else SUSPECT_BEATS * self.seconds
        deadline = time.monotonic() + seconds
        while not (dead := self.find_dead_peers()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return dead

    def _read_beat(self, rank: int) -> tuple[dict[str, Any], float | None]:
        """Return a peer's last heartbeat and its age; None if the peer has exited, 0 while it writes one.

        Ages use the file system's clock, which may be another machine's.
        """
        try:
            with open(self._file(rank), encoding="utf-8") as file:
                age = self._file(self.rank).stat().st_mtime - os.fstat(file.fileno()).st_mtime
                return dict(json.load(file)), age
        except FileNotFoundError:
            return {}, None
        except (OSError, ValueError, TypeError):
            return {}, 0.0

    def _file(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.alive"

    def _beat(self) -> None:
        beat = {"phase": self.stop.phase, "pid": os.getpid(), "host": socket.gethostname(), "machine": host_id()}
        with contextlib.suppress(OSError):  # tolerate a failed write
            self._file(self.rank).write_text(json.dumps(beat) + "\n", encoding="utf-8")

    def _watch(self) -> None:
        while not self._over.wait(self.seconds):
            self._beat()
            # If all ranks were suspended, let peers send a heartbeat first.
            if self.find_dead_peers(self.timeout, may_leave=True) and not self._over.wait(self.seconds):
                if dead := self.find_dead_peers(self.timeout, may_leave=True):
                    self.abort(dead)


def as_peer_lost(error: BaseException, peers: PeerMonitor | None) -> BaseException:
    """Return a PeerLostError for an error caused by the loss of another rank; return other errors unchanged.

    NCCL and the store have their own exception types, and collectives are functions of torch.distributed. Gloo raises a plain
    RuntimeError, which may also come from the backward pass, where gradients are reduced but the model may also fail: there the
    heartbeats decide.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, PeerLostError) or is_out_of_memory(error):
        return error
    from torch.distributed import DistError  # imported lazily: a command that fails early need not wait for it

    frames = traceback.extract_tb(error.__traceback__)
    file = frames[-1].filename if frames else ""
    is_collective = isinstance(error, DistError) or any(part in file for part in COLLECTIVES)
    lost = None
    if peers is not None and (is_collective or "/torch/autograd/" in file):
        lost = peers.wait_for_dead_peers(KILL_SECONDS if is_collective else None)
    elif peers is not None:
        lost = peers.find_dead_peers(may_leave=True)
    if lost is None and is_collective:
        lost = PeerLostError(f"another rank disappeared without recording a reason ({error})", gone=True)
    if lost is None:
        return error
    lost.__cause__ = error
    return lost.with_traceback(error.__traceback__)


def write_stacks(file: Path) -> None:
    """Write the stacks of all threads of this process to the console and to a file."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        faulthandler.dump_traceback(all_threads=True)
    with contextlib.suppress(OSError), open(file, "w", encoding="utf-8") as opened:
        faulthandler.dump_traceback(opened, all_threads=True)
