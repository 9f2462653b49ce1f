"""Frames -> H.264 film, byte-identical for identical frames and settings. The one place that encodes video.

A film appears under its name only when it is whole: it is written under a temporary name in the same folder and
renamed, so a killed process leaves no half film behind.
"""

import os
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

TEMPORARY_SUFFIX = ".part"


def write_video(
    path: str | os.PathLike[str],
    frames: NDArray[np.uint8],
    *,
    fps: int | Fraction,
    gop: int = 12,
    crf: int = 23,
    preset: str = "veryfast",
) -> int:
    """Encode RGB `frames`, uint8 (T, H, W, 3) with even H and W, as an mp4 at `path`; return its size in bytes.

    fps: frames a second. gop: at most this many frames from one key frame to the next (1: key frames only).
    crf: x264's constant quality, 0 (lossless) to 51 (worst). The folder of `path` must exist.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected uint8 (T, H, W, 3).")
    if fps <= 0:
        raise ValueError(f"fps is {fps}; expected fps > 0.")
    return write_timed_video(path, enumerate(frames), 1 / Fraction(fps), fps=fps, gop=gop, crf=crf, preset=preset)


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
    """As `write_video`, with a time stamp for each frame and one frame in memory at a time.

    frames: (tick, uint8 (H, W, 3)) with ascending ticks of `time_base` seconds, all of one even size. fps: about how many a
    second, for the encoder's choices only. end: the tick at which the last frame leaves the screen (None: it stays as
    long as the one before it).
    quick_to_read: clips are decoded in half the time, from a film a tenth larger: simpler coding, and three frames of four
    that no other refers to, which a reader may drop.
    What the iterator of the frames raises passes through; no film is left then.
    """
    if gop < 1 or not 0 <= crf <= 51:
        raise ValueError(f"gop is {gop}, crf {crf}; expected gop >= 1 and crf from 0 to 51.")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    timed = iter(frames)
    first = next(timed, None)
    if first is None:
        raise ValueError("there are no frames; expected at least one frame.")
    height, width, _ = first[1].shape
    if height == 0 or width == 0 or height % 2 or width % 2:
        raise ValueError(f"frames are {width}x{height}; expected even height and width (4:2:0).")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.time_base = time_base
            stream.gop_size = gop
            stream.thread_count = 1
            # mbtree sums floats in an order that differs from run to run on AVX-512, and with it the bytes.
            stream.options = {"preset": preset, "crf": str(crf), "x264-params": "mbtree=0"}
            if quick_to_read:
                droppable = "bframes=3:b-adapt=0:b-pyramid=0"
                stream.options |= {"tune": "fastdecode", "x264-params": f"mbtree=0:{droppable}"}
            last: Packet | None = None
            for packet in _packets(stream, chain([first], timed), time_base, end):
                if last is None:
                    begin = packet.dts
                else:
                    container.mux(last)
                last = packet
            assert last is not None and last.dts is not None and begin is not None, "a frame gives a packet with times"
            if end is not None:
                # Readers count from the first decoding time to the end of what is decoded last.
                last.duration = max(end - (last.dts - begin), last.duration or 0, 1)
            container.mux(last)
        size = temporary.stat().st_size
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return size


def _packets(
    stream: VideoStream, frames: Iterable[tuple[int, NDArray[np.uint8]]], time_base: Fraction, end: int | None
) -> Iterator[Packet]:
    """The encoded frames, in decoding order. Each says how long it is shown, if it is known when the last one goes."""
    ticks: list[int] = []
    expected = (stream.height, stream.width, 3)
    waiting: deque[Packet] = deque()  # for the tick of the next frame
    for tick, frame in frames:
        if frame.shape != expected or (ticks and tick <= ticks[-1]):
            raise ValueError(
                f"a frame is {frame.shape} at tick {tick}, after {ticks[-1:]}; expected {expected}, ascending."
            )
        ticks.append(tick)
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts, picture.time_base = tick, time_base
        waiting.extend(stream.encode(picture))
        while waiting and waiting[0].pts != tick:
            yield _lasting(waiting.popleft(), ticks)
    yield from (
        _lasting(packet, ticks if end is None else [*ticks, end]) for packet in (*waiting, *stream.encode(None))
    )


def _lasting(packet: Packet, ticks: list[int]) -> Packet:
    """The packet, with the time until the next of the ascending ticks."""
    assert packet.pts is not None, "the encoder got it"
    following = bisect_right(ticks, packet.pts)
    if following < len(ticks):
        packet.duration = max(ticks[following] - packet.pts, 1)
    return packet
