"""A training step of linear probing (trunk frozen) against fine-tuning the same trunk.

    python -m benchmarks.probe_step [--quick]

Both as the trainer does it: views of 16 x 224 x 224, cross-entropy, backward, AdamW over what is trained.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.command import command_line
from benchmarks.harness import Report, interleaved
from benchmarks.pretraining_step import SIZES
from omnivision.models.classifier import VideoClassifier, train_mode
from omnivision.models.vit import VisionTransformer

CLASSES = 101


def step(size: str, frozen: bool, video: torch.Tensor, label: torch.Tensor) -> Callable[[], None]:
    """A step of a classifier in training mode; of a frozen trunk only the head is trained."""
    torch.manual_seed(0)
    trunk = VisionTransformer(*SIZES[size][0], num_frames=video.shape[2], image_size=video.shape[3])
    model = VideoClassifier(trunk, [CLASSES])
    model.trunk.requires_grad_(not frozen)
    train_mode(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def run() -> None:
        nn.functional.cross_entropy(model(video, 0), label).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def run(quick: bool) -> Report:
    size, frames, image = ("vittiny", 4, 64) if quick else ("vitsmall", 16, 224)
    report = Report("probe_step", f"A step of linear probing and of fine-tuning, {size}", unit="s a clip")
    video, label = torch.randint(0, 256, (4, 3, frames, image, image), dtype=torch.uint8), torch.arange(4)
    sides = {
        "ours, probing": step(size, True, video, label),
        "ours, fine-tuning": step(size, False, video, label),
    }
    report.seconds = interleaved(sides, rounds=2 if quick else 5, per=len(video))
    report.times_as_fast(f"probing against fine-tuning, {size}", "ours, probing", "ours, fine-tuning", 2.5)
    return report


def main(arguments: list[str] | None = None) -> None:
    command_line(run, __doc__, arguments)


if __name__ == "__main__":
    main()
