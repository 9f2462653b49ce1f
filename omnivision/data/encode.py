"""Frames -> H.264 film, byte-identical for identical frames and settings. The one place that encodes video.

A film appears under its name only when it is whole: it is written under a temporary name in the same folder and
renamed, so a killed process leaves no half film behind.
"""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

TEMPORARY_SUFFIX = ".part"


def write_film(
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
    count, height, width = frames.shape[:3]
    if count == 0 or height == 0 or width == 0 or height % 2 or width % 2:
        raise ValueError(f"frames are {frames.shape}; expected at least one frame, of even height and width (4:2:0).")
    if fps <= 0 or gop < 1 or not 0 <= crf <= 51:
        raise ValueError(f"fps is {fps}, gop {gop}, crf {crf}; expected fps > 0, gop >= 1 and crf from 0 to 51.")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.gop_size = gop
            stream.thread_count = 1
            # mbtree sums floats in an order that differs from run to run on AVX-512, and with it the bytes.
            stream.options = {"preset": preset, "crf": str(crf), "x264-params": "mbtree=0"}
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        size = temporary.stat().st_size
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return size
