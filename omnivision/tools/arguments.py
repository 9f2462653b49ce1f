"""Types of arguments that several commands share. A validator raises ValueError; the command names the argument."""

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

    def convert(_: Any, tokens: Sequence[Token]) -> int:
        text = tokens[0].value
        if not text.lstrip("+-").isdecimal() or len(text) > 20 or not low <= int(text) <= high:
            raise ValueError(
                f"got {text[:40]!r}; must be an integer from {low}" + (f" to {high}" if high < 10**9 else "")
            )
        return int(text)

    return Parameter(converter=convert, metavar="N")


def _real(is_valid: Callable[[float], bool], expected: str, metavar: str = "X") -> Parameter:
    def convert(_: Any, tokens: Sequence[Token]) -> float:
        try:
            if math.isfinite(value := float(tokens[0].value)) and is_valid(value):
                return value
        except ValueError:
            pass
        raise ValueError(f"got {tokens[0].value[:40]!r}; must be {expected}")

    return Parameter(converter=convert, metavar=metavar)


def _device(_: Any, tokens: Sequence[Token]) -> str:
    import torch

    text = tokens[0].value
    kind, _, number = text.partition(":")
    is_gpu = kind == "cuda" and torch.cuda.is_available() and (number or "0").isdecimal()
    if text != "cpu" and not (is_gpu and int(number or 0) < torch.cuda.device_count()):
        raise ValueError(f"got {text!r}; must be cpu, or cuda where there is a GPU")
    return text


Flag = Annotated[bool, Parameter(show_default=False)]
Share = Annotated[float, _real(lambda value: 0 < value < 1, "a number between 0 and 1, such as 0.2")]
Fps = Annotated[float | None, _real(lambda value: 0 < value <= 1000, "frames per second, above 0 and at most 1000")]
Seconds = Annotated[float | None, _real(lambda value: True, "a number of seconds, such as 2.5", "SECONDS")]
Device = Annotated[str, Parameter(converter=_device, metavar="DEVICE", help="cpu, cuda, or cuda:N.")]
TrustTargets = Annotated[
    list[str],
    Parameter(metavar="PACKAGE", help="Build a model of your own class from this package, which runs its code."),
]
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
