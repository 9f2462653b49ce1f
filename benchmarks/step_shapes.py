"""A pretraining step in other sizes: ours against Hugging Face's VideoMAE, from tiny to large and from 8 to 32 frames.

    python -m benchmarks.step_shapes [--quick]

In fp32 and, where there are instructions for it, bf16; neither side compiled. Batch 2 (large: 1), three rounds of each shape.
"""

from __future__ import annotations

from benchmarks.command import command_line
from benchmarks.harness import Report, interleaved
from benchmarks.pretraining_step import DTYPES, Geometry, loss_of_huggingface, loss_of_ours, step

SHAPES = [("vittiny", 8), ("vittiny", 16), ("vittiny", 32), ("vitsmall", 8), ("vitsmall", 16), ("vitsmall", 32),
          ("vitbase", 8), ("vitbase", 16), ("vitbase", 32), ("vitlarge", 8), ("vitlarge", 16), ("vitlarge", 32)]  # fmt: skip
QUICK = [("vittiny", 4), ("vitsmall", 4)]


def run(quick: bool) -> Report:
    report = Report("step_shapes", "A pretraining step in other sizes", unit="s a clip")
    for size, frames in QUICK if quick else SHAPES:
        shape = Geometry(size, 1 if size == "vitlarge" else 2, frames, 64 if quick else 224)
        ours = shape.ours()
        theirs = shape.huggingface() if report.works("Hugging Face", shape.huggingface) else None
        name = f"{size}, {frames} frames"
        for precision, dtype in DTYPES.items():
            mine, peer = (f"{side}, {name}, {precision}" for side in ("ours", "Hugging Face"))
            sides = {mine: step(ours, loss_of_ours(ours, shape), dtype)}
            if theirs is not None:
                sides[peer] = step(theirs, loss_of_huggingface(theirs, shape), dtype)
            report.seconds |= interleaved(sides, rounds=2 if quick else 3, per=shape.batch)
            report.times_as_fast(f"step of {name}, {precision}, against Hugging Face", mine, peer, 1.0)
    return report


def main(arguments: list[str] | None = None) -> None:
    command_line(run, __doc__, arguments)


if __name__ == "__main__":
    main()
