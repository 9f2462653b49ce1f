"""The architecture of a state dict in our names: from its shapes, from what its file says, and from the user.

Shapes determine neither the number of attention heads nor how positions are spread over frames and sides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnivision.models.architecture import Architecture, build, describe
from omnivision.models.patches import sinusoid_positions
from omnivision.utils.errors import UserError

# Of published models, by width; assumed, and reported, where neither the file nor the user says.
TYPICAL_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
TYPICAL_DECODER_HEADS = {384: 16, 512: 16}
TYPICAL_FRAMES, TYPICAL_SIZE = 16, 224
# A file that claims more is damaged, and its position table would fill the memory.
MAX_DIM, MAX_TOKENS = 65536, 2**20


@dataclass(frozen=True)
class ArchOverrides:
    """Numbers that a user gives because a file lacks them; None where the user gives none."""

    heads: int | None = None
    num_frames: int | None = None
    image_size: int | None = None
    decoder_heads: int | None = None


def infer_architecture(
    state: Mapping[str, Tensor],
    said: Mapping[str, Any],
    overrides: ArchOverrides,
    decoder_heads: Mapping[int, int] = TYPICAL_DECODER_HEADS,
) -> tuple[Architecture, list[str]]:
    """Return the architecture of a state dict in our names, and the options that were assumed ("--num-heads 12").

    Args:
        state: whole, but for position tables, which may be missing.
        said: the architecture in the file, or a part of one.
        decoder_heads: typical heads of a decoder, by its width.

    Raises UserError when the tensors do not make one whole model, or contradict `said`.
    """
    assumed: list[str] = []
    width, channels, *tubelet = _tensor(state, "trunk.patch_embed.proj.1.weight", 5).shape
    if channels != 3:
        raise UserError(f"The patch embedding must take 3 channels (RGB), got {channels}.")
    trunk_said, decoder_said = _part(said, "trunk"), _part(said, "decoder")
    heads = _resolve("--num-heads", trunk_said.get("heads"), overrides.heads, TYPICAL_HEADS.get(width), assumed)
    _check_heads("--num-heads", heads, width)
    frames, size = _infer_size(state, tubelet, trunk_said, overrides, assumed)
    hidden = _tensor(state, "trunk.blocks.0.mlp.fc1.weight", 2).shape[0]
    found: Architecture = {
        "kind": "classifier",
        "trunk": {
            "width": width,
            "depth": _count_blocks(state, "trunk.blocks."),
            "heads": heads,
            "mlp_ratio": _mlp_ratio(trunk_said.get("mlp_ratio"), hidden, width),
            "num_frames": frames,
            "image_size": size,
            "tubelet": tubelet,
            "rgbd": any(name.startswith("trunk.depth_patch_embed.") for name in state),
        },
    }
    if "trunk.decoder.decoder_embed.weight" in state:
        width = _tensor(state, "trunk.decoder.decoder_embed.weight", 2).shape[0]
        given, typical = overrides.decoder_heads, decoder_heads.get(width)
        heads = _resolve("--decoder-heads", decoder_said.get("heads"), given, typical, assumed)
        _check_heads("--decoder-heads", heads, width)
        depth = _count_blocks(state, "trunk.decoder.decoder_blocks.")
        attention = "cross" if any(name.endswith(".norm_memory.weight") for name in state) else "self"
        decoder = {"width": width, "depth": depth, "heads": heads, "attention": attention}
        found |= {"kind": "autoencoder", "decoder": decoder}
    else:
        count = len([name for name in state if re.fullmatch(r"heads\.\d+\.0\.weight", name)])
        found["classes"] = [_tensor(state, f"heads.{i}.0.weight", 2).shape[0] for i in range(count)]
    with torch.device("meta"):  # shapes alone
        model = build(found, "The file")
    described = describe(model)
    _check_said(said, described)
    optional = {"trunk.pos_embed", "trunk.decoder.pos_embed"} - set(state)
    check_fit(state, {name: t for name, t in model.state_dict().items() if name not in optional})
    return described, assumed


def position_tables(architecture: Architecture) -> dict[str, Tensor]:
    """Return the fixed positional embeddings of a model, by name: float32 (1, N, D)."""
    trunk = architecture["trunk"]
    names = ["trunk.pos_embed"] + (["trunk.decoder.pos_embed"] if "decoder" in architecture else [])
    return {name: sinusoid_positions(num_tokens(trunk), trunk["width"]) for name in names}


def num_tokens(trunk: Mapping[str, Any]) -> int:
    """Return the number of tokens of a clip."""
    pt, ph, pw = trunk["tubelet"]
    return (trunk["num_frames"] // pt) * (trunk["image_size"] // ph) * (trunk["image_size"] // pw)


def check_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise UserError unless a state dict has exactly these names and shapes."""
    for name, tensor in wanted.items():
        if name in state and state[name].shape != tensor.shape:
            raise UserError(
                f"{name} must have the shape {tuple(tensor.shape)} beside the other tensors, got {tuple(state[name].shape)}. "
                "The weights are not of one model."
            )
    missing, extra = [n for n in wanted if n not in state], [n for n in state if n not in wanted]
    if missing or extra:
        parts = [f"{len(n)} {what}: {n[0]}" for what, n in (("missing", missing), ("left over", extra)) if n]
        raise UserError(f"The weights are not one whole model ({'; '.join(parts)}). Save the whole state dict.")


