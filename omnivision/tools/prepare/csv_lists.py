"""A list of samples as text, e.g. `path;label` or `path,label`, with or without a header, labels as names or integers.

Columns are found by their names: path, label, split, start and end (seconds). Those that are not used are named.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnivision.data.sampling import Segment
from omnivision.tools.prepare.index import (
    SPLITS,
    DatasetIndex,
    Record,
    check_unambiguous,
    guess_split,
    listing_error,
    parse_labels,
    shorten,
    split_of,
)
from omnivision.utils.errors import UserError

_DELIMITERS = {";": "semicolon", "\t": "tab", ",": "comma", " ": "space"}  # the first that splits the rows is taken
_PATHS = (
    *("path", "video_path", "clip_path", "file_path", "filepath", "filename", "file_name", "file"),
    *("video", "video_name", "clip"),
)
_NAMES = ("youtube_id", "yt_id", "video_id", "vid", "clip_id", "clip_name", "name", "id")  # of videos, where no path is
_LABELS = (
    *("label", "class", "category", "action", "activity", "target", "class_name", "label_name", "action_name"),
    *("class_id", "label_id", "action_id", "class_index", "label_index"),
)
_SPLIT = re.compile(r"(.*_)?(split|subset|phase|partition|usage|fold)(_?(name|\d+))?|set|data_?set_(type|part)")
_WHOSE = r"((t|time|timestamp|clip|segment|seg|action|event|temporal|label)_?)?"
_SECONDS = r"(_?(t|time|timestamp|at|s|sec|secs|second|seconds))*"
_TIMES = {
    "start": re.compile(rf"{_WHOSE}(start|begin|from|onset){_SECONDS}"),
    "end": re.compile(rf"{_WHOSE}(end|stop|finish|to|until){_SECONDS}"),
    "duration": re.compile(rf"{_WHOSE}(duration|length){_SECONDS}"),
}
# Names of columns that choose a part of a video or of the rows, in a way that cannot be followed.
_PARTS = re.compile(
    r"(.*_)?(start|begin|end|stop|onset|offset)(_.*)?|(first|last|key)_frame|"
    r"(first|last|min|max)_(t|time|s|secs?|seconds?)|t_?(first|last|min|max)|"
    r"frame(_?(id|number|index|idx))?|time_?stamps?|"
    r"times?|intervals?|segments?|(is|in)_(train|val|valid|test|dev)\w*|t_?[0-9]+|"
    r"((mark|cut|trim)_)?(in|out|center|centre|middle|mid)(_?(point|frame|t|time|timestamp|s|sec|secs|seconds))*"
)
_YES_NO = {"0", "1", "true", "false", "yes", "no", "t", "f", "y", "n", "x", ""}
_NO_LABELS = {"nan", "NaN", "None", "null", "NULL", "<NA>"}  # as programs write a value that is missing
_ROLES = ("path", "label", "split", "start", "end")


@dataclass(frozen=True)
class _Table:
    """A file's rows (row number, fields), the names of its columns, and which column (0, 1, ...) has which role."""

    file: Path
    delimiter: str
    rows: list[tuple[int, list[str]]]
    names: list[str]
    roles: dict[str, int]

    def values(self, column: int) -> list[str]:
        return [cells[column] for _, cells in self.rows if column < len(cells)]


def parse_columns(text: str) -> dict[str, str]:
    """Parse "path=NAME,label=NAME,..." to role -> column."""
    items = [item.partition("=")[::2] for item in text.split(",")]
    pairs = dict(items)
    if (
        not {"path", "label"} <= set(pairs) <= set(_ROLES)
        or ("start" in pairs) != ("end" in pairs)
        or len(pairs) < len(items)
    ):
        raise UserError(
            f"--columns is {text!r}; expected path=NAME,label=NAME and perhaps split=NAME or start=NAME,end=NAME (seconds), "
            "each once, where NAME is that of a column, or its number. Change --columns."
        )
    return pairs


