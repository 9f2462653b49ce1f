"""A pretraining sample (16 frames of 2.7 s, four views): ours, decord with torchvision, and the published way.

    python -m benchmarks.loading [--quick]

Seconds of one core on 340 x 256 H.264 with key frames 250 frames apart; the same films prepared by `omnivision prepare`; and
how much faster two worker processes are than one, and two processes that do nothing together.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import films
from benchmarks.command import command_line
from benchmarks.harness import Ratio, Report, interleaved, one_thread
from benchmarks.peers import loaders
from omnivision.data.catalog import Dataset, Split
from omnivision.data.dataset import ClipConfig, ClipDataset
from omnivision.data.loader import LoaderConfig, TrainData
from omnivision.data.masking import RandomMask
from omnivision.data.sampling import EpochPlan, Request, SourcePlan
from omnivision.data.views import PretrainView
from omnivision.tools.prepare.transcode import TranscodeConfig, TranscodeJob, transcode

CLIPS = 8  # of a batch: two videos, four views each


def dataset(folder: Path, name: str, paths: list[Path]) -> ClipDataset:
    """The recipe's samples of some films."""
    file = folder / f"{name}.npy"
    np.save(file, np.array([str(path) for path in paths]))
    split = Split(Dataset(name=name, train={"paths": str(file)}), "train")
    view = PretrainView(loaders.SIZE, loaders.SHORT_SIDE)
    cut = ClipConfig(view, loaders.VIEWS, loaders.FRAMES, grid=(8, 14, 14), mask=RandomMask(0.9))
    return ClipDataset([split], {"video": cut}, loaders.SECONDS, seed=0, training=True)


def samples(data: ClipDataset, count: int) -> Callable[[], None]:
    """`count` samples in this process, new ones at each call."""
    epochs = itertools.count()

    def run() -> None:
        epoch = next(epochs)
        for number in range(count):
            sample = data[Request(0, number % len(data.splits[0]), epoch)]
            assert sample.video.shape == (4, 3, 16, 224, 224) and not sample.bad

    return run


def by_peer(
    way: Callable[[Path, float], torch.Tensor], paths: list[Path], count: int, last: float
) -> Callable[[], None]:
    """The same number of samples another way, of clips that start as randomly."""
    rng = np.random.default_rng(0)

    def run() -> None:
        for number in range(count):
            views = way(paths[number % len(paths)], float(rng.uniform(0, last)))
            assert views.shape == (4, 3, 16, 224, 224)

    return run


def batches_a_second(data: ClipDataset, workers: int, count: int) -> float:
    """How fast batches come from worker processes, once they have started."""
    plan = EpochPlan({"films": SourcePlan(len(data.splits[0]), CLIPS // loaders.VIEWS, loaders.VIEWS)}, seed=0)
    stream = TrainData(data, LoaderConfig(workers, prefetch=2), plan).batches((0, 0), epochs=10_000)
    for _ in range(2 * workers + 2):
        next(stream)
    began = time.perf_counter()
    for _ in range(count):
        next(stream)
    return count / (time.perf_counter() - began)


def alone(folder: Path, paths: list[Path], count: int, together: Any, seconds: Any) -> None:
    """Samples in a process that hands them to nobody, from the moment that all such processes are ready."""
    torch.set_num_threads(1)
    run = samples(dataset(folder, f"alone_{os.getpid()}", paths), count)
    run()
    together.wait()
    began = time.perf_counter()
    run()
    seconds.put(time.perf_counter() - began)


def samples_a_second(folder: Path, paths: list[Path], processes: int, count: int) -> float:
    """Of so many processes that share nothing: what the machine itself gives for another one."""
    context = multiprocessing.get_context("spawn")
    together, seconds = context.Barrier(processes), context.Queue()
    started = [context.Process(target=alone, args=(folder, paths, count, together, seconds)) for _ in range(processes)]
    for process in started:
        process.start()
    slowest = max(seconds.get(timeout=300) for _ in started)
    for process in started:
        process.join()
    return processes * count / slowest


def prepared(folder: Path, paths: list[Path], short_side: int | None = None) -> list[Path]:
    """What `omnivision prepare --gop 12` makes of the films, with or without `--short-side`."""
    found = []
    for path in paths:
        found.append(folder / "prepared" / path.name)
        outcome = transcode(TranscodeJob(str(path), str(found[-1]), TranscodeConfig(short_side=short_side)))
        assert outcome.reason is None and outcome.fault is None, outcome
    return found


@one_thread()
def run(quick: bool) -> Report:
    seconds, copies, count, rounds = (4, 8, 2, 2) if quick else (10, 16, 16, 5)
    report = Report("loading", "A pretraining sample: 16 frames of 2.7 s, four views", unit="s of one core")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = films.make(folder, 340, 256, seconds, copies=copies)
        raw = dataset(folder, "raw", paths)
        quick_to_read = dataset(folder, "prepared", prepared(folder, paths[:count]))
        sides = {
            "ours": samples(raw, count),
            "ours, prepared": samples(quick_to_read, count),
            "the published way": by_peer(loaders.published, paths, count, seconds - loaders.SECONDS),
        }
        if report.works("decord", loaders.by_decord, paths[0], 0.0):
            sides["decord and torchvision"] = by_peer(loaders.by_decord, paths, count, seconds - loaders.SECONDS)
        large = films.make(folder, 1280, 720, seconds=4, copies=1 if quick else 2)
        small = prepared(folder, large, loaders.SHORT_SIDE)
        sides["ours, 1280 x 720"] = samples(dataset(folder, "large", large), count)
        sides["ours, 1280 x 720, prepared"] = samples(dataset(folder, "small", small), count)
        report.seconds = interleaved(sides, rounds, per=count, clock=time.process_time)
        report.times_as_fast("samples against the published way", "ours", "the published way", 4.5)
        report.times_as_fast("samples against decord and torchvision", "ours", "decord and torchvision", 1.3)
        report.times_as_fast("prepared films against the same unprepared", "ours, prepared", "ours", 2.0)
        what = "films of 1280 x 720, prepared with a short side of 256, against unprepared"
        report.times_as_fast(what, "ours, 1280 x 720, prepared", "ours, 1280 x 720")

        rates = [[batches_a_second(raw, n, 4 if quick else 40) for n in (1, 2)] for _ in range(1 if quick else 3)]
        report.facts["batches of 8 clips a second, 1 and 2 workers"] = [[round(r, 2) for r in pair] for pair in rates]
        report.ratios.append(Ratio("two workers against one", [two / one for one, two in rates], 1.8))
        apart = [
            [samples_a_second(folder, paths, n, 8 if quick else 160) for n in (1, 2)] for _ in range(1 if quick else 3)
        ]
        what = "two processes that share nothing and hand nothing on, against one"
        report.ratios.append(Ratio(what, [two / one for one, two in apart]))
    return report


def main(arguments: list[str] | None = None) -> None:
    command_line(run, __doc__, arguments)


if __name__ == "__main__":
    main()
