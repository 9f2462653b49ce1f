"""Settings to objects."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import Tensor, nn

from omnivision.checkpoint.pretrained import (
    LoadReport,
    filter_state_dict,
    interpolate_pos_embed,
    read_several,
)
from omnivision.checkpoint.pretrained import load as load_weights
from omnivision.checkpoint.pretrained import read as read_weights
from omnivision.checkpoint.state_dict_file import StateDictFile, check_numbers
from omnivision.config.instantiate import PACKAGE, signature_of
from omnivision.config.schema import DataSettings, ImageSettings, InstantiateConfig, Settings
from omnivision.data.catalog import LabelSets, Split, label_sets
from omnivision.data.dataset import ClipConfig, ClipDataset
from omnivision.data.frames import read_image
from omnivision.data.loader import LoaderConfig, TrainData, ValData
from omnivision.data.sampling import sample_duration
from omnivision.data.video import VideoDecodeError, open_video
from omnivision.distributed.process_group import Dist, RankInfo
from omnivision.interop.merge import merge, read_sources
from omnivision.models.architecture import describe
from omnivision.models.average import AveragedClassifier
from omnivision.models.classifier import is_frozen
from omnivision.models.patches import token_grid
from omnivision.optim.groups import Group, ScheduledOptimizer, is_default, layer_decay_scales, parameter_groups
from omnivision.optim.schedules import Scaled, Schedule, peak
from omnivision.reporting.logs import BadSampleLedger
from omnivision.reporting.reporter import Reporter
from omnivision.reporting.run_directory import RunDir
from omnivision.training import flops as utilisation
from omnivision.training.preflight import (
    NUM_PROBED_FILES,
    datasets_of,
    epoch_plan,
    held_bytes,
    host_memory,
    open_splits,
    spread_indices,
)
from omnivision.training.trainer import RunContext, Trainer, amp_dtype
from omnivision.utils.errors import UserError, is_out_of_memory
from omnivision.utils.io import LATEST, run_name
from omnivision.utils.signals import StopSignal

POS_EMBED = "trunk.pos_embed"
NUM_OPENED_FILES = 4  # of each split, to find unreadable ones and clips that are too short


def build(target: InstantiateConfig, where: str, partial: bool = False, **more: Any) -> Any:
    """Instantiate a `_target_` with `more` arguments; with `partial` return a function that does.

    Raises UserError for a class that cannot be imported or built, whatever its code raises.
    """
    try:
        make = instantiate(target, _convert_="all", _partial_=partial or bool(more))
        return make(**more) if more else make
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, (InstantiationException, ImportError)) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if is_out_of_memory(cause):
            raise cause from None
        raise UserError(build_problem(cause, target["_target_"], where)) from error


def build_problem(cause: BaseException, target: str, where: str) -> str:
    """Message about an object that cannot be built, with the line of the user's code that raised."""
    module, _, name = target.rpartition(".")
    if module in sys.modules and name not in (known := vars(sys.modules[module])):
        near = difflib.get_close_matches(name, known, 1, cutoff=0)
        guess = f"; did you mean {module}.{near[0]}?" if near else "."
        return f"{where}._target_ is {target!r}, which does not exist{guess}"
    if isinstance(cause, ModuleNotFoundError) and f"{module}.".startswith(f"{cause.name}."):
        return (
            f"{where}._target_ is {target!r}, and Python finds no module {cause.name!r}. Put the folder that holds it on "
            f"PYTHONPATH, or correct {where}._target_."
        )
    frames = traceback.extract_tb(cause.__traceback__)
    theirs = [
        frame for frame in frames if not frame.filename.startswith((sys.prefix, sys.base_prefix, "<", str(PACKAGE)))
    ]
    place = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
    return (
        f"{where} ({target}) cannot be built: {type(cause).__name__}: {cause}{place}. Expected a class that can be "
        f"imported, and its arguments. Change {where}" + (", or the class." if place else ".")
    )


