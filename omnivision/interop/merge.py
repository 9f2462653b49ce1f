"""Merging of a learned average of checkpoints into one ordinary classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from omnivision.checkpoint.pretrained import LoadReport, filter_state_dict
from omnivision.checkpoint.state_dict_file import StateDictFile, read_several
from omnivision.config.schema import WeightFilter
from omnivision.interop.architecture import check_fit
from omnivision.interop.export import check_finite, random_clip
from omnivision.interop.formats import from_ours
from omnivision.models.architecture import Architecture, build, describe
from omnivision.models.average import AveragedClassifier
from omnivision.utils.errors import UserError

ATOL = 1e-6


class Merged(NamedTuple):
    """A classifier in our names, its architecture, and the largest difference of its scores from the average's."""

    state: dict[str, Tensor]
    architecture: Architecture
    difference: float


def read_sources(noted: Any, given: Sequence[str] | None) -> list[StateDictFile]:
    """Read the models of an average: those that its checkpoint notes, or the same at the paths `given`.

    Args:
        noted: `sources` of the checkpoint, a list of {"path", "sha256", "choice"}.

    Raises UserError when one is missing, or its SHA-256 differs from the noted one.
    """
    if not isinstance(noted, (list, tuple)) or not noted or not all(_is_note(note) for note in noted):
        raise UserError(
            "The checkpoint must note its sources (path and SHA-256), as those of a model vit*_average_ft do. Give such a one."
        )
    paths = list(given) if given else [note["path"] for note in noted]
    for path in paths:
        if not Path(path).exists():
            raise UserError(
                f"{path}, a source of the average, does not exist (relative paths start at {Path.cwd()}). Give the "
                f"{len(noted)} checkpoints in this order: omnivision export --merge --sources "
                f"{' '.join(['FILE'] * len(noted))}."
            )
    # One file may hold them all, as a list.
    found = read_several(paths[0] if len(set(paths)) == 1 else paths)
    for note, weights in zip(noted, found, strict=False):
        if weights.sha256 != note["sha256"]:
            raise UserError(
                f"{weights.path} must have the SHA-256 {note['sha256'][:12]}... of the source {note['path']}, got "
                f"{weights.sha256[:12]}... Set --sources to the checkpoints of the average, unchanged and in order."
            )
    if len(found) != len(noted):
        raise UserError(f"The average has {len(noted)} sources, got {len(found)} checkpoints. Set --sources.")
    return [_filter(weights, note.get("choice")) for weights, note in zip(found, noted, strict=True)]


def _filter(weights: StateDictFile, noted: Any) -> StateDictFile:
    """Take of a checkpoint what the average took. Raises UserError for a note that is no WeightFilter."""
    if noted is None:
        return weights
    try:
        choice = WeightFilter.model_validate(noted)
    except ValidationError as error:
        raise UserError(
            f"The checkpoint must note its WeightFilter of {weights.path} (`choice` under `sources`), got: {error}."
        ) from None
    report = LoadReport(str(weights.path), weights.sha256)
    return replace(weights, state=filter_state_dict(weights.state, choice, report))


@torch.no_grad()
def merge(state: Mapping[str, Tensor], architecture: Mapping[str, Any], sources: Sequence[StateDictFile]) -> Merged:
    """Replace an average by one trunk, and compare scores on a random clip.

    Args:
        state: of an `AveragedClassifier`.
        architecture: of its checkpoint.

    Raises UserError when the parts do not fit, or when the merged model computes other scores.
    """
    ratio = state.get("mixing_ratio")
    if ratio is None or ratio.ndim not in (1, 2) or ratio.shape[-1] != len(sources):
        found = "none" if ratio is None else f"the shape {tuple(ratio.shape)}"
        raise UserError(f"mixing_ratio must hold weights of {len(sources)} sources, got {found}. Set --sources.")
    # The first source determines the architecture; only then is anything of that size allocated. An average takes only its own
    # parameters of a source, which may also have a decoder, depth, and positions of another clip size.
    said = architecture.get("trunk", {})
    depth = isinstance(said, Mapping) and bool(said.get("rgbd"))
    drop = ("trunk.decoder.", "trunk.mask_token") + (() if depth else ("trunk.depth_patch_embed.",))
    trunk = {name: tensor for name, tensor in sources[0].state.items() if name.startswith("trunk.")}
    first = {name: tensor for name, tensor in trunk.items() if not name.startswith(drop)}
    own = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    single = from_ours(first | own, {"trunk": said}).architecture
    mode = "learned_average_softmax" if ratio.ndim == 1 else "learned_average_layer_softmax"
    average = build(single | {"kind": "average", "num_models": len(sources), "combine_mode": mode}, "The checkpoint")
    assert isinstance(average, AveragedClassifier)
    check_fit(state, average.state_dict())
    average.load_state_dict(dict(state))
    average.load_sources([source.state for source in sources], [str(source.path) for source in sources])
    one = build(single, "The checkpoint")
    one.load_state_dict(average.merged())
    clip, heads = random_clip(single), range(len(single["classes"]))
    wanted = [average.eval()(clip, head) for head in heads]
    check_finite(*wanted)
    differences = [(one.eval()(clip, head) - wanted[head]).abs().max() for head in heads]
    difference = float(torch.stack(differences).max())
    if not difference <= ATOL:
        raise UserError(
            f"The merged model must give the average's scores to {ATOL:g}, got a difference of {difference:.3g}. Nothing was "
            "written; please report it."
        )
    return Merged(one.state_dict(), describe(one), difference)


def _is_note(note: Any) -> bool:
    return isinstance(note, Mapping) and all(isinstance(note.get(key), str) for key in ("path", "sha256"))
