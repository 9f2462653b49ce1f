"""The arrays of a split, read and written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from omnivision.data.catalog import check_segments, load_array
from omnivision.data.sampling import Segment
from omnivision.tools.prepare.index import MAX_CLASSES
from omnivision.utils.errors import UserError
from omnivision.utils.io import replace_atomically


def read_paths(file: str) -> list[str]:
    """Read the paths in PATHS.npy. Raises UserError for anything but a 1-D array of at least one string."""
    array = _read(file, "PATHS")
    if array.ndim != 1 or array.dtype.kind != "U" or len(array) == 0:
        raise UserError(
            f"{file} holds {array.shape} of {array.dtype}; expected a 1-D array of (unicode) strings, at least one. "
            "Save it with numpy.save(file, numpy.array(list_of_paths, dtype=str)), or give another PATHS."
        )
    return [str(path) for path in array]


def read_labels(file: str, samples: int) -> np.ndarray:
    """Read LABELS.npy as int64. Raises UserError for anything but a 1-D array of `samples` integers."""
    array = _read(file, "LABELS")
    if array.shape != (samples,) or array.dtype.kind not in "iu":
        raise UserError(
            f"{file} holds {array.shape} of {array.dtype}; expected a 1-D array of {samples} integers, one a path. "
            "Write both files from the same list, or give another LABELS."
        )
    if len(array) and array.max() >= MAX_CLASSES:
        raise UserError(
            f"{file} holds the label {array.max()}; expected class numbers below {MAX_CLASSES}, or -1 for ignored samples. "
            "Fix the labels."
        )
    return array.astype(np.int64)


def read_segments(file: str, samples: int) -> list[Segment]:
    """Read the segments in SEGMENTS.npy, (start, end) in seconds. Raises UserError for anything else."""
    array = _read(file, "--segments")
    check_segments(array, file, "--segments", samples)
    return [(float(start), float(end)) for start, end in array]


def write_split(
    folder: Path, split: str, paths: Sequence[str], labels: np.ndarray, segments: Sequence[Segment | None] = ()
) -> None:
    """Write <split>_paths.npy (N, unicode), <split>_labels.npy (N, int64) and <split>_segments.npy (N, 2, float64).

    Without segments (none at all, or None each), samples are whole videos, and there is no file of segments.
    """
    arrays = {"paths": np.array(paths, dtype=str), "labels": labels.astype(np.int64)}
    if any(segments):
        arrays["segments"] = np.array(segments, dtype=np.float64)
    else:
        (folder / f"{split}_segments.npy").unlink(missing_ok=True)
    for name, array in arrays.items():
        with replace_atomically(folder / f"{split}_{name}.npy") as file:
            np.save(file, array, allow_pickle=False)


def _read(file: str, argument: str) -> np.ndarray:
    if not os.path.isfile(file):  # a pipe would block
        raise UserError(f"{file}: no such file. Expected a .npy file; give another {argument}.")
    return load_array(file, argument)