def _resolve(option: str, said: Any, given: int | None, typical: int | None, assumed: list[str]) -> int:
    """Return what the file says, else the user, else what is typical (which is added to `assumed`)."""
    for source, number in (("in the file", said), ("as given", given)):
        if number is not None and (type(number) is not int or not 1 <= number <= MAX_DIM):
            raise UserError(f"{option} ({source}) must be an integer from 1 to {MAX_DIM}, got {str(number)[:60]!r}.")
    if said is not None:
        if given not in (None, said):
            raise UserError(f"{option} is {given}, but the file says {said}. Remove {option}.")
        return int(said)
    if given is None and typical is None:
        raise UserError(f"The file does not determine {option}, and this width has no typical value. Set {option} N.")
    if given is None:
        assumed.append(f"{option} {typical}")
    return given or typical or 0


def _infer_size(
    state: Mapping[str, Tensor],
    tubelet: list[int],
    said: Mapping[str, Any],
    overrides: ArchOverrides,
    assumed: list[str],
) -> tuple[int, int]:
    """Return frames and side (pixels) of a clip, such that the position table, if any, has as many tokens."""
    pt, ph, pw = tubelet
    frames = _resolve("--num-frames", said.get("num_frames"), overrides.num_frames, TYPICAL_FRAMES, assumed)
    size_said, slots, tokens = said.get("image_size"), max(frames // pt, 1), None
    typical: int | None = TYPICAL_SIZE
    if "trunk.pos_embed" in state:
        tokens, typical = _tensor(state, "trunk.pos_embed", 3).shape[1], None
        side = math.isqrt(tokens // slots * ph * pw)
        if size_said is None and slots * (side // ph) * (side // pw) == tokens:
            size_said = side
    size = _resolve("--image-size", size_said, overrides.image_size, typical, assumed)
    found = slots * (size // ph) * (size // pw)
    clip = f"{frames} frames of {size} x {size} pixels"
    if tokens not in (None, found):
        problem = f"give {found} tokens, but the file has positions for {tokens}"
    elif frames % pt or size % ph or size % pw:
        problem = f"must be multiples of the tubelet, {pt} x {ph} x {pw}"
    elif found > MAX_TOKENS:
        problem = f"give more than {MAX_TOKENS} tokens"
    else:
        return frames, size
    raise UserError(f"{clip} {problem}. Set --num-frames or --image-size.")


def _check_said(said: Mapping[str, Any], found: Architecture) -> None:
    """Raise UserError when the architecture in a file contradicts its weights."""
    pairs = [(key, said[key], found.get(key)) for key in ("kind", "classes") if key in said]
    for part in ("trunk", "decoder"):
        pairs += [(f"{part} {key}", value, found.get(part, {}).get(key)) for key, value in _part(said, part).items()]
    for key, value, true in pairs:
        if value != true:
            raise UserError(
                f"The {key} in the file is {str(value)[:60]!r}, but its weights have {true!r}. The file is damaged, or its "
                "description is of another model."
            )


def _part(said: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = said.get(key, {})
    if not isinstance(part, Mapping):
        raise UserError(f"The {key} in the file must be numbers by name, got {str(part)[:60]!r}.")
    return part


def _mlp_ratio(said: Any, hidden: int, width: int) -> float:
    """Return the ratio in the file if it gives this width, which is truncated, else one of the weights."""
    if isinstance(said, (int, float)) and 0 <= said * width - hidden < 1:
        return said
    ratio = hidden / width
    # Times the width it may come out a rounding below `hidden`, and be truncated to one less.
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})


def _tensor(state: Mapping[str, Tensor], name: str, ndim: int) -> Tensor:
    if name not in state:
        raise UserError(f"{name} is missing. Save the whole state dict.")
    if state[name].ndim != ndim or 0 in state[name].shape:
        raise UserError(f"{name} must have {ndim} axes, none empty; got the shape {tuple(state[name].shape)}.")
    return state[name]


def _check_heads(option: str, heads: int, width: int) -> None:
    if width % heads:
        raise UserError(f"{option} must divide the width {width}, got {heads} heads. Set {option}.")
