"""Files that are there: whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from omnivision.utils.errors import UserError

# Checkpoints of a run: the newest, the one before it, the best by validation.
LATEST, PREVIOUS, BEST = "checkpoint.pt", "previous.pt", "best.pt"
PARTS = "shards_"  # with what else a folder beside them, with the parts of one, is called


def run_name(path: Path) -> str:
    """Of a run folder, or of the run whose checkpoint a file is; of any other file its own."""
    return path.parent.parent.name if path.parent.name == "checkpoints" and path.parent.parent.name else path.name


def temporary_beside(path: Path) -> Path:
    """A name in the same folder that no other process or thread takes; `remove_leftovers` knows it."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of `path` when the block ends well; else `path` stays as it was.

    A link is followed. Raises OSError for a device, a pipe or a folder, which a file must not take the place of.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is there and no file", str(path))
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file so that a reader or a crash sees the old one or the new one, never a part."""
    with replace_atomically(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))  # names of files need not be text


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that a process left when it was killed while writing. Only for the folder's one writer."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file, which several processes may do; one that a crash has cut is ended first."""
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            line = f"\n{line}"
        file.write(f"{line}\n".encode("utf-8", errors="surrogateescape"))


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_weights(source: str | Path) -> Path:
    """The path of weights to start from. Raises UserError when there is neither a file nor a folder."""
    path = Path(source)
    if str(source) == "" or not (path.is_file() or path.is_dir()):
        raise UserError(
            f"pretrained_checkpoint_path is {str(source)!r}, and there is no such file or folder. Expected a run folder or a "
            f"file of weights (relative paths start at {Path.cwd()}), or null to train from nothing. Change "
            "pretrained_checkpoint_path."
        )
    return path
