"""The split files that datasets are published with: UCF101, HMDB51, Something-Something v2, Diving48."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from omnivision.data.frames import natural
from omnivision.tools.prepare.index import DatasetIndex, Record, listing_error
from omnivision.utils.errors import UserError

_TEST_IS_VAL = "The published test split is val here, as results on this dataset are reported."


def read_ucf101(folder: Path, fold: int) -> DatasetIndex:
    """classInd.txt: "1 ApplyEyeMakeup"; trainlist01.txt: "Class/v_x.avi 1"; testlist01.txt: "Class/v_x.avi", which is val."""
    numbers, problems = {}, []
    for where, line in _lines(folder / "classInd.txt"):
        number, _, name = line.partition(" ")
        if number.isdecimal() and name.strip():
            numbers[name.strip()] = int(number)
        else:
            problems.append(f"{where}: {line}")
    if problems or sorted(numbers.values()) != list(range(1, len(numbers) + 1)):
        raise listing_error(
            f"{folder / 'classInd.txt'} does not number its classes from 1",
            problems or [f"{len(numbers)} names for the numbers {sorted(numbers.values())[:5]}"],
            "Expected a number and a name in each row.",
        )
    splits: dict[str, list[Record]] = {"train": [], "val": []}
    for split, name in (("train", f"trainlist{fold:02}.txt"), ("val", f"testlist{fold:02}.txt")):
        for where, line in _lines(folder / name):
            path, label = match.groups() if (match := re.fullmatch(r"(.+?)(?:\s+([0-9]+))?", line)) else (line, None)
            named = path.partition("/")[0]
            if numbers.get(named) is None or (label is not None and int(label) != numbers[named]):
                problems.append(f"{where}: {line}")
            splits[split].append(Record(path, named, where))
    if problems:
        raise listing_error(
            f"The lists in {folder} do not agree with classInd.txt",
            problems,
            "Expected Class/video.avi and its number.",
        )
    return DatasetIndex(splits, str(folder), sorted(numbers, key=lambda name: numbers[name]), notes=[_TEST_IS_VAL])


def read_hmdb51(folder: Path, fold: int) -> DatasetIndex:
    """<class>_test_split1.txt: "name.avi 1" (train), 2 (test, here val) or 0 (unused); videos lie in a folder a class."""
    splits: dict[str, list[Record]] = {"train": [], "val": []}
    problems, classes, unused = [], [], 0
    ending = f"_test_split{fold}.txt"
    for file in sorted(folder.glob(f"*{ending}"), key=lambda file: natural(file.name)):
        named = file.name.removesuffix(ending)
        classes.append(named)
        for where, line in _lines(file):
            match = re.fullmatch(r"(.+?)\s+([012])", line)
            if match is None:
                problems.append(f"{where}: {line}")
            elif match[2] == "0":
                unused += 1
            else:
                splits["train" if match[2] == "1" else "val"].append(Record(f"{named}/{match[1]}", named, where))
    if not classes:
        raise UserError(
            f"{folder} has no files *{ending}; expected one for each class. Choose another --fold or SOURCE."
        )
    if problems:
        raise listing_error(
            f"Lists in {folder} have rows that cannot be read", problems, "Expected a name and 0, 1 or 2."
        )
    notes = [_TEST_IS_VAL, f"{unused} videos are in neither split of fold {fold}."]
    return DatasetIndex(splits, str(folder), classes, notes=notes)


def read_something(folder: Path) -> DatasetIndex:
    """*labels.json: {template: number}; *train.json, *validation.json: [{"id", "template", ...}]; videos are <id>.webm."""
    file = _only(folder, "*labels.json")
    table = _json(file)
    numbers = (
        {name: int(number) for name, number in table.items() if str(number).isdecimal()}
        if isinstance(table, dict)
        else {}
    )
    if not numbers or sorted(numbers.values()) != list(range(len(numbers))):
        raise UserError(
            f'{file} does not number its classes from 0; expected {{"Holding something": "0", ...}}. Give another file.'
        )
    splits = {}
    for split, pattern in (("train", "*train.json"), ("val", "*validation.json")):
        rows, problems = [], []
        for where, entry in _entries(_only(folder, pattern)):
            # Templates mark what varies: "Holding [something]". labels.json does not.
            named = str(entry.get("template", "")).replace("[", "").replace("]", "")
            if "id" in entry and named in numbers:
                rows.append(Record(f"{entry['id']}.webm", named, where))
            else:
                problems.append(f"{where}: {json.dumps(entry)[:80]}")
        if problems:
            advice = f"Expected an id, and a template that is in {file.name}."
            raise listing_error(f"{pattern} in {folder} has entries that cannot be read", problems, advice)
        splits[split] = rows
    notes = [f"{file.name} is passed over; it holds no labels." for file in folder.glob("*test.json")]
    return DatasetIndex(splits, str(folder), sorted(numbers, key=lambda name: numbers[name]), notes=notes)


def read_diving48(folder: Path) -> DatasetIndex:
    """Diving48*_train.json, Diving48*_test.json (val): [{"vid_name", "label", ...}]; videos are <vid_name>.mp4.

    Diving48*_vocab.json, if there, has the four parts of the name of each class.
    """
    splits = {}
    for split, pattern in (("train", "Diving48*_train.json"), ("val", "Diving48*_test.json")):
        rows, problems = [], []
        for where, entry in _entries(_only(folder, pattern)):
            label = entry.get("label")
            if isinstance(entry.get("vid_name"), str) and isinstance(label, int):
                rows.append(Record(f"{entry['vid_name']}.mp4", label, where))
            else:
                problems.append(f"{where}: {json.dumps(entry)[:80]}")
        if problems:
            raise listing_error(
                f"{pattern} in {folder} has entries that cannot be read", problems, "Expected vid_name and label."
            )
        splits[split] = rows
    classes = None
    if any(folder.glob("Diving48*_vocab.json")):
        file = _only(folder, "Diving48*_vocab.json")
        vocabulary = _json(file)
        if not isinstance(vocabulary, list):
            raise UserError(f"{file} is no list; expected one of the classes' names. Fix it, or move it away.")
        classes = ["_".join(map(str, name)) if isinstance(name, list) else str(name) for name in vocabulary]
    return DatasetIndex(splits, str(folder), classes, notes=[_TEST_IS_VAL])


def _lines(file: Path) -> list[tuple[str, str]]:
    """Return (place, line) of the lines that are not empty."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected it beside the others. Choose another --fold or SOURCE.")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a text in UTF-8 ({error.reason} at byte {error.start}). Fix it.") from error
    return [(f"{file.name}, row {k}", line.strip()) for k, line in enumerate(lines, start=1) if line.strip()]


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise UserError(
            f"{folder} has {len(found)} files {pattern}{': ' if found else ''}{', '.join(file.name for file in found)}; "
            "expected one. Leave one there, or give another SOURCE."
        )
    return found[0]


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({error}); expected the file as it is published. Get it again.") from error


def _entries(file: Path) -> list[tuple[str, dict[str, Any]]]:
    entries = _json(file)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{file}: expected a list of objects, one a video, and at least one. Get it again.")
    return [(f"{file.name}, entry {k}", entry) for k, entry in enumerate(entries, start=1)]
