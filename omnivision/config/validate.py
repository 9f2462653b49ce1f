"""Check a composed configuration: unknown keys, types, ranges, objects, settings that must agree. All problems at once."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from omnivision.config.compose import argument_for, suggest, typed_choices, use_yaml12_numbers
from omnivision.config.instantiate import signature_of, target_problems
from omnivision.config.schema import (
    DataSettings,
    DecoderSettings,
    ImageSettings,
    Settings,
    SubmititSettings,
    TrunkSettings,
    setting_types,
)
from omnivision.config.stages import EXAMPLE_RECIPES, EXPERIMENTS, guess_stage, reconstructs, stage_problems
from omnivision.utils.errors import UserError
from omnivision.utils.io import LATEST

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
# What pydantic's types of errors expect, and its bounds.
EXPECTED = {
    "int_type": "an int",
    "int_from_float": "an int",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list, as in [a, b]",
    "dict_type": "a group of settings",
    "model_type": "a group of settings",
}
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_ONE = r"((after|afterany|afterburstbuffer|aftercorr|afternotok|afterok)(:\d+(_(\d+|\*))?(\+\d+)?)+|singleton)"
DEPENDENCY = rf"{_ONE}(,{_ONE})*|{_ONE}(\?{_ONE})+"


def validate_config(
    config: DictConfig, arguments: Sequence[str] | None = None, folders: Sequence[Path] = ()
) -> Settings:
    """Settings from a composed configuration. Raises UserError with every problem.

    `arguments` are the overrides of the command line (None: the configuration was not composed here), `folders` hold the
    config files.
    """
    typed = arguments or ()
    try:
        values = Resolved(config)
    except RecursionError:
        raise UserError("A setting refers to itself (${...}). Correct the configuration file.") from None
    trusted = config.get("trainer") and OmegaConf.select(
        config, "trainer.trust_targets", throw_on_resolution_failure=False
    )
    trusted = [each for each in trusted if isinstance(each, str) and each] if isinstance(trusted, ListConfig) else []
    problems, settings = [], None
    if arguments is not None and trusted and not argument_for("trainer.trust_targets", arguments):
        problems.append(
            "trainer.trust_targets must be given on the command line alone: building a class runs its code, and files may come "
            "from others. Type '++trainer.trust_targets=[PACKAGE]'."
        )
        trusted = []
    try:
        settings = Settings.model_validate(values.tree)
    except ValidationError as error:
        problems += format_errors(error, Settings, config=config)
        values.missing += [key_of(each["loc"]) for each in error.errors() if each["type"] == "missing"]
    problems += target_problems(values.tree.get("trainer"), "trainer", trusted)
    # A value that repeats another setting (${...}) is reported under that setting alone.
    problems = [problem for problem in problems if problem.split(" ")[0] not in values.unresolved]
    problems += values.unresolved.values()
    missing = [key for key in dict.fromkeys(values.missing) if not values.is_reference(key)]
    own = [each for each in problems if not values.is_reference(each.split(" ")[0])]
    problems = own if own or missing else problems
    if missing:
        problems.append(f"Missing: {', '.join(missing)}.{_advice(missing, config, typed)}")
    if settings is not None and not problems:
        problems = _wrong_kinds(settings) or stage_problems(settings, typed_choices(typed), folders)
        problems = problems or cross_validate(settings)
        if arguments is not None:
            problems += _weights_problems(settings, arguments)
    if problems:
        raise UserError.of([_with_argument(problem, typed) for problem in problems])
    assert settings is not None
    return settings


def read_run_config(file: Path, trusted: Sequence[str] = ()) -> Settings:
    """Settings of a run from its `config.yaml`, with the packages that may be built replaced by `trusted`.

    Raises UserError for a file that cannot be read, and for invalid settings.
    """
    try:
        use_yaml12_numbers()
        config = OmegaConf.create(file.read_text(encoding="utf-8"))
        assert isinstance(config, DictConfig)
        OmegaConf.update(config, "trainer.trust_targets", list(trusted), force_add=True)
        return validate_config(config)
    except (OSError, ValueError, AssertionError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{file}, the settings of the run, cannot be used: {error}") from error


class Resolved:
    """A configuration as plain Python values, interpolations resolved: `tree`, and which keys are no values of their own."""

    def __init__(self, config: DictConfig) -> None:
        self.missing: list[str] = []
        self.unresolved: dict[str, str] = {}  # key -> why
        self.references: set[str] = set()
        self.config = config
        self.tree: dict[str, Any] = self._plain(config, "")

    def is_reference(self, key: str) -> bool:
        """Whether a key, or a group that it is in, is `${...}`."""
        return any(key == each or key.startswith((f"{each}.", f"{each}[")) for each in self.references)

    def _plain(self, node: Any, key: str) -> Any:
        if isinstance(node, DictConfig):
            items = ((str(name), self._item(node, name, f"{key}.{name!s}".lstrip("."))) for name in node)
            return {name: value for name, value in items if value is not Ellipsis}
        if isinstance(node, ListConfig):
            return [self._item(node, i, f"{key}[{i}]") for i in range(len(node))]
        return node

    def _item(self, node: DictConfig | ListConfig, name: Any, key: str) -> Any:
        """A value of a container, resolved; Ellipsis if it has none."""
        if OmegaConf.is_missing(node, name):
            self.missing.append(key)
            return Ellipsis
        if OmegaConf.is_interpolation(node, name):
            self.references.add(key)
        try:
            return self._plain(node[name], key)
        except InterpolationToMissingValueError:
            return None  # what it refers to is missing itself
        except OmegaConfBaseException as error:
            message, names = str(error).splitlines()[0], re.findall(r"\$\{([\w.]+)\}", str(node._get_node(name)))
            self.unresolved[key] = f"{key} cannot be resolved: {message}"
            # Where all that it refers to exists, that is invalid, and reported.
            if "is not a container" not in message and not all(self._exists(each) for each in names):
                self.references.discard(key)
            return None

    def _exists(self, key: str) -> bool:
        return OmegaConf.select(self.config, key, default=Ellipsis, throw_on_resolution_failure=False) is not Ellipsis


def key_of(location: Sequence[int | str]) -> str:
    """The key of a setting from pydantic's location, without the names of a union's members."""
    parts = [part for part in location if part not in ("str", "list[str]", "[key]")]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def format_errors(
    error: ValidationError, schema: type[BaseModel], prefix: str = "", config: DictConfig | None = None
) -> list[str]:
    """One sentence for each invalid setting: key, what it must be, what it is, the nearest known."""
    sentences: dict[str, str] = {}
    for each in error.errors(include_url=False):
        key, context, value = f"{prefix}{key_of(each['loc'])}", each.get("ctx", {}), each["input"]
        if key in sentences or each["type"] == "missing":
            continue
        if each["type"] == "extra_forbidden":
            sentences[key] = _unknown(key, config, setting_types(schema, prefix))
            continue
        signs = [f"{BOUNDS[name]} {bound:.10g}" for name, bound in context.items() if name in BOUNDS]
        wanted = EXPECTED.get(each["type"]) or " and ".join(signs) or re.sub("^.*?(should|must) be ", "", each["msg"])
        guess = ""
        if each["type"] == "literal_error":
            known = re.findall(r"'([^']*)'", context["expected"])
            near = difflib.get_close_matches(str(value).lower(), known, 1)
            guess = f" Did you mean {near[0]}?" if near else ""
        sentences[key] = f"{key} must be {wanted}, got {shorten(value)}.{guess}"
    return list(sentences.values())


def shorten(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _unknown(key: str, config: DictConfig | None, known: Iterable[str]) -> str:
    if re.fullmatch(r"site|experiments|_.+_", key):
        return (
            f"{key} is not a setting. A file of settings that +site=NAME or +experiments=NAME chooses must begin with the line "
            "'# @package _global_', and the folder that holds site/ is given with --config-dir."
        )
    above = key.rpartition(".")[0]
    near = suggest(key, config, known)
    beside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == above]
    rest = f"; did you mean {near}?" if near else f"; {above or 'the top level'} has {', '.join(sorted(beside))}."
    return f"{key} is not a setting{rest}"


def _with_argument(problem: str, arguments: Sequence[str]) -> str:
    """A sentence that begins with a key, with the argument of the command line that set it."""
    key = re.split(r" (?:is|must|lacks|cannot|comes|has) ", problem)[0]
    argument = argument_for(key.partition("[")[0], arguments)
    return f"{key} (argument {argument}){problem.removeprefix(key)}" if argument else problem


def _advice(missing: list[str], config: DictConfig, arguments: Sequence[str]) -> str:
    """Which experiment and recipe set what is missing; both are of one stage."""
    task = OmegaConf.select(config, "trainer.task._target_", throw_on_missing=False, throw_on_resolution_failure=False)
    stage = config.get("stage") or guess_stage(typed_choices(arguments), task)
    choices = []
    if any(name.startswith(("epochs", "trainer.model", "trainer.optim")) for name in missing):
        choices.append(f"+experiments={EXPERIMENTS[stage]} (a stage, its model and optimizer)")
    if any(name.startswith(("trainer.data", "trainer.task")) for name in missing):
        choices.append(f"+trainer={EXAMPLE_RECIPES[stage]} (data and task)")
    if "launcher.experiment_log_dir" in missing:
        choices.append("launcher.experiment_log_dir=FOLDER")
    return f" Add {', '.join(choices)}." if choices else ""


def _weights_problems(settings: Settings, arguments: Sequence[str]) -> list[str]:
    """Frozen or averaged weights that come from nowhere, unless null was typed."""
    frozen = settings.trainer.freeze or "num_models" in settings.trainer.model
    if not frozen or settings.pretrained_checkpoint_path is not None or settings.trainer.mode == "val":
        return []
    resumes = Path(settings.trainer.checkpoint.save_dir, LATEST).exists()
    if resumes or argument_for("pretrained_checkpoint_path", arguments):
        return []
    return [
        "pretrained_checkpoint_path must be set for a run that freezes or averages pretrained weights, got null. Set "
        "pretrained_checkpoint_path=RUN, or type pretrained_checkpoint_path=null for randomly initialized weights."
    ]


# ---- Settings that must agree -------------------------------------------------------------------------------------


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
