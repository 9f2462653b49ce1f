"""`trainer.mode=dry`: what would stop a run, and what it would be.

The checks are those of a run: `preflight.check_run`, and `resume_or_load_pretrained` with a model on the meta device, which
compares weights and checkpoints by name and shape. A few videos of each split are opened, to find clips that are too short.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

from omnivision.checkpoint import state_dict_file
from omnivision.config.schema import Settings
from omnivision.data.catalog import Split
from omnivision.distributed.process_group import RankInfo, choose_device
from omnivision.launch import slurm
from omnivision.launch.launcher import Job, run_folder, validate_launch_mode
from omnivision.launch.run import build_trainer, resume_or_load_pretrained
from omnivision.launch.submit import batch_script, check_submission
from omnivision.models.average import AveragedClassifier
from omnivision.optim.groups import ScheduledOptimizer
from omnivision.reporting.reporter import Reporter
from omnivision.training import build
from omnivision.training.flops import ClipFlops
from omnivision.training.preflight import (
    awaits_dependency,
    check_run,
    check_splits,
    checkpoint_bytes,
    collect_errors,
    describe_split,
    epoch_plan,
    run_warnings,
    sample_paths,
    shared_memory_bytes,
)
from omnivision.training.run_messages import describe_resumed
from omnivision.training.trainer import Trainer
from omnivision.utils.errors import EXIT_USER, UserError
from omnivision.utils.io import LATEST, replace_atomically
from omnivision.utils.signals import StopSignal
from omnivision.utils.streams import fit

WIDTH = 60  # characters of a curve in the terminal
MAX_LEGEND = 8  # entries for curves of one schedule
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Curve:
    """An option of the optimizer over a run, for some of the groups: values at evenly spread moments, unscaled."""

    option: str
    groups: list[int]
    values: list[float]


def dry_run(job: Job) -> int:
    """Print what would stop the run, first, then what it would be; returns the exit code, 1 when something would stop it."""
    settings = job.settings.with_trainer(mode="train")
    job = replace(job, settings=settings)
    problems: list[str] = []
    lines: list[str] = []
    splits: tuple[list[Split], list[Split]] = [], []
    try:
        splits = check_run(settings, validate_launch_mode)
    except UserError as error:
        problems += error.problems
        with contextlib.suppress(UserError):
            splits = check_splits(settings)
    model = optimizer = trainer = None
    try:
        model, optimizer = built(settings)
        trainer, lines = check_start(job, splits)
    except UserError as error:
        problems += error.problems
    if model is not None and optimizer is not None:
        image = Path(settings.launcher.experiment_log_dir) / "dry.png"
        try:
            draw(settings, optimizer, image)
        except OSError as error:
            if not problems:  # else one of them says why
                problems.append(f"{image} cannot be written: {error.strerror}. Change launcher.experiment_log_dir.")
        lines = [describe(job, model, optimizer, *splits, trainer), f"curves       {image}", *lines]
    if problems:
        problems = list(dict.fromkeys(problems))  # the checks overlap
        print("\n- ".join(["This run would stop before its first step:", *problems]), end="\n\n")
    for warning in run_warnings(settings, *splits):
        print(f"warning: {warning}")
    print(fit("\n".join(lines), sys.stdout))
    if settings.submitit.use_cluster:
        print("\nThe batch script:\n")
        print(batch_script(settings, run_folder(job)))
    return EXIT_USER if problems else 0


def check_start(job: Job, splits: tuple[list[Split], list[Split]]) -> tuple[Trainer | None, list[str]]:
    """Check what a process of the run checks before its first step. Raises UserError.

    Returns its trainer, without values (None where the weights come from a job it waits for), and what it would print.
    """
    settings, folder, output = job.settings, run_folder(job), io.StringIO()
    dist = build.process_group(settings.with_trainer(accelerator="cpu"), RankInfo())
    dist.device = torch.device("meta")
    reporter = Reporter(folder, enabled=True, console=Console(file=output))

    def restored() -> Trainer:
        trainer = build_trainer(job, dist, folder, reporter, StopSignal(), splits)
        resume_or_load_pretrained(job, trainer, reporter)
        return trainer

    checks: list[Callable[[], object]] = []
    if not awaits_dependency(settings):
        checks.append(restored)
    if not settings.submitit.use_cluster:
        last = settings.launcher.gpus_per_node - 1
        checks.append(lambda: build.check_device(settings, choose_device(settings.trainer.accelerator, last)))
        if folder.path.is_dir():
            checks.append(folder.require_free)
    elif slurm.is_available():
        checks.append(lambda: check_submission([job], slurm.squeue()))
    with warnings.catch_warnings(action="ignore"):  # torch says that the meta device takes no values
        made = collect_errors(checks)
    trainer = next((each for each in made if isinstance(each, Trainer)), None)
    return trainer, output.getvalue().splitlines()


def built(settings: Settings) -> tuple[nn.Module, ScheduledOptimizer]:
    """The model, without memory, and its optimizer."""
    build.validate_masks(settings)
    model = build.model(settings, device="meta")
    return model, build.optimizer(settings, model)


def describe(
    job: Job,
    model: nn.Module,
    optimizer: ScheduledOptimizer,
    train: list[Split],
    val: list[Split],
    trainer: Trainer | None,
) -> str:
    """Model, parameter groups, effective batch, learning rate, operations, and data, as lines to print."""
    settings = job.settings
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    if isinstance(model, AveragedClassifier):
        held = sum(tensor.numel() for tensor in model.averaged_trunk().values())
        trunk = f"beside a trunk of {held / 1e6:.2f} M, averaged over {model.num_models} checkpoints"
    else:
        held = sum(n for name, n in parameters.items() if name.startswith("trunk.") and ".decoder." not in name)
        trunk = f"{held / 1e6:.2f} M of them in the trunk"
    views, cost = settings.trainer.data.views_per_clip, build.clip_cost(settings, model)
    lines = [
        f"model        {type(model).__name__}: {sum(parameters.values()) / 1e6:.2f} M parameters, {trunk}",
        operations_line(cost),
        f"batch        {settings.clips_per_step} clips a step = {settings.clips_per_step // views} videos x {views} views, "
        f"over {settings.processes} process{'es' * (settings.processes > 1)}",
        memory_line(settings, model, cost.kept_bytes if cost else 0),
        f"sources      {', '.join(settings.trainer.data.sources)}",
        *data_lines(settings, train, val, trainer.global_step if trainer else 0),
        *weights_lines(job, trainer),
        *frozen_lines(model),
        f"groups       {len(optimizer.groups)}, of {type(optimizer.optimizer).__name__}:",
    ]
    for number, group in enumerate(optimizer.groups):
        count = sum(parameters[name] for name in group.names)
        curves = "; ".join(
            f"{option}{f' x {s:.4g}:' if s != 1 else ''} {told_curve([curve(i / 200) * s for i in range(201)])}"
            for option, curve in group.schedules.items()
            for s in [group.scale if option == "lr" else 1.0]
        )
        digits = 2 if count >= 1e5 else 4
        lines.append(f"  {number}: {len(group.names)} tensors, {count / 1e6:.{digits}f} M parameters; {curves}")
    for curve in curves_of(optimizer):
        of = "" if len(curve.groups) == len(optimizer.groups) else f" ({listed_groups(curve.groups)})"
        told = f"epoch 0 to {settings.trainer.max_epochs}: {told_curve(curve.values)}{of}"
        lines.append(f"{curve.option:12} {sparkline(curve.values)}  {told}")
    return "\n".join(lines)


def curves_of(optimizer: ScheduledOptimizer) -> list[Curve]:
    """Every schedule of the run once, with the groups that have it."""
    found: dict[tuple[str, tuple[float, ...]], list[int]] = {}
    for number, group in enumerate(optimizer.groups):
        for option, schedule in group.schedules.items():
            values = tuple(schedule(i / 400) for i in range(401))
            found.setdefault((option, values), []).append(number)
    return [Curve(option, groups, list(values)) for (option, values), groups in found.items()]


def listed_groups(groups: list[int]) -> str:
    """The numbers of groups, those of many cut short."""
    shown = ", ".join(map(str, groups[:4]))
    return f"group{'s' * (len(groups) > 1)} {shown}" + (f", ... ({len(groups)})" if len(groups) > 4 else "")


def sparkline(values: list[float]) -> str:
    """A curve in one line of blocks, from the least to the most of its values; one that never changes is halfway up, or 0."""
    low, high = min(values), max(values)
    if low == high:
        return BLOCKS[len(BLOCKS) // 2 if high else 0] * WIDTH
    picked = [values[round(i * (len(values) - 1) / (WIDTH - 1))] for i in range(WIDTH)]
    return "".join(BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))] for value in picked)


def draw(settings: Settings, optimizer: ScheduledOptimizer, file: Path) -> None:
    """The curves as a picture; of the learning rate with the scale of each group (layer decay)."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = curves_of(optimizer)
    options = list(dict.fromkeys(curve.option for curve in curves))
    figure = Figure(figsize=(7.6, 1.2 + 2.2 * len(options)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, option in zip(np.atleast_1d(figure.subplots(len(options), 1, sharex=True)), options, strict=True):
        for curve in (each for each in curves if each.option == option):
            scales = {optimizer.groups[number].scale if option == "lr" else 1.0 for number in curve.groups}
            epochs = np.linspace(0, settings.trainer.max_epochs, len(curve.values))
            for rank, scale in enumerate(sorted(scales, reverse=True)):
                label = listed_groups(curve.groups) if len(scales) == 1 else f"x {scale:.3g}"
                # Of many scales the first, the last and a few between are in the legend.
                shown = rank % math.ceil(len(scales) / MAX_LEGEND) == 0 or rank == len(scales) - 1
                color = None if len(scales) == 1 else colormaps["viridis"](rank / len(scales))
                axes.plot(epochs, np.array(curve.values) * scale, label=label if shown else None, color=color)
        axes.set_ylabel(option)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))  # beside the axes
    axes.set_xlabel("epoch")
    rate = (
        f"learning rates / {settings.lr_scale_factor:g}"
        if settings.lr is None
        else f"peak learning rate {settings.lr:g}"
    )
    told = f"Effective batch {settings.clips_per_step} clips, {rate}"
    figure.suptitle(told, fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(file) as opened:
        figure.savefig(opened, format="png")


def data_lines(settings: Settings, train: list[Split], val: list[Split], done: int) -> list[str]:
    """The splits with their sizes and how many sampled files exist, and the steps that follow; `done` are behind the run."""
    lines = []
    for split in train + val:
        paths = sample_paths(split)
        there = sum(Path(path).exists() for path in paths)
        lines.append(f"data         {describe_split(split)}; {there} of {len(paths)} sampled files exist")
    if train:
        steps, epochs = epoch_plan(settings, train).steps, settings.trainer.max_epochs
        left = f", {max(0, steps * epochs - done)} of them left" if done else ""
        lines.append(f"steps        {steps} an epoch x {epochs} epochs = {steps * epochs}{left}")
    return lines


def weights_lines(job: Job, trainer: Trainer | None) -> list[str]:
    """What the run starts from: its own checkpoint, or the files that exist."""
    settings, own = job.settings, run_folder(job).checkpoints / LATEST
    if own.exists():
        return [f"weights      {describe_resumed(trainer.state) if trainer else f'its own, {own}'}"]
    source = settings.pretrained_checkpoint_path
    if source is None:
        return ["weights      random initialization" + ", of frozen parameters too" * bool(settings.trainer.freeze)]
    lines = []
    for each in [source] if isinstance(source, str) else source:
        with contextlib.suppress(UserError):
            file = state_dict_file.resolve_checkpoint(each)
            lines.append(f"weights      from {file}, {file.stat().st_size / 1e6:.1f} MB")
    return lines


def operations_line(cost: ClipFlops | None) -> str:
    if cost is None:
        return "operations   not known: this model or task of your own does not work without values"
    forward, step = cost.forward_flops / 1e9, cost.step_flops / 1e9
    return f"operations   {forward:.2f} GFLOPs a clip forward, {step:.2f} forward and backward"


def memory_line(settings: Settings, model: torch.nn.Module, kept_bytes: int) -> str:
    """What a process holds all the time, and what it keeps of a batch for the backward pass (`kept_bytes` of a clip in full
    precision; half precision halves most of it). `trainer.model.trunk.activation_checkpointing` trades that for time.
    """
    held = 4 * sum(p.numel() * (4 if p.requires_grad else 1) for p in model.parameters())  # gradient and two moments
    if settings.trainer.distributed.strategy == "fsdp":
        held //= settings.processes
    clips = settings.clips_per_process / settings.trainer.optim.accumulation_steps
    kept = kept_bytes * clips * (0.5 if settings.trainer.optim.amp.enabled else 1)
    shared = shared_memory_bytes(settings) if settings.trainer.data.num_workers else 0
    return (
        f"memory       {size(held)} a process for weights, gradients and AdamW, about {size(kept)} for activations; "
        f"{size(shared)} of /dev/shm for its data workers; a checkpoint takes {size(checkpoint_bytes(settings))}"
    )


def size(count: float) -> str:
    """Bytes in the unit that people say them in."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def frozen_lines(model: torch.nn.Module) -> list[str]:
    """A line about what is not trained, if there is anything."""
    count = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if not count:
        return []
    return [
        f"frozen       {count / 1e6:.2f} M parameters: a forward pass alone, about a third of the work of training them"
    ]


def told_curve(values: list[float]) -> str:
    """A schedule in a few numbers: first, highest, last; or the one that it always has."""
    if min(values) == max(values):
        return f"{values[0]:.4g}"
    return f"{values[0]:.4g} -> peak {max(values):.4g} -> {values[-1]:.4g}"
