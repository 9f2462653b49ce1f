"""Samples that are the same video: by name, link or content."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence

_CHUNK = 1 << 20


def find_duplicates(
    paths: list[str], others: list[str] | None = None, segments: Sequence[object] | None = None
) -> list[list[str]]:
    """Return groups of two or more paths that are the same video, within `paths`, or across `paths` and `others`.

    Files are compared by content, but only those of one size are read; folders by where they lie. A path that cannot be
    read is compared by its name. Within `paths`, other `segments` (one a path) of a video are other samples.
    """
    kinds = {path: _kind(path) for path in dict.fromkeys([*paths, *(others or [])])}
    sizes = Counter(kinds.values())
    if others is None:
        samples: dict[object, list[str]] = {}
        for path, segment in zip(paths, segments or [None] * len(paths), strict=True):
            samples.setdefault((_identity(path, kinds[path], sizes), segment), []).append(path)
        return [found for found in samples.values() if len(found) > 1]
    inside: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        inside.setdefault(_identity(path, kinds[path], sizes), []).append(path)
    across: dict[str, list[str]] = {}
    for path in dict.fromkeys(others):
        across.setdefault(_identity(path, kinds[path], sizes), []).append(path)
    return [[*found, *across[key]] for key, found in inside.items() if key in across]


def _kind(path: str) -> int | str:
    """Return the size of a regular file, else the real path."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return os.path.abspath(path)
    return status.st_size if stat.S_ISREG(status.st_mode) else os.path.realpath(path)


def _identity(path: str, kind: int | str, sizes: Counter[int | str]) -> str:
    """Return a key that is equal for paths of the same video."""
    if isinstance(kind, str) or kind == 0:
        return f"at {os.path.abspath(path) if kind == 0 else kind}"
    if sizes[kind] == 1:
        return f"of {kind} bytes"
    return _digest(path)


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    try:
        for chunk in _chunks(path):
            digest.update(chunk)
    except OSError:
        return f"at {os.path.abspath(path)}"
    return digest.hexdigest()


def _chunks(path: str) -> Iterable[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
