"""Checks of data, weights, disk and memory before a run starts."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from omnivision.config.schema import Settings
from omnivision.data.catalog import Dataset, Split, is_shifted
from omnivision.data.sampling import EpochPlan, SourcePlan
from omnivision.utils.errors import UserError
from omnivision.utils.io import BEST, LATEST, PARTS, PREVIOUS, require_weights

NUM_PROBED_FILES = 16  # of each split, before a run
MIN_CLIPS_TO_MIX = 1000  # that the paper's fine-tuning does not learn from
NUM_LIVE_CHECKPOINTS = (
    3  # there are so many at once while one is saved: the newest, the one before, the one that is written
)
Result = TypeVar("Result")


def collect_errors(actions: Iterable[Callable[[], Result]]) -> list[Result]:
    """Run several checks and return their results. Raises one UserError with the problems of all."""
    made: list[Result] = []
    problems: list[str] = []
    for action in actions:
        try:
            made.append(action())
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError.of(problems)
    return made


def check_run(settings: Settings, *more: Callable[[Settings], None]) -> tuple[list[Split], list[Split]]:
    """Check everything that can be checked before a run starts, and `more`; return its train and val splits.

    Raises one UserError with all problems.
    """
    checks: list[Callable[[], Any]] = [functools.partial(check_splits, settings)]
    checks += [functools.partial(check, settings) for check in (*more, check_pretrained, check_disk_space)]
    splits: tuple[list[Split], list[Split]] = collect_errors(checks)[0]
    return splits


def check_splits(settings: Settings) -> tuple[list[Split], list[Split]]:
    """Open the run's train and val splits and probe some of their files.

    Raises UserError as `open_splits` and `epoch_plan`, where no file exists, and for folders with several series of frames.
    """
    train, val = open_splits(settings)
    if train:
        epoch_plan(settings, train)
    # The nodes of a cluster may see the files: `run_warnings` then warns.
    problems = [] if settings.submitit.use_cluster else file_warnings(train + val)
    problems += series_problems(train + val)
    if problems:
        raise UserError.of(problems)
    return train, val


def datasets_of(settings: Settings) -> list[Dataset]:
    """The catalog's entries of the run's sources."""
    sources = settings.trainer.data.sources
    return [Dataset(name=name, **source.model_dump()) for name, source in sources.items()]


def open_splits(settings: Settings) -> tuple[list[Split], list[Split]]:
    """The train splits of all sources if the run trains, and the val splits of those that have one if it validates.

    Raises UserError for a file that is missing, has the wrong type or shape, or holds labels out of range, and for names of
    classes that are not as many as the classes.
    """
    config, sources = settings.trainer, settings.trainer.data.sources
    datasets = datasets_of(settings)
    if not datasets:
        raise UserError(
            "trainer.data.sources is empty; expected at least one dataset. Choose a recipe with +trainer=..."
        )
    if "decoder" not in config.model:  # a classifier's
        collect_errors(dataset.names for dataset in datasets)
    validates = config.mode == "val" or (config.mode != "train_only" and config.val_epoch_freq is not None)
    wanted = [functools.partial(Split, dataset, "train") for dataset in datasets if config.mode != "val"]
    wanted += [
        functools.partial(Split, dataset, "val") for dataset in datasets if validates and dataset.val is not None
    ]
    opened = collect_errors(wanted)
    train, val = ([split for split in opened if split.which == which] for which in ("train", "val"))
    if "decoder" not in config.model:
        collect_errors(functools.partial(_require_labels, split) for split in opened)
    if validates and not val:
        raise UserError(
            f"The run is to validate (trainer.mode={config.mode}), but none of its sources ({', '.join(sources)}) has a val "
            "split. Give datasets.NAME.val.paths and .labels, or set trainer.mode=train_only."
        )
    return train, val


def _require_labels(split: Split) -> None:
    """Raises UserError for a split of which no sample has a label: nothing would be learnt, and nothing measured."""
    if not split.has_labels():
        where = f"datasets.{split.name}.{split.which}.labels"
        raise UserError(
            f"No sample of the {split.which} split of {split.name} has a label, and this stage learns from labels. Set "
            f"++{where}=FILE.npy, with numbers from 0 (-1 is ignored)."
        )


def series_problems(splits: list[Split]) -> list[str]:
    """Sentences about splits in which a folder of frames holds several series, and the catalog chooses none."""
    found: dict[str, str] = {}  # by dataset
    for split in splits:
        for path in filter(os.path.isdir, sample_paths(split) if split.dataset.kind == "video" else []):
            from omnivision.data.frames import SeveralSeriesError
            from omnivision.data.video import VideoDecodeError, open_video  # not above: it imports torch

            try:
                with open_video(path, frame_pattern=split.dataset.frame_pattern):
                    pass
            except SeveralSeriesError as error:
                found.setdefault(split.name, f"{path}: {error}. Set ++datasets.{split.name}.frame_pattern.")
            except VideoDecodeError:
                pass  # one bad sample; the run says so when it reads it
    return list(found.values())


def epoch_plan(settings: Settings, train: list[Split]) -> EpochPlan:
    """How an epoch goes through the sources. Raises UserError when one would not be seen, and for repeats of unknown ones."""
    trainer, data = settings.trainer, settings.trainer.data
    names = [split.name for split in train]
    if unknown := sorted(set(data.repeats) - set(names)):
        raise UserError(
            f"trainer.data.repeats names {', '.join(unknown)}; the sources are {', '.join(names)}. Change trainer.data.repeats."
        )
    sources = {}
    for split in train:
        batch, views, micro_batches = data.batch_size, data.views_per_clip, trainer.optim.accumulation_steps
        if split.dataset.kind != "video" and data.image is not None:
            batch, views, micro_batches = (
                data.image.batch_size,
                data.image.views_per_clip,
                data.image.accumulation_steps,
            )
        videos = batch * settings.launcher.num_nodes // views
        sources[split.name] = SourcePlan(len(split), videos, views, data.repeats.get(split.name, 1), micro_batches)
    return EpochPlan(sources, trainer.seed_value, trainer.limit_train_batches)


def check_pretrained(settings: Settings) -> None:
    """Raises UserError when the weights to start from are not there; what is in them is checked when they are read.

    A run that has a checkpoint goes on from that. What a job of the cluster is to bring first need not be there yet.
    """
    if awaits_dependency(settings):
        return
    if Path(settings.trainer.checkpoint.save_dir, LATEST).exists():
        return
    wanted = settings.pretrained_checkpoint_path
    sources = [wanted] if isinstance(wanted, str) else wanted or []
    collect_errors(functools.partial(require_weights, source) for source in sources)


def awaits_dependency(settings: Settings) -> bool:
    """Whether a job of the cluster has to end first, which may bring the weights that the run starts from."""
    return settings.submitit.use_cluster and settings.submitit.dependency is not None


def check_disk_space(settings: Settings) -> None:
    """Raises UserError for a run folder that cannot be written, or has no room for its checkpoints, and for shared memory that
    the data workers would fill. What is there of the run already counts as room.
    """
    if settings.trainer.mode != "val":
        collect_errors([lambda: _check_folder(settings), lambda: _check_shared_memory(settings)])


def _check_folder(settings: Settings) -> None:
    folder = Path(settings.trainer.checkpoint.save_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(
            f"The checkpoints are to go to {folder}, and {there} cannot be written. Expected a folder that can be made and "
            "written. Change launcher.experiment_log_dir (or trainer.checkpoint.save_dir)."
        )
    validates = settings.trainer.mode == "train" and settings.trainer.val_epoch_freq is not None
    count = NUM_LIVE_CHECKPOINTS + validates
    needed = count * checkpoint_bytes(settings)
    own = _taken_by([folder / LATEST, folder / PREVIOUS, folder / BEST, *folder.glob(f"{PARTS}*/*")])
    disk = shutil.disk_usage(there)
    free = disk.free + own
    if disk.total and free < needed:  # some file systems do not know
        raise UserError(
            f"The disk of {folder} has room for {free / 1e9:.2g} GB; expected {needed / 1e9:.2g} GB for {count} "
            f"checkpoints of about {needed / count / 1e9:.2g} GB: there are so many while one is saved. Make room, or "
            "change launcher.experiment_log_dir (or trainer.checkpoint.save_dir)."
        )


def _taken_by(files: Iterable[Path]) -> int:
    """Bytes of files, several names of one counted once."""
    found = [file.stat() for file in files if file.is_file()]
    return sum({status.st_ino: status.st_size for status in found}.values())


def _check_shared_memory(settings: Settings) -> None:
    """On a cluster the node's counts, which nobody can ask beforehand."""
    data, shared = settings.trainer.data, Path("/dev/shm")
    if settings.submitit.use_cluster or not data.num_workers or not shared.is_dir():
        return
    needed = settings.launcher.gpus_per_node * shared_memory_bytes(settings)
    if (free := shutil.disk_usage(shared).free) < needed:
        raise UserError(
            f"/dev/shm, through which data workers hand on their batches, has {free / 1e9:.2g} GB free; expected "
            f"{needed / 1e9:.2g} GB for {settings.launcher.gpus_per_node} x {data.num_workers} workers with {data.prefetch} "
            "batches each. Lower num_workers, trainer.data.prefetch or batch_size, or enlarge it (docker run --shm-size)."
        )


