"""`trainer.mode=dry`: what a run would be. Builds the model on the meta device and touches no data."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from omnivision import build
from omnivision.data.batch import Batch
from omnivision.models.average import AveragedClassifier
from omnivision.models.patches import token_grid
from omnivision.preflight import checkpoint_bytes, shared_memory_bytes
from omnivision.settings import Settings


def describe(settings: Settings) -> str:
    """Model, parameter groups, effective batch and learning rate, and operations, as lines to print."""
    model = build.model(settings, device="meta")
    optimizer = build.optimizer(settings, model)
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    if isinstance(model, AveragedClassifier):
        size = sum(tensor.numel() for tensor in model.averaged_trunk().values())
        trunk = f"beside a trunk of {size / 1e6:.2f} M, averaged over {model.num_models} checkpoints"
    else:
        size = sum(n for name, n in parameters.items() if name.startswith("trunk.") and ".decoder." not in name)
        trunk = f"{size / 1e6:.2f} M of them in the trunk"
    views = settings.trainer.data.views_per_clip
    lines = [
        f"model        {type(model).__name__}: {sum(parameters.values()) / 1e6:.2f} M parameters, {trunk}",
        f"operations   {gflops(settings, model):.2f} GFLOPs a clip, forward (about three times that with the backward pass)",
        f"batch        {settings.clips_per_step} clips a step = {settings.clips_per_step // views} videos x {views} views, "
        f"over {settings.processes} process{'es' * (settings.processes > 1)}",
        memory_line(settings, model),
        f"epochs       {settings.trainer.max_epochs}",
        f"sources      {', '.join(settings.trainer.data.sources)}",
        *frozen_lines(model),
        f"groups       {len(optimizer.groups)}, of {type(optimizer.optimizer).__name__}:",
    ]
    for number, group in enumerate(optimizer.groups):
        count = sum(parameters[name] for name in group.names)
        curves = "; ".join(
            f"{option} {told_curve([curve(i / 200) * s for i in range(201)])}"
            for option, curve in group.schedules.items()
            for s in [group.scale if option == "lr" else 1.0]
        )
        lines.append(f"  {number}: {len(group.names)} tensors, {count / 1e6:.2f} M parameters; {curves}")
    return "\n".join(lines)


def memory_line(settings: Settings, model: torch.nn.Module) -> str:
    """What a process holds all the time; activations come on top, and `trainer.model.trunk.activation_checkpointing` trades
    those for time.
    """
    held = 4 * sum(p.numel() * (4 if p.requires_grad else 1) for p in model.parameters())  # gradient and two moments
    if settings.trainer.distributed.strategy == "fsdp":
        held //= settings.processes
    shared = shared_memory_bytes(settings) if settings.trainer.data.num_workers else 0
    return (
        f"memory       {held / 1e9:.2f} GB a process for weights, gradients and AdamW, without activations; "
        f"{shared / 1e9:.2f} GB of /dev/shm for its data workers; a checkpoint takes {checkpoint_bytes(settings) / 1e9:.2f} GB"
    )


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


def gflops(settings: Settings, model: torch.nn.Module) -> float:
    """Operations of the forward pass of one clip, in 10^9 (a multiply-add counts as two)."""
    data, size = settings.trainer.data, settings.image_size
    task = build.task(settings)
    mask, num_masked = None, 0
    if data.mask is not None:
        grid = token_grid((data.num_frames, size, size), tuple(settings.trainer.model["trunk"]["tubelet"]))
        drawn = build.build(data.mask, "trainer.data.mask")(grid, np.random.default_rng(0))
        mask, num_masked = torch.empty((1, *grid), dtype=torch.bool, device="meta"), int(drawn.sum())
    batch = Batch(
        video=torch.empty(1, 3, data.num_frames, size, size, dtype=torch.uint8, device="meta"),
        label=torch.empty(1, dtype=torch.int64, device="meta"),
        index=torch.empty(1, dtype=torch.int64, device="meta"),
        source=next(iter(data.sources)),
        paths=[""],
        mask=mask,
        num_masked=num_masked,
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        task.training_step(model, batch)
    return counter.get_total_flops() / 1e9
