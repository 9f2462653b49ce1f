"""Conversion of PPMA, OmniMAE, VideoMAE and Hugging Face weights to our names.

A format is one rename table: it recognizes a file, converts its names to ours and, for Hugging Face, ours to theirs
(`interop.huggingface`).

Names and shapes are from github.com/howardzh01/PPMA, facebookresearch/omnivore (omnimae/), MCG-NJU/VideoMAE
(modeling_pretrain.py and modeling_finetune.py), and huggingface/transformers (videomae).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnivision.checkpoint.inference_config import distinct_names
from omnivision.checkpoint.state_dict_file import StateDictFile, check_numbers, strip_wrappers
from omnivision.interop.infer_architecture import (
    TYPICAL_DECODER_HEADS,
    ArchOverrides,
    infer_architecture,
    num_tokens,
    position_tables,
)
from omnivision.models.architecture import Architecture
from omnivision.models.patches import sinusoid_positions
from omnivision.utils.errors import UserError, is_out_of_memory, truncate_list

_PLACEHOLDERS = {
    "leaf": r"weight|bias",
    "n": r"\d+",
    "layer": r"norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12]",
    "cross": r"norm_memory|attn\.(?:q|kv)",
    "part": r"[qv]",
    "encoder": r"|encoder\.",
    "base": r"|videomae\.",
}
ZEROS = "zeros; not in the file"
_TRUNK = """
    trunk.pos_embed trunk.mask_token trunk.norm.{leaf} trunk.patch_embed.proj.1.{leaf} trunk.depth_patch_embed.proj.1.{leaf}
    trunk.blocks.{n}.{layer}.{leaf} trunk.decoder.pos_embed trunk.decoder.norm.{leaf} trunk.decoder.decoder_embed.{leaf}
    trunk.decoder.decoder_blocks.{n}.{layer}.{leaf} trunk.decoder.decoder_blocks.{n}.{cross}.{leaf}
""".split()
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
    "attention.attention.{part}_bias": "attn.qkv.bias[{part}]",
    **{f"attention.attention.{part}.{{leaf}}": f"attn.qkv.{{leaf}}[{part[0]}]" for part in ("query", "key", "value")},
}
# {format: {their name: ours}}. `[q]`, `[k]` and `[v]` are rows of one tensor of ours. PPMA's names are also "omnivision".
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
_VIDEOMAE_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}  # published values, by width
DECODER_PREFIXES = ("trunk.decoder.", "trunk.mask_token", "heads.0.projector.")
_DECODER_PARTS = """
    trunk.patch_embed.proj.1.weight trunk.decoder.decoder_embed.weight trunk.decoder.decoder_blocks.0.mlp.fc1.weight
    heads.0.projector.weight trunk.decoder.norm.weight trunk.mask_token
""".split()

LAYER_NORM_EPS = 1e-6  # epsilon of all our LayerNorms
HF_EPSILON = 1e-12  # epsilon of transformers' LayerNorms, unless the configuration sets another
HF_CONFIG_KEYS = {"hidden_size": "width", "num_hidden_layers": "depth", "num_attention_heads": "heads"}
HF_CONFIG_KEYS |= {name: name for name in ("num_frames", "image_size")}


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """A complete model in our names, with position tables, and what happened to each entry of its file.

    Args:
        renamed: {our name: theirs} for all entries that were taken, including those with the same name.
        filled: {our name: reason} for tensors that are not in the file.
        dropped: {their name: reason}.
        assumed: values that neither the file nor the user gave.
    """

    state: dict[str, Tensor]
    architecture: Architecture
    renamed: Mapping[str, str]
    filled: Mapping[str, str]
    dropped: Mapping[str, str]
    assumed: list[str]

    def summary(self) -> str:
        """Summarize the model in a few words."""
        trunk, classes = self.architecture["trunk"], self.architecture.get("classes")
        return (
            f"{'encoder' if classes == [] else self.architecture['kind']} of width {trunk['width']}, depth {trunk['depth']}, "
            f"{trunk['heads']} heads, {trunk['num_frames']} frames of {trunk['image_size']} x {trunk['image_size']}"
            + "".join(f", {count} classes" for count in classes or [])
        )

    def lines(self) -> list[str]:
        """Return a table to print: for each outcome and reason, how many entries had it, and the first names."""
        renamed = [f"{old} -> {new}" for new, old in self.renamed.items() if new != old]
        return [
            *list_by_reason("kept", {new: "" for new, old in self.renamed.items() if new == old}),
            *list_by_reason("renamed", dict.fromkeys(renamed, "")),
            *list_by_reason("filled", self.filled),
            *list_by_reason("dropped", self.dropped),
            *list_by_reason("assumed", dict.fromkeys(self.assumed, "")),
        ]


def list_by_reason(outcome: str, reasons: Mapping[str, str]) -> list[str]:
    """Return a line for each reason: how many names have it, and the first of them."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    return [
        f"  {outcome:8} {len(group):4}  {truncate_list(group, 3)}{f' ({why})' if why else ''}"
        for why, group in names.items()
    ]


