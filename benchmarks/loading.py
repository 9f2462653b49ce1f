"""A pretraining sample (16 frames of 2.7 s, four views): ours, decord with torchvision, and the published way.

Seconds of one core on 340 x 256 H.264 with key frames 250 frames apart, also after `omnivision prepare`; and the speed of two
data workers, and of two processes that share nothing, against one.
"""

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

from benchmarks import videos
from benchmarks.harness import Ratio, Report, interleaved, one_thread
from benchmarks.peers import loaders
from omnivision.data.dataset import ClipDataset
from omnivision.data.loader import LoaderConfig, TrainData
from omnivision.data.sampling import EpochPlan, Request, SourcePlan
from omnivision.tools.prepare.transcode import TranscodeConfig, TranscodeJob, transcode

CLIPS = 8  # of a batch: two videos, four views each


@one_thread()
def loading(quick: bool) -> Report:
    seconds, copies, count, repeats = (4, 8, 2, 1) if quick else (10, 16, 16, 3)
    report = Report("loading", "A pretraining sample: 16 frames of 2.7 s, four views", "s of one core")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def our_samples(name: str, paths: list[Path]) -> Callable[[], None]:
            return samples(videos.pretraining_samples(videos.split(folder, name, paths)), count)

        def of_peer(way: Callable[[Path, float], torch.Tensor]) -> Callable[[], None]:
            return peer_samples(way, paths, count, seconds - loaders.SECONDS)

        paths = videos.make(folder, 340, 256, seconds, copies=copies)
        large = videos.make(folder, 1280, 720, seconds=4, copies=1 if quick else 2)
        sides = {
            "ours": our_samples("raw", paths),
            "ours, prepared": our_samples("prepared", prepared(folder, paths[:count])),
            "the published way": of_peer(loaders.published),
            "ours, 1280 x 720": our_samples("large", large),
            "ours, 1280 x 720, prepared": our_samples("small", prepared(folder, large, loaders.SHORT_SIDE)),
        }
        if report.works("decord", loaders.by_decord, paths[0], 0.0):
            sides["decord and torchvision"] = of_peer(loaders.by_decord)
        report.seconds = interleaved(sides, rounds=2 if quick else 5, per=count, clock=time.process_time)
        report.times_as_fast("samples against the published way", "ours", "the published way", 4.5)
        report.times_as_fast("samples against decord and torchvision", "ours", "decord and torchvision", 1.3)
        report.times_as_fast("prepared videos against the same unprepared", "ours, prepared", "ours", 2.0)
        what = "videos of 1280 x 720, prepared with a short side of 256, against unprepared"
        report.times_as_fast(what, "ours, 1280 x 720, prepared", "ours, 1280 x 720")

        data = videos.pretraining_samples(videos.split(folder, "raw", paths))
        rates = [[batches_per_second(data, n, 4 if quick else 40) for n in (1, 2)] for _ in range(repeats)]
        report.facts["batches of 8 clips per second, 1 and 2 workers"] = [[round(r, 2) for r in pair] for pair in rates]
        report.ratios.append(Ratio("two workers against one", [two / one for one, two in rates], 1.8))
        alone = [[samples_per_second(folder, paths, n, 8 if quick else 160) for n in (1, 2)] for _ in range(repeats)]
        what = "two independent processes that pass no batches on, against one"
        report.ratios.append(Ratio(what, [two / one for one, two in alone]))
    return report


def samples(data: ClipDataset, count: int) -> Callable[[], None]:
    """Return a function that makes `count` samples in this process, new ones at each call."""
    epochs = itertools.count()

    def run() -> None:
        epoch = next(epochs)
        for number in range(count):
            sample = data[Request(0, number % len(data.splits[0]), epoch)]
            assert sample.video.shape == (4, 3, 16, 224, 224) and not sample.bad

    return run


def peer_samples(
    way: Callable[[Path, float], torch.Tensor], paths: list[Path], count: int, last: float
) -> Callable[[], None]:
    """Return a function that makes as many samples another way, of clips that start as randomly."""
    rng = np.random.default_rng(0)

    def run() -> None:
        for number in range(count):
            views = way(paths[number % len(paths)], float(rng.uniform(0, last)))
            assert views.shape == (4, 3, 16, 224, 224)

    return run


def batches_per_second(data: ClipDataset, workers: int, count: int) -> float:
    """Return the rate of batches from worker processes, once they have started."""
    plan = EpochPlan({"raw": SourcePlan(len(data.splits[0]), CLIPS // loaders.VIEWS, loaders.VIEWS)}, seed=0)
    batches = TrainData(data, LoaderConfig(workers, prefetch=2), plan).batches((0, 0), epochs=10_000)
    for _ in range(2 * workers + 2):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count / (time.perf_counter() - start)


def samples_per_second(folder: Path, paths: list[Path], processes: int, count: int) -> float:
    """Return the rate of processes that share nothing: the machine's own limit for another one."""
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(processes), context.Queue()
    args = (folder, paths, count, barrier, seconds)
    workers = [context.Process(target=make_samples, args=args, daemon=True) for _ in range(processes)]
    for process in workers:
        process.start()
    return processes * count / max(seconds.get(timeout=300) for _ in workers)


def make_samples(folder: Path, paths: list[Path], count: int, barrier: Any, seconds: Any) -> None:
    """Make samples in this process from the moment that all such processes are ready."""
    torch.set_num_threads(1)
    run = samples(videos.pretraining_samples(videos.split(folder, f"alone_{os.getpid()}", paths)), count)
    run()
    barrier.wait()
    start = time.perf_counter()
    run()
    seconds.put(time.perf_counter() - start)


def prepared(folder: Path, paths: list[Path], short_side: int | None = None) -> list[Path]:
    """Return the videos as `omnivision prepare --gop 12` transcodes them, with or without `--short-side`."""
    results = [folder / "prepared" / path.name for path in paths]
    for path, result in zip(paths, results, strict=True):
        reason = transcode(TranscodeJob(str(path), str(result), TranscodeConfig(short_side=short_side)))
        assert reason is None, reason
    return results
