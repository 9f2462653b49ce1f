"""`trainer.mode=dry`: what a run would be. Builds the model on the meta device and opens no film."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from omnivision import build, weight_files
from omnivision.errors import UserError
from omnivision.files import replace_atomically, require_weights
from omnivision.models.average import AveragedClassifier
from omnivision.optim.groups import ScheduledOptimizer
from omnivision.preflight import all_of, checkpoint_bytes, epoch_plan, looked_for, open_splits, shared_memory_bytes
from omnivision.settings import Settings
from omnivision.utilisation import Cost

WIDTH = 60  # characters of a curve in the terminal
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Curve:
    """An option of the optimizer over a run, for some of the groups: values at evenly spread moments, unscaled."""

    option: str
    groups: list[int]
    values: list[float]


def built(settings: Settings) -> tuple[nn.Module, ScheduledOptimizer]:
    """The model, without memory, and its optimizer."""
    build.check_cuts(settings)
    model = build.model(settings, device="meta")
    return model, build.optimizer(settings, model)


def describe(settings: Settings, model: nn.Module, optimizer: ScheduledOptimizer) -> str:
    """Model, parameter groups, effective batch, learning rate, operations, and data, as lines to print."""
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
        *data_lines(settings),
        *weights_lines(settings),
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
        of = "" if len(curve.groups) == len(optimizer.groups) else f" (groups {', '.join(map(str, curve.groups))})"
        told = f"epoch 0 to {settings.trainer.max_epochs}: {told_curve(curve.values)}{of}"
        lines.append(f"{curve.option:12} {line_of(curve.values)}  {told}")
    return "\n".join([*lines, *hindrances(settings)])


def curves_of(optimizer: ScheduledOptimizer) -> list[Curve]:
    """Every schedule of the run once, with the groups that have it."""
    found: dict[tuple[str, tuple[float, ...]], list[int]] = {}
    for number, group in enumerate(optimizer.groups):
        for option, schedule in group.schedules.items():
            values = tuple(schedule(i / 400) for i in range(401))
            found.setdefault((option, values), []).append(number)
    return [Curve(option, groups, list(values)) for (option, values), groups in found.items()]


def line_of(values: list[float]) -> str:
    """A curve in one line of blocks, from the least to the most of its values; one that never changes is halfway up, or 0."""
    low, high = min(values), max(values)
    if low == high:
        return BLOCKS[len(BLOCKS) // 2 if high else 0] * WIDTH
    picked = [values[round(i * (len(values) - 1) / (WIDTH - 1))] for i in range(WIDTH)]
    return "".join(BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))] for value in picked)


def draw(settings: Settings, optimizer: ScheduledOptimizer, file: Path) -> None:
    """The curves as a picture; of the learning rate with the scale of each group (layer decay)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = curves_of(optimizer)
    options = list(dict.fromkeys(curve.option for curve in curves))
    figure = Figure(figsize=(6.4, 1.2 + 2.2 * len(options)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, option in zip(np.atleast_1d(figure.subplots(len(options), 1, sharex=True)), options, strict=True):
        for curve in (each for each in curves if each.option == option):
            scales = {optimizer.groups[number].scale if option == "lr" else 1.0 for number in curve.groups}
            epochs = np.linspace(0, settings.trainer.max_epochs, len(curve.values))
            for scale in sorted(scales, reverse=True):
                label = f"group {', '.join(map(str, curve.groups))}" if len(scales) == 1 else f"x {scale:.3g}"
                axes.plot(epochs, np.array(curve.values) * scale, label=label)
        axes.set_ylabel(option)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize=7, ncols=2)
    axes.set_xlabel("epoch")
    told = f"Effective batch {settings.clips_per_step} clips, learning rates / {settings.lr_scale_factor:g}"
    figure.suptitle(told, fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(file) as opened:
        figure.savefig(opened, format="png")


def data_lines(settings: Settings) -> list[str]:
    """The splits with their sizes and how many of some files are there, the weights, and the steps that follow."""
    try:
        train, val = open_splits(settings)
        plan = epoch_plan(settings, train) if train else None
    except UserError:
        return []
    lines = []
    for split in train + val:
        paths = looked_for(split)
        there = sum(Path(path).exists() for path in paths)
        told = f"{len(split)} samples; {there} of {len(paths)} files that were looked for are there"
        lines.append(f"data         {split.name}, {split.which}: {told}")
    if plan is not None:
        epochs = settings.trainer.max_epochs
        lines.append(f"steps        {plan.steps} an epoch x {epochs} epochs = {plan.steps * epochs}")
    return lines


def weights_lines(settings: Settings) -> list[str]:
    """What the run starts from, as far as it is there."""
    source = settings.pretrained_checkpoint_path
    if source is None:
        return ["weights      none: it starts from nothing"]
    found = []
    for each in [source] if isinstance(source, str) else source:
        with contextlib.suppress(UserError):
            file = weight_files.find(require_weights(each))
            found.append(f"weights      from {file}, {file.stat().st_size / 1e6:.1f} MB")
    return found


def hindrances(settings: Settings) -> list[str]:
    """Why the run would not start here."""
    source = settings.pretrained_checkpoint_path
    sources = [source] if isinstance(source, str) else source or []
    checks: list[Callable[[], object]] = [lambda: open_splits(settings)]
    checks += [functools.partial(require_weights, each) for each in sources]
    try:
        all_of(checks)
        epoch_plan(settings, open_splits(settings)[0])
    except UserError as error:
        return ["", "What would stop this run here:", *(f"- {problem}" for problem in error.problems)]
    return []


def operations_line(cost: Cost | None) -> str:
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
