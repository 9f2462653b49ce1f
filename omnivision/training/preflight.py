"""Checks of objects, data, weights, disk and memory before a run starts, and warnings about likely mistakes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from omnivision.checkpoint.state_dict_file import resolve_checkpoint
from omnivision.config.cross_validate import has_decoder
from omnivision.config.schema import Settings
from omnivision.data.catalog import Split, labels_off_by_one
from omnivision.data.frames import SeveralSeriesError, read_image
from omnivision.data.sampling import EpochPlan, sample_duration
from omnivision.data.video import VideoDecodeError, open_video
from omnivision.training import build
from omnivision.training.online_eval import require_trunk
from omnivision.utils.errors import UserError, collect_problems, truncate_list
from omnivision.utils.io import BEST, LATEST, PREVIOUS, SHARDS_PREFIX

NUM_PROBED_FILES = 16  # per split: check whether they exist
NUM_OPENED_FILES = 4  # of these: check whether they can be read, and are long enough
MIN_CLIPS_TO_MIX = 1000  # with fewer clips, the paper's augmentation underfits
NUM_LIVE_CHECKPOINTS = 3  # while saving: the newest, the previous one, and the one being written


def check_run(settings: Settings, *more: Callable[[Settings], object]) -> tuple[list[str], list[str], build.Splits]:
    """Run all checks that need no training, then the extra checks in `more`; return problems, warnings and open splits."""
    problems: list[str] = []
    warnings: list[str] = []
    train, val = collect_problems(problems, build.open_splits, settings) or ([], [])
    plan = collect_problems(problems, build.build_epoch_plan, settings, train) if train else None
    for split in train + val:
        warnings += collect_problems(problems, probe_samples, settings, split) or []
    for check in (
        *more,
        check_pretrained,
        build.resolve_class_names,
        build.build_task,
        build.check_views_and_masks,
        build.build_online_eval,
    ):
        collect_problems(problems, check, settings)
    model = collect_problems(problems, build.build_meta_model, settings)
    if model is not None:
        collect_problems(problems, build.build_optimizer, settings, model)
        if settings.trainer.online_eval.sources:
            collect_problems(problems, require_trunk, model)
        if settings.trainer.mode != "val":
            collect_problems(problems, check_disk_space, settings, model)
    warnings += run_warnings(settings, train, val, plan)
    return list(dict.fromkeys(problems)), warnings, (train, val)


def sample_indices(split: Split, count: int) -> list[int]:
    """Return at most `count` sample indices, spread over a split."""
    return sorted({len(split) * part // count for part in range(count)})


def sample_paths(split: Split) -> list[str]:
    """Return the paths of some files of a split."""
    return [split.path(index) for index in sample_indices(split, NUM_PROBED_FILES)]


def describe_split(split: Split) -> str:
    """Describe a split: name, number of samples, and the frame rate if sampled files are frame folders."""
    frames = any(map(os.path.isdir, sample_paths(split) if split.dataset.kind == "video" else []))
    rate = f", frame folders at {split.dataset.fps:g} frames per second (datasets.{split.name}.fps)" if frames else ""
    return f"{split.name}, {split.which}: {len(split)} samples{rate}"


def probe_samples(settings: Settings, split: Split) -> list[str]:
    """Check that sampled files of a split exist and, for a new run, open a few; return warnings.

    Warns about unreadable files and about clips with fewer frames than num_frames. Raises UserError where no file exists
    (with use_cluster, warns instead: the nodes may mount them), where none is readable, and for folders of several
    series of frames.
    """
    data, name = settings.trainer.data, f"datasets.{split.name}"
    what = f"sampled files of {split.name} ({split.which})"
    indices = sample_indices(split, NUM_PROBED_FILES)
    existing = [index for index in indices if os.path.exists(split.path(index))]
    if not existing:
        problem = f"None of the {len(indices)} {what} exists, e.g. {split.path(indices[0])}. Set {name}.prefix."
        if settings.submitit.use_cluster:
            return [f"{problem} Ignore this if only the compute nodes mount the data."]
        raise UserError(problem)
    warnings, missing = [], sorted({*indices} - {*existing})
    if len(missing) > data.bad_sample_budget * len(indices):
        warnings.append(
            f"{len(missing)} of {len(indices)} {what} do not exist, e.g. {split.path(missing[0])}. A run stops once the "
            "fraction of missing or unreadable files exceeds "
            f"trainer.data.bad_sample_budget={data.bad_sample_budget:g}. Check {name}.prefix, and that the data is mounted; "
            "omnivision check-data lists all."
        )
    if Path(settings.trainer.checkpoint.save_dir, LATEST).exists():
        return warnings
    bad: list[str] = []
    frames: list[tuple[int | None, str]] = []
    for index in dict.fromkeys([*existing[:: len(existing) // NUM_OPENED_FILES or 1], *existing]):
        if frames and len(frames) + len(bad) >= NUM_OPENED_FILES:  # look further only while none is readable
            break
        path = split.path(index)
        try:
            frames.append((_clip_frames(settings, split, index), path))
        except SeveralSeriesError as error:
            raise UserError(f"{path}: {error}. Set ++{name}.frame_pattern.") from None
        except VideoDecodeError as error:
            bad.append(f"{path}: {error}")
    if not frames:
        raise UserError(
            f"None of the {len(existing)} {what} can be read, e.g. {bad[0]}. Check {name}.prefix, {name}.{split.which}.paths "
            "and .segments with omnivision check-data."
        )
    if bad:
        warnings.append(
            f"{len(bad)} of {len(frames) + len(bad)} {what} cannot be read: {truncate_list(bad, separator='; ')}. A run "
            "replaces them, up to trainer.data.bad_sample_budget; omnivision check-data lists all."
        )
    if short := [(count, path) for count, path in frames if count is not None and count < data.num_frames]:
        count, path = min(short)
        warnings.append(
            f"{len(short)} of {len(frames)} {what} have fewer than num_frames={data.num_frames} frames in "
            f"{data.clip_duration:g} s, so that frames repeat: {count} in {path}. Lower num_frames or raise clip_duration."
        )
    return warnings


def _clip_frames(settings: Settings, split: Split, index: int) -> int | None:
    """Return the approximate frames of a clip in a video; None for images. Raises VideoDecodeError for an unreadable file."""
    path = split.path(index)
    dataset = split.dataset
    data = settings.trainer.data
    if dataset.kind != "video":
        read_image(path, data.max_pixels)
        return None
    with open_video(path, fps=dataset.fps, max_pixels=data.max_pixels, frame_pattern=dataset.frame_pattern) as video:
        seconds = min(data.clip_duration, sample_duration(video.duration, split.segment(index)))
        return round((video.mean_rate or video.info().frames / max(video.duration, 1e-9)) * seconds)


def check_pretrained(settings: Settings) -> None:
    """Raise UserError when the weights to start from are missing; their contents are checked on loading.

    A run that has a checkpoint resumes from it. With a dependency, weights may not exist yet.
    """
    if awaits_dependency(settings) or Path(settings.trainer.checkpoint.save_dir, LATEST).exists():
        return
    pretrained = settings.pretrained_checkpoint_path
    problems: list[str] = []
    for path in [pretrained] if isinstance(pretrained, str) else pretrained or []:
        collect_problems(problems, resolve_checkpoint, path)
    if problems:
        raise UserError.from_problems([f"pretrained_checkpoint_path: {problem}" for problem in problems])


def awaits_dependency(settings: Settings) -> bool:
    """Return whether another job must end first, which may write the weights that the run starts from."""
    return settings.submitit.use_cluster and settings.submitit.dependency is not None


def check_disk_space(settings: Settings, model: nn.Module) -> None:
    """Raise UserError if the run directory cannot be written, or its disk has no room for checkpoints."""
    folder, setting = Path(settings.trainer.checkpoint.save_dir).absolute(), "launcher.experiment_log_dir"
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        reason = "cannot be written" if parent.is_dir() else "is a file"
        raise UserError(f"{setting} must be a folder that can be written; {parent} {reason}. Set {setting}.")
    count = NUM_LIVE_CHECKPOINTS + (settings.trainer.mode == "train" and settings.trainer.val_epoch_freq is not None)
    needed, disk = count * checkpoint_bytes(settings, model), shutil.disk_usage(parent)
    files = [folder / LATEST, folder / PREVIOUS, folder / BEST, *folder.glob(f"{SHARDS_PREFIX}*/*")]
    own = {file.stat().st_ino: file.stat().st_size for file in files if file.is_file()}  # a file may have several names
    free = disk.free + sum(own.values())
    if disk.total and free < needed:  # some file systems report 0
        raise UserError(
            f"{folder} needs {needed / 1e9:.2g} GB for {count} checkpoints, but only {free / 1e9:.2g} GB are free. Make room, "
            f"or set {setting} (or trainer.checkpoint.save_dir)."
        )


def checkpoint_bytes(settings: Settings, model: nn.Module) -> int:
    """Return the approximate size of a checkpoint: weights, two moments per trained weight, and the EMA, in float32."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ema = trained if settings.trainer.ema_decay is not None else 0
    return 4 * (sum(tensor.numel() for tensor in model.state_dict().values()) + 2 * trained + ema)


