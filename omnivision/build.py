"""Settings become objects here, and only here."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn

from omnivision.data.catalog import Split
from omnivision.data.dataset import VideoDataset
from omnivision.data.loader import EpochPlan, Workers
from omnivision.distributed import Place, Processes
from omnivision.errors import UserError
from omnivision.models.patches import token_grid
from omnivision.optim.groups import Group, Rule, ScheduledOptimizer, layer_decay_scales, parameter_groups
from omnivision.preflight import open_splits
from omnivision.reporting.bad_samples import BadSampleLedger
from omnivision.reporting.reporter import Reporter
from omnivision.reporting.run_folder import RunFolder
from omnivision.schema import Target
from omnivision.settings import Settings
from omnivision.trainer import Data, Options, Trainer


def build(target: Target, where: str, **more: Any) -> Any:
    """The object that a `_target_` describes. Raises UserError for arguments that it does not take."""
    try:
        return instantiate(target, _convert_="all", **more)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if near := nearest(target["_target_"]):
            raise UserError(
                f"{where}._target_ is {target['_target_']!r}, which does not exist; did you mean {near}?"
            ) from None
        raise UserError(
            f"{where} ({target['_target_']}) cannot be built: {cause or error}. Expected the arguments of that class. "
            f"Change {where}."
        ) from error


def nearest(target: str) -> str | None:
    """The name most like that of an object that does not exist, in the module that it was looked for in."""
    module, _, name = target.rpartition(".")
    known = vars(importlib.import_module(module))
    near = [] if name in known else difflib.get_close_matches(name, known, 1, cutoff=0)
    return f"{module}.{near[0]}" if near else None


def processes(settings: Settings, place: Place) -> Processes:
    distributed = settings.trainer.distributed
    timeout = timedelta(minutes=distributed.timeout_minutes)
    return Processes(place, settings.trainer.accelerator, distributed.backend, timeout)


def run_folder(settings: Settings) -> RunFolder:
    return RunFolder(settings.launcher.experiment_log_dir, settings.trainer.checkpoint.save_dir)


def model(settings: Settings, device: str = "cpu") -> nn.Module:
    """The model with its first weights, a function of the seed alone."""
    torch.manual_seed(settings.trainer.seed_value)
    with torch.device(device):
        built = build(settings.trainer.model, "trainer.model")
    return built


def groups(settings: Settings, model: nn.Module) -> list[Group]:
    """Parameter groups; learning rates are divided by lr_scale_factor, once, over the whole schedule."""
    optim = settings.trainer.optim
    options: dict[str, list[Rule]] = {}
    for option, rules in optim.options.items():
        options[option] = []
        for number, rule in enumerate(rules):
            schedule = build(rule.scheduler, f"trainer.optim.options.{option}[{number}].scheduler")
            if option == "lr":
                schedule = Divided(schedule, optim.lr_scale_factor)
            options[option].append(Rule(schedule, rule.param_names, rule.module_cls_names))
    scales = layer_decay_scales(model, optim.layer_decay) if optim.layer_decay is not None else None
    return parameter_groups(model, options, scales)


@dataclasses.dataclass(frozen=True)
class Divided:
    """A schedule divided by a number."""

    schedule: Any
    by: float

    def __call__(self, progress: float) -> float:
        return self.schedule(progress) / self.by


def optimizer(settings: Settings, model: nn.Module) -> ScheduledOptimizer:
    make = build(settings.trainer.optim.optimizer, "trainer.optim.optimizer", _partial_=True)
    return ScheduledOptimizer(model, groups(settings, model), make)


def plan(settings: Settings, train: list[Split]) -> EpochPlan:
    trainer, data = settings.trainer, settings.trainer.data
    sizes = {split.name: len(split) for split in train}
    return EpochPlan(
        sizes,
        data.repeats,
        settings.videos_per_step,
        data.views_per_clip,
        trainer.seed_value,
        trainer.limit_train_batches,
    )


def video_dataset(settings: Settings, found: list[Split], training: bool) -> VideoDataset:
    """Clips of splits as the settings want them for training or for evaluation."""
    trainer, data = settings.trainer, settings.trainer.data
    size = settings.image_size
    grid = token_grid((data.num_frames, size, size), tuple(trainer.model["trunk"]["tubelet"]))
    mask = None if data.mask is None else build(data.mask, "trainer.data.mask")
    if mask is not None:
        hidden, tokens = int(mask(grid, np.random.default_rng(0)).sum()), grid[0] * grid[1] * grid[2]
        if not 0 < hidden < tokens:
            raise UserError(
                f"The mask hides {hidden} of the {tokens} tokens of a clip ({grid[0]} x {grid[1]} x {grid[2]}); expected some, "
                "but not all: hidden ones are what is learnt, visible ones what it is learnt from. Change mask_ratio or "
                "trainer.data.mask."
            )
    return VideoDataset(
        found,
        view=build(
            data.view if training else data.val_view, "trainer.data.view" if training else "trainer.data.val_view"
        ),
        mask=mask,
        grid=grid,
        num_frames=data.num_frames,
        clip_duration=data.clip_duration,
        views_per_clip=data.views_per_clip if training else 1,
        seed=trainer.seed_value,
        max_pixels=data.max_pixels,
        replace_bad=training,
    )


def amp_dtype(settings: Settings, device: torch.device) -> torch.dtype | None:
    """bf16 where the device has it, else fp16; on a CPU without bf16 instructions, full precision."""
    amp = settings.trainer.optim.amp
    if not amp.enabled:
        return None
    if amp.amp_dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}[amp.amp_dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else None


def trainer(settings: Settings, processes: Processes, folder: RunFolder, reporter: Reporter) -> Trainer:
    """Everything that a run needs. Raises UserError for whatever its user can mend."""
    config, data = settings.trainer, settings.trainer.data
    train_splits, val_splits = open_splits(settings)
    workers = Workers(data.num_workers, data.prefetch, pin_memory=processes.device.type == "cuda")
    train = Data(video_dataset(settings, train_splits, training=True), workers, plan(settings, train_splits))
    val = Data(
        video_dataset(settings, val_splits, training=False), workers, videos_per_batch=settings.clips_per_process
    )
    built = model(settings)
    ledger = BadSampleLedger(
        folder.logs / "bad_samples.jsonl",
        files=sum(map(len, train_splits + val_splits)),
        budget=data.bad_sample_budget,
    )
    return Trainer(
        task=build(config.task, "trainer.task"),
        model=built,
        optimizer=optimizer(settings, built),
        train=train,
        val=val if val_splits else None,
        processes=processes,
        folder=folder,
        reporter=reporter,
        ledger=ledger,
        options=options(settings, processes.device),
    )


def options(settings: Settings, device: torch.device) -> Options:
    config = settings.trainer
    return Options(
        max_epochs=config.max_epochs,
        seed=config.seed_value,
        accumulation_steps=config.optim.accumulation_steps,
        gradient_clip=config.optim.gradient_clip,
        amp_dtype=amp_dtype(settings, device),
        comms_dtype=config.distributed.comms_dtype,
        compile=config.compile,
        val_epoch_freq=config.val_epoch_freq,
        limit_val_batches=config.limit_val_batches,
        log_freq=config.logging.log_freq,
        pictures_every_epochs=config.logging.pictures_every_epochs,
        save_freq=config.checkpoint.save_freq,
        save_every_steps=config.checkpoint.save_every_steps,
    )
