"""Clips per second of a training step: linear probing (trunk frozen) against fine-tuning, interleaved, medians.

    python -m benchmarks.probe_step [--model vitsmall] [--batch 4] [--repeats 5]

Both as the trainer does it: the same model, views of 16 x 224 x 224, cross-entropy, backward, AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import nn

from benchmarks.pretraining_step import SIZES
from omnivision.models.classifier import VideoClassifier, train_mode
from omnivision.models.vit import VisionTransformer

CLASSES = 101


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=SIZES, default="vitsmall")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    video = torch.randint(0, 256, (options.batch, 3, 16, 224, 224), dtype=torch.uint8)
    label = torch.randint(0, CLASSES, (options.batch,))
    runs = {name: trained(options.model, frozen=name == "probe") for name in ("fine-tune", "probe")}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(options.repeats + 1):
        for name, (model, optimizer) in runs.items():
            began = time.perf_counter()
            nn.functional.cross_entropy(model(video, 0), label).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    report = {
        "model": options.model,
        "batch": options.batch,
        "seconds_per_step": {
            name: {"min": min(s), "median": medians[name], "max": max(s)} for name, s in seconds.items()
        },
        "times_as_fast": medians["fine-tune"] / medians["probe"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
    }
    print(json.dumps(report, indent=1))


def trained(size: str, frozen: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A classifier in training mode and its optimizer, over what is trained alone."""
    torch.manual_seed(0)
    model = VideoClassifier(VisionTransformer(*SIZES[size][0]), [CLASSES])
    model.trunk.requires_grad_(not frozen)
    train_mode(model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)


if __name__ == "__main__":
    main()
