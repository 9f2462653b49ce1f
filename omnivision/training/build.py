"""Build a run's objects from its settings."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn

from omnivision.checkpoint.fingerprint import fingerprint
from omnivision.checkpoint.inference_config import InferenceConfig
from omnivision.config.cross_validate import has_decoder
from omnivision.config.flat import flatten
from omnivision.config.instantiate import signature_of
from omnivision.config.schema import DataSettings, ImageSettings, InstantiateConfig, Settings
from omnivision.data.catalog import ARRAYS, Dataset, LabelSets, Split, label_sets
from omnivision.data.dataset import ClipConfig, ClipDataset
from omnivision.data.groups import pattern_grouping
from omnivision.data.loader import LoaderConfig, TrainData, ValData
from omnivision.data.sampling import ClassBalance, EpochPlan, SourcePlan
from omnivision.distributed.process_group import Dist, RankInfo
from omnivision.models.attentive import AttentiveClassifier
from omnivision.models.patches import token_grid
from omnivision.optim.groups import (
    ParamGroup,
    ScheduledOptimizer,
    layer_decay_scales,
    parameter_groups,
    scale_learning_rates,
)
from omnivision.optim.schedules import Schedule
from omnivision.reporting.logs import BadSampleLedger
from omnivision.reporting.reporter import Reporter
from omnivision.reporting.run_directory import RunDir
from omnivision.training import flops
from omnivision.training.evaluate import evaluation_settings
from omnivision.training.online_eval import OnlineEval, OnlineSource, require_trunk
from omnivision.training.trainer import RunContext, Trainer, resolve_amp_dtype
from omnivision.utils.errors import StopRequested, UserError, causes, collect_problems, is_out_of_memory
from omnivision.utils.signals import StopSignal

Splits = tuple[list[Split], list[Split]]  # training splits, validation splits


def instantiate_target(target: InstantiateConfig, where: str, partial: bool = False, **more: Any) -> Any:
    """Instantiate a `_target_` with `more` arguments; with `partial`, return a function that does.

    Raises UserError for a class that cannot be imported or built, whatever its code raises.
    """
    try:
        make = instantiate(target, _convert_="all", _partial_=partial or bool(more))
        return make(**more) if more else make
    except Exception as error:
        # A signal that arrives here may surface as whatever OmegaConf's cleanup raises.
        if stop := next((cause for cause in causes(error) if isinstance(cause, StopRequested)), None):
            raise stop from None
        cause: BaseException = error
        while isinstance(cause, (InstantiationException, ImportError)) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError) or is_out_of_memory(cause):
            raise cause from None
        raise UserError(
            f"{where} ({target['_target_']}) cannot be built: {type(cause).__name__}: {cause}. Change {where}; "
            "OMNIVISION_TRACEBACK=1 shows where its code raised."
        ) from error


def build_process_group(settings: Settings, rank_info: RankInfo) -> Dist:
    distributed = settings.trainer.distributed
    timeout = timedelta(minutes=distributed.timeout_minutes)
    return Dist(rank_info, settings.trainer.accelerator, distributed.backend, timeout)


def build_datasets(settings: Settings) -> list[Dataset]:
    """Return the catalog entries of the run's sources; entries without a number of classes get `video_labels`."""
    return [
        Dataset(name=name, **source.model_dump() | {"num_classes": source.num_classes or settings.video_labels})
        for name, source in settings.trainer.data.sources.items()
    ]


