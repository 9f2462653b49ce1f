"""State dicts of PPMA, of OmniMAE as Meta published it, and of VideoMAE's own repository, in our names.

Sources: github.com/howardzh01/PPMA, facebookresearch/omnivore (omnimae/), MCG-NJU/VideoMAE (modeling_pretrain.py and
modeling_finetune.py); read for names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from omnivision.interop.geometry import Given
from omnivision.interop.intake import Imported, Intake

NO_COUNTERPART = "a decoder of another kind"
FIRST_TOKEN = "it reads the first token, ours the mean of all"
_NOBODY_SAYS: Mapping[str, Any] = {}


def from_ours(
    state: Mapping[str, Tensor], said: Mapping[str, Any] = _NOBODY_SAYS, given: Given | None = None
) -> Imported:
    """A state dict in our names, which are PPMA's too: checked, and completed where position tables are missing.

    Args:
        said: the architecture, or what is known of it.
        given: what a user says where nothing is known.

    Raises UserError, as all functions here, when the tensors do not make one whole model.
    """
    intake = Intake(dict(state))
    intake.keep()
    return intake.done(said, given or Given())


def from_omnimae(state: Mapping[str, Tensor], given: Given | None = None) -> Imported:
    """OmniMAE's: our names but for the one head; its decoder's attention has no biases for q, k and v, so ours are zero."""
    intake = Intake(dict(state))
    pretraining = any(name.startswith("trunk.decoder.") for name in state)
    intake.rename("head.", "heads.0.projector." if pretraining else "heads.0.0.")
    intake.keep()
    for name in [
        name for name in state if re.fullmatch(r"trunk\.decoder\.decoder_blocks\.\d+\.attn\.qkv\.weight", name)
    ]:
        bias = name.removesuffix("weight") + "bias"
        if bias not in state:
            intake.fill(bias, 0, state[name], "not in the file")
    return intake.done({}, given or Given())


def from_videomae(state: Mapping[str, Tensor], given: Given | None = None) -> Imported:
    """VideoMAE's own: pretrained (encoder, with a decoder of another kind) or fine-tuned (mean of tokens, norm, head).

    It has biases for q and v alone. A head that reads the first token instead of the mean (`norm` in place of `fc_norm`) is
    dropped.
    """
    intake = Intake(dict(state))
    encoder = "encoder." if any(name.startswith("encoder.") for name in state) else ""
    for name in ("decoder.", "encoder_to_decoder.", "mask_token"):
        intake.drop(name, NO_COUNTERPART)
    for number in intake.numbers(f"{encoder}blocks."):
        old, new = f"{encoder}blocks.{number}.", f"trunk.blocks.{number}."
        biases = [f"{old}attn.{part}_bias" for part in "qkv"]
        if biases[0] in state or biases[2] in state:
            intake.join(biases, f"{new}attn.qkv.bias", zeros_where_missing=True)
        elif f"{old}attn.qkv.weight" in state:
            intake.fill(f"{new}attn.qkv.bias", 0, state[f"{old}attn.qkv.weight"], "not in the file")
    intake.rename(f"{encoder}blocks.", "trunk.blocks.")
    intake.rename(f"{encoder}patch_embed.proj.", "trunk.patch_embed.proj.1.")
    intake.rename(f"{encoder}pos_embed", "trunk.pos_embed")
    if "fc_norm.weight" in state:
        intake.rename("fc_norm.", "trunk.norm.")
        intake.rename("head.", "heads.0.0.")
    else:
        intake.rename(f"{encoder}norm.", "trunk.norm.")
        intake.drop("head.", FIRST_TOKEN)
    return intake.done({}, given or Given())