def convert_file(
    source: StateDictFile, format: str = "auto", overrides: ArchOverrides | None = None
) -> tuple[ConvertedCheckpoint, str]:
    """Return the model of a file in our names, and the format of the file.

    Args:
        format: "auto", "ppma" (our names without an architecture), or a key of RENAMES.

    Raises UserError, with the file's path first, for names of no known format, and for tensors that do not make one complete
    model.
    """
    source.refuse_own_class()
    try:
        state = strip_wrappers(source.state, "model.")  # the prefix of a training module around the model
        recognized = recognize(state, format)
        in_file = source.config if recognized == "hf" else source.architecture
        converted = convert_state_dict(recognized, state, in_file, overrides)
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from None
    return converted, "ppma" if recognized == "omnivision" and not source.architecture else recognized


def recognize(names: Collection[str], choice: str = "auto") -> str:
    """Return the format, a key of RENAMES, that all `names` belong to; `choice` (as in `convert_file`) allows only one.

    Raises UserError, with the nearest format and the first names it does not have, if there is none.
    """
    if "mixing_ratio" in names:
        raise UserError(
            "The checkpoint is a learned average, which does not contain a trunk. Merge it first: "
            "omnivision export CHECKPOINT OUT.pt --to pt --merge."
        )
    unknown = {format: [name for name in names if _rename(format, name) is None] for format in RENAMES}
    nearest = min(unknown, key=lambda format: len(unknown[format]))
    format = {"auto": nearest, "ppma": "omnivision"}.get(choice, choice)
    if not unknown[format]:
        return format
    raise UserError(
        f"{len(unknown[format])} of {len(names)} entries have no name of format {format}: {truncate_list(unknown[format])}. "
        f"Expected weights of {', '.join(RENAMES)} (see docs/interchange.md); the nearest is --format {nearest}."
    )


def hf_class_names(config: Mapping[str, Any]) -> list[str] | None:
    """Return the class names in a `config.json`, by label; None if it only has transformers' placeholders."""
    labels = config.get("id2label")
    names: list[Any] = [labels.get(str(label)) for label in range(len(labels))] if isinstance(labels, Mapping) else []
    if not all(isinstance(name, str) for name in names) or names == [f"LABEL_{n}" for n in range(len(names))]:
        return None
    return distinct_names(names)


