"""Attentive probes: small heads that attend to all tokens of a frozen trunk. A grid of them shares its pass.

The probe of V-JEPA (Bardes et al. 2024, 2025): self-attention blocks, then a learned query that attends to all tokens.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from omnivision.config.schema import Heads
from omnivision.models.classifier import is_frozen, linear_head
from omnivision.models.mae import CrossBlock
from omnivision.models.vit import Block, VisionTransformer, init_linear

Factor = Annotated[float, Field(gt=0, le=1e6)]
Factors = Annotated[list[Factor], Field(min_length=1, max_length=100)]


class AttentiveProbe(nn.Module):
    """Pool tokens (B, N, D) by attention, and classify: a linear head per label set.

    Args:
        blocks: the last one is cross-attention from the query; those before it are self-attention.
    """

    def __init__(self, width: int, heads: int, blocks: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks - 1))
        self.cross = CrossBlock(width, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_linear)
        nn.init.trunc_normal_(self.query, std=0.02)
        self.heads = nn.ModuleList(linear_head(width, count) for count in classes)

    def forward(self, tokens: Tensor, head: int) -> Tensor:
        """Return logits (B, classes of that head)."""
        for block in self.blocks:
            tokens = block(tokens)
        pooled = self.cross(self.query.expand(len(tokens), -1, -1), tokens)[:, 0]
        return self.heads[head](self.norm(pooled))

    def attention(self, tokens: Tensor) -> Tensor:
        """Return how much the query attends to each token, the mean over heads: (B, N), which adds up to 1."""
        for block in self.blocks:
            tokens = block(tokens)
        cross, query = self.cross.attn, self.cross.norm1(self.query)
        (batch, count, width), heads = tokens.shape, cross.heads
        q = cross.q(query).view(heads, width // heads)
        k = cross.kv(self.cross.norm_memory(tokens)).view(batch, count, 2, heads, width // heads)[:, :, 0]
        scores = torch.einsum("hd,bnhd->bhn", q, k) / math.sqrt(width // heads)
        return scores.softmax(-1).mean(1)


class AttentiveClassifier(nn.Module):
    """A trunk and a grid of attentive probes, one for each pair of factors; all start with the same weights.

    A probe is trained as if it were alone: its loss is its own, and so is the state of its optimizer. `selected` is the probe
    that counts in evaluation; it is chosen by a held-out part of the training split (`trainer.data.hold_out`).

    Args:
        blocks: transformer blocks of a probe, 1 to 4.
        heads: attention heads of a probe.
        lr_factors, weight_decay_factors: the grid: factors of the learning rate and of the weight decay.
    """

    selected: Tensor

    def __init__(
        self,
        trunk: VisionTransformer,
        classes: Sequence[int],
        blocks: Annotated[int, Field(ge=1, le=4)] = 1,
        heads: Heads = 12,
        lr_factors: Factors = (1.0,),  # type: ignore[assignment]
        weight_decay_factors: Factors = (1.0,),  # type: ignore[assignment]
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.grid = list(itertools.product(lr_factors, weight_decay_factors))
        self.architecture = {
            "blocks": blocks,
            "heads": heads,
            "lr_factors": list(lr_factors),
            "weight_decay_factors": list(weight_decay_factors),
        }
        probe = AttentiveProbe(trunk.width, heads, blocks, classes)
        self.probes = nn.ModuleList(copy.deepcopy(probe) for _ in self.grid)
        self.register_buffer("selected", torch.zeros(()))  # floating point, like all entries of weights files

    def forward(self, video: Tensor, head: int = 0, depth: Tensor | None = None, every: bool | None = None) -> Tensor:
        """Return logits (B, classes) of the selected probe; with `every` (default: in training), (probes, B, classes) of all.

        Arguments as for `VideoClassifier.forward`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(self.trunk)):
            tokens = self.trunk.norm(self.trunk(video, depth=depth))
        if self.training if every is None else every:
            return torch.stack([probe(tokens, head) for probe in self.probes])
        return self.probes[int(self.selected)](tokens, head)

    def option_factors(self) -> dict[str, dict[str, float]]:
        """Return the factors of each parameter's learning rate and weight decay, by option and name."""
        factors: dict[str, dict[str, float]] = {"lr": {}, "weight_decay": {}}
        for name, _ in self.named_parameters():
            if name.startswith("probes."):
                lr, weight_decay = self.grid[int(name.split(".")[1])]
                factors["lr"][name], factors["weight_decay"][name] = lr, weight_decay
        return factors
