"""Turns a composed configuration into `Settings`, or raises one UserError that lists all problems: unknown keys, wrong types
and values, settings that do not go together. It imports nothing heavy, so that it can run anywhere.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from omnivision.config.reader import Natural, Reader, unknown_key
from omnivision.config.schema import DECODER, GROUPS, DataSettings, ImageSettings, Settings, Share
from omnivision.config.stages import EXAMPLE_RECIPES, EXPERIMENTS, guess_stage, reconstructs, stage_problems
from omnivision.config.suggestions import suggestion
from omnivision.config.targets import signature_of
from omnivision.config.yaml_numbers import read_numbers_as_written
from omnivision.utils.errors import UserError

# Of a trunk or a decoder; beyond that only a slip of the hand goes.
MOST = {"width": 65_536, "depth": 1000, "heads": 1024}


def check(
    config: DictConfig,
    origin: Callable[[str], str] = lambda key: "",
    choices: Mapping[str, str] | None = None,
    folders: Sequence[Path] = (),
) -> Settings:
    """Settings from a composed configuration. Raises UserError listing every problem, and all that is missing.

    `origin` tells where a setting was written (`origins.origin_of`), `choices` are those of the command line
    (`stages.typed_choices`), `folders` hold the config files.
    """
    choices = choices or {}
    if "site" in config:
        raise UserError(_site_problem(config.site))
    if isinstance(config.get("experiments"), DictConfig):
        raise UserError(
            "The file that +experiments=... chooses does not begin with the line '# @package _global_', so its settings came "
            "under experiments. Add that line."
        )
    if header := next((str(key) for key in config if re.fullmatch(r"_.+_", str(key))), None):
        raise UserError(
            _located(f"{header} is not a place for settings; expected the line '# @package _global_'.", origin)
        )
    reader = Reader(config, GROUPS, suggestion)
    settings: Settings | None = reader.dataclass(Settings, config, "")
    problems = list(dict.fromkeys(reader.problems or reader.echoes))
    if reader.missing:
        problems.append(
            f"Missing: {', '.join(dict.fromkeys(reader.missing))}.{_advice(reader.missing, config, choices)}"
        )
    if settings is not None and not problems:
        problems += _wrong_kinds(settings) or stage_problems(settings, choices, folders) or contradictions(settings)
    problems = [_located(problem, origin) for problem in problems]
    if problems:
        raise UserError.of(problems)
    assert settings is not None
    return settings


def read_run_config(file: Path, trusted: Sequence[str] = ()) -> Settings:
    """Settings of a run from its `config.yaml`, with the packages that may be built replaced by `trusted`.

    Raises UserError for a file that cannot be read, and for settings that are not right here.
    """
    try:
        read_numbers_as_written()
        config = OmegaConf.create(file.read_text(encoding="utf-8"))
        assert isinstance(config, DictConfig)
        OmegaConf.update(config, "trainer.trust_targets", list(trusted), force_add=True)
        return check(config)
    except (OSError, ValueError, AssertionError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{file}, the settings of the run, cannot be used: {error}") from error


def _located(problem: str, origin: Callable[[str], str]) -> str:
    """A sentence that begins with the name of a setting, with where it was written behind the name."""
    name = re.split(r" (?:is|lacks|cannot|comes|has) ", problem)[0]
    where = origin(name.partition("[")[0])
    if where.startswith(" (argument") and " is not a" not in problem:
        return problem  # the value, which it tells, is what was typed
    return f"{name}{where}{problem.removeprefix(name)}"


def _site_problem(site: Any) -> str:
    if isinstance(site, DictConfig):
        return (
            "The file that +site=... chooses does not begin with the line '# @package _global_' (nothing may stand before "
            "it, no byte order mark either), so its settings came under site. Add that line."
        )
    return (
        f"+site={site} chooses the file site/{site}.yaml of a folder of your own, and no folder that holds site/ was given. "
        f"Give it with --config-dir FOLDER, so that the file is FOLDER/site/{site}.yaml."
    )


def contradictions(settings: Settings) -> list[str]:
    """Sentences about settings that are fine alone but do not go together."""
    problems = []
    trainer, data = settings.trainer, settings.trainer.data
    model = trainer.model
    folder = Path(settings.launcher.experiment_log_dir)
    if len(os.fsencode(folder)) > 3000 or max((len(os.fsencode(part)) for part in folder.parts), default=0) > 255:
        problems.append(
            f"launcher.experiment_log_dir is {str(folder)[:60]}... ({len(str(folder))} characters); expected a name that file "
            "systems take. Change launcher.experiment_log_dir."
        )
    if not settings.launcher.experiment_log_dir.strip():
        problems.append(
            "launcher.experiment_log_dir is empty; expected the folder of the run. (Was it a shell variable that is not set?)"
        )
    trunk: dict[str, Any] = model.get("trunk", {})
    decoder: dict[str, Any] = model.get("decoder", {})
    known = dict.fromkeys(DECODER, Natural) | {"attention": Literal["self", "cross"], "share": Share}
    problems += [unknown_key(key, known, "trainer.model.decoder", decoder) for key in decoder if key not in known]
    if (attention := decoder.get("attention", "self")) not in ("self", "cross"):
        problems.append(f"trainer.model.decoder.attention is {attention!r}; expected self (the recipe) or cross.")
    share = decoder.get("share", 1)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        problems.append(
            f"trainer.model.decoder.share is {share!r}; expected the share of the masked tokens that a step decodes, more than "
            "0 and at most 1."
        )
    for name, part in (("trunk", trunk), ("decoder", decoder)):
        sizes = {key: part[key] for key in DECODER if key in part}
        wrong = {key: value for key, value in sizes.items() if type(value) is not int or not 1 <= value <= MOST[key]}
        problems += [
            f"trainer.model.{name}.{key} is {value!r}; expected a whole number from 1 to {MOST[key]}."
            for key, value in wrong.items()
        ]
        width, heads = sizes.get("width", 1), sizes.get("heads", 1)
        if "width" in sizes and not wrong and width % heads:
            problems.append(
                f"trainer.model.{name}.heads is {heads}, which does not divide trainer.model.{name}.width {width}; every "
                "head needs the same number of channels. Change one of them."
            )
    if trainer.distributed.strategy == "fsdp" and "num_models" in model:
        problems.append(
            "trainer.distributed.strategy is fsdp, which splits what is trained among the processes; of an average that is "
            "next to nothing, and its sources are held whole. Set trainer.distributed.strategy=ddp."
        )
    if "tubelet" in trunk:
        problems += _tubelet_problems(trunk)
    problems += _task_problems(settings)
    problems += _disagreements(settings, trunk)
    problems += _label_problems(settings)
    problems += [
        f"datasets.{name}.kind is rgbd, and trainer.model.trunk.rgbd is not true: the model has no place for depth. Set "
        f"++trainer.model.trunk.rgbd=true, or datasets.{name}.kind=image."
        for name, source in data.sources.items()
        if source.kind == "rgbd" and not trunk.get("rgbd")
    ]
    if trainer.optim.layer_decay is not None and any(
        "trunk" in pattern or pattern == "*" for pattern in trainer.freeze
    ):
        problems.append(
            f"trainer.freeze is {trainer.freeze} and trainer.optim.layer_decay is {trainer.optim.layer_decay:g}, which scales "
            "the learning rates of a trunk that is trained. Set trainer.optim.layer_decay=null, or trainer.freeze=[]."
        )
    problems += _schedule_problems(settings)
    accepted = signature_of(trainer.optim.optimizer["_target_"]) or dict.fromkeys(trainer.optim.options)
    problems += [
        f"trainer.optim.options.{option} is a schedule for what {trainer.optim.optimizer['_target_']} does not take"
        f"{nearest(option, accepted)}"
        for option in trainer.optim.options
        if option not in accepted and "**" not in accepted
    ]
    scaled_by = {"lr_scale_factor": trainer.optim.lr_scale_factor} if trainer.optim.lr_scale_factor != 1 else {}
    if settings.lr is not None:
        scaled_by["lr"] = settings.lr
    if len(scaled_by) > 1:
        problems.append(
            f"lr is {settings.lr:g} and lr_scale_factor is {trainer.optim.lr_scale_factor:g}; expected one of them: lr is the "
            "peak for the batch as it is, lr_scale_factor divides the recipe's. Leave one out, or set lr=null."
        )
    elif scaled_by and "lr" not in trainer.optim.options:
        problems.append(
            f"{' '.join(scaled_by)} is {min(scaled_by.values()):g}, but trainer.optim.options has no lr to divide "
            "or raise. Add a schedule there, or leave it out."
        )
    problems += settings.submitit.contradictions()
    problems += _batch_problems(settings, "", data.batch_size, data.views_per_clip, trainer.optim.accumulation_steps)
    if images := settings.images:
        where = "trainer.data.image."
        problems += _batch_problems(
            settings, where, images.batch_size, images.views_per_clip, images.accumulation_steps
        )
    elif any(source.kind != "video" for source in data.sources.values()):
        problems.append(
            "There are sources of images, and trainer.data.image is not set. Choose a trainer/data that has it."
        )
    return problems


def _task_problems(settings: Settings) -> list[str]:
    """Masks, learning rates and weights that do not go with the task or the model."""
    trainer, model, found = settings.trainer, settings.trainer.model, []
    masked = reconstructs(trainer.task["_target_"])
    data = trainer.data
    if masked and (data.mask is None or (settings.images and settings.images.mask is None)):
        found.append(
            "trainer.data.mask is null, and a masked autoencoder learns from what a mask hides. Choose one of "
            "omnivision.data.masking, e.g. trainer/data=unlabelled_video."
        )
    if masked is False and data.mask is not None:
        found.append(
            "trainer.data.mask is set, and trainer.task learns from labels of whole videos. Choose trainer/data=labelled_video."
        )
    patterns = [name for rules in trainer.optim.options.values() for rule in rules for name in rule.param_names or []]
    if "mixing_ratio" in patterns and "num_models" not in model:
        found.append(
            "trainer.optim has a learning rate for the mixing weights of an average (mixing_ratio), and trainer.model is none. "
            f"Choose trainer/optim={settings.stage or 'finetune'}, or the experiment {EXPERIMENTS['average']}."
        )
    wanted, given = settings.pretrained_checkpoint_path, model.get("num_models")
    if isinstance(wanted, list) and given is None:
        found.append(
            f"pretrained_checkpoint_path is a list of {len(wanted)}, and trainer.model starts from one. Give one, or "
            f"choose an average: +experiments={EXPERIMENTS['average']} trainer/model=NAME_average_ft."
        )
    if isinstance(wanted, list) and given is not None and len(wanted) != given:
        one_file = len(wanted) == 1 and not Path(wanted[0]).is_dir()  # which may hold several models
        if not one_file:
            found.append(
                f"There are {len(wanted)} checkpoints to average in pretrained_checkpoint_path, and ensemble_num_models is "
                f"{given}; expected as many. Change one of them."
            )
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(known)}."


def _schedule_problems(settings: Settings) -> list[str]:
    """Learning rates and weight decays that are negative, or no numbers."""
    return [
        f"{where} is {value!r}; expected a number of at least 0 that training can go on with. Change it."
        for option, rules in settings.trainer.optim.options.items()
        for number, rule in enumerate(rules)
        for where, value in _numbers(rule.scheduler, f"trainer.optim.options.{option}[{number}].scheduler")
        if not 0 <= value < 1e100
    ]


def _numbers(value: Any, where: str) -> Iterator[tuple[str, float]]:
    """Every number in an object to build, with its name."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{where}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _numbers(item, f"{where}[{number}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield where, value


def _batch_problems(settings: Settings, where: str, batch: int, views: int, pieces: int) -> list[str]:
    """A node's batch must come out even for its processes, its views and the pieces it is worked through in."""
    gpus = settings.launcher.gpus_per_node
    unit = gpus * math.lcm(views, pieces)
    even = max(1, batch // unit) * unit
    if batch % gpus:
        return [
            f"{where}batch_size is {batch} for the {gpus} processes of a node (launcher.gpus_per_node); expected a multiple of "
            f"{gpus}. Try {where}batch_size={even}."
        ]
    each, names = batch // gpus, {f"{where or 'trainer.data.'}views_per_clip": views}
    names[f"{where or 'trainer.optim.'}accumulation_steps"] = pieces
    return [
        f"{name} is {parts}, which does not divide the {each} clips of a process ({where}batch_size {batch} / "
        f"launcher.gpus_per_node {gpus}). Change {name}, or try {where}batch_size={even}."
        for name, parts in names.items()
        if each % parts
    ]


def _wrong_kinds(settings: Settings) -> list[str]:
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
    for where, part in data.items():
        if part is not None:
            wanted[f"{where}.view"] = (part.view, "omnivision.data.views")
            wanted[f"{where}.val_view"] = (part.val_view, "omnivision.data.views")
            wanted[f"{where}.mask"] = (part.mask, "omnivision.data.masking")
    return [
        f"{where}._target_ is {target['_target_']}; expected something of {package}."
        for where, (target, package) in wanted.items()
        if target is not None
        and not any(target["_target_"].startswith(f"{known}.") for known in (package, *trainer.trust_targets))
    ]


def _disagreements(settings: Settings, trunk: dict[str, Any]) -> list[str]:
    """Settings that say the same thing twice and must not differ; by default they follow one another."""
    data, task = settings.trainer.data, settings.trainer.task
    pairs = [
        ("trainer.data.num_frames", data.num_frames, "trainer.model.trunk.num_frames", trunk.get("num_frames")),
        ("image_size", settings.image_size, "trainer.model.trunk.image_size", trunk.get("image_size")),
        ("image_size", settings.image_size, "trainer.data.view.size", data.view.get("size")),
        ("image_size", settings.image_size, "trainer.data.val_view.size", data.val_view.get("size")),
        ("trainer.model.trunk.tubelet", trunk.get("tubelet"), "trainer.task.tubelet", task.get("tubelet")),
    ]
    return [
        f"{one} is {first}, {other} is {second}; expected the same. Change one of them (num_frames and image_size are "
        "what the others follow)."
        for one, first, other, second in pairs
        if first is not None and second is not None and first != second
    ]


def _label_problems(settings: Settings) -> list[str]:
    """`video_labels`, the published name for the number of classes, must not contradict the catalog."""
    if settings.video_labels is None:
        return []
    return [
        f"video_labels is {settings.video_labels}, datasets.{name}.num_classes is {source.num_classes}; expected the same. "
        "Leave video_labels out: the catalog knows."
        for name, source in settings.trainer.data.sources.items()
        if source.num_classes not in (None, settings.video_labels)
    ]


def _tubelet_problems(trunk: dict[str, Any]) -> list[str]:
    tubelet, frames, size = trunk["tubelet"], trunk.get("num_frames"), trunk.get("image_size")
    if not (isinstance(tubelet, list) and len(tubelet) == 3 and all(type(n) is int and n > 0 for n in tubelet)):
        return [f"trainer.model.trunk.tubelet is {tubelet!r}; expected three whole numbers: frames, height, width."]
    problems = []
    for setting, value, parts in (("num_frames", frames, tubelet[:1]), ("image_size", size, tubelet[1:])):
        for part in dict.fromkeys(parts):
            if isinstance(value, int) and value % part:
                problems.append(
                    f"{setting} is {value}; expected a multiple of {part}, the tubelet's (trainer.model.trunk.tubelet is "
                    f"{tubelet}). Try {setting}={max(1, value // part) * part}."
                )
    return problems


def _advice(missing: list[str], config: DictConfig, choices: Mapping[str, str]) -> str:
    """Which experiment and recipe bring what is missing; both are of one stage."""
    task = OmegaConf.select(config, "trainer.task._target_", throw_on_missing=False, throw_on_resolution_failure=False)
    stage = config.get("stage") or guess_stage(choices, task)
    advice = []
    if any(name.startswith(("epochs", "trainer.model", "trainer.optim")) for name in missing):
        advice.append(f"+experiments={EXPERIMENTS[stage]} chooses a stage, its model and optimizer")
    if any(name.startswith(("trainer.data", "trainer.task")) for name in missing):
        advice.append(f"+trainer={EXAMPLE_RECIPES[stage]} chooses data and task")
    if "launcher.experiment_log_dir" in missing:
        advice.append("launcher.experiment_log_dir=FOLDER says where the run goes")
    return " " + "; ".join(advice) + "." if advice else ""
