"""The weights that a run starts from: its own checkpoint, pretrained weights, or checkpoints to average."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from omnivision.checkpoint.pretrained import (
    LoadReport,
    filter_state_dict,
    head_of,
    interpolate_pos_embed,
    load_filtered,
    name_setting,
)
from omnivision.checkpoint.state_dict_file import StateDictFile, check_numbers, read_several, read_weights
from omnivision.config.schema import Settings
from omnivision.interop.merge import merge
from omnivision.models.average import AveragedClassifier
from omnivision.training import build
from omnivision.training.trainer import Trainer
from omnivision.utils.errors import UserError
from omnivision.utils.io import LATEST

POS_EMBED = "trunk.pos_embed"


def load_initial_weights(settings: Settings, trainer: Trainer) -> list[LoadReport]:
    """Resume if the run directory has a checkpoint, else load pretrained weights; return a report for each of their files.

    Raises UserError if the weights do not fit, or if there is nothing to validate.
    """
    info = trainer.context.reporter.info
    run_dir = trainer.context.run_dir
    averaged = []
    if isinstance(trainer.raw_model, AveragedClassifier):
        trainer.context.averaged_checkpoints = averaged = load_averaged_checkpoints(settings, trainer.raw_model)
    for report in averaged:
        info(f"Averages {report.path} (SHA-256 {report.sha256[:12]}...)")
    validates = settings.trainer.mode == "val"
    if trainer.load_checkpoint(build.resolve_class_names(settings)):
        if validates:
            check_scales(settings, trainer.context.run_dir.checkpoints / LATEST)
        return []
    if validates and (averaged or settings.pretrained_checkpoint_path is None):
        advice = "set pretrained_checkpoint_path, or train first"
        if averaged:  # they have no head
            advice = "set trainer/model=vit*_ft trainer/checkpoint=load_all pretrained_checkpoint_path=THE_RUN"
        raise UserError(
            f"trainer.mode=val found no checkpoint in {run_dir.checkpoints}. Set launcher.experiment_log_dir, or {advice}."
        )
    reports = averaged or load_pretrained(settings, trainer.raw_model)
    for line in [line for report in reports for line in report.lines()]:
        info(line)
    if not validates and any(head_of(name) >= 0 for report in reports for name in report.loaded):
        info("The heads of the checkpoint are also loaded; trainer/checkpoint=no_heads leaves them out.")
    if trainer.ema is not None:
        trainer.ema.reset_to_weights()
    return reports


def load_pretrained(settings: Settings, model: nn.Module) -> list[LoadReport]:
    """Load `pretrained_checkpoint_path` into a model; return a report of its entries, or none without a path."""
    pretrained = settings.pretrained_checkpoint_path
    if pretrained is None:
        return []
    assert isinstance(pretrained, str)  # a list is for an average
    with name_setting():
        [weights] = read_several([pretrained])
    if weights.architecture.get("kind") == "average":  # merge it into a single model
        weights = merge(weights).file
    report = load_filtered(model, weights, settings.trainer.checkpoint, build.resolve_class_names(settings))
    if any(head_of(name) >= 0 for name in report.loaded):
        check_scales(settings, Path(pretrained))
    if settings.trainer.mode == "val" and (lacking := [name for name in report.missing if head_of(name) >= 0]):
        raise UserError(
            f"trainer.mode=val evaluates {report.path}, but its heads were not loaded ({lacking[0]}). Expected a checkpoint of "
            "this model, loaded completely: trainer/checkpoint=load_all."
        )
    return [report]


def check_scales(settings: Settings, path: Path) -> None:
    """Raise UserError if loaded heads are for a regression and these are not, or standardize its targets otherwise."""
    current, saved = build.build_inference_config(settings), read_weights(path).inference
    if "regression" not in (current.label_type, saved.label_type):
        return
    wrong = [name for name, scale in current.scales().items() if saved.scales().get(name, scale) != scale]
    if saved.label_type != current.label_type:
        raise UserError(
            f"{path} must be of a run with label_type {current.label_type}, got {saved.label_type}. Set another checkpoint, or "
            "trainer/checkpoint=no_heads for a new head."
        )
    if wrong:
        raise UserError(
            f"{path} must standardize the targets as this run does ({current.scales()}), got {saved.scales()}. "
            "Set label_mean and label_std in the catalog entry, or trainer/checkpoint=no_heads for a new head."
        )


def load_averaged_checkpoints(settings: Settings, model: AveragedClassifier) -> list[LoadReport]:
    """Load the source checkpoints of a learned average; return a report for each."""
    if settings.pretrained_checkpoint_path is None:
        raise UserError(
            "An average needs checkpoints, but pretrained_checkpoint_path is null. Set ++pretrained_checkpoint_path=[A,B], "
            "or one file with a list under ensemble_weights."
        )
    with name_setting():
        checkpoints = read_several(settings.pretrained_checkpoint_path)
    reports = [LoadReport(str(w.path), w.sha256, w.checkpoint) for w in checkpoints]
    states = [
        filter_state_dict(w.state, settings.trainer.checkpoint, report)
        for w, report in zip(checkpoints, reports, strict=True)
    ]
    taken = {f"trunk.{name}" for name in model.names}
    for state, report in zip(states, reports, strict=True):
        used = {name: tensor for name, tensor in state.items() if name in taken | {POS_EMBED}}
        check_numbers(used, f"pretrained_checkpoint_path: {report.path}: ")
    model.load_sources(states, [report.path for report in reports])
    taken |= _take_positions(model, checkpoints, states, reports)
    for state, report in zip(states, reports, strict=True):
        report.loaded = sorted(taken)
        report.dropped |= dict.fromkeys(sorted(state.keys() - taken), "an average takes only trunks")
    return reports


def _take_positions(
    model: AveragedClassifier,
    checkpoints: list[StateDictFile],
    states: list[dict[str, Tensor]],
    reports: list[LoadReport],
) -> set[str]:
    """Load the positional embedding of the sources, interpolated if needed; return its name, if they have one.

    Raises UserError when the sources' embeddings differ.
    """
    if not all(POS_EMBED in state for state in states):
        return set()
    own = model.model.get_buffer(POS_EMBED)
    tables = [
        interpolate_pos_embed(POS_EMBED, state[POS_EMBED], model.model, weights, report)
        for state, weights, report in zip(states, checkpoints, reports, strict=True)
    ]
    # A table of another width is returned unchanged.
    if not all(t.shape == own.shape and torch.allclose(t.float(), tables[0].float(), atol=1e-3) for t in tables):
        raise UserError(
            f"The checkpoints to average have different positions ({POS_EMBED}), or not the model's: "
            f"{', '.join(report.path for report in reports)}. Expected trunks trained on clips of one size and "
            "number of frames. Change pretrained_checkpoint_path."
        )
    own.copy_(tables[0])
    return {POS_EMBED}