def shared_memory_bytes(settings: Settings) -> int:
    """What the batches that a process's workers prepare ahead take, and the one in use; pixels are uint8."""
    data, size = settings.trainer.data, settings.image_size
    batch = settings.clips_per_process * 3 * data.num_frames * size * size
    return (data.num_workers * data.prefetch + 1) * batch


def checkpoint_bytes(settings: Settings) -> int:
    """About what a checkpoint takes: weights, two moments of each that is trained, and the moving average, in float32."""
    count, trained = parameter_counts(settings)
    return 4 * (count + 2 * trained + (count if settings.trainer.ema_decay is not None else 0))


def held_bytes(settings: Settings) -> int:
    """About what a process holds all the time: what its checkpoint has, and the gradients."""
    held = checkpoint_bytes(settings) + 4 * parameter_counts(settings)[1]
    return held // (settings.processes if settings.trainer.distributed.strategy == "fsdp" else 1)


def host_memory() -> int:
    """Bytes of memory of this machine, or of the container that this process is in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # "max", or no such file
        return total


def parameter_counts(settings: Settings) -> tuple[int, int]:
    """About how many parameters a checkpoint has, and how many of them are trained: counted from the sizes of trunk and
    decoder, since no model is built on a login node.
    """
    trainer = settings.trainer
    trunk, decoder = trainer.model.get("trunk", {}), trainer.model.get("decoder")
    tubelet = trunk.get("tubelet", (2, 16, 16))
    pixels, width = 3 * tubelet[0] * tubelet[1] * tubelet[2], trunk.get("width", 768)
    count = transformer_parameters(width, trunk.get("depth", 12)) + (pixels + 1) * width
    trained = 0 if "trunk.*" in trainer.freeze or "num_models" in trainer.model else count
    if decoder is not None:
        inner = decoder.get("width", 384)
        added = transformer_parameters(inner, decoder.get("depth", 4)) + (width + pixels) * (inner + 1)
        count, trained = count + added, trained + added
    if "num_models" in trainer.model:
        count = 0  # what is averaged is not in it
    return count, trained


def transformer_parameters(width: int, depth: int) -> int:
    """Parameters of so many blocks: projections, a perceptron of four times the width, norms, biases."""
    return depth * (12 * width * width + 13 * width)


def spread_indices(split: Split, count: int) -> list[int]:
    """At most `count` samples of a split, spread over it."""
    return sorted({len(split) * part // count for part in range(count)})


def sample_paths(split: Split) -> list[str]:
    """Paths of some files of a split."""
    return [split.path(index) for index in spread_indices(split, NUM_PROBED_FILES)]


def describe_split(split: Split) -> str:
    """Name, number of samples, and the rate at which sampled folders of frames are read; the catalog may leave it out."""
    frames = any(map(os.path.isdir, sample_paths(split) if split.dataset.kind == "video" else []))
    rate = f", folders of frames at {split.dataset.fps:g} a second (datasets.{split.name}.fps)" if frames else ""
    return f"{split.name}, {split.which}: {len(split)} samples{rate}"


def run_warnings(settings: Settings, train: list[Split], val: list[Split]) -> list[str]:
    """What a run and trainer.mode=dry warn about before the start: settings that are allowed, and may be a mistake."""
    warnings = file_warnings(train + val) if settings.submitit.use_cluster else []
    warnings += worker_warnings(settings) + recipe_warnings(settings, train)
    if "decoder" not in settings.trainer.model:
        warnings += label_warnings(train) + shift_warnings(train, val)
    if train:
        plan = epoch_plan(settings, train)
        warnings += mixing_warnings(settings, plan) + ema_warnings(settings, plan)
    return warnings


def worker_warnings(settings: Settings) -> list[str]:
    """A sentence when more data workers are asked for than this machine has cores; of a cluster's nodes nobody knows."""
    workers = settings.launcher.gpus_per_node * settings.trainer.data.num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if settings.submitit.use_cluster or workers <= cores:
        return []
    return [f"{workers} data workers share {cores} cores, and get in one another's way. Set num_workers lower."]


