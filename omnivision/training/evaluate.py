"""One pass over the validation videos; each counts once, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from omnivision.data.batch import BadSample, Batch, vanished_files
from omnivision.distributed.process_group import Dist
from omnivision.reporting.predictions import Predictions
from omnivision.tasks.base import Task
from omnivision.tasks.metrics import Meter, averages, mean_class_accuracy
from omnivision.utils.errors import UserError
from omnivision.utils.signals import StopSignal

MAX_MISSING = 16  # files in a row that do not exist before the data counts as unreachable


@dataclass
class Evaluation:
    """Metrics of all sources together and of each source, predictions by source where the task gives scores, bad files."""

    metrics: dict[str, Any]
    per_source: dict[str, dict[str, Any]]
    predictions: dict[str, Predictions]
    bad: list[BadSample]


@dataclass
class _Part:
    """Predictions of one rank for one source."""

    index: list[torch.Tensor] = field(default_factory=list)
    label: list[torch.Tensor] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def add(self, batch: Batch, scores: torch.Tensor) -> None:
        """Add the videos of a batch, whose views lie next to each other; `scores` (videos, classes)."""
        self.index.append(batch.index[:: batch.views])
        self.label.append(batch.label[:: batch.views])
        self.scores.append(scores.float().cpu())
        self.paths += batch.paths[:: batch.views]

    def predictions(self) -> Predictions:
        index, label, scores = (torch.cat(values).numpy() for values in (self.index, self.label, self.scores))
        return Predictions(index, label, scores, self.paths)


def all_missing(batch: Batch) -> bool:
    """Whether no file of a batch exists, as when a disk is unmounted."""
    return not len(batch) and bool(batch.bad) and all(each.missing for each in batch.bad)


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    batches: Iterable[Batch],
    dist: Dist,
    autocast: Callable[[], AbstractContextManager[Any]],
    stop: StopSignal | None = None,
) -> Evaluation | None:
    """Evaluate `model` on this rank's `batches`; the result covers all ranks and is the same on each.

    Returns None, on all ranks, when one was asked to stop before the end. Raises UserError, on all ranks, when the files that
    one of them reads have disappeared.
    """
    model.eval()
    meter, parts, bad, videos = Meter(), dict[str, _Part](), list[BadSample](), 0
    stop_requested = False
    missing: dict[str, None] = {}  # files in a row that do not exist
    for batch in batches:
        if stop_requested := stop is not None and stop.cause is not None:
            break
        bad += batch.bad
        missing = missing | dict.fromkeys(each.path for each in batch.bad) if all_missing(batch) else {}
        if len(missing) >= MAX_MISSING:
            break
        if not len(batch):
            continue
        with autocast():
            output = task.evaluation_step(model, batch.to(dist.device))
        meter.add(batch.source, output.sums, output.count)
        videos += len(batch) // batch.views
        if output.scores is not None:
            parts.setdefault(batch.source, _Part()).add(batch, output.scores)
    ends = dist.gather((stop_requested, missing))
    if vanished := [path for _, paths in ends if len(paths) >= MAX_MISSING for path in paths]:
        raise UserError(vanished_files(vanished, "in a row that were to be evaluated"), on_all_ranks=True)
    if any(stop_requested for stop_requested, _ in ends):
        return None
    predictions = _merge_ranks(dist.gather({source: part.predictions() for source, part in parts.items()}))
    totals = meter.totals(dist)
    per_source: dict[str, dict[str, Any]] = {source: averages({source: total}) for source, total in totals.items()}
    for source, predicted in predictions.items():
        per_source[source]["mean_class_accuracy"] = 100 * mean_class_accuracy(predicted.confusion())
    metrics: dict[str, Any] = averages(totals) | {"videos": int(dist.sum(torch.tensor([videos]))[0])}
    if predictions:
        accuracies = [per_source[source]["mean_class_accuracy"] for source in predictions]
        metrics["mean_class_accuracy"] = sum(accuracies) / len(accuracies)
    return Evaluation(metrics, per_source, predictions, bad)


def _merge_ranks(parts: list[dict[str, Predictions]]) -> dict[str, Predictions]:
    """Merge the predictions of all ranks, in the order of the split."""
    merged: dict[str, Predictions] = {}
    for source in sorted({source for part in parts for source in part}):
        of_source = [part[source] for part in parts if source in part]
        index = np.concatenate([part.index for part in of_source])
        paths = [path for part in of_source for path in part.paths]
        order = np.argsort(index)
        merged[source] = Predictions(
            index[order],
            np.concatenate([part.label for part in of_source])[order],
            np.concatenate([part.scores for part in of_source])[order],
            [paths[i] for i in order],
        )
    return merged
