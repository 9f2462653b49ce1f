"""The entry of a dataset in the catalog: as text to paste, and in a file whose comments and other entries stay."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from omnivision.utils.errors import UserError
from omnivision.utils.io import write_atomically

_HEADER = "# @package _global_"  # without it, Hydra would not find `datasets` at the top


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
    """Return the lines of the entry. `folder` holds the arrays and class_names.txt; splits: split -> names of its arrays.

    Raises UserError for a path with "${", which a configuration reads as a reference, and for a name that YAML does not read
    as a word (on, null, 12).
    """
    if yaml.safe_load(name) != name:
        raise UserError(f"--name is {name!r}, which YAML does not read as a word. Change --name.")
    lines = [f"{name}:", "  kind: video", f"  num_classes: {num_classes}"]
    lines += [f"  class_names: {_quote(folder / 'class_names.txt')}", f"  prefix: {_quote(prefix)}"]
    if fps is not None:
        lines.append(f"  fps: {int(fps) if fps == int(fps) else fps}")
    if frame_pattern is not None:
        lines.append(f"  frame_pattern: {_quote(frame_pattern)}")
    for split, arrays in splits.items():
        files = ", ".join(f"{what}: {_quote(folder / f'{split}_{what}.npy')}" for what in arrays)
        lines.append(f"  {split}: {{{files}}}")
    return lines


def updated_catalog(file: Path, name: str, lines: list[str]) -> str:
    """Return the text of the catalog `file`, which may be new, with this entry in place of the one of that name.

    Raises UserError for a file that is no catalog.
    """
    text = _read(file)
    datasets = _datasets(text, file)
    rows = text.splitlines()
    if datasets is None or not datasets.value:
        if datasets is None:
            rows.append("datasets:")
        start = next(i for i, row in enumerate(rows) if row.startswith("datasets:")) + 1
        end, indent = start, 2
    else:
        indent = datasets.value[0][0].start_mark.column
        end = _last_line(datasets) + 1
        start = end
        for key, value in datasets.value:
            if key.value == name:
                start, end = key.start_mark.line, max(key.end_mark.line, _last_line(value)) + 1
    return "\n".join([*rows[:start], *(" " * indent + line for line in lines), *rows[end:]]) + "\n"


def write_catalog(file: Path, text: str) -> None:
    """Replace the catalog. Raises UserError when it cannot be written."""
    try:
        write_atomically(file, text)
    except OSError as error:
        raise UserError(f"--catalog {file} cannot be written: {error.strerror}. Set another --catalog.") from error


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"--catalog {file} must be text in UTF-8. Set another --catalog.") from error
    if file.exists() and not file.is_file():
        raise UserError(f"--catalog {file} must be a YAML file, which may be new. Set another --catalog.")
    if text.strip() and not text.startswith(_HEADER):
        raise UserError(f"--catalog {file} must begin with the line {_HEADER!r}. Add it, or set another --catalog.")
    return text if text.strip() else f"{_HEADER}\n"


def _datasets(text: str, file: Path) -> yaml.MappingNode | None:
    """Return the node of `datasets`, without entries if it is empty; None if the file has no such key."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--catalog {file} cannot be read as YAML: {reason}. Fix it, or set another --catalog."
        ) from error
    if root is None:
        return None
    if isinstance(root, yaml.MappingNode):
        found = [value for key, value in root.value if key.value == "datasets"]
        if not found:
            return None
        if isinstance(found[0], yaml.MappingNode) and not found[0].flow_style:
            return found[0]
        if found[0].tag == "tag:yaml.org,2002:null":
            return yaml.MappingNode(found[0].tag, [])
    raise UserError(
        f"--catalog {file} must be a mapping with a block of entries below `datasets:`. Set another --catalog, or paste the "
        "entry that the command prints without it."
    )


def _last_line(node: yaml.Node) -> int:
    """Return the last line of a node without the comments that follow it."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style and node.value:
        return _last_line(node.value[-1][1])
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return _last_line(node.value[-1])
    is_block_text = isinstance(node, yaml.ScalarNode) and node.style in ("|", ">")
    return node.end_mark.line - 1 if is_block_text else node.end_mark.line


def _quote(path: Path | str) -> str:
    """Return a string in YAML: one of JSON is."""
    if "${" in str(path):
        raise UserError(f'{path} must not contain "${{", which a configuration reads as a reference. Rename it.')
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{str(path)!a} must be UTF-8, as a configuration is. Rename the folder.") from error
    return json.dumps(str(path), ensure_ascii=False)
