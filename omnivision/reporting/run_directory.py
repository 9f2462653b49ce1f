"""The run directory: paths, lock and `summary.json`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omnivision.utils.errors import UserError
from omnivision.utils.host import host_id, process_start, slurm_job_id, slurm_restart_count
from omnivision.utils.io import write_atomically, write_json

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0  # a lock without a heartbeat for this long is stale
LAST_LINES = 20
QUEUED_STATUSES = ("queued", "requeued")  # statuses of a run whose job is in the queue
SUMMARY_TYPES = {"status": str, "job": dict, "run": dict, "last": dict, "evaluation": dict, "epochs": int}


class RunDir:
    """Paths of a run, its lock and its summary."""

    def __init__(self, path: str | Path, checkpoints: str | Path | None = None) -> None:
        self.path = Path(path)
        self.logs, self.pictures = self.path / "logs", self.path / "pictures"
        self.tensorboard, self.predictions = self.path / "tensorboard", self.path / "predictions"
        self.checkpoints = Path(checkpoints) if checkpoints else self.path / "checkpoints"
        self._lock = self.path / ".lock"
        self._token = secrets.token_hex(8)
        self._released = threading.Event()
        self._held = False

    def create(self, *more: str) -> None:
        """Create the directory, its subdirectories, and those named in `more`. Raises UserError if one cannot be written."""
        folders = [self.path, self.logs, self.checkpoints, self.tensorboard, self.pictures, self.predictions]
        try:
            for folder in [*folders, *(self.path / name for name in more)]:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            for name in ("summary.json", "config.yaml"):
                if (file := self.path / name).is_dir():
                    raise UserError(f"{file.absolute()} must be a file, got a folder. Remove it.")
        except OSError as error:
            raise UserError(
                f"The run directory {self.path.absolute()} cannot be written: {error.strerror} ({error.filename}). Set "
                "launcher.experiment_log_dir (or trainer.checkpoint.save_dir) to a writable directory."
            ) from None

    def claim_checkpoint_dir(self) -> None:
        """Claim a checkpoint directory outside of the run directory. Raises UserError when it belongs to another run."""
        here, claim = self.path.resolve(), self.checkpoints / ".run"
        if self.checkpoints.resolve().is_relative_to(here):
            return
        owner = claim.read_text(encoding="utf-8").strip() if claim.is_file() else str(here)
        if owner != str(here):
            raise UserError(
                f"The checkpoints in {self.checkpoints.absolute()} belong to the run in {owner}, not to {here}. Set "
                "trainer.checkpoint.save_dir to a directory for only this run (in a sweep, with the swept values in its name). "
                f"If the run directory was moved, remove {claim}."
            )
        write_atomically(claim, f"{here}\n")

    # ---- lock -----------------------------------------------------------------------------------------------------

    def holder(self) -> dict[str, Any]:
        """Return the host, pid and job of the process that wrote the lock; empty without a readable lock."""
        try:
            claim = json.loads(self._lock.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return claim if isinstance(claim, dict) and isinstance(claim.get("pid"), int) else {}

    def holder_message(self) -> str | None:
        """Return a sentence about the live process that holds the lock, or None."""
        holder, age = self.holder(), self._heartbeat_age()
        if not holder or not self._is_alive(holder, age):
            return None
        who = _process_name(holder)
        return f"The run directory {self.path.absolute()} is in use by {who} (last heartbeat {age:.0f} s ago)."

    def require_free(self) -> None:
        """Raise UserError while another live process holds this directory."""
        if problem := self.holder_message():
            raise UserError(f"{problem} Stop that run, or set another launcher.experiment_log_dir.")

    def lock(self, timeout: float = 0.0) -> str | None:
        """Acquire the lock and start the heartbeat; return a line about a stale lock that was taken over.

        Waits up to `timeout` seconds for another holder to exit or become stale, and raises UserError if it does not.
        """
        deadline = time.monotonic() + timeout
        while not self._held:
            with file_lock(self.path / ".lock.guard"):
                if time.monotonic() >= deadline:
                    self.require_free()
                waiting = self.holder_message()
                holder = self.holder()
                stale = self._lock.exists()
                if waiting is None:
                    write_atomically(self._lock, json.dumps(self._claim()))
                    self._held = True
            if waiting:
                print(f"Waiting: {waiting}", flush=True)
                time.sleep(min(5.0, timeout / 4))
        self._released.clear()
        threading.Thread(target=self._beat, daemon=True, name="run-directory-heartbeat").start()
        if not stale:
            return None
        return f"Took over the lock of {_process_name(holder)}, which has exited or has no heartbeat."

    def unlock(self) -> None:
        self._released.set()
        if not self.lock_lost():
            self._held = False
            self._lock.unlink(missing_ok=True)

    def lock_lost(self) -> bool:
        """Return whether another process has taken over the lock of this one."""
        return self._held and self.holder().get("token") != self._token

    def require_lock(self) -> None:
        """Raise UserError when another process has taken over the lock, so that its files are not overwritten."""
        if self.lock_lost():
            raise UserError(
                f"The run directory {self.path.absolute()} was taken over by {_process_name(self.holder())}, because this "
                "process had no heartbeat (was it suspended, or did the file system hang?). This process stops."
            )

    def _claim(self) -> dict[str, Any]:
        pid = os.getpid()
        claim = {"token": self._token, "host": socket.gethostname(), "machine": host_id(), "pid": pid}
        return claim | {"started": process_start(pid), "job": slurm_job_id(), "restarts": slurm_restart_count()}

    def _heartbeat_age(self) -> float:
        """Return the age of the lock's heartbeat in seconds; 0 in a read-only directory, where it cannot be measured.

        Uses the file system's clock, since host clocks differ.
        """
        try:
            with tempfile.NamedTemporaryFile(dir=self.path, prefix=".clock.", suffix=".tmp") as probe:
                return os.stat(probe.name).st_mtime - self._lock.stat().st_mtime
        except OSError:
            return 0.0

    @staticmethod
    def _is_alive(holder: dict[str, Any], age: float) -> bool:
        job = slurm_job_id()
        if job is not None and holder.get("job") == job and holder.get("restarts", 0) < slurm_restart_count():
            return False  # SLURM restarts a job only when its processes, or their node, are gone
        if holder.get("machine") == host_id():
            return process_start(holder["pid"]) == holder.get("started") is not None
        return age < STALE_SECONDS

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            # A single file system error must not end the heartbeat; `require_lock` decides.
            with contextlib.suppress(OSError):
                if self.holder().get("token") == self._token:
                    os.utime(self._lock)

    # ---- summary --------------------------------------------------------------------------------------------------

    def read_summary(self) -> dict[str, Any]:
        """Return `summary.json`; empty if it cannot be read, or was not written by a run."""
        try:
            return self._load_summary()
        except OSError:
            return {}

    def _load_summary(self) -> dict[str, Any]:
        """Raise OSError when the file exists and cannot be read."""
        try:
            summary = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):  # the next write replaces it
            return {}
        fits = isinstance(summary, dict) and all(
            isinstance(summary.get(name), (kind, type(None))) for name, kind in SUMMARY_TYPES.items()
        )
        return summary if fits else {}

    def job_id(self) -> str | None:
        """Return the id of the SLURM job that the summary is about."""
        job_id = (self.read_summary().get("job") or {}).get("job_id")
        return None if job_id is None else str(job_id)

    def write_summary(self, **facts: Any) -> None:
        """Update entries of `summary.json`; non-finite numbers become null. A process that lost the lock writes nothing.

        Raises OSError when the file cannot be read: its other entries would be lost.
        """
        if not self.lock_lost():
            self.replace_summary(self._load_summary() | facts)

    def replace_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`; remove it if it is empty."""
        if summary:
            write_json(self.path / "summary.json", summary)
        else:
            (self.path / "summary.json").unlink(missing_ok=True)

    def write_exit(self, status: str, reason: str) -> None:
        """Write how a run ended, why, and the last lines of rank 0's log."""
        self.write_summary(status=status, exit_reason=reason, last_lines=self.last_lines())

    def last_lines(self) -> list[str]:
        """Return the last lines of rank 0's log."""
        try:
            with open(self.logs / "rank_0.log", encoding="utf-8", errors="replace") as file:
                return [line.rstrip("\n") for line in deque(file, LAST_LINES)]
        except FileNotFoundError:
            return []

    def record_unreported_exit(self, reason: str, *, interrupted: bool, killed: bool) -> None:
        """Record the end of a run that could not do so itself, unless another run is alive in this directory.

        `killed`: `reason` names a killed rank; the other ranks know only that it is gone.
        """
        if not self.path.is_dir():
            return  # killed before it created the directory
        with file_lock(self.path / ".lock.guard"):
            if self.holder_message():
                return
            summary = self.read_summary()
            if summary.get("status") == "running":
                self.write_exit("interrupted" if interrupted else "failed", reason)
            elif summary.get("status") == "failed" and killed:
                self.write_summary(exit_reason=f"{reason}; {summary.get('exit_reason')}")


@contextlib.contextmanager
def file_lock(guard: Path) -> Iterator[None]:
    """Hold an exclusive `flock` on a file; the kernel releases a dead process's lock.

    File systems without locks let two processes in; `RunDir.require_lock` then keeps one from overwriting the other's files.
    """
    with open(guard, "w", encoding="utf-8") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _process_name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}" if holder else "an unknown process"
