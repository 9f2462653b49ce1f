"""Stage 1 as the published code computes it, with the parameters of our own model.

Every patch is embedded by a Conv3d and the masked ones are then dropped; attention is two matrix products with a softmax
between them; every token, visible or not, goes through the pixel head; the target covers all tokens; blocks are checkpointed.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from omnivision.models.mae import Decoder, MaskedAutoencoder
from omnivision.models.patches import normalize_pixels, patchify, unnormalize_pixels
from omnivision.models.vit import Block


class PublishedMAE(nn.Module):
    """`model`'s function, computed the published way; the published recipe checkpoints activations."""

    def __init__(self, model: MaskedAutoencoder, checkpointing: bool) -> None:
        super().__init__()
        self.model, self.checkpointing = model, checkpointing

    def forward(self, video: Tensor, mask: Tensor) -> Tensor:
        """Normalised video (B, 3, T, H, W) and bool mask (B, N) -> the loss."""
        trunk, decoder = self.model.trunk, cast(Decoder, self.model.trunk.decoder)
        conv = cast(nn.Conv3d, trunk.patch_embed.proj[1])
        tokens = conv(video).flatten(2).transpose(1, 2) + trunk.pos_embed  # (B, N, D)
        visible = tokens[~mask].reshape(len(video), -1, trunk.width)
        visible = trunk.norm(self.blocks(trunk.blocks, visible))

        full = cast(Tensor, trunk.mask_token).to(visible.dtype).repeat(*mask.shape, 1)
        full[~mask] = visible.flatten(0, 1)
        decoded = decoder.norm(self.blocks(decoder.decoder_blocks, decoder.decoder_embed(full + decoder.pos_embed)))
        prediction = self.model.heads[0](decoded)  # (B, N, P)

        pixels = patchify(unnormalize_pixels(video, channel_dim=1), trunk.tubelet)  # (B, N, pt * ph * pw, 3)
        mean, var = pixels.mean(2, keepdim=True), pixels.var(2, keepdim=True)
        target = ((pixels - mean) / (var + 1e-6).sqrt()).flatten(2)
        error = (prediction.float() - target).square().mean(-1)
        return (error * mask).sum() / mask.sum().clamp(min=1)

    def blocks(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            x = (
                checkpoint(published_block, block, x, use_reentrant=False)
                if self.checkpointing
                else published_block(block, x)
            )
        return x


def published_block(block: nn.Module, x: Tensor) -> Tensor:
    """One transformer block, with attention as two products."""
    block = cast(Block, block)
    batch, tokens, width = x.shape
    heads = block.attn.heads
    qkv = block.attn.qkv(block.norm1(x)).reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    scores = (qkv[0] @ qkv[1].transpose(-2, -1)) * (width // heads) ** -0.5
    attended = scores.softmax(dim=-1) @ qkv[2]
    x = x + block.attn.proj(attended.transpose(1, 2).reshape(batch, tokens, width))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def normalised(video: Tensor) -> Tensor:
    """Return a video as its loader yields it: float, ImageNet-normalised."""
    return normalize_pixels(video, channel_dim=1, dtype=torch.float32)
