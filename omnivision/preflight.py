"""What is checked before a run starts, beyond its settings: that the data it names is there and is what it should be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from omnivision.data.catalog import Dataset, Split
from omnivision.data.epoch import EpochPlan, SourcePlan
from omnivision.errors import UserError
from omnivision.files import LATEST, require_weights
from omnivision.settings import Settings

LOOKED_FOR = 16  # files of a split, before a run


def datasets_of(settings: Settings) -> list[Dataset]:
    """The catalog's entries of the run's sources."""
    sources = settings.trainer.data.sources
    return [Dataset.from_entry(name, dataclasses.asdict(source)) for name, source in sources.items()]


def open_splits(settings: Settings) -> tuple[list[Split], list[Split]]:
    """The train splits of all sources if the run trains, and the val splits of those that have one if it validates.

    Raises UserError for a file that is missing, has the wrong type or shape, or holds labels out of range, and for names of
    classes that are not as many as the classes.
    """
    config, sources = settings.trainer, settings.trainer.data.sources
    datasets = datasets_of(settings)
    if not datasets:
        raise UserError(
            "trainer.data.sources is empty; expected at least one dataset. Choose a recipe with +trainer=..."
        )
    if "decoder" not in config.model:  # a classifier's
        for dataset in datasets:
            dataset.names()
    train = [Split(dataset, "train") for dataset in datasets] if config.mode != "val" else []
    if config.mode != "val" and (config.mode == "train_only" or config.val_epoch_freq is None):
        return train, []
    val = [Split(dataset, "val") for dataset in datasets if dataset.val is not None]
    if not val:
        raise UserError(
            f"The run is to validate (trainer.mode={config.mode}), but none of its sources ({', '.join(sources)}) has a val "
            "split. Give datasets.NAME.val.paths and .labels, or set trainer.mode=train_only."
        )
    return train, val


def epoch_plan(settings: Settings, train: list[Split]) -> EpochPlan:
    """How an epoch goes through the sources. Raises UserError when one would not be seen, and for repeats of unknown ones."""
    trainer, data = settings.trainer, settings.trainer.data
    names = [split.name for split in train]
    if unknown := sorted(set(data.repeats) - set(names)):
        raise UserError(
            f"trainer.data.repeats names {', '.join(unknown)}; the sources are {', '.join(names)}. Change trainer.data.repeats."
        )
    sources = {}
    for split in train:
        batch, views, pieces = data.batch_size, data.views_per_clip, trainer.optim.accumulation_steps
        if split.dataset.kind != "video" and data.image is not None:
            batch, views, pieces = data.image.batch_size, data.image.views_per_clip, data.image.accumulation_steps
        videos = batch * settings.launcher.num_nodes // views
        sources[split.name] = SourcePlan(len(split), videos, views, data.repeats.get(split.name, 1), pieces)
    return EpochPlan(sources, trainer.seed_value, trainer.limit_train_batches)


def check_pretrained(settings: Settings) -> None:
    """Raises UserError when the weights to start from are not there; what is in them is checked when they are read.

    A run that has a checkpoint goes on from that. What a job of the cluster is to bring first need not be there yet.
    """
    if settings.submitit.use_cluster and settings.submitit.dependency is not None:
        return
    if Path(settings.trainer.checkpoint.save_dir, LATEST).exists():
        return
    wanted = settings.pretrained_checkpoint_path
    for source in [wanted] if isinstance(wanted, str) else wanted or []:
        require_weights(source)


def file_warnings(splits: list[Split]) -> list[str]:
    """Sentences about splits of which none of some files, spread over them, is there."""
    found = []
    for split in splits:
        paths = [split.path(number) for number in {len(split) * part // LOOKED_FOR for part in range(LOOKED_FOR)}]
        if not any(Path(path).exists() for path in paths):
            found.append(
                f"none of {len(paths)} files that were looked for of {split.name}'s {split.which} split is there, e.g. "
                f"{paths[0]}. Unless the processes of the run see them, change datasets.{split.name}.prefix."
            )
    return found


def label_warnings(train: list[Split]) -> list[str]:
    """Sentences about labels that are allowed and may be a mistake: classes that no sample has, sources without labels."""
    found = []
    for split in train:
        missing = [label for label, count in enumerate(split.label_counts()) if count == 0]
        if missing:
            shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            found.append(
                f"{split.name}: {len(missing)} of {split.dataset.num_classes} classes have no training sample ({shown}); the "
                "head has a place for each."
            )
    return found
