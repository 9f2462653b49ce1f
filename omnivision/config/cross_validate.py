"""Checks between settings: each is valid alone but must agree with others."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omnivision.config.compose import is_overridden
from omnivision.config.instantiate import arguments_of
from omnivision.config.messages import suggest
from omnivision.config.schema import LabelType, Settings
from omnivision.utils.io import LATEST


class Stage(NamedTuple):
    """A stage's task and model classes, its experiment, and an example of a recipe and of a `trainer/model`."""

    task: str
    model: str
    experiment: str
    recipe: str
    size: str


FT_RECIPE = "mae_ft_ucf101_config"
STAGES = {
    "mae": Stage("Reconstruct", "MaskedAutoencoder", "omnimae/omnimain_train_video", "mae_k150_config", "vitbase"),
    "finetune": Stage("Classify", "VideoClassifier", "omnimae/omnimain_train_video_ft", FT_RECIPE, "vitbase_ft"),
    "probe": Stage("Classify", "VideoClassifier", "omnimae/omnimain_train_video_lp", FT_RECIPE, "vitbase_ft"),
    "attentive": Stage(
        "Classify", "AttentiveClassifier", "omnimae/omnimain_train_video_attentive", FT_RECIPE, "vitbase_attentive"
    ),
    "average": Stage(
        "Classify", "AveragedClassifier", "omnimae/omnimain_train_video_ensemble_ft", FT_RECIPE, "vitbase_average_ft"
    ),
}
# The task of each label type, and its trainer/task. `Stage.task` is `Classify` for all of them.
LABEL_TASKS: dict[LabelType, tuple[str, str]] = {
    "class": ("Classify", "classify"), "multi_label": ("MultiLabel", "multi_label"), "regression": ("Regress", "regress"),
}  # fmt: skip
# Top-level settings read by code; others are only interpolated (${...}).
READ_BY_CODE = ("trainer", "stage", "lr", "video_labels", "pretrained_checkpoint_path")


def cross_validate(settings: Settings, arguments: Sequence[str] | None = None) -> list[str]:
    """Return one message per setting that is valid alone but contradicts another.

    `arguments` are the overrides of the command line; None: the configuration was not composed here.
    """
    if problems := list(_stage_problems(settings)):
        return problems
    data = settings.trainer.data
    images = settings.images
    optim = settings.trainer.optim
    problems = [*_broken_rules(settings), *_contradictions(settings)]
    problems += _batch_problems(settings, "", data.batch_size, data.views_per_clip, optim.accumulation_steps)
    if images:
        counts = images.batch_size, images.views_per_clip, images.accumulation_steps
        problems += _batch_problems(settings, "trainer.data.image.", *counts)
    if arguments is not None and not problems and not is_overridden("pretrained_checkpoint_path", arguments):
        problems += _missing_weights(settings)
    return problems


def override_warnings(settings: Settings, config_text: str, arguments: Sequence[str]) -> list[str]:
    """Return a warning for each override that has no effect or belongs to another stage than the experiment's.

    `config_text` is the configuration as composed, interpolations unresolved.
    """
    typed = {name.lstrip("+"): value for name, _, value in (argument.partition("=") for argument in arguments)}
    used = {*READ_BY_CODE, *re.findall(r"\$\{(\w+)\}", config_text)}
    warnings = [
        f"{name} has no effect here, because no other setting refers to it (${{{name}}}). --cfg job prints them all."
        for name in typed
        if name in Settings.model_fields and name not in used
    ]
    if (optim := typed.get("trainer/optim")) in STAGES and settings.stage not in (None, optim):
        warnings.append(f"trainer/optim={optim} belongs to another stage than {settings.stage}.")
    return warnings


def _stage_problems(settings: Settings) -> Iterator[str]:
    """Yield a message if experiment, recipe and model are of different stages, with choices that fit."""
    task = _known_class(settings.trainer.task)
    model = _known_class(settings.trainer.model)
    stage = settings.stage
    fitting = [name for name, own in STAGES.items() if task in (None, own.task) and model in (None, own.model)]
    if fitting and stage in (None, *fitting):
        return
    choices = [f"+experiments={STAGES[name].experiment}" for name in fitting]
    if stage is not None:
        choices.append(f"+trainer={STAGES[stage].recipe} trainer/model={STAGES[stage].size} or others of their kind")
    yield (
        f"The experiment, recipe (+trainer) and trainer/model must be of one stage, got stage {stage}, task {task} and model "
        f"{model}. Set {', or '.join(choices)}."
    )


