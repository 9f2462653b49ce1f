"""The demo data on disk: videos of each domain, their .npy lists of paths and labels, and a .csv with all properties.

    FOLDER/class_names.txt            one action a line, in the order of the labels
    FOLDER/demo-data.json             with which settings it was made, and whether it is complete
    FOLDER/<domain>/<split>/00012.mp4
    FOLDER/<domain>/<split>_paths.npy, <split>_labels.npy, <split>.csv

The same settings give the same bytes, whatever the number of processes, so an interrupted run is simply completed.
"""

import csv
import io
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omnivision.data.encode import TEMPORARY_SUFFIX, write_video
from omnivision.utils.errors import UserError
from omnivision_demo.actions import ACTIONS
from omnivision_demo.render import channels, render
from omnivision_demo.spec import DOMAINS, SPLITS, VideoSpec, video_spec

__all__ = [
    "ACTIONS",
    "DOMAINS",
    "SPLITS",
    "VideoSpec",
    "Written",
    "channels",
    "render",
    "video_spec",
    "write_demo_data",
]

_STAMP = "demo-data.json"
_VERSION = 2  # raise it when the same settings give other videos
_COLUMNS = ("path", "label", "action", "body", "place", "camera", "fps", "frames", "gop", "seed", "place_type")

Progress = Callable[[int, int], None]  # (videos done, videos in all)


@dataclass(frozen=True)
class Written:
    """The result of `write_demo_data`."""

    videos: int  # of the data set
    made: int  # of them, by this call
    size: int  # of all videos, in bytes


def write_demo_data(
    folder: str | os.PathLike[str],
    *,
    train: int = 40,
    val: int = 10,
    synthetic: int | None = None,
    seed: int = 0,
    workers: int = 2,
    domains: Sequence[str] = DOMAINS,
    progress: Progress | None = None,
) -> Written:
    """Write the demo data to `folder`, or what is missing there.

    train, val: videos of each action in each domain. synthetic: training videos of each action in the synthetic domain, where
    videos are cheap; as many as elsewhere if None. workers: processes; 1 works in this one.
    Raises UserError for an invalid setting, and for a folder that cannot be written to or holds something else.
    """
    drawn = train if synthetic is None else synthetic
    _check(train, val, drawn, seed, workers, domains)
    folder = Path(folder)
    settings = {
        "version": _VERSION,
        "seed": seed,
        "train": train,
        "val": val,
        "synthetic": drawn,
        "domains": list(domains),
    }

    per_action = {(domain, "train"): drawn if domain == "synthetic" else train for domain in domains}
    per_action |= {(domain, "val"): val for domain in domains}
    specs = [
        video_spec(seed, domain, split, index)
        for domain in domains
        for split in SPLITS
        for index in range(per_action[domain, split] * len(ACTIONS))
    ]
    try:
        complete = _claim(folder, settings)
        missing = [spec for spec in specs if not (folder / spec.domain / spec.path).is_file()]
        if missing or not complete:
            _stamp(folder, settings, complete=False)
            _prepare_folders(folder, domains)
            for done, _ in enumerate(_make(folder, missing, workers), start=1):
                if progress is not None:
                    progress(len(specs) - len(missing) + done, len(specs))
            for domain in domains:
                for split in SPLITS:
                    _write_lists(folder / domain, split, [s for s in specs if (s.domain, s.split) == (domain, split)])
            _write(folder / "class_names.txt", "".join(f"{action}\n" for action in ACTIONS).encode())
            _stamp(folder, settings, complete=True)
        size = sum((folder / spec.domain / spec.path).stat().st_size for spec in specs)
    except OSError as error:
        raise UserError(
            f"The demo data cannot be written to {folder}: {error.strerror or error}"
            f"{f' ({error.filename})' if error.filename else ''}. Expected a folder that can be created or written to, "
            "with about 100 MB free; choose another DIR, or fix this one and run the same command again: it continues "
            "where it stopped."
        ) from error
    return Written(videos=len(specs), made=len(missing), size=size)


