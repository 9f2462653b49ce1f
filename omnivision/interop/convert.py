"""Weights of any known format, in our names."""

from __future__ import annotations

from dataclasses import replace

from omnivision.checkpoint.weight_files import StateDictFile, strip_wrappers
from omnivision.interop.geometry import Given
from omnivision.interop.huggingface import from_hf
from omnivision.interop.intake import Imported
from omnivision.interop.published import from_omnimae, from_ours, from_videomae
from omnivision.interop.recognise import recognise
from omnivision.utils.errors import UserError


def convert(source: StateDictFile, format: str = "auto", given: Given | None = None) -> tuple[Imported, str]:
    """The model of a file, and the format that it was found to have.

    Args:
        format: one of CHOICES.
        given: what the user says of the model where the file does not.

    Raises UserError, beginning with the file, for what is not understood as a whole.
    """
    source.refuse_own_class()
    try:
        source = replace(source, state=strip_wrappers(source.state, "model."))  # of a training module around the model
        found = recognise(source.state, format)
        if found == "omnimae":
            return from_omnimae(source.state, given), found
        if found == "videomae":
            return from_videomae(source.state, given), found
        if found == "hf":
            return from_hf(source.state, source.config, given), found
        return from_ours(source.state, source.architecture, given), found if source.architecture else "ppma"
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from None