def _broken_rules(settings: Settings) -> Iterator[str]:
    """Yield a message for each value that this kind of run, data or model does not allow."""
    trainer = settings.trainer
    data = settings.trainer.data
    images = settings.images
    trunk, kinds = trainer.model.get("trunk") or {}, {source.kind for source in data.sources.values()}
    masks = [data.mask] + ([images.mask] if images else [])
    task, count = _known_class(trainer.task), trainer.model.get("num_models")
    weights = settings.pretrained_checkpoint_path
    given = len(weights) if isinstance(weights, list) else 1
    if task == "Reconstruct" and None in masks:
        yield "trainer.data.mask must be set for Reconstruct. Set trainer/data=unlabelled_video."
    own_task = trainer.task["_target_"].rpartition(".")[2]
    for name, source in data.sources.items():
        fitting, choice = LABEL_TASKS[source.label_type]
        if task == "Classify" and own_task != fitting:
            yield (
                f"trainer.task must be {fitting} for datasets.{name}.label_type={source.label_type}, got {own_task}. Set "
                f"trainer/task={choice}, or correct datasets.{name}.label_type."
            )
        elif data.balance and source.label_type != "class":
            yield f"trainer.data.balance must be 0 for {name}, which has no single class per sample. Set it to 0."
    if task == "Classify" and any(masks):
        yield f"trainer.data.mask must be null for {own_task}. Set trainer/data=labelled_video."
    if images is None and kinds - {"video"}:
        yield "trainer.data.image must be set for images. Set trainer/data=labelled_image."
    if "rgbd" in kinds and not trunk.get("rgbd"):
        yield "trainer.model.trunk.rgbd must be true for rgbd sources. Set trainer.model.trunk.rgbd=true."
    if count and trainer.distributed.strategy == "fsdp":
        yield "trainer.distributed.strategy must be ddp for an average, got fsdp. Set trainer.distributed.strategy=ddp."
    if isinstance(weights, list) and not count:
        average = f"+experiments={STAGES['average'].experiment} trainer/model={STAGES['average'].size}"
        yield f"pretrained_checkpoint_path must be one checkpoint for this trainer.model, got {given}. Set one, or {average}."
    if count and given not in (1, count):  # one file may hold several
        yield f"ensemble_num_models must be the number of checkpoints in pretrained_checkpoint_path, got {count} and {given}."
    if unknown := [name for name in trainer.online_eval.sources if name not in settings.datasets]:
        near = suggest(unknown[0], settings.datasets)
        yield f"trainer.online_eval.sources must name datasets of the catalog, got {unknown[0]}{near}"
    if trainer.online_eval.sources and count:
        yield "trainer.online_eval cannot probe an average, which has no single trunk. Set trainer.online_eval.sources=[]."
    optim = trainer.optim
    grid = [len(trainer.model.get(name) or [1]) for name in ("lr_factors", "weight_decay_factors")]
    if math.prod(grid) > 1 and not data.hold_out and trainer.mode != "val":
        yield "trainer.data.hold_out must be above 0 to choose one of several probes, got 0. Set trainer.data.hold_out=0.1."
    if math.prod(grid) > 1 and task == "Classify" and own_task != "Classify":
        yield (
            f"trainer.model must be a single probe for {own_task}, got {math.prod(grid)}. Set trainer.model.lr_factors=[1] "
            "trainer.model.weight_decay_factors=[1], and the learning rate with lr."
        )
    if math.prod(grid) > 1 and optim.gradient_clip is not None:
        yield "trainer.optim.gradient_clip must be null for several probes: one norm would couple them. Set it to null."
    if math.prod(grid) > 1 and "weight_decay" not in optim.options and grid[1] > 1:
        yield "trainer.model.weight_decay_factors multiply trainer.optim.options.weight_decay, which is missing. Set both."
    if data.hold_out and (trainer.mode == "train_only" or trainer.val_epoch_freq is None):
        yield "trainer.data.hold_out needs validation, which evaluates the held-out videos. Set trainer.val_epoch_freq=1."
    if data.balance and trainer.task.get("class_weights") == "balanced":
        yield "Set trainer.data.balance or trainer.task.class_weights=balanced, not both: each makes up for class sizes."
    if settings.lr is not None and trainer.optim.lr_scale_factor != 1:
        yield "Set lr or lr_scale_factor, not both: lr is the peak for this batch; lr_scale_factor rescales the recipe's."
    # torch takes any name, and ignores it.
    target = trainer.optim.optimizer["_target_"]
    optimizer = arguments_of(target)
    known = [str(field.alias) for field in optimizer.model_fields.values()]
    for name in trainer.optim.options:
        if name not in known and optimizer.model_config["extra"] == "forbid":
            yield f"trainer.optim.options.{name} is not an argument of {target}{suggest(name, known)}"


