"""A split of ten million paths: opening it, memory, the shuffled order, resuming in mid-epoch, and bytes sent to workers."""

import pickle
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import videos
from benchmarks.harness import Report, own_memory
from omnivision.data.catalog import Dataset, Split
from omnivision.data.loader import LoaderConfig, TrainData, ValData
from omnivision.data.sampling import EpochPlan, SourcePlan

CLASSES = 400


def write(folder: Path, count: int) -> dict[str, str]:
    """Write the two arrays that training reads; return the entry of the catalog."""
    paths = np.lib.format.open_memmap(folder / "paths.npy", "w+", "<U20", (count,))
    for first in range(0, count, 1_000_000):
        numbers = np.arange(first, min(first + 1_000_000, count))
        paths[first : first + len(numbers)] = np.char.add("train/", np.char.add(numbers.astype("<U10"), ".mp4"))
    paths.flush()
    np.save(folder / "labels.npy", np.arange(count) % CLASSES)
    return {"paths": f"{folder}/paths.npy", "labels": f"{folder}/labels.npy"}


def splits(quick: bool) -> Report:
    count = 200_000 if quick else 10_000_000
    report = Report("splits", f"A split of {count:,} videos")
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder), count)
        before, start = own_memory("Anonymous"), time.perf_counter()
        split = Split(Dataset(name="many", num_classes=CLASSES, train=files, val=files), "train")  # type: ignore[arg-type]
        opened = time.perf_counter() - start
        data = videos.pretraining_samples(split)
        plan = EpochPlan({"many": SourcePlan(count, 8, 4)}, seed=0)
        plan.requests(0, 1, 0, 1)  # numpy's first use
        milliseconds = []
        for place in ((0, 0), (1, plan.steps // 2)):
            batches = TrainData(data, LoaderConfig(), plan).requests(place, epochs=2)
            start = time.perf_counter()
            next(batches)
            milliseconds.append(round(1000 * (time.perf_counter() - start), 3))
        for step in range(0, plan.steps, max(1, plan.steps // 500)):
            for request in plan.requests(0, step, 0, 1):
                split.path(request.sample_index), split.label(request.sample_index)
        next(ValData(data, LoaderConfig(), 4).requests())
        grown = own_memory("Anonymous") - before
        sent = len(pickle.dumps((data, plan)))
    report.facts["ms to the first batch of epoch 0, and in the middle of epoch 1"] = milliseconds
    report.at_most(f"opening {count:,} paths", opened, 1.0, "s")
    report.at_most(f"private memory of {count:,} paths", grown, 100, "MB")
    report.at_most("sent to a worker", sent / 1e3, 100, "kB")
    report.at_most("first batch after resuming in mid-epoch", milliseconds[1], 10, "ms")
    return report
