"""`trainer.mode=dry`: problems that would stop a run, and a summary of it.

It makes the same checks as a run: `preflight.check_run`, and `load_initial_weights` with a model on the meta device, which
compares weights and checkpoints by name and shape.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from omnivision.checkpoint import state_dict_file
from omnivision.config.schema import Settings
from omnivision.distributed.process_group import RankInfo, choose_device
from omnivision.models.average import AveragedClassifier
from omnivision.optim.groups import ScheduledOptimizer
from omnivision.reporting.reporter import Reporter
from omnivision.reporting.run_directory import RunDir
from omnivision.tasks.base import Task
from omnivision.training import build, preflight
from omnivision.training.flops import ClipFlops, count_forward_flops
from omnivision.training.initial_weights import load_initial_weights
from omnivision.training.online_eval import OnlineEval
from omnivision.training.run_messages import describe_random, describe_resumed
from omnivision.training.trainer import Trainer
from omnivision.utils.errors import EXIT_USER, collect_problems
from omnivision.utils.io import LATEST, replace_atomically
from omnivision.utils.signals import StopSignal
from omnivision.utils.streams import format_count, plural, print_text

MAX_LEGEND = 8  # entries for the curves of one option


def dry_run(settings: Settings, config_text: str, *checks: Callable[[Settings], object]) -> int:
    """Print problems that would stop the run, then a summary; return the exit code, 1 if there is a problem."""
    settings = settings.with_trainer(mode="train")
    run_dir = RunDir(settings.launcher.experiment_log_dir, settings.trainer.checkpoint.save_dir)
    problems, warning_lines, splits = preflight.check_run(settings, *checks, lambda _: check_machine(settings, run_dir))
    output, lines = io.StringIO(), []
    with warnings.catch_warnings(action="ignore"):  # torch warns that copies to the meta device do nothing
        trainer = collect_problems(problems, meta_trainer, settings, config_text, run_dir, splits, output)
        if trainer is not None and not preflight.awaits_dependency(settings):
            collect_problems(problems, load_initial_weights, settings, trainer)
    if trainer is not None:
        image = run_dir.path / "dry.png"
        try:
            draw_schedules(settings, trainer.optimizer, image)
        except OSError as error:
            problems.append(f"{image} cannot be written: {error.strerror}. Set launcher.experiment_log_dir.")
        lines = [*describe(settings, trainer, splits), f"curves       {image}", *output.getvalue().splitlines()]
    if problems:  # the checks overlap
        print("\n- ".join(["This run would stop before its first step:", *dict.fromkeys(problems)]), end="\n\n")
    for warning in warning_lines:
        print(f"warning: {warning}")
    print_text("\n".join(lines))
    return EXIT_USER if problems else 0


def check_machine(settings: Settings, run_dir: RunDir) -> None:
    """Raise UserError if a device of this machine has too little memory, or if the run directory is in use."""
    if not settings.submitit.use_cluster:
        preflight.check_device(
            settings, choose_device(settings.trainer.accelerator, settings.launcher.gpus_per_node - 1)
        )
        if run_dir.path.is_dir():
            run_dir.require_free()


def meta_trainer(
    settings: Settings,
    config_text: str,
    run_dir: RunDir,
    splits: build.Splits,
    output: io.StringIO,
) -> Trainer:
    """Return the trainer of the run, on the meta device; `output` gets what it prints. Raises UserError."""
    dist = build.build_process_group(settings.with_trainer(accelerator="cpu"), RankInfo())
    dist.device = torch.device("meta")
    reporter = Reporter(run_dir, enabled=True, console=Console(file=output))
    return build.build_trainer(settings, config_text, dist, run_dir, reporter, StopSignal(), splits)


def describe(settings: Settings, trainer: Trainer, splits: build.Splits) -> list[str]:
    """Describe model, operations, batch, memory, data, weights and parameter groups, as lines to print."""
    model, optimizer = trainer.raw_model, trainer.optimizer
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if isinstance(model, AveragedClassifier):
        held = sum(tensor.numel() for tensor in model.averaged_trunk().values())
        trunk = f"beside a trunk of {format_count(held)}, averaged over {model.num_models} checkpoints"
    else:
        held = sum(n for name, n in parameters.items() if name.startswith("trunk.") and ".decoder." not in name)
        trunk = f"{format_count(held)} of them in the trunk"
    views, cost = settings.trainer.data.views_per_clip, collect_problems([], build.measure_clip_cost, settings, model)
    operations = "unknown: your model or task does not run on the meta device"
    if cost is not None:
        forward, step = cost.forward_flops / 1e9, cost.step_flops / 1e9
        operations = f"{forward:.2f} GFLOPs per clip forward, {step:.2f} forward and backward"
    # Half precision roughly halves activations.
    clips = settings.clips_per_rank / settings.trainer.optim.accumulation_steps
    kept = (cost.activation_bytes if cost else 0) * clips * (0.5 if settings.trainer.optim.amp.enabled else 1)
    held_bytes = format_bytes(preflight.memory_per_rank(settings, model))
    lines = [
        f"model        {type(model).__name__}: {format_count(sum(parameters.values()))} parameters, {trunk}",
        f"operations   {operations}",
        f"batch        {settings.clips_per_step} clips per step = {settings.clips_per_step // views} videos x {views} views, "
        f"over {plural(settings.world_size, 'rank')}",
        f"memory       {held_bytes} per rank for weights, gradients and AdamW, about {format_bytes(kept)} for "
        f"activations; a checkpoint takes {format_bytes(preflight.checkpoint_bytes(settings, model))}",
        f"sources      {', '.join(settings.trainer.data.sources)}",
        *data_lines(settings, trainer, splits),
        *weights_lines(settings, trainer),
        *class_weight_lines(trainer.task),
    ]
    if trainer.online_eval is not None:
        lines.append(online_line(settings, trainer, trainer.online_eval, cost))
    if frozen:
        lines.append(f"frozen       {format_count(frozen)} parameters: forward pass only, about a third of the work")
    lines.append(f"groups       {len(optimizer.groups)}, of {type(optimizer.optimizer).__name__}:")
    return [*lines, *group_lines(optimizer, parameters)]


def online_line(settings: Settings, trainer: Trainer, online: OnlineEval, cost: ClipFlops | None) -> str:
    """Describe the probes while the run trains, and their share of the work."""
    every = settings.trainer.online_eval.every_epochs
    named = ", ".join(f"{source.train.name} ({source.videos} videos)" for source in online.sources)
    share = ""
    if cost is not None:
        steps = every * trainer.state.steps_per_epoch * settings.clips_per_step
        trunk: Any = trainer.raw_model.trunk
        shape = trunk.num_frames, trunk.image_size, trunk.image_size
        probing = count_forward_flops(trunk, shape) * online.clips  # of complete clips, also in stage 1
        share = f", {100 * probing / (cost.step_flops * steps):.2g} % of the operations of training"
    return f"online       {named} every {plural(every, 'epoch')}: {online.clips} clips{share}"


def data_lines(settings: Settings, trainer: Trainer, splits: build.Splits) -> Iterator[str]:
    """Yield the splits with their sizes and how many sampled files exist, the masks, and the steps of the run."""
    for split in [*splits[0], *splits[1]]:
        paths = preflight.sample_paths(split)
        existing = sum(Path(path).exists() for path in paths)
        yield f"data         {preflight.describe_split(split)}; {existing} of {len(paths)} checked files exist"
    if trainer.train_data is not None:
        for kind, config in trainer.train_data.dataset.configs.items():
            if config.mask is not None:
                hidden = int(config.mask(config.grid, np.random.default_rng(0)).sum())
                tokens = math.prod(config.grid)
                yield f"mask         {type(config.mask).__name__} hides {hidden} of the {tokens} tokens of a {kind} clip"
        for name, source in trainer.train_data.plan.sources.items():
            if source.balance is not None:
                low, high = int(source.balance.draws.min()), int(source.balance.draws.max())
                yield (
                    f"balance      {name}: each class is drawn {low} to {high} times in a pass; classes have "
                    f"{source.balance.sizes.min()} to {source.balance.sizes.max()} samples"
                )
        steps = trainer.train_data.plan.steps
        epochs = settings.trainer.max_epochs
        total = trainer.total_steps
        left = f", {max(0, total - trainer.global_step)} of them left" if trainer.global_step else ""
        yield f"steps        {steps} per epoch x {plural(epochs, 'epoch')} = {total}{left}"


def class_weight_lines(task: Task) -> Iterator[str]:
    """Yield the range of the class weights in the training loss, if there are any."""
    for head, weights in enumerate(getattr(task, "class_weights", None) or ()):
        yield f"loss         classes of head {head} have weights {weights.min():.3g} to {weights.max():.3g}"


def weights_lines(settings: Settings, trainer: Trainer) -> Iterator[str]:
    """Yield the weights that the run starts from: its own checkpoint, or the files that exist."""
    own, pretrained = trainer.context.run_dir.checkpoints / LATEST, settings.pretrained_checkpoint_path
    if own.exists():
        yield f"weights      {describe_resumed(trainer.state) if trainer.global_step else f'its own, {own}'}"
    elif pretrained is None:
        yield f"weights      {describe_random(has_frozen=bool(settings.trainer.freeze))}"
    else:
        for path in [pretrained] if isinstance(pretrained, str) else pretrained:
            if file := collect_problems([], state_dict_file.resolve_checkpoint, path):
                yield f"weights      from {file}, {file.stat().st_size / 1e6:.1f} MB"


def group_lines(optimizer: ScheduledOptimizer, parameters: dict[str, int]) -> Iterator[str]:
    """Describe each parameter group by its options over the run: first, highest and last value, or the constant."""
    for number, group in enumerate(optimizer.groups):
        texts = []
        for option in group.schedules:
            values = [group.value(option, i / 200) for i in range(201)]
            curve = f"{values[0]:.4g} -> peak {max(values):.4g} -> {values[-1]:.4g}"
            factor = f" x {group.factors[option]:.4g}:" if option in group.factors else ""
            texts.append(f"{option}{factor} {curve if min(values) < max(values) else f'{values[0]:.4g}'}")
        count = sum(parameters[name] for name in group.names)
        yield f"  {number}: {len(group.names)} tensors, {format_count(count)} parameters; {'; '.join(texts)}"


def format_bytes(count: float) -> str:
    """Format bytes in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def draw_schedules(settings: Settings, optimizer: ScheduledOptimizer, file: Path) -> None:
    """Draw each option over the run, one curve for groups that share it; learning rates include layer decay."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, dict[tuple[float, ...], list[int]]] = {}  # option -> values -> groups
    for number, group in enumerate(optimizer.groups):
        for option in group.schedules:
            values = tuple(group.value(option, i / 400) for i in range(401))
            curves.setdefault(option, {}).setdefault(values, []).append(number)
    figure = Figure(figsize=(7.6, 1.2 + 2.2 * len(curves)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    epochs = np.linspace(0, settings.trainer.max_epochs, 401)
    rows = np.atleast_1d(figure.subplots(len(curves), 1, sharex=True))
    for axes, (option, groups_by_curve) in zip(rows, curves.items(), strict=True):
        # With many curves, the legend has the first, the last and a few in between.
        every = math.ceil(len(groups_by_curve) / MAX_LEGEND)
        for rank, (values, groups) in enumerate(sorted(groups_by_curve.items(), reverse=True)):
            in_legend = rank % every == 0 or rank == len(groups_by_curve) - 1
            label = describe_groups(groups) if in_legend else None
            axes.plot(epochs, values, label=label, color=colormaps["viridis"](rank / len(groups_by_curve)))
        axes.set_ylabel(option)
        axes.grid(alpha=0.3)
        if len(groups_by_curve) > 1:
            axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))  # beside the axes
    rows[-1].set_xlabel("epoch")
    rate = f"lr_scale_factor {settings.lr_scale_factor:g}" if settings.lr is None else f"peak lr {settings.lr:g}"
    figure.suptitle(f"{settings.clips_per_step} clips per step, {rate}", fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(file) as opened:
        figure.savefig(opened, format="png")


def describe_groups(groups: Sequence[int]) -> str:
    """Return the numbers of groups, at most four."""
    numbers = ", ".join(map(str, groups[:4])) + (f", ... ({len(groups)})" if len(groups) > 4 else "")
    return f"group{'s' * (len(groups) > 1)} {numbers}"
