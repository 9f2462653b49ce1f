"""The entry of a dataset in the catalog, as text to paste, and in a file that Hydra can be given.

A file that is there keeps its comments and its other entries: only the lines of the entry change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from omnivision.utils.errors import UserError
from omnivision.utils.io import write_atomically

_HEADER = "# @package _global_"


def entry_lines(
    name: str,
    folder: Path,
    *,
    splits: Mapping[str, Sequence[str]],
    num_classes: int,
    prefix: str,
    fps: float | None,
    frame_pattern: str | None = None,
) -> list[str]:
    """The lines of the entry, indented as in a catalog. `folder` holds the arrays and class_names.txt.

    splits: split -> its arrays ("paths", "labels", "segments").

    Raises UserError for a path with "${", which would be read as a reference to another setting, and for a name that YAML
    reads as something else (on, null, 12).
    """
    if yaml.safe_load(name) != name:
        raise UserError(f"--name is {name!r}, which YAML does not read as a word. Give another name.")
    lines = [f"{name}:", "  kind: video", f"  num_classes: {num_classes}"]
    lines += [f"  class_names: {_text(folder / 'class_names.txt')}", f"  prefix: {_text(prefix)}"]
    if fps is not None:
        lines.append(f"  fps: {int(fps) if fps == int(fps) else fps}")
    if frame_pattern is not None:
        lines.append(f"  frame_pattern: {_text(frame_pattern)}")
    for split, arrays in splits.items():
        files = ", ".join(f"{what}: {_text(folder / f'{split}_{what}.npy')}" for what in arrays)
        lines.append(f"  {split}: {{{files}}}")
    return lines


def updated_catalog(file: Path, name: str, lines: list[str]) -> str:
    """The text of the catalog `file`, which need not exist, with this entry. Raises UserError when it cannot be updated."""
    old = _text_of(file)
    before = _parsed(old, file)
    text = _with_entry(old, name, lines) if old.strip() else _with_entry(f"{_HEADER}\ndatasets:\n", name, lines)
    entry = yaml.safe_load("\n".join(lines))
    expected = {**before, "datasets": {**(before.get("datasets") or {}), **entry}}
    try:
        changed = yaml.safe_load(text) == expected
    except yaml.YAMLError:
        changed = False
    if not changed:
        raise UserError(
            f"{file} is written in a way that the entry {name} cannot be put into it line by line (datasets in braces, "
            "anchors?). Nothing was changed. Paste the entry that the command prints without --catalog, or give a new file."
        )
    return text


def write_catalog(file: Path, text: str) -> None:
    """Raises UserError when it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    except OSError as error:
        raise UserError(f"--catalog {file} cannot be written: {error.strerror}. Give another file.") from error


def _text(path: Path | str) -> str:
    """As a string in YAML: JSON's are among them."""
    if "${" in str(path):
        raise UserError(
            f'{path} holds "${{", which a configuration takes for a reference to another setting. Rename it.'
        )
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{str(path)!a} is not UTF-8, which a configuration must be. Rename the folder.") from error
    return json.dumps(str(path), ensure_ascii=False)


def _text_of(file: Path) -> str:
    if not file.exists():
        return ""
    if not file.is_file():
        raise UserError(f"--catalog {file} is no file; expected a YAML file, which may be new.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--catalog {file} is not a text in UTF-8; expected a YAML file, which may be new.") from error


def _parsed(text: str, file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text) or {}
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--catalog {file} cannot be read as YAML: {reason}. Mend it, or give a new file.") from error
    if not isinstance(found, dict) or not isinstance(found.get("datasets") or {}, dict):
        raise UserError(f"--catalog {file} is no catalog; expected a mapping with the key datasets. Give a new file.")
    if text.strip() and not text.startswith(_HEADER):
        raise UserError(
            f"--catalog {file} does not begin with the line {_HEADER!r}, without which Hydra would not find datasets at the "
            "top. Put it there, or give a new file."
        )
    return found


def _with_entry(text: str, name: str, lines: list[str]) -> str:
    """`text` with the entry in place of the one of that name, or after the others; unchanged if it cannot be had."""
    rows = text.splitlines()
    start = next((i + 1 for i, row in enumerate(rows) if re.match(r"datasets:\s*(#.*)?$", row)), None)
    if start is None and re.search(r"^['\"]?datasets['\"]?\s*:", text, re.MULTILINE):
        return text  # in braces
    if start is None:
        rows += ["", "datasets:"]
        start = len(rows)
    end = next((i for i in range(start, len(rows)) if re.match(r"[^\s#]", rows[i])), len(rows))
    while end > start and not rows[end - 1].strip():
        end -= 1  # blank lines stay after the section
    keys = [i for i in range(start, end) if rows[i].strip() and not rows[i].lstrip().startswith("#")]
    indent = re.match(r"\s*", rows[keys[0]])[0] if keys else "  "  # type: ignore[index]
    heads = [i for i in keys if re.match(rf"{indent}[^\s#]", rows[i])]
    block = [indent + line for line in lines]
    for number, head in enumerate(heads):
        if re.match(rf"{indent}(['\"]?){re.escape(name)}\1\s*:", rows[head]):
            last = heads[number + 1] if number + 1 < len(heads) else end
            while last - 1 > head and (not rows[last - 1].strip() or rows[last - 1].lstrip().startswith("#")):
                last -= 1  # what stands above the next entry is about that one
            return "\n".join([*rows[:head], *block, *rows[last:]]) + "\n"
    return "\n".join([*rows[:end], *block, *rows[end:]]) + "\n"
