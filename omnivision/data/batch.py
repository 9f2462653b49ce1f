"""A batch on its way from the workers to the model. The axis order of `video` is fixed here: (B, C, T, H, W)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnivision.config.messages import prefix_settings
from omnivision.utils.errors import UserError


@dataclass(frozen=True)
class BadSample:
    """A file no clip could be read from, for the ledger."""

    source: str
    index: int
    path: str
    reason: str
    split: str = "train"
    missing: bool = False  # the file, or its file system, is unavailable


def missing_files_message(samples: Sequence[BadSample], what: str) -> str:
    """Return a message about files that are all missing; a file that was tried several times counts once."""
    return (
        f"None of {len({sample.path for sample in samples})} {what} exists, e.g. {samples[0].path}. Is the data mounted? Set "
        f"{prefix_settings(sample.source for sample in samples)}. The same command resumes from the last checkpoint."
    )


@dataclass
class Sample:
    """V views of one video: what a dataset returns for one request."""

    video: Tensor  # uint8 (V, C, T, H, W), or (V, C, H, W) for an image
    mask: Tensor | None  # bool (V, T', H', W')
    label: int | np.ndarray  # float32 (K,), except for classes
    source: str
    index: int  # position in its split of the decoded file, which may have replaced a bad one
    path: str
    bad: list[BadSample] = field(default_factory=list)
    depth: Tensor | None = None  # RGB-D images only: float32 (V, 1, H, W) in [0, 1]


@dataclass
class Batch:
    """B clips from one source; the views of a video are adjacent."""

    video: Tensor  # (B, C, T, H, W) or images (B, C, H, W); uint8 from the workers
    label: Tensor  # classes: int64 (B,), -1 if unknown; several classes or numbers: float32 (B, K), NaN if unknown
    index: Tensor  # int64 (B,), position in the source's split
    source: str
    paths: list[str]  # (B,)
    mask: Tensor | None = None  # bool (B, T', H', W'), True = hidden
    num_masked: int = 0  # tokens hidden in each sample
    views: int = 1  # clips per video
    depth: Tensor | None = None  # RGB-D images only: float32 (B, 1, H, W) in [0, 1]
    bad: list[BadSample] = field(default_factory=list)
    parent: Batch | None = None  # micro-batches only: the batch it was split from
    offset: int = 0  # micro-batches only: index of its first sample in `parent`

    def __len__(self) -> int:
        return len(self.video)

    def to(self, device: torch.device, copy_stream: torch.cuda.Stream | None = None) -> Batch:
        """Return the batch on a device. With a `copy_stream`, pinned tensors travel while the GPU computes earlier steps."""
        if copy_stream is None:
            return self._map(lambda tensor: tensor.to(device, non_blocking=True))
        computing = torch.cuda.current_stream(device)
        with torch.cuda.stream(copy_stream):
            moved = self.to(device)
        computing.wait_stream(copy_stream)
        for tensor in moved._tensors().values():
            tensor.record_stream(computing)  # its memory is not reused before `computing` is done with it
        return moved

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def pad_to(self, clips: int) -> Batch:
        """Repeat the clips until there are `clips` of them; an empty batch becomes black clips."""
        if not len(self):
            black = self._map(lambda tensor: tensor.new_zeros((clips, *tensor.shape[1:])))
            return replace(black, paths=[""] * clips, num_masked=max(1, self.num_masked))
        repeated = torch.arange(clips) % len(self)
        return replace(self.select(repeated), paths=[self.paths[i] for i in repeated.tolist()])

    def split(self, parts: int) -> list[Batch]:
        """Return `parts` equal micro-batches, in order; `parts` divides B."""
        if parts == 1:
            return [self]
        size = len(self) // parts
        return [
            replace(
                self._map(lambda t, i=i: t[i : i + size]),  # type: ignore[misc]
                paths=self.paths[i : i + size],
                parent=self,
                offset=i,
            )
            for i in range(0, len(self), size)
        ]

    def select(self, index: Tensor) -> Batch:
        """Return the samples at these positions, int64 (N,), without their paths."""
        return replace(self._map(lambda tensor: tensor[index]), paths=[])

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in ("video", "label", "index", "mask", "depth")}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self._tensors().items()}
        return replace(self, **changed)


def collate(samples: Sequence[Sample]) -> Batch:
    """Collate samples of one source, flattening their views into B. Raises UserError when masks hide different counts."""
    views = torch.tensor([len(sample.video) for sample in samples])
    masks = [sample.mask for sample in samples if sample.mask is not None]
    depths = [sample.depth for sample in samples if sample.depth is not None]
    mask = torch.cat(masks) if masks else None
    counts = set() if mask is None else set(mask.flatten(1).sum(1).tolist())
    if len(counts) > 1:
        raise UserError(
            f"The masks of a batch hide {sorted(counts)} tokens; expected the same number in every sample, because visible "
            "tokens are stacked. Change trainer.data.mask."
        )
    return Batch(
        video=torch.cat([sample.video for sample in samples]),
        label=torch.from_numpy(np.stack([sample.label for sample in samples])).repeat_interleave(views, dim=0),
        index=torch.tensor([sample.index for sample in samples]).repeat_interleave(views),
        source=samples[0].source,
        paths=[sample.path for sample in samples for _ in sample.video],
        mask=mask,
        num_masked=counts.pop() if counts else 0,
        views=max(1, int(views.max())),
        depth=torch.cat(depths) if depths else None,
        bad=[bad for sample in samples for bad in sample.bad],
    )
