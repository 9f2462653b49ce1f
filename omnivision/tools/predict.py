"""`omnivision predict CHECKPOINT VIDEO...`: the likeliest classes of videos, with bars or as JSON."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from omnivision.tools.arguments import Device, Flag, FramePattern, FrameRate, TrustTargets, at_least, resolve_fps
from omnivision.utils.errors import EXIT_USER, UserError

if TYPE_CHECKING:
    from omnivision.tools.inference import Prediction


MAX_WIDTH = 10_000  # of a console in which nothing is broken
BAR = 30  # characters of a probability of 1
EIGHTHS = " ▏▎▍▌▋▊▉█"


def predict(
    checkpoint: str,
    videos: Annotated[list[str], Parameter(name="VIDEO")],
    /,
    *,
    top: Annotated[int, at_least(1)] = 5,
    clips: Annotated[int, at_least(1, 1000)] = 2,
    crops: Literal[1, 3] = 3,
    head: Annotated[int, at_least(0)] = 0,
    as_json: Annotated[Flag, Parameter(name="--json")] = False,
    device: Device = "cpu",
    trust_targets: TrustTargets | None = None,
    fps: FrameRate = None,
    frame_pattern: FramePattern = None,
) -> int:
    """Predict which actions videos show.

    The likeliest classes of each video by a model of a later stage. Its scores are averaged over views: clips spread over
    the video, and crops of each. Exit code 1 if a video could not be read; the others are printed all the same.

    Args:
        checkpoint: A run directory (its best checkpoint) or a file.
        videos: A video, or a folder of its frames.
        top: Number of classes to print.
        clips: Clips of each video.
        crops: Crops of each clip.
        head: Which of several heads.
        as_json: A JSON object with a list of predictions for each video.
    """
    from omnivision.tools.inference import load

    model, found, failed = load(checkpoint, device, trust_targets or []), {}, False
    rate = resolve_fps(fps, videos)
    for video in videos:
        try:
            found[video] = model.predict(video, top, clips, crops, head, rate, frame_pattern)
        except UserError as error:
            failed = True
            print(f"error: {error}", file=sys.stderr)
            continue
        if not as_json:
            # A long path stays a line, for whoever looks for it, and so does a long name.
            console = Console(highlight=False, width=MAX_WIDTH)
            console.print(Text(video, "bold"))
            console.print(
                make_table(found[video], shutil.get_terminal_size().columns if console.is_terminal else MAX_WIDTH)
            )
    if as_json:
        predictions = {video: [asdict(guess) for guess in guesses] for video, guesses in found.items()}
        print(json.dumps(predictions, indent=1, ensure_ascii=False))
    return EXIT_USER if failed else 0


def make_table(guesses: list[Prediction], width: int) -> Table:
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
