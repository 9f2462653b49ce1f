"""A learned average of checkpoints becomes one ordinary classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omnivision.checkpoint.pretrained import LoadReport, WeightFilter, filter_state_dict
from omnivision.checkpoint.weight_files import StateDictFile, read_several
from omnivision.interop.geometry import check_fit
from omnivision.interop.proof import check_finite, random_clip
from omnivision.interop.published import from_ours
from omnivision.models.architecture import Architecture, build, describe
from omnivision.models.average import AveragedClassifier
from omnivision.utils.errors import UserError

SAME = 1e-6


class Merged(NamedTuple):
    """A classifier in our names, its architecture, and by how much its scores of a random clip differ from the average's."""

    state: dict[str, Tensor]
    architecture: Architecture
    difference: float


def read_sources(noted: Any, given: Sequence[str] | None) -> list[StateDictFile]:
    """The models that an average is made of: those that its checkpoint notes, or the same from the paths `given`.

    Args:
        noted: `sources` of the checkpoint, a list of {"path", "sha256", "choice"}.

    Raises UserError when one is not there, or has another SHA-256 than is noted.
    """
    if not isinstance(noted, (list, tuple)) or not noted or not all(_is_note(note) for note in noted):
        raise UserError(
            "The checkpoint does not note what it is an average of (path and SHA-256 under `sources`). Expected a checkpoint "
            "of a run with a model vit*_average_ft. Give that one."
        )
    paths = list(given) if given else [note["path"] for note in noted]
    for path in paths:
        if not Path(path).exists():
            raise UserError(
                f"{path}, which the average is made of, is not there (relative paths start at {Path.cwd()}). Give the "
                f"{len(noted)} checkpoints where they are now, in this order: omnivision export --merge --sources "
                f"{' '.join(['FILE'] * len(noted))}."
            )
    # One file may hold them all, as a list.
    found = read_several(paths[0] if len(set(paths)) == 1 else paths)
    for note, weights in zip(noted, found, strict=False):
        if weights.sha256 != note["sha256"]:
            raise UserError(
                f"{weights.path} is not what the average was trained on: its SHA-256 is {weights.sha256[:12]}..., noted is "
                f"{note['sha256'][:12]}... ({note['path']}). Give the checkpoints as they were then, in that order: --sources."
            )
    if len(found) != len(noted):
        raise UserError(
            f"There are {len(found)} checkpoints, and the average is made of {len(noted)}. Give as many: --sources."
        )
    return [_chosen(weights, note.get("choice")) for weights, note in zip(found, noted, strict=True)]


def _chosen(weights: StateDictFile, choice: Any) -> StateDictFile:
    """What the average took of a checkpoint, under the names that it gave. Raises UserError for a note that is no choice."""
    if choice is None:  # nothing is noted
        return weights
    try:
        taken = filter_state_dict(weights.state, WeightFilter(**choice), LoadReport(str(weights.path), weights.sha256))
    except (TypeError, AttributeError) as error:
        raise UserError(
            f"The checkpoint does not note properly what it took of {weights.path} (`choice` under `sources`: {error}). "
            "Expected a checkpoint of a run with a model vit*_average_ft. Give that one."
        ) from None
    return replace(weights, state=taken)


@torch.no_grad()
def merge(state: Mapping[str, Tensor], architecture: Mapping[str, Any], sources: Sequence[StateDictFile]) -> Merged:
    """Put the averaged trunk in the place of the average, and compare scores.

    Args:
        state: of an `AveragedClassifier`.
        architecture: what its checkpoint says of it.

    Raises UserError when the parts do not fit, or when the one model does not compute what the average does.
    """
    ratio = state.get("mixing_ratio")
    if ratio is None or ratio.ndim not in (1, 2) or ratio.shape[-1] != len(sources):
        found = "none" if ratio is None else f"the shape {tuple(ratio.shape)}"
        raise UserError(
            f"The checkpoint has mixing_ratio of {found}; expected weights of {len(sources)} sources. Give a checkpoint of an "
            "average, and as many --sources as it was made of."
        )
    # The first source has all that tells the architecture; only then is anything of that size made. An average takes no
    # more than its own parameters of a source, which may have a decoder, depth, and positions of another clip size beside.
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
    if not difference <= SAME:
        raise UserError(
            f"The merged model does not compute what the average does: scores differ by up to {difference:.3g}, expected at "
            f"most {SAME:g}. Nothing was written; please report it."
        )
    return Merged(one.state_dict(), describe(one), difference)


def _is_note(note: Any) -> bool:
    return isinstance(note, Mapping) and all(isinstance(note.get(key), str) for key in ("path", "sha256"))
