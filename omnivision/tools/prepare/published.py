"""Readers for published split files: UCF101, HMDB51, Something-Something v2, Diving48."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omnivision.data.frames import natural_sort_key
from omnivision.tools.prepare.index import DatasetIndex, Record, listing_error
from omnivision.utils.errors import UserError

_TEST_IS_VAL = "The published test split is val here, as results on this dataset are reported."
Sample = tuple[str, str | int, str]  # path, label and split ("": in no split)


def read_ucf101(folder: Path, fold: int) -> DatasetIndex:
    """Read classInd.txt: "1 ApplyEyeMakeup"; trainlist01.txt: "Class/v_x.avi 1"; testlist01.txt (val): "Class/v_x.avi"."""
    pairs = (line.partition(" ") for line in _read(folder, "classInd.txt", str.splitlines))
    numbers = {name.strip(): number for number, _, name in pairs if name}

    def parse(split: str, line: str) -> Sample:
        path, *label = re.split(r"\s+(?=[0-9]+$)", line)
        name = path.partition("/")[0]
        if label not in ([], [numbers[name]]):
            raise ValueError("its folder belongs to another class")
        return path, name, split

    files = {"train": f"trainlist{fold:02}.txt", "val": f"testlist{fold:02}.txt"}
    records = _records(folder, files, str.splitlines, parse)
    print(_TEST_IS_VAL)
    return DatasetIndex(records, str(folder), _order("classInd.txt", numbers, first=1))


def read_hmdb51(folder: Path, fold: int) -> DatasetIndex:
    """Read <class>_test_split1.txt: "name.avi 1" (train), 2 (test, here val) or 0 (unused); a class is a folder."""
    suffix = f"_test_split{fold}.txt"
    classes = sorted((file.name.removesuffix(suffix) for file in folder.glob(f"*{suffix}")), key=natural_sort_key)

    def parse(name: str, line: str) -> Sample:
        path, part = line.rsplit(maxsplit=1)
        return f"{name}/{path}", name, {"0": "", "1": "train", "2": "val"}[part]

    records = _records(folder, {name: f"{name}{suffix}" for name in classes}, str.splitlines, parse)
    used = [record for record in records if record.split]
    print(_TEST_IS_VAL, f"{len(records) - len(used)} videos are in neither split of fold {fold}.", sep="\n")
    return DatasetIndex(used, str(folder), classes)


def read_something(folder: Path, _: int) -> DatasetIndex:
    """Read *labels.json: {template: number}; *train.json, *validation.json: [{"id", "template", ...}]; videos are <id>.webm."""
    numbers = _read(folder, "*labels.json", lambda text: dict(json.loads(text)))

    def parse(split: str, entry: Mapping[str, Any]) -> Sample:
        name = entry["template"].replace("[", "").replace("]", "")  # labels.json lacks brackets
        if name not in numbers:
            raise ValueError("no such class")
        return f"{entry['id']}.webm", name, split

    records = _records(folder, {"train": "*train.json", "val": "*validation.json"}, _parse_list, parse)
    return DatasetIndex(records, str(folder), _order("labels.json", numbers, first=0))


def read_diving48(folder: Path, _: int) -> DatasetIndex:
    """Read Diving48*_train.json, Diving48*_test.json (val): [{"vid_name", "label", ...}]; videos are <vid_name>.mp4.

    Diving48*_vocab.json, if it exists, has the four parts of each class name.
    """

    def parse(split: str, entry: Mapping[str, Any]) -> Sample:
        return f"{entry['vid_name']}.mp4", int(entry["label"]), split

    records = _records(folder, {"train": "Diving48*_train.json", "val": "Diving48*_test.json"}, _parse_list, parse)
    vocabulary = "Diving48*_vocab.json"
    names = _read(folder, vocabulary, _parse_list) if any(folder.glob(vocabulary)) else []
    classes = ["_".join(map(str, name)) if isinstance(name, list) else str(name) for name in names]
    print(_TEST_IS_VAL)
    return DatasetIndex(records, str(folder), classes)


# Format -> the files in SOURCE that identify it, and its reader, which takes the folder and the fold.
READERS: dict[str, tuple[tuple[str, ...], Callable[[Path, int], DatasetIndex]]] = {
    "ucf101": (("classInd.txt",), read_ucf101),
    "hmdb51": (("*_test_split?.txt",), read_hmdb51),
    "ssv2": (("*labels.json", "*validation.json"), read_something),
    "diving48": (("Diving48*_train.json",), read_diving48),
}


def _order(file: str, numbers: Mapping[str, object], first: int) -> list[str]:
    """Return the class names in the order of their numbers, which must be first, first + 1, ..."""
    names = {str(number): name for name, number in numbers.items()}
    expected = [str(number) for number in range(first, first + len(numbers))]
    if set(names) != set(expected):
        raise UserError(f"{file} must number its classes from {first}. Download it again.")
    return [names[number] for number in expected]


def _records(
    folder: Path,
    files: Mapping[str, str],
    split_rows: Callable[[str], list[Any]],
    parse: Callable[[str, Any], Sample],
) -> list[Record]:
    """Parse the rows of files (key -> pattern); `parse` gets the key and a row. Raises UserError for invalid rows."""
    records, problems = [], []
    for key, pattern in files.items():
        for number, row in enumerate(_read(folder, pattern, split_rows), start=1):
            where = f"{pattern.lstrip('*')}, row {number}"
            try:
                if row := row.strip() if isinstance(row, str) else row:
                    records.append(Record(*parse(key, row), where))
            except (AttributeError, LookupError, TypeError, ValueError):
                problems.append(f"{where}: {str(row)[:80]}")
    if problems:
        raise listing_error(f"{folder} has invalid rows", problems, "Download the files again, or fix them.")
    return records


def _parse_list(text: str) -> list[Any]:
    return list(json.loads(text))


def _read(folder: Path, pattern: str, parse: Callable[[str], Any]) -> Any:
    """Parse the only file that matches a pattern. Raises UserError if it cannot be read or is empty."""
    files = sorted(folder.glob(pattern))
    try:
        if len(files) != 1:
            raise ValueError(f"there must be one, got {len(files)}")
        if content := parse(files[0].read_text(encoding="utf-8-sig")):
            return content
        raise ValueError("it is empty")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder}/{pattern} cannot be read: {error}. Change --fold or SOURCE, or download the file again."
        ) from error
