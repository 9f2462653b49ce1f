"""Lists of samples as text: rows of `path;label` or `path,label`, with or without a header, with names or integers as labels.

Columns are identified by their names: path, label, split, start and end (seconds). Unused columns are reported. With several
classes or numbers per sample, there may be several label columns, one for each class or target.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omnivision.config.schema import LabelType
from omnivision.data.sampling import Segment
from omnivision.tools.prepare.index import (
    DatasetIndex,
    Record,
    format_splits,
    guess_split,
    listing_error,
    split_of,
)
from omnivision.utils.errors import UserError, truncate_list

_DELIMITERS = {";": "semicolon", "\t": "tab", ",": "comma", " ": "space"}  # the first that splits the rows is used
_PATHS = (  # column names of paths, the best first, then of video names
    "path video_path clip_path file_path filepath filename file_name file video video_name clip "
    "youtube_id yt_id video_id vid clip_id clip_name name id"
).split()
_LABELS = (
    "label class category action activity target class_name label_name action_name "
    "class_id label_id action_id class_index label_index labels"
).split()
# Words in the names of other columns. Names of time columns may also contain _UNITS: "t_start", "Start Time (s)".
_SPLITS = set("split subset phase partition usage fold set".split())
_STARTS, _ENDS, _DURATIONS = {"start", "begin", "from", "onset"}, {"end", "stop", "finish", "to", "until"}, {"duration"}
_UNITS = set("t time timestamp clip segment action event label at s sec secs second seconds".split())
# Words of columns that select a part of a video in an unsupported way: "start_frame", "end_ms", "timestamp", "mark_in".
_PARTS = {"start", "begin", "end", "stop", "onset", "offset", "duration", "first", "last", "min", "max", "frame"}
_PARTS |= set("t time times timestamp timestamps interval intervals segment segments in out center middle mid".split())
_NO_LABELS = {"", "nan", "NaN", "None", "null", "NULL", "<NA>"}  # how programs write a missing value
_ROLES = ("path", "label", "split", "start", "end")


@dataclass(frozen=True)
class _Table:
    """A file's rows (row number, fields) and column names; unnamed columns get their number (1, 2, ...)."""

    file: Path
    delimiter: str
    rows: list[tuple[int, list[str]]]
    names: list[str]
    has_header: bool

    def values(self, column: int) -> set[str]:
        return {cells[column].lower() for _, cells in self.rows if column < len(cells)}

    def error(self, problem: str) -> UserError:
        """Return an error about the table's columns."""
        return UserError(
            f"{self.file} {problem}. Its columns are {truncate_list(self.names, 20)}. Set --columns path=NAME,label=NAME "
            "(repeat label=NAME for several label columns) and, if used, split=NAME or start=NAME,end=NAME (seconds), by names "
            "or numbers (1, 2, ...). Others are then ignored."
        )


def read_csv_lists(
    files: Mapping[str | None, str],
    root: str,
    columns: str | None = None,
    chosen: Mapping[str, str] | None = None,
    label_type: LabelType = "class",
    separator: str = "",
) -> DatasetIndex:
    """Read CSV files. files: split -> file; the file under None is divided by its split column, or is the train split.

    columns: ROLE=COLUMN,... by name or number; None: by their names. chosen: value in the split column -> split; empty: there
    is no split column; None: by the values' names. label_type: except for classes, the label of a record is a tuple of texts,
    one for each label column; several columns name the classes or targets. separator: what separates the classes in a field,
    and so never the fields. Raises UserError that lists the invalid rows, and
    for columns that select a part of a video or of the rows in an unsupported way.
    """
    records: list[Record] = []
    names: list[str] = []
    for own, file in files.items():
        table = _read(Path(file), columns, separator if label_type == "multi_label" else "")
        roles = _chosen_roles(table, columns, label_type) if columns else _find_roles(table)
        if chosen == {}:
            roles.pop("split", None)
        found = _records(table, roles, _splits_of_values(table, roles.get("split"), chosen), own, label_type)
        records += found
        targets = [table.names[column] for role, column in roles.items() if _is_label(role)]
        if names and names != targets:
            raise table.error(f"has the label columns {truncate_list(targets)}, another list {truncate_list(names)}")
        names = targets if label_type != "class" else []
        used = ", ".join(f"{role} from column {table.names[column]}" for role, column in roles.items())
        unused = ", ".join(name for column, name in enumerate(table.names) if column not in roles.values())
        print(f"{file}: {used}{' (seconds)' if 'start' in roles else ''}. Not used: {unused or 'none'}.")
        if len(found) < len(table.rows):
            print(f"{file}: {len(table.rows) - len(found)} rows of other splits are skipped.")
    return DatasetIndex(records, root, names)