def process_group(settings: Settings, place: RankInfo) -> Dist:
    distributed = settings.trainer.distributed
    timeout = timedelta(minutes=distributed.timeout_minutes)
    return Dist(place, settings.trainer.accelerator, distributed.backend, timeout)


def labels(settings: Settings) -> LabelSets:
    """Heads and their numbers of classes, from the catalog, else from `video_labels`."""
    datasets = [
        dataset.model_copy(update={"num_classes": dataset.num_classes or settings.video_labels})
        for dataset in datasets_of(settings)
    ]
    return label_sets(datasets, settings.trainer.data.share_head)


def class_names(settings: Settings) -> list[list[str]]:
    """The names of the classes of each head, from the first source that names them all; none for a model without heads.

    Raises UserError for sources of one head that name its classes differently: their labels would mean different classes.
    """
    if "classes" not in signature_of(settings.trainer.model["_target_"]):
        return []
    sets = labels(settings)
    names: list[list[str]] = [[str(label) for label in range(count)] for count in sets.classes]
    sources = [dataset for dataset in datasets_of(settings) if dataset.class_names is not None]
    for dataset in reversed(sources):
        head, found = sets.head[dataset.name], dataset.names()
        if len(found) == len(names[head]):
            names[head] = found
    for dataset in sources:
        found, wanted = dataset.names(), names[sets.head[dataset.name]]
        # Sources of different label sets share a head where this is asked for, and then differ; but not in the order alone.
        if found != wanted and (not settings.trainer.data.share_head or sorted(found) == sorted(wanted)):
            label = next(label for label, name in enumerate(wanted) if found[label] != name)
            raise UserError(
                f"datasets.{dataset.name} shares a head with another source, and its class {label} is {found[label]!r}, there "
                f"{wanted[label]!r}. Expected the same names in the same order. Change datasets.{dataset.name}.class_names and "
                f"the labels (omnivision prepare --class-names), or datasets.{dataset.name}.label_set."
            )
    return names


def inference_config(settings: Settings) -> dict[str, Any]:
    """Settings of evaluation that `omnivision.load` needs."""
    average = settings.trainer.task.get("average", "logits")
    return {
        "clip_duration": settings.trainer.data.clip_duration,
        "class_names": class_names(settings),
        "average": average,
    }


def build_with_labels(settings: Settings, target: InstantiateConfig, where: str) -> Any:
    """Build a `_target_` with the classes and labels that its signature asks for."""
    wanted = signature_of(target["_target_"])
    more: dict[str, Any] = {}
    if "classes" in wanted:
        more["classes"] = labels(settings).classes
    if "labels" in wanted:
        more["labels"] = labels(settings)
    return build(target, where, **more)


