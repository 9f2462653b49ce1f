"""Masked autoencoder: the trunk encodes the visible patches (10 % in the recipe), a small decoder predicts the rest.

Only visible patches are embedded and encoded; all tokens pass through the decoder; only masked ones are projected to
pixels and compared (He et al. 2022; Tong et al. 2022, VideoMAE; Girdhar et al. 2023, OmniMAE).

Two options make the decoder cheaper than in the paper's recipe: `share` trains on a fraction of the masked tokens (Wang et al.
2023, VideoMAE V2, "dual masking"), attention="cross" lets tokens attend only to the visible ones (Fu et al. 2024, CrossMAE).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Annotated, Literal, NamedTuple, Required, cast

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import TypedDict

from omnivision.config.schema import Depth, Heads, Width
from omnivision.models.patches import pick_tubelets, sinusoid_positions, unnormalize_pixels
from omnivision.models.vit import Block, Mlp, VisionTransformer, as_video, init_linear, run_blocks
from omnivision.utils.errors import UserError

TargetNorm = Literal["channel", "patch", "none"]


class MaePrediction(NamedTuple):
    """Predicted pixels of the masked tokens."""

    pixels: Tensor  # (B, M, pt * ph * pw * 3), values of a tubelet in the order (t, h, w, c)
    # (B, M) indices of those tokens in raster order; in training the decoder's `share` of the masked ones
    masked_idx: Tensor


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to a memory; one matrix holds the rows of k and v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"heads must divide width {width}, got {heads}. Set trainer.model.decoder.heads.")
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # (B, M, D), (B, K, D) -> (B, M, D)
        (batch, tokens, width), kept = x.shape, memory.shape[1]
        q = self.q(x).view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
        k, v = self.kv(memory).view(batch, kept, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class CrossBlock(nn.Module):
    """Pre-norm transformer block whose tokens attend to a memory."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm_memory = nn.LayerNorm(width, eps=1e-6)
        self.attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, ratio=4)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.norm_memory(memory))
        return x + self.mlp(self.norm2(x))


class DecoderConfig(TypedDict, total=False):
    """Arguments of a Decoder that the model file sets."""

    width: Required[Width]
    depth: Required[Depth]
    heads: Required[Heads]
    attention: Literal["self", "cross"]
    share: Annotated[float, Field(gt=0, le=1)]


DecoderConfig.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]


