"""Conversion of our models to Hugging Face's VideoMAE: names and configuration.

Versions of transformers name the biases of queries, keys and values differently: 4.57 to 5.4 and 5.18 onwards read `q_bias`
and `v_bias` (they have no bias for keys, which softmax cancels), 5.5 to 5.17 read `query.bias`, `key.bias` and `value.bias`.
Each ignores the other names and leaves missing biases at zero, so an export has both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omnivision.interop.formats import DECODER_PREFIXES, HF_CONFIG_KEYS, LAYER_NORM_EPS, RENAMES, pattern
from omnivision.interop.infer_architecture import position_tables
from omnivision.models.architecture import Architecture
from omnivision.models.patches import IMAGENET_MEAN, IMAGENET_STD
from omnivision.utils.errors import UserError


class Exported(NamedTuple):
    """A state dict in the names of `transformers`, its `config.json`, and {our name: reason} of the entries it leaves out."""

    state: dict[str, Tensor]
    config: dict[str, Any]
    dropped: dict[str, str]


def to_hf(
    state: Mapping[str, Tensor], architecture: Architecture, head: int = 0, class_names: Sequence[str] | None = None
) -> Exported:
    """Convert a classifier to VideoMAEForVideoClassification, or a model without class heads to VideoMAEModel.

    Args:
        state: complete, in our names (`convert_state_dict` checks it).
        head: which of several heads.
        class_names: by label; numbers if not given.

    Raises UserError for positions other than the fixed table, which VideoMAE always uses, and for a head or names that do not
    fit.
    """
    classes = architecture.get("classes", [])
    if classes and not 0 <= head < len(classes):
        raise UserError(f"--head must be 0 to {len(classes) - 1}, got {head}: the model has {len(classes)} heads.")
    count = classes[head] if classes else 0
    if class_names is not None and not len(class_names) == len(set(class_names)) == count:
        raise UserError(
            f"--class-names must have {count} different names, one per class, in the order of the labels; got "
            f"{len(class_names)}, {len(set(class_names))} of them different. Set --class-names, or another --head."
        )
    remaining: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    if _rounded_positions(state, architecture):
        dropped["trunk.pos_embed"] = "rounded to 16 bits; transformers' table is not"
    for name, tensor in state.items():
        if name.startswith(DECODER_PREFIXES):
            dropped[name] = "its decoder adds positions after its projection, ours before"
        elif name.startswith("trunk.depth_patch_embed."):
            dropped[name] = "VideoMAE takes only colors"
        elif name.startswith("heads.") and not name.startswith(f"heads.{head}."):
            dropped[name] = "another head; select it with --head"
        elif ".attn.qkv." in name:
            remaining |= dict(zip((f"{name}[q]", f"{name}[k]", f"{name}[v]"), tensor.chunk(3), strict=True))
        else:
            remaining[name.replace(f"heads.{head}.", "heads.0.", 1)] = tensor
    base, other_norm = ("videomae.", "{base}layernorm") if classes else ("", "fc_norm")
    out: dict[str, Tensor] = {}
    for theirs, ours in RENAMES["hf"].items():
        if not theirs.startswith((other_norm, "decoder.", "encoder_to", "mask_token")):
            for name in remaining:
                if match := pattern(ours).fullmatch(name):
                    out[theirs.format(base=base, **match.groupdict())] = remaining[name]
    # safetensors requires contiguous tensors that share no memory.
    out = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in out.items()}
    names = class_names or [f"LABEL_{label}" for label in range(count)]
    return Exported(out, _hf_config(architecture, out, names), dropped)


def preprocessor_config(architecture: Architecture) -> dict[str, Any]:
    """Return `preprocessor_config.json`, our normalization of pixels. Without it, transformers normalizes to -1 .. 1."""
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


def _hf_config(architecture: Architecture, state: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
    """Return `config.json`; `names` are the class names, empty for a model without classes."""
    trunk = architecture["trunk"]
    (frames, *patch) = trunk["tubelet"]
    config: dict[str, Any] = {
        "architectures": ["VideoMAEForVideoClassification" if names else "VideoMAEModel"],
        "model_type": "videomae",
        **{theirs: trunk[ours] for theirs, ours in HF_CONFIG_KEYS.items()},
        "num_channels": 3,
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
        "tubelet_size": frames,
        "intermediate_size": int(trunk["width"] * trunk["mlp_ratio"]),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": True,
        "use_mean_pooling": bool(names),
        "torch_dtype": str(state["classifier.weight" if names else "layernorm.weight"].dtype).removeprefix("torch."),
    }
    if names:
        config["id2label"] = {str(label): name for label, name in enumerate(names)}
        config["label2id"] = {name: label for label, name in enumerate(names)}
    return config


def _rounded_positions(state: Mapping[str, Tensor], architecture: Architecture) -> bool:
    """Return whether the position table is the fixed one rounded to 16 bits. Raises UserError for another table."""
    table, fixed = state["trunk.pos_embed"], position_tables(architecture)["trunk.pos_embed"]
    difference = float((table.float() - fixed).abs().max())
    if difference > max(1e-6, torch.finfo(table.dtype).eps):
        raise UserError(
            f"The positional embedding must be the fixed sinusoid that transformers' model uses; this one differs by up to "
            f"{difference:.3g} (it was interpolated or learned). Set --to pt or --to safetensors."
        )
    return difference > 1e-6
