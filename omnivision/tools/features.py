"""`omnivision features`: one frozen pass of a trunk over datasets or videos."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter

from omnivision.tools.arguments import Flag, FramePattern, FrameRate, Seconds, Workers, at_least, resolve_fps
from omnivision.tools.predict import Device, TrustTargets
from omnivision.tools.workers import track
from omnivision.utils.errors import UserError
from omnivision.utils.io import run_name

if TYPE_CHECKING:
    from omnivision.data.catalog import Split
    from omnivision.probing.store import FeatureConfig, ModelRecord, SplitRecord
    from omnivision.tools.video_model import VideoModel

VIDEOS = "videos"  # the dataset's name for videos given by path


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where datasets are, and on what a model runs over them.

    Attributes:
        catalog: Files with more datasets, as `omnivision prepare --catalog` writes them.
        data_root: The folder that paths in the catalog start with (default: the run's).
        bfloat16: Multiply matrices in bfloat16, which is faster on GPUs.
    """

    catalog: Annotated[list[Path] | None, Parameter(consume_multiple=True, metavar="FILE")] = None
    data_root: Annotated[str | None, Parameter(metavar="DIR")] = None
    bfloat16: Flag = False
    workers: Workers = None
    device: Device = "cpu"
    trust_targets: TrustTargets = None

    @property
    def num_workers(self) -> int:
        """Data workers: by default one per core beside this process, at most 16."""
        return min(16, max(1, len(os.sched_getaffinity(0)) - 1)) if self.workers is None else self.workers


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """Which views of a video count.

    Attributes:
        clips: Clips per video, spread over it.
        crops: Crops per clip.
    """

    clips: Annotated[int, at_least(1, 1000)] = 2
    crops: Literal[1, 3] = 3


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """What `features` computes.

    Attributes:
        split: Which splits of a dataset (default: those that it has).
        window: Instead of clips, windows of this length that slide over each video, with a row for each.
        stride: Time from one window to the next (default: the window's length).
        layers: How many of the last layers.
        keep_time: Average tokens only over space: features have an axis of time slots.
        dtype: Of the features.
    """

    split: Annotated[list[Literal["train", "val"]] | None, Parameter(consume_multiple=True)] = None
    window: Seconds = None
    stride: Seconds = None
    layers: Annotated[int, at_least(1)] = 1
    keep_time: Flag = False
    dtype: Literal["float32", "float16"] = "float32"
    fps: FrameRate = None
    frame_pattern: FramePattern = None


DATA, VIEWS, _WHAT = DataOptions(), ViewOptions(), FeatureOptions()


def features(
    checkpoint: str,
    data: Annotated[list[str], Parameter(name="DATA")],
    /,
    *,
    out: Annotated[Path, Parameter(metavar="DIR")],
    what: FeatureOptions = _WHAT,
    views: ViewOptions = VIEWS,
    options: DataOptions = DATA,
) -> int:
    """Compute features of videos with the trunk of a trained model.

    Write one vector per video (or window) as memory-mapped .npy files, with paths, labels and class names. Run the same command
    again to complete an interrupted one. Several processes share the work: `srun omnivision features ...` or torchrun.

    Args:
        checkpoint: A run directory (its best checkpoint) or a file, of any stage.
        data: Datasets of the catalog, by name; or videos, or folders of frames.
        out: The folder to write to. All features in it are of one model and the same views.
    """
    model = load_on_rank(checkpoint, options)
    if what.window is not None and views.clips != VIEWS.clips:
        raise UserError("--clips is for features of whole videos. Leave --clips or --window out.")
    config = with_options(feature_config(model, views, options), what, model)
    splits = list(open_data(data, out, model.path, options, what, what.split or ()))
    incomplete = []
    for key, record in extract_all(model, splits, out, config, options).items():
        if record.rows is None:
            incomplete.append(key)
            continue
        lost = f", {len(record.unreadable)} unreadable (see features.json; another --out tries them again)"
        lost = lost if record.unreadable else ""
        print(f"{out}/{key}: {record.rows} rows of {record.samples} videos{lost}")
    if incomplete and process_position()[1] == 1:
        raise UserError(f"{out} lacks parts of {', '.join(incomplete)}. Run the same command again.")
    return 0


def process_position() -> tuple[int, int, int]:
    """Return rank, world size and local rank: of a job step started by srun, of torchrun, or of a single process."""
    for names in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, which srun may have started
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        if all(name in os.environ for name in names):
            rank, world_size, local_rank = (int(os.environ[name]) for name in names)
            return rank, world_size, local_rank
    return 0, 1, 0


