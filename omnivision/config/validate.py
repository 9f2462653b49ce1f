"""Check a composed configuration: unknown keys, types, ranges, objects, settings that must agree. All problems at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from pydantic import ValidationError

from omnivision.config.compose import argument_for, typed_choices, use_yaml12_numbers
from omnivision.config.cross_validate import check_target_kinds, cross_validate
from omnivision.config.instantiate import target_problems
from omnivision.config.messages import format_errors, key_of
from omnivision.config.schema import Settings
from omnivision.config.stages import EXAMPLE_RECIPES, EXPERIMENTS, guess_stage, stage_problems
from omnivision.utils.errors import UserError
from omnivision.utils.io import LATEST


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
        problems = check_target_kinds(settings) or stage_problems(settings, typed_choices(typed), folders)
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
