"""The files that `prepare` writes to OUT, and the dataset's entry in the catalog.

    OUT/{train,val,test}_paths.npy, {train,val,test}_labels.npy, class_names.txt
    OUT/{train,val,test}_segments.npy when samples are parts of videos
    OUT/films/... or frames/...       when videos are transcoded
    OUT/failed.csv                    videos that could not be transcoded, with reasons; they are not in the arrays
    OUT/prepare.json                  the settings that OUT was made with

An existing video is always complete, so the same command can complete an interrupted one.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from omnivision.data.catalog import (
    IGNORED_LABEL,
    check_array,
    check_segments,
    check_values,
    infer_label_type,
    load_array,
)
from omnivision.data.sampling import Segment
from omnivision.tools.prepare.index import MAX_CLASSES, DatasetIndex, label_array, printable
from omnivision.utils.errors import UserError
from omnivision.utils.io import replace_atomically, write_atomically, write_json

_STAMP, _FAILED = "prepare.json", "failed.csv"
_HEADER = "# @package _global_"  # without this, Hydra would put `datasets` below `experiments`


def read_arrays(
    paths_file: str, labels_file: str | None = None, segments_file: str | None = None
) -> tuple[list[str], np.ndarray | None, list[Segment] | None]:
    """Return the paths, labels and segments (start, end in seconds) of a split; None for arrays not given.

    Labels are int64 (N,), or as they are if they are a row for each sample. Raises UserError for arrays that do not hold what
    the catalog's `ARRAYS` says, and for labels that are not class numbers.
    """
    arrays = {}
    for what, file, argument in (
        ("paths", paths_file, "PATHS"),
        ("labels", labels_file, "LABELS"),
        ("segments", segments_file, "--segments"),
    ):
        if file is not None:
            if not os.path.isfile(file):  # a pipe would block
                problem = "is a folder" if os.path.isdir(file) else "no such file"
                raise UserError(f"{file}: {problem}. Expected a .npy file; give another {argument}.")
            arrays[what] = load_array(file, argument)
            content = infer_label_type(arrays[what]) if what == "labels" else what
            check_array(content, arrays[what], file, argument, arrays["paths"].size)
    labels, segments = arrays.get("labels"), arrays.get("segments")
    if labels is not None and labels.ndim > 1:
        check_values(labels, str(labels_file), infer_label_type(labels), "LABELS")
    elif labels is not None and not IGNORED_LABEL <= labels.min() <= labels.max() < MAX_CLASSES:
        raise UserError(
            f"{labels_file} holds labels from {labels.min()} to {labels.max()}; expected {IGNORED_LABEL} (ignored) to "
            f"{MAX_CLASSES - 1}. Fix LABELS."
        )
    if segments is not None:
        check_segments(segments, str(segments_file), "--segments")
    return (
        list(map(str, arrays["paths"])),
        None if labels is None else labels.astype(np.int64) if labels.ndim == 1 else np.array(labels),
        None if segments is None else [(float(start), float(end)) for start, end in segments],
    )


def write_split(
    folder: Path, split: str, paths: Sequence[str], labels: np.ndarray, segments: Sequence[Segment | None] = ()
) -> None:
    """Write <split>_paths.npy (N, unicode), <split>_labels.npy (N, int64; rows of int8 or float32) and <split>_segments.npy
    (N, 2, float64).

    Without segments (an empty list, or all None), samples are whole videos, and no segments file is written.
    """
    arrays = {"paths": np.array(paths, dtype=str), "labels": labels.astype(np.int64) if labels.ndim == 1 else labels}
    if any(segments):
        arrays["segments"] = np.array(segments, dtype=np.float64)
    else:
        (folder / f"{split}_segments.npy").unlink(missing_ok=True)
    for name, array in arrays.items():
        with replace_atomically(folder / f"{split}_{name}.npy") as file:
            np.save(file, array, allow_pickle=False)


def files(out: Path, index: DatasetIndex, split: str) -> dict[str, str]:
    """Return the files of a split's arrays: paths, labels, and segments if a sample is a part of a video."""
    has_segments = any(record.segment for record in index.splits[split])
    return {what: f"{out}/{split}_{what}.npy" for what in ("paths", "labels", *(["segments"] * has_segments))}


