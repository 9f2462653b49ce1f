"""Memory that a process has freed stays with it: what it does next needs as much again.

glibc gives large blocks back to the system at once, and takes fresh pages, which the system first fills with zeros, for the
next ones. Steps on a processor and samples in a data worker are made of such blocks.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def keep_freed_memory() -> None:
    """For this process, from now on. Elsewhere than on glibc nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)  # all from the heap, ...
        mallopt(_TRIM_THRESHOLD, -1)  # ... which is never made smaller
