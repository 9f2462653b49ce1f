"""Lists of samples as text, such as `path;label` or `path,label`, with or without a header, labels as names or integers.

Columns are identified by their names: path, label, split, start and end (seconds). Unused ones are reported.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omnivision.data.sampling import Segment
from omnivision.tools.prepare.index import (
    SPLITS,
    DatasetIndex,
    Record,
    format_splits,
    guess_split,
    listing_error,
    shorten,
    split_of,
)
from omnivision.utils.errors import UserError

_DELIMITERS = {";": "semicolon", "\t": "tab", ",": "comma", " ": "space"}  # the first that splits the rows is used
_PATHS = (  # names of columns, the best first; then of those that name videos
    "path video_path clip_path file_path filepath filename file_name file video video_name clip "
    "youtube_id yt_id video_id vid clip_id clip_name name id"
).split()
_LABELS = (
    "label class category action activity target class_name label_name action_name "
    "class_id label_id action_id class_index label_index"
).split()
_SPLIT = re.compile(r"(.*_)?(split|subset|phase|partition|usage|fold)(_?(name|\d+))?|set|data_?set_(type|part)")
_SUBJECT = r"((t|time|timestamp|clip|segment|seg|action|event|temporal|label)_?)?"
_SECONDS = r"(_?(t|time|timestamp|at|s|sec|secs|second|seconds))*"
_START = re.compile(rf"{_SUBJECT}(start|begin|from|onset){_SECONDS}")
_END = re.compile(rf"{_SUBJECT}(end|stop|finish|to|until){_SECONDS}")
_DURATION = re.compile(rf"{_SUBJECT}(duration|length){_SECONDS}")
# Names of columns that select a part of a video or of the rows in a way that is not supported.
_PARTS = re.compile(
    r"(.*_)?(start|begin|end|stop|onset|offset)(_.*)?|(first|last|key)_frame|"
    r"(first|last|min|max)_(t|time|s|secs?|seconds?)|t_?(first|last|min|max)|"
    r"frame(_?(id|number|index|idx))?|time_?stamps?|"
    r"times?|intervals?|segments?|(is|in)_(train|val|valid|test|dev)\w*|t_?[0-9]+|"
    r"((mark|cut|trim)_)?(in|out|center|centre|middle|mid)(_?(point|frame|t|time|timestamp|s|sec|secs|seconds))*"
)
_YES_NO = {"0", "1", "true", "false", "yes", "no", "t", "f", "y", "n", "x", ""}
_NO_LABELS = {"", "nan", "NaN", "None", "null", "NULL", "<NA>"}  # as programs write a missing value
_ROLES = ("path", "label", "split", "start", "end")


@dataclass(frozen=True)
class _Table:
    """A file's rows (row number, fields), and the names of its columns; numbers (1, 2, ...) where it names none."""

    file: Path
    delimiter: str
    rows: list[tuple[int, list[str]]]
    names: list[str]
    has_header: bool

    def values(self, column: int) -> list[str]:
        return [cells[column] for _, cells in self.rows if column < len(cells)]

    def error(self, problem: str) -> UserError:
        """Return an error about the columns."""
        return UserError(
            f"{self.file} {problem}. Its columns are {shorten(self.names, 20)}. Set --columns path=NAME,label=NAME and, if "
            "used, split=NAME or start=NAME,end=NAME (seconds), by names or numbers (1, 2, ...); others are ignored then."
        )


def parse_columns(text: str) -> dict[str, str]:
    """Parse "path=NAME,label=NAME,..." to role -> column."""
    items = [item.partition("=")[::2] for item in text.split(",")]
    columns = dict(items)
    is_known = {"path", "label"} <= columns.keys() <= set(_ROLES) and len(columns) == len(items)
    if not is_known or ("start" in columns) != ("end" in columns):
        raise UserError(
            f"--columns is {text!r}; expected path=NAME,label=NAME and perhaps split=NAME or start=NAME,end=NAME (seconds), "
            "each once, where NAME is a column's name or number."
        )
    return columns


