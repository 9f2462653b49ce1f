"""The architecture of a state dict in our names: from its shapes, from the metadata in its file, and from the user.

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

from omnivision.checkpoint.fingerprint import flat
from omnivision.models.architecture import Architecture, build, describe
from omnivision.models.patches import sinusoid_positions, token_grid
from omnivision.utils.errors import UserError

# Of published models, by width; assumed, and reported, where neither the file nor the user has them.
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
    in_file: Mapping[str, Any],
    overrides: ArchOverrides,
    decoder_heads: Mapping[int, int] = TYPICAL_DECODER_HEADS,
) -> tuple[Architecture, list[str]]:
    """Return the architecture of a state dict in our names, and the options that were assumed ("--num-heads 12").

    Args:
        state: complete, but for positional embeddings, which may be missing.
        in_file: the architecture in the file, or a part of one.
        decoder_heads: typical heads of a decoder, by its width.

    Raises UserError when the tensors do not make one complete model, or contradict `in_file`.
    """
    assumed: list[str] = []
    try:
        inferred = _infer(state, in_file, overrides, decoder_heads, assumed)
        with torch.device("meta"):  # shapes alone
            model = build(inferred, "The file")
            tables = {name: t for name, t in model.state_dict().items() if name in position_names(inferred)}
        model.load_state_dict(tables | dict(state), assign=True)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError, ZeroDivisionError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        problem = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(
            f"The weights are not of one complete model: {problem:.400}. Save the whole state dict."
        ) from None
    architecture = describe(model)
    actual = flat(architecture)
    for name, value in flat(
        {key: in_file[key] for key in ("kind", "classes", "trunk", "decoder") if key in in_file}
    ).items():
        if value != actual.get(name):
            raise UserError(
                f"{name} in the file is {str(value)[:60]!r}, but its weights have {actual.get(name)!r}: the description is of "
                "another model."
            )
    return architecture, assumed


def _infer(
    state: Mapping[str, Tensor],
    in_file: Mapping[str, Any],
    overrides: ArchOverrides,
    decoder_heads: Mapping[int, int],
    assumed: list[str],
) -> Architecture:
    trunk, decoder = in_file.get("trunk", {}), in_file.get("decoder", {})
    width, _, *tubelet = state["trunk.patch_embed.proj.1.weight"].shape
    heads = _resolve("--num-heads", trunk.get("heads"), overrides.heads, TYPICAL_HEADS.get(width), assumed, width)
    frames, size = _infer_size(state, tubelet, trunk, overrides, assumed)
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
        given, typical = overrides.decoder_heads, decoder_heads.get(width)
        return architecture | {
            "kind": "autoencoder",
            "decoder": {
                "width": width,
                "depth": _count_blocks(state, "trunk.decoder.decoder_blocks."),
                "heads": _resolve("--decoder-heads", decoder.get("heads"), given, typical, assumed, width),
                "attention": "cross" if any(name.endswith(".norm_memory.weight") for name in state) else "self",
            },
        }
    count = len([name for name in state if re.fullmatch(r"heads\.\d+\.0\.weight", name)])
    return architecture | {"classes": [len(state[f"heads.{head}.0.weight"]) for head in range(count)]}


def position_names(architecture: Architecture) -> list[str]:
    """Return the names of the positional embeddings of a model."""
    return ["trunk.pos_embed"] + (["trunk.decoder.pos_embed"] if "decoder" in architecture else [])


def position_tables(architecture: Architecture) -> dict[str, Tensor]:
    """Return the fixed positional embeddings of a model, by name: float32 (1, N, D)."""
    trunk = architecture["trunk"]
    return {name: sinusoid_positions(num_tokens(trunk), trunk["width"]) for name in position_names(architecture)}


def num_tokens(trunk: Mapping[str, Any]) -> int:
    """Return the number of tokens of a clip."""
    side = trunk["image_size"]
    return math.prod(token_grid((trunk["num_frames"], side, side), trunk["tubelet"]))


def _resolve(
    option: str, in_file: Any, given: int | None, typical: int | None, assumed: list[str], width: int = 0
) -> int:
    """Return the number in the file, else the user's, else the typical one (which is added to `assumed`)."""
    if in_file is not None and given not in (None, in_file):
        raise UserError(f"{option} is {given}, but the file has {str(in_file)[:60]}. Remove {option}.")
    number = in_file if in_file is not None else given
    if number is None:
        if typical is None:
            raise UserError(
                f"The file does not determine {option}, and this width has no typical value. Set {option} N."
            )
        assumed.append(f"{option} {typical}")
        return typical
    if type(number) is not int or not 1 <= number <= MAX_DIM or width % number:
        divisor = f" that divides the width {width}" if width else ""
        raise UserError(f"{option} must be an integer from 1 to {MAX_DIM}{divisor}, got {str(number)[:60]!r}.")
    return number


def _infer_size(
    state: Mapping[str, Tensor], tubelet: list[int], trunk: Any, overrides: ArchOverrides, assumed: list[str]
) -> tuple[int, int]:
    """Return frames and side (pixels) of a clip, such that the positional embedding, if any, has as many tokens."""
    pt, ph, pw = tubelet
    frames = _resolve("--num-frames", trunk.get("num_frames"), overrides.num_frames, TYPICAL_FRAMES, assumed)
    size, temporal, tokens = trunk.get("image_size"), max(frames // pt, 1), None
    if "trunk.pos_embed" in state:
        tokens = state["trunk.pos_embed"].shape[1]
        side = math.isqrt(tokens // temporal * ph * pw)
        if size is None and temporal * (side // ph) * (side // pw) == tokens:
            size = side
    size = _resolve("--image-size", size, overrides.image_size, TYPICAL_SIZE if tokens is None else None, assumed)
    count = temporal * (size // ph) * (size // pw)
    clip = f"{frames} frames of {size} x {size} pixels"
    if tokens not in (None, count):
        raise UserError(
            f"{clip} give {count} tokens, but the file has positions for {tokens}. Set --num-frames or --image-size."
        )
    if frames % pt or size % ph or size % pw or count > MAX_TOKENS:
        raise UserError(
            f"{clip} must be multiples of the tubelet, {pt} x {ph} x {pw}, and give at most {MAX_TOKENS} tokens. Set "
            "--num-frames or --image-size."
        )
    return frames, size


def _mlp_ratio(in_file: Any, mlp_width: int, width: int) -> float:
    """Return the ratio in the file if it gives this width, which is truncated, else one of the weights."""
    if isinstance(in_file, (int, float)) and 0 <= in_file * width - mlp_width < 1:
        return in_file
    ratio = mlp_width / width
    # Times the width it may come out a rounding below `mlp_width`, and be truncated to one less.
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)


def _count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})
