"""`omnivision predict CHECKPOINT VIDEO...`: the likeliest classes of films, with bars or as JSON."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from omnivision.tools.arguments import add_device, add_fps, add_trust_targets, at_least, frame_rate
from omnivision.utils.errors import EXIT_USER, UserError

if TYPE_CHECKING:
    from omnivision.tools.inference import Prediction

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

MAX_WIDTH = 10_000  # of a console in which nothing is broken
BAR = 30  # characters of a probability of 1
EIGHTHS = " ▏▎▍▌▋▊▉█"


def add_parser(subparsers: Subparsers) -> None:
    """Add `predict` to the command's parser; its namespace carries `run`, the function to call."""
    parser = subparsers.add_parser(
        "predict",
        help="say which actions films show",
        description="The likeliest classes of each film by a model of a later stage. Its scores are averaged over views: "
        "clips spread over the film, and crops of each.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run folder (its best checkpoint) or a file")
    parser.add_argument("films", metavar="VIDEO", nargs="+", help="a film, or a folder of its frames")
    parser.add_argument("--top", type=at_least(1), default=5, metavar="N", help="classes to tell (default 5)")
    parser.add_argument(
        "--clips", type=at_least(1, 1000), default=2, metavar="N", help="clips of each film (default 2)"
    )
    parser.add_argument("--crops", type=int, choices=(1, 3), default=3, help="crops of each clip (default 3)")
    parser.add_argument("--head", type=at_least(0), default=0, metavar="N", help="which of several heads (default 0)")
    parser.add_argument("--json", action="store_true", help="a JSON object with a list of guesses for each film")
    add_device(parser)
    add_trust_targets(parser)
    add_fps(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the guesses; 0, or 1 when a film could not be read (the others are told all the same)."""
    from omnivision.tools.inference import load

    model, found, failed = load(args.checkpoint, args.device, args.trust_targets), {}, False
    fps = frame_rate(args, args.films)
    for film in args.films:
        try:
            shown = args.clips, args.crops, args.head, fps, args.frame_pattern
            found[film] = model.predict(film, args.top, *shown)
        except UserError as error:
            failed = True
            print(f"error: {error}", file=sys.stderr)
            continue
        if not args.json:
            # A long path stays a line, for whoever looks for it, and so does a long name.
            console = Console(highlight=False, width=MAX_WIDTH)
            console.print(Text(film, "bold"))
            console.print(told(found[film], shutil.get_terminal_size().columns if console.is_terminal else MAX_WIDTH))
    if args.json:
        told_all = {film: [asdict(guess) for guess in guesses] for film, guesses in found.items()}
        print(json.dumps(told_all, indent=1, ensure_ascii=False))
    return EXIT_USER if failed else 0


def told(guesses: list[Prediction], width: int) -> Table:
    """A row a class: its name, a bar as long as there is room for, its probability in percent."""
    table = Table(box=None, show_header=False, pad_edge=False)
    room = min(BAR, width - max(Text(guess.name).cell_len for guess in guesses) - 12)
    for guess in guesses:
        shown = Text(bar(guess.probability, room), "cyan")
        table.add_row(Text(f"  {guess.name}"), shown, f"{100 * guess.probability:5.1f} %")
    return table


def bar(share: float, length: int = BAR) -> str:
    """A bar of a share in [0, 1], in eighths of a character."""
    eighths = round(share * length * 8) if length > 0 else 0
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()).ljust(length)