def load_on_rank(checkpoint: str, options: DataOptions) -> VideoModel:
    """Load a model; with several processes, --device cuda is each one's own GPU."""
    import torch

    from omnivision.tools.video_model import load

    _, world_size, local_rank = process_position()
    device = options.device
    if device == "cuda" and world_size > 1:  # SLURM may show each task only its own
        device = f"cuda:{local_rank % max(1, torch.cuda.device_count())}"
    return load(checkpoint, device, options.trust_targets or [])


def feature_config(model: VideoModel, views: ViewOptions, options: DataOptions) -> FeatureConfig:
    """Return the configuration of a video's features, averaged over its views."""
    from omnivision.probing.store import FeatureConfig

    autocast = "bfloat16" if options.bfloat16 else None
    return FeatureConfig(
        clips=views.clips, crops=views.crops, clip_duration=model.config.clip_duration, autocast=autocast
    )


def with_options(config: FeatureConfig, what: FeatureOptions, model: VideoModel) -> FeatureConfig:
    """Return a configuration with the layers, time slots and windows asked for.

    Raises UserError for options that do not go together.
    """
    if what.stride is not None and what.window is None:
        raise UserError("--stride needs --window. Set --window SECONDS, or leave --stride out.")
    if what.layers > (depth := len(model.trunk.blocks)):
        raise UserError(f"--layers must be at most {depth}, the depth of {model.path}, got {what.layers}.")
    changes: dict[str, Any] = {"layers": what.layers, "keep_time": what.keep_time, "dtype": what.dtype}
    if what.window is not None:
        changes |= {"clips": 1, "clip_duration": what.window, "stride": what.stride or what.window}
    return config.model_copy(update=changes)


def extract_all(
    model: VideoModel, splits: Sequence[Split], out: Path, config: FeatureConfig, options: DataOptions
) -> dict[str, SplitRecord]:
    """Extract this process's part of the features; return the record of each split by "<dataset>/<split>"."""
    from omnivision.data.loader import LoaderConfig
    from omnivision.probing.extract import Embedder, extract

    rank, world_size, _ = process_position()
    identity: ModelRecord = {
        "name": run_name(model.path),
        "sha256": model.origin.sha256,
        "checkpoint": model.origin.checkpoint,
    }
    loader = LoaderConfig(options.num_workers, pin_memory=model.device.type == "cuda")
    embed, records = Embedder(model.trunk, model.device, config), {}
    for split in splits:
        key = f"{split.name}/{split.which}"
        show = functools.partial(track, what=f"features of {key}")
        records[key] = extract(embed, split, out, identity, loader, rank, world_size, track=show)
    return records


def open_data(
    data: Sequence[str],
    out: Path,
    checkpoint: Path,
    options: DataOptions,
    what: FeatureOptions = _WHAT,
    splits: Sequence[Literal["train", "val"]] = (),
) -> Iterator[Split]:
    """Yield the wanted `splits` (default: all) of the datasets named in `data`, and one for all videos in it, whose list goes
    to `out`.

    Raises UserError for unknown names.
    """
    from omnivision.config.catalog import Catalog
    from omnivision.data.catalog import Dataset, Split, load_array
    from omnivision.utils.io import replace_atomically

    run_config = checkpoint.parent.parent / "config.yaml"
    catalog = Catalog([*([run_config] if run_config.is_file() else []), *(options.catalog or [])], options.data_root)
    names = [name for name in dict.fromkeys(data) if name in catalog.names or not os.path.exists(name)]
    for name in names:
        dataset = Dataset(name=name, **catalog[name].model_dump())
        which = splits or [split for split in ("train", "val") if getattr(dataset, split) is not None]
        try:
            yield from [Split(dataset, split) for split in which]
        except UserError as error:
            raise UserError(f"{error} Here: --data-root FOLDER, or --catalog FILE with other entries.") from None
    if videos := [os.path.abspath(path) for path in dict.fromkeys(data) if path not in names]:
        rate = resolve_fps(what.fps, videos)
        file = out / VIDEOS / "list.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and load_array(str(file), "videos").tolist() != videos:
            raise UserError(f"{out} holds features of other videos ({file}). Set another --out.")
        with replace_atomically(file) as opened:
            np.save(opened, np.array(videos), allow_pickle=False)
        lists = {"paths": str(file)}
        yield Split(Dataset(name=VIDEOS, fps=rate, frame_pattern=what.frame_pattern, val=lists), "val")  # type: ignore[arg-type]
