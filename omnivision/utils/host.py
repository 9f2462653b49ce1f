"""Which host and which process this is."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path


def host_id() -> str:
    """What ids of processes are of: a machine since it was started and, in a container, its own numbers."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)


def process_start(pid: int) -> int | None:
    """When a process of this machine began, in clock ticks since boot; None if there is none. Tells reused ids apart."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])
