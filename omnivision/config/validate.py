"""Check a composed configuration: unknown keys, types, ranges, objects, settings that must agree. All problems at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, InterpolationToMissingValueError, OmegaConfBaseException
from pydantic import ValidationError

from omnivision.config.compose import is_typed, use_yaml12_numbers
from omnivision.config.cross_validate import EXAMPLE_RECIPES, EXPERIMENTS, cross_validate
from omnivision.config.instantiate import target_problems
from omnivision.config.messages import MUST_BE_SET, format_errors
from omnivision.config.schema import Settings
from omnivision.utils.errors import UserError
from omnivision.utils.io import LATEST


def validate_config(config: DictConfig, arguments: Sequence[str] | None = None) -> Settings:
    """Return the settings from a composed configuration. Raises UserError with every problem.

    `arguments` are the overrides of the command line; None: the configuration was not composed here.
    """
    try:
        resolved = Resolved(config)
    except RecursionError:
        raise UserError("A setting refers to itself (${...}). Correct the configuration file.") from None
    trainer = resolved.tree.get("trainer")
    trusted = trainer.get("trust_targets") if isinstance(trainer, dict) else None
    trusted = [each for each in trusted if isinstance(each, str) and each] if isinstance(trusted, list) else []
    problems = {}
    if arguments is not None and trusted and not is_typed("trainer.trust_targets", arguments):
        problems["trainer.trust_targets"] = (
            "must be given on the command line alone: building a class runs its code, and files may come from others. Type "
            "'++trainer.trust_targets=[PACKAGE]'."
        )
        trusted = []
    settings = None
    try:
        settings = Settings.model_validate(resolved.tree)
    except ValidationError as error:
        problems |= format_errors(error)
    problems |= target_problems(trainer, "trainer", trusted) | resolved.problems
    # A value that repeats another setting (${...}) is reported under that setting alone.
    own = {key: text for key, text in problems.items() if not resolved.is_reference(key)}
    sentences = [f"{key} {text}" for key, text in (own or problems).items() if text != MUST_BE_SET]
    if missing := [key for key, text in (own or problems).items() if text == MUST_BE_SET]:
        sentences.append(f"Missing: {', '.join(missing)}.{_advice(missing, config)}")
    if settings is not None and not sentences:
        sentences = cross_validate(settings, arguments or ())
        if arguments is not None and not is_typed("pretrained_checkpoint_path", arguments):
            sentences += _weights_problems(settings)
    if sentences:
        raise UserError.from_problems(sentences)
    assert settings is not None
    return settings


def read_run_config(file: Path, trusted: Sequence[str] = ()) -> Settings:
    """Return the settings of a run from its `config.yaml`, with the packages that may be built replaced by `trusted`.

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
    """A configuration as plain Python values (`tree`), interpolations resolved; `problems` by key.

    `references` are the keys whose values are those of other settings.
    """

    def __init__(self, config: DictConfig) -> None:
        self.problems: dict[str, str] = {}
        self.references: set[str] = set()
        self.tree: dict[str, Any] = self._plain(config, "")

    def is_reference(self, key: str) -> bool:
        """Return whether a key, or a group that it is in, is `${...}`."""
        return any(key == each or key.startswith((f"{each}.", f"{each}[")) for each in self.references)

    def _plain(self, node: Any, key: str) -> Any:
        if isinstance(node, DictConfig):
            items = {str(name): self._item(node, name, f"{key}.{name!s}".lstrip(".")) for name in node}
            return {name: value for name, value in items.items() if value is not Ellipsis}
        if isinstance(node, ListConfig):
            return [self._item(node, number, f"{key}[{number}]") for number in range(len(node))]
        return node

    def _item(self, node: DictConfig | ListConfig, name: Any, key: str) -> Any:
        """Return a value of a container, resolved; Ellipsis if it has none."""
        if OmegaConf.is_missing(node, name):
            self.problems[key] = MUST_BE_SET
            return Ellipsis
        if OmegaConf.is_interpolation(node, name):
            self.references.add(key)
        try:
            return self._plain(node[name], key)
        except InterpolationToMissingValueError:
            return Ellipsis  # what it refers to is missing itself
        except OmegaConfBaseException as error:
            text = f"cannot be resolved: {str(error).splitlines()[0]}."
            # What else fails refers to a setting that is invalid itself.
            if isinstance(error, InterpolationKeyError) and text not in self.problems.values():
                self.references.discard(key)
            self.problems[key] = text
            return Ellipsis


def _advice(missing: list[str], config: DictConfig) -> str:
    """Return which experiment and recipe set what is missing; both are of one stage."""
    task = OmegaConf.select(config, "trainer.task._target_", throw_on_missing=False, throw_on_resolution_failure=False)
    stage = config.get("stage") or ("finetune" if str(task).endswith("Classify") else "mae")
    choices = []
    if any(name.startswith(("epochs", "trainer.model", "trainer.optim")) for name in missing):
        choices.append(f"+experiments={EXPERIMENTS[stage]} (a stage, its model and optimizer)")
    if any(name.startswith(("trainer.data", "trainer.task")) for name in missing):
        choices.append(f"+trainer={EXAMPLE_RECIPES[stage]} (data and task)")
    if "launcher.experiment_log_dir" in missing:
        choices.append("launcher.experiment_log_dir=FOLDER")
    return f" Add {', '.join(choices)}." if choices else ""


def _weights_problems(settings: Settings) -> list[str]:
    """Frozen or averaged weights that come from nowhere, unless null was typed."""
    trainer = settings.trainer
    needs_weights = (trainer.freeze or "num_models" in trainer.model) and trainer.mode != "val"
    if not needs_weights or settings.pretrained_checkpoint_path or Path(trainer.checkpoint.save_dir, LATEST).exists():
        return []
    return [
        "pretrained_checkpoint_path must be set for a run that freezes or averages pretrained weights, got null. Set "
        "pretrained_checkpoint_path=RUN, or type pretrained_checkpoint_path=null for randomly initialized weights."
    ]
