"""Settings that are valid alone and must agree with others."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omnivision.config.instantiate import arguments_of
from omnivision.config.messages import suggest
from omnivision.config.schema import Settings

# Of each stage: its experiment (the demo's have the names of the stages), an example of a recipe, the kind of its model.
EXPERIMENTS = {
    "mae": "omnimae/omnimain_train_video",
    "finetune": "omnimae/omnimain_train_video_ft",
    "probe": "omnimae/omnimain_train_video_lp",
    "average": "omnimae/omnimain_train_video_ensemble_ft",
}
EXAMPLE_RECIPES = {"mae": "mae_k150_config"} | dict.fromkeys(("finetune", "probe", "average"), "mae_ft_ucf101_config")
MODELS = {"mae": "autoencoder", "finetune": "classifier", "probe": "classifier", "average": "average"}
ENDINGS = {"average": "_average_ft", "classifier": "_ft", "autoencoder": ""}  # of their names in trainer/model


def cross_validate(settings: Settings, arguments: Sequence[str] = ()) -> list[str]:
    """Return one message per setting that is valid alone but contradicts another; `arguments` are the command's overrides."""
    if problems := _stage_problems(settings, arguments):
        return problems
    trainer, data, images = settings.trainer, settings.trainer.data, settings.images
    problems = list(_broken_rules(settings))
    for name, part in trainer.model.items():
        if isinstance(part, dict) and {"width", "heads"} <= part.keys() and part["width"] % part["heads"]:
            key = f"trainer.model.{name}"
            problems.append(f"{key}.heads must divide {key}.width {part['width']}, got {part['heads']}.")
    target = trainer.optim.optimizer["_target_"]
    optimizer = arguments_of(target)
    known = [str(field.alias) for field in optimizer.model_fields.values()]
    problems += [
        f"trainer.optim.options.{name} is not an argument of {target}{suggest(name, known)}"
        for name in trainer.optim.options
        if name not in known and optimizer.model_config["extra"] == "forbid"
    ]
    problems += _contradictions(settings)
    problems += _batch_problems(settings, "", data.batch_size, data.views_per_clip, trainer.optim.accumulation_steps)
    if images:
        counts = images.batch_size, images.views_per_clip, images.accumulation_steps
        problems += _batch_problems(settings, "trainer.data.image.", *counts)
    return problems


def _broken_rules(settings: Settings) -> Iterator[str]:
    """Yield a message for each value that this kind of run, of data or of model does not allow."""
    trainer, data, images = settings.trainer, settings.trainer.data, settings.images
    trunk, kinds = trainer.model.get("trunk") or {}, {source.kind for source in data.sources.values()}
    masks = [data.mask] + ([images.mask] if images else [])
    masked, count = _reconstructs(trainer.task), trainer.model.get("num_models")
    weights = settings.pretrained_checkpoint_path
    given = len(weights) if isinstance(weights, list) else 1
    if masked and None in masks:
        yield "trainer.data.mask must be set for Reconstruct. Set trainer/data=unlabelled_video."
    if masked is False and any(masks):
        yield "trainer.data.mask must be null for Classify. Set trainer/data=labelled_video."
    if images is None and kinds - {"video"}:
        yield "trainer.data.image must be set for images. Set trainer/data=labelled_image."
    if "rgbd" in kinds and not trunk.get("rgbd"):
        yield "trainer.model.trunk.rgbd must be true for sources of the kind rgbd."
    if count and trainer.distributed.strategy == "fsdp":
        yield "trainer.distributed.strategy must be ddp for an average of checkpoints, got fsdp."
    if isinstance(weights, list) and not count:
        average = f"+experiments={EXPERIMENTS['average']} trainer/model=NAME_average_ft"
        yield f"pretrained_checkpoint_path must be one checkpoint for this trainer.model, got {given}. Set one, or {average}."
    if count and given not in (1, count):  # one file may hold several
        yield f"ensemble_num_models must be the number of checkpoints in pretrained_checkpoint_path, got {count} and {given}."
    if settings.lr is not None and trainer.optim.lr_scale_factor != 1:
        yield "lr must be null where lr_scale_factor is set: lr is the peak of this batch, lr_scale_factor that of another."