class Decoder(nn.Module):
    """Transformer from visible to masked tokens. Positions are added at the trunk's width.

    Args:
        attention: "self": all tokens attend to each other (the recipe); "cross": masked tokens attend only to visible ones.
        share: fraction of the masked tokens that a training step decodes, in (0, 1]; 1 in the recipe.
    """

    pos_embed: Tensor

    def __init__(
        self,
        trunk_width: int,
        tokens: int,
        width: int,
        depth: int,
        heads: int,
        attention: Literal["self", "cross"] = "self",
        share: float = 1,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.depth = depth
        self.heads = heads
        self.attention = attention
        self.share = share
        self.activation_checkpointing = activation_checkpointing
        self.decoder_embed = nn.Linear(trunk_width, width)
        block = {"self": Block, "cross": CrossBlock}[attention]
        self.decoder_blocks = nn.ModuleList(block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_linear)
        self.register_buffer("pos_embed", sinusoid_positions(tokens, trunk_width))

    def forward(self, visible: Tensor, masked: Tensor) -> Tensor:
        """Decode visible (B, K, D) and masked (B, M, D) tokens, positions added; return the masked ones, (B, M, width)."""
        if self.attention == "cross":
            memory, x = self.decoder_embed(visible), self.decoder_embed(masked)
            return self.norm(run_blocks(self.decoder_blocks, x, self.activation_checkpointing, memory))
        x = self.decoder_embed(torch.cat([visible, masked], 1))
        return self.norm(run_blocks(self.decoder_blocks, x, self.activation_checkpointing)[:, visible.shape[1] :])

    def sample_masked(self, masked: Tensor) -> Tensor:
        """Draw a random fraction of the indices (B, M), keeping their order; all of them in evaluation."""
        if self.share == 1 or not self.training:
            return masked
        count = max(1, int(self.share * masked.shape[1]))
        drawn = torch.rand(masked.shape, device=masked.device).argsort(1)[:, :count]
        return masked.gather(1, drawn.sort(1).values)


def pixel_head(width: int, pixels: int) -> nn.Sequential:
    """Build the linear map of a decoded token to the pixels of its tubelet, named `heads.0.projector` as published."""
    projector = nn.Linear(width, pixels)
    nn.init.trunc_normal_(projector.weight, std=0.02)
    nn.init.zeros_(projector.bias)
    return nn.Sequential(OrderedDict(projector=projector))


class MaskedAutoencoder(nn.Module):
    """Trunk, mask token, decoder and pixel head.

    Args:
        trunk: the encoder that later stages keep.
        decoder: `width`, `depth`, `heads` of the decoder, and its `attention` and `share`; see Decoder.
    """

    def __init__(self, trunk: VisionTransformer, decoder: DecoderConfig) -> None:
        super().__init__()
        self.trunk = trunk
        # The trunk holds the mask token and the decoder, because the published checkpoints name them so.
        self.trunk.mask_token = nn.Parameter(torch.zeros(1, trunk.width))
        self.trunk.decoder = Decoder(
            trunk.width, math.prod(trunk.grid), **decoder, activation_checkpointing=trunk.activation_checkpointing
        )
        pt, ph, pw = trunk.tubelet
        self.heads = nn.ModuleList([pixel_head(decoder["width"], pt * ph * pw * 3)])

    def forward(self, video: Tensor, mask: Tensor, num_masked: int | None = None) -> MaePrediction:
        """Predict the masked tokens of a video.

        Args:
            video: (B, C, T, H, W), uint8 in 0..255 or normalized; or images (B, C, H, W).
            mask: bool, (B, T', H', W') or (B, N); True = hidden from the encoder. Every sample hides equally many tokens.
            num_masked: that number; loaders pass it, since reading it from `mask` would make the host wait for the device.
        """
        visible, masked = split_tokens(mask, num_masked)
        masked_idx = cast(Decoder, self.trunk.decoder).sample_masked(masked)
        x = self.encode(video, visible)
        return MaePrediction(self.heads[0](self.decode(video, x, visible, masked_idx)), masked_idx)

    def encode(self, video: Tensor, visible: Tensor) -> Tensor:  # (B, K) -> (B, K, D)
        return self.trunk.norm(self.trunk(video, visible))

    def decode(self, video: Tensor, x: Tensor, visible: Tensor, masked_idx: Tensor) -> Tensor:
        """Decode from encoded visible tokens (B, K, D) the tokens at `masked_idx` (B, M): (B, M, decoder width)."""
        decoder = cast(Decoder, self.trunk.decoder)
        positions = self.trunk.positions_for(video, decoder.pos_embed)[0]
        mask_tokens = cast(Tensor, self.trunk.mask_token).to(x.dtype) + positions[masked_idx]
        return decoder(x + positions[visible], mask_tokens)


def split_tokens(mask: Tensor, num_masked: int | None = None) -> tuple[Tensor, Tensor]:
    """Return indices of the visible (B, K) and the masked (B, M) tokens of a bool mask, each in raster order.

    Raises UserError when samples hide different numbers of tokens (checked only without `num_masked`, which loaders check).
    """
    mask = mask.flatten(1)
    if num_masked is None:
        counts = mask.sum(1).tolist()
        if len(set(counts)) > 1:
            raise UserError(f"All samples of a batch must hide the same number of tokens, got {sorted(set(counts))}.")
        num_masked = counts[0]
    order = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)
    visible = mask.shape[1] - num_masked
    return order[:, :visible], order[:, visible:]


def reconstruction_target(video: Tensor, tubelet: tuple[int, int, int], masked: Tensor, norm: TargetNorm) -> Tensor:
    """Return the target of the masked tokens: (B, M, pt * ph * pw * 3), at least float32, order (t, h, w, c).

    These are pixels in [0, 1]. With `norm="channel"`, the mean of each tubelet is subtracted and the result divided by
    sqrt(unbiased variance + 1e-6), channel by channel; "patch" does this over all channels; "none" does not normalize.
    """
    pixels = unnormalize_pixels(pick_tubelets(as_video(video, tubelet), tubelet, masked), channel_dim=2)
    pixels = pixels.flatten(3)  # (B, M, 3, pt * ph * pw)
    if norm != "none":
        # One pass of layer norm, whose variance is biased (divided by n); `bessel` = (n - 1) / n corrects it.
        values = pixels.shape[3:] if norm == "channel" else pixels.shape[2:]
        bessel = 1 - 1 / values.numel()
        pixels = F.layer_norm(pixels, values, pixels.new_full(values, bessel**0.5), eps=1e-6 * bessel)
    return pixels.transpose(2, 3).flatten(2)


def patch_statistics(pixels: Tensor, norm: TargetNorm) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of targets: pixels (B, M, P, 3) -> two tensors that broadcast with them."""
    if norm == "none":
        return pixels.new_zeros(()), pixels.new_ones(())
    dims = (2,) if norm == "channel" else (2, 3)
    var, mean = torch.var_mean(pixels, dim=dims, keepdim=True, correction=1)
    return mean, (var + 1e-6).sqrt()


def reconstruction_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error over all values of the masked tokens: two (B, M, P) -> a scalar in the target's dtype."""
    return F.mse_loss(prediction.to(target.dtype), target)
