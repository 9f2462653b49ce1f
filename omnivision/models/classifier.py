"""Video classifier: the trunk's tokens are averaged, normalized and mapped to logits, by one linear head per label set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from omnivision.models.vit import VisionTransformer


def linear_head(width: int, classes: int) -> nn.Sequential:
    """Build the published head: a linear layer, weights normal(0, .01), in a Sequential (hence its name `heads.0.0`)."""
    layer = nn.Linear(width, classes)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(layer)


class VideoClassifier(nn.Module):
    """Trunk and linear heads.

    Args:
        trunk: if all its parameters are frozen, no gradient is recorded in it.
        classes: number of classes of each head.
    """

    def __init__(self, trunk: VisionTransformer, classes: Sequence[int]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(linear_head(trunk.width, count) for count in classes)

    def forward(self, video: Tensor, head: int = 0, depth: Tensor | None = None) -> Tensor:
        """Classify (B, C, T, H, W) or images (B, C, H, W), uint8 or normalized; return logits (B, classes of that head).

        `depth`, for RGB-D images, is (B, 1, H, W) in [0, 1].
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(self.trunk)):
            features = self.features(video, depth)
        return self.heads[head](features)

    def features(self, video: Tensor, depth: Tensor | None = None) -> Tensor:
        """Return (B, D): the mean over the tokens of the last block, then the trunk's LayerNorm."""
        return self.trunk.norm(self.trunk(video, depth=depth).mean(1))


def is_frozen(module: nn.Module) -> bool:
    """Return whether a module has parameters and none of them is trained."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def train_mode(model: nn.Module) -> None:
    """Set a model to training mode, but its frozen modules to evaluation mode: no drop path, no statistics."""
    model.train()
    for module in model.modules():
        if is_frozen(module):
            module.eval()
