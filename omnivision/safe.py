"""The one door through which files of tensors come in: weights and plain containers, never a pickled object."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import torch


class BrokenCheckpoint(Exception):
    """A file of tensors that is not what was once written; the message says how it differs."""


def safe_load(source: Path | IO[bytes], map_location: str = "cpu") -> Any:
    """What is in a file of `torch.save`; a path is memory-mapped.

    Raises BrokenCheckpoint for a file that does not load with weights only, whatever the reason.
    """
    try:
        return torch.load(source, map_location=map_location, weights_only=True, mmap=isinstance(source, Path))
    except Exception as error:  # torch raises many kinds for a damaged or hostile file; all mean the same to the caller
        name = source if isinstance(source, Path) else "the file"
        raise BrokenCheckpoint(f"{name} does not load: {(str(error).splitlines() or [repr(error)])[0]}") from error
