"""`omnivision predict` and `omnivision reconstruct`: what a trained model makes of videos."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.bar import Bar
from rich.table import Table
from rich.text import Text

from omnivision.tools.arguments import Flag, FramePattern, FrameRate, OutFolder, Seconds, Share, at_least, resolve_fps
from omnivision.tools.workers import track
from omnivision.utils.errors import EXIT_USER, UserError
from omnivision.utils.streams import print_text, wide_console

if TYPE_CHECKING:
    from omnivision.tools.video_model import Estimate, Prediction, VideoModel

BAR_WIDTH = 30
CLIPS = 2
Device = Annotated[str, Parameter(metavar="DEVICE", help="cpu, cuda, or cuda:N.")]
TrustTargets = Annotated[
    list[str] | None,
    Parameter(metavar="PACKAGE", help="Build a model of your own class from this package, which runs its code."),
]


def predict(
    checkpoint: str,
    videos: Annotated[list[str], Parameter(name="VIDEO")],
    /,
    *,
    top: Annotated[int, at_least(1)] = 5,
    clips: Annotated[int, at_least(1, 1000)] = CLIPS,
    crops: Literal[1, 3] | None = None,
    head: Annotated[int, at_least(0)] = 0,
    as_json: Annotated[Flag, Parameter(name="--json")] = False,
    window: Seconds = None,
    stride: Seconds = None,
    out: OutFolder = None,
    device: Device = "cpu",
    trust_targets: TrustTargets = None,
    fps: FrameRate = None,
    frame_pattern: FramePattern = None,
) -> int:
    """Predict which actions videos show.

    Print the likeliest classes of each video, or the values of a regression, by a model of a later stage. Scores are averaged
    over views: clips spread over the video, and crops of each. Exit code 1 if a video could not be read; the others are printed
    anyway.

    Args:
        checkpoint: A run directory (its best checkpoint) or a file.
        videos: A video, or a folder of its frames.
        top: Number of classes to print.
        clips: Clips per video.
        crops: Crops per clip (default: 3, with a timeline 1).
        head: Number of the head to use, if there are several.
        as_json: Print a JSON object with a list of predictions for each video, or with its timeline.
        window: Make a timeline: windows of this length slide over the video.
        stride: Time from one window to the next (default: half of the window). Alone, it implies windows as long as the
            model's clips.
        out: With a timeline: write NAME.csv (the windows), NAME.json (and segments) and NAME.png into this folder.
    """
    from omnivision.tools.video_model import load

    if window is not None or stride is not None:
        if clips != CLIPS:
            raise UserError("--clips is for predictions of whole videos. Leave --clips out, or --window and --stride.")
        return predict_timelines(
            load(checkpoint, device, trust_targets or []),
            videos, window, stride, top, crops or 1, head, as_json, out, fps=fps, frame_pattern=frame_pattern,
        )  # fmt: skip
    if out is not None:
        raise UserError("--out is for timelines. Set --window or --stride, or use --json.")
    model, found = load(checkpoint, device, trust_targets or []), {}
    rate = resolve_fps(fps, videos)
    console, width = wide_console(highlight=False)
    for video in videos:
        try:
            found[video] = model.predict(video, top, clips, crops or 3, head, fps=rate, frame_pattern=frame_pattern)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        if not as_json:
            console.print(Text(video, "bold"))
            console.print(make_table(found[video], width))
    if as_json:
        predictions = {video: [asdict(prediction) for prediction in found[video]] for video in found}
        print(json.dumps(predictions, indent=1, ensure_ascii=False))
    return 0 if len(found) == len(set(videos)) else EXIT_USER


def predict_timelines(
    model: VideoModel,
    videos: list[str],
    window: float | None,
    stride: float | None,
    top: int,
    crops: Literal[1, 3],
    head: int,
    as_json: bool,
    out: Path | None,
    fps: float | None,
    frame_pattern: str | None,
) -> int:
    """Print the segments of each video, and write its timeline to files of its name."""
    from omnivision.utils.io import replace_atomically, write_atomically, write_json

    names = [Path(video).stem for video in dict.fromkeys(videos)]
    if out is not None and len(set(names)) < len(names):
        raise UserError("--out needs videos with different names, as its files have their names. Use several folders.")
    rate = resolve_fps(fps, videos)
    stride = stride or (window or model.config.clip_duration) / 2
    found: dict[str, dict[str, Any]] = {}
    for video in videos:
        show = partial(track, what=os.path.basename(video))
        try:
            line = model.timeline(video, stride, window, crops, head, show, fps=rate, frame_pattern=frame_pattern)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        found[video] = line.to_json(top)
        if not as_json:
            print_text(f"{video} ({line.duration:.1f} s, {len(line.times)} windows)")
            for own in line.segments():
                print_text(f"  {own.start:8.2f} to {own.end:8.2f} s  {100 * own.probability:5.1f} %  {own.name}")
            if line.label_type == "regression":
                for (start, end), values in zip(line.times.tolist(), line.outputs.tolist(), strict=True):
                    named = zip(line.class_names, values, strict=True)
                    print_text(
                        f"  {start:8.2f} to {end:8.2f} s  " + "  ".join(f"{name} {value:.4g}" for name, value in named)
                    )
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            name = Path(video).stem
            write_atomically(out / f"{name}.csv", line.to_csv(top))
            write_json(out / f"{name}.json", found[video])
            with replace_atomically(out / f"{name}.png") as file:
                line.draw(os.path.basename(video)).save(file, "PNG")
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    elif out is not None and found:
        print_text(f"Wrote {out}: a .csv, .json and .png for each video")
    return 0 if len(found) == len(set(videos)) else EXIT_USER


def check_out(out: Path, suffixes: tuple[str, ...], force: bool, video: str | None = None) -> None:
    """Raise UserError for another suffix, for a file that exists, and, even with `force`, for the video itself."""
    is_video = video is not None and out.resolve() == Path(video).resolve()
    if out.suffix not in suffixes or is_video or (out.exists() and not force):
        raise UserError(
            f"OUT must end in {' or '.join(suffixes)}, and must not be the video or exist (--force replaces it); got {out}. "
            "Change OUT."
        )


def make_table(predictions: list[Prediction] | list[Estimate], width: int) -> Table:
    """Return a row per class: its name, a bar (if there is room), and its probability in percent; or per target: its value."""
    from omnivision.tools.video_model import Estimate

    table = Table(box=None, show_header=False, pad_edge=False)
    if isinstance(predictions[0], Estimate):
        for own in predictions:
            table.add_row(Text(f"  {own.name}"), f"{own.value:.4g}")
        return table
    room = min(BAR_WIDTH, width - max(Text(prediction.name).cell_len for prediction in predictions) - 12)
    for prediction in predictions:
        bar = Bar(1, 0, prediction.probability, width=room, color="cyan") if room > 0 else ""
        table.add_row(Text(f"  {prediction.name}"), bar, f"{100 * prediction.probability:5.1f} %")
    return table


def reconstruct(
    checkpoint: str,
    video: str,
    out: Path,
    /,
    *,
    start: Annotated[float | None, Parameter(metavar="SECONDS")] = None,
    mask_ratio: Share | None = None,
    seed: Annotated[int, at_least(0)] = 0,
    force: Flag = False,
    device: Device = "cpu",
    trust_targets: TrustTargets = None,
    fps: FrameRate = None,
    frame_pattern: FramePattern = None,
) -> int:
    """Show how a masked autoencoder reconstructs a video.

    Show a clip of a video beside its visible patches and the reconstruction: once with the true statistics of each hidden
    patch, as papers show it, and once without.

    Args:
        checkpoint: A run directory of stage 1, or a file.
        video: A video, or a folder of its frames.
        out: A .gif (animated), or a .png with some frames.
        start: Where the clip begins (default: in the middle).
        mask_ratio: Fraction of hidden patches (default: the run's). The run also gives the kind of mask; for a class of your
            own, RandomMask is used.
        seed: Seed of the mask.
        force: Replace OUT if it exists.
    """
    check_out(out, (".gif", ".png"), force, video)
    from omnivision.reporting import images
    from omnivision.tools.video_model import load

    model = load(checkpoint, device, trust_targets or [])
    rate = resolve_fps(fps, [video])
    images.write(model.reconstruct(video, start, mask_ratio, seed, fps=rate, frame_pattern=frame_pattern), out)
    print(f"Wrote {out}")
    return 0
