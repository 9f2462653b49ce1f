"""The probe board: every method on frozen features of a training and a validation split.

What a method must choose (k, C, the learning rate) is chosen on a part of the training split that is held out by groups of
videos. Then it is fitted to the whole training split and evaluated once on the validation split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnivision.data.groups import group_paths, hold_out
from omnivision.data.sampling import keyed_rng
from omnivision.probing.methods import RANK_SAMPLES, Scaler, effective_rank, fit_logistic, fit_sgd, knn_scores
from omnivision.probing.store import FeatureSplit
from omnivision.tasks.metrics import confusion_matrix, mean_class_accuracy
from omnivision.utils.errors import UserError, truncate_list

NEIGHBORS = (1, 3, 5, 10, 20, 50, 100, 200)
STRENGTHS = tuple(10.0**power for power in range(-5, 3))  # C
RATES = tuple(10 ** (power / 2) for power in range(-6, 2))
SHOTS = (1, 5, 10, 25)  # videos of each class
SHARES = (0.01, 0.1)  # of the videos of each class
DRAWS = 5
LOW_SHOT_STRENGTH = 1.0
HELD_OUT = 0.2
SEED = 0


@dataclass(frozen=True)
class Samples:
    """Features (N, D) with labels (N,) and the group of videos of each, on a device."""

    features: Tensor
    labels: Tensor
    groups: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, chosen: np.ndarray) -> Samples:
        """Return the samples at positions, int (M,) or bool (N,)."""
        index = torch.from_numpy(np.arange(len(self))[chosen])
        where = index.to(self.labels.device)
        return Samples(self.features[where], self.labels[where], [self.groups[i] for i in index.tolist()])


@dataclass(frozen=True)
class Result:
    """What one method reaches on the validation split, in percent."""

    method: str
    top1: float
    mean_class_accuracy: float
    spread: float  # standard deviation over draws; else the binomial standard error
    videos: int
    chosen: Mapping[str, float] = field(default_factory=dict)
    held_out_top1: float | None = None  # of the choice
    draws: Sequence[float] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Data:
    """A training and a validation split with the same classes."""

    train: Samples
    val: Samples
    classes: int

    def held_out(self) -> tuple[Samples, Samples]:
        """Return the training split in two parts: to fit, and to choose by."""
        held = hold_out(self.train.groups, self.train.labels.cpu().numpy(), HELD_OUT, SEED)
        return self.train.select(~held), self.train.select(held)


def samples_of(split: FeatureSplit, device: torch.device, grouping: Callable[[str], str] | None = None) -> Samples:
    """Return the labelled samples of a split: of the last layer, averaged over time.

    Raises UserError for windows, and if there are no labels or only one.
    """
    where = f"{split.name}/{split.which}"
    values = np.asarray(split.labels)
    if values.ndim > 1:
        raise UserError(
            f"{where} has a row of labels for each video; a probe needs one class per video. Give other data."
        )
    known = values >= 0
    if split.config.stride is not None:
        raise UserError(
            f"{where} has several windows of a video; a probe needs one row each. Extract without --window."
        )
    if len(distinct := np.unique(values[known])) < 2:
        what = f"only label {distinct[0]}" if len(distinct) else "no labels"
        raise UserError(
            f"{where} has {what}; a probe needs at least two classes. Set labels in the catalog and extract again."
        )
    features = flat_features(split, known)
    if (features == features[0]).all():
        raise UserError(
            f"{where} has the same features for all videos. Training has collapsed, or the videos are equal."
        )
    groups = group_paths(split.name, np.asarray(split.paths)[known].tolist(), grouping)
    return Samples(torch.from_numpy(features).to(device), torch.from_numpy(values[known]).long().to(device), groups)


def flat_features(split: FeatureSplit, rows: slice | np.ndarray) -> np.ndarray:
    """Return features of some rows, float32 (rows, D): of the last layer, averaged over time."""
    features = np.array(split.features[rows], dtype=np.float32)
    if split.config.layers > 1:
        features = features[:, -1]
    return features.mean(1) if features.ndim == 3 else features


def make_data(
    train: FeatureSplit, val: FeatureSplit, device: torch.device, grouping: Callable[[str], str] | None = None
) -> Data:
    """Return both splits. Raises UserError as `samples_of`, and if they are of other classes or sizes."""
    where = f"{train.name}/{train.which} and {val.name}/{val.which}"
    if train.features.shape[1:] != val.features.shape[1:]:
        raise UserError(
            f"{where} must have features of one shape, got {train.features.shape[1:]} and {val.features.shape[1:]}."
        )
    data = samples_of(train, device, grouping), samples_of(val, device, grouping)
    unseen = sorted(set(data[1].labels.tolist()) - set(data[0].labels.tolist()))
    if len(unseen) == len(set(data[1].labels.tolist())):
        raise UserError(f"{where} share no class; labels of the second: {truncate_list(unseen)}. Check the labels.")
    classes = max(len(train.class_names), 1 + int(max(part.labels.max() for part in data)))
    return Data(*data, classes)


def evaluate(method: str, scores: Tensor, val: Samples, **more: Any) -> Result:
    """Return the result of scores (M, classes) for the validation split."""
    predicted, labels = scores.argmax(1).cpu().numpy(), val.labels.cpu().numpy()
    top1 = 100 * float((predicted == labels).mean())
    confusion = confusion_matrix(labels, predicted, scores.shape[1])
    error = math.sqrt(top1 * (100 - top1) / len(labels))
    return Result(method, top1, 100 * mean_class_accuracy(confusion), error, len(labels), **more)


def choose(scores: Mapping[float, Tensor], held_out: Samples) -> tuple[float, float]:
    """Return the key whose scores are best on the held-out samples (the first of several), and its top-1 in percent."""
    top1 = {key: 100 * float((value.argmax(1) == held_out.labels).float().mean()) for key, value in scores.items()}
    best = max(top1, key=lambda key: top1[key])
    return best, top1[best]


def knn(data: Data) -> list[Result]:
    """k nearest neighbors; k is chosen on the held-out part."""
    fit, held_out = data.held_out()
    allowed = [k for k in NEIGHBORS if k <= len(fit)]
    scores = knn_scores(fit.features, fit.labels, held_out.features, allowed, data.classes)
    k, top1 = choose(scores, held_out)  # type: ignore[arg-type]
    final = knn_scores(data.train.features, data.train.labels, data.val.features, [int(k)], data.classes)
    return [evaluate("knn", final[int(k)], data.val, chosen={"k": int(k)}, held_out_top1=top1)]


def logistic(data: Data) -> list[Result]:
    """Logistic regression on standardized features; C is chosen on the held-out part."""
    fit, held_out = data.held_out()
    scale = Scaler.of(fit.features)
    models = fit_logistic(scale(fit.features), fit.labels, STRENGTHS, data.classes)
    scores = {strength: model(scale(held_out.features)) for strength, model in zip(STRENGTHS, models, strict=True)}
    strength, top1 = choose(scores, held_out)
    scale = Scaler.of(data.train.features)
    (model,) = fit_logistic(scale(data.train.features), data.train.labels, [strength], data.classes)
    notes = [] if model.converged else ["did not converge"]
    found = model(scale(data.val.features))
    return [evaluate("logistic", found, data.val, chosen={"C": strength}, held_out_top1=top1, notes=notes)]


def sgd(data: Data) -> list[Result]:
    """A linear layer on standardized features, trained by SGD; the learning rate is chosen on the held-out part."""
    fit, held_out = data.held_out()
    scale = Scaler.of(fit.features)
    scores = {
        rate: fit_sgd(scale(fit.features), fit.labels, rate, data.classes, SEED)(scale(held_out.features).float())
        for rate in RATES
    }
    rate, top1 = choose(scores, held_out)
    scale = Scaler.of(data.train.features)
    model = fit_sgd(scale(data.train.features), data.train.labels, rate, data.classes, SEED)
    return [
        evaluate("linear", model(scale(data.val.features).float()), data.val, chosen={"lr": rate}, held_out_top1=top1)
    ]


def low_shot(data: Data) -> list[Result]:
    """Logistic regression (C = 1) on a few videos of each class: five draws of each number.

    Features are standardized by the whole training split, whose labels are not needed for that. A number that is more than
    the smallest class has is left out.
    """
    labels = data.train.labels.cpu().numpy()
    members = {label: np.flatnonzero(labels == label) for label in np.unique(labels)}
    smallest = min(map(len, members.values()))
    sizes = {f"{shots}-shot": dict.fromkeys(members, shots) for shots in SHOTS if shots <= smallest}
    for share in SHARES:
        counts = {label: max(1, round(share * len(own))) for label, own in members.items()}
        sizes[f"{share:.0%}"] = counts
    scale = Scaler.of(data.train.features)
    standardized = Samples(scale(data.train.features), data.train.labels, data.train.groups)
    val = Samples(scale(data.val.features), data.val.labels, data.val.groups)
    results = []
    for name, counts in sizes.items():
        found = []
        for draw in range(DRAWS):
            rng = keyed_rng(SEED, draw)
            chosen = [rng.permutation(own)[: counts[label]] for label, own in members.items()]
            few = standardized.select(np.sort(np.concatenate(chosen)))
            (model,) = fit_logistic(few.features, few.labels, [LOW_SHOT_STRENGTH], data.classes)
            found.append(evaluate(name, model(val.features), val))
        top1 = [result.top1 for result in found]
        mean_class = float(np.mean([result.mean_class_accuracy for result in found]))
        results.append(
            Result(name, float(np.mean(top1)), mean_class, float(np.std(top1, ddof=1)), len(val), draws=top1)
        )
    return results


METHODS: dict[str, Callable[[Data], list[Result]]] = {
    "knn": knn,
    "logistic": logistic,
    "linear": sgd,
    "low-shot": low_shot,
}


def rank_of(split: FeatureSplit) -> float:
    """Return the effective rank of a split's features; it needs no labels."""
    rows = np.linspace(0, len(split) - 1, min(len(split), RANK_SAMPLES)).astype(int)
    return effective_rank(torch.from_numpy(flat_features(split, rows)))
