"""Settings that are valid alone and must agree with others."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from omnivision.config.instantiate import signature_of
from omnivision.config.messages import format_errors
from omnivision.config.schema import (
    DataSettings,
    DecoderSettings,
    ImageSettings,
    Settings,
    SubmititSettings,
    TrunkSettings,
)
from omnivision.config.stages import EXPERIMENTS, reconstructs

# Options of sbatch that one of our settings stands for.
SBATCH_SETTINGS = {
    "job-name": "submitit.name",
    "partition": "submitit.partition",
    "account": "submitit.account",
    "qos": "submitit.qos",
    "time": "submitit.timeout_hour",
    "nodes": "launcher.num_nodes",
    "ntasks": "launcher.gpus_per_node",
    "ntasks-per-node": "launcher.gpus_per_node",
    "gpus-per-node": "launcher.gpus_per_node",
    "cpus-per-task": "submitit.cpus_per_task",
    "mem": "submitit.mem",
    "constraint": "submitit.constraints",
    "comment": "submitit.comment",
    "exclude": "submitit.exclude",
    "nodelist": "submitit.nodelist",
    "dependency": "submitit.dependency",
    "array": "a sweep (-m)",
}
# Options of sbatch that would break a submission.
SBATCH_RESERVED = (
    "output error open-mode requeue no-requeue kill-on-invalid-dep wait parsable test-only wrap export chdir".split()
)
_ONE = r"((after|afterany|afterburstbuffer|aftercorr|afternotok|afterok)(:\d+(_(\d+|\*))?(\+\d+)?)+|singleton)"
DEPENDENCY = rf"{_ONE}(,{_ONE})*|{_ONE}(\?{_ONE})+"


def cross_validate(settings: Settings) -> list[str]:
    """Say which settings are valid alone but do not go together."""
    trainer = settings.trainer
    trunk: dict[str, Any] = trainer.model.get("trunk") or {}
    problems = _run_dir_problems(settings.launcher.experiment_log_dir)
    problems += _model_problems(settings, trunk)
    problems += _task_problems(settings)
    problems += check_duplicates(settings, trunk)
    problems += _optim_problems(settings)
    problems += submitit_problems(settings.submitit)
    data, images = trainer.data, settings.images
    problems += _batch_problems(settings, "", data.batch_size, data.views_per_clip, trainer.optim.accumulation_steps)
    if images:
        parts = images.batch_size, images.views_per_clip, images.accumulation_steps
        problems += _batch_problems(settings, "trainer.data.image.", *parts)
    elif any(source.kind != "video" for source in data.sources.values()):
        problems.append("trainer.data.image must be set for sources of images. Choose a trainer/data that has it.")
    return problems


def _run_dir_problems(folder: str) -> list[str]:
    if not folder.strip():
        return [
            "launcher.experiment_log_dir must be the folder of the run, got an empty text (an unset shell variable?)."
        ]
    if len(os.fsencode(folder)) > 3000 or max(len(os.fsencode(part)) for part in Path(folder).parts) > 255:
        return [f"launcher.experiment_log_dir must be shorter, got {len(folder)} characters: {folder[:60]}..."]
    return []


def _model_problems(settings: Settings, trunk: dict[str, Any]) -> list[str]:
    """Sizes of trunk and decoder, depth channels, and what a model cannot be trained with."""
    trainer, problems = settings.trainer, []
    parts: dict[str, tuple[type[BaseModel], Any]] = {
        "trunk": (TrunkSettings, trunk),
        "decoder": (DecoderSettings, trainer.model.get("decoder") or {}),
    }
    for name, (schema, values) in parts.items():
        try:
            sizes: Any = schema.model_validate(values)
        except ValidationError as error:
            problems += format_errors(error, schema, f"trainer.model.{name}.")
            continue
        if "width" in values and sizes.width % sizes.heads:
            problems.append(
                f"trainer.model.{name}.heads must divide trainer.model.{name}.width {sizes.width}, got {sizes.heads}."
            )
        if name == "trunk" and "tubelet" in values:
            problems += _tubelet_problems(trunk)
    if trainer.distributed.strategy == "fsdp" and "num_models" in trainer.model:
        problems.append("trainer.distributed.strategy must be ddp for an average of checkpoints, got fsdp.")
    problems += [
        f"datasets.{name}.kind is rgbd, and trainer.model.trunk.rgbd is not true. Set ++trainer.model.trunk.rgbd=true, or "
        f"datasets.{name}.kind=image."
        for name, source in trainer.data.sources.items()
        if source.kind == "rgbd" and not trunk.get("rgbd")
    ]
    return problems


def _tubelet_problems(trunk: Mapping[str, Any]) -> list[str]:
    problems, tubelet = [], trunk["tubelet"]
    for key, parts in (("num_frames", tubelet[:1]), ("image_size", tubelet[1:])):
        for part in dict.fromkeys(parts):
            value = trunk.get(key)
            if isinstance(value, int) and value % part:
                problems.append(
                    f"{key} must be a multiple of {part} (trainer.model.trunk.tubelet is {tubelet}), got {value}. Set "
                    f"{key}={max(1, value // part) * part}."
                )
    return problems


def _task_problems(settings: Settings) -> list[str]:
    """Masks, learning rates and weights that do not go with the task or the model."""
    trainer, data, model, problems = settings.trainer, settings.trainer.data, settings.trainer.model, []
    masked = reconstructs(trainer.task["_target_"])
    if masked and (data.mask is None or (settings.images and settings.images.mask is None)):
        problems.append(
            "trainer.data.mask must be set for trainer.task Reconstruct. Set trainer/data=unlabelled_video."
        )
    if masked is False and data.mask is not None:
        problems.append("trainer.data.mask must be null for trainer.task Classify. Set trainer/data=labelled_video.")
    patterns = [name for rules in trainer.optim.options.values() for rule in rules for name in rule.param_names or []]
    if "mixing_ratio" in patterns and "num_models" not in model:
        problems.append(
            "trainer.optim has a rule for mixing_ratio, and trainer.model is no average. Set "
            f"trainer/optim={settings.stage or 'finetune'}, or +experiments={EXPERIMENTS['average']}."
        )
    wanted, count = settings.pretrained_checkpoint_path, model.get("num_models")
    if isinstance(wanted, list) and count is None:
        problems.append(
            f"pretrained_checkpoint_path must be one checkpoint for this trainer.model, got {len(wanted)}. Give one, or choose "
            f"an average: +experiments={EXPERIMENTS['average']} trainer/model=NAME_average_ft."
        )
    if isinstance(wanted, list) and count is not None and len(wanted) != count:
        one_file = len(wanted) == 1 and not Path(wanted[0]).is_dir()  # which may hold several models
        if not one_file:
            problems.append(
                f"ensemble_num_models is {count} and pretrained_checkpoint_path has {len(wanted)} checkpoints."
            )
    return problems


def check_duplicates(settings: Settings, trunk: Mapping[str, Any]) -> list[str]:
    """Settings that exist twice and must not differ; by default they follow one another."""
    data, size = settings.trainer.data, settings.image_size
    pairs = [
        ("trainer.data.num_frames", data.num_frames, "trainer.model.trunk.num_frames", trunk.get("num_frames")),
        ("image_size", size, "trainer.model.trunk.image_size", trunk.get("image_size")),
        ("image_size", size, "trainer.data.view.size", data.view.get("size")),
        ("image_size", size, "trainer.data.val_view.size", data.val_view.get("size")),
        (
            "trainer.model.trunk.tubelet",
            trunk.get("tubelet"),
            "trainer.task.tubelet",
            settings.trainer.task.get("tubelet"),
        ),
    ]
    pairs += [
        (f"datasets.{name}.num_classes", source.num_classes, "video_labels", settings.video_labels)
        for name, source in data.sources.items()
    ]
    return [
        f"{one} is {first} and {other} is {second}; they must be equal."
        for one, first, other, second in pairs
        if first is not None and second is not None and first != second
    ]


def _optim_problems(settings: Settings) -> list[str]:
    """Schedules, layer decay and the two ways to set the peak learning rate."""
    optim, problems = settings.trainer.optim, []
    if optim.layer_decay is not None and any("trunk" in each or each == "*" for each in settings.trainer.freeze):
        problems.append(
            f"trainer.optim.layer_decay must be null if trainer.freeze has the trunk, got {optim.layer_decay:g}."
        )
    problems += [
        f"{key} must be >= 0 and finite, got {value!r}."
        for option, rules in optim.options.items()
        for number, rule in enumerate(rules)
        for key, value in _numbers(rule.scheduler, f"trainer.optim.options.{option}[{number}].scheduler")
        if not 0 <= value < 1e100
    ]
    target = optim.optimizer["_target_"]
    accepted = signature_of(target)
    for option in optim.options:
        if accepted and option not in accepted and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            near = difflib.get_close_matches(option, accepted, 1)
            guess = f"; did you mean {near[0]}?" if near else "."
            problems.append(f"trainer.optim.options.{option} is not an argument of {target}{guess}")
    if settings.lr is not None and optim.lr_scale_factor != 1:
        problems.append(
            f"lr is {settings.lr:g} and lr_scale_factor is {optim.lr_scale_factor:g}; only one may be set: lr is the peak for "
            "this batch, lr_scale_factor divides the recipe's. Set lr=null or lr_scale_factor=1."
        )
    elif (settings.lr is not None or optim.lr_scale_factor != 1) and "lr" not in optim.options:
        name = "lr_scale_factor" if settings.lr is None else "lr"
        problems.append(
            f"{name} is set, but trainer.optim.options has no schedule for lr. Add one, or leave {name} out."
        )
    return problems


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Every number in an object to build, with its key."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _numbers(item, f"{key}[{number}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def _batch_problems(settings: Settings, prefix: str, batch: int, views: int, micro_batches: int) -> list[str]:
    """A node's batch must be divisible by its processes, and a process's by its views and micro-batches."""
    gpus = settings.launcher.gpus_per_node
    unit = gpus * math.lcm(views, micro_batches)
    even = max(1, batch // unit) * unit
    if batch % gpus:
        name = f"{prefix}batch_size"
        return [f"{name} must be a multiple of launcher.gpus_per_node {gpus}, got {batch}. Set {name}={even}."]
    clips, names = batch // gpus, {f"{prefix or 'trainer.data.'}views_per_clip": views}
    names[f"{prefix or 'trainer.optim.'}accumulation_steps"] = micro_batches
    return [
        f"{name} must divide the {clips} clips of a process ({prefix}batch_size {batch} / launcher.gpus_per_node {gpus}), got "
        f"{parts}. Set {prefix}batch_size={even}."
        for name, parts in names.items()
        if clips % parts
    ]


def submitit_problems(wanted: SubmititSettings) -> list[str]:
    """What SLURM would refuse or misread."""
    problems = []
    if wanted.mem is not None and wanted.mem_gb is not None:
        problems.append(
            f"submitit.mem is {wanted.mem} and submitit.mem_gb is {wanted.mem_gb:g}. Set one of them to null."
        )
    if wanted.mem is not None and not re.fullmatch(r"\d+[KMGT]?B?", wanted.mem, re.IGNORECASE):
        problems.append(f"submitit.mem must be megabytes, or a whole number with K, M, G or T, got {wanted.mem!r}.")
    if wanted.dependency is not None and not re.fullmatch(DEPENDENCY, wanted.dependency):
        problems.append(
            f"submitit.dependency must be as SLURM takes it, e.g. afterok:12:13, got {wanted.dependency!r}."
        )
    problems += [
        f"submitit.{name} must be one line of plain text, got {value!r}."
        for name, value in vars(wanted).items()
        if isinstance(value, str) and not value.isprintable()
    ]
    if wanted.signal_delay_s is not None and wanted.signal_delay_s >= wanted.timeout_hour * 3600:
        problems.append(
            f"submitit.signal_delay_s must be shorter than submitit.timeout_hour {wanted.timeout_hour:g}, got "
            f"{wanted.signal_delay_s} s."
        )
    for name in wanted.additional_parameters:
        option = name.replace("_", "-")
        # sbatch also takes the first letters of an option.
        known = (*SBATCH_SETTINGS, *SBATCH_RESERVED)
        option = next((full for full in known if option and full.startswith(option)), option)
        if option in known:
            advice = f"Set {SBATCH_SETTINGS[option]} instead." if option in SBATCH_SETTINGS else "Leave it out."
            problems.append(f"submitit.additional_parameters.{name} is set by the submission itself. {advice}")
    return problems


def check_target_kinds(settings: Settings) -> list[str]:
    """Objects that may be built, but not here: a view where a mask is meant."""
    trainer = settings.trainer
    data: dict[str, DataSettings | ImageSettings | None] = {
        "trainer.data": trainer.data,
        "trainer.data.image": settings.images,
    }
    wanted: dict[str, tuple[Any, str]] = {
        "trainer.model": (trainer.model, "omnivision.models"),
        "trainer.task": (trainer.task, "omnivision.tasks"),
    }
    for key, part in data.items():
        if part is not None:
            wanted[f"{key}.view"] = (part.view, "omnivision.data.views")
            wanted[f"{key}.val_view"] = (part.val_view, "omnivision.data.views")
            wanted[f"{key}.mask"] = (part.mask, "omnivision.data.masking")
    return [
        f"{key}._target_ must be a class of {package}, got {target['_target_']}."
        for key, (target, package) in wanted.items()
        if target is not None
        and not any(target["_target_"].startswith(f"{known}.") for known in (package, *trainer.trust_targets))
    ]
