"""Identity of this host and its processes."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path


def host_id() -> str:
    """Return an id of this host since boot and, in a container, of its process namespace, in which process ids are unique."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)


def process_start(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if there is none. Distinguishes reused ids."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])