def read_csv_lists(
    files: Mapping[str | None, str],
    root: str,
    columns: Mapping[str, str] | None = None,
    chosen: Mapping[str, str] | None = None,
) -> DatasetIndex:
    """Read CSV files. files: split -> file; that of None is divided by its column of splits, or is train.

    columns: role -> name or number of its column, None: by their names. chosen: value in the column of splits -> split,
    empty: there is none, None: by their names. Raises UserError that names the file and the number of each invalid row, and
    for columns that select a part of a video or of the rows in an unsupported way.
    """
    listed: dict[str, list[Record]] = {split: [] for split in SPLITS}
    notes = []
    for own, file in files.items():
        table = _read(Path(file), columns)
        roles = _chosen_roles(table, columns) if columns else _find_roles(table)
        if chosen == {}:
            roles.pop("split", None)
        rows = _records(table, roles, _splits_of_values(table, roles.get("split"), chosen), own)
        for split in SPLITS:
            listed[split] += [row for other, row in rows if other == split]
        unused = [name for column, name in enumerate(table.names) if column not in roles.values()]
        used = ", ".join(f"{role} from column {table.names[column]}" for role, column in roles.items())
        skipped = len(table.rows) - len(rows)
        notes.append(
            f"{file}: {used}{' (seconds)' if 'start' in roles else ''}."
            + (f" Not used: {', '.join(unused)}." if unused else "")
            + (f" {skipped} rows of other splits are skipped." if skipped else "")
        )
    return DatasetIndex({split: rows for split, rows in listed.items() if rows}, root, notes=notes)


def _read(file: Path, columns: Mapping[str, str] | None) -> _Table:
    """Return the table. Rows are numbered from 1, like lines; empty ones are left out."""
    try:
        if not file.is_file():  # a pipe would block
            raise OSError("no such file")
        text = file.read_text(encoding="utf-8-sig")
        delimiter = _delimiter(text)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        cells = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
        rows = [(number, row) for number, row in cells if any(row)]
        first = rows[0][1] if rows else []
        names = {_plain(cell) for cell in first}
        has_header = len(first) > 1 and bool(names & set(_PATHS) and names & {*_LABELS, "id"})
        has_header = has_header or bool(columns and set(columns.values()) <= set(first))
        if len(rows) <= has_header:
            raise ValueError("it has no rows")
    except (OSError, ValueError, csv.Error) as error:  # ValueError: also text that is not UTF-8
        raise UserError(
            f"{file} cannot be read: {error}. Expected a CSV file in UTF-8 ({', '.join(_DELIMITERS.values())}), one row a "
            "sample: path;label or path,label, with quotes around a field that holds the delimiter."
        ) from error
    columns_named = [name if has_header and name else str(number) for number, name in enumerate(first, 1)]
    return _Table(file, delimiter, rows[has_header:], columns_named, has_header)


def _delimiter(text: str) -> str:
    """Return the first delimiter that splits at least half of the rows, else the comma."""
    lines = [line for line in text.splitlines() if line.strip()]
    for delimiter in _DELIMITERS:
        rows = [next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), []) for line in lines]
        if lines and 2 * sum(len(row) > 1 for row in rows) >= len(lines):
            return delimiter
    return ","


def _chosen_roles(table: _Table, columns: Mapping[str, str]) -> dict[str, int]:
    """Return the column of each role that --columns gives."""
    numbers = {str(number): number - 1 for number in range(1, len(table.names) + 1)}
    unique = {name: column for column, name in enumerate(table.names) if table.names.count(name) == 1}
    roles = {role: unique.get(name, numbers.get(name, -1)) for role, name in columns.items()}
    if -1 in roles.values() or len(set(roles.values())) < len(roles):
        raise table.error(f"must have one column for each of --columns {shorten(map('='.join, columns.items()))}")
    return roles


def _find_roles(table: _Table) -> dict[str, int]:
    """Return the column of each role, by the names of the columns and their values. Raises UserError if that is unclear."""
    names, plain = table.names, [_plain(name) for name in table.names]
    if not table.has_header:
        if len(names) > 2:
            raise table.error(f"has no header that names path and label; its first row is {shorten(table.rows[0][1])}")
        return {"path": 0, "label": 1}
    path, label = (next((plain.index(name) for name in group if name in plain), None) for group in (_PATHS, _LABELS))
    if label is None and plain.index("id") != path:  # of the class, if it repeats
        ids = table.values(plain.index("id"))
        label = plain.index("id") if all(map(str.isdecimal, ids)) and 2 * len(set(ids)) <= len(ids) else None
    if path is None or label is None:
        raise table.error("has no column of labels with a known name")
    if plain.count(plain[path]) > 1 or plain.count(plain[label]) > 1:
        raise table.error(f"has several columns {names[path]} or {names[label]}")
    roles = {"path": path, "label": label}
    free = [column for column in range(len(names)) if column not in (path, label)]
    values = {column: {value.lower() for value in table.values(column)} for column in free}
    splits = [column for column in free if _are_splits(values[column])]
    if len(splits) > 1:
        raise table.error(f"has several columns of splits: {shorten(names[column] for column in splits)}")
    if splits := splits or [column for column in free if _SPLIT.fullmatch(plain[column])]:
        roles["split"] = splits[0]
    starts, ends, durations = ([c for c in free if regex.fullmatch(plain[c])] for regex in (_START, _END, _DURATION))
    if starts and (ends or durations):
        return {**roles, "start": starts[0], "end": (ends or durations)[0]}
    parts = [
        names[column]
        for column in free
        if column not in splits[:1]
        and (
            _PARTS.fullmatch(plain[column])
            or column in durations
            or split_of(names[column])
            or (guess_split(names[column]) and values[column] <= _YES_NO)
        )
    ]
    if parts:
        raise table.error(f"has columns that may select a part of each video or of the rows: {shorten(parts)}")
    return roles


