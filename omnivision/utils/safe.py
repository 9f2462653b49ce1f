"""The one door through which files of tensors come in: weights and plain containers, never a pickled object."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from omnivision.utils.errors import is_out_of_memory


class BrokenCheckpoint(Exception):
    """A file of tensors that is not what was once written; the message says how it differs."""


class PickledObjects(BrokenCheckpoint):
    """A file that holds more than weights, in a way that opening it would run code."""


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether a tensor is dense, on the CPU, and has all its values: a small file may claim a huge one."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return dense and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def is_archive(path: Path) -> bool:
    """Whether a file is what torch writes today, a zip archive; a damaged one may say that it is and not be."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def safe_load(source: Path | IO[bytes], map_location: str = "cpu") -> Any:
    """What is in a file of `torch.save`; a path is memory-mapped, but for files from before torch 1.6, which are no archives.

    Raises BrokenCheckpoint for a file that does not load with weights only, whatever the reason.
    """
    try:
        mapped = isinstance(source, Path) and is_archive(source)
        with warnings.catch_warnings(action="ignore"):  # of the version of a file that is about to be refused
            return torch.load(source, map_location=map_location, weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds for a damaged or hostile file; all mean the same to the caller
        if is_out_of_memory(error):
            raise
        name, reason = source if isinstance(source, Path) else "the file", str(error)
        if what := re.search(r"GLOBAL (\S+)|operand 149", reason):  # 149 frames a pickle that never was torch's
            told = f"it holds a pickled object{f' ({what[1]})' if what[1] else ''}, not weights alone"
            raise PickledObjects(f"{name} does not load: {told}") from error
        # What torch says of others is about itself, or advice to load the file all the same.
        said = (
            reason.splitlines()[0]
            if isinstance(error, (RuntimeError, OSError)) and reason
            else "it is no file of weights"
        )
        raise BrokenCheckpoint(f"{name} does not load: {said}") from error
