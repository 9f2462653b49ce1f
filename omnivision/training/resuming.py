"""How a run is taken up from its own checkpoint (`Trainer.save` wrote it), in the middle of an epoch too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from omnivision.checkpoint import checkpointer as checkpoint
from omnivision.checkpoint import fingerprint as experiment
from omnivision.checkpoint.pretrained import LoadReport, match_heads
from omnivision.checkpoint.weight_files import describe_checkpoint
from omnivision.optim.ema import MovingAverage
from omnivision.training.run_state import State
from omnivision.training.trainer import Trainer
from omnivision.utils.errors import UserError
from omnivision.utils.io import LATEST


def take_up(trainer: Trainer, class_names: Sequence[Sequence[str]] = ()) -> bool:
    """Put the newest whole checkpoint of the run folder into a trainer; False when there is none.

    `class_names`: of each head. For an evaluation the heads are matched to them; a run that trains must have the same.

    Raises UserError when none is whole, or when it is of another model, optimizer, data or number of steps.
    """
    try:
        found = checkpoint.load_newest(trainer.folder.checkpoints)
    except checkpoint.CorruptCheckpointError as error:
        raise UserError(
            f"No checkpoint of this run is whole: {error}. Starting over would lose the run without a word. Put back a "
            f"good file as {trainer.folder.checkpoints / LATEST}, or change launcher.experiment_log_dir."
        ) from None
    if found is None:
        return False
    state, path, problems = found
    for problem in problems:
        trainer.reporter.info(f"A checkpoint is broken and was passed over: {problem}")
    if trainer.train is not None and trainer.experiment:
        _require_experiment(trainer, state["experiment"], path)
    if trainer.train is None:  # evaluation asks for nothing but the weights
        trainer.steps_per_epoch = state["steps_per_epoch"]
        _match_heads(trainer, state, class_names, path)
    elif state["steps_per_epoch"] != trainer.steps_per_epoch:
        raise UserError(
            f"{path} belongs to a run with {state['steps_per_epoch']} steps an epoch, now there are {trainer.steps_per_epoch}: "
            "data, batch_size or trainer.limit_train_batches changed. Give the same again, or another "
            "launcher.experiment_log_dir for a new run."
        )
    _require_sources([source.note() for source in trainer.sources], state["sources"], path)
    checkpoint.load_model(trainer.bare, state["model"], path)
    try:
        if trainer.train is not None:
            trainer.optimizer.load(state["optimizer"])
    except ValueError as error:
        raise UserError(
            f"{path} holds the state of another optimizer ({error}): trainer.optim.optimizer, its options, layer_decay or "
            "trainer.freeze changed. Give the same again, or another launcher.experiment_log_dir for a new run."
        ) from None
    if trainer.ema is not None:
        _take_up_average(trainer.ema, state, path)
    if trainer.scaler.is_enabled() and state["scaler"]:  # empty after steps without one
        trainer.scaler.load_state_dict(state["scaler"])
    best = state["best"], state.get("best_loss"), state.get("best_epoch")  # older checkpoints lack the last two
    trainer.state = State(state["epoch"], state["step"], *best, state["seconds"])
    trainer.stop.saved_step = trainer.global_step
    trainer.last, trainer.watch.skipped = state["last"], state["skipped"]
    if trainer.dist.is_main:
        trainer.meter.load(state["meter"])
    trainer.reporter.info(f"Resumed from {path} ({describe_checkpoint(state)})")
    return True


def _match_heads(trainer: Trainer, state: dict[str, Any], class_names: Sequence[Sequence[str]], path: Path) -> None:
    """Bring the heads of a checkpoint, and of its moving average, to the class names of the data. Raises UserError."""
    theirs = dict(enumerate(experiment.class_names(experiment.inference(state))))
    for part in ("model", "ema"):
        if state[part] is not None:
            report = LoadReport(str(path), "")
            matched, unused = match_heads(state[part], theirs, class_names, report)
            # Heads that this model lacks make it another model, which is refused where the weights are loaded.
            state[part] = {name: state[part][name] for name in unused} | matched
    for line in report.classes:
        trainer.reporter.info(f"Classes: {line}.")


def _require_experiment(trainer: Trainer, text: str, path: Path) -> None:
    """Tell what differs from the experiment that a checkpoint is of. Raises UserError when that makes it another one."""
    then = experiment.read(text)
    if then is None:
        trainer.reporter.info(f"{path} does not say of which experiment it is; its settings cannot be compared.")
        return
    if classes := experiment.class_changes(then, trainer.experiment):
        raise UserError(
            f"{path} was trained on other classes, or on the same in another order: {experiment.listed(classes)}. A resumed "
            "head must keep its classes, also with allow_changes. Set datasets.NAME.class_names and its labels as "
            "they were, or start a new run in another launcher.experiment_log_dir from pretrained_checkpoint_path."
        )
    altering, others = experiment.differences(then, trainer.experiment)
    if altering and not trainer.options.allow_changes:
        raise UserError(experiment.refusal(str(path), altering))
    if altering or others:
        trainer.reporter.info(f"The run goes on otherwise than it was: {experiment.listed(altering + others)}")


def _take_up_average(ema: MovingAverage, state: Mapping[str, Any], path: Path) -> None:
    """Go on with a moving average; begin one at the weights of now where the run had none."""
    average: Mapping[str, Tensor] | None = state["ema"]
    if average is None:
        ema.start()
        return
    if lacking := sorted(set(ema.average) ^ set(average)):
        raise UserError(
            f"{path} holds a moving average of other weights than are trained now ({lacking[0]} for one): trainer.freeze "
            "changed. Give the same again, or another launcher.experiment_log_dir for a new run."
        )
    steps = state["epoch"] * state["steps_per_epoch"] + state["step"] - state["skipped"]
    ema.load(average, state.get("ema_steps", steps))  # older checkpoints do not hold the number


def _require_sources(now: Sequence[Mapping[str, Any]], then: Sequence[Mapping[str, Any]], path: Path) -> None:
    """An average goes on only with the very weights that it averages: they are not in its checkpoints."""
    if not now:
        return
    if [source["sha256"] for source in then] != [source["sha256"] for source in now]:
        was, given = (", ".join(f"{s['path']} ({s['sha256'][:12]})" for s in sources) for sources in (then, now))
        raise UserError(
            f"{path} is of a run that averages {was}; now pretrained_checkpoint_path gives {given}. Expected the same "
            "files, in the same order. Give them again, or another launcher.experiment_log_dir for a new run."
        )
    if [source["choice"] for source in then] != [source["choice"] for source in now]:
        raise UserError(
            f"{path} is of a run that took other entries of the checkpoints that it averages: {then[0]['choice']}, now "
            f"{now[0]['choice']}. Choose the same trainer/checkpoint, or another launcher.experiment_log_dir for a new run."
        )
