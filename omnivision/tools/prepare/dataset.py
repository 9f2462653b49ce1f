"""The files that `prepare` writes to OUT.

    OUT/{train,val,test}_paths.npy, {train,val,test}_labels.npy, class_names.txt
    OUT/{train,val,test}_segments.npy when samples are parts of videos
    OUT/films/... or frames/...       when videos are transcoded
    OUT/failed.csv                    videos that could not be, with the reason; they are not in the arrays
    OUT/prepare.json                  from what and how it was made

An existing video is complete, so the same command completes an interrupted one.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omnivision.tools.prepare.arrays import write_split
from omnivision.tools.prepare.index import DatasetIndex, printable
from omnivision.tools.prepare.transcode import TranscodeConfig, TranscodeJob, destinations, remove_stale_tmp, transcode
from omnivision.tools.prepare.workers import WorkerCrashedError, run_in_processes
from omnivision.tools.progress import track
from omnivision.utils.errors import UserError
from omnivision.utils.io import write_atomically

_STAMP, _FAILED = "prepare.json", "failed.csv"


@dataclass(frozen=True)
class Prepared:
    """What was written: the number of samples per split, and the omitted videos with reasons."""

    samples: dict[str, int]
    failed: dict[str, str]
    kept: int  # videos that existed already


def results(index: DatasetIndex, config: TranscodeConfig, out: Path) -> dict[str, str]:
    """Return the file or folder in OUT for each path of the source."""
    paths = sorted({row.path for row in index.rows()})
    return {path: str(out.absolute() / config.folder / made) for path, made in destinations(paths, config).items()}


def check_out_folder(out: Path, settings: dict[str, object]) -> None:
    """Raise UserError unless OUT is new, empty, or made by the same command. Nothing is written."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"OUT ({out}) is a file; expected a folder, which may be new. Give another OUT.")
    stamp = out / _STAMP
    if not stamp.is_file():
        if others := sorted(path.name for path in out.iterdir() if not path.name.startswith(".")):
            raise UserError(
                f"OUT ({out}) holds something else already ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}). "
                "Expected a new or empty folder, or one that this command has made. Give another OUT."
            )
        return
    try:
        found = json.loads(stamp.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{stamp} cannot be read ({error}). Delete OUT to make it anew, or give another one."
        ) from error
    if found != settings:
        keys = sorted(key for key in settings if not isinstance(found, dict) or found.get(key) != settings[key])
        raise UserError(
            f"OUT ({out}) was made with other settings ({', '.join(keys) or 'more of them'}; see {stamp}). Nothing was "
            "changed. Pass the same, give another OUT, or delete it first."
        )


def write_dataset(
    out: Path,
    index: DatasetIndex,
    labels: dict[str, np.ndarray],
    classes: list[str],
    settings: dict[str, object],
    config: TranscodeConfig | None,
    workers: int,
) -> Prepared:
    """Write everything to OUT, which `check_out_folder` has accepted. Raises UserError if it cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / _STAMP, json.dumps(settings, indent=1) + "\n")
        write_atomically(out / "class_names.txt", "".join(f"{name}\n" for name in classes))
        failed: dict[str, str] = {}
        kept = 0
        if config is None:
            made, prefix = None, index.root
        else:
            made = results(index, config, out)
            failed, kept = _transcode_all(out / config.folder, index, made, config, workers)
            prefix = str(out.absolute() / config.folder)
            _write_failed(out / _FAILED, index, failed)
        keep = {
            split: [i for i, row in enumerate(rows) if row.path not in failed] for split, rows in index.splits.items()
        }
        if empty := [split for split, indices in keep.items() if not indices]:
            raise UserError(
                f"No video of {' and '.join(empty)} could be transcoded; {out / _FAILED} says why. No arrays were "
                "written. Mend "
                "the videos, or prepare without --short-side, --gop, --crf and --frames."
            )
        for split, indices in keep.items():
            rows = [index.splits[split][i] for i in indices]
            paths = [row.path if made is None else str(Path(made[row.path]).relative_to(prefix)) for row in rows]
            write_split(out, split, paths, labels[split][indices], [row.segment for row in rows])
    except OSError as error:
        raise _cannot_write(out, error.strerror or str(error)) from error
    return Prepared({split: len(indices) for split, indices in keep.items()}, failed, kept)


def _cannot_write(folder: Path, reason: str) -> UserError:
    return UserError(
        f"{folder} cannot be written to: {reason}. Expected a folder that can be created or written to, with space enough. "
        "Give another OUT, or fix this one and run the same command again: it continues where it stopped."
    )


def _transcode_all(
    folder: Path, index: DatasetIndex, made: dict[str, str], config: TranscodeConfig, workers: int
) -> tuple[dict[str, str], int]:
    """Transcode what is missing. Return the reasons for failures by path, and how many results existed."""
    missing = [path for path, destination in made.items() if not Path(destination).exists()]
    jobs = [TranscodeJob(index.full(path), made[path], config) for path in missing]
    failed = {}
    work = run_in_processes(transcode, jobs, workers)
    try:
        for position, result in track(work, len(jobs), "prepare"):
            if isinstance(result, WorkerCrashedError):
                failed[missing[position]] = str(result)
            elif result.fault:
                raise _cannot_write(folder, result.fault)
            elif result.reason:
                failed[missing[position]] = result.reason
    finally:
        work.close()  # ends its processes
        remove_stale_tmp(folder)
    return failed, len(made) - len(missing)


def _write_failed(file: Path, index: DatasetIndex, failed: dict[str, str]) -> None:
    """Write one row per omitted video; remove the file if there is none."""
    if not failed:
        file.unlink(missing_ok=True)
        return
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("path", "reason"))
    rows.writerows((printable(index.full(path)), printable(reason)) for path, reason in sorted(failed.items()))
    write_atomically(file, table.getvalue())


def make_stamp(source: str, prefix: str, config: TranscodeConfig | None) -> dict[str, object]:
    """Return the settings that an existing OUT must have been made with."""
    how = None if config is None else dataclasses.asdict(config)
    if how and how["frame_pattern"] is None:
        del how["frame_pattern"]  # as earlier versions wrote it
    return {"source": printable(str(Path(source).absolute())), "prefix": printable(prefix), "transcoded": how}
