"""This host, its processes, and the SLURM job of this process."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path


def host_id() -> str:
    """Return an id of this host since boot and of the process namespace (container), within which process ids are unique."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def process_start(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot, to distinguish reused ids; None if it does not exist."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


def slurm_job_id() -> str | None:
    """Return the ID of this process's SLURM job (12, or 12_3 in an array); None outside of SLURM."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def slurm_restart_count() -> int:
    """Return how often SLURM has restarted this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
