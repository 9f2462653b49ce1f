"""One pass over the validation videos; each counts once, regardless of the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from omnivision.config.schema import LabelType, TrainerSettings
from omnivision.data.batch import BadSample, Batch, missing_files_message
from omnivision.distributed.process_group import Dist
from omnivision.reporting.predictions import Predictions
from omnivision.tasks.base import StepOutput
from omnivision.tasks.metrics import Meter, Totals, averages, mean_of_finite, prediction_metrics
from omnivision.utils.errors import UserError
from omnivision.utils.signals import StopSignal

MAX_MISSING = 16  # missing files in a row after which the data counts as unreachable


@dataclass
class Evaluation:
    """Metrics of all sources together and of each source; predictions by source, if the task gives scores; bad files."""

    metrics: dict[str, Any]
    per_source: dict[str, dict[str, Any]]
    predictions: dict[str, Predictions]
    bad: list[BadSample]


def evaluation_settings(settings: TrainerSettings) -> dict[str, Any]:
    """Return the settings that decide how a video is evaluated."""
    names = ("num_frames", "clip_duration", "val_view", "val_clips", "val_spacing")
    return {name: getattr(settings.data, name) for name in names} | {"average": settings.task.get("average")}


@torch.no_grad()
def evaluate_model(
    step: Callable[[nn.Module, Batch], StepOutput],
    model: nn.Module,
    batches: Iterable[Batch],
    dist: Dist,
    autocast: Callable[[], AbstractContextManager[Any]],
    stop: StopSignal | None = None,
    label_types: Mapping[str, LabelType] | None = None,
) -> Evaluation | None:
    """Evaluate `model` on this rank's `batches` by a task's `step`; the result covers all ranks and is the same on each.

    label_types: of the sources (default: "class").

    Returns None on all ranks if one was asked to stop before the end. Raises UserError on all ranks if the files that one of
    them reads are missing.
    """
    model.eval()
    meter = Meter()
    predictions: dict[str, list[Predictions]] = {}
    bad: list[BadSample] = []
    videos = 0
    this_rank_stops = False
    missing: dict[str, BadSample] = {}  # files in a row that do not exist
    for batch in batches:
        if this_rank_stops := stop is not None and stop.cause is not None:
            break
        bad += batch.bad
        all_missing = not len(batch) and all(sample.missing for sample in batch.bad)
        missing = missing | {sample.path: sample for sample in batch.bad} if all_missing else {}
        if len(missing) >= MAX_MISSING:
            break
        if not len(batch):
            continue
        with autocast():
            output = step(model, batch.to(dist.device))
        meter.add(batch.source, output.sums, output.count)
        videos += len(batch) // batch.views
        if output.scores is not None:  # one row per video; the views of a video are adjacent in the batch
            index, label = batch.index[:: batch.views].numpy(), batch.label[:: batch.views].numpy()
            scores, paths = output.scores.float().cpu().numpy(), batch.paths[:: batch.views]
            part = Predictions(index, label, scores, paths, label_type=(label_types or {}).get(batch.source, "class"))
            predictions.setdefault(batch.source, []).append(part)
    ends = dist.all_gather_object((this_rank_stops, missing))
    if unreachable := [sample for _, samples in ends if len(samples) >= MAX_MISSING for sample in samples.values()]:
        raise UserError(missing_files_message(unreachable, "consecutive validation files"), on_all_ranks=True)
    if any(stop_requested for stop_requested, _ in ends):
        return None
    merged = gather_predictions(predictions, dist)
    totals = meter.all_gather_totals(dist)
    metrics, per_source = compute_metrics(totals, merged, sum(dist.all_gather_object(videos)))
    return Evaluation(metrics, per_source, merged, bad)


def gather_predictions(predictions: Mapping[str, Sequence[Predictions]], dist: Dist) -> dict[str, Predictions]:
    """Return the predictions of all ranks by source, in the order of the split."""
    ranks = dist.all_gather_object({source: merge_predictions(parts) for source, parts in predictions.items()})
    sources = sorted({source for rank in ranks for source in rank})
    return {source: merge_predictions([rank[source] for rank in ranks if source in rank]) for source in sources}


def compute_metrics(
    totals: Totals, predictions: Mapping[str, Predictions], videos: int
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the metrics of all sources together and of each source."""
    metrics: dict[str, Any] = averages(totals) | {"videos": videos}
    per_source: dict[str, dict[str, Any]] = {source: averages({source: total}) for source, total in totals.items()}
    by_source = {
        source: prediction_metrics(own.label_type, own.label, own.scores) for source, own in predictions.items()
    }
    for source, own in by_source.items():
        per_source[source] |= own
        metrics |= {name: mean_of_finite([each[name] for each in by_source.values()]) for name in own}
    return metrics, per_source


def merge_predictions(parts: Sequence[Predictions]) -> Predictions:
    """Concatenate predictions of batches or ranks, in the order of the split."""
    index, label, scores = (np.concatenate([getattr(p, name) for p in parts]) for name in ("index", "label", "scores"))
    paths = [path for part in parts for path in part.paths]
    order = np.argsort(index)
    label_type = parts[0].label_type
    return Predictions(index[order], label[order], scores[order], [paths[i] for i in order], label_type=label_type)
