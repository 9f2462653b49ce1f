"""From a request to a sample: which seconds, decode, views, masks. Everything random is keyed by the request.

A file that does not decode is replaced by another one of the same split, chosen by the same kind of draw, and named in
the sample, so that the trainer can keep a ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from omnivision.data.batch import BadSample, Sample
from omnivision.data.catalog import Split
from omnivision.data.clips import clip_window, random_clip_start
from omnivision.data.decode import BadVideo, open_video
from omnivision.data.masking import Grid, Mask
from omnivision.data.order import draws
from omnivision.data.views import View

REPLACEMENTS = 20


class Draw(IntEnum):
    """What a random number is for; part of its key, so that no two purposes share numbers."""

    CLIP = 0
    VIEW = 1
    MASK = 2
    REPLACEMENT = 3


class Request(NamedTuple):
    """One video of one epoch. `occurrence` counts its appearances in an epoch when a source is repeated."""

    source: int
    video: int
    epoch: int
    occurrence: int = 0


class VideoDataset:
    """Clips of the videos of several splits.

    Args:
        splits: the sources; a request names one by position.
        view: crops one view out of the decoded frames.
        mask: hides tokens of a view, or None for tasks without masks.
        grid: token grid (T', H', W') that masks are made for.
        num_frames: frames of a clip, spread over `clip_duration` seconds.
        views_per_clip: views cut from each decoded clip (repeated augmentation, Hoffer et al. 2020).
        seed: of all draws.
        max_pixels: videos whose frames have more pixels than this are bad, found from their header.
        replace_bad: give another sample for a bad one (training); otherwise, or when many in a row are bad, the sample has no
            views.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        view: View,
        mask: Mask | None,
        grid: Grid,
        num_frames: int,
        clip_duration: float,
        views_per_clip: int,
        seed: int,
        max_pixels: int | None = None,
        replace_bad: bool = True,
    ) -> None:
        self.splits, self.view, self.mask, self.grid = list(splits), view, mask, grid
        self.num_frames, self.clip_duration, self.views_per_clip = num_frames, clip_duration, views_per_clip
        self.seed, self.max_pixels, self.replace_bad = seed, max_pixels, replace_bad

    def __getitem__(self, request: Request) -> Sample:
        request = Request(*request)
        split = self.splits[request.source]
        bad: list[BadSample] = []
        rng = draws(self.seed, Draw.REPLACEMENT, *request)
        for _ in range(1 + REPLACEMENTS):
            path = split.path(request.video)
            try:
                return self._sample(split, request, path, bad)
            except BadVideo as error:
                bad.append(BadSample(split.name, request.video, path, str(error)))
                if not self.replace_bad:
                    return self._empty(split, request, path, bad)
            request = request._replace(video=int(rng.integers(len(split))))
        return self._empty(split, request, path, bad)

    def _sample(self, split: Split, request: Request, path: str, bad: list[BadSample]) -> Sample:
        frames = self.view.prepare(self._clip(split, request, path))
        views, masks = [], []
        for view in range(self.views_per_clip):
            key = (*request, view)
            cropped = self.view(frames, draws(self.seed, Draw.VIEW, *key))  # (T, C, H, W)
            views.append(cropped.transpose(0, 1))
            if self.mask is not None:
                masks.append(torch.from_numpy(self.mask(self.grid, draws(self.seed, Draw.MASK, *key))))
        return Sample(
            video=torch.stack(views).contiguous(),  # (V, C, T, H, W)
            mask=torch.stack(masks) if masks else None,
            label=split.label(request.video),
            source=split.name,
            index=request.video,
            path=path,
            bad=bad,
        )

    def _clip(self, split: Split, request: Request, path: str) -> Tensor:
        u = draws(self.seed, Draw.CLIP, *request).random()
        with open_video(path, fps=split.dataset.fps, max_pixels=self.max_pixels) as video:
            start = random_clip_start(video.duration, self.clip_duration, float(u))
            return video.read(*clip_window(start, self.clip_duration), self.num_frames)

    def _empty(self, split: Split, request: Request, path: str, bad: list[BadSample]) -> Sample:
        """No views: the video is not counted, only named."""
        video = torch.empty(0, 3, self.num_frames, self.view.size, self.view.size, dtype=torch.uint8)
        mask = None if self.mask is None else torch.empty(0, *self.grid, dtype=torch.bool)
        return Sample(video, mask, split.label(request.video), split.name, request.video, path, bad)
