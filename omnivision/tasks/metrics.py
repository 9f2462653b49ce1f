"""Metrics: averages kept as sums and counts, so that ranks, batches and resumed parts of an epoch add up exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


# The first of these metrics that was logged ranks evaluations, higher is better; without any, the loss does.
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
        return {"map": 100 * mean_of_finite(average_precisions(label, scores))}
    return {name: mean_of_finite(values) for name, values in regression_errors(label, scores).items()}


def mean_of_finite(values: Sequence[float] | np.ndarray) -> float:
    """Return the mean of the finite values; NaN if there are none."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


def average_precisions(label: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the average precision of each class, float (K,), from labels 0, 1 or NaN (V, K).

    NaN without a positive, and if scores are not finite.
    """
    from sklearn.metrics import average_precision_score  # imported lazily: it takes a second

    found = np.full(label.shape[1], np.nan)
    for number, (own, score) in enumerate(zip(label.T, scores.T, strict=True)):
        known = np.isfinite(own)
        if (own[known] > 0).any() and np.isfinite(score[known]).all():
            found[number] = average_precision_score(own[known] > 0, score[known])
    return found


def expected_precisions(label: np.ndarray) -> np.ndarray:
    """Return the expected average precision of random scores, by class; arguments and result as for `average_precisions`.

    With R positives among n videos it is h + (1 - h) (R - 1) / (n - 1), where h = (1 + 1/2 + ... + 1/n) / n (Bestgen 2015).
    """
    videos, positives = np.isfinite(label).sum(0), (label > 0).sum(0)
    sums = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, len(label) + 1))])
    harmonic = sums[videos] / np.maximum(videos, 1)
    expected = harmonic + (1 - harmonic) * (positives - 1) / np.maximum(videos - 1, 1)
    return np.where(positives > 0, expected, np.nan)


def regression_errors(label: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """Return mean absolute error, root mean square error and Pearson's correlation of each target, float (K,).

    NaN for a target without known labels, or with values that are not finite; the correlation also if one side does not vary.
    """
    errors = {name: np.full(label.shape[1], np.nan) for name in PREDICTION_METRICS["regression"]}
    for k, (own, value) in enumerate(zip(label.T.astype(np.float64), values.T.astype(np.float64), strict=True)):
        known = np.isfinite(own)
        own, value = own[known], value[known]
        if len(own) and np.isfinite(value).all():
            errors["mae"][k] = np.abs(value - own).mean()
            errors["rmse"][k] = np.sqrt(((value - own) ** 2).mean())
            if own.std() and value.std():
                errors["pearson"][k] = np.corrcoef(own, value)[0, 1]
    return errors


def to_probabilities(scores: np.ndarray, label_type: LabelType) -> np.ndarray:
    """Return the probability of each class, float32 (..., classes): they add up to 1, unless several may be true."""
    logits = torch.from_numpy(scores)
    return (logits.sigmoid() if label_type == "multi_label" else logits.softmax(-1)).numpy()
