"""The folder of a run: where everything lies, who may write, and how the run ended (`summary.json`)."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from omnivision.errors import UserError
from omnivision.files import write_atomically

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0


class RunFolder:
    """Paths of a run, and its lock.

    Raises UserError when the folder cannot be made or written, or while another live process holds it.
    """

    def __init__(self, path: str | Path, checkpoints: str | Path | None = None) -> None:
        self.path = Path(path)
        self.logs, self.pictures = self.path / "logs", self.path / "pictures"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = Path(checkpoints) if checkpoints else self.path / "checkpoints"
        self._lock = self.path / ".lock"
        self._token = secrets.token_hex(8)
        self._released = threading.Event()

    def create(self) -> None:
        try:
            for folder in (self.logs, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"The run folder {self.path.absolute()} cannot be written: {error.strerror} ({error.filename}). Expected a "
                "folder that can be created and written. Change launcher.experiment_log_dir."
            ) from None

    def lock(self) -> str | None:
        """Become the run's only writer; a heartbeat tells others that we live. Returns a line about a lock taken over."""
        taken_over = None
        while True:
            try:
                with open(self._lock, "x", encoding="utf-8") as file:
                    file.write(self._claim())
                break
            except FileExistsError:
                holder, age = self._holder()
                if holder is not None and self._alive(holder, age):
                    raise UserError(
                        f"The run folder {self.path.absolute()} is in use by process {holder.get('pid')} on "
                        f"{holder.get('host')} (last sign of life {age:.0f} s ago). Two runs would overwrite each other. "
                        "Wait for it, stop it, or change launcher.experiment_log_dir."
                    ) from None
                taken_over = f"took over the lock of {holder or 'an unknown process'}, silent for {age:.0f} s"
                with contextlib.suppress(FileNotFoundError):
                    self._lock.unlink()
        threading.Thread(target=self._beat, daemon=True, name="run-folder-heartbeat").start()
        return taken_over

    def unlock(self) -> None:
        self._released.set()
        holder, _ = self._holder()
        if holder is not None and holder.get("token") == self._token:
            self._lock.unlink()

    def write_summary(self, **facts: Any) -> None:
        """Update `summary.json` with some of its facts; numbers that are not finite become null."""
        summary = self.read_summary() | facts
        write_atomically(self.path / "summary.json", json.dumps(finite(summary), indent=1, allow_nan=False) + "\n")

    def read_summary(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / "summary.json").read_text()))
        except FileNotFoundError:
            return {}

    def _claim(self) -> str:
        return json.dumps(
            {
                "token": self._token,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": process_start(os.getpid()),
            }
        )

    def _holder(self) -> tuple[dict[str, Any] | None, float]:
        """Who holds the lock (None: unreadable or gone) and how many seconds ago it gave a sign of life."""
        try:
            age = time.time() - self._lock.stat().st_mtime
            return dict(json.loads(self._lock.read_text())), age
        except FileNotFoundError:
            return None, STALE_SECONDS
        except ValueError:
            return None, age

    @staticmethod
    def _alive(holder: dict[str, Any], age: float) -> bool:
        if holder.get("host") == socket.gethostname():
            return process_start(int(holder["pid"])) == holder.get("started") is not None
        return age < STALE_SECONDS

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._lock)


def process_start(pid: int) -> int | None:
    """When a process of this machine began, in clock ticks since boot; None if there is none. Tells reused ids apart."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


def finite(value: Any) -> Any:
    """The same value with every number that JSON cannot hold (NaN, infinity) replaced by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
