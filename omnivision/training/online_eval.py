"""Probes of frozen features while a run trains (`trainer.online_eval`). They do not change the run.

Every rank embeds its part of the videos; rank 0 probes. Batches are the same for any number of ranks, and so are the results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from omnivision.config.schema import OnlineEvalSettings
from omnivision.data.batch import BadSample
from omnivision.data.catalog import Split
from omnivision.data.groups import group_paths
from omnivision.data.loader import LoaderConfig, load_batches
from omnivision.data.sampling import Draw, Request, keyed_rng
from omnivision.distributed.process_group import Dist
from omnivision.models.vit import VisionTransformer
from omnivision.probing import board
from omnivision.probing.extract import BATCH_CLIPS, Embedder, build_dataset
from omnivision.probing.methods import effective_rank
from omnivision.probing.store import FeatureConfig
from omnivision.utils.errors import UserError
from omnivision.utils.signals import StopSignal

CLIPS = 2  # per video, of one crop each
RANKME = "rankme"


@dataclass(frozen=True)
class OnlineSource:
    """The samples of a dataset that are embedded: indices of labelled samples, in ascending order, by split."""

    train: Split
    val: Split
    chosen: dict[str, list[int]]

    @classmethod
    def draw(cls, train: Split, val: Split, limit: int) -> OnlineSource:
        """Draw at most `limit` samples of each split, the same for every run. Raises UserError if they cannot be probed."""
        source = cls(train, val, {split.which: _draw(split, limit) for split in (train, val)})
        labels = {which: np.array([split.label(i) for i in source.chosen[which]]) for which, split in source.splits()}
        for which, found in labels.items():
            if len(np.unique(found)) < 2:
                raise UserError(
                    f"trainer.online_eval.sources must have labels of at least two classes, got {len(np.unique(found))} in "
                    f"{train.name}, {which}. Set datasets.{train.name}.{which}.labels, or raise trainer.online_eval.limit."
                )
        return source

    def splits(self) -> list[tuple[str, Split]]:
        return [("train", self.train), ("val", self.val)]

    @property
    def videos(self) -> int:
        return sum(map(len, self.chosen.values()))


def _draw(split: Split, limit: int) -> list[int]:
    labelled = [index for index in range(len(split)) if split.label(index) >= 0]
    order = keyed_rng(0, Draw.SAMPLE_ORDER).permutation(len(labelled))[:limit]
    return [labelled[place] for place in sorted(order.tolist())]


@dataclass(frozen=True)
class OnlineEval:
    """What `trainer.online_eval` asks for; `dtype` is autocast's, if any."""

    settings: OnlineEvalSettings
    sources: list[OnlineSource]
    loader: LoaderConfig
    clip_duration: float
    max_pixels: int | None

    @property
    def clips(self) -> int:
        """Clips that one evaluation embeds, over all ranks."""
        return CLIPS * sum(source.videos for source in self.sources)

    def evaluate(
        self, model: nn.Module, dist: Dist, dtype: torch.dtype | None, stop: StopSignal
    ) -> tuple[dict[str, float], list[BadSample]] | None:
        """Return "<dataset>_<method>" -> top-1 (%) or rank, the same on all ranks, and this rank's bad files.

        Returns None on all ranks if one was asked to stop before the end.
        """
        model.eval()
        trunk: Any = model.trunk
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        config = FeatureConfig(clips=CLIPS, crops=1, clip_duration=self.clip_duration, autocast=name)
        embed = Embedder(trunk, dist.device, config)
        metrics: dict[str, float] = {}
        bad: list[BadSample] = []
        for source in self.sources:
            parts = {}
            for which, split in source.splits():
                found = self._embed(embed, split, source.chosen[which], dist, stop)
                if found is None:
                    return None
                parts[which], own_bad = found
                bad += own_bad
            if dist.is_main:
                metrics |= self._probe(source, parts["train"], parts["val"], dist.device)
        return dist.all_gather_object(metrics)[0], bad

    def _embed(
        self, embed: Embedder, split: Split, chosen: list[int], dist: Dist, stop: StopSignal
    ) -> tuple[board.Samples, list[BadSample]] | None:
        """Embed samples on all ranks; return those of all ranks, and this rank's bad files."""
        size = BATCH_CLIPS // CLIPS
        batches = [chosen[first : first + size] for first in range(0, len(chosen), size)][dist.rank :: dist.world_size]
        requests = iter([[Request(0, index, 0) for index in batch] for batch in batches])
        dataset = build_dataset(split, embed.trunk, embed.config, self.max_pixels)
        found: dict[int, np.ndarray] = {}
        bad: list[BadSample] = []
        for batch in load_batches(dataset, requests, self.loader):
            if stop.cause is not None:
                break
            bad += batch.bad
            if len(batch):
                index = batch.index[:: batch.views].tolist()
                found |= dict(zip(index, embed(batch), strict=True))
        ranks = dist.all_gather_object((stop.cause is not None, found))
        if any(stopped for stopped, _ in ranks):
            return None
        rows = {index: row for _, own in ranks for index, row in own.items()}
        order = sorted(rows)
        paths = [split.path(index) for index in order]
        features = np.stack([rows[index] for index in order]) if order else np.empty((0, embed.trunk.width), np.float32)
        labels = torch.tensor([split.label(index) for index in order], device=dist.device)
        groups = group_paths(split.name, paths)
        return board.Samples(torch.from_numpy(features).to(dist.device), labels, groups), bad

    def _probe(
        self, source: OnlineSource, train: board.Samples, val: board.Samples, device: torch.device
    ) -> dict[str, float]:
        """Return the metrics of one dataset."""
        name = source.train.name
        if len(train) < 2 or not len(val):
            return {}  # unreadable files; the ledger has them
        classes = 1 + max(int(part.labels.max()) for part in (train, val))
        data = board.Data(train, val, classes)
        metrics = {}
        for method in self.settings.methods:
            if method == RANKME:
                metrics[f"{name}_{method}"] = effective_rank(train.features)
            else:
                (result,) = board.METHODS[method](data)
                metrics[f"{name}_{method}"] = result.top1
        return metrics


def require_trunk(model: nn.Module) -> None:
    """Raise UserError for a model that cannot be probed."""
    if not isinstance(getattr(model, "trunk", None), VisionTransformer):
        raise UserError(
            f"trainer.online_eval needs a model with a trunk of this project, got {type(model).__name__}. Set "
            "trainer.online_eval.sources=[]."
        )
