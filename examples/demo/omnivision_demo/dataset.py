"""The demo data on disk: videos of each domain, their .npy lists of paths and labels, and a .csv with all properties.

    FOLDER/class_names.txt            one action a line, in the order of the labels
    FOLDER/demo-data.json             the settings, and whether the data are complete
    FOLDER/<domain>/<split>/00012.mp4
    FOLDER/<domain>/<split>_paths.npy, <split>_labels.npy, <split>.csv

The same settings give the same bytes, whatever the number of processes, so an interrupted run is simply completed.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from omnivision.data.encode import write_video
from omnivision.tools.workers import WorkerCrashedError, run_in_processes
from omnivision.utils.errors import UserError
from omnivision.utils.io import replace_atomically, write_atomically, write_json
from omnivision_demo.render import render
from omnivision_demo.spec import ACTIONS, DOMAINS, SPLITS, VideoSpec, video_spec

_STAMP = "demo-data.json"
_VERSION = 3  # raise it when the same settings give other videos
_COLUMNS = ("path", "label", "action", "body", "place", "camera", "fps", "frames", "gop", "seed", "place_type", "turns")


class Written(NamedTuple):
    """The result of `write_demo_data`: how many videos there are, how many of them are new, and their size in bytes."""

    videos: int
    new: int
    size: int


def write_demo_data(
    folder: str | os.PathLike[str],
    *,
    train: int = 40,
    val: int = 10,
    synthetic: int | None = None,
    seed: int = 0,
    workers: int = 2,
    domains: Sequence[str] = DOMAINS,
    track: Callable[[Iterable[None], int], Iterable[None]] = lambda videos, total: videos,
) -> Written:
    """Write the demo data to `folder`, or the missing part of them.

    train, val: videos of each action in each domain. synthetic: training videos of each action in the synthetic domain, where
    videos are cheap; as many as elsewhere if None. workers: processes; 1 works in this one. track: shows the progress of an
    iterator with a number of items. Raises UserError for a folder that cannot be written to or holds other files.
    """
    synthetic = train if synthetic is None else synthetic
    counts = {"train": train, "val": val, "synthetic": synthetic}
    settings = {"version": _VERSION, "seed": seed, **counts, "domains": list(domains)}
    splits = {
        (domain, split): [
            video_spec(seed, domain, split, index)
            for index in range(len(ACTIONS) * counts[domain if (domain, split) == ("synthetic", "train") else split])
        ]
        for domain in domains
        for split in SPLITS
    }
    specs = [spec for split_specs in splits.values() for spec in split_specs]
    folder = Path(folder)
    try:
        complete = _claim(folder, settings)
        missing = [spec for spec in specs if not (folder / spec.domain / spec.path).is_file()]
        tables = [folder / domain / f"{split}.csv" for domain, split in splits]
        if missing or not (complete and all(map(_is_current, tables))):
            _write_stamp(folder, settings, complete=False)
            for leftover in [*folder.rglob(".*.part"), *folder.rglob(".*.tmp")]:  # left by a killed command
                leftover.unlink(missing_ok=True)
            for domain, split in splits:
                (folder / domain / split).mkdir(parents=True, exist_ok=True)
            for _ in track(_write_videos(folder, missing, workers), len(missing)):
                pass
            for (domain, split), split_specs in splits.items():
                _write_lists(folder / domain, split, split_specs)
            write_atomically(folder / "class_names.txt", "".join(f"{action}\n" for action in ACTIONS))
            _write_stamp(folder, settings, complete=True)
        size = sum((folder / spec.domain / spec.path).stat().st_size for spec in specs)
    except OSError as error:
        raise UserError(f"DIR must be a folder that can be written to, with about 100 MB free; got {error}.") from error
    return Written(len(specs), len(missing), size)


def _claim(folder: Path, settings: dict[str, object]) -> bool:
    """Return whether the data in `folder` are complete. Raises UserError if it holds anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / _STAMP
    if not stamp.is_file():
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"DIR must be a new or empty folder, or one with demo data; {folder} holds other files.")
        return False
    try:
        previous = json.loads(stamp.read_text(encoding="utf-8"))
    except ValueError:
        previous = None
    if previous not in ({**settings, "complete": complete} for complete in (False, True)):
        raise UserError(
            f"{folder} holds demo data with other settings: {previous}, expected {settings}. Choose another DIR, pass the "
            "same settings, or delete the folder."
        )
    return bool(previous["complete"])


def _is_current(table: Path) -> bool:
    """Return whether a table has all columns; those of earlier versions have fewer."""
    with open(table, encoding="utf-8") as opened:
        return opened.readline().rstrip("\n") == ",".join(_COLUMNS)


def _write_stamp(folder: Path, settings: dict[str, object], complete: bool) -> None:
    write_json(folder / _STAMP, {**settings, "complete": complete})


def _write_videos(folder: Path, specs: list[VideoSpec], workers: int) -> Iterator[None]:
    """Render and write all videos, in this process or in others; yield once per video."""
    jobs = [(str(folder), spec) for spec in specs]
    for result in run_in_processes(_write_video, jobs, workers if workers > 1 else 0):
        if isinstance(result, WorkerCrashedError):
            raise RuntimeError(
                f"A video was not rendered: {result}. Run the same command again, perhaps with fewer --workers: it continues "
                "where it stopped."
            )
        yield


def _write_video(job: tuple[str, VideoSpec]) -> None:
    folder, spec = job
    write_video(Path(folder) / spec.domain / spec.path, render(spec), fps=spec.fps, gop=spec.gop, crf=spec.crf)


def _write_lists(folder: Path, split: str, specs: list[VideoSpec]) -> None:
    """Write the split's paths (unicode, 1-D), labels (int64, 1-D) and table."""
    arrays = {"paths": np.array([spec.path for spec in specs]), "labels": np.array([s.label for s in specs], np.int64)}
    for name, array in arrays.items():
        with replace_atomically(folder / f"{split}_{name}.npy") as file:
            np.save(file, array, allow_pickle=False)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(_COLUMNS)
    rows.writerows([getattr(spec, column) for column in _COLUMNS] for spec in specs)
    write_atomically(folder / f"{split}.csv", table.getvalue())
