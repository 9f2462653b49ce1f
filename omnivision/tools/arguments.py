"""Types of arguments that several commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, Token
from cyclopts.validators import Number

DEFAULT_FPS = 25.0  # for frame folders


def at_least(low: int, high: int | None = None) -> Parameter:
    """Describe an integer from `low` to `high`."""
    return Parameter(converter=_to_int, validator=Number(gte=low, lte=high), metavar="N")


def _to_int(_: Any, tokens: Sequence[Token]) -> int:
    """Reject 2.5, which cyclopts would truncate."""
    return int(tokens[0].value)


def _in_folder(_: Any, file: Path | None) -> None:
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise ValueError(f"must be a file in an existing folder, got {file}")


def _is_no_file(_: Any, folder: Path | None) -> None:
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"must be a folder, got the file {folder}")


OutFile = Annotated[Path | None, Parameter(validator=_in_folder, metavar="FILE")]
OutFolder = Annotated[Path | None, Parameter(validator=_is_no_file, metavar="DIR")]
Flag = Annotated[bool, Parameter(show_default=False)]
File = Annotated[str | None, Parameter(metavar="FILE")]
Share = Annotated[float, Parameter(validator=Number(gt=0, lt=1), metavar="X")]
Fps = Annotated[float | None, Parameter(validator=Number(gt=0, lte=1000), metavar="X")]
FrameRate = Annotated[Fps, Parameter(help=f"Frames per second of frame folders (default {DEFAULT_FPS:g}).")]
FramePattern = Annotated[
    str | None,
    Parameter(
        metavar="PATTERN", help="Which images are the frames, e.g. 'img_*.jpg', if a folder holds several series."
    ),
]
Seconds = Annotated[float | None, Parameter(validator=Number(gte=0.01), metavar="SECONDS")]
Regex = Annotated[str | None, Parameter(metavar="REGEX")]
Segments = Annotated[
    str | None, Parameter(metavar="SEGMENTS.npy", help="(N, 2) start and end (s) of each sample in its video.")
]
Workers = Annotated[
    int | None, at_least(0), Parameter(help="Worker processes; 0: none (default: one per core, at most 16).")
]


def resolve_fps(fps: float | None, paths: Iterable[str]) -> float:
    """Return --fps or 25; if 25 is assumed for a frame folder among the paths, print that."""
    if fps is None and any(map(os.path.isdir, paths)):
        print("Frame folders are read at 25 frames per second; --fps X sets another rate.", file=sys.stderr)
    return DEFAULT_FPS if fps is None else fps
