"""Sixteen frames of a clip of 2.7 s, decoded: ours, decord, torchcodec, PyAV by hand, the published way; seconds of one core.

H.264 with key frames 250 frames apart, 340 x 256 and 1280 x 720, clips from all over the video. Before timing, our frames must
be those of a full decode, byte for byte; the facts hold the differences of decord and torchcodec from them.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import videos
from benchmarks.harness import Report, interleaved, one_thread
from benchmarks.peers import loaders
from omnivision.data.sampling import clip_window
from omnivision.data.video import open_video

Ways = dict[str, Callable[[Path, float], Any]]


def ours(path: Path, start: float) -> Tensor:
    """(16, H, W, 3) uint8."""
    with open_video(str(path)) as video:
        return video.read(*clip_window(start, loaders.SECONDS), loaders.FRAMES).permute(0, 2, 3, 1)


def at_each(way: Callable[[Path, float], object], path: Path, starts: list[float]) -> Callable[[], None]:
    def run() -> None:
        for start in starts:
            way(path, start)

    return run


def check_frames(path: Path, starts: list[float], peers: Ways) -> dict[str, dict[str, float]]:
    """Return largest and mean differences of the peers' grey levels. Raises ValueError if ours differ at all."""
    differences = {peer: {"differs at most by": 0.0, "on average by": 0.0} for peer in peers}
    for start in starts:
        expected = loaders.wanted_frames(path, start)
        if not torch.equal(ours(path, start), expected):
            raise ValueError(f"{path} at {start} s: our frames are not those of a full decode")
        for peer, way in peers.items():
            difference = (way(path, start).int() - expected.int()).abs().float()
            for key, value in zip(differences[peer], (difference.max(), difference.mean()), strict=True):
                differences[peer][key] = max(differences[peer][key], round(float(value), 3))
            if difference.mean() > 3:
                raise ValueError(f"{path}: {peer} decodes other frames: {differences[peer]}")
    return differences


@one_thread()
def decoding(quick: bool) -> Report:
    peers: Ways = {"decord": loaders.decord_frames, "torchcodec": loaders.torchcodec_frames}
    report = Report("decoding", "Sixteen frames of a clip of 2.7 s", "s of one core")
    with tempfile.TemporaryDirectory() as folder:
        for width, height in ((340, 256),) if quick else ((340, 256), (1280, 720)):
            (path,) = videos.make(Path(folder), width, height, seconds=4 if quick else 10)
            starts = [0.0, 0.9] if quick else [0.0, 1.7, 3.1, 4.4, 5.2, 6.6, 7.3]
            size = f"{width}x{height}"
            peers = {peer: way for peer, way in peers.items() if report.works(peer, way, path, starts[0])}
            report.facts[size] = check_frames(path, starts, peers)
            ways = {
                "ours": ours,
                **peers,
                "PyAV, all decoded": loaders.wanted_frames,
                "the published way": loaders.all_frames,
            }
            sides = {f"{way}, {size}": at_each(call, path, starts) for way, call in ways.items()}
            report.seconds |= interleaved(sides, rounds=2 if quick else 5, per=len(starts), clock=time.process_time)
            for peer in (*peers, "the published way"):
                goal = 1.2 if peer == "decord" else None
                report.times_as_fast(f"decoding {size} against {peer}", f"ours, {size}", f"{peer}, {size}", goal)
    return report
