"""Stop requests: signals, and the end of a job's time.

SIGTERM (a scheduler, or `kill`) and SIGHUP (a closed terminal, unless nohup ignores it) stop a run. SLURM sends SIGUSR2 before
the time limit. While training, a run finishes its step, saves and exits; at other times it exits at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from omnivision.utils.errors import StopRequested

STOP_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR2)
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    STOP_SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)
TIME_LIMIT = "time limit"
UNKNOWN_SAVE_SECONDS = 30.0
EXIT_SECONDS = 10.0
# SLURM and the launcher may both send a signal.
SIGNAL_DEBOUNCE_SECONDS = 1.0


class StopSignal:
    """A stop request: signal or deadline.

    A run records how long its steps and saves take, and exits early enough before the deadline.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        self.deadline: float | None = None  # seconds since the epoch
        self.step_seconds = 0.0
        self.save_seconds: float | None = None  # None before the first save
        self.saved_step: int | None = None  # the newest checkpoint's step
        self.phase = "starting"  # what the main thread is doing, to report a hang
        self._max_reserved = 0.0
        self._past_deadline = False
        self._on_signal: Literal["startup", "raise", "record", "ignore"] = "startup"
        self._first_term = 0.0

    @property
    def cause(self) -> str | None:
        """What requested the stop: "SIGTERM", "SIGUSR2" (even if SIGTERM followed), "time limit"; None without a request.

        Once it has been "time limit", it stays so, even if `reserved_seconds` shrinks.
        """
        if self.signals:
            return signal.Signals(self.signals[0]).name
        if self.deadline is not None and time.time() + self.reserved_seconds >= self.deadline:
            self._past_deadline = True
        return TIME_LIMIT if self._past_deadline else None

    @property
    def reserved_seconds(self) -> float:
        """Seconds reserved for the exit: at most half of the time until the deadline, so that a short job also trains."""
        return min(seconds_to_exit(self.step_seconds, self.save_seconds), self._max_reserved)

    def set_deadline(self, deadline: float | None) -> None:
        """Set when the job ends, in seconds since the epoch (None: never)."""
        self.deadline = deadline
        self._max_reserved = 0.0 if deadline is None else (deadline - time.time()) / 2

    def timings(self) -> dict[str, float]:
        """Return how long the slowest recent step and the last save took, if known."""
        timings = {"step_seconds": self.step_seconds or None, "save_seconds": self.save_seconds}
        return {name: round(seconds, 3) for name, seconds in timings.items() if seconds is not None}

    def describe_saved(self) -> str:
        """Return which step is saved, and how to continue."""
        if self.saved_step is None:
            return "nothing is saved yet; the same command starts over"
        return f"the last saved step is {self.saved_step}; the same command resumes from there"

    def set_phase(self, doing: str, step: int) -> None:
        """Record what the run is doing now, and how many steps are done."""
        self.phase = f"{doing}, after step {step}"

    def update_step_time(self, seconds: float) -> None:
        """Track step time as a decaying maximum."""
        self.step_seconds = max(seconds, 0.99 * self.step_seconds)

    @contextlib.contextmanager
    def handle_signals(self, ignore_after: bool = False) -> Iterator[None]:
        """Record signals; raise only after `raise_on_signal`. Does nothing outside of the main thread.

        Afterwards the earlier handlers are restored or, with `ignore_after`, signals are ignored, so that a process that is
        about to exit keeps its exit code.
        """
        with _handlers(self._receive, STOP_SIGNALS, signal.SIG_IGN if ignore_after else None):
            yield

    @contextlib.contextmanager
    def raise_signals(self) -> Iterator[None]:
        """Let the first signal inside this block raise StopRequested."""
        with self.handle_signals():
            self.raise_on_signal()
            yield

    def raise_on_signal(self) -> None:
        """Let the next signal raise StopRequested, once; one that was recorded raises now."""
        if self._on_signal == "startup":
            self._on_signal = "raise"
            if self.signals:
                self._stop()

    def record_only(self) -> None:
        """Only record signals (the caller polls `cause`); a second SIGTERM still raises.

        Raises StopRequested if a signal has already arrived.
        """
        if self.cause is not None:
            raise StopRequested(self.cause)
        self._on_signal = "record"

    def _receive(self, number: int, frame: Any) -> None:
        again = signal.SIGTERM in self.signals and time.monotonic() - self._first_term > SIGNAL_DEBOUNCE_SECONDS
        second_term = again and number == signal.SIGTERM
        if number == signal.SIGTERM and signal.SIGTERM not in self.signals:
            self._first_term = time.monotonic()
        self.signals.append(number)
        if self._on_signal == "raise" or (self._on_signal == "record" and second_term):
            self._stop()

    def _stop(self) -> None:
        self._on_signal = "ignore"  # another signal must not interrupt the exit
        raise StopRequested(signal.Signals(self.signals[0]).name)


def seconds_to_exit(step_seconds: float, save_seconds: float | None) -> float:
    """Return how long a run needs to finish its step, save and exit; both may take twice as long as measured."""
    return 2 * (step_seconds + (UNKNOWN_SAVE_SECONDS if save_seconds is None else save_seconds)) + EXIT_SECONDS


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGINT and stop signals inside this block; processes started in it, and their children, inherit the mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, *STOP_SIGNALS))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_data_workers() -> None:
    """Kill this process's data workers: they block stop signals, and Python would wait forever for one that hangs."""
    for worker in multiprocessing.active_children():
        worker.kill()


def exit_with_parent(pid: int) -> None:
    """Exit this process as soon as process `pid` ends (Linux only)."""
    if not hasattr(os, "pidfd_open"):
        return
    try:
        other = os.pidfd_open(pid)  # readable once that process has ended
    except ProcessLookupError:  # it ended while this one started
        os._exit(1)

    def watch() -> None:
        select.select([other], [], [])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="exit-with-parent").start()


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignore stop signals and Ctrl-C while writing the exit reason; processes started in this block inherit this.

    Ctrl-C reaches all processes of a terminal, and SLURM's signals all processes of a job; then the launcher forwards it again.
    """
    with _handlers(signal.SIG_IGN, (signal.SIGINT, *STOP_SIGNALS)):
        yield


@contextlib.contextmanager
def _handlers(handler: Any, numbers: Sequence[signal.Signals], after: Any = None) -> Iterator[None]:
    """Set `handler` for signals inside this block, and `after` (None: the earlier handlers) afterwards.

    Does nothing outside of the main thread, the only one that may set handlers.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers} if in_main_thread else {}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier if after is None else after)
