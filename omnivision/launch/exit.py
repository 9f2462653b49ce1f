"""How a rank ends: its messages, its end file, `summary.json`, and its exit code."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from omnivision.config.schema import Settings
from omnivision.launch.watchdog import GRACE_SECONDS, PeerMonitor, Watchdog, as_peer_lost, write_stacks
from omnivision.reporting.run_directory import QUEUED_STATUSES, RunDir
from omnivision.utils.errors import (
    EXIT_FAULT,
    EXIT_SIGINT,
    PeerLostError,
    StopRequested,
    UserError,
    causes,
    is_out_of_memory,
    oom_message,
)
from omnivision.utils.host import slurm_job_id, slurm_restart_count
from omnivision.utils.io import write_atomically
from omnivision.utils.signals import StopSignal, kill_data_workers, signals_ignored

if TYPE_CHECKING:
    from omnivision.launch.slurm_jobs import JobLog

END_FILE_SECONDS = 2.0  # how long to wait for another rank's end file
# Ctrl-C reaches all ranks; one may lose its connection to another before it is interrupted itself.
CTRL_C_SECONDS = 0.5
LOG = logging.getLogger("omnivision")
OOM_ADVICE = (
    "Raise trainer.optim.accumulation_steps (the same batch in smaller micro-batches), set "
    "trainer.model.trunk.activation_checkpointing=true, or lower batch_size; num_workers and trainer.data.prefetch use host "
    "memory. The same command resumes from the last checkpoint."
)


# ---- end files ----------------------------------------------------------------------------------------------------


def write_end_file(run_dir: RunDir, rank: int, error: BaseException, reason: str) -> None:
    """Write how this rank ended to its own file, because several machines cannot append to one file over NFS."""
    match error:
        case StopRequested() | KeyboardInterrupt() | UserError(on_all_ranks=True):
            kind = "stopped"
        case PeerLostError():  # SLURM reports what killed a vanished peer
            kind = "disconnected" if error.gone else "peer silent"
        case _:
            kind = "failed"
    end = {"rank": rank, "pid": os.getpid(), "kind": kind, "reason": reason}
    end |= {"job": slurm_job_id(), "restarts": slurm_restart_count()}
    with contextlib.suppress(OSError):
        write_atomically(run_dir.logs / f"rank_{rank}_end.json", json.dumps(end) + "\n")


def read_end_files(run_dir: RunDir) -> list[dict[str, Any]]:
    """Return the end files of this attempt of the job or, without SLURM, those written since the run directory was locked."""
    ends = []
    for file in sorted(run_dir.logs.glob("rank_*_end.json")):
        with contextlib.suppress(OSError, ValueError):
            ends.append(json.loads(file.read_text(encoding="utf-8")))
    return [end for end in ends if (end["job"], end["restarts"]) == (slurm_job_id(), slurm_restart_count())]


def first_failure(
    run_dir: RunDir, own_rank: int | None = None, seconds: float = 0.0, pids: Collection[int] | None = None
) -> str | None:
    """Return why another rank failed on its own in this attempt, or None; wait up to `seconds` for its end file.

    Only end files of the processes in `pids` count (None: all).
    """
    deadline = time.monotonic() + seconds
    while True:
        for end in read_end_files(run_dir):
            if end["kind"] == "failed" and end["rank"] != own_rank and (pids is None or end["pid"] in pids):
                return f"rank {end['rank']} failed: {end['reason']}"
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.1)


# ---- how a process ends -------------------------------------------------------------------------------------------


class ExitHandler:
    """Surrounds a rank's work: handles signals, watches for hangs, and reports how it ends."""

    def __init__(
        self, run_dir: RunDir, rank: int, settings: Settings, job_log: JobLog | None, world_size: int = 1
    ) -> None:
        self.run_dir = run_dir
        self.rank = rank
        self.job_log = job_log
        self.writes_end_file = world_size > 1 or job_log is not None  # other ranks or the batch script read it
        self.validating = settings.trainer.mode == "val"
        self.stop = StopSignal()
        self.exit_code = 0
        self.locked = False  # this process has locked the run directory
        self.owns_summary = False  # the summary describes this process's training
        self.peers: PeerMonitor | None = None
        self._watchdog = Watchdog(self.stop, self.abort, max(GRACE_SECONDS, settings.submitit.signal_delay_s or 0))
        self._ending = threading.Lock()

    @contextlib.contextmanager
    def supervise(self) -> Iterator[None]:
        """Turn exceptions in this block into an exit code, and unlock the run directory afterwards."""
        with self.stop.handle_signals(ignore_after=self.job_log is not None), self._watchdog.watching():
            try:
                self.stop.raise_on_signal()
                try:
                    yield
                except RuntimeError:
                    if self.peers is not None:
                        time.sleep(CTRL_C_SECONDS)
                    raise
            except (Exception, KeyboardInterrupt, StopRequested) as error:
                with signals_ignored():
                    cause = unwrap_keyboard_interrupt(error)
                    if isinstance(cause, KeyboardInterrupt):
                        cause.add_note(self.stop.describe_saved())
                    self.exit_code = self.handle(cause)
            finally:
                with signals_ignored():
                    kill_data_workers()
                    self.unlock()

    def start_peers(self) -> None:
        """Watch the other ranks."""
        if self.peers is not None:
            self.peers.start()

    def handle(self, error: BaseException) -> int:
        """Report, in the main thread, why the process ends; return the exit code."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # a watchdog thread is about to end this process
        error = as_peer_lost(error, self.peers)
        if self.peers is not None:
            self.peers.end()
        may_write = self._may_write_summary()
        return report_exit(error, self.run_dir, may_write, self.rank, self.job_log, self.writes_end_file)

    def abort(self, error: BaseException) -> None:
        """Write all stacks and exit from a watchdog thread, whatever the main thread is doing."""
        if not self._ending.acquire(blocking=False):
            return  # already exiting
        code = exit_code_and_reason(error)[0]
        try:
            stacks = self.run_dir.logs / f"rank_{self.rank}_stacks.txt"
            write_stacks(stacks)
            error.add_note(f"thread stacks are in {stacks}")
            # Rank 0 reports; if rank 0 is silent, the rank that noticed it does.
            reports = not self.validating and (self.locked or isinstance(error, PeerLostError))
            code = report_exit(error, self.run_dir, reports, self.rank, self.job_log, self.writes_end_file)
            self.unlock()
        except BaseException:  # e.g. because a file system does not answer
            traceback.print_exc()
        finally:
            os._exit(code)

    def unlock(self) -> None:
        if self.locked:
            self.run_dir.unlock()

    def _may_write_summary(self) -> bool:
        """Return whether this process may write its exit into the summary.

        An earlier run's status is kept until training begins, and during an evaluation.
        """
        if self.locked and self.run_dir.read_summary().get("status") in (None, *QUEUED_STATUSES):
            return True
        if self.validating:
            return False
        if self.owns_summary:
            return True
        if self.job_log is None:
            return False
        return self.rank == 0 and (self.locked or self.job_log.owns_summary())


def report_exit(
    error: BaseException,
    run_dir: RunDir,
    writes_summary: bool,
    rank: int,
    job_log: JobLog | None = None,
    end_file: bool = True,
) -> int:
    """Report why a process ends: on the console, in its log, in its end file and, with `writes_summary`, in `summary.json`.

    Returns the exit code. Ranks other than 0 of a SLURM job return 0 after a stop or a lost peer: a failing task makes SLURM
    end all tasks, and rank 0 may be requeueing.
    """
    code, reason = exit_code_and_reason(error)
    stopped, lost = isinstance(error, (KeyboardInterrupt, StopRequested)), isinstance(error, PeerLostError)
    is_fault = code == EXIT_FAULT and not isinstance(error, UserError)
    LOG.log(logging.WARNING if stopped else logging.ERROR, reason, exc_info=error if is_fault else None)
    if rank == 0 or is_fault or (isinstance(error, UserError) and not error.on_all_ranks):
        if stopped:
            saved = isinstance(error, StopRequested) and error.saved_step is not None
            advice = "; the same command resumes from there" if saved else ""
            print(f"{reason}{advice}", file=sys.stderr, flush=True)
        elif lost:
            print_error(f"{reason}. The same command resumes from the last checkpoint.")
        else:
            print_error(error if is_fault else reason)
    if end_file:
        write_end_file(run_dir, rank, error, reason)
    try:
        if job_log is not None and rank == 0:
            job_log.apply_exit(job_log.classify_exit(error, reason), writes_summary)
        elif job_log is None and writes_summary:
            cause = (
                first_failure(run_dir, rank, END_FILE_SECONDS if lost else 0.0)
                if lost or isinstance(error, StopRequested)
                else None
            )
            status = "failed" if cause or isinstance(error, Exception) else "interrupted"
            run_dir.write_exit(status, cause or reason)
    except OSError as failure:  # a full disk must not change the exit code
        print(f"error: the reason could not be written to the run directory: {failure}", file=sys.stderr)
    peer_is_gone = isinstance(error, PeerLostError) and error.gone  # a silent rank 0 cannot requeue
    if job_log is not None and rank > 0 and (stopped or peer_is_gone):
        return 0
    return code


def unwrap_keyboard_interrupt(error: BaseException) -> BaseException:
    """Return the KeyboardInterrupt that caused a library's exception, else the exception itself."""
    return next((cause for cause in causes(error) if isinstance(cause, KeyboardInterrupt)), error)


