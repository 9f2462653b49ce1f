"""State dicts of PPMA, of OmniMAE as Meta published it, and of VideoMAE's own repository, in our names.

Sources: github.com/howardzh01/PPMA, facebookresearch/omnivore (omnimae/), MCG-NJU/VideoMAE (modeling_pretrain.py and
modeling_finetune.py); read for names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from omnivision.checkpoint.weight_files import check_numbers
from omnivision.interop.geometry import Given, tokens_of
from omnivision.interop.intake import Imported, Intake
from omnivision.models.patches import sinusoid_positions

NO_COUNTERPART = "its decoder adds positions after its projection, ours before"  # on the way out
# What published VideoMAE decoders of a width have (OmniMAE's of the same width have others).
_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}
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
    """VideoMAE's own: pretrained (encoder and decoder) or fine-tuned (mean of tokens, norm, head).

    It has biases for q and v alone. A head that reads the first token instead of the mean (`norm` in place of `fc_norm`) is
    dropped.
    """
    intake = Intake(dict(state))
    encoder = "encoder." if any(name.startswith("encoder.") for name in state) else ""
    intake.rename(f"{encoder}patch_embed.proj.", "trunk.patch_embed.proj.1.")
    take_decoder(intake, "decoder.blocks.0.mlp.fc1.weight")
    for blocks, ours in ((f"{encoder}blocks.", "trunk.blocks."), ("decoder.blocks.", "trunk.decoder.decoder_blocks.")):
        for number in intake.numbers(blocks):
            old, new = f"{blocks}{number}.", f"{ours}{number}."
            biases = [f"{old}attn.{part}_bias" for part in "qkv"]
            if biases[0] in state or biases[2] in state:
                intake.join(biases, f"{new}attn.qkv.bias", zeros_where_missing=True)
            elif f"{old}attn.qkv.weight" in state:
                intake.fill(f"{new}attn.qkv.bias", 0, state[f"{old}attn.qkv.weight"], "not in the file")
        intake.rename(blocks, ours)
    intake.rename(f"{encoder}pos_embed", "trunk.pos_embed")
    if "fc_norm.weight" in state:
        intake.rename("fc_norm.", "trunk.norm.")
        intake.rename("head.", "heads.0.0.")
    else:
        intake.rename(f"{encoder}norm.", "trunk.norm.")
        intake.drop("head.", FIRST_TOKEN)
    return finish_videomae(intake, {}, given or Given())


def take_decoder(intake: Intake, first_mlp: str) -> None:
    """Rename what surrounds the blocks of a VideoMAE decoder, or drop the decoder where ours cannot compute the same.

    Args:
        intake: its patch embedding is renamed already, the blocks of its decoder are not.
        first_mlp: the weight of the first layer of the first block's MLP.

    Theirs projects tokens, W x, and then adds a mask token and positions of its own width; ours adds both before the
    projection. W has more columns than rows, so what they are before it can be solved for, and outputs stay the same.
    """
    if why := _why_dropped(intake, first_mlp):
        for name in ("decoder.", "encoder_to_decoder.", "mask_token"):
            intake.drop(name, why)
        return
    projection, token = intake.left["encoder_to_decoder.weight"], intake.left.pop("mask_token")
    intake.state["trunk.mask_token"] = _unproject(token.reshape(1, -1), projection).to(token.dtype)
    intake.made["trunk.mask_token"] = "mask_token, before the projection"
    intake.rename("encoder_to_decoder.", "trunk.decoder.decoder_embed.")
    intake.fill("trunk.decoder.decoder_embed.bias", 0, projection, "not in the file")
    intake.rename("decoder.norm.", "trunk.decoder.norm.")
    intake.rename("decoder.head.", "heads.0.projector.")


def finish_videomae(intake: Intake, said: Mapping[str, Any], given: Given) -> Imported:
    """Check the model, with the heads that published decoders have where nobody says them, and make its decoder's positions."""
    projection = intake.state.get("trunk.decoder.decoder_embed.weight")
    if projection is None:
        return intake.done(said, given)
    usual = None if "decoder" in said or given.decoder_heads else _DECODER_HEADS.get(len(projection))
    imported = intake.done(said, replace(given, decoder_heads=usual) if usual else given)
    positions = sinusoid_positions(tokens_of(imported.architecture["trunk"]), len(projection))
    imported.state["trunk.decoder.pos_embed"] = _unproject(positions[0], projection)[None]
    made = {**imported.made, "trunk.decoder.pos_embed": "the fixed table of its width, before the projection"}
    assumed = [*imported.assumed, f"--decoder-heads {usual}"] if usual else imported.assumed
    return replace(imported, made=made, assumed=assumed)


def _why_dropped(intake: Intake, first_mlp: str) -> str:
    """Why a file's decoder cannot be kept; empty if it can. Raises UserError for a projection that is no finite numbers."""
    matrices = ("encoder_to_decoder.weight", first_mlp, "decoder.head.weight")
    patch = intake.state.get("trunk.patch_embed.proj.1.weight")
    others = all(name in intake.left for name in ("mask_token", "decoder.norm.weight"))
    if patch is None or not others or any(getattr(intake.left.get(name), "ndim", 0) != 2 for name in matrices):
        return "parts of the decoder are missing"
    projection, mlp, head = (intake.left[name] for name in matrices)
    (width, trunk_width), pixels = projection.shape, patch[0].numel()
    if len(mlp) != 4 * width or len(head) != pixels:
        return f"its MLP is {len(mlp)} wide, ours {4 * width}; it predicts {len(head)} values of a patch, ours {pixels}"
    check_numbers({matrices[0]: projection})
    if width > trunk_width or int(torch.linalg.matrix_rank(projection.double(), rtol=1e-4)) < width:
        return "its projection cannot be undone, and ours adds positions before it"
    return ""


def _unproject(rows: Tensor, projection: Tensor) -> Tensor:
    """The shortest rows (N, trunk width), float32, that a projection (width, trunk width) maps to `rows` (N, width)."""
    return (rows.double() @ torch.linalg.pinv(projection.double()).T).float()