def model(settings: Settings, device: str = "cpu") -> nn.Module:
    """The model, initialised from the seed; `trainer.freeze` applied."""
    torch.manual_seed(settings.trainer.seed_value)
    with torch.device(device):
        built = build_with_labels(settings, settings.trainer.model, "trainer.model")
    freeze(built, settings.trainer.freeze)
    return built


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Freeze the parameters that match a pattern. Raises UserError for a pattern without a match, and if none is trained."""
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matches = fnmatch.filter(parameters, pattern)
        if not matches:
            raise UserError(
                f"trainer.freeze: the pattern {pattern!r} matches none of the {len(parameters)} parameters, named like "
                f"{next(iter(parameters))}. Correct it, or remove it."
            )
        for name in matches:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"trainer.freeze is {patterns}, which leaves nothing to train. Narrow it.")


def task(settings: Settings) -> Any:
    task = build_with_labels(settings, settings.trainer.task, "trainer.task")
    for name, earlier in (("epoch_metrics", "epoch_figures"), ("visualize", "pictures")):
        if not hasattr(task, name) and hasattr(task, earlier):  # a user's class that was written for an earlier release
            setattr(task, name, getattr(task, earlier))
    return task


def clip_cost(settings: Settings, model: nn.Module) -> utilisation.ClipFlops | None:
    """Cost of a training step for one clip; `model` is on the meta device. None for user classes that fail there."""
    data, size = settings.trainer.data, settings.image_size
    mask = None
    if data.mask is not None:
        grid = token_grid((data.num_frames, size, size), tuple(settings.trainer.model["trunk"]["tubelet"]))
        mask = build(data.mask, "trainer.data.mask")(grid, np.random.default_rng(0))
    shape = data.num_frames, size, size
    try:
        return utilisation.clip_cost(task(settings), model, shape, mask, next(iter(data.sources)))
    except Exception:
        if settings.trainer.trust_targets:
            return None
        raise


def peak_clips_per_second(settings: Settings, device: torch.device) -> float | None:
    """Clips per second of a device at its peak; None if that is unknown, or if clips differ in size."""
    peak = utilisation.peak_flops(device, amp_dtype(settings.trainer, device), settings.trainer.logging.peak_tflops)
    if peak is None or settings.images is not None:
        return None
    cost = clip_cost(settings, model(settings, device="meta"))
    return None if cost is None else peak / cost.step_flops


def pretrained(settings: Settings, model: nn.Module) -> list[LoadReport]:
    """Load `pretrained_checkpoint_path` into a model; return a report of its entries, or none without a path."""
    source = settings.pretrained_checkpoint_path
    if source is None:
        return []
    assert isinstance(source, str)  # a list is for an average
    weights = read_weights(source)
    if weights.architecture.get("kind") == "average":  # as the one model that it is
        merged = merge(weights.state, weights.architecture, read_sources(weights.sources, None))
        weights = dataclasses.replace(
            weights, state=merged.state, metadata={**weights.metadata, "architecture": merged.architecture}
        )
    report = load_weights(model, weights, settings.trainer.checkpoint, class_names(settings))
    if settings.trainer.mode == "val" and (lacking := [name for name in report.missing if name.startswith("heads.")]):
        raise UserError(
            f"trainer.mode=val evaluates {report.path}, but its heads were not loaded ({lacking[0]}). Expected a checkpoint of "
            "this model, taken whole: trainer/checkpoint=load_all."
        )
    return [report]


def load_averaged_checkpoints(settings: Settings, model: nn.Module) -> list[LoadReport]:
    """Load the source checkpoints of a learned average; return a report of each. Other models have none."""
    if not isinstance(model, AveragedClassifier):
        return []
    if settings.pretrained_checkpoint_path is None:
        raise UserError(
            "pretrained_checkpoint_path is null, and the model is an average of checkpoints. Expected a list of run folders or "
            "files, ++pretrained_checkpoint_path=[A,B], or one file with a list under ensemble_weights."
        )
    found = read_several(settings.pretrained_checkpoint_path)
    reports = [LoadReport(str(w.path), w.sha256, w.checkpoint) for w in found]
    states = [
        filter_state_dict(w.state, settings.trainer.checkpoint, report)
        for w, report in zip(found, reports, strict=True)
    ]
    taken = {f"trunk.{name}" for name in model.names}
    for state, report in zip(states, reports, strict=True):
        check_numbers(
            {name: tensor for name, tensor in state.items() if name in taken | {POS_EMBED}},
            f"pretrained_checkpoint_path: {report.path}: ",
        )
    model.load_sources(states, [report.path for report in reports])
    taken |= _take_positions(model, found, states, reports)
    for state, report in zip(states, reports, strict=True):
        report.loaded = sorted(taken)
        report.dropped |= dict.fromkeys(sorted(state.keys() - taken), "an average takes trunks alone")
    return reports


def _take_positions(
    model: AveragedClassifier, found: list[StateDictFile], states: list[dict[str, Tensor]], reports: list[LoadReport]
) -> set[str]:
    """Load the positional embedding of the sources, interpolated if needed; return its name, if they have one.

    Raises UserError when those of the sources differ.
    """
    if not all(POS_EMBED in state for state in states):
        return set()
    own = model.model.get_buffer(POS_EMBED)
    tables = [
        interpolate_pos_embed(POS_EMBED, state[POS_EMBED], model.model, weights, report)
        for state, weights, report in zip(states, found, reports, strict=True)
    ]
    # Some of another width come back as they are.
    if not all(t.shape == own.shape and torch.allclose(t.float(), tables[0].float(), atol=1e-3) for t in tables):
        raise UserError(
            f"The checkpoints to average have different positions ({POS_EMBED}), or not the model's: "
            f"{', '.join(report.path for report in reports)}. Expected trunks trained on clips of one size and "
            "number of frames. Change pretrained_checkpoint_path."
        )
    own.copy_(tables[0])
    return {POS_EMBED}


def groups(settings: Settings, model: nn.Module) -> list[Group]:
    """Parameter groups; learning rates are scaled once, over the whole schedule: by lr_scale_factor, or to the peak `lr`."""
    optim = settings.trainer.optim
    schedules = {
        option: [
            build(rule.scheduler, f"trainer.optim.options.{option}[{number}].scheduler")
            for number, rule in enumerate(rules)
        ]
        for option, rules in optim.options.items()
    }
    if rates := schedules.get("lr"):
        defaults = [rate for rule, rate in zip(optim.options["lr"], rates, strict=True) if is_default(rule)]
        by = 1 / optim.lr_scale_factor if settings.lr is None else settings.lr / _peak_rate([*defaults, *rates][0])
        schedules["lr"] = [Scaled(rate, by) for rate in rates]
    scales = layer_decay_scales(model, optim.layer_decay) if optim.layer_decay is not None else None
    made = parameter_groups(model, optim.options, schedules, scales)
    if without := [name for group in made if "lr" not in group.schedules for name in group.names]:
        raise UserError(
            f"trainer.optim.options.lr has no rule for {len(without)} parameters, {without[0]} for one. Expected a learning "
            "rate for each: add a rule without param_names and module_cls_names, the default."
        )
    return made


def _peak_rate(schedule: Schedule) -> float:
    """The highest learning rate of a recipe's schedule."""
    highest = peak(schedule)
    if highest <= 0:
        raise UserError(
            f"trainer.optim.options.lr is {highest:g} at its highest; expected a schedule above 0, which lr scales. Change "
            "trainer.optim.options.lr, or leave out lr."
        )
    return highest


