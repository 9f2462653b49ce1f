"""`omnivision features` against its two parts alone: loading the views, and the forward pass over views in memory.

The three take turns in one process. Extraction can be no faster than the slower part; with a data worker beside it, it should
hardly be slower, if each has a core. ViT-Ti on small clips is bound by loading, ViT-S by the forward pass. With two threads
on a machine of two cores, as by default, the model and the worker share cores: no order of the work hides that, so that line
has no goal.
"""

import functools
import shutil
import tempfile
from pathlib import Path

import torch

from benchmarks import videos
from benchmarks.geometry import SIZES
from benchmarks.harness import Report, interleaved
from benchmarks.peers import loaders
from omnivision.data.batch import Batch
from omnivision.data.catalog import Split
from omnivision.data.loader import LoaderConfig, load_batches
from omnivision.models.vit import VisionTransformer
from omnivision.probing.extract import Embedder, build_dataset, extract, part_batches
from omnivision.probing.store import FeatureConfig, ModelRecord

WORKERS = LoaderConfig(num_workers=1)
MODEL: ModelRecord = {"name": "benchmark", "sha256": "0" * 64, "checkpoint": ""}


def load(embed: Embedder, split: Split) -> list[Batch]:
    """Load all batches of an extraction."""
    dataset = build_dataset(split, embed.trunk, embed.config, None)
    requests = (list(batch.requests) for batch in part_batches(dataset, [0], embed.config, {}))
    return list(load_batches(dataset, requests, WORKERS))


def forward(embed: Embedder, batches: list[Batch]) -> None:
    for batch in batches:
        embed(batch)


def extract_all(embed: Embedder, split: Split, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    extract(embed, split, folder, MODEL, WORKERS)


def features(quick: bool) -> Report:
    report = Report("features", "Features of a frozen trunk: two clips of three crops per video", "s a video")
    threads = torch.get_num_threads()
    cases = [("vittiny", 32, 72, 1), ("vitsmall", 64, 20, 1), ("vittiny", 64, 24, threads)]
    with tempfile.TemporaryDirectory() as name:
        paths = videos.make(Path(name), 340, 256, seconds=10, copies=4 if quick else 72)
        for size, image, count, model_threads in cases:
            split = videos.split(Path(name), "videos", paths[:count], "val", 101)
            torch.set_num_threads(model_threads)
            torch.manual_seed(0)
            trunk = VisionTransformer(*SIZES[size][0], image_size=image).eval()
            embed = Embedder(trunk, torch.device("cpu"), FeatureConfig(clip_duration=loaders.SECONDS))
            batches = load(embed, split)
            where = f"{size} at {image} pixels" + (", threads on all cores" if model_threads > 1 else "")
            names = {part: f"{part}, {where}" for part in ("features", "the loader alone", "the forward pass alone")}
            sides = {
                names["features"]: functools.partial(extract_all, embed, split, Path(name) / "out"),
                names["the loader alone"]: functools.partial(load, embed, split),
                names["the forward pass alone"]: functools.partial(forward, embed, batches),
            }
            seconds = interleaved(sides, rounds=2 if quick else 5, per=len(split))
            report.seconds |= seconds
            slower = max(list(names.values())[1:], key=lambda part: sorted(seconds[part])[len(seconds[part]) // 2])
            goal = 0.9 if model_threads == 1 else None
            report.times_as_fast(f"features, {where}, against {slower}", names["features"], slower, goal)
        torch.set_num_threads(threads)
    return report
