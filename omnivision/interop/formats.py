"""Weights of PPMA, OmniMAE, VideoMAE and Hugging Face in our names, and ours in those of Hugging Face.

A format is one rename table: it recognises a file, converts its names to ours and, for Hugging Face, ours to theirs.

Sources: github.com/howardzh01/PPMA, facebookresearch/omnivore (omnimae/), MCG-NJU/VideoMAE (modeling_pretrain.py and
modeling_finetune.py), huggingface/transformers (videomae); read for names and shapes.

Versions of transformers name the biases of queries, keys and values differently: 4.57 to 5.4 and 5.18 onwards read `q_bias`
and `v_bias` (they have no bias for keys, which softmax cancels), 5.5 to 5.17 read `query.bias`, `key.bias` and `value.bias`.
Each ignores the other names and leaves its own at zero, so an export holds both.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from omnivision.checkpoint.fingerprint import valid_names
from omnivision.checkpoint.state_dict_file import StateDictFile, check_numbers, strip_wrappers
from omnivision.interop.architecture import (
    TYPICAL_DECODER_HEADS,
    ArchOverrides,
    infer_architecture,
    num_tokens,
    position_tables,
)
from omnivision.models.architecture import Architecture
from omnivision.models.patches import IMAGENET_MEAN, IMAGENET_STD, sinusoid_positions
from omnivision.utils.errors import UserError

_PLACEHOLDERS = {
    "leaf": r"weight|bias",
    "n": r"\d+",
    "layer": r"norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12]",
    "cross": r"norm_memory|attn\.(?:q|kv)",
    "part": r"[qv]",
    "encoder": r"|encoder\.",
    "base": r"|videomae\.",
}
_TRUNK = [
    *(
        "trunk.pos_embed",
        "trunk.mask_token",
        "trunk.norm.{leaf}",
        "trunk.decoder.pos_embed",
        "trunk.decoder.norm.{leaf}",
    ),
    *("trunk.patch_embed.proj.1.{leaf}", "trunk.depth_patch_embed.proj.1.{leaf}", "trunk.decoder.decoder_embed.{leaf}"),
    *("trunk.blocks.{n}.{layer}.{leaf}", "trunk.decoder.decoder_blocks.{n}.{layer}.{leaf}"),
    "trunk.decoder.decoder_blocks.{n}.{cross}.{leaf}",
]
_VIDEOMAE_DECODER = {
    "mask_token": "trunk.mask_token",
    "encoder_to_decoder.weight": "trunk.decoder.decoder_embed.weight",
    "decoder.norm.{leaf}": "trunk.decoder.norm.{leaf}",
    "decoder.head.{leaf}": "heads.0.projector.{leaf}",
}
_HF_LAYERS = {
    "layernorm_before.{leaf}": "norm1.{leaf}",
    "layernorm_after.{leaf}": "norm2.{leaf}",
    "attention.output.dense.{leaf}": "attn.proj.{leaf}",
    "intermediate.dense.{leaf}": "mlp.fc1.{leaf}",
    "output.dense.{leaf}": "mlp.fc2.{leaf}",
    "attention.attention.query.{leaf}": "attn.qkv.{leaf}[q]",
    "attention.attention.key.{leaf}": "attn.qkv.{leaf}[k]",
    "attention.attention.value.{leaf}": "attn.qkv.{leaf}[v]",
    "attention.attention.{part}_bias": "attn.qkv.bias[{part}]",
}
# {format: {their name: ours}}. `[q]`, `[k]` and `[v]` are rows of one tensor of ours. "omnivision" is also what PPMA has.
RENAMES: dict[str, dict[str, str]] = {
    "omnivision": {name: name for name in (*_TRUNK, "heads.{n}.0.{leaf}", "heads.0.projector.{leaf}")},
    "omnimae": {name: name for name in _TRUNK} | {"head.{leaf}": "heads.0.0.{leaf}"},
    "videomae": {
        "{encoder}pos_embed": "trunk.pos_embed",
        "{encoder}patch_embed.proj.{leaf}": "trunk.patch_embed.proj.1.{leaf}",
        "{encoder}blocks.{n}.{layer}.{leaf}": "trunk.blocks.{n}.{layer}.{leaf}",
        "{encoder}blocks.{n}.attn.{part}_bias": "trunk.blocks.{n}.attn.qkv.bias[{part}]",
        "{encoder}norm.{leaf}": "trunk.norm.{leaf}",
        "fc_norm.{leaf}": "trunk.norm.{leaf}",
        "head.{leaf}": "heads.0.0.{leaf}",
        "decoder.blocks.{n}.{layer}.{leaf}": "trunk.decoder.decoder_blocks.{n}.{layer}.{leaf}",
        "decoder.blocks.{n}.attn.{part}_bias": "trunk.decoder.decoder_blocks.{n}.attn.qkv.bias[{part}]",
        **_VIDEOMAE_DECODER,
    },
    "hf": {
        "{base}embeddings.patch_embeddings.projection.{leaf}": "trunk.patch_embed.proj.1.{leaf}",
        **{f"{{base}}encoder.layer.{{n}}.{old}": f"trunk.blocks.{{n}}.{new}" for old, new in _HF_LAYERS.items()},
        "{base}layernorm.{leaf}": "trunk.norm.{leaf}",
        "fc_norm.{leaf}": "trunk.norm.{leaf}",
        "classifier.{leaf}": "heads.0.0.{leaf}",
        **{
            f"decoder.decoder_layers.{{n}}.{old}": f"trunk.decoder.decoder_blocks.{{n}}.{new}"
            for old, new in _HF_LAYERS.items()
        },
        **_VIDEOMAE_DECODER,
    },
}
# What a user may name; PPMA's files have our names, but no architecture.
CHOICES = ("auto", "omnivision", "ppma", "omnimae", "videomae", "hf")
# Where biases of queries, keys and values may be absent: they are zeros then.
_OPTIONAL_BIASES = {"omnimae": "trunk.decoder.", "videomae": "trunk.", "hf": "trunk."}
_VIDEOMAE_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}  # of published ones, by width
_DECODER = ("trunk.decoder.", "trunk.mask_token", "heads.0.projector.")

EPSILON = 1e-6  # of every LayerNorm here
HF_LAST_EPSILON = 1e-5  # of `fc_norm` and of the decoder's last norm there, whatever the configuration says
HF_EPSILON = 1e-12  # of the others there, unless the configuration says another
HF_NUMBERS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "num_frames": "num_frames",
    "image_size": "image_size",
}


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """A whole model in our names, with position tables, and what became of each entry of its file.

    Args:
        renamed: {our name: theirs} of all entries that were taken, also where both are the same.
        filled: {our name: reason} of tensors that are not in the file.
        dropped: {their name: reason}.
        assumed: numbers that neither the file nor the user gave.
    """

    state: dict[str, Tensor]
    architecture: Architecture
    renamed: Mapping[str, str] = field(default_factory=dict)
    filled: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    assumed: Sequence[str] = ()

    def summary(self) -> str:
        """The model in a few words."""
        trunk, classes = self.architecture["trunk"], self.architecture.get("classes")
        return (
            f"{'encoder' if classes == [] else self.architecture['kind']} of width {trunk['width']}, depth {trunk['depth']}, "
            f"{trunk['heads']} heads, {trunk['num_frames']} frames of {trunk['image_size']} x {trunk['image_size']}"
            + "".join(f", {count} classes" for count in classes or [])
        )

    def lines(self) -> list[str]:
        """A table to print: a line for each fate and reason, with how many and the first names."""
        rows = [
            ("kept", "", [new for new, old in self.renamed.items() if new == old]),
            ("renamed", "", [f"{old} -> {new}" for new, old in self.renamed.items() if new != old]),
        ]
        for fate, reasons in (("filled", self.filled), ("dropped", self.dropped)):
            rows += [(fate, f" ({why})", names) for why, names in group_by_reason(reasons).items()]
        rows.append(("assumed", "", list(self.assumed)))
        return [f"  {fate:8} {len(names):4}  {preview(names)}{why}" for fate, why, names in rows if names]


@dataclass(frozen=True)
class Exported:
    """A state dict in the names of `transformers`, its `config.json`, and {our name: reason} of what it leaves out."""

    state: dict[str, Tensor]
    config: dict[str, Any]
    dropped: dict[str, str]


def convert(
    source: StateDictFile, format: str = "auto", overrides: ArchOverrides | None = None
) -> tuple[ConvertedCheckpoint, str]:
    """Return the model of a file in our names, and the format of the file.

    Args:
        format: one of CHOICES.

    Raises UserError, beginning with the file, for anything that is not understood as a whole.
    """
    source.refuse_own_class()
    try:
        state = strip_wrappers(source.state, "model.")  # of a training module around the model
        found = recognise(state, format)
        if found == "hf":
            return from_hf(state, source.config, overrides), found
        if found == "omnivision":
            return from_ours(state, source.architecture, overrides), found if source.architecture else "ppma"
        return (from_omnimae if found == "omnimae" else from_videomae)(state, overrides), found
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from None


def recognise(names: Collection[str], choice: str = "auto") -> str:
    """Return the format, a key of RENAMES, that all `names` belong to; `choice` (of CHOICES) allows one alone.

    Raises UserError, with the nearest format and the first names unknown to it, when there is none.
    """
    if "mixing_ratio" in names:
        raise UserError(
            "The checkpoint is a learned average, which holds no trunk. Merge it first: "
            "omnivision export CHECKPOINT OUT.pt --to pt --merge."
        )
    unknown = {format: [name for name in names if _rename(format, name) is None] for format in RENAMES}
    nearest = min(unknown, key=lambda format: len(unknown[format]))
    format = {"auto": nearest, "ppma": "omnivision"}.get(choice, choice)
    if not (others := unknown[format]):
        return format
    shown = format if choice == "auto" else choice
    advice = f" Set --format {nearest}, which has all names." if not unknown[nearest] else ""
    raise UserError(
        f"{len(others)} of {len(names)} entries have no name of format {shown}"
        f"{', the nearest' if choice == 'auto' else ''}: {preview(others)}.{advice} Expected weights of one of "
        f"{', '.join(CHOICES[1:])} (see docs/interchange.md)."
    )


_NO_ARCHITECTURE: Mapping[str, Any] = {}


def from_ours(
    state: Mapping[str, Tensor],
    architecture: Mapping[str, Any] = _NO_ARCHITECTURE,
    overrides: ArchOverrides | None = None,
) -> ConvertedCheckpoint:
    """Check a state dict in our names, which are PPMA's too, and add position tables where they are missing.

    `architecture` is that of the file, or a part of it. Raises UserError, as all functions here, when the tensors do not make
    one whole model.
    """
    return _KeyMapper("omnivision", state).finalize(architecture, overrides)


def from_omnimae(state: Mapping[str, Tensor], overrides: ArchOverrides | None = None) -> ConvertedCheckpoint:
    """OmniMAE as Meta published it: our names but for the one head; attention in its decoder has no bias for q, k and v."""
    mapper = _KeyMapper("omnimae", state)
    if any(name.startswith("trunk.decoder.") for name in state):
        mapper.move("heads.0.0.", "heads.0.projector.")
    return mapper.finalize({}, overrides)


def from_videomae(state: Mapping[str, Tensor], overrides: ArchOverrides | None = None) -> ConvertedCheckpoint:
    """VideoMAE's own repository: pretrained (encoder and decoder) or fine-tuned (mean of tokens, norm, head)."""
    mapper = _KeyMapper("videomae", state)
    mapper.drop_first_token_head()
    mapper.convert_decoder()
    return mapper.finalize({}, overrides)