def _known_class(target: Mapping[str, Any]) -> str | None:
    """Return the name of a class that stages use; None for a user's own class. A task with labels counts as Classify."""
    name = target["_target_"].rpartition(".")[2]
    name = "Classify" if name in [own for own, _ in LABEL_TASKS.values()] else name
    return name if any(name in (stage.task, stage.model) for stage in STAGES.values()) else None


def has_decoder(model: Mapping[str, Any]) -> bool:
    """Return whether trainer.model is an autoencoder; any other model, including a user's own class, learns from labels."""
    return "decoder" in model


def _contradictions(settings: Settings) -> Iterator[str]:
    """Yield a message for each pair of settings that must be equal and are not; by default one follows the other."""
    data = settings.trainer.data
    size = settings.image_size
    trunk = settings.trainer.model.get("trunk") or {}
    tubelet, frames = trunk.get("tubelet"), trunk.get("num_frames")
    pairs = [
        ("trainer.data.num_frames", data.num_frames, "trainer.model.trunk.num_frames", frames),
        ("image_size", size, "trainer.model.trunk.image_size", trunk.get("image_size")),
        ("image_size", size, "trainer.data.view.size", data.view.get("size")),
        ("image_size", size, "trainer.data.val_view.size", data.val_view.get("size")),
        ("trainer.model.trunk.tubelet", tubelet, "trainer.task.tubelet", settings.trainer.task.get("tubelet")),
    ]
    for name, source in data.sources.items():
        pairs.append((f"datasets.{name}.num_classes", source.num_classes, "video_labels", settings.video_labels))
    for one, first, other, second in pairs:
        if None not in (first, second) and first != second:
            yield f"{one} is {first} and {other} is {second}; they must be equal."


def _batch_problems(settings: Settings, prefix: str, batch: int, views: int, micro_batches: int) -> Iterator[str]:
    """Yield a message unless ranks divide a node's batch, and views and micro-batches divide a rank's."""
    gpus = settings.launcher.gpus_per_node
    unit = gpus * math.lcm(views, micro_batches)
    if batch % unit:
        yield (
            f"{prefix}batch_size must be a multiple of {unit}, because launcher.gpus_per_node is {gpus} and each rank's part "
            f"must be divisible by {prefix or 'trainer.data.'}views_per_clip {views} and "
            f"{prefix or 'trainer.optim.'}accumulation_steps {micro_batches}; got {batch}. Set "
            f"{prefix}batch_size={max(1, batch // unit) * unit}."
        )


def _missing_weights(settings: Settings) -> Iterator[str]:
    """Yield a message if frozen or averaged weights have no checkpoint."""
    trainer = settings.trainer
    needs_weights = (trainer.freeze or "num_models" in trainer.model) and trainer.mode != "val"
    resumes = Path(trainer.checkpoint.save_dir, LATEST).exists()
    if needs_weights and not settings.pretrained_checkpoint_path and not resumes:
        yield (
            "This run freezes or averages pretrained weights, but pretrained_checkpoint_path is null. Set "
            "pretrained_checkpoint_path=RUN, or pass pretrained_checkpoint_path=null to start from random weights."
        )
