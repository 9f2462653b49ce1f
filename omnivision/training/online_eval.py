"""Probes of frozen features while a run trains (`trainer.online_eval`). They do not change the run.

Every rank embeds its part of the videos; rank 0 probes. Batches are the same for any number of ranks, and so are the results.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from omnivision.config.schema import OnlineEvalSettings
from omnivision.data.catalog import Split
from omnivision.data.groups import group_paths
from omnivision.data.loader import LoaderConfig, load_batches
from omnivision.data.sampling import Draw, Request, keyed_rng
from omnivision.distributed.fsdp import full_tensor, is_sharded
from omnivision.distributed.process_group import Dist
from omnivision.models.architecture import TRUNK_ARGUMENTS
from omnivision.models.vit import VisionTransformer
from omnivision.probing import board
from omnivision.probing.extract import BATCH_CLIPS, Embedder, build_dataset
from omnivision.probing.methods import effective_rank
from omnivision.probing.store import FeatureConfig
from omnivision.utils.errors import UserError
from omnivision.utils.signals import StopSignal

LOG = logging.getLogger("omnivision")
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
        if train.label_type != "class":
            raise UserError(
                f"trainer.online_eval.sources must have one class per video, got {train.name} with label_type "
                f"{train.label_type}. Set other sources."
            )
        source = cls(train, val, {split.which: _draw(split, limit) for split in (train, val)})
        labels = {which: np.array([split.label(i) for i in source.chosen[which]]) for which, split in source.splits()}
        for which, found in labels.items():
            if len(np.unique(found)) < 2:
                raise UserError(
                    f"trainer.online_eval.sources must have labels of at least two classes, got {len(np.unique(found))} in "
                    f"{train.name}, {which}. Set datasets.{train.name}.{which}.labels, or raise trainer.online_eval.limit."
                )
        groups = group_paths(train.name, [train.path(index) for index in source.chosen["train"]])
        if len(set(groups)) < 2:
            raise UserError(
                f"trainer.online_eval.sources: all training videos of {train.name} are of one source ({groups[0]!r}), so that "
                "none can be held out to choose k and C. Set other sources."
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
        self, trunk: VisionTransformer, dist: Dist, dtype: torch.dtype | None, stop: StopSignal
    ) -> dict[str, float] | None:
        """Return "<dataset>_<method>" -> top-1 (%) or rank, the same on all ranks.

        Unreadable videos, and methods that fail on these features, are left out. Returns None on all ranks if one was asked to
        stop before the end.
        """
        trunk.eval()
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        config = FeatureConfig(clips=CLIPS, crops=1, clip_duration=self.clip_duration, autocast=name)
        embed = Embedder(trunk, dist.device, config)
        metrics: dict[str, float] = {}
        for source in self.sources:
            parts = {}
            for which, split in source.splits():
                found = self._embed(embed, split, source.chosen[which], dist, stop)
                if found is None:
                    return None
                parts[which] = found
            if dist.is_main:
                metrics |= self._probe(source.train.name, parts["train"], parts["val"], stop)
        return dist.all_gather_object(metrics)[0]

    def _embed(
        self, embed: Embedder, split: Split, chosen: list[int], dist: Dist, stop: StopSignal
    ) -> board.Samples | None:
        """Embed samples on all ranks; return those of all ranks, or None if one was asked to stop."""
        size = BATCH_CLIPS // CLIPS
        batches = [chosen[first : first + size] for first in range(0, len(chosen), size)][dist.rank :: dist.world_size]
        requests = iter([[Request(0, index, 0) for index in batch] for batch in batches])
        dataset = build_dataset(split, embed.trunk, embed.config, self.max_pixels)
        found: dict[int, np.ndarray] = {}
        for batch in load_batches(dataset, requests, self.loader):
            if stop.cause is not None:
                break
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
        return board.Samples(torch.from_numpy(features).to(dist.device), labels, groups)

    def _probe(self, name: str, train: board.Samples, val: board.Samples, stop: StopSignal) -> dict[str, float]:
        """Return the metrics of one dataset; none if too few of its videos can be read."""
        if len(train) < 2 or not len(val):
            LOG.warning("online_eval: too few videos of %s can be read", name)
            return {}
        classes = 1 + max(int(part.labels.max()) for part in (train, val))
        data = board.Data(train, val, classes)
        metrics = {}
        for method in self.settings.methods if stop.cause is None else ():
            try:
                if method == RANKME:
                    metrics[f"{name}_{method}"] = effective_rank(train.features)
                else:
                    (result,) = board.METHODS[method](data)
                    metrics[f"{name}_{method}"] = result.top1
            except (UserError, RuntimeError) as error:  # a probe must not end the run; torch raises for a failed SVD
                LOG.warning("online_eval: %s on %s failed: %s", method, name, error)
        return metrics


def plain_trunk(model: nn.Module) -> VisionTransformer:
    """Return the trunk of a model; of a sharded one (FSDP), a copy with all parameters. Collective."""
    trunk: Any = model.trunk
    if not any(is_sharded(parameter) for parameter in trunk.parameters()):
        return trunk
    numbers = {key: trunk.architecture[key] for key in TRUNK_ARGUMENTS}
    copy = VisionTransformer(**numbers).to(trunk.pos_embed.device)
    state = {name: full_tensor(tensor) for name, tensor in trunk.state_dict().items()}
    copy.load_state_dict({name: state[name] for name in copy.state_dict()})
    return copy


def require_trunk(model: nn.Module) -> None:
    """Raise UserError for a model that cannot be probed."""
    if not isinstance(getattr(model, "trunk", None), VisionTransformer):
        raise UserError(
            f"trainer.online_eval needs a model with a trunk of this project, got {type(model).__name__}. Set "
            "trainer.online_eval.sources=[]."
        )
