"""Lines that a run prints when it starts and ends, and its metadata in `summary.json`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omnivision.checkpoint.fingerprint import git_commit
from omnivision.checkpoint.pretrained import LoadReport
from omnivision.checkpoint.state_dict_file import describe_metrics
from omnivision.config.schema import Settings
from omnivision.models.architecture import architecture_of
from omnivision.models.classifier import is_frozen
from omnivision.reporting.predictions import image_name
from omnivision.tasks.metrics import RANKING_METRICS
from omnivision.training.preflight import describe_split
from omnivision.training.step_stats import RunState
from omnivision.training.trainer import Trainer
from omnivision.utils.io import BEST, LATEST, run_name
from omnivision.utils.streams import format_count, plural


def start_lines(settings: Settings, trainer: Trainer, reports: Sequence[LoadReport]) -> list[str]:
    """Return the header of a run: model, device, data, batch, learning rate, seed, weights, code, run directory."""
    parameters = list(trainer.raw_model.parameters())
    dist = trainer.context.dist
    state = trainer.state
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    splits = [
        split for data in (trainer.train_data, trainer.val_data) if data is not None for split in data.dataset.splits
    ]
    device = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else dist.device.type
    precision = str(trainer.amp_dtype or torch.float32).removeprefix("torch.")
    total = sum(p.numel() for p in parameters)
    several = f", {dist.world_size} ranks, {trainer.settings.distributed.strategy}" if dist.world_size > 1 else ""
    starts = ", ".join(
        f"{report.path}" + (f" ({report.checkpoint})" if report.checkpoint else "") for report in reports
    )
    if trainer.global_step:
        starts = describe_resumed(state)
    lines = [
        f"model        {type(trainer.raw_model).__name__}, {format_count(total)} parameters"
        + (f", {format_count(trained)} trained" if trainer.train_data is not None else ""),
        f"device       {device}, {precision}{several}",
        *(f"data         {describe_split(split)}" for split in splits),
    ]
    if trainer.train_data is not None:
        groups = trainer.optimizer.groups
        rate = max(group.value("lr", i / 200) for group in groups for i in range(201))
        steps, epochs = trainer.state.steps_per_epoch, trainer.settings.max_epochs
        lines += [
            f"batch        {settings.clips_per_step} clips per step, {plural(steps, 'step')} per epoch, "
            f"{plural(epochs, 'epoch')}",
            f"peak lr      {rate:.4g}, after all scaling",
        ]
    return [
        *lines,
        f"seed         {trainer.settings.seed_value}",
        f"weights      {starts or describe_random(has_frozen=trained < total)}",
        f"git commit   {git_commit() or 'unknown (no git checkout)'}",
        f"directory    {trainer.context.run_dir.path.absolute()}",
    ]


def validation_lines(trainer: Trainer) -> list[str]:
    """Return where an evaluation wrote its predictions, and pictures of them."""
    run_dir, splits = trainer.context.run_dir, trainer.val_data.dataset.splits if trainer.val_data is not None else []
    files = [
        (run_dir.predictions / f"{split.name}.csv", run_dir.pictures / image_name(split.label_type, split.name))
        for split in splits
    ]
    return [f"predictions  {table}, picture {picture}" for table, picture in files if table.exists()]


def describe_random(has_frozen: bool) -> str:
    return "random initialization" + ", of frozen parameters too" * has_frozen


def describe_resumed(state: RunState) -> str:
    steps = f" and {plural(state.step, 'step')}" if state.step else ""
    return f"its own, resumed after {plural(state.epoch, 'epoch')}{steps}"


def end_lines(trainer: Trainer) -> list[str]:
    """Return a finished run's results, where its checkpoints are, and which command to run next."""
    state, run_dir = trainer.state, trainer.context.run_dir
    seconds = timedelta(seconds=round(state.seconds))
    lines = [f"Finished: {plural(state.epoch, 'epoch')} in {seconds}"]
    if state.best is not None:
        ranked = [f"val_{name}" for name in RANKING_METRICS if f"val_{name}" in trainer.state.last_metrics][:1]
        best = describe_metrics(
            {ranked[0]: state.best, "val_loss": state.best_loss} if ranked else {"val_loss": state.best}
        )
        lines.append(
            f"best         {f'epoch {state.best_epoch}, ' if state.best_epoch else ''}{best}: {run_dir.checkpoints / BEST}"
        )
    lines.append(
        f"last         epoch {state.epoch}, {describe_metrics(trainer.state.last_metrics)}: {run_dir.checkpoints / LATEST}"
    )
    path = shlex.quote(os.fspath(run_dir.path))
    lines.append(f"next         omnivision report {path}")
    kind = architecture_of(trainer.raw_model).get("kind")
    if kind == "autoencoder":
        lines.append(f"             omnivision reconstruct {path} VIDEO out.gif")
    elif kind is not None:
        lines.append(f"             omnivision predict {path} VIDEO")
    return lines


def run_metadata(settings: Settings, model: nn.Module) -> dict[str, Any]:
    """Return the metadata of a run for `summary.json`, shown in tables of runs."""
    architecture = architecture_of(model)
    frozen = any(is_frozen(part) for name, part in model.named_children() if name == "trunk")
    pretrained = settings.pretrained_checkpoint_path
    names = [run_name(Path(path)) for path in ([pretrained] if isinstance(pretrained, str) else pretrained or [])]
    return {
        "model": architecture.get("kind", type(model).__name__),
        "trunk": "frozen average" if architecture.get("kind") == "average" else "frozen" if frozen else "trained",
        "pretrained": " + ".join(names) or None,
        "sources": list(settings.trainer.data.sources),
        "classes": architecture.get("classes"),
        "label_type": next((source.label_type for source in settings.trainer.data.sources.values()), "class"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