def _stage_problems(settings: Settings, arguments: Sequence[str]) -> list[str]:
    """Return a message for an experiment, a recipe and a model of different stages, with choices that match."""
    trainer, stage = settings.trainer, settings.stage
    model, masked = _model_kind(trainer.model), _reconstructs(trainer.task)
    fitting = [each for each in EXPERIMENTS if model in (None, MODELS[each]) and masked in (None, each == "mae")]
    if fitting and stage in (None, *fitting):
        return []
    task = {True: "reconstructs masked videos", False: "learns from labels", None: "is your own"}[masked]
    advice = [f"+experiments={EXPERIMENTS[each]}" for each in fitting]
    if stage is not None:
        wrong = []
        if masked not in (None, stage == "mae"):
            wrong.append(f"+trainer=mae_{'' if stage == 'mae' else 'ft_'}NAME_config")
        if model not in (None, MODELS[stage]):
            size = re.search(r"trainer/model=(\w+?)(?:_average)?(?:_ft)?(?: |$)", " ".join(arguments))
            wrong.append(f"trainer/model={size[1] if size else 'NAME'}{ENDINGS[MODELS[stage]]}")
        advice.insert(0, " ".join(wrong))
    return [
        f"The experiment, recipe (+trainer) and trainer/model must be of one stage, got an experiment of stage {stage}, a task "
        f"that {task}, and {model or 'your own model'}. Set {' or '.join(advice) or 'a recipe and a model of one stage'}."
    ]


def stage_warnings(settings: Settings, arguments: Sequence[str]) -> list[str]:
    """Return a warning for each typed choice of another stage than the experiment's, though a model takes it."""
    typed = dict(each.lstrip("+").split("=", 1) for each in arguments if "=" in each)
    optim, weights = typed.get("trainer/optim"), typed.get("trainer/checkpoint", "")
    kind = "an average of checkpoints" if weights.endswith("_ensemble") else "a single model"
    rules = [
        ("stage" in typed, "stage is set by the experiment, and typing it changes nothing else. Set +experiments."),
        (
            optim in EXPERIMENTS and settings.stage not in (None, optim),
            f"trainer/optim={optim} is for another stage than {settings.stage}. Set trainer/optim={settings.stage}.",
        ),
        (
            weights and weights.endswith("_ensemble") != ("num_models" in settings.trainer.model),
            f"trainer/checkpoint={weights} is for {kind}, which trainer.model is not. Set another.",
        ),
    ]
    return [text for is_broken, text in rules if is_broken]


def _model_kind(model: Mapping[str, Any]) -> str | None:
    """Return the kind of a model by the arguments of trainer.model; None for a user's own class."""
    if not model["_target_"].startswith("omnivision."):
        return None
    return "autoencoder" if has_decoder(model) else "average" if "num_models" in model else "classifier"


def has_decoder(model: Mapping[str, Any]) -> bool:
    """Return whether trainer.model is an autoencoder; any other, also a user's own class, learns from labels."""
    return "decoder" in model


def _reconstructs(task: Mapping[str, Any]) -> bool | None:
    """Return whether a task reconstructs masked videos (True) or learns from labels (False); None for a user's own task."""
    return {"Reconstruct": True, "Classify": False}.get(task["_target_"].rpartition(".")[2])


def _contradictions(settings: Settings) -> list[str]:
    """Return a message for each setting that exists twice and differs; by default they follow one another."""
    data, size, trunk = settings.trainer.data, settings.image_size, settings.trainer.model.get("trunk") or {}
    tubelet, frames = trunk.get("tubelet"), trunk.get("num_frames")
    pairs = [
        ("trainer.data.num_frames", data.num_frames, "trainer.model.trunk.num_frames", frames),
        ("image_size", size, "trainer.model.trunk.image_size", trunk.get("image_size")),
        ("image_size", size, "trainer.data.view.size", data.view.get("size")),
        ("image_size", size, "trainer.data.val_view.size", data.val_view.get("size")),
        ("trainer.model.trunk.tubelet", tubelet, "trainer.task.tubelet", settings.trainer.task.get("tubelet")),
    ]
    pairs += [
        (f"datasets.{name}.num_classes", source.num_classes, "video_labels", settings.video_labels)
        for name, source in data.sources.items()
    ]
    return [
        f"{one} is {first} and {other} is {second}; they must be equal."
        for one, first, other, second in pairs
        if None not in (first, second) and first != second
    ]


def _batch_problems(settings: Settings, prefix: str, batch: int, views: int, micro_batches: int) -> list[str]:
    """Return a message unless ranks divide a node's batch, and views and micro-batches a rank's."""
    gpus = settings.launcher.gpus_per_node
    unit = gpus * math.lcm(views, micro_batches)
    if batch % unit == 0:
        return []
    return [
        f"{prefix}batch_size must be a multiple of {unit}: of launcher.gpus_per_node {gpus} x "
        f"{prefix or 'trainer.data.'}views_per_clip {views} and {prefix or 'trainer.optim.'}accumulation_steps "
        f"{micro_batches} on each, got {batch}. Set {prefix}batch_size={max(1, batch // unit) * unit}."
    ]