def read_csv_lists(
    files: Mapping[Any, str],
    root: str,
    columns: Mapping[str, str] | None = None,
    splits: Mapping[str, str] | None = None,
) -> DatasetIndex:
    """Read CSV files. files: split -> file; that of None is divided by its column of splits, or is train.

    columns: role -> name or number of its column, None: by their names. splits: value in the column of splits -> split,
    empty: there is none, None: by their names. Raises UserError naming the file and the number of every row that is not
    right, and for columns that choose a part of a video or of the rows in a way that cannot be followed.
    """
    rows: list[tuple[str, Record]] = []
    notes: list[str] = []
    for split, file in files.items():
        table = _read(Path(file), columns)
        found, note = _split_rows(table, split, splits)
        rows += found
        notes.append(note)
    labelled = parse_labels([row for _, row in rows])
    listed: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for (split, _), row in zip(rows, labelled, strict=True):
        listed[split].append(row)
    return DatasetIndex({split: found for split, found in listed.items() if found}, root, notes=notes)


def _read(file: Path, columns: Mapping[str, str] | None) -> _Table:
    text = _text(file)
    delimiter = _delimiter(text)
    table = _table(text, delimiter, file)
    if not table:
        raise UserError(f"{file} has no rows; expected one a sample: path{delimiter}label.")
    first = table[0][1]
    named = _is_header([cells for _, cells in table]) or bool(columns and set(columns.values()) <= set(first))
    names = [name if named and name else str(number) for number, name in enumerate(first, 1)]
    rows = table[1:] if named else table
    if not rows:
        raise UserError(f"{file} has a header and no rows; expected one row a sample.")
    if columns:
        numbers = {str(number) for number in range(1, len(names) + 1)}
        if missing := [name for name in columns.values() if name not in numbers and names.count(name) != 1]:
            raise UserError(
                f"--columns names {shorten(missing)}, and {file} has the columns {shorten(names, 20)}. Change "
                "--columns; columns of "
                "one name go by their numbers, 1, 2, ..."
            )
        roles = {role: names.index(name) if name in names else int(name) - 1 for role, name in columns.items()}
        if len(set(roles.values())) < len(roles):
            raise UserError(
                f"--columns takes one column of {file} for several of {shorten(list(roles))}. Expected a column for "
                "each. Change "
                "--columns."
            )
        return _Table(file, delimiter, rows, names, roles)
    if not named and len(first) > 2:
        raise UserError(
            f"{file} has {len(first)} columns ({_DELIMITERS[delimiter]} was taken for the delimiter) and no header that names "
            f"path and label; its first row is {shorten(first)}. Add a header, or say which columns to use: --columns "
            "path=1,label=2."
        )
    return _Table(file, delimiter, rows, names, _find_roles(file, names, rows) if named else {"path": 0, "label": 1})


def _find_roles(file: Path, names: list[str], rows: list[tuple[int, list[str]]]) -> dict[str, int]:
    """Return the column of each role, by the names of the columns and their values. Raises UserError where that is unclear."""
    plain = [_plain(name) for name in names]
    path, label = _path_and_label(file, names, plain, rows)
    if path is None or label is None:
        if len(names) > 2:
            raise UserError(
                f"{file} has no column of labels with a known name: {shorten(names, 20)}. Set --columns path=NAME,label=NAME."
            )
        return {"path": 0, "label": 1}  # two words over a column of numbers
    if twice := [names[column] for column in (path, label) if plain.count(plain[column]) > 1]:
        raise UserError(
            f"{file} has several columns {shorten(twice)}. Set --columns path={path + 1},label={label + 1} for the first ones."
        )
    roles = {"path": path, "label": label}
    free = [column for column in range(len(names)) if column not in (path, label)]
    values = {column: {cells[column].lower() for _, cells in rows if column < len(cells)} for column in free}
    if (split := _split_column(file, names, roles, plain, values)) is not None:
        roles["split"] = split
    times = {
        role: next((column for column in free if pattern.fullmatch(plain[column])), None)
        for role, pattern in _TIMES.items()
    }
    end = times["duration"] if times["end"] is None else times["end"]  # _segment adds a duration to the start
    if times["start"] is not None and end is not None:
        return {**roles, "start": times["start"], "end": end}
    parts = [
        names[column]
        for column in free
        if column not in roles.values()
        and (
            _PARTS.fullmatch(plain[column])
            or column == times["duration"]
            or split_of(names[column])
            or (guess_split(names[column]) and values[column] <= _YES_NO)
        )
    ]
    if parts:
        raise UserError(
            f"{file} has columns that may choose a part of each video or of the rows: {shorten(parts)}. Expected start and end "
            "in seconds, and splits in one column. Change the list, or ignore these columns with --columns "
            f"path={names[path]},label={names[label]}."
        )
    return roles