def from_hf(
    state: Mapping[str, Tensor], config: Mapping[str, Any], overrides: ArchOverrides | None = None
) -> ConvertedCheckpoint:
    """VideoMAEModel, VideoMAEForVideoClassification or VideoMAEForPreTraining of transformers, as in memory or in files.

    `config` is the content of `config.json`, or empty. Raises UserError for a configuration that is invalid, of another kind of
    model, or not of these weights.
    """
    said = _architecture_of_config(config)
    mapper = _KeyMapper("hf", state)
    mapper.drop_first_token_head()
    bias = mapper.state.get("trunk.patch_embed.proj.1.bias")
    if bias is not None and not any(name.startswith("trunk.norm.") for name in mapper.state):
        # The bare encoder of a model with `use_mean_pooling` ends before the norm, which its classifier holds.
        mapper.fill("trunk.norm.weight", torch.ones_like(bias), "this encoder ends before it")
        mapper.fill("trunk.norm.bias", torch.zeros_like(bias), "this encoder ends before it")
    mapper.convert_decoder()
    has_decoder = "trunk.decoder.norm.weight" in mapper.state
    if config and has_decoder:
        numbers = {f"decoder_{theirs}": ours for theirs, ours in list(HF_NUMBERS.items())[:3]}
        said["decoder"] = {ours: config[theirs] for theirs, ours in numbers.items() if theirs in config}
    converted = mapper.finalize(said, overrides)
    epsilon, assumed = config.get("layer_norm_eps", HF_EPSILON if config else EPSILON), list(converted.assumed)
    if epsilon != EPSILON:
        assumed.append(f"LayerNorm epsilon {EPSILON:g} (theirs: {str(epsilon)[:20]})")
    if has_decoder or "fc_norm.weight" in state:
        assumed.append(f"epsilon {EPSILON:g} of the last norm (theirs: {HF_LAST_EPSILON:g})")
    return replace(converted, assumed=assumed)


