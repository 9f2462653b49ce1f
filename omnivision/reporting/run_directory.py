"""The run directory: its paths, its lock, its `summary.json`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omnivision.utils.errors import UserError
from omnivision.utils.host import host_id, process_start
from omnivision.utils.io import write_atomically

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
LAST_LINES = 20
FILES = (
    *("summary.json", "config.yaml", ".lock", ".lock.guard"),
    *(
        f"logs/{name}"
        for name in ("metrics.jsonl", "bad_samples.jsonl", "nonfinite.jsonl", "pretrained.json", "rank_0.log")
    ),
)
# Statuses of a run that is in the queue of a cluster.
WAITING = ("queued", "requeued")


def own_job() -> str | None:
    """ID of this process's SLURM job (12, or 12_3 in an array); None outside of SLURM."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def own_restarts() -> int:
    """How often SLURM has restarted that job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


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
        """Create the directory and its subdirectories, and `more` of them.

        Raises UserError when one cannot be written, or when a path that a run writes exists and is not a file.
        """
        for name in FILES:
            if (self.path / name).exists() and not (self.path / name).is_file():
                raise UserError(
                    f"{(self.path / name).absolute()} must be a file, because a run writes it. Remove it, or set "
                    "launcher.experiment_log_dir to another directory."
                )
        try:
            made = (self.path, self.logs, self.checkpoints, self.tensorboard, self.pictures, self.predictions)
            for folder in (*made, *(self.path / name for name in more)):
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".writable.{os.getpid()}"
                probe.touch()
                probe.unlink()
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
                "trainer.checkpoint.save_dir to a directory of this run alone (in a sweep, with the swept values in its name). "
                f"If the run directory was moved, remove {claim}."
            )
        write_atomically(claim, f"{here}\n")

    def require_free(self) -> None:
        """Raises UserError while another live process holds this folder."""
        holder, age = self._holder()
        if holder is not None and self._alive(holder, age):
            raise UserError(
                f"The run directory {self.path.absolute()} is in use by process {holder.get('pid')} on {holder.get('host')} "
                f"(last heartbeat {age:.0f} s ago). Stop that run, or set another launcher.experiment_log_dir."
            )

    def holder(self) -> dict[str, Any] | None:
        """Host, pid and job of the process that holds the lock; None when none does."""
        return self._holder()[0]

    def is_held(self) -> bool:
        """Return whether a live process holds the lock."""
        holder, age = self._holder()
        return holder is not None and self._alive(holder, age)

    def lock(self, patience: float = 0.0) -> str | None:
        """Become the run's only writer and start the heartbeat. Returns a line about a stale lock that was taken over.

        Waits up to `patience` seconds for another holder to exit or to become stale.
        """
        deadline = time.monotonic() + patience
        while not self._held:
            with file_lock(self.path / ".lock.guard"):
                holder, age = self._holder()
                try:
                    self.require_free()
                except UserError as error:
                    if time.monotonic() >= deadline:
                        raise
                    waiting = str(error)
                else:
                    stale = self._lock.exists()
                    write_atomically(self._lock, self._claim())
                    self._held = True
            if not self._held:
                print(f"Waiting: {waiting}", flush=True)
                time.sleep(min(5.0, patience / 4))
        threading.Thread(target=self._beat, daemon=True, name="run-folder-heartbeat").start()
        who = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "an unknown process"
        return f"Took over the lock of {who}, which has exited or had no heartbeat for {age:.0f} s." if stale else None

    def unlock(self) -> None:
        self._released.set()
        if not self.lost():
            self._held = False
            self._lock.unlink(missing_ok=True)

    def lost(self) -> bool:
        """Whether another process has taken over the lock of this one."""
        return self._held and (_read_claim(self._lock) or {}).get("token") != self._token

    def require_lock(self) -> None:
        """Raises UserError when another process has taken over the lock, so that nothing of it is overwritten."""
        if self.lost():
            holder = self.holder()
            who = "Another process" if holder is None else f"Process {holder.get('pid')} on {holder.get('host')}"
            raise UserError(
                f"{who} has taken over the run directory {self.path.absolute()}, because this process had no heartbeat (was it "
                "suspended, or did the file system hang?). This process stops."
            )

    def write_summary(self, **facts: Any) -> None:
        """Update entries of `summary.json`; non-finite numbers become null. A process that lost the lock writes nothing."""
        if not self.lost():
            self.replace_summary(self.read_summary() | facts)

    def replace_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`; remove it if it is empty."""
        if summary:
            write_atomically(self.path / "summary.json", json.dumps(finite(summary), indent=1, allow_nan=False) + "\n")
        else:
            (self.path / "summary.json").unlink(missing_ok=True)

    def write_end(self, status: str, reason: str) -> None:
        """Write how a run ended, why, and the last lines of rank 0's log."""
        self.write_summary(status=status, exit_reason=reason, last_lines=self.last_lines())

    def last_lines(self) -> list[str]:
        """The last lines of rank 0's log."""
        try:
            with open(self.logs / "rank_0.log", encoding="utf-8", errors="replace") as file:
                return [line.rstrip("\n") for line in deque(file, LAST_LINES)]
        except FileNotFoundError:
            return []

    def read_summary(self) -> dict[str, Any]:
        try:
            return sanitize(dict(json.loads((self.path / "summary.json").read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError, RecursionError):  # the next one to write replaces what is no summary
            return {}

    def note_silent_end(self, reason: str, interrupted: bool) -> None:
        """Write how a killed run ended, unless another run is alive in this directory."""
        if not self.path.is_dir():
            return  # it was killed before there was a run to tell of
        with file_lock(self.path / ".lock.guard"):
            holder, age = self._holder()
            running = holder is not None and self._alive(holder, age)
            summary = self.read_summary()
            if running:
                return
            if summary.get("status") == "running":
                self.write_end("interrupted" if interrupted else "failed", reason)
            elif summary.get("status") == "failed" and "killed" in reason:  # the others saw only that it is gone
                self.write_summary(exit_reason=f"{reason}; {summary.get('exit_reason')}")

    def _claim(self) -> str:
        return json.dumps(
            {
                "token": self._token,
                "host": socket.gethostname(),
                "machine": host_id(),
                "pid": os.getpid(),
                "started": process_start(os.getpid()),
                "job": own_job(),
                "restarts": own_restarts(),
            }
        )

    def _holder(self) -> tuple[dict[str, Any] | None, float]:
        """The holder of the lock (None: no readable lock) and the age of its heartbeat in seconds."""
        try:
            age = self._file_system_time() - self._lock.stat().st_mtime
        except FileNotFoundError:
            return None, STALE_SECONDS
        return _read_claim(self._lock), age

    def _file_system_time(self) -> float:
        """Now by the clock that stamps the heartbeats, the file server's; clocks of machines may differ."""
        probe = self.path / f".clock.{os.getpid()}"
        try:
            probe.touch()
            now = probe.stat().st_mtime
            probe.unlink()
        except OSError:  # a directory that may only be read
            return time.time()
        return now

    @staticmethod
    def _alive(holder: dict[str, Any], age: float) -> bool:
        job = own_job()
        if job is not None and holder.get("job") == job and holder.get("restarts", 0) < own_restarts():
            return False  # SLURM starts a job again only when its processes are gone, with their node if need be
        if holder.get("machine") == host_id():
            return process_start(int(holder["pid"])) == holder.get("started") is not None
        return age < STALE_SECONDS

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            # A file system that does not answer for once must not end the heartbeat; `require_lock` has the last word.
            with contextlib.suppress(OSError):
                if (_read_claim(self._lock) or {}).get("token") == self._token:
                    os.utime(self._lock)


@contextlib.contextmanager
def file_lock(guard: Path) -> Iterator[None]:
    """Hold an exclusive `flock` on a file; the kernel releases that of a dead process.

    File systems without locks let two processes in; `RunDir.require_lock` then keeps one from overwriting the other.
    """
    with open(guard, "w", encoding="utf-8") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_claim(path: Path) -> dict[str, Any] | None:
    """The contents of a lock file; None if it is missing or unreadable."""
    try:
        claim = dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None
    return claim if isinstance(claim.get("pid"), int) else None


def sanitize(summary: dict[str, Any]) -> dict[str, Any]:
    """Remove the entries of a summary that do not have the type that a run writes."""
    number = (int, float)
    kinds: dict[str, Any] = {"status": str, "job": dict, "run": dict, "last": dict, "epochs": int, "steps": int}
    kinds |= dict.fromkeys(("step_seconds", "save_seconds", "wall_time", "best"), number) | {"best_epoch": int}
    found = _of_kinds(summary, kinds)
    of_run = {
        "classes": list,
        "sources": list,
        "commits": list,
        "started": number,
        "trunk": str,
        "pretrained": str,
        "model": str,
    }
    found["run"] = run = _of_kinds(found.get("run") or {}, of_run)
    for name, kind in (("classes", int), ("sources", str), ("commits", str)):
        if not all(isinstance(each, kind) and each for each in run.get(name) or []):
            del run[name]
    if not isinstance((found.get("job") or {}).get("job_id", ""), str):
        del found["job"]
    return {name: value for name, value in found.items() if name in summary}


def _of_kinds(found: dict[str, Any], kinds: dict[str, Any]) -> dict[str, Any]:
    """The entries that have their type or are null, and those without a type."""
    return {k: v for k, v in finite(found).items() if v is None or isinstance(v, kinds.get(k, object))}


def finite(value: Any) -> Any:
    """The same value with every number that JSON cannot hold (NaN, infinity) replaced by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, int) and abs(value) > 10**300:  # no number of ours, and none that can be computed with
        return None
    return value
