"""The architecture that a state dict in our names has: from its shapes, from what its file says, and from what its user says.

Shapes do not tell the number of attention heads, nor how positions are spread over frames and sides.
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

# What published models of a width have; used, and told, when nobody says otherwise.
USUAL_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
USUAL_DECODER_HEADS = {384: 16, 512: 16}
USUAL_FRAMES, USUAL_SIZE = 16, 224
# Beyond these a file is nonsense, and tables of its size would fill the memory.
LARGEST, MOST_TOKENS = 65536, 2**20


@dataclass(frozen=True)
class Given:
    """What a user says where a file does not; None where nothing is said."""

    heads: int | None = None
    num_frames: int | None = None
    image_size: int | None = None
    decoder_heads: int | None = None


class _Numbers:
    """Settles each number: what the file says, else what the user says, else what is usual (and then told)."""

    def __init__(self) -> None:
        self.assumed: list[str] = []

    def settle(self, option: str, said: Any, given: int | None, usual: int | None) -> int:
        for what, number in (("the file says", said), (f"{option} is", given)):
            if number is not None and (type(number) is not int or not 1 <= number <= LARGEST):
                raise UserError(
                    f"Of the number that {option} is for, {what} {str(number)[:60]!r}; expected a whole number from 1 to "
                    f"{LARGEST}. Correct it."
                )
        if said is not None:
            if given is not None and given != said:
                raise UserError(f"{option} is {given}, and the file says {said}. Leave {option} out.")
            return int(said)
        if given is not None:
            return given
        if usual is None:
            raise UserError(f"The file does not tell what {option} is for, and nothing is usual here. Add {option} N.")
        self.assumed.append(f"{option} {usual}")
        return usual


def architecture_of(
    state: Mapping[str, Tensor], said: Mapping[str, Any], given: Given
) -> tuple[Architecture, list[str]]:
    """The architecture of a state dict in our names, and what had to be assumed for it. Position tables may be missing.

    Args:
        said: what the file says of its model, an architecture or a part of one; what contradicts the weights is refused.

    Raises UserError when the tensors do not make one whole model, naming the first that is missing, unknown or of another
    shape.
    """
    numbers = _Numbers()
    patch = _tensor(state, "trunk.patch_embed.proj.1.weight", 5)
    width, channels, *tubelet = patch.shape
    if channels != 3:
        raise UserError(f"The patch embedding takes {channels} channels; expected 3, the colours of a video.")
    trunk_said, decoder_said = _part(said, "trunk"), _part(said, "decoder")
    heads = numbers.settle("--num-heads", trunk_said.get("heads"), given.heads, USUAL_HEADS.get(width))
    _check_heads("--num-heads", heads, width)
    frames, size = _size(state, tubelet, trunk_said, given, numbers)
    hidden = _tensor(state, "trunk.blocks.0.mlp.fc1.weight", 2).shape[0]
    found: Architecture = {
        "kind": "classifier",
        "trunk": {
            "width": width,
            "depth": _blocks(state, "trunk.blocks."),
            "heads": heads,
            "mlp_ratio": _ratio(trunk_said.get("mlp_ratio"), hidden, width),
            "num_frames": frames,
            "image_size": size,
            "tubelet": tubelet,
            "rgbd": any(name.startswith("trunk.depth_patch_embed.") for name in state),
        },
    }
    if "trunk.decoder.decoder_embed.weight" in state:
        decoder_width = _tensor(state, "trunk.decoder.decoder_embed.weight", 2).shape[0]
        usual = USUAL_DECODER_HEADS.get(decoder_width)
        heads = numbers.settle("--decoder-heads", decoder_said.get("heads"), given.decoder_heads, usual)
        _check_heads("--decoder-heads", heads, decoder_width)
        depth = _blocks(state, "trunk.decoder.decoder_blocks.")
        attention = "cross" if any(name.endswith(".norm_memory.weight") for name in state) else "self"
        decoder = {"width": decoder_width, "depth": depth, "heads": heads, "attention": attention}
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
    return described, numbers.assumed


def position_tables(architecture: Architecture) -> dict[str, Tensor]:
    """The fixed tables of a model, by name: float32 (1, N, D)."""
    trunk = architecture["trunk"]
    names = ["trunk.pos_embed"] + (["trunk.decoder.pos_embed"] if "decoder" in architecture else [])
    return {name: sinusoid_positions(tokens_of(trunk), trunk["width"]) for name in names}


def tokens_of(trunk: Mapping[str, Any]) -> int:
    """How many tokens a clip of a trunk's own size has."""
    pt, ph, pw = trunk["tubelet"]
    return (trunk["num_frames"] // pt) * (trunk["image_size"] // ph) * (trunk["image_size"] // pw)


def check_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise UserError when a state dict has not exactly the names and shapes that are wanted."""
    for name, tensor in wanted.items():
        if name in state and state[name].shape != tensor.shape:
            raise UserError(
                f"{name} has the shape {tuple(state[name].shape)}; expected {tuple(tensor.shape)} beside the other tensors. "
                "The weights are not of one model."
            )
    missing = [name for name in wanted if name not in state]
    unknown = [name for name in state if name not in wanted]
    if missing or unknown:
        parts = [
            f"{len(names)} {what}: {names[0]}"
            for what, names in (("missing", missing), ("left over", unknown))
            if names
        ]
        raise UserError(
            f"The weights do not make one whole model ({'; '.join(parts)}). Expected all tensors of a trunk, and of its "
            "decoder and heads where it has them. Save the whole state dict."
        )


def _size(
    state: Mapping[str, Tensor], tubelet: list[int], said: Mapping[str, Any], given: Given, numbers: _Numbers
) -> tuple[int, int]:
    """Frames and side of a clip: said, or such that the position table has as many tokens."""
    pt, ph, pw = tubelet
    frames = numbers.settle("--num-frames", said.get("num_frames"), given.num_frames, USUAL_FRAMES)
    told = said.get("image_size")
    if "trunk.pos_embed" not in state:
        size = numbers.settle("--image-size", told, given.image_size, USUAL_SIZE)
    else:
        tokens = _tensor(state, "trunk.pos_embed", 3).shape[1]
        slots = max(frames // pt, 1)
        side = math.isqrt(tokens // slots * ph * pw)
        fits = slots * (side // ph) * (side // pw) == tokens
        size = numbers.settle("--image-size", side if told is None and fits else told, given.image_size, None)
        if slots * (size // ph) * (size // pw) != tokens:
            raise UserError(
                f"The file has positions for {tokens} tokens, and {frames} frames of {size} x {size} pixels make "
                f"{slots * (size // ph) * (size // pw)} tubelets of {pt} x {ph} x {pw}. Change --num-frames or --image-size."
            )
    if frames % pt or size % ph or size % pw:
        raise UserError(
            f"{frames} frames of {size} x {size} pixels cannot be cut into the tubelets of this model, {pt} x {ph} x {pw}; "
            "expected multiples of them. Change --num-frames or --image-size."
        )
    if (frames // pt) * (size // ph) * (size // pw) > MOST_TOKENS:
        raise UserError(
            f"{frames} frames of {size} x {size} pixels make more than {MOST_TOKENS} tokens. Change --num-frames or "
            "--image-size."
        )
    return frames, size


def _check_said(said: Mapping[str, Any], found: Architecture) -> None:
    """Raise UserError when a file says of its model what its weights do not."""
    pairs = [(key, said[key], found.get(key)) for key in ("kind", "classes") if key in said]
    for part in ("trunk", "decoder"):
        pairs += [(f"{part} {key}", value, found.get(part, {}).get(key)) for key, value in _part(said, part).items()]
    for key, value, true in pairs:
        if value != true:
            raise UserError(
                f"The file says {str(value)[:60]!r} of its model's {key}, and its weights say {true!r}. The one or the other "
                "is damaged, or they are of different models."
            )


def _part(said: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = said.get(key, {})
    if not isinstance(part, Mapping):
        raise UserError(f"What the file says of its model's {key} is {str(part)[:60]!r}; expected numbers by name.")
    return part


def _ratio(said: Any, hidden: int, width: int) -> float:
    """The MLP ratio: as the file says it, which may be truncated to a width, else what the weights have."""
    if isinstance(said, (int, float)) and 0 <= said * width - hidden < 1:
        return said
    ratio = hidden / width
    # Times the width it may come out a rounding below `hidden`, and be truncated to one less.
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks there are; that none is left out between them is seen when the whole is compared."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})


def _tensor(state: Mapping[str, Tensor], name: str, ndim: int) -> Tensor:
    if name not in state:
        raise UserError(f"{name} is missing; expected all tensors of a trunk. Save the whole state dict.")
    if state[name].ndim != ndim or 0 in state[name].shape:
        raise UserError(f"{name} has the shape {tuple(state[name].shape)}; expected {ndim} axes, none of them empty.")
    return state[name]


def _check_heads(option: str, heads: int, width: int) -> None:
    if width % heads:
        raise UserError(f"{heads} attention heads do not divide the width {width}. Change {option}.")