def to_hf(
    state: Mapping[str, Tensor], architecture: Architecture, head: int = 0, class_names: Sequence[str] | None = None
) -> Exported:
    """A classifier as VideoMAEForVideoClassification; an autoencoder, or a classifier without heads, as VideoMAEModel.

    Args:
        state: whole, in our names (`from_ours` checks it).
        head: which of several heads.
        class_names: by label; numbers if not given.

    Raises UserError for positions other than the fixed table, which that model always has, and for a head or names that do
    not fit.
    """
    dropped: dict[str, str] = {}
    if _rounded_positions(state, architecture):
        dropped["trunk.pos_embed"] = "rounded to 16 bits; the table there is not"
    classes = architecture.get("classes", [])
    if classes and not 0 <= head < len(classes):
        raise UserError(f"--head must be 0 to {len(classes) - 1}, got {head}: the model has {len(classes)} heads.")
    left: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(_DECODER):
            dropped[name] = "its decoder adds positions after its projection, ours before"
        elif name.startswith("trunk.depth_patch_embed."):
            dropped[name] = "no place there: colours alone"
        elif name.startswith("heads.") and not name.startswith(f"heads.{head}."):
            dropped[name] = "another head; choose it with --head"
        elif ".attn.qkv." in name:
            left |= dict(zip((f"{name}[q]", f"{name}[k]", f"{name}[v]"), tensor.chunk(3), strict=True))
        else:
            left[name.replace(f"heads.{head}.", "heads.0.", 1)] = tensor
    base, other_norm = ("videomae.", "{base}layernorm") if classes else ("", "fc_norm")
    out: dict[str, Tensor] = {}
    for theirs, ours in RENAMES["hf"].items():
        if not theirs.startswith((other_norm, "decoder.", "encoder_to", "mask_token")):
            found = {name: match for name in left if (match := _pattern(ours).fullmatch(name))}
            out |= {theirs.format(base=base, **match.groupdict()): left[name] for name, match in found.items()}
    # Contiguous, and no part of another tensor: safetensors takes nothing else.
    out = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in out.items()}
    return Exported(out, _hf_config(architecture, out, class_names), dropped)


