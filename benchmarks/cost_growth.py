"""Growth of the time and the memory of a pretraining step with frames, batch and width; the exponents of c * n^e."""

import math
import statistics
from typing import Any

import torch
from torch import nn

from benchmarks.geometry import SIZES, Geometry, step
from benchmarks.harness import Report, interleaved

ROWS = {"seconds": "exponent of time", "MB kept for the backward pass": "exponent of memory"}


class SavedTensors:
    """Counts the bytes that autograd keeps for the backward pass, without the weights; each storage once."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.storages: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def exponent(sizes: list[int], values: list[float]) -> float:
    """Return the slope of a straight line through the logarithms."""
    return statistics.linear_regression(list(map(math.log, sizes)), list(map(math.log, values))).slope


def shapes(quick: bool) -> dict[str, dict[int, Geometry]]:
    """Return, for each quantity that grows, a geometry of each size."""
    image, size, frames = (64, "vittiny", 4) if quick else (224, "vitsmall", 16)
    names = ("vittiny", "vitsmall") if quick else ("vittiny", "vitsmall", "vitbase")
    return {
        "frames": {count: Geometry(size, 2, count, image) for count in ((4, 8) if quick else (8, 16, 32))},
        "batch": {batch: Geometry(size, batch, frames, image) for batch in ((1, 2) if quick else (1, 2, 4, 8))},
        "width": {SIZES[name][0][0]: Geometry(name, 2, frames, image) for name in names},
    }


def cost_growth(quick: bool) -> Report:
    report = Report("cost_growth", "A pretraining step as it grows, fp32", draw=draw)
    for what, geometries in shapes(quick).items():
        sides, kept = {}, []
        for number, shape in geometries.items():
            model = shape.ours()
            loss, saved = shape.loss(model), SavedTensors(model)
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
                loss()
            kept.append(round(sum(saved.storages.values()) / 1e6, 1))
            sides[f"{what} {number}"] = step(model, loss, torch.float32)
        report.seconds |= interleaved(sides, rounds=2 if quick else 3)
        sizes, seconds = list(geometries), [round(report.median(side), 3) for side in sides]
        values = dict(zip(ROWS, (seconds, kept), strict=True))
        slopes = {slope: round(exponent(sizes, values[key]), 2) for key, slope in ROWS.items()}
        report.facts[what] = {"sizes": sizes, **values, **slopes}
    return report


def draw(report: Report, figure: Any) -> None:
    """Draw time and memory against each size, on logarithmic axes."""
    figure.set_size_inches(10, 5.4)
    for column, (what, facts) in zip(figure.subplots(2, 3).T, report.facts.items(), strict=True):
        for axes, (key, slope) in zip(column, ROWS.items(), strict=True):
            axes.loglog(facts["sizes"], facts[key], "o-", color="#4477aa", base=2)
            axes.set_xticks(facts["sizes"], facts["sizes"])
            axes.set_yticks(facts[key], [f"{value:.{3 if value < 1000 else 4}g}" for value in facts[key]])
            axes.minorticks_off()
            axes.set_title(f"{what}: exponent {facts[slope]:.2f}", fontsize=10)
            axes.set_ylabel(key if what == "frames" else "")
            axes.grid(alpha=0.3, which="both")
