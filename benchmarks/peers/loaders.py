"""Peers of our loader: one pretraining sample (a clip of 16 frames, four views of it).

`published` does the work of the published pipeline: every frame of the clip is decoded and converted to RGB and floating point,
the wanted ones are selected, and each view is resized, cropped, resized and normalised separately. `by_decord` is the usual
alternative: decord for the wanted frames, torchvision's transforms on uint8, the short side resized once.
"""

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
    """Decode every frame of the clip in one thread."""
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


def all_frames(path: Path, start: float) -> list[np.ndarray]:
    """Decode and convert every frame of the clip: (H, W, 3) uint8 each."""
    return [frame.to_ndarray(format="rgb24") for frame in decoded(path, start)]


def wanted_frames(path: Path, start: float) -> Tensor:
    """Decode every frame of the clip and convert the wanted ones: uint8 (16, H, W, 3)."""
    frames = list(decoded(path, start))
    wanted = [frames[i].to_ndarray(format="rgb24") for i in subsample_indices(len(frames), FRAMES)]
    return torch.from_numpy(np.stack(wanted))


def published(path: Path, start: float) -> Tensor:
    """Four views as the published pipeline makes them: float32 (4, 3, 16, 224, 224), normalised."""
    frames = torch.stack([torch.from_numpy(frame) for frame in all_frames(path, start)])
    converted = frames.permute(3, 0, 1, 2).float()  # (C, T, H, W)
    clip = converted[:, subsample_indices(len(frames), FRAMES)].transpose(0, 1) / 255  # (T, C, H, W)
    resized, cropped = v2.Resize(SHORT_SIDE, antialias=False), v2.RandomResizedCrop(SIZE, antialias=False)
    view = v2.Compose([resized, cropped, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    return torch.stack([view(clip).transpose(0, 1) for _ in range(VIEWS)])


def wanted_indices(start: float, fps: Fraction, count: int) -> list[int]:
    first, last = (math.ceil(bound * fps) for bound in clip_window(start, SECONDS))
    return [first + i for i in subsample_indices(min(last, count) - first, FRAMES)]


def decord_frames(path: Path, start: float) -> Tensor:
    """The wanted frames by decord: uint8 (16, H, W, 3)."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    indices = wanted_indices(start, Fraction(reader.get_avg_fps()), len(reader))
    return torch.from_numpy(reader.get_batch(indices).asnumpy())


def torchcodec_frames(path: Path, start: float) -> Tensor:
    """The wanted frames by torchcodec: uint8 (16, H, W, 3). It needs FFmpeg's shared libraries, which no Python package has."""
    from torchcodec.decoders import VideoDecoder

    reader = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
    return reader.get_frames_at(wanted_indices(start, Fraction(reader.metadata.average_fps), len(reader))).data


def by_decord(path: Path, start: float) -> Tensor:
    """Four views with decord and torchvision on uint8: (4, 3, 16, 224, 224)."""
    clip = v2.functional.resize(decord_frames(path, start).permute(0, 3, 1, 2), [SHORT_SIDE], antialias=False)
    crop = v2.RandomResizedCrop(SIZE, antialias=False)
    return torch.stack([crop(clip).transpose(0, 1) for _ in range(VIEWS)])
