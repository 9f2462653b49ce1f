"""Starter weights: the models of a long demo as small files, with example videos, accuracies, and a README.

python -m omnivision_demo.starter DEMO OUT      after `make demo MINUTES=60 DEMO=DEMO`; `make starter` runs both
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

import omnivision
from omnivision.data.encode import write_video
from omnivision.tasks.reconstruct import Reconstruct
from omnivision.tools.main import call
from omnivision.utils.io import sha256, write_atomically, write_json
from omnivision_demo.dataset import write_demo_data
from omnivision_demo.render import render
from omnivision_demo.spec import ACTIONS, video_spec

MODELS = {"actions.safetensors": "align_synthetic", "autoencoder.safetensors": "mae"}  # file -> run of the demo
RESULTS = "starter.json"
SEED = 1  # of the test videos; `make demo` renders those of seed 0
ALL_ACTIONS, FPS, ACTION_SECONDS = "all_actions.mp4", 25, 4  # an example with all actions in turn
VIDEOS_PER_ACTION = 20  # of each tested domain
TESTED_DOMAINS = ("synthetic", "target")


def write_starter(demo: Path, out: Path) -> None:
    """Export the models, and write example videos, starter.json and README.md."""
    for file, run in MODELS.items():
        call(["export", str(demo / run), str(out / file), "--to", "safetensors", "--force"])
    (out / "videos").mkdir(exist_ok=True)
    for label, action in enumerate(ACTIONS):
        spec = video_spec(SEED, "target", "val", label)
        write_video(out / "videos" / f"{action}.mp4", render(spec), fps=spec.fps, gop=spec.gop, crf=spec.crf)
    spec = next(spec for index in range(1000) if (spec := video_spec(SEED, "synthetic", "val", index)).fps == FPS)
    parts = [render(replace(spec, label=label, frames=FPS * ACTION_SECONDS)) for label in range(len(ACTIONS))]
    write_video(out / ALL_ACTIONS, np.concatenate(parts), fps=FPS)
    with tempfile.TemporaryDirectory() as videos:
        results = measure(out, Path(videos))
    files = {file: {"sha256": sha256(out / file), "bytes": (out / file).stat().st_size} for file in MODELS}
    write_json(out / RESULTS, {"files": files, "results": results})
    write_atomically(out / "README.md", render_readme(files, results))


def render_readme(files: Mapping[str, Mapping[str, Any]], results: Mapping[str, float]) -> str:
    """Return the README of the starter weights; arguments as in starter.json."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("omnivision_demo", "."), keep_trailing_newline=True)
    videos = VIDEOS_PER_ACTION * len(ACTIONS)
    return environment.get_template("starter.md.j2").render(
        files=files, results=results, actions=ACTIONS, videos=videos
    )


def measure(folder: Path, videos: Path) -> dict[str, float]:
    """Render new videos into the empty folder `videos`, and return what the models in `folder` make of them.

    Returns top-1 (%) in each tested domain, of the other of which nothing was seen in training, and the autoencoder's loss
    (mean squared error of normalized patches; predicting each patch's mean would give 1).
    """
    write_demo_data(videos, train=1, val=VIDEOS_PER_ACTION, seed=SEED, domains=TESTED_DOMAINS)
    classifier = omnivision.load(folder / "actions.safetensors")
    results = {}
    for domain in TESTED_DOMAINS:
        paths = np.load(videos / domain / "val_paths.npy").tolist()
        labels = np.load(videos / domain / "val_labels.npy").tolist()
        predicted = [classifier.predict(videos / domain / path, top=1)[0].label for path in paths]
        results[f"{domain}_top1"] = 100 * float(np.mean(np.equal(predicted, labels)))
    autoencoder = omnivision.load(folder / "autoencoder.safetensors")
    task = Reconstruct(autoencoder.tubelet, autoencoder.config.norm)
    clips = [autoencoder.masked_clip(path) for path in sorted((videos / "synthetic" / "val").glob("*.mp4"))]
    with torch.inference_mode():
        losses = [float(task.evaluation_step(autoencoder.model, clip).loss) for clip in clips]
    return results | {"reconstruction_loss": float(np.mean(losses))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        "python -m omnivision_demo.starter", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("demo", type=Path, metavar="DEMO")
    parser.add_argument("out", type=Path, metavar="OUT")
    options = parser.parse_args()
    write_starter(options.demo, options.out)
