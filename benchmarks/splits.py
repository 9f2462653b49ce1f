"""A split of ten million paths: opening it, memory, the shuffled order, resuming in the middle, and what workers are sent.

python -m benchmarks.splits [--quick]
"""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.command import command_line
from benchmarks.harness import Ratio, Report, own_memory
from omnivision.data.catalog import Dataset, Split
from omnivision.data.dataset import ClipConfig, ClipDataset
from omnivision.data.loader import LoaderConfig, TrainData, ValData
from omnivision.data.masking import RandomMask
from omnivision.data.sampling import EpochPlan, SourcePlan
from omnivision.data.views import PretrainView

CLASSES = 400


def write(folder: Path, count: int) -> dict[str, str]:
    """The two arrays, as training reads them."""
    paths = np.lib.format.open_memmap(folder / "paths.npy", "w+", "<U20", (count,))
    for first in range(0, count, 1_000_000):
        numbers = np.arange(first, min(first + 1_000_000, count))
        paths[first : first + len(numbers)] = np.char.add("train/", np.char.add(numbers.astype("<U10"), ".mp4"))
    paths.flush()
    del paths
    np.save(folder / "labels.npy", np.arange(count) % CLASSES)
    return {"paths": str(folder / "paths.npy"), "labels": str(folder / "labels.npy")}


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def run(quick: bool) -> Report:
    count = 200_000 if quick else 10_000_000
    report = Report("splits", f"A split of {count:,} videos")
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder), count)
        before = own_memory("Anonymous")
        began = time.perf_counter()
        split = Split(Dataset(name="many", num_classes=CLASSES, train=files, val=files), "train")
        opened = time.perf_counter() - began
        view, grid = PretrainView(224), (8, 14, 14)
        data = ClipDataset([split], {"video": ClipConfig(view, 4, 16, grid, RandomMask(0.9))}, 2.7, 0, training=True)
        plan = EpochPlan({"many": SourcePlan(count, 8, 4)}, seed=0)
        train, middle = TrainData(data, LoaderConfig(), plan), plan.steps // 2
        at_first, late = train.requests((0, 0), epochs=2), train.requests((1, middle), epochs=2)
        plan.requests(0, 1, 0, 1)  # numpy's first use
        first_seconds, late_seconds = timed(lambda: next(at_first)), timed(lambda: next(late))
        for requests in (plan.requests(0, step, 0, 1) for step in range(0, plan.steps, max(1, plan.steps // 500))):
            for request in requests:
                split.path(request.video), split.label(request.video)
        evaluated = next(ValData(data, LoaderConfig(), 4).requests())
        grown = own_memory("Anonymous") - before
        sent = len(pickle.dumps((data, plan)))
        report.facts |= {
            "seconds to open": round(opened, 4),
            "private MB that it adds": round(grown, 2),
            "bytes sent to each worker": sent,
            "ms to the first batch of step 0": round(1000 * first_seconds, 3),
            f"ms to the first batch of step {middle} of epoch 1": round(1000 * late_seconds, 3),
            "videos of the first evaluation batch": len(evaluated),
        }
    report.ratios += [
        Ratio(f"opening {count:,} paths", [opened], 1.0, "s", at_most=True),
        Ratio(f"private memory of {count:,} paths", [grown], 100, "MB", at_most=True),
        Ratio("sent to a worker", [sent / 1e3], 100, "kB", at_most=True),
        Ratio("first batch after resuming in mid-epoch", [1000 * late_seconds], 10, "ms", at_most=True),
    ]
    return report


def main(arguments: list[str] | None = None) -> None:
    command_line(run, __doc__, arguments)


if __name__ == "__main__":
    main()
