"""Frames -> H.264 video, byte-identical for identical frames and settings. All video encoding happens here.

A video is written under a temporary name in the same folder and renamed: a killed process leaves no partial video.
"""

import os
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import OutputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

TEMPORARY_SUFFIX = ".part"
# With mbtree, x264 on AVX-512 sums floats in an order that differs from run to run, and so do the bytes.
DEFAULT = {"x264-params": "mbtree=0"}
QUICK_TO_READ = {"tune": "fastdecode", "x264-params": "mbtree=0:bframes=3:b-adapt=0:b-pyramid=0"}


def write_video(
    path: str | os.PathLike[str], frames: NDArray[np.uint8], *, fps: int | Fraction, **settings: Any
) -> int:
    """Encode RGB `frames`, uint8 (T, H, W, 3), as an mp4; return its size in bytes. `settings` go to `write_timed_video`."""
    return write_timed_video(path, enumerate(frames), 1 / Fraction(fps), fps=fps, **settings)


def write_timed_video(
    path: str | os.PathLike[str],
    frames: Iterable[tuple[int, NDArray[np.uint8]]],
    time_base: Fraction,
    *,
    fps: int | Fraction,
    end: int | None = None,
    gop: int = 12,
    crf: int = 23,
    preset: str = "veryfast",
    quick_to_read: bool = False,
) -> int:
    """Encode time-stamped frames, with one in memory at a time; return the size in bytes.

    Args:
        frames: (tick, uint8 (H, W, 3)) with ascending ticks of `time_base` seconds, all of one even size.
        fps: approximate frames per second, used only for the encoder's decisions.
        end: the tick at which the last frame leaves the screen; None: it stays as long as the one before it.
        gop: maximum number of frames from one key frame to the next (1: key frames only).
        crf: x264's constant quality, 0 (lossless) to 51 (worst).
        quick_to_read: use simpler coding and make 3 of 4 frames droppable. Clips decode in half the time, from a file a tenth
            larger.

    Raises ValueError for other frames; errors of the iterator pass through. No file is left behind in either case.
    """
    if gop < 1 or not 0 <= crf <= 51:  # x264 would clamp them
        raise ValueError(f"gop must be >= 1 and crf 0 to 51, got {gop} and {crf}")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    timed = iter(frames)
    first = next(timed, None)
    if first is None:
        raise ValueError("there must be at least one frame, got none")
    height, width, _ = first[1].shape
    if height * width == 0 or height % 2 or width % 2:
        raise ValueError(f"height and width of frames must be even (4:2:0), got {width}x{height}")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps))
            stream.width = width
            stream.height = height
            stream.pix_fmt = "yuv420p"
            stream.codec_context.time_base = time_base
            stream.gop_size = gop
            stream.thread_count = 1
            stream.options = {**(QUICK_TO_READ if quick_to_read else DEFAULT), "preset": preset, "crf": str(crf)}
            _mux(container, _packets(stream, chain([first], timed), time_base, end), end)
        os.replace(temporary, path)
        return path.stat().st_size
    finally:
        temporary.unlink(missing_ok=True)


def _mux(container: OutputContainer, packets: Iterator[Packet], end: int | None) -> None:
    """Write packets; with `end`, the last one lasts until then."""
    last = next(packets)
    begin = last.dts
    for packet in packets:
        container.mux(last)
        last = packet
    assert last.dts is not None and begin is not None, "the encoder gives packets times"
    if end is not None:
        # Readers count from the first decoding time to the end of the last decoded packet.
        last.duration = max(end - (last.dts - begin), last.duration or 0, 1)
    container.mux(last)


def _packets(
    stream: VideoStream, frames: Iterable[tuple[int, NDArray[np.uint8]]], time_base: Fraction, end: int | None
) -> Iterator[Packet]:
    """Yield the encoded frames, in decoding order, each with its duration if the next tick or the end is known."""
    ticks: list[int] = []
    expected = (stream.height, stream.width, 3)
    waiting: deque[Packet] = deque()  # packets whose duration depends on the next frame's tick
    for tick, frame in frames:
        if frame.dtype != np.uint8 or frame.shape != expected or (ticks and tick <= ticks[-1]):
            raise ValueError(
                f"frames must be uint8 {expected} at ascending ticks, got {frame.dtype} {frame.shape} at {tick}"
            )
        ticks.append(tick)
        encoded = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        encoded.pts, encoded.time_base = tick, time_base
        waiting.extend(stream.encode(encoded))
        while waiting and waiting[0].pts != tick:
            yield _lasting(waiting.popleft(), ticks)
    ends = ticks if end is None else [*ticks, end]
    yield from (_lasting(packet, ends) for packet in (*waiting, *stream.encode(None)))


def _lasting(packet: Packet, ticks: list[int]) -> Packet:
    """Set a packet's duration: the time until the next of the ascending ticks."""
    assert packet.pts is not None, "the encoder got it"
    following = bisect_right(ticks, packet.pts)
    if following < len(ticks):
        packet.duration = max(ticks[following] - packet.pts, 1)
    return packet