def optimizer(settings: Settings, model: nn.Module) -> ScheduledOptimizer:
    make = build(settings.trainer.optim.optimizer, "trainer.optim.optimizer", partial=True)
    return ScheduledOptimizer(model, groups(settings, model), make)


def clip_dataset(settings: Settings, found: list[Split], training: bool) -> ClipDataset:
    """The dataset of some splits, for training or for evaluation."""
    trainer, data = settings.trainer, settings.trainer.data
    configs: dict[str, ClipConfig] = {}
    for kind in {split.dataset.kind for split in found}:
        if kind == "video" or data.image is None:
            configs[kind] = clip_config(settings, data, "trainer.data", data.num_frames, training)
        else:
            configs[kind] = clip_config(settings, data.image, "trainer.data.image", 1, training)
    return ClipDataset(
        found, configs, data.clip_duration, trainer.seed_value, training, data.max_pixels, data.val_spacing
    )


def validate_masks(settings: Settings) -> None:
    """Raise UserError for invalid views and masks."""
    data = settings.trainer.data
    for training in (True, False):
        clip_config(settings, data, "trainer.data", data.num_frames, training)
        if data.image is not None:
            clip_config(settings, data.image, "trainer.data.image", 1, training)


def clip_config(
    settings: Settings, data: DataSettings | ImageSettings, where: str, num_frames: int, training: bool
) -> ClipConfig:
    """Views, frames and mask of the samples of one kind of source."""
    size, tubelet = settings.image_size, tuple(settings.trainer.model["trunk"]["tubelet"])
    grid = token_grid((max(num_frames, tubelet[0]), size, size), tubelet)
    mask = None if data.mask is None else build(data.mask, f"{where}.mask")
    if mask is not None:
        hidden, tokens = int(mask(grid, np.random.default_rng(0)).sum()), grid[0] * grid[1] * grid[2]
        if not 0 < hidden < tokens:
            raise UserError(
                f"The mask hides {hidden} of the {tokens} tokens of a clip ({grid[0]} x {grid[1]} x {grid[2]}); expected some, "
                f"but not all: hidden ones are what is learnt, visible ones what it is learnt from. Change mask_ratio "
                f"or {where}.mask."
            )
    if training:
        return ClipConfig(build(data.view, f"{where}.view"), data.views_per_clip, num_frames, grid, mask)
    view = build(data.val_view, f"{where}.val_view")
    clips = data.val_clips if isinstance(data, DataSettings) else 1
    return ClipConfig(view, getattr(view, "crops", 1), num_frames, grid, mask, clips)


