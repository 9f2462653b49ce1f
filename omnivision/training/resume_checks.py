"""Checks that a checkpoint belongs to the run that resumes from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from omnivision.checkpoint import fingerprint
from omnivision.checkpoint.inference_config import InferenceConfig, describe_class_changes
from omnivision.checkpoint.pretrained import LoadReport, match_heads
from omnivision.optim.ema import MovingAverage
from omnivision.utils.errors import UserError, truncate_list

RESUME_HINT = "Set it back, or start a new run in another launcher.experiment_log_dir."


def check_same_experiment(
    text: str, current: Mapping[str, Any], path: Path, allow_changes: bool, info: Callable[[str], None]
) -> None:
    """Compare the fingerprint in a checkpoint with the current one; report changes that do not affect results.

    Raises UserError for changed classes and, unless `allow_changes`, for changed hyperparameters or data.
    """
    saved = fingerprint.parse_fingerprint(text)
    if saved is None:
        info(f"{path} has no experiment fingerprint; its settings cannot be compared.")
        return
    if classes := describe_class_changes(InferenceConfig.of_file(saved), InferenceConfig.of_file(current)):
        raise UserError(
            f"{path} must have the classes (or targets) of the data, in their order, got changes: "
            f"{truncate_list(classes, separator='; ')}. Set datasets.NAME.class_names and its labels back, or "
            "start a new run in another launcher.experiment_log_dir from pretrained_checkpoint_path; "
            "allow_changes does not permit this."
        )
    altering, others = fingerprint.classify_changes(saved, current)
    if altering and not allow_changes:
        raise UserError(fingerprint.mismatch_message(str(path), altering))
    if altering or others:
        info(f"Changed since the checkpoint: {truncate_list(altering + others, separator='; ')}")


def check_same_steps(saved: int, current: int, path: Path) -> None:
    """Raise UserError when the number of steps per epoch changed."""
    if saved != current:
        raise UserError(
            f"{path} has {saved} steps per epoch, now there are {current}: data, batch_size or trainer.limit_train_batches "
            f"changed. {RESUME_HINT}"
        )


def check_same_averaged_checkpoints(
    saved: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]], path: Path
) -> None:
    """Raise UserError when a learned average resumes with other source checkpoints (its own checkpoint lacks their weights)."""
    for what, setting in (("sha256", "pretrained_checkpoint_path"), ("choice", "trainer/checkpoint")):
        was, now = ([source[what] for source in sources] for sources in (saved, current))
        if current and was != now:
            files = ", ".join(str(source["path"]) for source in saved)
            change = fingerprint.shorten_hashes(f"{was}, now {now}")
            raise UserError(f"{path} averages {files} with {change}: {setting} changed. {RESUME_HINT}")


def match_checkpoint_heads(
    state: dict[str, Any], class_names: Sequence[Sequence[str]], path: Path, info: Callable[[str], None]
) -> None:
    """Reorder the heads of a checkpoint and its EMA to match the class names of the data.

    Raises UserError if they do not match.
    """
    saved = InferenceConfig.of_file(state)
    saved_names = {head: saved.names(head) for head in range(len(saved.class_names))}
    for part in ("model", "ema"):
        if state[part] is not None:
            report = LoadReport(str(path), "")
            matched, unused = match_heads(state[part], saved_names, class_names, report)
            # Loading the weights rejects heads that this model lacks.
            state[part] = {name: state[part][name] for name in unused} | matched
    for line in report.classes:
        info(f"Classes: {line}.")


def load_ema(ema: MovingAverage, state: Mapping[str, Any], path: Path) -> None:
    """Resume the EMA; start one from the current weights if the checkpoint has none.

    Raises UserError for an EMA of other parameters.
    """
    average: Mapping[str, Tensor] | None = state["ema"]
    if average is None:
        ema.reset_to_weights()
        return
    if differing := sorted(set(ema.average) ^ set(average)):
        raise UserError(
            f"{path} has an EMA of parameters other than those trained now ({differing[0]}): trainer.freeze changed. "
            f"{RESUME_HINT}"
        )
    steps = state["epoch"] * state["steps_per_epoch"] + state["step"] - state["skipped"]
    ema.load(average, state.get("ema_steps", steps))  # older checkpoints do not hold the number
