"""Metrics: averages kept as sums and counts, so that ranks, batches and resumed parts of an epoch add up exactly."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from omnivision.config.schema import LabelType
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


# The metrics that rank evaluations, higher is better; the first that there is counts, else the loss.
RANKING_METRICS = {"top1": "top-1 {:.1f} %", "map": "mAP {:.1f} %"}
# Metrics of a source's predictions: logged, averaged over sources, drawn by the report. By label type: name -> in words.
PREDICTION_METRICS: dict[LabelType, dict[str, str]] = {
    "class": {"mean_class_accuracy": "mean class accuracy, %"},
    "multi_label": {"map": "mAP, %"},
    "regression": {"mae": "mean absolute error", "rmse": "root mean square error", "pearson": "correlation (Pearson)"},
}


def prediction_metrics(label_type: LabelType, label: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Return the metrics of PREDICTION_METRICS. For several classes or targets, each is a mean over those that have a value.

    Args:
        label: int (V,), -1 if unknown; except for classes, float (V, K), NaN if unknown.
        scores: float (V, K), logits or, for regression, values.
    """
    if label_type == "class":
        confusion = confusion_matrix(label, scores.argmax(1), scores.shape[1])
        return {"mean_class_accuracy": 100 * mean_class_accuracy(confusion)}
    if label_type == "multi_label":
        return {"map": 100 * _mean_of_known(average_precisions(label, scores))}
    return {name: _mean_of_known(values) for name, values in regression_errors(label, scores).items()}


def _mean_of_known(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def average_precisions(label: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the average precision of each class, float (K,), from labels 0, 1 or NaN (V, K); NaN without a positive."""
    from sklearn.metrics import average_precision_score  # imported lazily: it takes a second

    found = np.full(label.shape[1], np.nan)
    for number, (own, score) in enumerate(zip(label.T, scores.T, strict=True)):
        known = np.isfinite(own)
        if (own[known] > 0).any():
            found[number] = average_precision_score(own[known] > 0, score[known])
    return found


def expected_precisions(label: np.ndarray) -> np.ndarray:
    """Return the expected average precision of random scores, by class; arguments and result as for `average_precisions`.

    With R positives among n videos it is h + (1 - h) (R - 1) / (n - 1), where h = (1 + 1/2 + ... + 1/n) / n (Bestgen 2015).
    """
    videos, positives = np.isfinite(label).sum(0), (label > 0).sum(0)
    harmonic = np.array([sum(1 / k for k in range(1, n + 1)) / max(n, 1) for n in videos.tolist()])
    found = harmonic + (1 - harmonic) * (positives - 1) / np.maximum(videos - 1, 1)
    return np.where(positives > 0, found, np.nan)


def regression_errors(label: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """Return mean absolute error, root mean square error and Pearson's correlation of each target, float (K,).

    NaN for a target without known labels; the correlation also if one of the two does not vary.
    """
    known = np.isfinite(label)
    label, values = (np.where(known, array, np.nan).astype(np.float64) for array in (label, values))
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns about columns that are all NaN
        error = values - label
        one, other = (array - np.nanmean(array, axis=0) for array in (label, values))
        correlation = np.nansum(one * other, axis=0) / np.sqrt(np.nansum(one**2, axis=0) * np.nansum(other**2, axis=0))
        return {
            "mae": np.nanmean(np.abs(error), axis=0),
            "rmse": np.sqrt(np.nanmean(error**2, axis=0)),
            "pearson": correlation,
        }


def to_probabilities(scores: np.ndarray, label_type: LabelType) -> np.ndarray:
    """Return the probability of each class, float32 (..., classes): they add up to 1, unless several may be true."""
    logits = torch.from_numpy(scores)
    return (logits.sigmoid() if label_type == "multi_label" else logits.softmax(-1)).numpy()
