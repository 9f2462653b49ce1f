"""Check a composed configuration: unknown keys, types, ranges, objects, settings that must agree. All problems at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from pydantic import ValidationError

from omnivision.config.compose import find_config_dir, is_overridden
from omnivision.config.cross_validate import STAGES, cross_validate
from omnivision.config.flat import REFERENCE
from omnivision.config.instantiate import target_problems
from omnivision.config.messages import MUST_BE_SET, UNKNOWN, format_errors
from omnivision.config.schema import Settings
from omnivision.utils.errors import UserError


def validate_config(config: DictConfig, arguments: Sequence[str] | None = None) -> Settings:
    """Return the settings from a composed configuration. Raises UserError with every problem.

    `arguments` are the overrides of the command line; None: the configuration was not composed here.
    """
    problems: dict[str, str] = {}
    references: set[str] = set()
    unresolved: dict[str, str] = {}
    tree = resolve(config, problems, references, unresolved)
    references |= {
        key for key, value in unresolved.items() if {*REFERENCE.findall(value)} & (unresolved.keys() - {key})
    }
    missing = [key for key, text in problems.items() if text == MUST_BE_SET]
    trainer = tree.get("trainer")
    trusted = trainer.get("trust_targets") if isinstance(trainer, dict) else None
    if trusted and arguments is not None and not is_overridden("trainer.trust_targets", arguments):
        problems["trainer.trust_targets"] = (
            "may be given only on the command line: building a class runs its code, and files may come from others. Pass "
            "'++trainer.trust_targets=[PACKAGE]'."
        )
        trusted = None
    settings = None
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        problems = format_errors(error) | problems
    problems = target_problems(trainer, "trainer", trusted if isinstance(trusted, list) else []) | problems
    for key in problems:
        target = f"{key.rpartition('.')[0]}._target_"
        typed = [is_overridden(name, arguments or ()) for name in (target, key)]
        if problems[key].startswith(UNKNOWN) and typed == [True, False]:
            problems[key] = (
                f"is not an argument of the class in {target}; a file sets it for another class. Add '~{key}'."
            )
    # A value that repeats another setting is reported only under that setting.
    problems = {key: text for key, text in problems.items() if not is_within(key, references)} or problems
    sentences = [f"{key} {text}" for key, text in problems.items() if key not in missing]
    if missing:
        stage = STAGES.get(str(tree.get("stage")), STAGES["mae"])
        advice = f" Add an experiment and a recipe of one stage, e.g. +experiments={stage.experiment} +trainer={stage.recipe}."
        without = any(key.startswith(("epochs", "trainer.")) for key in missing)
        sentences.append(f"Missing: {', '.join(missing)}.{advice if without else ''}")
    if settings is not None and not sentences:
        sentences = cross_validate(settings, arguments)
    if settings is None or sentences:
        raise UserError.from_problems(sentences)
    return settings


def read_run_config(file: Path, trusted: Sequence[str] = ()) -> Settings:
    """Read a run's `config.yaml`; `trusted` replaces its trust_targets.

    Raises UserError for an unreadable file and for invalid settings.
    """
    try:
        defaults = OmegaConf.to_container(OmegaConf.load(find_config_dir() / "experiments" / "base.yaml"))
        own = OmegaConf.create(file.read_text(encoding="utf-8"))
        if not isinstance(defaults, dict) or not isinstance(own, DictConfig):
            raise ValueError("must be a mapping")
        del defaults["defaults"]
        config = OmegaConf.create(defaults)  # for settings that are newer than the run
        config.merge_with(own)
        OmegaConf.update(config, "trainer.trust_targets", list(trusted), force_add=True)
        return validate_config(config)
    except (OSError, ValueError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{file}, the settings of the run, cannot be used: {error}") from error


def resolve(
    node: Any, problems: dict[str, str], references: set[str], unresolved: dict[str, str], group: str = ""
) -> Any:
    """Resolve a configuration to plain values; missing and unresolvable ones go to `problems`.

    `references` are the keys whose values are `${...}`; `unresolved` are the values that cannot be resolved, by key.
    """
    if not OmegaConf.is_config(node):
        return node
    is_list, values = OmegaConf.is_list(node), {}
    for name in range(len(node)) if is_list else node:
        key = f"{group}[{name}]" if is_list else f"{group}.{name}".lstrip(".")
        if OmegaConf.is_missing(node, name):
            problems[key] = MUST_BE_SET
            continue
        try:
            values[str(name)] = resolve(node[name], problems, references, unresolved, key)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            is_hydra = "HydraConfig" in reason
            if is_hydra:
                reason = "${hydra:...} is not available, because Hydra only composes; refer to settings, e.g. ${lr}"
            problems[key] = f"cannot be resolved: {reason}."
            unresolved[key] = str(OmegaConf.to_container(node, resolve=False)[name])  # type: ignore[index]
            if is_hydra or isinstance(
                error, InterpolationKeyError
            ):  # no such setting; an invalid one is reported itself
                continue
        if OmegaConf.is_interpolation(node, name):
            references.add(key)
    return list(values.values()) if is_list else values


def is_within(key: str, groups: Collection[str]) -> bool:
    """Return whether a key is one of `groups`, or inside one of them."""
    return any(key == group or key.startswith((f"{group}.", f"{group}[")) for group in groups)
