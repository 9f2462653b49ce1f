"""Types of arguments that several commands share. A converter raises ValueError; the command names the argument."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

from cyclopts import Parameter, Token

DEFAULT_FPS = 25.0  # of frame folders


def at_least(low: int, high: int = 10**9) -> Parameter:
    """An integer from `low` to `high`."""
    expected = f"an integer from {low}" + (f" to {high}" if high < 10**9 else "")
    return _number(int, lambda value: low <= value <= high, expected, "N")


def _number(
    kind: Callable[[str], Any], is_valid: Callable[[Any], bool], expected: str, metavar: str = "X"
) -> Parameter:
    def convert(_: Any, tokens: Sequence[Token]) -> Any:
        text = tokens[0].value
        try:
            if is_valid(value := kind(text)):
                return value
        except ValueError:
            pass
        raise ValueError(f"got {text[:40]!r}; must be {expected}")

    return Parameter(converter=convert, metavar=metavar)


Flag = Annotated[bool, Parameter(show_default=False)]
Share = Annotated[float, _number(float, lambda value: 0 < value < 1, "a number between 0 and 1, such as 0.2")]
Fps = Annotated[
    float | None, _number(float, lambda value: 0 < value <= 1000, "frames per second, above 0 and at most 1000")
]
Seconds = Annotated[float | None, _number(float, math.isfinite, "a number of seconds, such as 2.5", "SECONDS")]
FrameRate = Annotated[Fps, Parameter(help=f"Frames per second of frame folders (default {DEFAULT_FPS:g}).")]
FramePattern = Annotated[
    str | None,
    Parameter(
        metavar="PATTERN", help="Which images are the frames, e.g. 'img_*.jpg', if a folder holds several series."
    ),
]


def resolve_fps(fps: float | None, paths: Iterable[str]) -> float:
    """Return --fps or 25, and print that it is assumed where one of the paths is a frame folder."""
    if fps is None and any(map(os.path.isdir, paths)):
        print("Frame folders are read at 25 frames per second; --fps X sets another rate.", file=sys.stderr)
    return DEFAULT_FPS if fps is None else fps
