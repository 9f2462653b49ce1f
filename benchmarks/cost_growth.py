"""How the time and the memory of a pretraining step grow with frames, batch and width; the exponents of c * n^e.

python -m benchmarks.cost_growth [--quick]
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.command import command_line
from benchmarks.harness import Report, interleaved
from benchmarks.pretraining_step import SIZES, Geometry, loss_of_ours, step


class Saved:
    """Bytes that autograd keeps for the backward pass of what runs inside, but for the weights; storages are counted once."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __enter__(self) -> Saved:
        self.storages: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
        self.megabytes = sum(self.storages.values()) / 1e6


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of a straight line through the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope


def shapes(quick: bool) -> dict[str, dict[int, Geometry]]:
    """What grows, and a geometry for each size of it."""
    image, size = (64, "vittiny") if quick else (224, "vitsmall")
    widths = [name for name in (("vittiny", "vitsmall") if quick else ("vittiny", "vitsmall", "vitbase"))]
    return {
        "frames": {frames: Geometry(size, 2, frames, image) for frames in ((4, 8) if quick else (8, 16, 32))},
        "batch": {
            batch: Geometry(size, batch, 4 if quick else 16, image) for batch in ((1, 2) if quick else (1, 2, 4, 8))
        },
        "width": {SIZES[name][0][0]: Geometry(name, 2, 4 if quick else 16, image) for name in widths},
    }


def run(quick: bool) -> Report:
    report = Report("cost_growth", "A pretraining step as it grows, fp32", unit="s")
    for what, found in shapes(quick).items():
        sides, kept = {}, []
        for number, shape in found.items():
            model = shape.ours()
            loss = loss_of_ours(model, shape)
            with Saved(model) as saved:
                loss()
            kept.append(saved.megabytes)
            sides[f"{what} {number}"] = step(model, loss, torch.float32)
        report.seconds |= interleaved(sides, rounds=2 if quick else 3)
        numbers, seconds = list(found), [report.median(side) for side in sides]
        report.facts[what] = {
            "sizes": numbers,
            "seconds": [round(value, 3) for value in seconds],
            "MB kept for the backward pass": [round(value, 1) for value in kept],
            "exponent of time": round(exponent(numbers, seconds), 2),
            "exponent of memory": round(exponent(numbers, kept), 2),
        }
    return report


def draw(report: Report, file: Path) -> None:
    """Time and memory against each size, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(10, 5.4), layout="constrained")
    for column, (what, found) in enumerate(report.facts.items()):
        rows = (("seconds", "exponent of time", "s a step"),
                ("MB kept for the backward pass", "exponent of memory", "MB kept for the backward pass"))  # fmt: skip
        for row, (key, slope, label) in enumerate(rows):
            place = axes[row][column]
            place.loglog(found["sizes"], found[key], "o-", color="#4477aa", base=2)
            place.set_xticks(found["sizes"], found["sizes"])
            place.set_yticks(found[key], [f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in found[key]])
            place.minorticks_off()
            place.set_title(f"{what}: exponent {found[slope]:.2f}", fontsize=10)
            place.set_ylabel(label if column == 0 else "")
            place.grid(alpha=0.3, which="both")
    figure.suptitle(report.title, fontsize=11)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    command_line(run, __doc__, arguments, draw=draw)


if __name__ == "__main__":
    main()
