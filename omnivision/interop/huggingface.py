"""VideoMAE of Hugging Face's `transformers`, from its names to ours and back.

Encoder, classifier over the mean of its tokens, and, on the way in, the decoder of its pretraining. What is not the same:
its `fc_norm` and the last norm of its decoder have epsilon 1e-5 whatever the configuration says (ours: 1e-6).

Versions name the biases of queries, keys and values differently: 4.57 to 5.4 and 5.18 onwards read `q_bias` and `v_bias` (they
have no bias for keys, which softmax cancels), 5.5 to 5.17 read `query.bias`, `key.bias` and `value.bias`. Each takes the
other names for unexpected ones and leaves its own at zero, so an export holds both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnivision.checkpoint.fingerprint import valid_names
from omnivision.interop.geometry import Given, position_tables
from omnivision.interop.intake import Imported, Intake
from omnivision.interop.published import FIRST_TOKEN, NO_COUNTERPART, finish_videomae, take_decoder
from omnivision.models.architecture import Architecture
from omnivision.models.patches import IMAGENET_MEAN, IMAGENET_STD
from omnivision.utils.errors import UserError

EPSILON = 1e-6  # of every LayerNorm here
FC_NORM_EPSILON = 1e-5  # of theirs before the classifier
_THEIR_EPSILON = 1e-12  # of the others, where a configuration does not say it
# Ours and theirs, in each block.
_LAYER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("query", "key", "value")
# Their numbers and ours, as far as they are the same.
_NUMBERS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "num_frames": "num_frames",
    "image_size": "image_size",
}
_DECODER_NUMBERS = {
    "decoder_hidden_size": "width",
    "decoder_num_hidden_layers": "depth",
    "decoder_num_attention_heads": "heads",
}


@dataclass(frozen=True)
class Exported:
    """A state dict under the names of files of `transformers`, its `config.json`, and what could not be carried, by name."""

    state: dict[str, Tensor]
    config: dict[str, Any]
    dropped: dict[str, str]


def from_hf(state: Mapping[str, Tensor], config: Mapping[str, Any], given: Given | None = None) -> Imported:
    """VideoMAEModel, VideoMAEForVideoClassification or VideoMAEForPreTraining, under its names in memory or in files.

    Args:
        config: the content of `config.json`, or nothing: then `given` or usual numbers take its place.

    Raises UserError for a configuration that is nonsense, of another kind of model, or not of these weights.
    """
    said = _said(config)
    intake = Intake(dict(state))
    base = "videomae." if any(name.startswith("videomae.") for name in state) else ""
    intake.rename(f"{base}embeddings.patch_embeddings.projection.", "trunk.patch_embed.proj.1.")
    take_decoder(intake, "decoder.decoder_layers.0.intermediate.dense.weight")
    pairs = [(f"{base}encoder.layer.", "trunk.blocks."), ("decoder.decoder_layers.", "trunk.decoder.decoder_blocks.")]
    for old, new in [(f"{theirs}{n}.", f"{ours}{n}.") for theirs, ours in pairs for n in intake.numbers(theirs)]:
        for ours, theirs in _LAYER.items():
            intake.rename(f"{old}{theirs}.", f"{new}{ours}.")
        attention = f"{old}attention.attention."
        intake.join([f"{attention}{part}.weight" for part in _QKV], f"{new}attn.qkv.weight")
        biases = [f"{attention}{part}.bias" for part in _QKV]
        _drop_duplicates(intake, {f"{attention}{part[0]}_bias": f"{attention}{part}.bias" for part in _QKV})
        if not any(name in intake.left for name in biases):
            biases = [f"{attention}{part[0]}_bias" for part in _QKV]
        if any(name in intake.left for name in biases):
            intake.join(biases, f"{new}attn.qkv.bias", zeros_where_missing=True)
        elif f"{new}attn.qkv.weight" in intake.state:
            intake.fill(f"{new}attn.qkv.bias", 0, intake.state[f"{new}attn.qkv.weight"], "not in the file")
    if "fc_norm.weight" in state:
        intake.rename("fc_norm.", "trunk.norm.")
        intake.rename("classifier.", "heads.0.0.")
    else:
        intake.rename(f"{base}layernorm.", "trunk.norm.")
        intake.drop("classifier.", FIRST_TOKEN)
    if "trunk.norm.weight" not in intake.state and "trunk.patch_embed.proj.1.bias" in intake.state:
        # The bare encoder of a model with `use_mean_pooling` ends before the norm, which its classifier held.
        like = intake.state["trunk.patch_embed.proj.1.bias"]
        intake.fill("trunk.norm.weight", 1, like, "this encoder ends before it")
        intake.fill("trunk.norm.bias", 0, like, "this encoder ends before it")
    decoder = "trunk.decoder.norm.weight" in intake.state
    if config and decoder:
        said["decoder"] = {ours: config[theirs] for theirs, ours in _DECODER_NUMBERS.items() if theirs in config}
    imported = finish_videomae(intake, said, given or Given())
    assumed = [*imported.assumed, *_epsilons(config, decoder or "fc_norm.weight" in state)]
    return dataclasses.replace(imported, assumed=assumed)


def _drop_duplicates(intake: Intake, names: Mapping[str, str]) -> None:
    """Leave out entries that a file also holds under another name, {name: other}. Raises UserError where the two differ."""
    for name, other in names.items():
        if name in intake.left and other in intake.left:
            if not torch.equal(intake.left[name], intake.left[other]):
                raise UserError(
                    f"{name} and {other} are the same bias under the names of two versions of transformers, but their values "
                    "differ. Expected equal values. Save the model again with one version of transformers."
                )
            intake.drop(name, "the same values under another name")


def to_hf(
    state: Mapping[str, Tensor], architecture: Architecture, head: int = 0, class_names: Sequence[str] | None = None
) -> Exported:
    """A classifier as VideoMAEForVideoClassification; an autoencoder, or a classifier without heads, as VideoMAEModel.

    Args:
        state: whole, in our names (`published.from_ours` checks it).
        head: which of several heads.
        class_names: by label; numbers if not given.

    Raises UserError for positions that are not the fixed table, which that model always has, and for a head or names that
    do not fit.
    """
    out: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    if _rounded_positions(state, architecture):
        dropped["trunk.pos_embed"] = "rounded to 16 bits; the table there is not"
    classes = architecture.get("classes", [])
    if classes and not 0 <= head < len(classes):
        raise UserError(f"--head is {head}; the model has {len(classes)} heads, counted from 0. Change --head.")
    base = "videomae." if classes else ""
    norm = "fc_norm" if classes else "layernorm"
    for leaf in ("weight", "bias"):
        out[f"{base}embeddings.patch_embeddings.projection.{leaf}"] = state[f"trunk.patch_embed.proj.1.{leaf}"]
        out[f"{norm}.{leaf}"] = state[f"trunk.norm.{leaf}"]
        if classes:
            out[f"classifier.{leaf}"] = state[f"heads.{head}.0.{leaf}"]
    for number in range(architecture["trunk"]["depth"]):
        old, new = f"trunk.blocks.{number}.", f"{base}encoder.layer.{number}."
        for leaf in ("weight", "bias"):
            out |= {f"{new}{theirs}.{leaf}": state[f"{old}{ours}.{leaf}"] for ours, theirs in _LAYER.items()}
        attention = f"{new}attention.attention."
        for leaf in ("weight", "bias"):
            parts = zip(_QKV, state[f"{old}attn.qkv.{leaf}"].chunk(3), strict=True)
            out |= {f"{attention}{part}.{leaf}": tensor for part, tensor in parts}
        out |= {f"{attention}{part[0]}_bias": out[f"{attention}{part}.bias"] for part in ("query", "value")}
    for name in state:
        if name.startswith(("trunk.decoder.", "trunk.mask_token", "heads.0.projector.")):
            dropped[name] = NO_COUNTERPART
        elif name.startswith("trunk.depth_patch_embed."):
            dropped[name] = "no place there: colours alone"
        elif name.startswith("heads.") and not name.startswith(f"heads.{head}."):
            dropped[name] = "another head; choose it with --head"
    # Contiguous, and no part of another tensor: safetensors takes nothing else.
    out = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in out.items()}
    return Exported(out, _config(architecture, out, class_names), dropped)


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
    """The class names in a `config.json`, by label; None where there are none but transformers' placeholders."""
    said = config.get("id2label")
    names = [said.get(str(label)) for label in range(len(said))] if isinstance(said, Mapping) else []
    return None if names == [f"LABEL_{label}" for label in range(len(names))] else valid_names(names)


