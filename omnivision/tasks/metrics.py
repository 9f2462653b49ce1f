"""Metrics: averages kept as sums and counts, so that ranks, batches and resumed parts of an epoch add up exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from omnivision.distributed.process_group import Dist

Totals = dict[str, dict[str, float]]  # source -> sums over samples, and their `count`


class Meter:
    """Named sums over samples, by source. Sums stay on their device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, float | Tensor]] = {}

    def add(
        self, source: str, sums: Mapping[str, Tensor], count: int | Tensor, skip_step: Tensor | None = None
    ) -> None:
        """Add scalars, each a sum over `count` samples; adds nothing if `skip_step` (bool, a scalar) is true."""
        added = self._sums.setdefault(source, {})
        for name, value in {**sums, "count": count}.items():
            number = value.detach().double() if isinstance(value, Tensor) else float(value)
            if skip_step is not None:
                number = torch.where(skip_step, 0.0, number).double()
            added[name] = added.get(name, 0.0) + number

    def all_gather_totals(self, dist: Dist) -> Totals:
        """Return sums and counts over all ranks."""
        totals: Totals = {}
        for part in dist.all_gather_object(
            {s: {n: float(v) for n, v in sums.items()} for s, sums in self._sums.items()}
        ):
            for source, sums in part.items():
                total = totals.setdefault(source, {})
                for name, value in sums.items():
                    total[name] = total.get(name, 0.0) + value
        return dict(sorted(totals.items()))

    def load(self, totals: Totals) -> None:
        self._sums = {source: dict(sums) for source, sums in totals.items()}


def averages(totals: Totals) -> dict[str, float]:
    """Return averages over the samples of all sources together."""
    count = sum(sums["count"] for sums in totals.values())
    names = sorted({name for sums in totals.values() for name in sums} - {"count"})
    return {name: sum(sums.get(name, 0.0) for sums in totals.values()) / count for name in names} if count else {}


def topk_hits(logits: Tensor, target: Tensor, k: int) -> Tensor:
    """Return, for each sample, the largest weight that its target gives to one of the k top-scored classes: float (B,).

    `target` is soft, (B, classes), or labels, int64 (B,), which give 1 for a hit and 0 for a miss. A label of -1 never hits.
    """
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices  # (B, k)
    if target.ndim == 1:
        return (best == target[:, None]).any(1).float()
    return target.gather(1, best).amax(1)


def confusion_matrix(label: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count the samples by label (row) and predicted class (column): int64 (classes, classes), without labels of -1."""
    known = label >= 0
    pairs = label[known] * classes + predicted[known]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def mean_class_accuracy(confusion: np.ndarray) -> float:
    """Return the mean, over the classes that occur, of the fraction of correct samples; NaN if no class occurs."""
    occurring = confusion.sum(1) > 0
    if not occurring.any():
        return float("nan")
    return float((confusion.diagonal()[occurring] / confusion.sum(1)[occurring]).mean())


# Validation metrics computed from a source's confusion matrix: logged in percent, averaged over sources, drawn by the report.
VALIDATION_METRICS: dict[str, Callable[[np.ndarray], float]] = {"mean_class_accuracy": mean_class_accuracy}
