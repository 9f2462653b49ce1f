"""One pretraining sample (a clip of 16 frames, four views of it) by other ways than ours, to be measured against.

`published` does the work of the published pipeline: every frame of the clip is decoded, converted to RGB and made floating
point, then the wanted ones are taken, and each view is resized, cropped, resized and normalised by itself. `decord` is what
people build by hand today: decord for the wanted frames, torchvision's transforms on uint8, the short side resized once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from omnivision.data.frames import subsample_indices
from omnivision.data.sampling import clip_window
from omnivision.models.patches import IMAGENET_MEAN, IMAGENET_STD

FRAMES, SECONDS, VIEWS, SHORT_SIDE, SIZE = 16, 2.7, 4, 256, 224


def decoded(path: Path, start: float) -> Iterator[av.VideoFrame]:
    """Every frame of the clip, decoded in one thread."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
        first, last = (bound / stream.time_base for bound in clip_window(start, SECONDS))
        container.seek(int(first), stream=stream)
        for frame in container.decode(stream):
            if frame.pts >= last:
                return
            if frame.pts >= first:
                yield frame


def all_frames_of(path: Path, start: float) -> list[np.ndarray]:
    """Every frame of the clip, converted: (H, W, 3) uint8 each."""
    return [frame.to_rgb().to_ndarray() for frame in decoded(path, start)]


def wanted_frames_of(path: Path, start: float) -> Tensor:
    """Every frame of the clip decoded, the wanted ones converted: uint8 (16, H, W, 3)."""
    found = list(decoded(path, start))
    return torch.from_numpy(
        np.stack([found[i].to_ndarray(format="rgb24") for i in subsample_indices(len(found), FRAMES)])
    )


def published(path: Path, start: float) -> Tensor:
    """Four views as the published pipeline makes them: float32 (4, 3, 16, 224, 224), normalised."""
    frames = all_frames_of(path, start)
    everything = torch.stack([torch.from_numpy(frame) for frame in frames]).permute(3, 0, 1, 2).float()  # (C, T, H, W)
    clip = everything[:, subsample_indices(len(frames), FRAMES)].transpose(0, 1) / 255  # (T, C, H, W)
    view = v2.Compose(
        [
            v2.Resize(SHORT_SIDE, antialias=False),
            v2.RandomResizedCrop(SIZE, antialias=False),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    return torch.stack([view(clip).transpose(0, 1) for _ in range(VIEWS)])


def decord_frames(path: Path, start: float) -> Tensor:
    """The wanted frames by decord: uint8 (16, H, W, 3)."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    fps = reader.get_avg_fps()
    first, last = (math.ceil(bound * Fraction(fps)) for bound in clip_window(start, SECONDS))
    wanted = [first + i for i in subsample_indices(min(last, len(reader)) - first, FRAMES)]
    return torch.from_numpy(reader.get_batch(wanted).asnumpy())


def torchcodec_frames(path: Path, start: float) -> Tensor:
    """The wanted frames by torchcodec: uint8 (16, H, W, 3). It needs FFmpeg's shared libraries, which no Python package has."""
    from torchcodec.decoders import VideoDecoder

    reader = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
    fps = Fraction(reader.metadata.average_fps)
    first, last = (math.ceil(bound * fps) for bound in clip_window(start, SECONDS))
    wanted = [first + i for i in subsample_indices(min(last, len(reader)) - first, FRAMES)]
    return reader.get_frames_at(wanted).data


def by_decord(path: Path, start: float) -> Tensor:
    """Four views with decord and torchvision on uint8: (4, 3, 16, 224, 224)."""
    clip = v2.functional.resize(decord_frames(path, start).permute(0, 3, 1, 2), [SHORT_SIDE], antialias=False)
    crop = v2.RandomResizedCrop(SIZE, antialias=False)
    return torch.stack([crop(clip).transpose(0, 1) for _ in range(VIEWS)])