def mixing_warnings(settings: Settings, plan: EpochPlan) -> list[str]:
    """Warn about sources of which a process gets one video a step: mixup and CutMix find no other to mix it with."""
    if not _mixes(settings):
        return []
    alone = [name for name, source in plan.sources.items() if source.videos == settings.processes]
    return [
        f"Each process gets one video of {name} a step, so that mixup and CutMix (trainer.task.mixing) have no other to mix it "
        "with and are lost. Raise batch_size, or lower launcher.gpus_per_node."
        for name in alone
    ]


def _mixes(settings: Settings) -> bool:
    mixing = settings.trainer.task.get("mixing")
    return mixing is not None and mixing.get("prob") != 0


def ema_warnings(settings: Settings, plan: EpochPlan) -> list[str]:
    """Warn about an EMA decay that the warm-up (`optim/ema.py`) does not reach before the run ends."""
    decay, steps = settings.trainer.ema_decay, plan.steps * settings.trainer.max_epochs
    if decay is None or 9 / (10 + steps) <= 1 - decay:
        return []
    fitting = 1 - float(f"{10 / (10 + steps):.2g}")
    return [
        f"trainer.ema_decay is {decay:g}, which the warm-up of the decay does not reach in the {steps} steps of this run: it "
        f"ends at {(1 + steps) / (10 + steps):.4g}. Set trainer.ema_decay={fitting:.6g} or less, or train longer."
    ]