def exit_code_and_reason(error: BaseException) -> tuple[int, str]:
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
    match error:
        case UserError():
            return error.exit_code, str(error)
        case KeyboardInterrupt():
            return EXIT_SIGINT, f"interrupted from the keyboard{notes}"
        case StopRequested():
            saved = "" if error.saved_step is None else f"; step {error.saved_step} is saved"
            return error.exit_code, f"ended by {error.cause}{saved}{notes}"
        case PeerLostError():
            return EXIT_FAULT, f"{error}{notes}"
    if is_out_of_memory(error):
        return EXIT_FAULT, f"{oom_message(error, OOM_ADVICE)}{notes}"
    return EXIT_FAULT, f"{type(error).__name__}: {error}{notes}"


def print_error(problem: BaseException | str) -> None:
    """Print one paragraph for a user error or an out-of-memory error, else a traceback (always with OMNIVISION_TRACEBACK=1)."""
    if isinstance(problem, BaseException) and is_out_of_memory(problem):
        problem = exit_code_and_reason(problem)[1]
    if isinstance(problem, str):
        print(f"error: {problem}", file=sys.stderr, flush=True)
        if os.environ.get("OMNIVISION_TRACEBACK") == "1":
            traceback.print_exc()
    else:
        traceback.print_exception(problem)
