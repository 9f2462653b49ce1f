"""A batch on its way from the workers to the model. The axis order of `video` is fixed here once: (B, C, T, H, W)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from omnivision.utils.errors import UserError


@dataclass(frozen=True)
class BadSample:
    """A file that gave no clip: what the ledger says about it."""

    source: str
    index: int
    path: str
    reason: str
    split: str = "train"
    missing: bool = False  # it is not there (any more), or the file system that it lies on does not answer


def vanished_files(paths: Sequence[str], which: str) -> str:
    """What is told of files that are all not there at once; each counts once, however often it was tried."""
    return (
        f"None of {len(set(paths))} files {which} is there, e.g. {paths[0]}. Is the data mounted? Then the same command goes "
        "on from the last checkpoint. If the files never were there, change datasets.NAME.prefix."
    )


@dataclass
class Sample:
    """What a dataset gives for one request: V views of one video."""

    video: Tensor  # uint8 (V, C, T, H, W); of an image (V, C, H, W)
    mask: Tensor | None  # bool (V, T', H', W')
    label: int
    source: str
    index: int  # in its split; of the file that was decoded, should it have replaced another
    path: str
    bad: list[BadSample] = field(default_factory=list)
    depth: Tensor | None = None  # float32 (V, 1, H, W) in [0, 1], of an RGB-D image


@dataclass
class Batch:
    """B clips of one source; the views of a video stand next to each other."""

    video: Tensor  # (B, C, T, H, W) or images (B, C, H, W); uint8 from the workers
    label: Tensor  # int64 (B,)
    index: Tensor  # int64 (B,), position in the source's split
    source: str
    paths: list[str]  # (B,)
    mask: Tensor | None = None  # bool (B, T', H', W'), True = hidden
    num_masked: int = 0  # tokens hidden in each sample
    views: int = 1  # clips of each video
    depth: Tensor | None = None  # float32 (B, 1, H, W) in [0, 1], of RGB-D images
    bad: list[BadSample] = field(default_factory=list)
    parent: Batch | None = None  # of a micro-batch: the batch that it was split from
    offset: int = 0  # of a micro-batch: the position of its first sample there

    def __len__(self) -> int:
        return len(self.video)

    def to(self, device: torch.device) -> Batch:
        return self._tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pad_to(self, clips: int) -> Batch:
        """As many clips as there should be: those that there are again and again, or black ones if there are none."""
        if not len(self):
            whole = self._tensors(lambda tensor: tensor.new_zeros((clips, *tensor.shape[1:])))
            return replace(whole, paths=[""] * clips, num_masked=max(1, self.num_masked))
        again = torch.arange(clips) % len(self)
        return replace(self._tensors(lambda tensor: tensor[again]), paths=[self.paths[i] for i in again.tolist()])

    def pin_memory(self) -> Batch:
        return self._tensors(Tensor.pin_memory)

    def split(self, parts: int) -> list[Batch]:
        """`parts` equal micro-batches, in order; `parts` divides B."""
        if parts == 1:
            return [self]
        size = len(self) // parts
        return [
            replace(
                self._tensors(lambda t, i=i: t[i : i + size]),  # type: ignore[misc]
                paths=self.paths[i : i + size],
                parent=self,
                offset=i,
            )
            for i in range(0, len(self), size)
        ]

    def select(self, index: Tensor) -> Batch:
        """The samples at these positions, int64 (N,) on the device of the batch; without their paths."""
        return replace(self._tensors(lambda tensor: tensor[index]), paths=[])

    def _tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        mask = None if self.mask is None else change(self.mask)
        depth = None if self.depth is None else change(self.depth)
        label, index = change(self.label), change(self.index)
        return replace(self, video=change(self.video), label=label, index=index, mask=mask, depth=depth)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one source -> batch, views flattened into B. Raises UserError when masks hide different counts."""
    views = torch.tensor([len(sample.video) for sample in samples])
    mask, num_masked = None, 0
    if samples[0].mask is not None:
        mask = torch.cat([sample.mask for sample in samples if sample.mask is not None])
        counts = mask.flatten(1).sum(1)
        num_masked = int(counts[0]) if len(counts) else 0
        if not bool((counts == num_masked).all()):
            raise UserError(
                f"The masks of a batch hide {sorted(set(counts.tolist()))} tokens; expected the same number in every "
                "sample, because visible tokens are stacked. Change trainer.data.mask."
            )
    depths = [sample.depth for sample in samples if sample.depth is not None]
    return Batch(
        video=torch.cat([sample.video for sample in samples]),
        label=torch.tensor([sample.label for sample in samples]).repeat_interleave(views),
        index=torch.tensor([sample.index for sample in samples]).repeat_interleave(views),
        source=samples[0].source,
        paths=[sample.path for sample in samples for _ in sample.video],
        mask=mask,
        num_masked=num_masked,
        views=max(1, int(views.max())),
        depth=torch.cat(depths) if depths else None,
        bad=[bad for sample in samples for bad in sample.bad],
    )