def open_splits(settings: Settings) -> Splits:
    """Open the train splits (unless mode=val) and the val splits (if the run validates).

    Raises UserError with all problems: files that are missing, have the wrong type or shape, or hold labels out of range;
    splits without labels for a model that learns from labels; no val split at all.
    """
    config, datasets = settings.trainer, build_datasets(settings)
    validates = config.mode == "val" or (config.mode != "train_only" and config.val_epoch_freq is not None)
    requested = [(dataset, "train") for dataset in datasets if config.mode != "val"]
    requested += [(dataset, "val") for dataset in datasets if validates and dataset.val is not None]
    problems: list[str] = []
    opened = [split for entry in requested if (split := collect_problems(problems, Split, *entry)) is not None]
    for split in opened:
        if not has_decoder(config.model) and not split.has_labels():
            problems.append(
                f"datasets.{split.name}.{split.which}.labels must have a label for some sample: this stage learns from labels. "
                f"Set ++datasets.{split.name}.{split.which}.labels=FILE.npy: {ARRAYS[split.label_type][2]}"
                f"{', from 0 (-1 is ignored)' if split.label_type == 'class' else ''}."
            )
    if config.data.hold_out:
        pattern = config.data.hold_out_pattern
        grouping = (
            None
            if pattern is None
            else collect_problems(problems, pattern_grouping, pattern, "trainer.data.hold_out_pattern")
        )
        for split in opened:
            if split.which == "train" and split.has_labels():
                collect_problems(problems, split.hold_out, config.data.hold_out, grouping)
    if not datasets:
        problems.append("trainer.data.sources must have at least one dataset. Set a recipe, +trainer=...")
    elif validates and not any(which == "val" for _, which in requested):
        problems.append(
            f"datasets.NAME.val must be set for one of the sources ({', '.join(config.data.sources)}) to validate. Set its "
            "paths and labels, or trainer.mode=train_only."
        )
    if problems:
        raise UserError.from_problems(problems)
    return [split for split in opened if split.which == "train"], [split for split in opened if split.which == "val"]


def build_online_eval(settings: Settings) -> OnlineEval | None:
    """Return the probes of a run, or None. Raises UserError with all problems of their datasets."""
    config, data = settings.trainer.online_eval, settings.trainer.data
    if not config.sources or settings.trainer.mode == "val":
        return None
    problems: list[str] = []
    sources = []
    for name in dict.fromkeys(config.sources):
        dataset = Dataset(name=name, **settings.datasets[name].model_dump())
        splits = [collect_problems(problems, Split, dataset, which) for which in ("train", "val")]
        if None not in splits:
            sources.append(collect_problems(problems, OnlineSource.draw, *splits, config.limit))
    if problems:
        raise UserError.from_problems(problems)
    workers = LoaderConfig(data.num_workers, data.prefetch, timeout=60 * data.timeout_minutes)
    drawn = [source for source in sources if source is not None]
    return OnlineEval(config, drawn, workers, data.clip_duration, data.max_pixels)


def build_epoch_plan(settings: Settings, train: list[Split]) -> EpochPlan:
    """Plan an epoch. Raises UserError for a source smaller than a batch, and for unknown names in trainer.data.repeats."""
    trainer, data = settings.trainer, settings.trainer.data
    names = [split.name for split in train]
    if unknown := sorted(set(data.repeats) - set(names)):
        raise UserError(f"trainer.data.repeats must name sources ({', '.join(names)}), got {', '.join(unknown)}.")
    sources = {}
    for split in train:
        batch, views, micro_batches = data.batch_size, data.views_per_clip, trainer.optim.accumulation_steps
        if split.dataset.kind != "video" and data.image is not None:
            images = data.image
            batch, views, micro_batches = images.batch_size, images.views_per_clip, images.accumulation_steps
        videos = batch * settings.launcher.num_nodes // views
        labels = np.array([split.label(index) for index in range(len(split))]) if data.balance else None
        balance = None if labels is None else ClassBalance.of(labels, data.balance)
        repeat = data.repeats.get(split.name, 1)
        sources[split.name] = SourcePlan(len(split), videos, views, repeat, micro_batches, balance)
    return EpochPlan(sources, trainer.seed_value, trainer.limit_train_batches)


def build_label_sets(settings: Settings) -> LabelSets:
    """Return the heads and their class counts."""
    return label_sets(build_datasets(settings), settings.trainer.data.share_head)


