"""A list of samples as text: `path;label` or `path,label`, with or without a header, labels as names or integers."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from omnivision.errors import UserError
from omnivision.prepare.listing import Listing, Row, numbered, refuse

_DELIMITERS = {";": "semicolon", "\t": "tab", ",": "comma", " ": "space"}  # the first that splits the rows is taken
_PATHS = ("path", "video_path", "file_path", "filepath", "filename", "file_name", "file", "video", "video_name", "clip")
_LABELS = ("label", "class", "category", "action", "target", "class_name", "label_name", "class_id", "label_id", "id")


def read_csv_lists(files: dict[str, str], root: str) -> Listing:
    """files: split -> CSV file. Raises UserError naming the file and the number of every row that is not right."""
    splits = {split: _read(Path(file)) for split, file in files.items()}
    rows = numbered([row for part in splits.values() for row in part])
    parts = iter(rows)
    return Listing({split: [next(parts) for _ in part] for split, part in splits.items()}, root)


def _read(file: Path) -> list[Row]:
    text = _text(file)
    delimiter = _delimiter(text)
    table = _table(text, delimiter, file)
    if not table:
        raise UserError(f"{file} has no rows; expected one a sample: path{delimiter}label.")
    path, label, columns = 0, 1, 2
    if (header := _header([cells for _, cells in table])) is not None:
        path, label, columns = header
        table = table[1:]
    rows, problems = [], []
    for number, cells in table:
        if len(cells) != columns:
            problems.append(f"row {number} has {len(cells)} of {columns} fields")
        elif not cells[path] or not cells[label] or "\0" in cells[path]:
            problems.append(f"row {number} has no {'label' if cells[path] else 'path'}")
        else:
            rows.append(Row(cells[path], cells[label], f"{file.name}, row {number}"))
    if problems:
        advice = (
            f"Expected path{delimiter}label in each ({_DELIMITERS[delimiter]} was taken for the delimiter), with quotes "
            "around a field that holds it; mend the rows."
        )
        raise refuse(f"{file} has rows that cannot be read", problems, advice)
    if not rows:
        raise UserError(f"{file} has a header and no rows; expected one row a sample.")
    return rows


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
    """The first delimiter that splits at least half of the rows; the comma if none does."""
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
    """(row number, fields) of the rows that are not empty; rows are numbered from 1, as lines of the file."""
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


def _header(table: list[list[str]]) -> tuple[int, int, int] | None:
    """Columns of path and label and number of columns, if the first row is a header."""
    names = [cell.lower() for cell in table[0]]
    paths, labels = [n for n in _PATHS if n in names], [n for n in _LABELS if n in names]
    if paths and labels:
        return names.index(paths[0]), names.index(labels[0]), len(names)
    others = [cells[1] for cells in table[1:] if len(cells) == 2]
    if len(names) == 2 and others and all(label.isdecimal() for label in others) and names[1].isalpha():
        return 0, 1, 2
    return None