def _is_label(role: str) -> bool:
    return role.partition(" ")[0] == "label"


def _read(file: Path, columns: str | None, separator: str) -> _Table:
    """Read a table. Rows are numbered from 1, like lines; empty rows are left out."""
    try:
        if not file.is_file():  # a pipe would block
            raise OSError("no such file")
        text = file.read_text(encoding="utf-8-sig")
        delimiter = _delimiter(text, separator)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        cells = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
        rows = [(number, row) for number, row in cells if any(row)]
        first = rows[0][1] if rows else []
        has_header = len(first) > 1 and any(_normalize_column(name) in _PATHS for name in first)
        if columns:
            has_header |= all(item.partition("=")[2] in first for item in columns.split(","))
        if len(rows) <= has_header:
            raise ValueError("it has no rows")
    except (OSError, ValueError, csv.Error) as error:  # ValueError: also text that is not UTF-8
        raise UserError(
            f"{file} cannot be read: {error}. Expected a CSV file in UTF-8 ({', '.join(_DELIMITERS.values())}), one row per "
            "sample: path;label or path,label, with quotes around a field that contains the delimiter."
        ) from error
    columns_named = [name if has_header and name else str(number) for number, name in enumerate(first, 1)]
    return _Table(file, delimiter, rows[has_header:], columns_named, has_header)


def _delimiter(text: str, separator: str) -> str:
    """Return the first delimiter, `separator` last, that splits at least half of the rows, else a comma."""
    lines = [line for line in text.splitlines() if line.strip()]
    for delimiter in sorted(_DELIMITERS, key=lambda each: each == separator):  # the separator last
        rows = [next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), []) for line in lines]
        if lines and 2 * sum(len(row) > 1 for row in rows) >= len(lines):
            return delimiter
    return ","


def _chosen_roles(table: _Table, columns: str, label_type: LabelType) -> dict[str, int]:
    """Return the column of each role that --columns gives; further label columns are the roles "label 1", "label 2", ..."""
    items = [item.partition("=")[::2] for item in columns.split(",")]
    if label_type != "class":
        labels = [place for place, (role, _) in enumerate(items) if role == "label"]
        for number, place in enumerate(labels[1:], start=1):
            items[place] = f"label {number}", items[place][1]
    numbers = {str(number): number - 1 for number in range(1, len(table.names) + 1)}
    unique = {name: column for column, name in enumerate(table.names) if table.names.count(name) == 1}
    roles = {role: unique.get(name, numbers.get(name, -1)) for role, name in items}
    known = {role for role in roles if not role.startswith("label ")}
    is_known = {"path", "label"} <= known <= set(_ROLES) and ("start" in roles) == ("end" in roles)
    if not is_known or -1 in roles.values() or len(set(roles.values())) < len(items):
        raise table.error(f"must have one column for each of --columns {columns}")
    return roles


def _find_roles(table: _Table) -> dict[str, int]:
    """Return the column of each role, by the columns' names and values. Raises UserError if they are unclear."""
    if not table.has_header:
        if len(table.names) > 2:
            raise table.error(
                f"has no header that names path and label; its first row is {truncate_list(table.rows[0][1])}"
            )
        return {"path": 0, "label": 1}
    plain = list(map(_normalize_column, table.names))
    path, label = (next((name for name in group if name in plain), None) for group in (_PATHS, _LABELS))
    if path is None or label is None:
        raise table.error("has no path or label column with a known name")
    roles = {"path": plain.index(path), "label": plain.index(label)}
    words = {column: set(re.findall("[a-z]+", name)) for column, name in enumerate(plain)}
    free = [column for column in words if column not in roles.values()]
    by_value = [column for column in free if _are_splits(table.values(column))]
    splits = by_value or [column for column in free if words[column] & _SPLITS][:1]
    for role, count in (("path", plain.count(path)), ("label", plain.count(label)), ("split", len(splits))):
        if count > 1:
            raise table.error(f"has several {role} columns")
    if splits:
        roles["split"] = splits[0]
    starts, ends, durations = (
        [column for column in free if words[column] & names and words[column] <= names | _UNITS]
        for names in (_STARTS, _ENDS, _DURATIONS)
    )
    if starts and (ends or durations):
        return {**roles, "start": starts[0], "end": (ends or durations)[0]}
    parts = [
        table.names[column]
        for column in free
        if column not in splits and (words[column] & _PARTS or _selects_rows(table, column))
    ]
    if parts:
        raise table.error(f"has columns that may select a part of each video or of the rows: {truncate_list(parts)}")
    return roles