def resolve_class_names(settings: Settings) -> list[list[str]]:
    """Return the class names of each head, from the first source that names them all; empty for a model without heads.

    Raises UserError if sources that share a head name its classes differently: their labels would mean different classes.
    """
    if "classes" not in signature_of(settings.trainer.model["_target_"]):
        return []
    sets = build_label_sets(settings)
    names: list[list[str]] = [[str(label) for label in range(count)] for count in sets.classes]
    sources = [dataset for dataset in build_datasets(settings) if dataset.class_names is not None]
    for dataset in reversed(sources):
        head, own_names = sets.head[dataset.name], dataset.names()
        if len(own_names) == len(names[head]):
            names[head] = own_names
    for dataset in sources:
        own_names, wanted = dataset.names(), names[sets.head[dataset.name]]
        # With share_head label sets may differ, but not only in order.
        if own_names != wanted and (not settings.trainer.data.share_head or sorted(own_names) == sorted(wanted)):
            label = next(label for label, name in enumerate(wanted) if own_names[label] != name)
            raise UserError(
                f"datasets.{dataset.name}.class_names must name the classes as other sources of its head do: class {label} is "
                f"{own_names[label]!r}, there {wanted[label]!r}. Set the names and labels (omnivision prepare "
                f"--class-names), or datasets.{dataset.name}.label_set."
            )
    return names


def build_inference_config(settings: Settings) -> InferenceConfig:
    """Return the evaluation settings that `omnivision.load` needs."""
    sources = list(settings.trainer.data.sources.values())
    label_type = sources[0].label_type if sources and not has_decoder(settings.trainer.model) else "class"
    more: dict[str, Any] = {} if label_type == "class" else {"label_type": label_type}
    if label_type == "regression":
        labels = build_label_sets(settings)
        more |= {"label_mean": [mean for mean, _ in labels.scales], "label_std": [std for _, std in labels.scales]}
    return InferenceConfig(
        clip_duration=settings.trainer.data.clip_duration,
        class_names=resolve_class_names(settings),
        average="softmax" if settings.trainer.task.get("average") == "softmax" else "logits",
        **more,
    )


def build_with_labels(settings: Settings, target: InstantiateConfig, where: str) -> Any:
    """Build a `_target_` with the classes and labels that its signature asks for."""
    wanted = signature_of(target["_target_"])
    given: dict[str, Callable[[], Any]] = {
        "classes": lambda: build_label_sets(settings).classes,
        "labels": lambda: build_label_sets(settings),
        "label_counts": lambda: count_labels(settings) if target.get("class_weights") == "balanced" else None,
    }
    return instantiate_target(target, where, **{name: get() for name, get in given.items() if name in wanted})


def count_labels(settings: Settings) -> list[list[int]]:
    """Return the number of training samples of each class, by head."""
    sets = build_label_sets(settings)
    counts = [[0] * classes for classes in sets.classes]
    for split in open_splits(settings)[0]:
        head = sets.head[split.name]
        for label, count in enumerate(split.label_counts()):
            counts[head][label] += count
    return counts


def build_model(settings: Settings, device: str = "cpu") -> nn.Module:
    """Return the model, initialized from the seed; `trainer.freeze` applied."""
    torch.manual_seed(settings.trainer.seed_value)
    with torch.device(device):
        built = build_with_labels(settings, settings.trainer.model, "trainer.model")
    freeze(built, settings.trainer.freeze)
    return built