def file_warnings(splits: list[Split]) -> list[str]:
    """Sentences about splits of which none of some files, spread over them, is there."""
    found = []
    for split in splits:
        paths = sample_paths(split)
        if not any(Path(path).exists() for path in paths):
            found.append(
                f"None of the {len(paths)} sampled files of {split.name} ({split.which}) exists, e.g. {paths[0]}. Change "
                f"datasets.{split.name}.prefix, unless only the nodes of a cluster see the files."
            )
    return found


def label_warnings(train: list[Split]) -> list[str]:
    """Sentences about labels that are allowed and may be a mistake: classes that no sample has, sources without labels."""
    found = []
    for split in train:
        missing = [label for label, count in enumerate(split.label_counts()) if count == 0]
        if missing:
            shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            found.append(
                f"{split.name}: {len(missing)} of {split.dataset.num_classes} classes have no training sample ({shown}); the "
                "head has a place for each."
                + (" Do the labels start at 1? They must start at 0." if missing == [0] else "")
            )
    return found


def shift_warnings(train: list[Split], val: list[Split]) -> list[str]:
    """Warn about sources whose labels start at 0 in one split and at 1 in the other."""
    used = {split: [label for label, count in enumerate(split.label_counts()) if count] for split in train + val}
    return [
        f"{split.name}: labels start at {min(used[split])} in train and at {min(used[other])} in val, so the same number may "
        f"mean different classes. They must start at 0. Change datasets.{split.name}.train.labels or val.labels."
        for split in train
        for other in val
        if split.name == other.name and is_shifted(used[split], used[other])
    ]


def recipe_warnings(settings: Settings, train: list[Split]) -> list[str]:
    """Sentences about learning rates for another batch, and about few clips for the paper's fine-tuning."""
    if settings.trainer.mode == "val":
        return []
    return _rate_warnings(settings) + _few_clips_warnings(settings, sum(map(len, train)))


def _rate_warnings(settings: Settings) -> list[str]:
    optim, batch = settings.trainer.optim, settings.clips_per_step
    if settings.lr is not None or optim.nominal_batch is None:
        return []
    fitting = optim.nominal_batch / batch
    ratio = fitting / optim.lr_scale_factor
    if 0.499 < ratio < 2.001:
        return []
    return [
        f"the learning rates are for batches of {optim.nominal_batch} clips, and a batch has {batch}: with lr_scale_factor="
        f"{optim.lr_scale_factor:g} they are {ratio:.3g} times what fits this batch. Set lr_scale_factor={fitting:g}, or lr to "
        "the peak for this batch."
    ]


def _few_clips_warnings(settings: Settings, clips: int) -> list[str]:
    trainer = settings.trainer
    if not 0 < clips < MIN_CLIPS_TO_MIX or not _mixes(settings) or trainer.freeze or "num_models" in trainer.model:
        return []
    return [
        f"{clips} training clips are few for the paper's fine-tuning, which mixes them (mixup and CutMix): "
        "+experiments=omnimae/small_data_ft fits better."
    ]
