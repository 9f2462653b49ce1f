"""Averages kept as sums and counts, so that processes, batches and resumed halves of an epoch add up exactly."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from omnivision.distributed.process_group import Dist


class Meter:
    """Named sums over samples, by source. Sums stay on their device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._counts: dict[str, int | Tensor] = {}

    def add(
        self, source: str, sums: Mapping[str, Tensor], count: int | Tensor, skip_mask: Tensor | None = None
    ) -> None:
        """Add scalar tensors, each a sum over `count` samples; nothing where `skip_mask` (bool, a scalar) is true."""
        self._counts[source] = self._counts.get(source, 0) + (
            count if skip_mask is None else torch.where(skip_mask, 0, count)
        )
        held = self._sums.setdefault(source, {})
        for name, value in sums.items():
            value = value.detach().double()
            if skip_mask is not None:
                value = torch.where(skip_mask, 0.0, value)
            held[name] = held[name] + value if name in held else value

    def totals(self, dist: Dist) -> dict[str, tuple[dict[str, float], int]]:
        """Sums and count over all ranks, by source."""
        mine = {s: ({n: float(v) for n, v in self._sums[s].items()}, int(c)) for s, c in self._counts.items()}
        merged: dict[str, tuple[dict[str, float], int]] = {}
        for part in dist.gather(mine):
            for source, (sums, count) in part.items():
                known, total = merged.get(source, ({}, 0))
                merged[source] = {n: known.get(n, 0.0) + v for n, v in sums.items()}, total + count
        return dict(sorted(merged.items()))

    def load(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Load sums from a checkpoint: by source, the sums and their `count`."""
        self._counts = {source: int(values["count"]) for source, values in state.items()}
        self._sums = {
            source: {n: torch.tensor(v, dtype=torch.float64) for n, v in values.items() if n != "count"}
            for source, values in state.items()
        }


def averages(totals: Mapping[str, tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Averages over the samples of all sources together."""
    count = sum(n for _, n in totals.values())
    names = sorted({name for sums, _ in totals.values() for name in sums})
    return {name: sum(sums.get(name, 0.0) for sums, _ in totals.values()) / count for name in names} if count else {}


def topk_accuracy(scores: Tensor, target: Tensor, k: int) -> Tensor:
    """For each sample the largest weight that its target gives to one of the k best-scored classes: float (B,).

    `target` is soft, (B, classes), or labels, int64 (B,): then that is 1 for a hit and 0 for a miss. A label of -1 never hits.
    """
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices  # (B, k)
    if target.ndim == 1:
        return (best == target[:, None]).any(1).float()
    return target.gather(1, best).amax(1)


def confusion_matrix(label: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How often each label (row) was predicted as each class (column): int64 (classes, classes); labels of -1 are left out."""
    known = label >= 0
    pairs = label[known] * classes + predicted[known]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def mean_class_accuracy(confusion: np.ndarray) -> float:
    """Mean over the classes that occur of the share of their samples that were recognised; NaN when none occurs."""
    occurring = confusion.sum(1) > 0
    if not occurring.any():
        return float("nan")
    return float((confusion.diagonal()[occurring] / confusion.sum(1)[occurring]).mean())