def memory_per_rank(settings: Settings, model: nn.Module) -> int:
    """Return the approximate memory that a rank always holds: its checkpoint and the gradients."""
    held = checkpoint_bytes(settings, model) + 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return held // (settings.world_size if settings.trainer.distributed.strategy == "fsdp" else 1)


def host_memory() -> int:
    """Return the memory (bytes) of this machine, or of the container around this process."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # "max", or no such file
        return total


def check_device(settings: Settings, device: torch.device, local_rank: int = 0) -> None:
    """Raise UserError if a device cannot compile, or has too little memory for weights, gradients and optimizer."""
    if settings.trainer.compile and local_rank == 0:  # once per node
        check_compiler(device)
    is_gpu, meta = device.type == "cuda", build.build_meta_model(settings)
    memory = torch.cuda.get_device_properties(device).total_memory if is_gpu else host_memory()
    memory //= 1 if is_gpu else settings.launcher.gpus_per_node
    if meta is not None and (needed := memory_per_rank(settings, meta)) > memory:
        raise UserError(
            f"The model needs {needed / 1e9:.1f} GB for weights, gradients and optimizer state, but a rank has only "
            f"{memory / 1e9:.1f} GB here ({device}). Set a smaller trainer/model, or trainer.distributed.strategy=fsdp."
        )


def check_compiler(device: torch.device) -> None:
    """Compile a small function. Raises UserError if torch.compile does not work here."""
    from torch._dynamo.exc import TorchDynamoException  # imported lazily: it takes over a second

    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except TorchDynamoException as error:
        lines = str(error).splitlines()
        reason = next((line for line in lines if "fatal error" in line), lines[0])
        raise UserError(
            f"trainer.compile is true, but torch.compile does not work here: {reason}. It needs a C++ compiler and the headers "
            "of Python (Debian: apt-get install g++ python3-dev), on GPUs Triton. Install them, or set trainer.compile=false."
        ) from None


def run_warnings(settings: Settings, train: list[Split], val: list[Split], plan: EpochPlan | None) -> list[str]:
    """Warn about settings and labels that are valid but probably unintended."""
    workers = settings.launcher.gpus_per_node * settings.trainer.data.num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    warnings = []
    if not settings.submitit.use_cluster and workers > cores:
        warnings.append(f"{workers} data workers share {cores} cores and slow each other down. Lower num_workers.")
    warnings += recipe_warnings(settings, sum(map(len, train)))
    if not has_decoder(settings.trainer.model):
        warnings += label_warnings(train, val)
    if plan is not None:
        warnings += plan_warnings(settings, plan)
    return warnings


def plan_warnings(settings: Settings, plan: EpochPlan) -> Iterator[str]:
    """Warn about batches without a second video to mix with, and about an EMA decay that the warm-up does not reach."""
    for name, source in plan.sources.items():
        if _mixes(settings) and source.videos_per_step == settings.world_size:
            yield (
                f"Each rank gets one video of {name} per step, so mixup and CutMix (trainer.task.mixing) have nothing to mix "
                "it with and do nothing. Raise batch_size, or lower launcher.gpus_per_node."
            )
    decay, steps = settings.trainer.ema_decay, plan.steps * settings.trainer.max_epochs
    if decay is not None and 9 / (10 + steps) > 1 - decay:  # see optim/ema.py
        fitting = 1 - float(f"{10 / (10 + steps):.2g}")
        yield (
            f"trainer.ema_decay is {decay:g}, which the warm-up of the decay does not reach in the {steps} steps of this run: "
            f"it ends at {(1 + steps) / (10 + steps):.4g}. Set trainer.ema_decay={fitting:.6g} or less, or train longer."
        )


def _mixes(settings: Settings) -> bool:
    mixing = settings.trainer.task.get("mixing")
    return mixing is not None and mixing.get("prob") != 0


def label_warnings(train: list[Split], val: list[Split]) -> Iterator[str]:
    """Warn about classes without a training sample, and about labels that start at 0 in one split and at 1 in the other."""
    used = {split: [label for label, count in enumerate(split.label_counts()) if count] for split in train + val}
    for split in train:
        missing = [label for label, count in enumerate(split.label_counts()) if count == 0]
        if missing:
            yield (
                f"{split.name}: {len(missing)} of {split.dataset.num_classes} classes have no training sample "
                f"({truncate_list(missing)}); the head still has an output for each."
                + (
                    " Do the labels start at 1? They must start at 0."
                    if missing == [0] and split.label_type == "class"
                    else ""
                )
            )
        if split.label_type == "regression":
            yield from scale_warnings(split)
        if split.label_type == "multi_label" and not (split.labels() == 1).any():
            yield (
                f"{split.name}: no video of its {split.which} split shows any class (all labels are 0 or unknown), so there is "
                f"no mAP. Set datasets.{split.name}.{split.which}.labels."
            )
        for other in val if split.label_type == "class" else ():
            if split.name == other.name and labels_off_by_one(used[split], used[other]):
                yield (
                    f"{split.name}: labels start at {min(used[split])} in train and at {min(used[other])} in val, so the same "
                    "number may mean different classes. They must start at 0. Set "
                    f"datasets.{split.name}.train.labels or val.labels."
                )


def scale_warnings(split: Split) -> Iterator[str]:
    """Warn about targets that the catalog's means and deviations do not bring near 0 and 1."""
    labels, entry = split.labels().astype(np.float64), split.dataset
    names = entry.names() or [str(k) for k in range(labels.shape[1])]
    means, deviations = entry.label_mean or [0.0] * labels.shape[1], entry.label_std or [1.0] * labels.shape[1]
    # Other lengths are errors elsewhere.
    for name, column, mean, std in zip(names, labels.T, means, deviations, strict=False):
        own = column[np.isfinite(column)]
        if len(own) and (abs(own.mean() - mean) > std or not 0.2 < own.std() / std < 5):
            yield (
                f"{split.name}: target {name} has mean {own.mean():.4g} and standard deviation {own.std():.4g}; label_mean and "
                f"label_std in the catalog are {mean:.4g} and {std:.4g}, by which training standardizes it. Set "
                f"datasets.{split.name}.label_mean and label_std."
            )


def recipe_warnings(settings: Settings, clips: int) -> Iterator[str]:
    """Warn about learning rates for another batch, and about few `clips` for the paper's fine-tuning."""
    trainer = settings.trainer
    optim = settings.trainer.optim
    batch = settings.clips_per_step
    if trainer.mode == "val":
        return
    if settings.lr is None and optim.nominal_batch is not None:
        fitting = optim.nominal_batch / batch
        if not 0.499 < (ratio := fitting / optim.lr_scale_factor) < 2.001:
            yield (
                f"the learning rates are for batches of {optim.nominal_batch} clips, and a batch has {batch}: with "
                f"lr_scale_factor={optim.lr_scale_factor:g} they are {ratio:.3g} times what fits this batch. Set "
                f"lr_scale_factor={fitting:g}, or lr to the peak for this batch."
            )
    trains_all = not trainer.freeze and "num_models" not in trainer.model
    if 0 < clips < MIN_CLIPS_TO_MIX and _mixes(settings) and trains_all:
        yield (
            f"{clips} training clips are few for the paper's fine-tuning, which mixes them (mixup and CutMix): "
            "+experiments=omnimae/small_data_ft fits better."
        )
