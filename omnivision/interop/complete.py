"""One complete model from a weights file of this project: its EMA, the merged average, the selected probe of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from omnivision.checkpoint.checkpointer import load_model
from omnivision.checkpoint.state_dict_file import StateDictFile, check_numbers
from omnivision.interop.formats import ConvertedCheckpoint, convert_state_dict
from omnivision.interop.merge import merge
from omnivision.models.architecture import architecture_of, from_architecture
from omnivision.models.attentive import AttentiveClassifier
from omnivision.utils.errors import UserError


def complete_model(
    file: StateDictFile, weights: Literal["model", "ema"] | None = None, sources: Sequence[str] | None = None
) -> tuple[ConvertedCheckpoint, list[str]]:
    """Return the complete model of a file of ours; a learned average is merged. Also return lines about its sources.

    Args:
        weights: "model" or "ema", see `StateDictFile.with_weights`.
        sources: an average's sources, if they are no longer where its checkpoint says.
    """
    if not file.architecture:
        raise UserError(
            f"{file.path} has no architecture, so it is not from a run of this project. Convert it first: omnivision import "
            f"{file.path} OUT.pt"
        )
    lines: list[str] = []
    try:
        file = file.with_weights(weights)
        if file.architecture.get("kind") == "average":
            file, averaged, difference = merge(file, sources)
            lines = [f"Averages {source}" for source in averaged]
            scores = f"scores of a random clip differ by {difference:.1g} from the average's"
            lines.append(f"Merged {len(averaged)} checkpoints; {scores}")
        if file.architecture.get("kind") == "attentive":
            return selected_probe(file), lines
        return convert_state_dict("omnivision", file.state, file.architecture), lines
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None


def selected_probe(file: StateDictFile) -> ConvertedCheckpoint:
    """Return the trunk with the probe of its grid that was selected. Raises UserError for an incomplete model."""
    check_numbers(file.state)
    model = from_architecture(dict(file.architecture), str(file.path))
    assert isinstance(model, AttentiveClassifier)
    load_model(model, file.state, file.path)
    number = int(model.selected)
    if not 0 <= number < len(model.grid):
        raise UserError(f"selected must be one of the {len(model.grid)} probes, got {number}.")
    lr, weight_decay = model.grid[number]
    model.probes = nn.ModuleList([model.probes[number]])
    model.architecture |= {"lr_factors": [lr], "weight_decay_factors": [weight_decay]}
    model.selected.zero_()
    return ConvertedCheckpoint(model.state_dict(), architecture_of(model), {}, {}, {}, [])
