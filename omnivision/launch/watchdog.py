"""Abort a process that hangs after a request to stop, or whose peers stopped sending heartbeats.

Threads do it, since the main one may be inside a collective operation that never returns.
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
from omnivision.utils.signals import SIGNAL_DEBOUNCE_SECONDS, SIGNALS, StopSignal, seconds_to_leave

GRACE_SECONDS = 25.0  # SLURM kills 30 seconds after SIGTERM
SECOND_REQUEST_SECONDS = 4.0
BEAT_SECONDS = 10.0
SUSPECT_BEATS = 3  # heartbeats that are missing when a peer is suspected
HEARTBEAT_TIMEOUT = 300.0  # seconds without a heartbeat when a rank is aborted

Abort = Callable[[BaseException, bool], None]  # does not return; True: at once


class Watchdog:
    """Calls `abort` for a process that was asked to stop and did not within `grace` seconds, or a few after a second SIGTERM.

    The grace is longer if finishing a step and saving have taken long.
    """

    def __init__(self, stop: StopSignal, abort: Abort, grace: float = GRACE_SECONDS) -> None:
        self.stop, self.abort, self.grace = stop, abort, grace
        self.exiting = False  # the main thread is ending; from then on only a second request counts

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the main thread, which receives the signals; elsewhere do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        receiver, sender = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Python writes signals there as they come, whatever blocks the main thread; its own handler waits for that.
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
        arrivals: dict[int, float] = {}  # of the first signal of each kind
        last = float("inf")  # moment to abort, after a second request
        while True:
            ready, _, _ = select.select([receiver], [], [], 0.5 if arrivals else None)
            numbers = os.read(receiver, 64) if ready else b""
            if ready and not numbers:
                return  # the block has ended
            now = time.monotonic()
            for number in SIGNALS:
                if number in numbers:
                    first = arrivals.setdefault(number, now)
                    if number == signal.SIGTERM and now - first > SIGNAL_DEBOUNCE_SECONDS:
                        last = min(last, now + SECOND_REQUEST_SECONDS)
            waited = now - min(arrivals.values(), default=now)
            grace = max(self.grace, seconds_to_leave(self.stop.step_seconds, self.stop.save_seconds))
            if now > last or (not self.exiting and waited > grace):
                error = StopRequested(signal.Signals(min(arrivals, key=lambda number: arrivals[number])).name)
                error.add_note(f"it had not left {waited:.0f} s later, {self.stop.phase}")
                self.abort(error, now > last)


class PeerMonitor:
    """Heartbeats of the ranks of a run, a file each in `logs/`: rank 0 watches all, the others watch rank 0.

    `abort` is called with a PeerLostError for one without a heartbeat for `timeout` seconds, with its last phase.
    """

    def __init__(self, logs: Path, rank: int, world: int, stop: StopSignal, timeout: float, abort: Abort) -> None:
        self.logs, self.rank, self.stop, self.timeout, self.abort = logs, rank, stop, timeout, abort
        self.watched = [other for other in (range(world) if rank == 0 else [0]) if other != rank]
        self.seconds = min(BEAT_SECONDS, timeout / 4)
        self._over = threading.Event()
        if self.watched:
            self._beat()

    def start(self) -> None:
        """Watch the peers, all of which have sent a first heartbeat."""
        if self.watched:
            threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def end(self) -> None:
        """Stop watching: this process leaves."""
        self._over.set()
        self._file(self.rank).unlink(missing_ok=True)

    def find_dead_peers(self, seconds: float | None = None) -> PeerLostError | None:
        """Return an error that names peers that are gone, or without a heartbeat for `seconds` (default: a few beats)."""
        seconds = SUSPECT_BEATS * self.seconds if seconds is None else seconds
        if not self._over.is_set():
            self._beat()
        dead, one_is_gone = [], False
        for rank in self.watched:
            try:  # ages by the clock of the file system, which may be another machine's
                age = self._file(self.rank).stat().st_mtime - self._file(rank).stat().st_mtime
                peer = dict(json.loads(self._file(rank).read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):  # it may just be written
                continue
            gone = peer.get("machine") == host_id() and process_start(peer.get("pid", 0)) is None
            one_is_gone = one_is_gone or gone
            if gone or age >= seconds:
                what = "is gone" if gone else f"has sent no heartbeat for {age:.0f} s"
                who = f"process {rank} (pid {peer.get('pid')} on {peer.get('host')})"
                dead.append(f"{who} {what}; last seen {peer.get('phase')}, {age:.0f} s before")
        if not dead:
            return None
        dead.append(f"process {self.rank} was {self.stop.phase}")
        return PeerLostError("; ".join(dead), one_is_gone)

    def _file(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.alive"

    def _beat(self) -> None:
        beat = {"phase": self.stop.phase, "pid": os.getpid(), "host": socket.gethostname(), "machine": host_id()}
        with contextlib.suppress(OSError):  # a file system that does not answer for once ends nothing
            self._file(self.rank).write_text(json.dumps(beat) + "\n", encoding="utf-8")

    def _watch(self) -> None:
        while not self._over.wait(self.seconds):
            self._beat()
            # When all were suspended together, the others get the time to send a heartbeat, too.
            if self.find_dead_peers(self.timeout) and not self._over.wait(self.seconds):
                if dead := self.find_dead_peers(self.timeout):
                    self.abort(dead, False)


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


def write_stacks(file: Path) -> None:
    """Write what every thread of this process is doing, on the console and to a file."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        faulthandler.dump_traceback(all_threads=True)
    with contextlib.suppress(OSError), open(file, "w", encoding="utf-8") as opened:
        faulthandler.dump_traceback(opened, all_threads=True)
