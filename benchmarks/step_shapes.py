"""A pretraining step in other sizes: ours against Hugging Face's VideoMAE, from tiny to large and from 8 to 32 frames.

    python -m benchmarks.step_shapes [--quick]

In fp32, so that both sides do the same arithmetic on any processor; batch 2 (large: 1), two rounds of each shape.
"""

from __future__ import annotations

import torch

from benchmarks.harness import Report, command_line, interleaved
from benchmarks.pretraining_step import Geometry, loss_of_huggingface, loss_of_ours, step

SHAPES = [("vittiny", 8), ("vittiny", 16), ("vittiny", 32), ("vitsmall", 8), ("vitsmall", 16), ("vitsmall", 32),
          ("vitbase", 8), ("vitbase", 16), ("vitbase", 32), ("vitlarge", 8), ("vitlarge", 16)]  # fmt: skip
QUICK = [("vittiny", 4), ("vitsmall", 4)]


def run(quick: bool) -> Report:
    report = Report("step_shapes", "A pretraining step in other sizes, fp32", unit="s a clip")
    for size, frames in QUICK if quick else SHAPES:
        shape = Geometry(size, 1 if size == "vitlarge" else 2, frames, 64 if quick else 224)
        ours, theirs = shape.ours(), shape.huggingface()
        name = f"{size}, {frames} frames"
        sides = {
            f"ours, {name}": step(ours, loss_of_ours(ours, shape), torch.float32),
            f"Hugging Face, {name}": step(theirs, loss_of_huggingface(theirs, shape), torch.float32),
        }
        report.seconds |= interleaved(sides, rounds=2 if quick else 3, per=shape.batch)
        report.times_as_fast(
            f"step of {name}, fp32, against Hugging Face", f"ours, {name}", f"Hugging Face, {name}", 1.0
        )
        del ours, theirs, sides
    return report


def main(arguments: list[str] | None = None) -> None:
    command_line(run, __doc__, arguments)


if __name__ == "__main__":
    main()
