"""One pass over the validation videos, each counted once whatever the number of processes."""

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

GONE = 16  # files in a row that are not there: their disk is gone, and none of them is bad


@dataclass
class Evaluation:
    """`figures` over all sources, and by source; predictions by source where the task gives scores; files that were bad."""

    figures: dict[str, Any]
    per_source: dict[str, dict[str, Any]]
    predictions: dict[str, Predictions]
    bad: list[BadSample]


@dataclass
class _Part:
    """What one process has seen of one source."""

    index: list[torch.Tensor] = field(default_factory=list)
    label: list[torch.Tensor] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


def all_missing(batch: Batch) -> bool:
    """Whether all files of a batch are not there, as when the disk that they lie on is gone."""
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
    """Evaluate `model` on this process's `batches`; the result is of all processes, and the same in each of them.

    None, in all processes, when one of them was asked to stop before the end. Raises UserError, in all, when one finds none of
    the files any more.
    """
    model.eval()
    meter, parts, bad, videos = Meter(), dict[str, _Part](), list[BadSample](), 0
    asked = False
    gone: dict[str, None] = {}  # files in a row that are not there
    for batch in batches:
        if asked := stop is not None and stop.cause is not None:
            break
        bad += batch.bad
        gone = gone | dict.fromkeys(each.path for each in batch.bad) if all_missing(batch) else {}
        if len(gone) >= GONE:
            break
        if not len(batch):
            continue
        with autocast():
            output = task.evaluation_step(model, batch.to(dist.device))
        meter.add(batch.source, output.sums, output.count)
        videos += len(batch) // batch.views
        if output.scores is not None:
            part = parts.setdefault(batch.source, _Part())
            part.index.append(batch.index[:: batch.views])
            part.label.append(batch.label[:: batch.views])
            part.scores.append(output.scores.float().cpu())
            part.paths += batch.paths[:: batch.views]
    ends = dist.gather((asked, gone))
    if vanished := [path for _, paths in ends if len(paths) >= GONE for path in paths]:
        raise UserError(vanished_files(vanished, "in a row that were to be evaluated"), on_all_ranks=True)
    if any(asked for asked, _ in ends):
        return None
    totals = meter.totals(dist)
    predictions = _together(dist.gather({source: _arrays(part) for source, part in parts.items()}))
    per_source: dict[str, dict[str, Any]] = {source: averages({source: total}) for source, total in totals.items()}
    for source, made in predictions.items():
        per_source[source]["mean_class_accuracy"] = 100 * mean_class_accuracy(made.confusion())
    figures: dict[str, Any] = averages(totals) | {"videos": int(dist.sum(torch.tensor([videos]))[0])}
    if predictions:
        figures["mean_class_accuracy"] = sum(per_source[s]["mean_class_accuracy"] for s in predictions) / len(
            predictions
        )
    return Evaluation(figures, per_source, predictions, bad)


def _arrays(part: _Part) -> Predictions:
    index, label, scores = (torch.cat(values).numpy() for values in (part.index, part.label, part.scores))
    return Predictions(index, label, scores, part.paths)


def _together(parts: list[dict[str, Predictions]]) -> dict[str, Predictions]:
    """The parts of all processes, in the order of the split."""
    found: dict[str, Predictions] = {}
    for source in sorted({source for part in parts for source in part}):
        of_source = [part[source] for part in parts if source in part]
        index = np.concatenate([part.index for part in of_source])
        paths = [path for part in of_source for path in part.paths]
        order = np.argsort(index)
        found[source] = Predictions(
            index[order],
            np.concatenate([part.label for part in of_source])[order],
            np.concatenate([part.scores for part in of_source])[order],
            [paths[i] for i in order],
        )
    return found
