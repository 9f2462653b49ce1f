"""Where a setting was written: an argument of the command line, or a line of a configuration file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def origin_of(arguments: Sequence[str], folders: Iterable[Path], composed: Any = None) -> Callable[[str], str]:
    """A function from the full name of a setting to where it was written, in brackets with a space before; "" if nobody knows.

    `arguments` are those of the command line, which come last and win; `folders` hold the files, a site's own first. Of several
    files that have a setting it is the one whose value is that of `composed`, a nested dict, if there is one such file.
    """
    places = list(folders)

    def find(key: str) -> str:
        for argument in reversed(arguments):
            name = argument.partition("=")[0].lstrip("+~").partition("@")[0].replace("/", ".")
            if name == key.replace("/", ".") or name.startswith(f"{key}."):
                return f" (argument {argument})"
        found = [
            (file, *place)
            for folder in places
            for file in sorted(folder.rglob("*.yaml"))
            if (place := _line(file, folder, key.split(".")))
        ]
        if len(found) > 1:
            value = composed
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            found = [each for each in found if each[2] == value]
        return f" ({found[0][0]}, line {found[0][1]})" if len(found) == 1 else ""

    return find


def _line(file: Path, folder: Path, keys: list[str]) -> tuple[int, Any] | None:
    """The line of a file on which a key stands, by its full name, and its value; None if it does not, or cannot be read."""
    try:
        text = file.read_text(encoding="utf-8")
        if keys[-1] not in text:
            return None
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    package = re.search(r"^# *@package +(\S+)", text, re.MULTILINE)
    place = package[1] if package else ".".join(file.relative_to(folder).parent.parts)
    above = [] if place == "_global_" else place.removeprefix("_global_.").split(".")
    if above != keys[: len(above)]:
        return None
    line = text[: package.start()].count("\n") + 1 if package else None
    if isinstance(node, yaml.ScalarNode) and [node.value] == keys:  # a file of one word
        return node.start_mark.line + 1, None
    for key in keys[len(above) :]:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((name, value) for name, value in pairs if name.value == key), None)
        if found is None:
            return None
        line, node = found[0].start_mark.line + 1, found[1]
    try:
        return None if line is None else (line, yaml.SafeLoader("").construct_document(node))
    except (yaml.YAMLError, ValueError, LookupError):
        return None
