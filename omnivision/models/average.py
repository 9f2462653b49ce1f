"""Learned average (the paper's adaptive average): a classifier whose trunk averages the trunks of frozen checkpoints.

Only the mixing weights and the heads are trained and saved. Every attempt loads the sources again (`load_sources`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from omnivision.models.classifier import VideoClassifier
from omnivision.models.vit import VisionTransformer
from omnivision.utils.errors import UserError


class AveragedClassifier(nn.Module):
    """A `VideoClassifier` of the architecture of `trunk`, whose weights are `sum_k softmax(mixing_ratio)_k * source_k`.

    Args:
        trunk: the architecture of all sources; its own weights are not used.
        classes: number of classes of each head.
        num_models: K, how many sources are averaged.
        combine_mode: one mixing weight per source ("learned_average_softmax"), or one per source and parameter tensor
            ("learned_average_layer_softmax"). All start at 1, so the average starts uniform.

    Raises UserError for a trunk with activation checkpointing, because the averaged weights are gone in the backward pass.
    """

    mixing_ratio: nn.Parameter  # logits of the weights: (K,) or (parameter tensors of the trunk, K)

    def __init__(
        self,
        trunk: VisionTransformer,
        classes: Sequence[int],
        num_models: int = 2,
        combine_mode: Literal["learned_average_softmax", "learned_average_layer_softmax"] = "learned_average_softmax",
    ) -> None:
        super().__init__()
        if trunk.activation_checkpointing:
            raise UserError(
                "trainer.model.trunk.activation_checkpointing must be false for an averaged trunk, got true."
            )
        self.names = [name for name, _ in trunk.named_parameters()]
        self.num_models = num_models
        per_tensor = combine_mode == "learned_average_layer_softmax"
        self.mixing_ratio = nn.Parameter(torch.ones((len(self.names), num_models) if per_tensor else num_models))
        self.sources = nn.Module()
        for name, parameter in trunk.named_parameters():
            empty = parameter.detach().new_zeros(num_models, *parameter.shape)
            self.sources.register_buffer(_buffer(name), empty, persistent=False)
        self.model = VideoClassifier(trunk, classes)
        for part in trunk.modules():  # neither trained nor saved: `functional_call` replaces them with the average
            for name, parameter in list(part.named_parameters(recurse=False)):
                delattr(part, name)
                part.register_buffer(name, parameter.detach(), persistent=False)

    def load_sources(self, states: Sequence[Mapping[str, Tensor]], labels: Sequence[str] = ()) -> None:
        """Load the trunks of K state dicts (`trunk.…`; other entries are ignored). `labels` name them in errors.

        Raises UserError when there are not K state dicts, or when one lacks a tensor or has one of another shape.
        """
        if len(states) != self.num_models:
            raise UserError(
                f"ensemble_num_models is {self.num_models}, and pretrained_checkpoint_path has {len(states)} checkpoints. "
                "Set one of them."
            )
        for number, state in enumerate(states):
            source = labels[number] if labels else f"source {number}"
            for name in self.names:
                buffer = self.sources.get_buffer(_buffer(name))
                tensor = state.get(f"trunk.{name}")
                if tensor is None or tensor.shape != buffer.shape[1:]:
                    problem = "is missing" if tensor is None else f"has the shape {tuple(tensor.shape)}"
                    raise UserError(
                        f"{source} does not fit the model: trunk.{name} {problem}; it must be {tuple(buffer.shape[1:])}. Set "
                        "trainer/model or pretrained_checkpoint_path."
                    )
                buffer[number].copy_(tensor)

    def mixing_weights(self) -> Tensor:
        """Return the weight of each source: (K,), or (parameter tensors, K); sums to 1 over the sources."""
        return self.mixing_ratio.softmax(-1)

    def mixing_metrics(self) -> dict[str, Any]:
        """Return the mixing weight of each source, and of each tensor if they are learned per tensor."""
        weights = self.mixing_weights().detach().cpu()
        overall = weights.mean(0) if weights.ndim == 2 else weights
        metrics: dict[str, Any] = {f"mixing_{k}": float(weight) for k, weight in enumerate(overall)}
        if weights.ndim == 2:
            metrics["mixing_by_tensor"] = dict(zip(self.names, weights.tolist(), strict=True))
        return metrics

    def averaged_trunk(self) -> dict[str, Tensor]:
        """Return the averaged parameters by their names inside the trunk."""
        averaged = {}
        for name, weights in zip(self.names, self.mixing_weights().expand(len(self.names), -1), strict=True):
            sources = self.sources.get_buffer(_buffer(name))  # (K, ...)
            # Multiply elementwise: autocast would round a matrix product.
            averaged[name] = (sources * weights.view(-1, *[1] * (sources.ndim - 1))).sum(0)
        return averaged

    def forward(self, video: Tensor, head: int = 0, depth: Tensor | None = None) -> Tensor:
        """Classify as `VideoClassifier.forward` does."""
        averaged = {f"trunk.{name}": weight for name, weight in self.averaged_trunk().items()}
        return functional_call(self.model, averaged, (video, head, depth))

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """Return the state dict of the equivalent `VideoClassifier`."""
        averaged = {f"trunk.{name}": weight.clone() for name, weight in self.averaged_trunk().items()}
        return {**self.model.state_dict(), **averaged}


def _buffer(name: str) -> str:
    """Return the name of a buffer, which must not contain dots."""
    return name.replace(".", "/")