def _config(
    architecture: Architecture, state: Mapping[str, Tensor], class_names: Sequence[str] | None
) -> dict[str, Any]:
    trunk = architecture["trunk"]
    (frames, *patch), classified = trunk["tubelet"], "classifier.weight" in state
    config: dict[str, Any] = {
        "architectures": ["VideoMAEForVideoClassification" if classified else "VideoMAEModel"],
        "model_type": "videomae",
        **{theirs: trunk[ours] for theirs, ours in _NUMBERS.items()},
        "num_channels": 3,
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
        "tubelet_size": frames,
        "intermediate_size": int(trunk["width"] * trunk["mlp_ratio"]),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": EPSILON,
        "qkv_bias": True,
        "use_mean_pooling": classified,
        "torch_dtype": str(state["classifier.weight" if classified else "layernorm.weight"].dtype).removeprefix(
            "torch."
        ),
    }
    if classified:
        count = len(state["classifier.weight"])
        names = [f"LABEL_{label}" for label in range(count)] if class_names is None else list(class_names)
        if len(names) != count or len(set(names)) != count:
            raise UserError(
                f"--class-names has {len(names)} names, {len(set(names))} of them different, and the head has {count} classes; "
                "expected one name a class, in the order of the labels. Change --class-names, or choose another --head."
            )
        config["id2label"] = {str(label): name for label, name in enumerate(names)}
        config["label2id"] = {name: label for label, name in enumerate(names)}
    elif class_names is not None:
        raise UserError("--class-names was given, and the model has no classes. Leave it out.")
    return config


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of the model, in our words. Raises UserError for one that our trunk cannot follow."""
    if not config:
        return {}
    wanted = {"model_type": ("videomae",), "num_channels": (3,), "hidden_act": ("gelu",)}
    for key, values in wanted.items():
        if key in config and config[key] not in values:
            raise UserError(
                f"config.json has {key} {str(config[key])[:60]!r}; expected {values[0]!r}. The folder holds another "
                "kind of model."
            )
    trunk = {ours: config[theirs] for theirs, ours in _NUMBERS.items() if theirs in config}
    if isinstance(trunk.get("image_size"), list) and len(set(map(str, trunk["image_size"]))) == 1:
        trunk["image_size"] = trunk["image_size"][0]
    if "tubelet_size" in config and "patch_size" in config:
        patch = config["patch_size"]
        trunk["tubelet"] = [config["tubelet_size"], *(patch if isinstance(patch, list) else [patch, patch])]
    return {"trunk": trunk}


def _epsilons(config: Mapping[str, Any], with_last: bool) -> list[str]:
    """Which LayerNorms of the file have another epsilon than ours: the result differs by what that makes."""
    stated = config.get("layer_norm_eps", _THEIR_EPSILON if config else EPSILON)
    others = [] if stated == EPSILON else [f"LayerNorm epsilon {EPSILON:g} (theirs: {str(stated)[:20]})"]
    return others + ([f"epsilon {EPSILON:g} of the last norm (theirs: {FC_NORM_EPSILON:g})"] if with_last else [])


def _rounded_positions(state: Mapping[str, Tensor], architecture: Architecture) -> bool:
    """Whether the table is the fixed one rounded to 16 bits. Raises UserError when it is another one."""
    table, fixed = state["trunk.pos_embed"], position_tables(architecture)["trunk.pos_embed"]
    difference = float((table.float() - fixed).abs().max())
    if difference > max(1e-6, torch.finfo(table.dtype).eps):
        raise UserError(
            f"The position table of this model differs from the fixed sinusoid by up to {difference:.3g}: it was interpolated "
            "from another clip size, or learned. That model of transformers always has the fixed one, and would compute "
            "something else. Export with --to pt or --to safetensors."
        )
    return difference > 1e-6
