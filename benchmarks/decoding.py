"""Sixteen frames of a clip of 2.7 s, decoded: ours, decord, torchcodec, PyAV by hand, the published way; seconds of one core.

    python -m benchmarks.decoding [--quick]

H.264 with key frames 250 frames apart, 340 x 256 and 1280 x 720, clips that start all over the film. Before anything is timed
our frames have to be those of a full decode, byte for byte; how far those of decord and torchcodec are from them, the facts
say.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import films
from benchmarks.command import command_line
from benchmarks.harness import Report, interleaved, one_thread
from benchmarks.peers import loaders
from omnivision.data.frames import subsample_indices
from omnivision.data.sampling import clip_window
from omnivision.data.video import open_video

Ways = dict[str, Callable[[Path, float], Any]]


def ours(path: Path, start: float) -> Tensor:
    """(16, H, W, 3) uint8."""
    with open_video(str(path)) as video:
        return video.read(*clip_window(start, loaders.SECONDS), loaders.FRAMES).permute(0, 2, 3, 1)


def at_each(call: Callable[[Path, float], object], path: Path, starts: list[float]) -> Callable[[], None]:
    def run() -> None:
        for start in starts:
            call(path, start)

    return run


def check_frames(path: Path, starts: list[float], peers: Ways) -> dict[str, dict[str, float]]:
    """Largest and mean differences of the peers' grey levels; ValueError when ours are not those of a full decode."""
    found = {peer: {"differs at most by": 0.0, "on average by": 0.0} for peer in peers}
    for start in starts:
        frames = loaders.all_frames_of(path, start)
        wanted = torch.from_numpy(np.stack([frames[i] for i in subsample_indices(len(frames), loaders.FRAMES)]))
        if not torch.equal(ours(path, start), wanted):
            raise ValueError(f"{path} at {start} s: our frames are not those of a full decode")
        for peer, way in peers.items():
            difference = (way(path, start).int() - wanted.int()).abs().float()
            for key, value in zip(found[peer], (difference.max(), difference.mean()), strict=True):
                found[peer][key] = max(found[peer][key], round(float(value), 3))
            if difference.mean() > 3:
                raise ValueError(f"{path}: the frames of {peer} are other ones: {found[peer]}")
    return found


@one_thread()
def run(quick: bool) -> Report:
    peers: Ways = {"decord": loaders.decord_frames, "torchcodec": loaders.torchcodec_frames}
    report = Report("decoding", "Sixteen frames of a clip of 2.7 s", unit="s of one core")
    with tempfile.TemporaryDirectory() as folder:
        for width, height in ((340, 256),) if quick else ((340, 256), (1280, 720)):
            (path,) = films.make(Path(folder), width, height, seconds=4 if quick else 10)
            starts = [0.0, 0.9] if quick else [0.0, 1.7, 3.1, 4.4, 5.2, 6.6, 7.3]
            name = f"{width}x{height}"
            peers = {peer: way for peer, way in peers.items() if report.works(peer, way, path, starts[0])}
            report.facts[name] = check_frames(path, starts, peers)
            ways: Ways = {
                "ours": ours,
                **peers,
                "PyAV, all decoded": loaders.wanted_frames_of,
                "the published way": loaders.all_frames_of,
            }
            sides = {f"{way}, {name}": at_each(call, path, starts) for way, call in ways.items()}
            report.seconds |= interleaved(sides, rounds=2 if quick else 5, per=len(starts), clock=time.process_time)
            for peer in peers:
                goal = 1.2 if peer == "decord" else None
                report.times_as_fast(f"decoding {name} against {peer}", f"ours, {name}", f"{peer}, {name}", goal)
            report.times_as_fast(
                f"decoding {name} against the published way", f"ours, {name}", f"the published way, {name}"
            )
    return report


def main(arguments: list[str] | None = None) -> None:
    command_line(run, __doc__, arguments)


if __name__ == "__main__":
    main()
