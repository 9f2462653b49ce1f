"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable


def at_least(low: int, high: int = 10**9) -> Callable[[str], int]:
    """A whole number from `low` to `high`, for `type=`."""

    def number(text: str) -> int:
        if not text.lstrip("+-").isdecimal() or len(text) > 20 or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]!r}; expected a whole number from {low} to {high}")
        return int(text)

    return number


def number(text: str) -> float:
    """A number with or without a fraction, for `type=`."""
    try:
        if math.isfinite(value := float(text)):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text[:40]!r}; expected a number, such as 0.2")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default), cuda, or cuda:N")


def add_trust_targets(parser: argparse.ArgumentParser) -> None:
    text = "build a model of your own class from this package, which runs its code; may be given several times"
    parser.add_argument("--trust-targets", action="append", default=[], metavar="PACKAGE", help=text)


def add_fps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fps", type=rate, metavar="X", help="of folders of frames (default 25)")
    text = "the frames among the images of a folder, e.g. 'img_*.jpg', where it holds several series"
    parser.add_argument("--frame-pattern", metavar="PATTERN", help=text)


def frame_rate(args: argparse.Namespace, paths: Iterable[str]) -> float:
    """The rate of folders of frames, --fps or 25. Print that it is assumed where one of the paths is such a folder."""
    if args.fps is None and any(map(os.path.isdir, paths)):
        print("Folders of frames are taken for 25 a second; --fps X gives another rate.", file=sys.stderr)
    return 25.0 if args.fps is None else args.fps


def rate(text: str) -> float:
    """Frames a second, for `type=`."""
    try:
        if 0 < (value := float(text)) <= 1000:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}; expected frames a second, above 0 and at most 1000")


def device(text: str) -> str:
    """A device that torch has here, for `type=`."""
    import torch

    kind, _, number = text.partition(":")
    there = kind == "cuda" and torch.cuda.is_available() and (number or "0").isdecimal()
    if text != "cpu" and not (there and int(number or 0) < torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(f"{text!r}; expected cpu, or cuda where there is a GPU")
    return text