def _path_and_label(
    file: Path, names: list[str], plain: list[str], rows: list[tuple[int, list[str]]]
) -> tuple[int | None, int | None]:
    """Return the columns of paths and labels, None where no name is known. `id` is a label if its values repeat."""
    path, name, label = (
        next((plain.index(name) for name in group if name in plain), None) for group in (_PATHS, _NAMES, _LABELS)
    )
    path = name if path is None else path
    if label is None and path is not None and "id" in plain and plain.index("id") != path:
        label = plain.index("id")
        ids = [cells[label] for _, cells in rows if label < len(cells)]
        if not all(value.isdecimal() for value in ids) or 2 * len(set(ids)) > len(ids):
            raise UserError(
                f"{file} has no column of labels: {names[label]} has {len(set(ids))} values in {len(ids)} rows, like names of "
                f"samples. Set --columns path={names[path]},label=NAME with one of {shorten(names, 20)}."
            )
    return path, label


def _split_column(
    file: Path, names: list[str], roles: Mapping[str, int], plain: list[str], values: Mapping[int, set[str]]
) -> int | None:
    """Return the column whose values are splits, or whose name says so."""
    guessed = {column: {guess_split(value) for value in found if value} for column, found in values.items()}
    columns = [
        column
        for column, found in values.items()
        if all(map(split_of, found)) or (len(guessed[column]) > 1 and None not in guessed[column])
    ]
    if len(columns) > 1 and any(len(set(map(split_of, values[column]))) > 1 for column in columns):
        raise UserError(
            f"{file} has several columns of splits: {shorten([names[column] for column in columns])}. Set --columns "
            f"path={names[roles['path']]},label={names[roles['label']]},split=NAME."
        )
    columns += [column for column in values if _SPLIT.fullmatch(plain[column])]
    return columns[0] if columns else None


def _split_rows(
    table: _Table, own: str | None, chosen: Mapping[str, str] | None
) -> tuple[list[tuple[str, Record]], str]:
    """Return (split, record) of the rows, and a sentence on how they were read."""
    file, roles = table.file, dict(table.roles)
    if chosen is not None and not chosen:
        roles.pop("split", None)
    if chosen and "split" not in roles:
        raise UserError(f"--splits is for lists with a column of splits, and {file} has none. Leave it out.")
    splits = _splits_of_values(table, chosen) if "split" in roles else {}
    width = max(len(table.names), max(roles.values()) + 1)
    rows, problems, passed = [], [], 0
    for number, cells in table.rows:
        fields = {role: cells[column] for role, column in roles.items() if column < len(cells)}
        split = splits.get(fields.get("split", "").lower()) if splits else own or "train"
        if len(cells) != width:
            problems.append(f"row {number} has {len(cells)} of {width} fields")
        elif not fields["path"] or not fields["label"] or "\0" in fields["path"]:
            problems.append(f"row {number} has no {'label' if fields['path'] else 'path'}")
        elif fields["label"] in _NO_LABELS:
            problems.append(f"row {number} has the label {fields['label']}, which stands for none")
        elif split is None:
            passed += 1
        elif own and split != own:
            problems.append(f"row {number} is of the {split} split in the list --{own}")
        elif "start" not in fields:
            rows.append((split, Record(fields["path"], fields["label"], f"{file.name}, row {number}")))
        elif (segment := _segment(table, fields)) is None:
            problems.append(
                f"row {number} has the times {fields['start']!r}, {fields['end']!r}, not 0 <= start < end in seconds "
                "(90.5) or minutes (1:30.5)"
            )
        else:
            rows.append((split, Record(fields["path"], fields["label"], f"{file.name}, row {number}", segment)))
    if problems:
        advice = (
            f"Expected {table.delimiter.join(role for role in _ROLES if role in roles)} in each "
            f"({_DELIMITERS[table.delimiter]} was taken for the delimiter, out of {shorten(list(_DELIMITERS.values()))}), with "
            "quotes around a field that holds it; fix the rows, or choose other columns with --columns."
        )
        raise listing_error(f"{file} has rows that cannot be read", problems, advice)
    used = [f"{role} from column {table.names[column]}" for role, column in roles.items()]
    unused = [name for column, name in enumerate(table.names) if column not in roles.values()]
    note = f"{file}: {', '.join(used)}{' (seconds)' if 'start' in roles else ''}."
    note += f" Not used: {', '.join(unused)}." if unused else ""
    return rows, note + (f" {passed} rows of other splits are passed over." if passed else "")


