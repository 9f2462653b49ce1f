"""The split files that datasets are published with: UCF101, HMDB51, Something-Something v2, Diving48."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from omnivision.data.frames import natural
from omnivision.tools.prepare.index import DatasetIndex, Record, listing_error
from omnivision.utils.errors import UserError

_TEST_IS_VAL = "The published test split is val here, as results on this dataset are reported."
Parsed = tuple[str, str | int] | None  # path and label; None for an invalid row


def read_ucf101(folder: Path, fold: int) -> DatasetIndex:
    """Read classInd.txt: "1 ApplyEyeMakeup"; trainlist01.txt: "Class/v_x.avi 1"; testlist01.txt (val): "Class/v_x.avi"."""
    numbers: dict[str, int] = {}
    for _, line in _lines(folder / "classInd.txt"):
        number, _, name = line.partition(" ")
        numbers[name.strip()] = int(number) if number.isdecimal() else 0
    if sorted(numbers.values()) != list(range(1, len(numbers) + 1)):
        raise UserError(f"{folder}/classInd.txt must number its classes from 1: a number and a name in each row.")

    def parse(line: str) -> Parsed:
        path, label = match.groups() if (match := re.fullmatch(r"(.+?)(?:\s+([0-9]+))?", line)) else (line, None)
        name = path.partition("/")[0]
        return (path, name) if name in numbers and (label is None or int(label) == numbers[name]) else None

    files = {"train": f"trainlist{fold:02}.txt", "val": f"testlist{fold:02}.txt"}
    expected = "Class/video.avi and its number, as in classInd.txt"
    splits = {split: _records(_lines(folder / file), parse, expected) for split, file in files.items()}
    return DatasetIndex(splits, str(folder), sorted(numbers, key=numbers.__getitem__), notes=[_TEST_IS_VAL])


def read_hmdb51(folder: Path, fold: int) -> DatasetIndex:
    """Read <class>_test_split1.txt: "name.avi 1" (train), 2 (test, here val) or 0 (unused); a folder of videos per class."""
    suffix = f"_test_split{fold}.txt"
    files = sorted(folder.glob(f"*{suffix}"), key=lambda file: natural(file.name))
    classes = [file.name.removesuffix(suffix) for file in files]
    if not files:
        raise UserError(f"{folder} has no files *{suffix}; expected one for each class. Change --fold or SOURCE.")
    parts: dict[str, list[Record]] = {"0": [], "1": [], "2": []}
    problems = []
    for file, name in zip(files, classes, strict=True):
        for where, line in _lines(file):
            path, _, part = line.rpartition(" ")
            if path and part in parts:
                parts[part].append(Record(f"{name}/{path.strip()}", name, where))
            else:
                problems.append(f"{where}: {line}")
    _check(problems, "a name and 0, 1 or 2")
    notes = [_TEST_IS_VAL, f"{len(parts['0'])} videos are in neither split of fold {fold}."]
    return DatasetIndex({"train": parts["1"], "val": parts["2"]}, str(folder), classes, notes=notes)


def read_something(folder: Path) -> DatasetIndex:
    """Read *labels.json: {template: number}; *train.json, *validation.json: [{"id", "template", ...}]; videos are <id>.webm."""
    file = _only(folder, "*labels.json")
    table = _json(file, dict)
    numbers = {name: int(number) for name, number in table.items() if str(number).isdecimal()}
    if len(numbers) < len(table) or sorted(numbers.values()) != list(range(len(numbers))):
        raise UserError(f'{file} must number its classes from 0: {{"Holding something": "0", ...}}. Get it again.')

    def parse(entry: dict[str, Any]) -> Parsed:
        # Templates mark what varies: "Holding [something]". labels.json does not.
        name = str(entry.get("template", "")).replace("[", "").replace("]", "")
        return (f"{entry['id']}.webm", name) if "id" in entry and name in numbers else None

    patterns = {"train": "*train.json", "val": "*validation.json"}
    expected = f"an id, and a template that is in {file.name}"
    splits = {split: _records(_entries(_only(folder, name)), parse, expected) for split, name in patterns.items()}
    notes = [f"{file.name} is skipped; it holds no labels." for file in folder.glob("*test.json")]
    return DatasetIndex(splits, str(folder), sorted(numbers, key=numbers.__getitem__), notes=notes)


def read_diving48(folder: Path) -> DatasetIndex:
    """Read Diving48*_train.json, Diving48*_test.json (val): [{"vid_name", "label", ...}]; videos are <vid_name>.mp4.

    Diving48*_vocab.json, if it exists, has the four parts of the name of each class.
    """

    def parse(entry: dict[str, Any]) -> Parsed:
        name, label = entry.get("vid_name"), entry.get("label")
        return (f"{name}.mp4", label) if isinstance(name, str) and isinstance(label, int) else None

    patterns = {"train": "Diving48*_train.json", "val": "Diving48*_test.json"}
    splits = {
        split: _records(_entries(_only(folder, name)), parse, "vid_name and label") for split, name in patterns.items()
    }
    classes = []
    if any(folder.glob("Diving48*_vocab.json")):
        vocabulary = _json(_only(folder, "Diving48*_vocab.json"), list)
        classes = ["_".join(map(str, name)) if isinstance(name, list) else str(name) for name in vocabulary]
    return DatasetIndex(splits, str(folder), classes, notes=[_TEST_IS_VAL])


def _records(rows: Iterable[tuple[str, Any]], parse: Callable[[Any], Parsed], expected: str) -> list[Record]:
    """Parse (place, row) each. Raises UserError that lists the invalid rows."""
    parsed = [(where, row, parse(row)) for where, row in rows]
    _check([f"{where}: {str(row)[:80]}" for where, row, result in parsed if result is None], expected)
    return [Record(*result, where) for where, _, result in parsed if result is not None]


def _check(problems: list[str], expected: str) -> None:
    if problems:
        raise listing_error("Some rows are invalid", problems, f"Expected {expected}. Get the file again, or fix it.")


def _lines(file: Path) -> list[tuple[str, str]]:
    """Return (place, line) of the lines that are not empty."""
    lines = enumerate(map(str.strip, _read(file, str.splitlines)), start=1)
    return [(f"{file.name}, row {number}", line) for number, line in lines if line]


def _entries(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (place, object) of a JSON list of objects."""
    entries = _json(file, list)
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{file} must be a list of objects, one per video. Get it again.")
    return [(f"{file.name}, entry {number}", entry) for number, entry in enumerate(entries, start=1)]


def _json(file: Path, kind: type) -> Any:
    content = _read(file, json.loads)
    if not isinstance(content, kind):
        raise UserError(f"{file} must hold a JSON {'list' if kind is list else 'object'}. Get it again.")
    return content


def _read(file: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}. Change --fold or SOURCE, or get the file again.") from error


def _only(folder: Path, pattern: str) -> Path:
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        raise UserError(
            f"{folder} must have one file {pattern}, got {len(files)}: {', '.join(file.name for file in files)}. Move the "
            "others away, or change SOURCE."
        )
    return files[0]