def preprocessor_config(architecture: Architecture) -> dict[str, Any]:
    """`preprocessor_config.json`: the pixels that our models expect. Without it `transformers` normalises to -1 .. 1."""
    size = architecture["trunk"]["image_size"]
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def class_names(config: Mapping[str, Any]) -> list[str] | None:
    """Return the class names in a `config.json`, by label; None where there are only transformers' placeholders."""
    said = config.get("id2label")
    names = [said.get(str(label)) for label in range(len(said))] if isinstance(said, Mapping) else []
    return None if names == [f"LABEL_{label}" for label in range(len(names))] else valid_names(names)


class _KeyMapper:
    """The entries of a file on their way to our names: `state`, and where each tensor came from, or why it is there."""

    def __init__(self, format: str, state: Mapping[str, Tensor]) -> None:
        self.format, self.names = format, set(state)
        self.state: dict[str, Tensor] = {}
        self.origin: dict[str, list[str]] = {}
        self.filled: dict[str, str] = {}
        self.dropped: dict[str, str] = {}
        for name, tensor in state.items():
            target = _rename(format, name) or name
            if target not in self.state:
                self.state[target], self.origin[target] = tensor, [name]
            elif torch.equal(tensor, self.state[target]):
                self.dropped[name] = "the same values under another name"
            else:
                raise UserError(
                    f"{self.origin[target][0]} and {name} are one tensor under two names, but their values differ. Save the "
                    "model again with one version of its library."
                )
        self._join()

    def _join(self) -> None:
        """Stack rows of q, k and v; missing biases are zeros."""
        for name in dict.fromkeys(match[1] for name in self.state if (match := re.fullmatch(r"(.*)\[[qkv]\]", name))):
            parts = {part: self.state.pop(f"{name}[{part}]") for part in "qkv" if f"{name}[{part}]" in self.state}
            origins = [old for part in parts for old in self.origin.pop(f"{name}[{part}]")]
            shapes = {tuple(tensor.shape) for tensor in parts.values()}
            if len(shapes) > 1 or () in shapes:
                raise UserError(f"{', '.join(origins)} must have one shape, got {', '.join(map(str, sorted(shapes)))}.")
            if len(parts) < 3 and name.endswith("weight"):
                raise UserError(
                    f"{name} is missing rows: only {', '.join(origins)} are there. Save the whole state dict."
                )
            like = next(iter(parts.values()))
            self.state[name] = torch.cat([parts.get(part, torch.zeros_like(like)) for part in "qkv"])
            self.origin[name] = origins
            self.filled |= {f"{name}[{part}]": "zeros; not in the file" for part in "qkv" if part not in parts}
        if prefix := _OPTIONAL_BIASES.get(self.format):
            for name in [n for n in self.state if n.startswith(prefix) and n.endswith(".attn.qkv.weight")]:
                bias = name.removesuffix("weight") + "bias"
                if bias not in self.state:
                    self.fill(bias, self.state[name].new_zeros(self.state[name].shape[:1]), "zeros; not in the file")

    def move(self, old: str, new: str) -> None:
        """Rename all entries that begin with `old`."""
        for name in [name for name in self.state if name.startswith(old)]:
            self.state[new + name.removeprefix(old)] = self.state.pop(name)
            self.origin[new + name.removeprefix(old)] = self.origin.pop(name)

    def fill(self, name: str, tensor: Tensor, why: str) -> None:
        """Add a tensor that the file does not hold, or replace one of it."""
        self.state[name], self.filled[name] = tensor, why
        self.origin.pop(name, None)

    def drop(self, prefixes: str | tuple[str, ...], why: str) -> None:
        """Leave out all entries that begin so."""
        for name in [name for name in self.state if name.startswith(prefixes)]:
            del self.state[name]
            self.dropped |= dict.fromkeys(self.origin.pop(name, []), why)
        self.filled = {name: reason for name, reason in self.filled.items() if not name.startswith(prefixes)}

    def drop_first_token_head(self) -> None:
        """Leave out a head that reads the first token, not the mean of all: one that follows `norm`, not `fc_norm`."""
        if not any(name.startswith("fc_norm.") for name in self.names):
            self.drop("heads.0.0.", "it reads the first token, ours the mean of all")

    def convert_decoder(self) -> None:
        """Convert a VideoMAE decoder to one of ours with the same outputs, or drop it where there is none.

        Theirs projects tokens, W x, and then adds a mask token and positions of its own width; ours adds both before the
        projection. W has more columns than rows, so what they are before it can be solved for.
        """
        if not any(name.startswith(_DECODER) for name in self.state):
            return
        if why := self._decoder_problem():
            self.drop(_DECODER, why)
            return
        projection, token = self.state["trunk.decoder.decoder_embed.weight"], self.state["trunk.mask_token"]
        solved = _unproject(token.reshape(1, -1), projection).to(token.dtype)
        self.fill("trunk.mask_token", solved, "mask_token, before the projection")
        self.fill("trunk.decoder.decoder_embed.bias", projection.new_zeros(len(projection)), "zeros; not in the file")

    def _decoder_problem(self) -> str:
        """Why our decoder cannot compute the same; empty if it can. Raises UserError for values that are not finite."""
        matrices = (
            "trunk.decoder.decoder_embed.weight",
            "trunk.decoder.decoder_blocks.0.mlp.fc1.weight",
            "heads.0.projector.weight",
        )
        patch = self.state.get("trunk.patch_embed.proj.1.weight")
        others = all(name in self.state for name in ("trunk.mask_token", "trunk.decoder.norm.weight"))
        if patch is None or not others or any(getattr(self.state.get(name), "ndim", 0) != 2 for name in matrices):
            return "parts of the decoder are missing"
        projection, mlp, head = (self.state[name] for name in matrices)
        (width, trunk_width), pixels = projection.shape, patch[0].numel()
        if len(mlp) != 4 * width or len(head) != pixels:
            return f"its MLP is {len(mlp)} wide, ours {4 * width}; it predicts {len(head)} values of a patch, ours {pixels}"
        check_numbers({matrices[0]: projection})
        if width > trunk_width or int(torch.linalg.matrix_rank(projection.double(), rtol=1e-4)) < width:
            return "its projection cannot be undone, and ours adds positions before it"
        return ""

    def finalize(self, said: Mapping[str, Any], overrides: ArchOverrides | None) -> ConvertedCheckpoint:
        """Check that the tensors make one whole model of finite numbers, and add its position tables."""
        check_numbers(self.state)
        videomae = self.format in ("videomae", "hf")
        typical = _VIDEOMAE_DECODER_HEADS if videomae else TYPICAL_DECODER_HEADS
        architecture, assumed = infer_architecture(self.state, said, overrides or ArchOverrides(), typical)
        if videomae and "decoder" in architecture:
            projection = self.state["trunk.decoder.decoder_embed.weight"]
            positions = sinusoid_positions(num_tokens(architecture["trunk"]), len(projection))
            why = "the fixed table of its width, before the projection"
            self.fill("trunk.decoder.pos_embed", _unproject(positions[0], projection)[None], why)
        for name, table in position_tables(architecture).items():
            if name not in self.state:
                self.fill(name, table, "the fixed table")
        # Copies: parts of a larger tensor would be saved with the whole of it.
        state = {n: tensor.detach().clone(memory_format=torch.contiguous_format) for n, tensor in self.state.items()}
        renamed = {name: " + ".join(olds) for name, olds in self.origin.items()}
        return ConvertedCheckpoint(state, architecture, renamed, self.filled, self.dropped, assumed)