def build_meta_model(settings: Settings) -> nn.Module | None:
    """Return the model on the meta device, without memory; None for a user's own class that cannot be built there."""
    try:
        return build_model(settings, "meta")
    except UserError:
        if settings.trainer.trust_targets:
            return None
        raise


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Freeze the parameters that match a pattern. Raises UserError for a pattern without a match, or if nothing is trained."""
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matches = fnmatch.filter(parameters, pattern)
        if not matches:
            raise UserError(
                f"trainer.freeze must match parameters, like {next(iter(parameters))}; {pattern!r} matches none."
            )
        for name in matches:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"trainer.freeze must leave something to train, got {patterns}.")


def build_task(settings: Settings) -> Any:
    task = build_with_labels(settings, settings.trainer.task, "trainer.task")
    for name, earlier in (("epoch_metrics", "epoch_figures"), ("visualize", "pictures")):
        if hasattr(task, earlier):  # a user's class that was written for an earlier release
            setattr(task, name, getattr(task, earlier))
    return task


def measure_clip_cost(settings: Settings, model: nn.Module) -> flops.ClipFlops | None:
    """Return the cost of a training step per clip; `model` is on the meta device. None for user classes that fail there."""
    data = settings.trainer.data
    clip = build_clip_config(settings, data, "trainer.data", data.num_frames, training=True)
    mask = None if clip.mask is None else clip.mask(clip.grid, np.random.default_rng(0))
    shape = data.num_frames, settings.image_size, settings.image_size
    try:
        source = build_datasets(settings)[0]
        label = None if source.label_type == "class" else torch.empty(1, source.num_classes or 1)
        return flops.count_clip_flops(build_task(settings), model, shape, mask, source.name, label)
    except Exception:
        if settings.trainer.trust_targets:
            return None
        raise


def estimate_peak_clips_per_second(settings: Settings, device: torch.device) -> float | None:
    """Return a device's peak clips per second; None if that is unknown, or if clips differ in size."""
    dtype = resolve_amp_dtype(settings.trainer, device)
    peak_flops = flops.peak_flops(device, dtype, settings.trainer.logging.peak_tflops)
    if peak_flops is None or settings.images is not None:
        return None
    meta = build_meta_model(settings)
    cost = None if meta is None else measure_clip_cost(settings, meta)
    return None if cost is None else peak_flops / cost.step_flops


def build_groups(settings: Settings, model: nn.Module) -> list[ParamGroup]:
    """Group the parameters; each group has the schedules of its options."""
    optim = settings.trainer.optim
    schedules = {
        option: [
            build_schedule(rule.scheduler, f"trainer.optim.options.{option}[{number}].scheduler")
            for number, rule in enumerate(rules)
        ]
        for option, rules in optim.options.items()
    }
    if rates := schedules.get("lr"):
        schedules["lr"] = scale_learning_rates(optim.options["lr"], rates, settings.lr, optim.lr_scale_factor)
    factors: dict[str, dict[str, float]] = {}
    if optim.layer_decay is not None:
        factors["lr"] = layer_decay_scales(model, optim.layer_decay)
    if isinstance(model, AttentiveClassifier):
        for option, own in model.option_factors().items():
            known = factors.get(option, {})
            factors[option] = known | {name: known.get(name, 1.0) * factor for name, factor in own.items()}
    groups = parameter_groups(model, optim.options, schedules, factors)
    if without := [name for group in groups if "lr" not in group.schedules for name in group.names]:
        raise UserError(
            f"trainer.optim.options.lr must have a rule for each parameter; {len(without)} have none, {without[0]} for one. "
            "Add a rule without param_names and module_cls_names, the default."
        )
    return groups


def build_schedule(target: InstantiateConfig, where: str) -> Schedule:
    """Build a schedule. Raises UserError if its values are negative or not finite."""
    schedule: Schedule = instantiate_target(target, where)
    if wrong := [value for value in (schedule(i / 200) for i in range(201)) if not 0 <= value < math.inf]:
        raise UserError(f"{where} must have values >= 0 and finite, got {wrong[0]:g}.")
    return schedule


def build_optimizer(settings: Settings, model: nn.Module) -> ScheduledOptimizer:
    make = instantiate_target(settings.trainer.optim.optimizer, "trainer.optim.optimizer", partial=True)
    return ScheduledOptimizer(model, build_groups(settings, model), make)


def build_clip_dataset(settings: Settings, splits: list[Split], training: bool) -> ClipDataset:
    """Return the dataset over some splits, for training or for evaluation."""
    trainer, data = settings.trainer, settings.trainer.data
    configs: dict[str, ClipConfig] = {}
    for kind in {split.dataset.kind for split in splits}:
        if kind == "video" or data.image is None:
            configs[kind] = build_clip_config(settings, data, "trainer.data", data.num_frames, training)
        else:
            configs[kind] = build_clip_config(settings, data.image, "trainer.data.image", 1, training)
    return ClipDataset(
        splits, configs, data.clip_duration, trainer.seed_value, training, data.max_pixels, data.val_spacing
    )