def _check(train: int, val: int, synthetic: int, seed: int, workers: int, domains: Sequence[str]) -> None:
    numbers = {"train": train, "val": val, "synthetic": synthetic, "workers": workers, "seed": seed}
    for name, value in numbers.items():
        least = 0 if name == "seed" else 1
        if value < least:
            raise UserError(f"--{name} is {value}; expected a whole number from {least} upwards. Change --{name}.")
    for domain in domains:
        if domain not in DOMAINS:
            raise UserError(f"The domain {domain!r} does not exist; expected some of {', '.join(DOMAINS)}.")


def _claim(folder: Path, settings: dict[str, object]) -> bool:
    """Return whether the data in `folder` are complete. Raises UserError if it holds anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / _STAMP
    if not stamp.is_file():
        others = sorted(path.name for path in folder.iterdir() if not path.name.endswith(TEMPORARY_SUFFIX))
        if others:
            raise UserError(
                f"{folder} holds something else already ({', '.join(others[:3])}{', …' if len(others) > 3 else ''}). "
                "Expected a new or empty folder, or one with demo data; nothing was changed. Choose another DIR."
            )
        return False
    try:
        found = json.loads(stamp.read_text(encoding="utf-8"))
        complete = bool(found.pop("complete"))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{stamp} cannot be read as the settings of demo data ({error!r}); nothing was changed. "
            "Delete the folder to make it anew, or choose another DIR."
        ) from error
    if found != settings:
        keys = [key for key in sorted(settings.keys() | found.keys()) if settings.get(key) != found.get(key)]
        differences = ", ".join(f"{key} {found.get(key)} instead of {settings.get(key)}" for key in keys)
        raise UserError(
            f"{folder} holds demo data made with other settings: {differences}. Nothing was changed. "
            "Choose another DIR, pass the same settings, or delete the folder first."
        )
    return complete


def _stamp(folder: Path, settings: dict[str, object], complete: bool) -> None:
    _write(folder / _STAMP, (json.dumps({**settings, "complete": complete}, indent=1) + "\n").encode())


def _prepare_folders(folder: Path, domains: Sequence[str]) -> None:
    """Remove unfinished files of a killed run; make the folders for the videos."""
    for place in (folder, *(folder / domain / part for domain in domains for part in (".", *SPLITS))):
        for leftover in place.glob(f".*{TEMPORARY_SUFFIX}"):
            leftover.unlink(missing_ok=True)
    for domain in domains:
        for split in SPLITS:
            (folder / domain / split).mkdir(parents=True, exist_ok=True)


def _make(folder: Path, specs: list[VideoSpec], workers: int) -> Iterator[int]:
    """Render and write all videos, in this process or in others; yields the size in bytes of each one done."""
    if workers == 1 or len(specs) < 2:
        for spec in specs:
            yield _make_video(str(folder), spec)
        return
    # Spawned, not forked: the caller may hold threads or a GPU.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(specs)), mp_context=context, initializer=_exit_with_parent) as pool:
        try:
            yield from pool.map(_make_video, [str(folder)] * len(specs), specs, chunksize=4)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "A process that makes demo videos died (killed, or out of memory?). "
                "Run the same command again, perhaps with fewer --workers: it continues where it stopped."
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _exit_with_parent() -> None:
    """Exit a worker with the process that started it; workers of the pool would wait forever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_video(folder: str, spec: VideoSpec) -> int:
    return write_video(Path(folder) / spec.domain / spec.path, render(spec), fps=spec.fps, gop=spec.gop, crf=spec.crf)


def _write_lists(folder: Path, split: str, specs: list[VideoSpec]) -> None:
    """The split's paths (unicode, 1-D), labels (int64, 1-D) and table."""
    arrays = {"paths": np.array([spec.path for spec in specs]), "labels": np.array([s.label for s in specs], np.int64)}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        _write(folder / f"{split}_{name}.npy", buffer.getvalue())
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(_COLUMNS)
    rows.writerows([getattr(spec, column) for column in _COLUMNS] for spec in specs)
    _write(folder / f"{split}.csv", table.getvalue().encode())


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
