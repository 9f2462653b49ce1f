"""What a training step costs beyond forward and backward: optimizer, clipping, agreement, log lines, and checkpoints.

    python -m benchmarks.step_parts [--quick]

The recipe's trainer (ViT-B, 16 x 224 x 224, batch 8) does whole steps beside forward and backward alone. A line is written
every 10 steps, as configured, and a checkpoint every 100.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from benchmarks import recipe
from benchmarks.command import command_line
from benchmarks.harness import Ratio, Report, interleaved

LOG_FREQ, SAVE_EVERY = 10, 100


def run(quick: bool) -> Report:
    report = Report("step_parts", "A training step, and forward and backward alone")
    small = ["trainer/model=vitmicro", "num_frames=4", "image_size=64"] if quick else []
    frames, image = (4, 64) if quick else (16, 224)
    with tempfile.TemporaryDirectory() as name:
        trainer = recipe.trainer(Path(name), "batch_size=8", "trainer.optim.gradient_clip=1", *small)
        data = recipe.batch(trainer, 8, frames, image)
        trainer.run.reporter.start(0, 1)
        trainer.raw_model.train()

        def forward_and_backward() -> None:
            with trainer._autocast():
                loss = trainer.task.training_step(trainer.raw_model, data).loss
            loss.backward()
            for parameter in trainer.raw_model.parameters():
                parameter.grad = None

        def whole_step() -> None:
            trainer.train_step(data)
            trainer.step_stats.drain(keep_newest=1)

        sides = {"whole step": whole_step, "forward and backward": forward_and_backward}
        report.seconds = interleaved(sides, rounds=3)
        logged, saved = [], []
        figures = dict.fromkeys(("loss", "lr", "grad_norm", "clips_per_second", "data_wait"), 1.0)
        for _ in range(3):
            began = time.perf_counter()
            trainer.run.reporter.step(0, 1, 1, figures)
            logged.append(time.perf_counter() - began)
            began = time.perf_counter()
            trainer.save_checkpoint([])
            saved.append(time.perf_counter() - began)
    report.facts |= {"s of a log line": round(min(logged), 5), "s of a checkpoint": round(min(saved), 3),
                     "threads": torch.get_num_threads()}  # fmt: skip
    extra = [
        100 * (whole + min(logged) / LOG_FREQ + min(saved) / SAVE_EVERY - bare) / bare
        for whole, bare in zip(*report.seconds.values(), strict=True)
    ]
    report.ratios.append(Ratio("a step beyond forward and backward", extra, 5, "%", at_most=True))
    return report


def main(arguments: list[str] | None = None) -> None:
    command_line(run, __doc__, arguments)


if __name__ == "__main__":
    main()