def check_views_and_masks(settings: Settings) -> None:
    """Raise UserError for invalid views and masks."""
    data = settings.trainer.data
    for training in (True, False):
        build_clip_config(settings, data, "trainer.data", data.num_frames, training)
        if data.image is not None:
            build_clip_config(settings, data.image, "trainer.data.image", 1, training)


def build_clip_config(
    settings: Settings, data: DataSettings | ImageSettings, where: str, num_frames: int, training: bool
) -> ClipConfig:
    """Return the views, frames and mask for samples of one kind of source."""
    size, tubelet = settings.image_size, tuple(settings.trainer.model["trunk"]["tubelet"])
    grid = token_grid((max(num_frames, tubelet[0]), size, size), tubelet)
    mask = None if data.mask is None else instantiate_target(data.mask, f"{where}.mask")
    if mask is not None:
        drawn, tokens = [np.asarray(mask(grid, np.random.default_rng(seed))) for seed in range(2)], math.prod(grid)
        hidden = {int(array.sum()) for array in drawn}
        if drawn[0].shape != grid or drawn[0].dtype != bool or len(hidden) > 1 or not 0 < min(hidden) < tokens:
            raise UserError(
                f"{where}.mask must give bool arrays of shape {grid} that hide equally many tokens, some but not all; got "
                f"{drawn[0].dtype} {drawn[0].shape}, {sorted(hidden)} of {tokens} hidden. Set mask_ratio or {where}.mask."
            )
    if training:
        return ClipConfig(instantiate_target(data.view, f"{where}.view"), data.views_per_clip, num_frames, grid, mask)
    view = instantiate_target(data.val_view, f"{where}.val_view")
    clips = data.val_clips if isinstance(data, DataSettings) else 1
    return ClipConfig(view, getattr(view, "crops", 1), num_frames, grid, mask, clips)


def build_trainer(
    settings: Settings,
    config_text: str,
    dist: Dist,
    run_dir: RunDir,
    reporter: Reporter,
    stop: StopSignal,
    splits: Splits | None = None,
) -> Trainer:
    """Build everything that a run needs, without pretrained weights. Raises UserError for invalid input.

    Args:
        config_text: config.yaml as composed, interpolations unresolved; without it, the trainer has no fingerprint.
        dist: with the meta device (`trainer.mode=dry`), shapes are checked and nothing is computed.
        splits: the train and val splits, if they are already open.
    """
    data = settings.trainer.data
    train_splits, val_splits = open_splits(settings) if splits is None else splits
    pinned = dist.device.type == "cuda"
    workers = LoaderConfig(data.num_workers, data.prefetch, pinned, timeout=60 * data.timeout_minutes)
    plan = build_epoch_plan(settings, train_splits) if train_splits else None
    train = TrainData(build_clip_dataset(settings, train_splits, training=True), workers, plan) if plan else None
    evaluated = build_clip_dataset(settings, val_splits, training=False)
    clips = max((kind.clips * kind.views for kind in evaluated.configs.values()), default=1)
    videos = max(1, settings.clips_per_rank // clips)
    val = ValData(evaluated, workers, videos) if val_splits else None
    held = [split.held_out for split in train_splits if split.held_out is not None]
    held_out = ValData(build_clip_dataset(settings, held, training=False), workers, videos) if held else None
    built = build_model(settings, "meta" if dist.device.type == "meta" else "cpu")
    online = build_online_eval(settings)
    if online is not None:
        require_trunk(built)
    used = train_splits + val_splits
    ledger = BadSampleLedger(run_dir.logs / "bad_samples.jsonl", sum(map(len, used + held)), data.bad_sample_budget)
    context = RunContext(
        dist,
        run_dir,
        reporter,
        ledger,
        stop,
        evaluation_settings=evaluation_settings(settings.trainer),
        peak_clips_per_second=estimate_peak_clips_per_second(settings, dist.device),
    )
    if dist.is_main and config_text:
        values, inference = (
            flatten(settings.model_dump()),
            build_inference_config(settings).model_dump(exclude_unset=True),
        )
        context.fingerprint = fingerprint(config_text, values, used, plan, inference)
    optimizer = build_optimizer(settings, built)
    return Trainer(settings.trainer, context, build_task(settings), built, optimizer, train, val, online, held_out)
