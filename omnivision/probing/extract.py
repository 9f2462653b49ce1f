"""One frozen pass of a trunk over splits, in parts, so that it can be resumed and shared by any number of processes.

A part is a fixed range of samples. Each process computes every `world_size`-th part that does not exist yet, in batches that
do not depend on the number of processes; the one that finds all parts of a split complete joins them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from omnivision.checkpoint.fingerprint import file_digest
from omnivision.data.batch import Batch
from omnivision.data.catalog import Split
from omnivision.data.dataset import ClipConfig, ClipDataset, WindowDataset
from omnivision.data.loader import LoaderConfig, load_batches
from omnivision.data.sampling import AnyRequest, Request, WindowRequest
from omnivision.data.views import EvalView
from omnivision.models.vit import VisionTransformer
from omnivision.probing.store import (
    ARRAYS,
    HEADER,
    FeatureConfig,
    Header,
    ModelRecord,
    SplitRecord,
    differences,
    read_header,
    write_header,
)
from omnivision.reporting.run_directory import file_lock
from omnivision.utils.errors import UserError, VideoDecodeError, truncate_list
from omnivision.utils.io import replace_atomically, sync_folder, write_atomically

PART_SAMPLES = 64
BATCH_CLIPS = 32  # clips of a forward pass
PARTS = "parts"


@dataclass(frozen=True)
class Embedder:
    """A trunk on a device that maps batches to features."""

    trunk: VisionTransformer
    device: torch.device
    config: FeatureConfig

    def autocast(self) -> AbstractContextManager[Any]:
        if self.config.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.config.autocast))

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> np.ndarray:
        """Return the features of a batch: float32, a row for each of its videos or windows."""
        batch = batch.to(self.device)
        with self.autocast():
            features = pool_tokens(self.trunk, batch.video, batch.depth, self.config.layers, self.config.keep_time)
        averaged = batch.views if self.config.stride is None else self.config.crops
        return features.float().unflatten(0, (-1, averaged)).mean(1).cpu().numpy()


def pool_tokens(
    trunk: VisionTransformer, video: Tensor, depth: Tensor | None = None, layers: int = 1, keep_time: bool = False
) -> Tensor:
    """Average the tokens of the last layers, then apply the final LayerNorm, as a classifier does.

    video: (B, C, T, H, W) or images (B, C, H, W). Returns (B, [layers,] [T',] D), without an axis for one layer and, unless
    `keep_time`, without one for time.
    """
    tokens = trunk.last_layers(video, depth, layers)  # (B, layers, N, D)
    if keep_time:
        per_slot = (video.shape[-2] // trunk.tubelet[1]) * (video.shape[-1] // trunk.tubelet[2])
        tokens = tokens.unflatten(2, (-1, per_slot))  # (B, layers, T', H' x W', D)
    pooled = trunk.norm(tokens.mean(-2))
    return pooled[:, 0] if layers == 1 else pooled


@dataclass(frozen=True)
class Part:
    """The features of a range of samples; fields as in `store.ARRAYS`."""

    features: np.ndarray
    index: np.ndarray
    times: np.ndarray  # NaN where there are none
    unreadable: list[str]


class PartBatch(NamedTuple):
    """A batch to embed: the part it belongs to, its requests, and the times of its windows."""

    part: int
    requests: Sequence[AnyRequest]
    times: list[tuple[float, float]]


def build_dataset(split: Split, trunk: VisionTransformer, config: FeatureConfig, max_pixels: int | None) -> ClipDataset:
    """Return the dataset whose batches `Embedder` takes."""
    frames = trunk.num_frames if split.dataset.kind == "video" else 1
    view = EvalView(trunk.image_size, config.crops if split.dataset.kind == "video" else 1)
    clip = ClipConfig(view, view.crops, frames, trunk.grid, clips=config.clips)
    configs: dict[str, ClipConfig] = {split.dataset.kind: clip}
    if config.stride is not None:
        return WindowDataset([split], configs, config.clip_duration, config.stride, max_pixels)
    return ClipDataset([split], configs, config.clip_duration, seed=0, training=False, max_pixels=max_pixels)


def part_batches(
    dataset: ClipDataset, parts: Iterable[int], config: FeatureConfig, unreadable: dict[int, list[str]]
) -> Iterator[PartBatch]:
    """Yield the batches of these parts, in order. A video too short for a window goes to `unreadable`, by part."""
    samples = len(dataset.splits[0])
    for part in parts:
        members = range(part * PART_SAMPLES, min((part + 1) * PART_SAMPLES, samples))
        if not isinstance(dataset, WindowDataset):
            size = max(1, BATCH_CLIPS // (config.clips * config.crops))
            for first in range(0, len(members), size):
                yield PartBatch(part, [Request(0, index, 0) for index in members[first : first + size]], [])
            continue
        size = max(1, BATCH_CLIPS // config.crops)
        for index in members:
            try:
                starts = dataset.starts(0, index)
            except VideoDecodeError as error:
                unreadable.setdefault(part, []).append(f"{dataset.splits[0].path(index)}: {error}")
                continue
            offset = (dataset.splits[0].segment(index) or (0.0, 0.0))[0]
            for first in range(0, len(starts), size):
                chosen = [offset + start for start in starts[first : first + size]]
                times = [(start, start + config.clip_duration) for start in chosen]
                yield PartBatch(part, [WindowRequest(0, index, first, len(chosen))], times)


def embed_parts(
    embed: Embedder, dataset: ClipDataset, parts: Sequence[int], loader: LoaderConfig
) -> Iterator[tuple[int, Part]]:
    """Yield each part with its features."""
    unreadable: dict[int, list[str]] = {}
    pending: deque[PartBatch] = deque()

    def requests() -> Iterator[list[AnyRequest]]:
        for batch in part_batches(dataset, parts, embed.config, unreadable):
            pending.append(batch)
            yield list(batch.requests)

    split, current, rows = dataset.splits[0], 0, Rows()
    for batch in load_batches(dataset, requests(), loader):
        planned = pending.popleft()
        while parts[current] != planned.part:
            yield parts[current], rows.finish(unreadable.get(parts[current], []))
            current, rows = current + 1, Rows()
        rows.add(embed, split, batch, planned.times)
    for part in parts[current:]:
        yield part, rows.finish(unreadable.get(part, []))
        rows = Rows()


class Rows:
    """The rows of a part so far."""

    def __init__(self) -> None:
        self.features: list[np.ndarray] = []
        self.index: list[np.ndarray] = []
        self.times: list[np.ndarray] = []
        self.unreadable: list[str] = []

    def add(self, embed: Embedder, split: Split, batch: Batch, times: list[tuple[float, float]]) -> None:
        self.unreadable += [f"{bad.path}: {bad.reason}" for bad in batch.bad]
        if not len(batch):
            return
        features = embed(batch)
        stored = features.astype(embed.config.dtype)
        if np.isfinite(features).all() and not np.isfinite(stored).all():
            raise UserError(
                f"Features up to {np.abs(features).max():.3g} do not fit into float16. Set --dtype float32."
            )
        index = batch.index.numpy()[:: len(batch) // len(features)]
        segments = split.segments(index)
        self.features.append(stored)
        self.index.append(index)
        self.times.append(
            np.array(times) if times else np.full((len(index), 2), np.nan) if segments is None else segments
        )

    def finish(self, unreadable: list[str]) -> Part:
        lost = list(dict.fromkeys(self.unreadable + unreadable))
        if not self.features:
            return Part(np.empty(0), np.empty(0, np.int64), np.empty((0, 2)), lost)
        features, index, times = map(np.concatenate, (self.features, self.index, self.times))
        return Part(features, index, times, lost)


def extract(
    embed: Embedder,
    split: Split,
    folder: Path,
    model: ModelRecord,
    loader: LoaderConfig,
    rank: int = 0,
    world_size: int = 1,
    max_pixels: int | None = None,
    track: Callable[[Iterable[None], int], Iterable[None]] = lambda parts, total: parts,
) -> SplitRecord:
    """Write the missing features of a split to `folder`; its record has `rows` if none are missing any more.

    Args:
        model: as in features.json.
        rank: this process, of `world_size` that share the parts.
        track: shows the progress of an iterator with a number of items.

    Raises UserError for a folder with features of another model, of other views or of changed lists, and if no video of a split
    can be read.
    """
    key, target = f"{split.name}/{split.which}", folder / split.name / split.which
    record = claim(folder, model, embed.config, split)
    if record.rows is not None:
        return record
    files = [part_file(target, part) for part in range(-(-len(split) // PART_SAMPLES))]
    missing = [part for part in range(rank, len(files), world_size) if not files[part].exists()]
    dataset = build_dataset(split, embed.trunk, embed.config, max_pixels)

    def write_parts() -> Iterator[None]:
        for part, content in embed_parts(embed, dataset, missing, loader):
            files[part].parent.mkdir(exist_ok=True)
            with replace_atomically(files[part]) as file:
                arrays: dict[str, Any] = vars(content) | {"unreadable": np.array(content.unreadable, dtype=str)}
                np.savez(file, **arrays)
            yield

    try:
        for _ in track(write_parts(), len(missing)):
            pass
    except FileNotFoundError:  # another process, with the same parts, has completed the split and removed them
        if read_header(folder).splits[key].rows is None:
            raise
    with file_lock(folder / ".lock"):
        record = read_header(folder).splits[key]
        if record.rows is None and all(file.exists() for file in files):
            record = join_parts(split, files, target, record)
            header = read_header(folder)
            write_header(folder, header.model_copy(update={"splits": header.splits | {key: record}}))
            shutil.rmtree(files[0].parent, ignore_errors=True)
    return record


def part_file(target: Path, part: int) -> Path:
    return target / PARTS / f"{part:06d}.npz"


def claim(folder: Path, model: ModelRecord, config: FeatureConfig, split: Split) -> SplitRecord:
    """Add a split to features.json, or check that it is the same; return its record. Raises UserError as `extract`."""
    key = f"{split.name}/{split.which}"
    try:
        (folder / key).mkdir(parents=True, exist_ok=True)
        lock = file_lock(folder / ".lock")
        with lock:
            if not (folder / HEADER).exists():
                write_header(folder, Header(model=model, config=config))
            header = read_header(folder)
            data = {what: file_digest(Path(file)) for what, file in split.files().items()} | describe_dataset(split)
            saved = header.splits.get(key)
            differing = [
                *differences({"sha256": header.model["sha256"]}, {"sha256": model["sha256"]}),
                *differences(header.config.model_dump(), config.model_dump()),
                *(differences(saved.data, data) if saved else []),
            ]
            if differing:
                raise UserError(
                    f"{folder} holds features of another model, other views or lists: {truncate_list(differing, 3, '; ')}. Set "
                    "another --out, or delete the folder."
                )
            record = saved or SplitRecord(samples=len(split), data=data)
            if saved is None:
                write_header(folder, header.model_copy(update={"splits": header.splits | {key: record}}))
                names = split.dataset.names() if split.dataset.class_names else []
                if names:
                    (folder / "class_names").mkdir(exist_ok=True)
                    write_atomically(
                        folder / "class_names" / f"{split.name}.txt", "".join(f"{name}\n" for name in names)
                    )
    except OSError as error:
        raise UserError(f"--out must be a folder that can be written to, got {folder}: {error}.") from error
    return record


def describe_dataset(split: Split) -> dict[str, str]:
    """Return what else decides which frames are read, and what labels mean."""
    entry = split.dataset
    names = ("kind", "prefix", "remove_prefix", "suffix", "remove_suffix", "fps", "frame_pattern")
    facts = {name: str(getattr(entry, name)) for name in names if getattr(entry, name) not in ("", None)}
    if entry.label_type != "class":  # features of earlier versions lack it
        facts["label_type"] = entry.label_type
    classes = entry.names() if entry.class_names else []
    digest = hashlib.sha256("\n".join(classes).encode()).hexdigest()
    return facts | ({"class_names": digest} if classes else {})


def join_parts(split: Split, files: Sequence[Path], target: Path, record: SplitRecord) -> SplitRecord:
    """Write the arrays of a split from its parts, one at a time in memory."""
    rows, unreadable, shape, dtype, timed = 0, list[str](), tuple[int, ...](), np.dtype(np.float32), False
    for file in files:
        try:
            with np.load(file, allow_pickle=False) as part:
                if len(part["index"]):
                    shape, dtype = part["features"].shape[1:], part["features"].dtype
                rows += len(part["index"])
                unreadable += part["unreadable"].tolist()
                timed = timed or bool(np.isfinite(part["times"]).any())
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            file.unlink()
            raise UserError(f"{file} was damaged ({error}), and is removed. Run the same command again.") from None
    if not rows:
        shutil.rmtree(files[0].parent)  # so that the same command tries again
        raise UserError(
            f"None of the {len(split)} videos of {split.name}.{split.which} can be read: {truncate_list(unreadable, 2)}."
        )
    label = np.asarray(split.label(0))
    longest = max(len(split.path(index)) for index in range(len(split)))
    shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "features": (dtype, shape), "index": (np.dtype(np.int64), ()), "labels": (label.dtype, label.shape),
        "paths": (np.dtype(f"U{longest}"), ()), "times": (np.dtype(np.float64), (2,)),
    }  # fmt: skip
    written = ["features", *(what for what in ARRAYS if what != "times" or timed)]
    temporary = {what: target / f".{what}.npy.tmp" for what in written}
    arrays = {
        what: np.lib.format.open_memmap(temporary[what], "w+", shapes[what][0], (rows, *shapes[what][1]))
        for what in written
    }
    first = 0
    for file in files:
        with np.load(file, allow_pickle=False) as part:
            index = part["index"]
            place = slice(first, first + len(index))
            if len(index):
                content = {"features": part["features"], "index": index, "times": part["times"]}
                content["labels"] = np.array([split.label(i) for i in index.tolist()])
                content["paths"] = np.array([split.path(i) for i in index.tolist()])
                for what in written:
                    arrays[what][place] = content[what]
            first = place.stop
    for what in written:
        arrays[what].flush()
        os.replace(temporary[what], target / f"{what}.npy")
    sync_folder(target)
    return record.model_copy(update={"rows": rows, "unreadable": unreadable})
