"""Turn a request into a sample: clip times, frames, views, masks. Everything random is keyed by the request.

A file that does not decode is replaced by another one of the same split, which is drawn by a keyed generator too. The sample
names the bad file for the trainer's ledger.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from omnivision.data.batch import BadSample, Sample
from omnivision.data.catalog import Split
from omnivision.data.frames import read_depth, read_image
from omnivision.data.masking import Grid, Mask
from omnivision.data.sampling import (
    AnyRequest,
    Draw,
    Segment,
    Spacing,
    WindowRequest,
    clip_window,
    keyed_rng,
    random_clip_start,
    sample_duration,
    uniform_clip_starts,
    window_starts,
)
from omnivision.data.video import FrameFolder, VideoDecodeError, VideoFile, open_video
from omnivision.data.views import View

REPLACEMENTS = 20
MAX_ASPECT = 16  # longest side of a frame, in short sides
# errno when a file, or its file system, is unavailable.
_MISSING_ERRNOS = "ENOENT EACCES EIO ENODEV ENOTCONN ESTALE ETIMEDOUT EHOSTDOWN"
MISSING_ERRNOS = {getattr(errno, name) for name in _MISSING_ERRNOS.split()}


@dataclass(frozen=True)
class ClipConfig:
    """How to make clips from files of one kind.

    Args:
        view: crops one view from decoded frames.
        views: views per clip: in training, crops that each have their own mask (repeated augmentation, Hoffer et al. 2020); at
            evaluation, its crops.
        num_frames: frames per clip; 1 for images.
        grid: token grid (T', H', W') that masks are made for.
        mask: hides tokens of a view, or None for tasks without masks.
        clips: clips per video at evaluation, spread over it; in training there is one, at a random time.
    """

    view: View
    views: int
    num_frames: int
    grid: Grid
    mask: Mask | None = None
    clips: int = 1


class ClipDataset:
    """Clips from the videos of several splits; an image is a clip of one frame.

    Args:
        splits: the sources; a request names one by position.
        configs: by kind of source ("video", "image", "rgbd").
        clip_duration: seconds that the frames of a clip are spread over.
        seed: the seed of all draws.
        training: if true, clips start anywhere, and a bad file is replaced by another sample. If false, clips are spread
            evenly, and a bad file gives a sample without views (in training, many bad files in a row do).
        max_pixels: frames with more pixels than this, by their header, make a file bad.
        spacing: how evaluation clips are spread; see `sampling.uniform_clip_starts`.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        configs: Mapping[str, ClipConfig],
        clip_duration: float,
        seed: int,
        training: bool,
        max_pixels: int | None = None,
        spacing: Spacing = "ends",
    ) -> None:
        self.splits = list(splits)
        self.configs = dict(configs)
        self.clip_duration = clip_duration
        self.seed = seed
        self.training = training
        self.max_pixels = max_pixels
        self.spacing = spacing

    def __getitem__(self, request: AnyRequest) -> Sample:
        split = self.splits[request.source]
        bad: list[BadSample] = []
        rng = keyed_rng(self.seed, Draw.REPLACEMENT, *request)
        for _ in range(1 + REPLACEMENTS if self.training else 1):
            if bad:
                request = request._replace(sample_index=int(rng.integers(len(split))))
            path = split.path(request.sample_index)
            try:
                return self._sample(split, request, path, bad)
            except VideoDecodeError as error:
                missing = getattr(error.__cause__, "errno", None) in MISSING_ERRNOS
                bad.append(BadSample(split.name, request.sample_index, path, str(error), split.which, missing))
        return self._empty(split, request, path, bad)

    def _sample(self, split: Split, request: AnyRequest, path: str, bad: list[BadSample]) -> Sample:
        config = self.configs[split.dataset.kind]
        depth = self._depth(split, request, config)
        views, masks, depths = [], [], []
        for clip, frames in enumerate(self._clips(split, request, path, config)):
            frames = config.view.prepare(_check_aspect(frames))
            for crop_index in range(config.views):
                key = (*request, clip * config.views + crop_index)
                cropped = config.view(frames, keyed_rng(self.seed, Draw.VIEW, *key), crop_index)  # (T, C, H, W)
                views.append(cropped.permute(0, 2, 3, 1))
                if depth is not None:
                    depths.append(config.view.crop(depth, keyed_rng(self.seed, Draw.VIEW, *key), crop_index)[0])
                if config.mask is not None:
                    masks.append(torch.from_numpy(config.mask(config.grid, keyed_rng(self.seed, Draw.MASK, *key))))
        # (V, C, T, H, W), channels last in memory, as decoding and resizing leave them: making it contiguous would cost as much
        # as the crop.
        video = torch.stack(views).permute(0, 4, 1, 2, 3)
        return Sample(
            video=_squeeze_time(video, split),
            mask=torch.stack(masks) if masks else None,
            label=split.label(request.sample_index),
            source=split.name,
            index=request.sample_index,
            path=path,
            depth=torch.stack(depths).contiguous() if depths else None,
            bad=bad,
        )

    def _depth(self, split: Split, request: AnyRequest, config: ClipConfig) -> Tensor | None:
        """Return the depth of an RGB-D image, prepared for its view: float32 (1, 1, H, W) in [0, 1] of `depth_max`."""
        path = split.depth_path(request.sample_index)
        if path is None:
            return None
        farthest = split.dataset.depth_max
        depth = (read_depth(path, self.max_pixels) * split.dataset.depth_scale).clamp(0, farthest) / farthest
        return config.view.prepare(_check_aspect(depth))

    def _clips(self, split: Split, request: AnyRequest, path: str, config: ClipConfig) -> list[Tensor]:
        """Decode the clips of a file, each uint8 (T, C, H, W)."""
        if split.dataset.kind != "video":
            return [read_image(path, self.max_pixels)]
        segment = split.segment(request.sample_index)
        with self._open(split, path) as video:
            duration = sample_duration(video.duration, segment)
            if self.training:
                u = keyed_rng(self.seed, Draw.CLIP, *request).random()
                starts = [random_clip_start(duration, self.clip_duration, float(u))]
            else:
                starts = uniform_clip_starts(duration, self.clip_duration, config.clips, self.spacing)
            return [video.read(*clip_window(start, self.clip_duration, segment), config.num_frames) for start in starts]

    def _open(self, split: Split, path: str) -> AbstractContextManager[VideoFile | FrameFolder]:
        entry = split.dataset
        return open_video(path, fps=entry.fps, max_pixels=self.max_pixels, frame_pattern=entry.frame_pattern)

    def _empty(self, split: Split, request: AnyRequest, path: str, bad: list[BadSample]) -> Sample:
        """Return a sample without views: it names the video, which is not counted."""
        config = self.configs[split.dataset.kind]
        side = config.view.size
        video = torch.empty(0, 3, config.num_frames, side, side, dtype=torch.uint8)
        mask = None if config.mask is None else torch.empty(0, *config.grid, dtype=torch.bool)
        depth = None if split.dataset.kind != "rgbd" else torch.empty(0, 1, side, side)
        label = split.label(request.sample_index)
        return Sample(_squeeze_time(video, split), mask, label, split.name, request.sample_index, path, bad, depth)


