"""Atomic file writes, and weights-only loading."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from omnivision.utils.errors import UserError, is_out_of_memory

if TYPE_CHECKING:
    import torch

# Checkpoints of a run: the newest, the one before it, the best by validation.
LATEST, PREVIOUS, BEST = "checkpoint.pt", "previous.pt", "best.pt"
SHARDS_PREFIX = "shards_"  # prefix of a folder beside a checkpoint with its shards


def run_name(path: Path) -> str:
    """Return the name of a run directory, of a checkpoint's run, or of another file."""
    return path.parent.parent.name if path.parent.name == "checkpoints" and path.parent.parent.name else path.name


def temporary_beside(path: Path) -> Path:
    """Return a unique name in the same folder, which `remove_stale_tmp` recognizes."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that replaces `path` when the block ends without an error.

    A link is followed. Raises OSError for a device, a pipe or a folder.
    """
    asked, path = path, Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it exists and is not a regular file", str(asked))
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if str(error.filename) == str(temporary):
            error.filename = str(asked)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file so that a reader or a crash sees the old one or the new one, never a part."""
    with replace_atomically(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))  # file names may not be valid text


def to_json(value: Any, indent: int | None = None) -> str:
    """Encode a value as JSON; numbers that JSON lacks (NaN, infinity) become null."""
    # `parse_constant` receives NaN and Infinity, as Python encodes them.
    strict = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(strict, indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_atomically(path, to_json(value, indent=1) + "\n")


def remove_stale_tmp(folder: Path) -> None:
    """Remove temporary files that killed writers left. Only the folder's single writer may call this."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file, even from several processes; a truncated last line is ended first."""
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            line = f"\n{line}"
        file.write(f"{line}\n".encode("utf-8", errors="surrogateescape"))


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CorruptCheckpointError(UserError):
    """A file of tensors does not load, or differs from what was written; the message says how."""


def is_dense_cpu(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is dense, on the CPU, and has all its values: a small file may claim a huge one."""
    import torch  # imported lazily: it takes a second, and most of this module does not need it

    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return dense and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def is_archive(path: Path) -> bool:
    """Return whether a file is a zip archive, as torch writes since 1.6."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def safe_load(source: Path | IO[bytes], map_location: str = "cpu") -> Any:
    """Load a file written by `torch.save`, weights only; a path is memory-mapped unless the file is older than torch 1.6.

    Raises CorruptCheckpointError for a file that does not load, whatever the reason.
    """
    import torch

    try:
        mapped = isinstance(source, Path) and is_archive(source)
        with warnings.catch_warnings(action="ignore"):  # torch warns about the version of files that are then rejected
            return torch.load(source, map_location=map_location, weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds for a damaged or hostile file; all mean the same to the caller
        if is_out_of_memory(error):
            raise
        name, reason = source if isinstance(source, Path) else "the file", str(error)
        if what := re.search(r"GLOBAL (\S+)|operand 149", reason):  # opcode 149: a pickle that torch did not write
            raise CorruptCheckpointError(
                f"{name} does not load: it holds a pickled object{f' ({what[1]})' if what[1] else ''}, and unpickling may run "
                "any code. Where it was made, save only the state dict: torch.save({'model': model.state_dict()}, FILE)."
            ) from error
        # Other messages are about torch, or advise loading the file anyway.
        if re.search(r"failed reading zip archive|unexpected EOF|Invalid argument", reason):  # the last by mmap
            cause = "it is truncated or corrupt; copy it again"
        elif reason and isinstance(error, (RuntimeError, OSError)):
            cause = reason.splitlines()[0]
        else:
            cause = "it is not a weights file; give one written by torch.save or safetensors"
        raise CorruptCheckpointError(f"{name} does not load: {cause}") from error