def check_device(settings: Settings, device: torch.device, local_rank: int = 0) -> None:
    """Raise UserError for a device that cannot compile the model, or whose memory weights, gradients and optimizer exceed."""
    if settings.trainer.compile and local_rank == 0:  # one for all processes of a node
        check_compiler(device)
    if device.type == "cuda":
        total, what = torch.cuda.get_device_properties(device).total_memory, f"device {device}"
    else:
        total, what = host_memory() // settings.launcher.gpus_per_node, "a process's share of this machine"
    needed = held_bytes(settings)
    if needed > total:
        raise UserError(
            f"The model needs {needed / 1e9:.1f} GB for weights, gradients and optimizer state; {what} has "
            f"{total / 1e9:.1f} GB. Choose a smaller trainer/model, or split it with trainer.distributed.strategy=fsdp."
        )


def sample_warnings(settings: Settings, splits: list[Split]) -> list[str]:
    """Open a few samples of each split; warn about unreadable ones and about clips with fewer frames than num_frames.

    Raises UserError for splits none of whose samples is readable. Files that do not exist are left to `check_splits`.
    """
    data, warnings, problems = settings.trainer.data, [], []
    for split in splits:
        short: list[tuple[int, str]] = []
        bad: list[str] = []
        opened = 0
        few = spread_indices(split, NUM_OPENED_FILES)
        for index in [*few, *(i for i in spread_indices(split, NUM_PROBED_FILES) if i not in few)]:
            if opened and opened + len(bad) >= len(few):  # look further only while none is readable
                break
            path = split.path(index)
            if not os.path.exists(path):
                continue
            try:
                frames = _clip_frames(split, index, data)
            except VideoDecodeError as error:
                bad.append(f"{path}: {error}")
                continue
            opened += 1
            if frames is not None and frames < data.num_frames:
                short.append((frames, path))
        where = f"sampled files of {split.name} ({split.which})"
        if bad and not opened:
            problems.append(
                f"None of the {len(bad)} {where} can be read, e.g. {bad[0]}. Check datasets.{split.name}.prefix, "
                f"datasets.{split.name}.{split.which}.paths and .segments with omnivision check-data."
            )
        elif bad:
            warnings.append(
                f"{len(bad)} of {opened + len(bad)} {where} cannot be read: {'; '.join(bad[:3])}. A run replaces them, up to "
                "trainer.data.bad_sample_budget; omnivision check-data lists all."
            )
        if short:
            frames, path = min(short)
            warnings.append(
                f"{len(short)} of {opened} sampled videos of {split.name} ({split.which}) have fewer than num_frames="
                f"{data.num_frames} frames in {data.clip_duration:g} s, so that frames repeat: {frames} in {path}. Lower "
                "num_frames or raise clip_duration."
            )
    if problems:
        raise UserError.of(problems)
    return warnings