def _splits_of_values(table: _Table, chosen: Mapping[str, str] | None) -> dict[str, str]:
    """Return the split of each lower-case value in the column of splits."""
    column = table.roles["split"]
    values = sorted({value.lower() for value in table.values(column)})
    if chosen is not None:
        splits = {value.lower(): split for value, split in chosen.items()}
        unknown = [value for value in splits if value not in values]
    else:
        splits = {value: split for value in values if (split := split_of(value))}
        unknown = [value or "(nothing)" for value in values if value not in splits]
    if unknown:
        raise UserError(
            f"{'--splits' if chosen else table.file} has {shorten(unknown)} as splits; the column {table.names[column]} holds "
            f"{shorten(values, 20)}. Expected train, val and test, or --splits train=NAME,val=NAME, which passes "
            "over other rows, "
            "or --splits none to leave the column out."
        )
    if chosen is None:
        check_unambiguous(splits, f"The column {table.names[column]} of {table.file}")
    return splits


def _segment(table: _Table, fields: Mapping[str, str]) -> Segment | None:
    """Return [start, end) in seconds; None if invalid."""
    start, end = _seconds(fields["start"]), _seconds(fields["end"])
    if _TIMES["duration"].fullmatch(_plain(table.names[table.roles["end"]])):
        end += start
    return (start, end) if 0 <= start < end < math.inf else None


def _seconds(text: str) -> float:
    """Parse seconds from "90.5", "1:30.5" or "0:01:30.5"; NaN for other text."""
    seconds = 0.0
    for part in text.split(":") if text.count(":") < 3 else ["none"]:
        if not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", part.strip()):
            return math.nan
        seconds = 60 * seconds + float(part)
    return seconds


def _plain(name: str) -> str:
    """Normalize a column's name to snake case: "Start Time (s)", "startTime" -> "start_time_s", "start_time"."""
    return re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)).strip("_").lower()


def _text(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"{file}: no such file. Expected a CSV file, one row a sample: path;label or path,label.")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not a text in UTF-8 ({error.reason} at byte {error.start}). Expected a CSV file, one row a sample: "
            "path;label or path,label. Save it as UTF-8, or give another file."
        ) from error


def _delimiter(text: str) -> str:
    """Return the first delimiter that splits at least half of the rows, else the comma."""
    lines = [line for line in text.splitlines() if line.strip()]
    if any(len(line) > csv.field_size_limit() for line in lines):
        return ","  # reading the rows tells which one
    for delimiter in _DELIMITERS:
        if lines and 2 * sum(
            len(next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])) > 1 for line in lines
        ) >= len(lines):
            return delimiter
    return ","


def _table(text: str, delimiter: str, file: Path) -> list[tuple[int, list[str]]]:
    """Return (row number, fields) of the rows that are not empty; rows are numbered from 1, like lines."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    table = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                table.append((reader.line_num, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise UserError(
            f"{file}, row {reader.line_num}: {error}. Expected path;label or path,label, with quotes around a field that holds "
            "the delimiter, and quotes inside it doubled."
        ) from error
    return table


def _is_header(table: list[list[str]]) -> bool:
    """Return whether the first row names columns: a path and a label, or two words over a column of numbers."""
    names = [_plain(cell) for cell in table[0]]
    if any(name in (*_PATHS, *_NAMES) for name in names) and any(name in (*_LABELS, "id") for name in names):
        return len(names) > 1
    others = [cells[1] for cells in table[1:] if len(cells) == 2]
    return len(names) == 2 and bool(others) and all(label.isdecimal() for label in others) and table[0][1].isalpha()
