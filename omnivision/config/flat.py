"""Flat configurations: {full key: value}."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested mappings, with names like trainer.optim.gradient_clip."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: v for k, part in value.items() for key, v in flatten(part, f"{name}.{k}" if name else str(k)).items()}


def flatten_yaml(text: str) -> dict[str, Any]:
    """Parse YAML to a flat configuration, interpolations unresolved."""
    return flatten(yaml.safe_load(text))


def read_flat_file(file: Path) -> dict[str, Any] | None:
    """Read the flat configuration in a file; None if it cannot be read."""
    try:
        return flatten_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def describe_changes(
    saved: Mapping[str, Any], current: Mapping[str, Any], group: Callable[[str], str] | None = None
) -> dict[str, str]:
    """Return {name: "name: saved -> current"} for entries that differ; with `group`, only in groups that both have."""
    shared = {group(name) for name in saved} & {group(name) for name in current} if group else set()
    return {
        name: f"{name}: {saved.get(name)} -> {current.get(name)}"
        for name in {**saved, **current}
        if saved.get(name) != current.get(name) and (group is None or group(name) in shared)
    }


def used_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat settings without the catalog entries of datasets that the run does not use."""
    sources = {name.split(".")[3] for name in settings if name.startswith("trainer.data.sources.")}
    return {
        name: value
        for name, value in settings.items()
        if not name.startswith("datasets.") or name.split(".")[1] in sources
    }


def resolve_reference(settings: Mapping[str, Any], name: str) -> Any:
    """Return the value of a setting; a plain reference (`${epochs}`) is followed to the setting it names."""
    value, visited = settings.get(name), {name}
    while isinstance(value, str) and (reference := REFERENCE.fullmatch(value)) and reference[1] not in visited:
        if reference[1] not in settings:  # a whole section, or one that does not exist
            return value
        visited.add(reference[1])
        value = settings[reference[1]]
    return value
