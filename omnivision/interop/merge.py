"""Merging a learned average of checkpoints into an ordinary classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, NamedTuple, NotRequired

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import TypedDict

from omnivision.checkpoint.checkpointer import load_model
from omnivision.checkpoint.pretrained import LoadReport, filter_state_dict
from omnivision.checkpoint.state_dict_file import StateDictFile, read_several
from omnivision.config.schema import WeightFilter
from omnivision.interop.formats import convert_state_dict
from omnivision.models.architecture import Architecture, architecture_of, from_architecture
from omnivision.models.average import AveragedClassifier
from omnivision.utils.errors import UserError

ATOL = 1e-6


class SourceNote(TypedDict):
    """What an average's checkpoint records about each source (`LoadReport.identity`)."""

    path: str
    sha256: str
    choice: NotRequired[WeightFilter | None]


class Merged(NamedTuple):
    """A file with one classifier replacing an average, the averaged files, and the largest difference of scores."""

    file: StateDictFile
    sources: list[StateDictFile]
    difference: float


def read_sources(noted: Any, given: Sequence[str] | None) -> list[StateDictFile]:
    """Read the models of an average from the paths in its checkpoint, or from the paths `given`.

    Args:
        noted: `sources` of the checkpoint, a list of `SourceNote`.

    Raises UserError when one is missing, or its SHA-256 differs from the recorded one.
    """
    try:
        notes = TypeAdapter(Annotated[list[SourceNote], Field(min_length=1)]).validate_python(noted)
    except ValidationError as error:
        raise UserError(
            f"The checkpoint must note its sources (path, SHA-256, filter): {' '.join(str(error).split())}"
        ) from None
    paths = list(given) if given else [note["path"] for note in notes]
    advice = (
        f"Give the {len(notes)} checkpoints of the average, unchanged and in order: --sources{' FILE' * len(notes)}."
    )
    try:
        # One file may hold all of them, as a list.
        files = read_several(paths[0] if len(set(paths)) == 1 else paths)
    except UserError as error:
        raise UserError(f"A source of the average cannot be read: {error} {advice}") from None
    if [weights.sha256 for weights in files] != [note["sha256"] for note in notes]:
        pairs = [f"{weights.path} ({weights.sha256[:12]})" for weights in files]
        wanted = [f"{note['path']} ({note['sha256'][:12]})" for note in notes]
        raise UserError(f"The sources must have the SHA-256 of {', '.join(wanted)}; got {', '.join(pairs)}. {advice}")
    sources = []
    for weights, note in zip(files, notes, strict=True):
        report = LoadReport(str(weights.path), weights.sha256)
        choice = note.get("choice") or WeightFilter()
        sources.append(replace(weights, state=filter_state_dict(weights.state, choice, report)))
    return sources


@torch.no_grad()
def merge(file: StateDictFile, paths: Sequence[str] | None = None) -> Merged:
    """Replace an average (`AveragedClassifier`) by a classifier with one trunk, and compare scores on a random clip.

    Args:
        paths: the sources, if they are no longer where the checkpoint says.

    Raises UserError when the parts do not fit, or when the merged model computes other scores.
    """
    state, sources = file.state, read_sources(file.metadata.get("sources"), paths)
    # Infer the architecture from the first source before anything of that size is allocated. An average takes only its own
    # parameters from a source, which may also have a decoder, depth, and positions for another clip size.
    trunk = file.architecture.get("trunk", {})
    depth = isinstance(trunk, Mapping) and bool(trunk.get("rgbd"))
    drop = ("trunk.decoder.", "trunk.mask_token") + (() if depth else ("trunk.depth_patch_embed.",))
    first = {n: t for n, t in sources[0].state.items() if n.startswith("trunk.") and not n.startswith(drop)}
    own = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    single = convert_state_dict("omnivision", first | own, {"trunk": trunk}).architecture
    mixing = {"num_models": len(sources), "combine_mode": file.architecture.get("combine_mode")}
    average = from_architecture(single | {"kind": "average"} | mixing, "The checkpoint")
    assert isinstance(average, AveragedClassifier)
    load_model(average, dict(state), "The checkpoint")
    average.load_sources([source.state for source in sources], [str(source.path) for source in sources])
    one = from_architecture(single, "The checkpoint")
    one.load_state_dict(average.merged())
    clip, heads = random_clip(single), range(len(single["classes"]))
    scores = torch.cat([average.eval()(clip, head) for head in heads], 1)
    require_finite_outputs(scores)
    difference = float((torch.cat([one.eval()(clip, head) for head in heads], 1) - scores).abs().max())
    if not difference <= ATOL:
        raise UserError(
            f"The merged model must give the average's scores to {ATOL:g}, got a difference of {difference:.3g}. Nothing was "
            "written; please report it."
        )
    metadata = {**file.metadata, "architecture": architecture_of(one)}
    return Merged(replace(file, state=one.state_dict(), metadata=metadata), sources, difference)


def random_clip(architecture: Architecture) -> Tensor:
    """Return normalized noise of the model's clip size, (1, 3, T, S, S), always the same."""
    trunk = architecture["trunk"]
    size = (1, 3, trunk["num_frames"], trunk["image_size"], trunk["image_size"])
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def require_finite_outputs(*outputs: Tensor) -> None:
    """Raise UserError for a model whose outputs are not finite."""
    if not all(output.isfinite().all() for output in outputs):
        raise UserError(
            "The model computes infinite values or NaN for a random clip: its training diverged. Nothing was written. Give an "
            "earlier checkpoint."
        )
