"""Settings that are valid alone and must agree with others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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


def cross_validate(settings: Settings) -> list[str]:
    """Say which settings are valid alone but do not go together."""
    if problems := _stage_problems(settings):
        return problems
    trainer, data, images = settings.trainer, settings.trainer.data, settings.images
    trunk: dict[str, Any] = trainer.model.get("trunk") or {}
    masks = [data.mask] + ([images.mask] if images else [])
    masked, average = _reconstructs(trainer.task), "num_models" in trainer.model
    wanted = settings.pretrained_checkpoint_path
    several = len(wanted) if isinstance(wanted, list) else 1
    rules = {
        "trainer.data.mask must be set for trainer.task Reconstruct. Set trainer/data=unlabelled_video.": (
            masked and None in masks
        ),
        "trainer.data.mask must be null for trainer.task Classify. Set trainer/data=labelled_video.": (
            masked is False and any(masks)
        ),
        "trainer.data.image must be set for sources of images. Set trainer/data to a choice that has it.": (
            images is None and any(source.kind != "video" for source in data.sources.values())
        ),
        "trainer.model.trunk.rgbd must be true for sources of the kind rgbd. Set it, or datasets.NAME.kind=image.": (
            not trunk.get("rgbd") and any(source.kind == "rgbd" for source in data.sources.values())
        ),
        "trainer.distributed.strategy must be ddp for an average of checkpoints, got fsdp.": (
            average and trainer.distributed.strategy == "fsdp"
        ),
        f"pretrained_checkpoint_path must be one checkpoint for this trainer.model, got {several}. Set one, or "
        f"+experiments={EXPERIMENTS['average']} trainer/model=NAME_average_ft.": isinstance(wanted, list)
        and not average,
        f"ensemble_num_models must be the number of checkpoints in pretrained_checkpoint_path, got "
        f"{trainer.model.get('num_models')} and {several}.": (
            average and several not in (1, trainer.model["num_models"])  # one file may hold several
        ),
        "lr and lr_scale_factor must not both be set: lr is the peak for this batch, lr_scale_factor divides the recipe's. Set "
        "lr=null or lr_scale_factor=1.": settings.lr is not None and trainer.optim.lr_scale_factor != 1,
    }
    problems = [sentence for sentence, is_broken in rules.items() if is_broken]
    problems += [
        f"trainer.model.{name}.heads must divide trainer.model.{name}.width {part['width']}, got {part['heads']}."
        for name in ("trunk", "decoder")
        if (part := trainer.model.get(name)) and part.get("heads") and part.get("width", 0) % part["heads"]
    ]
    problems += _contradictions(settings, trunk)
    problems += _batch_problems(settings, "", data.batch_size, data.views_per_clip, trainer.optim.accumulation_steps)
    if images:
        counts = images.batch_size, images.views_per_clip, images.accumulation_steps
        problems += _batch_problems(settings, "trainer.data.image.", *counts)
    return problems


def _stage_problems(settings: Settings) -> list[str]:
    """An experiment, a recipe and a model of different stages, with the choices that go together."""
    trainer, stage = settings.trainer, settings.stage
    model, masked = _model_kind(trainer.model), _reconstructs(trainer.task)
    fitting = [each for each in EXPERIMENTS if model in (None, MODELS[each]) and masked in (None, each == "mae")]
    if fitting and stage in (None, *fitting):
        return []
    task = {True: "reconstructs masked videos", False: "learns from labels", None: "is your own"}[masked]
    advice = [f"+experiments={EXPERIMENTS[each]}" for each in fitting]
    if stage is not None:
        recipe = "mae_NAME_config" if stage == "mae" else "mae_ft_NAME_config"
        advice.insert(0, f"+trainer={recipe} trainer/model=NAME{ENDINGS[MODELS[stage]]}")
    return [
        f"The experiment, recipe (+trainer) and trainer/model must be of one stage, got an experiment of stage {stage}, a task "
        f"that {task}, and {model or 'your own model'}. Set {' or '.join(advice) or 'a recipe and a model of one stage'}."
    ]


def _model_kind(model: Mapping[str, Any]) -> str | None:
    """Tell an autoencoder, an average and a classifier apart by the arguments of trainer.model; None for a user's own class."""
    if not model["_target_"].startswith("omnivision."):
        return None
    return "autoencoder" if "decoder" in model else "average" if "num_models" in model else "classifier"


def _reconstructs(task: Mapping[str, Any]) -> bool | None:
    """Whether a task reconstructs masked videos or learns from labels; None for a user's own task."""
    return {"Reconstruct": True, "Classify": False}.get(task["_target_"].rpartition(".")[2])


def _contradictions(settings: Settings, trunk: Mapping[str, Any]) -> list[str]:
    """Settings that exist twice and must not differ; by default they follow one another."""
    data, size = settings.trainer.data, settings.image_size
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
    """A node's batch must be divisible by its ranks, and a rank's by its views and micro-batches."""
    gpus = settings.launcher.gpus_per_node
    unit = gpus * math.lcm(views, micro_batches)
    if batch % unit == 0:
        return []
    return [
        f"{prefix}batch_size must be a multiple of {unit}: of launcher.gpus_per_node {gpus} x "
        f"{prefix or 'trainer.data.'}views_per_clip {views} and {prefix or 'trainer.optim.'}accumulation_steps "
        f"{micro_batches} on each, got {batch}. Set {prefix}batch_size={max(1, batch // unit) * unit}."
    ]
