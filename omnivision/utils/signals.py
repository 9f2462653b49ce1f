"""Being asked to stop: the signals, and the end of the time that a job has. A run then ends its step, saves, and leaves.

SIGTERM ends a run (a scheduler that cancels or preempts, `kill`), and so does SIGHUP (a terminal that is gone) unless nohup has
it ignored; SIGUSR2 announces an end (SLURM before the time limit). They are only noted while a run is `patient`, because it
looks after every step; at other times they end it where it stands.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from omnivision.utils.errors import StopRequested

SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR2)
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    SIGNALS = (*SIGNALS, signal.SIGHUP)
TIME_LIMIT = "time limit"
UNKNOWN_SAVE_SECONDS = 30.0
LEAVE_SECONDS = 10.0
# One request may come in two signals: SLURM's to all processes, and the launcher's that hands it on.
SECONDS_OF_ONE_REQUEST = 1.0


class StopSignal:
    """Whether this process was asked to stop, by what, and when its job ends anyway.

    A run notes how long its steps and its saving take, and leaves before the deadline, early enough to end in order.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        self.deadline: float | None = None  # seconds since the epoch
        self._half = 0.0  # of the time there was when the deadline became known
        self.step_seconds = 0.0
        self.save_seconds: float | None = None  # until something was saved
        self.saved_step: int | None = None  # of the newest checkpoint
        self.doing, self.step = (
            "starting",
            0,
        )  # what the main thread is in, for those who ask when it does not come back
        self._late = self._hears = self._patient = self._told = False
        self._first_term = 0.0

    @property
    def cause(self) -> str | None:
        """By what: "SIGTERM", "SIGUSR2" (also when SIGTERM followed), "time limit"; None if it was not."""
        if self.signals:
            return signal.Signals(self.signals[0]).name
        if self.deadline is not None and time.time() + self.needed >= self.deadline:
            self._late = True
        return TIME_LIMIT if self._late else None

    @property
    def needed(self) -> float:
        """Seconds to finish a step and to save, with room for both to take twice as long, and for leaving; at most half of
        what there was, so that a run whose saving was not measured yet does something at all.
        """
        return min(self.time_to_leave, self._half)

    @property
    def time_to_leave(self) -> float:
        """Seconds that it takes to end the step, to save and to leave, generously."""
        return seconds_to_leave(self.step_seconds, self.save_seconds)

    def end_at(self, deadline: float | None) -> None:
        """The job ends at this time, in seconds since the epoch (None: never)."""
        self.deadline = deadline
        self._half = 0.0 if deadline is None else (deadline - time.time()) / 2

    def timings(self) -> dict[str, float]:
        """What the slowest of the last steps and the last saving took, as far as they are known."""
        found = {"step_seconds": self.step_seconds or None, "save_seconds": self.save_seconds}
        return {name: round(seconds, 3) for name, seconds in found.items() if seconds is not None}

    def describe_saved(self) -> str:
        """Up to where the run is saved, and how to continue."""
        if self.saved_step is None:
            return "nothing is saved yet, and the same command starts over"
        return f"step {self.saved_step} is saved, and the same command continues from there"

    def set_phase(self, doing: str, step: int) -> None:
        """Note what the run does from here on, and how many steps are done."""
        self.doing, self.step = doing, step

    def update_step_time(self, seconds: float) -> None:
        """What a step took; the slowest counts, and is forgotten by and by."""
        self.step_seconds = max(seconds, 0.99 * self.step_seconds)

    @contextlib.contextmanager
    def handle_signals(self, ignore_after: bool = False) -> Iterator[None]:
        """Receive the signals inside this block, and only note them until `raise_if_requested` is called.

        Afterwards the earlier handlers are back, or with `ignore_after` the signals are ignored, so that a process that is
        about to exit keeps its exit code. Works in the main thread alone; elsewhere nothing is changed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if ignore_after else handler)

    def raise_if_requested(self) -> None:
        """From now on a signal raises StopRequested, as one does here that has come before: call it where that is caught."""
        self._hears = True
        if self.signals and not self._told:
            self._told = True
            raise StopRequested(signal.Signals(self.signals[0]).name)

    def defer(self) -> None:
        """From now on a signal is only noted, since whoever calls this looks at `cause` often, and ends something afterwards. A
        second SIGTERM still leaves at once. Raises StopRequested when a signal has come already.
        """
        if self.cause is not None:
            raise StopRequested(self.cause)
        self._patient = True

    def _receive(self, number: int, frame: Any) -> None:
        again = signal.SIGTERM in self.signals and time.monotonic() - self._first_term > SECONDS_OF_ONE_REQUEST
        if number == signal.SIGTERM and signal.SIGTERM not in self.signals:
            self._first_term = time.monotonic()
        self.signals.append(number)
        if self._hears and not self._told and (not self._patient or (again and number == signal.SIGTERM)):
            self._told = True  # what the process does about it is not to be interrupted by another one
            raise StopRequested(signal.Signals(self.signals[0]).name)


def seconds_to_leave(step_seconds: float, save_seconds: float | None) -> float:
    """How long before its end a run should be told to leave."""
    return 2 * (step_seconds + (UNKNOWN_SAVE_SECONDS if save_seconds is None else save_seconds)) + LEAVE_SECONDS


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Dist started inside this block never hear requests to stop, nor do theirs; this one hears them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, *SIGNALS))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_workers() -> None:
    """End this process's data workers: they hear no request to stop, and one that hangs would be waited for without end."""
    for worker in multiprocessing.active_children():
        worker.kill()


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Inside this block neither Ctrl-C nor a request to stop interrupts: a run that is ending already writes down why.

    Ctrl-C reaches all processes of a terminal, and SLURM's signals all of a job; the launcher then sends one more. What is
    started inside this block does not hear them either.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *SIGNALS)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