def write_splits(out: Path, index: DatasetIndex) -> int:
    """Write the arrays of each split; return how many videos moved between train and val since the last time."""
    old = {"train": out / "val_paths.npy", "val": out / "train_paths.npy"}  # the other side's paths
    before = {split: set(read_arrays(str(file))[0]) for split, file in old.items() if file.is_file()}
    num_moved = 0
    for split, records in index.splits.items():
        paths = [record.path for record in records]
        write_split(out, split, paths, label_array(records, index), [record.segment for record in records])
        num_moved += len(before.get(split, set()) & set(paths))
        names = ", ".join(os.path.basename(file) for file in files(out, index, split).values())
        what = "targets" if index.label_type == "regression" else "classes"
        print(f"{out}/{names}: {len(records)} samples of {len(index.classes)} {what}")
    return num_moved


def check_out_folder(out: Path, settings: Mapping[str, object]) -> None:
    """Raise UserError unless OUT is new, empty, or made with the same settings. Writes nothing."""
    if not out.exists() or (out.is_dir() and all(path.name.startswith(".") for path in out.iterdir())):
        return
    try:
        stamp = dict(json.loads((out / _STAMP).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"OUT ({out}) must be new, empty, or made by this command: {error}. Change OUT.") from error
    if keys := sorted(key for key in {**stamp, **settings} if stamp.get(key) != settings.get(key)):
        raise UserError(
            f"OUT ({out}) was made with other settings ({', '.join(keys)}; see {out / _STAMP}). Pass the same, change OUT, or "
            "delete it."
        )


def write_stamp(out: Path, settings: Mapping[str, object], classes: Sequence[str]) -> None:
    """Write the settings and the class names first, so that an interrupted command leaves them."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _STAMP, settings)
    write_atomically(out / "class_names.txt", "".join(f"{name}\n" for name in classes))


def write_failed(out: Path, failed: Mapping[str, str]) -> None:
    """Write one row per failed video, from path -> reason; remove the file if there are none."""
    if not failed:
        (out / _FAILED).unlink(missing_ok=True)
        return
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("path", "reason"))
    rows.writerows((printable(path), printable(reason)) for path, reason in sorted(failed.items()))
    write_atomically(out / _FAILED, table.getvalue())


def format_entry(name: str, entry: Mapping[str, Any]) -> str:
    """Return a dataset's catalog entry as YAML. Raises UserError for text that has another meaning in a configuration."""
    text = yaml.safe_dump({name: entry}, sort_keys=False, default_flow_style=None, width=10**6, allow_unicode=True)
    if not re.match(r"(?a)[A-Za-z_]\w*:", text):  # YAML quotes names such as "on"
        raise UserError(
            f"--name must be letters, digits and _, and not a YAML keyword, as it becomes a setting; got {name!r}."
        )
    if "${" in text:
        raise UserError(f'Paths must not contain "${{", which a configuration reads as a reference; got {text}')
    return text


def updated_catalog(file: Path, name: str, entry: Mapping[str, Any]) -> str:
    """Return the text of the catalog `file`, which may be new, with the entry added or replaced.

    Other entries and comments stay. Raises UserError for a file that is not a catalog.
    """
    try:
        if file.suffix != ".yaml" or not file.absolute().parent.is_dir():
            raise ValueError("it must end in .yaml and be in an existing folder")
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if text.strip() and not text.startswith(_HEADER):
            raise ValueError(f"it must begin with the line {_HEADER!r}")
        text = text.rstrip("\n") + "\n" if text.strip() else f"{_HEADER}\n"
        old = yaml.safe_load(text) or {}
        text += "" if "datasets" in old else "datasets:\n"
        new = _replace_entry(text, name, format_entry(name, entry))
        if yaml.safe_load(new) != {**old, "datasets": {**(old.get("datasets") or {}), name: entry}}:
            raise ValueError("it must hold a block of entries below `datasets:`")
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--catalog {file} cannot be extended: {reason}. Fix it, set another --catalog, or paste the entry that the "
            "command prints without it."
        ) from error
    return new


def _replace_entry(text: str, name: str, entry: str) -> str:
    """Put an entry into the text of a catalog, replacing the lines of an old one."""
    match = re.fullmatch(r"(?s)(.*?\ndatasets:[ \t]*(?:#[^\n]*)?\n)((?:[ #][^\n]*\n|\n)*)(.*)", text)
    if match is None:
        raise ValueError("it must hold a line `datasets:` with a block of entries below")
    head, block, rest = match.groups()
    first = re.search(r"(?m)^( +)[^\s#]", block)
    indent = first[1] if first else "  "
    entry = textwrap.indent(entry, indent)
    block, count = re.subn(rf"(?m)^{indent}{name}:.*\n((\s*\n)*{indent} .*\n)*", lambda _: entry, block)
    return head + ("" if count else entry) + block + rest