def _are_splits(values: set[str]) -> bool:
    """Return whether the values of a column are splits: all are names of splits, or they suggest several."""
    guessed = {guess_split(value) for value in values if value}
    return all(map(split_of, values)) or (len(guessed) > 1 and None not in guessed)


def _selects_rows(table: _Table, column: int) -> bool:
    """Return whether a column is a yes/no column named after a split: "is_train", "held_out"."""
    name = table.names[column]
    return bool(split_of(name) or (guess_split(name) and len(table.values(column)) <= 2))


def _splits_of_values(table: _Table, column: int | None, chosen: Mapping[str, str] | None) -> dict[str, str] | None:
    """Return the split of each lower-case value in the split column; None if there is no such column."""
    if column is None:
        if chosen:
            raise UserError(f"--splits needs a split column, but {table.file} has none. Leave it out.")
        return None
    values = sorted(table.values(column))
    if chosen:
        splits = {value.lower(): split for value, split in chosen.items()}
        is_valid = set(splits) <= set(values)
    else:
        splits = {value: split for value in values if (split := split_of(value))}
        is_valid = len(set(splits.values())) == len(values)
    if not is_valid:
        raise UserError(
            f"The column {table.names[column]} of {table.file} must hold train, val and test; got "
            f"{truncate_list((value or '(nothing)' for value in values), 20)}. Set --splits "
            f"{format_splits(splits) or 'train=NAME,val=NAME'} to skip others, or --splits none to ignore the column."
        )
    return splits


def _records(
    table: _Table,
    roles: Mapping[str, int],
    splits: Mapping[str, str] | None,
    own: str | None,
    label_type: LabelType = "class",
) -> list[Record]:
    """Return the records of a table. own: the split that the list was given for."""
    width = max(len(table.names), *(column + 1 for column in roles.values()))
    records, problems = [], []
    for number, cells in table.rows:
        if len(cells) != width:
            problems.append(f"row {number} has {len(cells)} of {width} fields")
            continue
        fields = {role: cells[column] for role, column in roles.items()}
        split = own or "train" if splits is None else splits.get(fields["split"].lower())
        segment = _segment(table.names[roles["end"]], fields) if "start" in fields else None
        texts = tuple("" if text in _NO_LABELS else text for role, text in fields.items() if _is_label(role))
        if not fields["path"] or (label_type == "class" and not texts[0]):
            problems.append(f"row {number} has no path or label")
        elif own and split not in (None, own):
            problems.append(f"row {number} is of the {split} split in the list --{own}")
        elif "start" in fields and segment is None and split:
            problems.append(f"row {number} has the times {fields['start']!r}, {fields['end']!r}")
        elif split:
            where = f"{table.file.name}, row {number}"
            label = fields["label"] if label_type == "class" else texts
            records.append(Record(fields["path"], label, split, where, segment))
    if problems:
        raise listing_error(
            f"{table.file} has invalid rows",
            problems,
            f"Expected {table.delimiter.join(role for role in _ROLES if role in roles)} in each, with a "
            f"{_DELIMITERS[table.delimiter]} ({', '.join(_DELIMITERS.values())} are known) as delimiter, quotes around a field "
            "with it, and times 0 <= start < end in seconds (90.5) or minutes (1:30.5). Fix the rows, or set --columns.",
        )
    return records


def _segment(end_name: str, fields: Mapping[str, str]) -> Segment | None:
    """Return [start, end) in seconds; None if invalid."""
    start, end = _seconds(fields["start"]), _seconds(fields["end"])
    if "duration" in _normalize_column(end_name):
        end += start
    return (start, end) if 0 <= start < end < math.inf else None


def _seconds(text: str) -> float:
    """Parse seconds from "90.5", "1:30.5" or "0:01:30.5"; NaN for other text."""
    number = r"([0-9]+(\.[0-9]*)?|\.[0-9]+)"
    if not re.fullmatch(rf"({number}:){{0,2}}{number}", text):
        return math.nan
    return sum(60**power * float(part) for power, part in enumerate(reversed(text.split(":"))))


def _normalize_column(name: str) -> str:
    """Convert a column's name to snake case: "Start Time (s)", "startTime" -> "start_time_s", "start_time"."""
    return re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)).strip("_").lower()