def convert_state_dict(
    format: str, state: Mapping[str, Tensor], in_file: Mapping[str, Any], overrides: ArchOverrides | None = None
) -> ConvertedCheckpoint:
    """Convert a state dict in a format, a key of RENAMES, to one complete model of finite numbers.

    Args:
        in_file: the architecture in the file, or a part of it; for "hf", the content of `config.json`. It may be empty.

    Raises UserError when the tensors do not make one complete model, or when the configuration describes another one.
    """
    try:
        mapper = _KeyMapper(format, state)
        mapper.join()
        if format in ("videomae", "hf"):
            mapper.convert_videomae()
        if format != "hf":
            return mapper.finalize(in_file, overrides or ArchOverrides())
        converted = mapper.finalize(_architecture_of(in_file, mapper.state), overrides or ArchOverrides())
    except UserError:
        raise
    except (LookupError, ValueError, AttributeError, TypeError, ArithmeticError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        problem = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(
            f"The weights do not make one complete model: {problem:.400}. Save the whole state dict."
        ) from None
    epsilon = in_file.get("layer_norm_eps", HF_EPSILON if in_file else LAYER_NORM_EPS)
    if epsilon != LAYER_NORM_EPS:
        converted.assumed.append(f"LayerNorm epsilon {LAYER_NORM_EPS:g} (theirs: {str(epsilon)[:20]})")
    return converted


def _architecture_of(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the parts of our architecture that a `config.json` gives; `state` is in our names.

    Raises UserError for another kind of model.
    """
    for key, wanted in (("model_type", "videomae"), ("num_channels", 3), ("hidden_act", "gelu")):
        if config.get(key, wanted) != wanted:
            raise UserError(f"{key} in config.json must be {wanted!r}, got {str(config[key])[:60]!r}.")
    trunk = {ours: config[theirs] for theirs, ours in HF_CONFIG_KEYS.items() if theirs in config}
    if isinstance(trunk.get("image_size"), list) and len(set(map(str, trunk["image_size"]))) == 1:
        trunk["image_size"] = trunk["image_size"][0]
    if "tubelet_size" in config and "patch_size" in config:
        patch = config["patch_size"]
        trunk["tubelet"] = [config["tubelet_size"], *(patch if isinstance(patch, list) else [patch, patch])]
    if "trunk.decoder.norm.weight" not in state:
        return {"trunk": trunk}
    decoder = {ours: config.get(f"decoder_{theirs}") for theirs, ours in list(HF_CONFIG_KEYS.items())[:3]}
    return {"trunk": trunk, "decoder": {name: number for name, number in decoder.items() if number is not None}}


class _KeyMapper:
    """Maps the entries of a file to our names: `state`, where each tensor came from (`origin`), or why it was added."""

    def __init__(self, format: str, state: Mapping[str, Tensor]) -> None:
        self.format = format
        self.state: dict[str, Tensor] = {}
        self.origin: dict[str, list[str]] = {}
        self.filled: dict[str, str] = {}
        self.dropped: dict[str, str] = {}
        for name, tensor in state.items():
            target = _rename(format, name) or name
            if format == "omnimae" and any(n.startswith("trunk.decoder.") for n in state):
                target = target.replace("heads.0.0.", "heads.0.projector.")  # OmniMAE calls both `head.`
            if target not in self.state:
                self.state[target], self.origin[target] = tensor, [name]
            elif torch.equal(tensor, self.state[target]):
                self.dropped[name] = "same values under another name"
            else:
                raise UserError(
                    f"{self.origin[target][0]} and {name} are one tensor under two names, but their values differ. Save the "
                    "model again with one version of its library."
                )

    def join(self) -> None:
        """Stack rows of q, k and v; missing biases are zeros."""
        for name in dict.fromkeys(match[1] for name in self.state if (match := re.fullmatch(r"(.*)\[[qkv]\]", name))):
            parts = {part: self.state.pop(f"{name}[{part}]") for part in "qkv" if f"{name}[{part}]" in self.state}
            self.origin[name] = [old for part in parts for old in self.origin.pop(f"{name}[{part}]")]
            if name.endswith("bias"):
                zeros = torch.zeros_like(next(iter(parts.values())))
                self.filled |= {f"{name}[{part}]": ZEROS for part in "qkv" if part not in parts}
                parts = {part: parts.get(part, zeros) for part in "qkv"}
            self.state[name] = torch.cat(list(parts.values()))
        for name, weight in list(self.state.items()):
            bias = name.removesuffix("weight") + "bias"
            if self.format != "omnivision" and name.endswith(".attn.qkv.weight") and bias not in self.state:
                self.fill(bias, weight.new_zeros(len(weight)), ZEROS)

    def fill(self, name: str, tensor: Tensor, why: str) -> None:
        """Add a tensor that the file does not have, or replace one that it has."""
        self.state[name], self.filled[name] = tensor, why
        self.origin.pop(name, None)

    def drop(self, prefixes: str | tuple[str, ...], why: str) -> None:
        """Leave out all entries that begin with a prefix."""
        for name in [name for name in self.state if name.startswith(prefixes)]:
            del self.state[name]
            self.dropped |= dict.fromkeys(self.origin.pop(name, []), why)
        self.filled = {name: reason for name, reason in self.filled.items() if not name.startswith(prefixes)}

    def convert_videomae(self) -> None:
        """Drop a head that reads the first token (it follows `norm`, not `fc_norm`); fill in a missing last norm; convert a
        decoder to one of ours with the same outputs, or drop it if there is no such decoder.

        Their decoder projects tokens, W x, and then adds a mask token and positions of the decoder's width; ours adds both
        before the projection. W has more columns than rows, so their values before the projection can be solved for.
        """
        origins = [name for names in self.origin.values() for name in names]
        if not any(name.startswith("fc_norm.") for name in origins):
            self.drop("heads.0.0.", "it reads the first token, ours the mean of all")
        if self.format == "hf" and "trunk.norm.weight" not in self.state and "trunk.norm.bias" not in self.state:
            # The bare encoder of a model with `use_mean_pooling` ends before the norm, which its classifier holds.
            bias = self.state["trunk.patch_embed.proj.1.bias"]
            self.fill("trunk.norm.weight", torch.ones_like(bias), "this encoder ends before it")
            self.fill("trunk.norm.bias", torch.zeros_like(bias), "this encoder ends before it")
        if not any(name.startswith(DECODER_PREFIXES) for name in self.state):
            return
        if why := self._decoder_problem():
            return self.drop(DECODER_PREFIXES, why)
        projection, token = self.state["trunk.decoder.decoder_embed.weight"], self.state["trunk.mask_token"]
        solved = _unproject(token.reshape(1, -1), projection).to(token.dtype)
        self.fill("trunk.mask_token", solved, "mask_token, before the projection")
        self.fill("trunk.decoder.decoder_embed.bias", projection.new_zeros(len(projection)), ZEROS)

    def _decoder_problem(self) -> str:
        """Return why our decoder cannot compute the same; "" if it can. Raises UserError for values that are not finite."""
        parts = [self.state.get(name, torch.empty(())) for name in _DECODER_PARTS]
        if not all(part.ndim for part in parts):
            return "parts of the decoder are missing"
        patch, projection, mlp, head, *_ = parts
        (width, trunk_width), pixels = projection.shape, patch[0].numel()
        if len(mlp) != 4 * width or len(head) != pixels:
            return (
                f"its MLP is {len(mlp)} wide, ours {4 * width}; it predicts {len(head)} values per patch, ours {pixels}"
            )
        check_numbers({"trunk.decoder.decoder_embed.weight": projection})
        if width > trunk_width or int(torch.linalg.matrix_rank(projection.double(), rtol=1e-4)) < width:
            return "its projection cannot be inverted, and ours adds positions before it"
        return ""

    def finalize(self, in_file: Mapping[str, Any], overrides: ArchOverrides) -> ConvertedCheckpoint:
        """Check that the tensors make one complete model of finite numbers, and add its position tables."""
        check_numbers(self.state)
        videomae = self.format in ("videomae", "hf")
        typical = _VIDEOMAE_DECODER_HEADS if videomae else TYPICAL_DECODER_HEADS
        architecture, assumed = infer_architecture(self.state, in_file, overrides, typical)
        if videomae and "decoder" in architecture:
            projection = self.state["trunk.decoder.decoder_embed.weight"]
            positions = sinusoid_positions(num_tokens(architecture["trunk"]), len(projection))
            why = "the fixed table of its width, before the projection"
            self.fill("trunk.decoder.pos_embed", _unproject(positions[0], projection)[None], why)
        for name, table in position_tables(architecture).items():
            if name not in self.state:
                self.fill(name, table, "the fixed table")
        # Copy: a view of a larger tensor would be saved with all of that tensor.
        state = {n: tensor.detach().clone(memory_format=torch.contiguous_format) for n, tensor in self.state.items()}
        renamed = {name: " + ".join(olds) for name, olds in self.origin.items()}
        return ConvertedCheckpoint(state, architecture, renamed, self.filled, self.dropped, assumed)


def _rename(format: str, name: str) -> str | None:
    """Return our name for an entry of a format; None if the format does not have the entry."""
    for theirs, ours in RENAMES[format].items():
        if match := pattern(theirs).fullmatch(name):
            return ours.format(**match.groupdict())
    return None


@functools.cache
def pattern(template: str) -> re.Pattern[str]:
    """Compile a name in a rename table to a pattern, with a group for each placeholder."""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", lambda m: f"(?P<{m[1]}>{_PLACEHOLDERS[m[1]]})", re.escape(template)))


def _unproject(rows: Tensor, projection: Tensor) -> Tensor:
    """Return the shortest (N, trunk width), float32, that `projection` (width, trunk width) maps to `rows` (N, width)."""
    return (rows.double() @ torch.linalg.pinv(projection.double()).T).float()