def group_by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """{name: reason} the other way round."""
    found: dict[str, list[str]] = {}
    for name, why in reasons.items():
        found.setdefault(why, []).append(name)
    return found


def preview(names: Sequence[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _rename(format: str, name: str) -> str | None:
    """Return our name of an entry of a format; None for a name that the format does not have."""
    for theirs, ours in RENAMES[format].items():
        if match := _pattern(theirs).fullmatch(name):
            return ours.format(**match.groupdict())
    return None


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    """A name of a table as a pattern, with a group for each placeholder."""
    pieces = re.split(r"\{(\w+)\}", template)
    odd = [f"(?P<{piece}>{_PLACEHOLDERS[piece]})" for piece in pieces[1::2]]
    return re.compile("".join(re.escape(text) + group for text, group in zip(pieces[::2], [*odd, ""], strict=True)))


def _unproject(rows: Tensor, projection: Tensor) -> Tensor:
    """The shortest rows (N, trunk width), float32, that a projection (width, trunk width) maps to `rows` (N, width)."""
    return (rows.double() @ torch.linalg.pinv(projection.double()).T).float()


def _architecture_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture in a `config.json`, as far as it is ours. Raises UserError for another kind of model."""
    if not config:
        return {}
    for key, wanted in (("model_type", "videomae"), ("num_channels", 3), ("hidden_act", "gelu")):
        if config.get(key, wanted) != wanted:
            raise UserError(f"{key} in config.json must be {wanted!r}, got {str(config[key])[:60]!r}.")
    trunk = {ours: config[theirs] for theirs, ours in HF_NUMBERS.items() if theirs in config}
    if isinstance(trunk.get("image_size"), list) and len(set(map(str, trunk["image_size"]))) == 1:
        trunk["image_size"] = trunk["image_size"][0]
    if "tubelet_size" in config and "patch_size" in config:
        patch = config["patch_size"]
        trunk["tubelet"] = [config["tubelet_size"], *(patch if isinstance(patch, list) else [patch, patch])]
    return {"trunk": trunk}


def _hf_config(
    architecture: Architecture, state: Mapping[str, Tensor], class_names: Sequence[str] | None
) -> dict[str, Any]:
    trunk, last = architecture["trunk"], state.get("classifier.weight")
    (frames, *patch) = trunk["tubelet"]
    config: dict[str, Any] = {
        "architectures": ["VideoMAEModel" if last is None else "VideoMAEForVideoClassification"],
        "model_type": "videomae",
        **{theirs: trunk[ours] for theirs, ours in HF_NUMBERS.items()},
        "num_channels": 3,
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
        "tubelet_size": frames,
        "intermediate_size": int(trunk["width"] * trunk["mlp_ratio"]),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": EPSILON,
        "qkv_bias": True,
        "use_mean_pooling": last is not None,
        "torch_dtype": str((state["layernorm.weight"] if last is None else last).dtype).removeprefix("torch."),
    }
    if last is None:
        if class_names is not None:
            raise UserError("--class-names was given, but the model has no classes. Remove --class-names.")
        return config
    names = [f"LABEL_{label}" for label in range(len(last))] if class_names is None else list(class_names)
    if len(names) != len(last) or len(set(names)) != len(last):
        raise UserError(
            f"--class-names must have {len(last)} different names, one a class, in the order of the labels; got {len(names)}, "
            f"{len(set(names))} of them different. Set --class-names, or another --head."
        )
    config["id2label"] = {str(label): name for label, name in enumerate(names)}
    config["label2id"] = {name: label for label, name in enumerate(names)}
    return config


def _rounded_positions(state: Mapping[str, Tensor], architecture: Architecture) -> bool:
    """Whether the table is the fixed one rounded to 16 bits. Raises UserError when it is another one."""
    table, fixed = state["trunk.pos_embed"], position_tables(architecture)["trunk.pos_embed"]
    difference = float((table.float() - fixed).abs().max())
    if difference > max(1e-6, torch.finfo(table.dtype).eps):
        raise UserError(
            f"The positional embedding must be the fixed sinusoid, as transformers' model has it; this one differs by up to "
            f"{difference:.3g} (it was interpolated or learned). Set --to pt or --to safetensors."
        )
    return difference > 1e-6
