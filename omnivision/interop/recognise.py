"""Whose names the entries of a state dict have."""

from __future__ import annotations

import re
from collections.abc import Collection

from omnivision.utils.errors import UserError

_LEAF = r"(weight|bias)"
_BLOCK = rf"\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.{_LEAF}"
_CROSS_BLOCK = rf"\d+\.(norm[12]|norm_memory|attn\.(q|kv|proj)|mlp\.fc[12])\.{_LEAF}"
_TRUNK = (
    rf"trunk\.(pos_embed|mask_token|norm\.{_LEAF}|(depth_)?patch_embed\.proj\.1\.{_LEAF}|blocks\.{_BLOCK}"
    rf"|decoder\.(pos_embed|(decoder_embed|norm)\.{_LEAF}|decoder_blocks\.({_BLOCK}|{_CROSS_BLOCK})))"
)
_HF_LAYER = (
    rf"\d+\.(layernorm_(before|after)\.{_LEAF}|(intermediate|output|attention\.output)\.dense\.{_LEAF}"
    rf"|attention\.attention\.((query|key|value)\.{_LEAF}|[qv]_bias))"
)
_VIDEOMAE = rf"pos_embed|norm\.{_LEAF}|patch_embed\.proj\.{_LEAF}|blocks\.({_BLOCK}|\d+\.attn\.[qv]_bias)"

# Every name that a format has; a file is of a format when all its names are. "omnivision" is also what PPMA has.
FORMATS = {
    "omnivision": re.compile(rf"{_TRUNK}|heads\.(\d+\.0|0\.projector)\.{_LEAF}"),
    "omnimae": re.compile(rf"{_TRUNK}|head\.{_LEAF}"),
    "videomae": re.compile(
        rf"{_VIDEOMAE}|(fc_norm|head)\.{_LEAF}|encoder\.({_VIDEOMAE})|mask_token|encoder_to_decoder\.weight"
        rf"|decoder\.({_VIDEOMAE}|head\.{_LEAF})"
    ),
    "hf": re.compile(
        rf"(videomae\.)?(embeddings\.patch_embeddings\.projection\.{_LEAF}|encoder\.layer\.{_HF_LAYER}|layernorm\.{_LEAF})"
        rf"|(fc_norm|classifier)\.{_LEAF}|mask_token|encoder_to_decoder\.weight"
        rf"|decoder\.((norm|head)\.{_LEAF}|decoder_layers\.{_HF_LAYER})"
    ),
}


# What a user may say; PPMA's files have our names, but do not say their architecture.
CHOICES = ("auto", "omnivision", "ppma", "omnimae", "videomae", "hf")


def recognise(names: Collection[str], choice: str = "auto") -> str:
    """The format, a key of FORMATS, that all `names` belong to; `choice` (of CHOICES) allows one alone.

    Raises UserError, with the nearest format and the first names that are not of it, when there is none.
    """
    if "mixing_ratio" in names:
        raise UserError(
            "The checkpoint is of a learned average, which holds no trunk of its own. Make it one model first: "
            "omnivision export CHECKPOINT OUT.pt --to pt --merge."
        )
    unknown = {format: [name for name in names if not pattern.fullmatch(name)] for format, pattern in FORMATS.items()}
    nearest = min(unknown, key=lambda format: len(unknown[format]))
    format = {"auto": nearest, "ppma": "omnivision"}.get(choice, choice)
    others = unknown[format]
    if not others:
        return format
    if len(others) == len(names):
        why = f"None of its {len(names)} entries has a name of {'any known format' if choice == 'auto' else choice}"
    else:
        why = f"It is {'most like' if choice == 'auto' else 'not of --format'} {format if choice == 'auto' else choice}"
        why += f": {len(others)} of {len(names)} entries are unknown there"
    advice = f" All names are of --format {nearest}." if not unknown[nearest] else ""
    raise UserError(
        f"{why}: {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}.{advice} Expected weights of one of "
        f"{', '.join(CHOICES[1:])} (see docs/interchange.md); nothing is left out that is not understood."
    )
