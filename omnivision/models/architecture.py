"""A model's architecture as plain numbers, saved in checkpoints, and the model built from them.

Weights alone do not show the number of attention heads or the token grid. A checkpoint may come from anyone, so it holds
numbers and does not name a class to build.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from omnivision.models.attentive import AttentiveClassifier
from omnivision.models.average import AveragedClassifier
from omnivision.models.classifier import VideoClassifier
from omnivision.models.mae import Decoder, DecoderConfig, MaskedAutoencoder
from omnivision.models.vit import VisionTransformer
from omnivision.utils.errors import UserError, is_out_of_memory

TRUNK_ARGUMENTS = ("width", "depth", "heads", "mlp_ratio", "num_frames", "image_size", "tubelet", "rgbd")
DECODER_ARGUMENTS = ("width", "depth", "heads", "attention")
KINDS = ("autoencoder", "classifier", "average", "attentive")

Architecture = dict[str, Any]


def architecture_of(model: nn.Module) -> Architecture:
    """Return `kind`, `trunk`, and what the kind also has: `decoder`; `classes`; `num_models` and `combine_mode`; `probes`."""
    if isinstance(model, MaskedAutoencoder):
        decoder = model.trunk.decoder
        assert isinstance(decoder, Decoder)
        return {
            "kind": "autoencoder",
            "trunk": model.trunk.architecture,
            "decoder": {key: getattr(decoder, key) for key in DECODER_ARGUMENTS},
        }
    if isinstance(model, VideoClassifier):
        classes = [head[0].out_features for head in model.heads]  # type: ignore[index]
        return {"kind": "classifier", "trunk": model.trunk.architecture, "classes": classes}
    if isinstance(model, AttentiveClassifier):
        classes = [head[0].out_features for head in model.probes[0].heads]  # type: ignore[union-attr]
        return {
            "kind": "attentive",
            "trunk": model.trunk.architecture,
            "classes": classes,
            "probes": model.architecture,
        }
    if isinstance(model, AveragedClassifier):
        per_tensor = model.mixing_ratio.ndim == 2
        return architecture_of(model.model) | {
            "kind": "average",
            "num_models": model.num_models,
            "combine_mode": "learned_average_layer_softmax" if per_tensor else "learned_average_softmax",
        }
    return {}


def has_unused_parameters(model: nn.Module) -> bool:
    """Return whether a step may give some parameters no gradient: another label set's head, or the depth embedding."""
    architecture = architecture_of(model)
    return len(architecture.get("classes", ())) > 1 or bool(architecture.get("trunk", {}).get("rgbd"))


def from_architecture(architecture: Architecture, where: str) -> nn.Module:
    """Build the model, randomly initialized. Raises UserError naming `where` if the description is invalid."""
    try:
        numbers = {"rgbd": False} | architecture["trunk"]
        trunk = VisionTransformer(**{key: numbers[key] for key in TRUNK_ARGUMENTS})
        if architecture["kind"] == "autoencoder":
            numbers = {"attention": "self"} | architecture["decoder"]
            return MaskedAutoencoder(trunk, cast(DecoderConfig, {key: numbers[key] for key in DECODER_ARGUMENTS}))
        if architecture["kind"] == "classifier":
            return VideoClassifier(trunk, architecture["classes"])
        if architecture["kind"] == "attentive":
            return AttentiveClassifier(trunk, architecture["classes"], **architecture["probes"])
        if architecture["kind"] == "average":
            return AveragedClassifier(
                trunk, architecture["classes"], architecture["num_models"], architecture["combine_mode"]
            )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{where} does not describe a model ({type(error).__name__}: {error}). It must have kind, trunk "
            f"({', '.join(TRUNK_ARGUMENTS)}) and the entries of its kind."
        ) from error
    raise UserError(f"{where}: kind must be one of {', '.join(KINDS)}, got {architecture['kind']!r}.")