def _clip_frames(split: Split, index: int, data: DataSettings) -> int | None:
    """About how many frames a clip of a video has; None for images. Raises VideoDecodeError for an unreadable file."""
    path, rules = split.path(index), split.dataset
    if rules.kind != "video":
        read_image(path, data.max_pixels)
        return None
    with open_video(path, fps=rules.fps, max_pixels=data.max_pixels, frame_pattern=rules.frame_pattern) as video:
        seconds = min(data.clip_duration, sample_duration(video.duration, split.segment(index)))
        return round((video.mean_rate or video.info().frames / max(video.duration, 1e-9)) * seconds)


def run_metadata(settings: Settings, model: nn.Module) -> dict[str, Any]:
    """Facts of a run for `summary.json`, which lists of runs show."""
    told = describe(model)
    frozen = any(is_frozen(part) for name, part in model.named_children() if name == "trunk")
    source = settings.pretrained_checkpoint_path
    names = [run_name(Path(one)) for one in ([source] if isinstance(source, str) else source or [])]
    return {
        "model": told.get("kind", type(model).__name__),
        "trunk": "frozen average" if told.get("kind") == "average" else "frozen" if frozen else "trained",
        "pretrained": " + ".join(names) or None,
        "sources": list(settings.trainer.data.sources),
        "classes": told.get("classes"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def trainer(
    settings: Settings,
    dist: Dist,
    folder: RunDir,
    reporter: Reporter,
    stop: StopSignal,
    splits: tuple[list[Split], list[Split]] | None = None,
) -> Trainer:
    """Build everything that a run needs. Raises UserError for whatever its user can fix."""
    data = settings.trainer.data
    if dist.device.type != "meta":
        check_device(settings, dist.device, dist.local_rank)
    train_splits, val_splits = open_splits(settings) if splits is None else splits
    if dist.is_main and not (folder.checkpoints / LATEST).exists():
        for warning in sample_warnings(settings, train_splits + val_splits):
            reporter.info(f"warning: {warning}")
    pinned = dist.device.type == "cuda"
    workers = LoaderConfig(data.num_workers, data.prefetch, pinned, timeout=60 * data.timeout_minutes)
    train = None
    if train_splits:
        train = TrainData(
            clip_dataset(settings, train_splits, training=True), workers, epoch_plan(settings, train_splits)
        )
    evaluated = clip_dataset(settings, val_splits, training=False)
    clips = max((kind.clips * kind.views for kind in evaluated.configs.values()), default=1)
    val = ValData(evaluated, workers, max(1, settings.clips_per_process // clips))
    built = model(settings, "meta" if dist.device.type == "meta" else "cpu")
    ledger = BadSampleLedger(
        folder.logs / "bad_samples.jsonl",
        files=sum(map(len, train_splits + val_splits)),
        budget=data.bad_sample_budget,
    )
    return Trainer(
        settings.trainer,
        RunContext(
            *(dist, folder, reporter, ledger, stop, load_averaged_checkpoints(settings, built)),
            peak_clips_per_second=peak_clips_per_second(settings, dist.device),
        ),
        task=task(settings),
        model=built,
        optimizer=optimizer(settings, built),
        train=train,
        val=val if val_splits else None,
    )


def check_compiler(device: torch.device) -> None:
    """Compile one small function. Raise UserError where torch.compile lacks what it needs."""
    from torch._dynamo.exc import TorchDynamoException  # not above: every start would wait for this import

    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except TorchDynamoException as error:
        lines = str(error).splitlines()
        reason = next((line for line in lines if "fatal error" in line), lines[0])
        raise UserError(
            f"trainer.compile is true, but torch.compile does not work here: {reason}. It needs a C++ compiler and the headers "
            "of Python (Debian: apt-get install g++ python3-dev), on GPUs Triton. Install them, or set trainer.compile=false."
        ) from None