class WindowDataset(ClipDataset):
    """Evaluation views of windows that slide over videos of any length; a request asks for some of a video's windows.

    `clip_duration` is the window's length and `stride` the time from one to the next (s); see `sampling.window_starts`.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        configs: Mapping[str, ClipConfig],
        window: float,
        stride: float,
        max_pixels: int | None = None,
    ) -> None:
        super().__init__(splits, configs, window, seed=0, training=False, max_pixels=max_pixels)
        self.stride = stride

    def starts(self, source: int, sample_index: int) -> list[float]:
        """Return the start (s) of each window of a sample, from the start of its segment. Raises VideoDecodeError."""
        split = self.splits[source]
        with self._open(split, split.path(sample_index)) as video:
            return self._starts(video.duration, split.segment(sample_index))

    def _starts(self, duration: float, segment: Segment | None) -> list[float]:
        return window_starts(sample_duration(duration, segment), self.clip_duration, self.stride)

    def _clips(self, split: Split, request: AnyRequest, path: str, config: ClipConfig) -> list[Tensor]:
        assert isinstance(request, WindowRequest)
        segment = split.segment(request.sample_index)
        with self._open(split, path) as video:
            starts = self._starts(video.duration, segment)[request.first : request.first + request.number]
            return [video.read(*clip_window(start, self.clip_duration, segment), config.num_frames) for start in starts]


def _check_aspect(frames: Tensor) -> Tensor:
    """Raise VideoDecodeError for a strip, which would grow to gigabytes when its short side is resized."""
    height, width = frames.shape[-2:]
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise VideoDecodeError(f"{width}x{height}: one side is more than {MAX_ASPECT} times the other")
    return frames


def _squeeze_time(views: Tensor, split: Split) -> Tensor:
    """Return (V, C, T, H, W), or (V, C, H, W) for images: the model tells them from clips of one frame by this."""
    return views[:, :, 0] if split.dataset.kind != "video" else views
