"""Features on disk: arrays of one model over splits of datasets, memory-mapped.

    DIR/features.json              the model, the views, and for each split its number of rows and the hashes of its lists
    DIR/class_names/<dataset>.txt  one name per line, in the order of the labels
    DIR/<dataset>/<split>/features.npy   float16 or float32 (rows, D); with layers or times, (rows, [layers,] [T',] D)
    DIR/<dataset>/<split>/index.npy, labels.npy    int64 (rows,): position in the split; label, -1 for none (several classes or
                                                   numbers per video: float32 (rows, K), NaN for none)
    DIR/<dataset>/<split>/paths.npy      str (rows,)
    DIR/<dataset>/<split>/times.npy      float64 (rows, 2): start and end (s) of each window or segment, if there are any

Rows are in the order of the split. Videos that cannot be read have none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import TypedDict

from omnivision.data.catalog import load_array, read_class_names
from omnivision.utils.errors import UserError, truncate_list
from omnivision.utils.io import write_json

HEADER = "features.json"
ARRAYS = ("index", "labels", "paths", "times")  # besides the features


class FeatureConfig(BaseModel):
    """Which features of a video. All in a folder have the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clips: int = 2  # per video, spread over it; 1 with windows
    crops: Literal[1, 3] = 3  # per clip; features are averaged over clips and crops
    clip_duration: float  # seconds that a clip or window spans
    stride: float | None = None  # seconds from one window to the next; None: no windows, but clips
    layers: int = 1  # how many of the last layers
    keep_time: bool = False  # average tokens only over space
    dtype: Literal["float16", "float32"] = "float32"
    autocast: str | None = None  # dtype of matrix products, if not float32

    def views(self) -> str:
        """Describe the views of a video: "2 clips x 3 crops"."""
        return f"{self.clips} clip{'s' * (self.clips > 1)} x {self.crops} crop{'s' * (self.crops > 1)}"


class ModelRecord(TypedDict):
    """The model of the features; `sha256` identifies it."""

    name: str
    sha256: str  # of the weights
    checkpoint: str


class SplitRecord(BaseModel):
    """What identifies the data of a split, and its number of rows, None until all its features exist."""

    model_config = ConfigDict(extra="forbid")

    samples: int
    data: dict[str, str]  # hashes of the lists and class names; how paths and frames are read
    rows: int | None = None
    unreadable: list[str] = []  # "path: reason"


class Header(BaseModel):
    """The content of features.json."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    model: ModelRecord
    config: FeatureConfig
    splits: dict[str, SplitRecord] = {}  # by "<dataset>/<split>"


@dataclass(frozen=True)
class FeatureSplit:
    """The features of one split; arrays are memory-mapped, see above."""

    name: str
    which: str
    features: np.ndarray
    index: np.ndarray
    labels: np.ndarray
    paths: np.ndarray
    config: FeatureConfig
    record: SplitRecord
    times: np.ndarray | None = None
    class_names: Sequence[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.features)


def read_header(folder: Path) -> Header:
    """Read features.json. Raises UserError for a folder without features, and for an invalid file."""
    file = folder / HEADER
    try:
        return Header.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no features ({HEADER} is missing). Give a folder that `omnivision features` wrote."
        ) from None
    except (OSError, ValueError, ValidationError) as error:
        raise UserError(
            f"{file} cannot be used: {' '.join(str(error).split())[:300]}. Extract the features again."
        ) from None


def write_header(folder: Path, header: Header) -> None:
    write_json(folder / HEADER, header.model_dump())


def open_split(folder: Path, name: str, which: str) -> FeatureSplit:
    """Open the features of a split.

    Raises UserError if it is missing or incomplete, if arrays do not fit together, and for values that are not finite.
    """
    header, key = read_header(folder), f"{name}/{which}"
    record = header.splits.get(key)
    if record is None or record.rows is None:
        complete = [other for other, facts in header.splits.items() if facts.rows is not None]
        state = "is not complete; run the same `omnivision features` command again" if record else "is missing"
        raise UserError(f"{folder}: {key} {state}. It holds {truncate_list(complete) or 'nothing'}.")
    arrays = {
        what: load_array(str(file), what)
        for what in ("features", *ARRAYS)
        if what != "times" or (folder / key / "times.npy").exists()
        for file in [folder / key / f"{what}.npy"]
    }
    config = header.config
    kinds = {"features": "f", "index": "iu", "paths": "U", "times": "f"}
    kinds["labels"] = "iu" if arrays["labels"].ndim == 1 else "f"
    axes = 2 + (config.layers > 1) + config.keep_time
    for what, array in arrays.items():
        misfit = what == "features" and (array.ndim != axes or array.dtype != config.dtype)
        if array.dtype.kind not in kinds[what] or array.shape[:1] != (record.rows,) or misfit:
            raise UserError(
                f"{folder / key / what}.npy holds {array.dtype} of shape {array.shape}; {HEADER} says {record.rows} rows, "
                f"{config.layers} layers, keep_time {config.keep_time}, {config.dtype}. Extract the features again."
            )
    for rows in blocks(len(arrays["features"])):
        if not np.isfinite(arrays["features"][rows]).all():
            raise UserError(
                f"{folder / key}/features.npy holds values that are not finite. The model's training diverged, or float16 is "
                "too small for its features; set --dtype float32."
            )
    names_file = folder / "class_names" / f"{name}.txt"
    names = read_class_names(str(names_file), "class names") if names_file.exists() else []
    if names and arrays["labels"].ndim == 1 and len(arrays["labels"]) and arrays["labels"].max() >= len(names):
        raise UserError(
            f"{folder / key}/labels.npy must be below {len(names)}, the names in {names_file}, got {arrays['labels'].max()}. "
            "Extract the features again."
        )
    return FeatureSplit(name, which, config=header.config, record=record, class_names=names, **arrays)


def blocks(rows: int, size: int = 4096) -> Iterator[slice]:
    """Yield slices that cover `rows`, so that a large array is never in memory at once."""
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return "name: saved -> current" for entries that differ."""
    return [f"{name}: {saved.get(name)} -> {value}" for name, value in current.items() if saved.get(name) != value]
