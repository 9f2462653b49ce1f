"""The architecture of a state dict in our names, inferred from its shapes, the metadata in its file, and the user's options.

Shapes determine neither the number of attention heads nor how positions divide into frames, height and width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnivision.config.flat import flatten
from omnivision.models.architecture import Architecture, architecture_of, from_architecture
from omnivision.models.patches import sinusoid_positions, token_grid
from omnivision.utils.errors import UserError

# Heads of published models, by width; assumed, and reported, if neither the file nor the user gives them.
TYPICAL_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
TYPICAL_DECODER_HEADS = {384: 16, 512: 16}
TYPICAL_FRAMES, TYPICAL_SIZE = 16, 224
# A file that claims more is damaged, and its position table would fill the memory.
MAX_DIM, MAX_TOKENS = 65536, 2**20


@dataclass(frozen=True)
class ArchOverrides:
    """Values that a user gives because a file lacks them; None if not given."""

    heads: int | None = None
    num_frames: int | None = None
    image_size: int | None = None
    decoder_heads: int | None = None


def infer_architecture(
    state: Mapping[str, Tensor],
    in_file: Mapping[str, Any],
    overrides: ArchOverrides,
    decoder_heads: Mapping[int, int] = TYPICAL_DECODER_HEADS,
) -> tuple[Architecture, list[str]]:
    """Return the architecture of a state dict in our names, and the options that were assumed ("--num-heads 12").

    Args:
        state: complete, except that positional embeddings may be missing.
        in_file: the architecture in the file, or a part of one.
        decoder_heads: typical heads of a decoder, by its width.

    Raises UserError when the architecture in the file is another model's or lacks numbers, and whatever torch raises for
    tensors that do not make one complete model.
    """
    assumed: list[str] = []
    architecture = _infer(state, in_file, overrides, decoder_heads, assumed)
    with torch.device("meta"):  # only shapes
        model = from_architecture(architecture, "The file")
    tables = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("pos_embed")}
    model.load_state_dict(tables | dict(state), assign=True)
    architecture = architecture_of(model)
    actual, known = (
        flatten(architecture),
        {k: in_file[k] for k in ("kind", "classes", "trunk", "decoder") if k in in_file},
    )
    for name, value in flatten(known).items():
        if value != actual.get(name):
            raise UserError(
                f"{name} is {str(value)[:60]!r} in the file, but {actual.get(name)!r} by its weights and the options. Use the "
                "file that belongs to the weights."
            )
    return architecture, assumed


def _infer(
    state: Mapping[str, Tensor],
    in_file: Mapping[str, Any],
    overrides: ArchOverrides,
    decoder_heads: Mapping[int, int],
    assumed: list[str],
) -> Architecture:
    """Return the architecture that shapes, `in_file` and `overrides` give, unchecked."""
    trunk, decoder = in_file.get("trunk", {}), in_file.get("decoder", {})
    width, _, *tubelet = state["trunk.patch_embed.proj.1.weight"].shape
    heads = _resolve(assumed, "--num-heads", overrides.heads, trunk.get("heads"), TYPICAL_HEADS.get(width))
    frames = _resolve(assumed, "--num-frames", overrides.num_frames, trunk.get("num_frames"), TYPICAL_FRAMES)
    tokens = state["trunk.pos_embed"].shape[1] if "trunk.pos_embed" in state else None
    side = None if tokens is None else math.isqrt(tokens * tubelet[1] * tubelet[2] // max(frames // tubelet[0], 1))
    size = _resolve(assumed, "--image-size", overrides.image_size, trunk.get("image_size", side), TYPICAL_SIZE)
    _check_clip(frames, size, tubelet, tokens)
    architecture: Architecture = {
        "kind": "classifier",
        "trunk": {
            "width": width,
            "depth": _count_blocks(state, "trunk.blocks."),
            "heads": heads,
            "mlp_ratio": _mlp_ratio(trunk.get("mlp_ratio"), len(state["trunk.blocks.0.mlp.fc1.weight"]), width),
            "num_frames": frames,
            "image_size": size,
            "tubelet": tubelet,
            "rgbd": any(name.startswith("trunk.depth_patch_embed.") for name in state),
        },
    }
    if "trunk.decoder.decoder_embed.weight" in state:
        width = len(state["trunk.decoder.decoder_embed.weight"])
        known, typical = decoder.get("heads"), decoder_heads.get(width)
        architecture["kind"] = "autoencoder"
        architecture["decoder"] = {
            "width": width,
            "depth": _count_blocks(state, "trunk.decoder.decoder_blocks."),
            "heads": _resolve(assumed, "--decoder-heads", overrides.decoder_heads, known, typical),
            "attention": "cross" if any(name.endswith(".norm_memory.weight") for name in state) else "self",
        }
    else:
        count = len([name for name in state if re.fullmatch(r"heads\.\d+\.0\.weight", name)])
        architecture["classes"] = [len(state[f"heads.{head}.0.weight"]) for head in range(count)]
    return architecture


def _resolve(assumed: list[str], option: str, given: int | None, known: Any, typical: int | None) -> int:
    """Return the user's value, else the file's, else the typical one (which is added to `assumed`)."""
    number = known if given is None else given
    if number is None and typical is not None:
        assumed.append(f"{option} {typical}")
        return typical
    if type(number) is not int or not 1 <= number <= MAX_DIM:
        raise UserError(f"{option} must be an integer from 1 to {MAX_DIM}, got {str(number)[:60]!r}. Set {option} N.")
    return number


def position_tables(architecture: Architecture) -> dict[str, Tensor]:
    """Return the fixed positional embeddings of a model, by name: float32 (1, N, D)."""
    trunk = architecture["trunk"]
    names = ["trunk.pos_embed"] + (["trunk.decoder.pos_embed"] if "decoder" in architecture else [])
    return {name: sinusoid_positions(num_tokens(trunk), trunk["width"]) for name in names}


def num_tokens(trunk: Mapping[str, Any]) -> int:
    """Return the number of tokens of a clip."""
    side = trunk["image_size"]
    return math.prod(token_grid((trunk["num_frames"], side, side), trunk["tubelet"]))


def _check_clip(frames: int, size: int, tubelet: list[int], tokens: int | None) -> None:
    """Raise UserError for a clip that the tubelet does not divide, or whose token count is not the file's `tokens`."""
    clip = (frames, size, size)
    count = math.prod(side // part for side, part in zip(clip, tubelet, strict=True))
    if count > MAX_TOKENS or count != (tokens or count) or any(s % p for s, p in zip(clip, tubelet, strict=True)):
        wanted = f"{tokens} tokens, as the file" if tokens else f"at most {MAX_TOKENS} tokens"
        raise UserError(
            f"{frames} frames of {size} x {size} pixels must be multiples of the tubelet {tubelet} and give {wanted}, got "
            f"{count}. Set --num-frames or --image-size."
        )


def _mlp_ratio(in_file: Any, mlp_width: int, width: int) -> float:
    """Return the ratio in the file if it gives this (truncated) width, else one computed from the weights."""
    if isinstance(in_file, (int, float)) and 0 <= in_file * width - mlp_width < 1:
        return in_file
    ratio = mlp_width / width
    # Multiplied by the width, it may round to just below `mlp_width` and be truncated to one less.
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)


def _count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})