def _are_splits(values: set[str]) -> bool:
    """Return whether the values of a column are splits: all by name, or several by parts of names."""
    guessed = {guess_split(value) for value in values if value}
    return all(map(split_of, values)) or (len(guessed) > 1 and None not in guessed)


def _splits_of_values(table: _Table, column: int | None, chosen: Mapping[str, str] | None) -> dict[str, str] | None:
    """Return the split of each lower-case value in the column of splits; None if there is no such column."""
    if column is None:
        if chosen:
            raise UserError(f"--splits is for lists with a column of splits, and {table.file} has none. Leave it out.")
        return None
    values = sorted({value.lower() for value in table.values(column)})
    if chosen:
        splits = {value.lower(): split for value, split in chosen.items()}
        is_valid = set(splits) <= set(values)
    else:
        splits = {value: split for value in values if (split := split_of(value))}
        is_valid = len(set(splits.values())) == len(values)
    if not is_valid:
        raise UserError(
            f"The column {table.names[column]} of {table.file} holds {shorten((v or '(nothing)' for v in values), 20)}; "
            f"expected train, val and test. Set --splits {format_splits(splits) or 'train=NAME,val=NAME'} to skip others, or "
            "--splits none to ignore the column."
        )
    return splits


def _records(
    table: _Table, roles: Mapping[str, int], splits: Mapping[str, str] | None, own: str | None
) -> list[tuple[str, Record]]:
    """Return (split, record) of the rows of a split. own: the split that the list is passed for."""
    width = max(len(table.names), *(column + 1 for column in roles.values()))
    rows, problems = [], []
    for number, cells in table.rows:
        if len(cells) != width:
            problems.append(f"row {number} has {len(cells)} of {width} fields")
            continue
        fields = {role: cells[column] for role, column in roles.items()}
        split = own or "train" if splits is None else splits.get(fields["split"].lower())
        segment = _segment(table.names[roles["end"]], fields) if "start" in fields else None
        if not fields["path"] or "\0" in fields["path"] or fields["label"] in _NO_LABELS:
            problems.append(f"row {number} has no path or label")
        elif own and split not in (None, own):
            problems.append(f"row {number} is of the {split} split in the list --{own}")
        elif "start" in fields and segment is None and split:
            problems.append(f"row {number} has the times {fields['start']!r}, {fields['end']!r}")
        elif split:
            rows.append((split, Record(fields["path"], fields["label"], f"{table.file.name}, row {number}", segment)))
    if problems:
        raise listing_error(
            f"{table.file} has invalid rows",
            problems,
            f"Expected {table.delimiter.join(role for role in _ROLES if role in roles)} in each, with a "
            f"{_DELIMITERS[table.delimiter]} ({', '.join(_DELIMITERS.values())} are known) as delimiter, quotes around a field "
            "that holds it, and times 0 <= start < end in seconds (90.5) or minutes (1:30.5). Fix the rows, or set --columns.",
        )
    return rows


def _segment(end_name: str, fields: Mapping[str, str]) -> Segment | None:
    """Return [start, end) in seconds; None if invalid."""
    start, end = _seconds(fields["start"]), _seconds(fields["end"])
    if _DURATION.fullmatch(_plain(end_name)):
        end += start
    return (start, end) if 0 <= start < end < math.inf else None


def _seconds(text: str) -> float:
    """Parse seconds from "90.5", "1:30.5" or "0:01:30.5"; NaN for other text."""
    number = r"([0-9]+(\.[0-9]*)?|\.[0-9]+)"
    if not re.fullmatch(rf"({number}:){{0,2}}{number}", text):
        return math.nan
    return sum(60**power * float(part) for power, part in enumerate(reversed(text.split(":"))))


def _plain(name: str) -> str:
    """Normalize a column's name to snake case: "Start Time (s)", "startTime" -> "start_time_s", "start_time"."""
    return re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)).strip("_").lower()
