"""The trunk: a plain vision transformer over tubelets, with fixed sinusoid positions and no class token.

It encodes all tokens, or only the visible ones of a masked video; then nothing is computed for the others, not even the patch
embedding. Parameter names are the published ones, so that PPMA checkpoints load unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from omnivision.config.schema import Depth, Heads, Width
from omnivision.models.patches import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Triple,
    image_positions,
    pick_tubelets,
    resized_positions,
    sinusoid_positions,
    split_tubelets,
    token_grid,
)
from omnivision.utils.errors import UserError

IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
DEPTH_STATISTICS = ([0.0418], [0.0295])  # Omnivore's mean and standard deviation of depth / maximum depth


class Attention(nn.Module):
    """Multi-head self-attention; one matrix holds the rows of q, k and v, heads are contiguous slices."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise UserError(
                f"heads must divide width {width}, got {heads}. Set trainer.model.trunk.heads (or decoder.heads)."
            )
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D / heads)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, drop a sample's branch with probability `rate`. (timm and torchvision
    also have it, but take two seconds to import.)"""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty((len(x), *[1] * (x.ndim - 1))).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4, drop_path: float = 0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def run_blocks(blocks: nn.ModuleList, x: Tensor, activation_checkpointing: bool, *memory: Tensor) -> Tensor:
    """Run blocks, which may attend to a `memory`; with checkpointing, the backward pass recomputes their activations."""
    recompute = activation_checkpointing and torch.is_grad_enabled()
    for block in blocks:
        x = checkpoint(block, x, *memory, use_reentrant=False) if recompute else block(x, *memory)
    return x


def init_linear(module: nn.Module) -> None:
    """Initialize a linear layer with Xavier-uniform weights and zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class PatchEmbed(nn.Module):
    """A linear map of tubelets. The weight has the shape of a Conv3d with stride = kernel, (D, C, pt, ph, pw)."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, tubelet: Triple, width: int, statistics: tuple[Sequence[float], Sequence[float]] = IMAGENET
    ) -> None:
        """`statistics`: mean and standard deviation of each channel of the raw input (bytes, or depth in [0, 1])."""
        super().__init__()
        self.tubelet = tubelet
        # `proj.1`, because the published module first pads images to videos (`proj.0`) inside a Sequential.
        conv = nn.Conv3d(len(statistics[0]), width, tubelet, stride=tubelet)
        self.proj = nn.Sequential(nn.Identity(), conv)
        nn.init.xavier_uniform_(conv.weight.data.flatten(1))
        nn.init.zeros_(conv.bias.data)  # type: ignore[union-attr]
        # Buffers, because a constant made in `forward` would be copied to the accelerator at every step.
        for name, values in zip(("pixel_mean", "pixel_std"), statistics, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None, None], persistent=False)

    def forward(self, video: Tensor, visible: Tensor | None = None) -> Tensor:
        """Embed (B, C, T, H, W), uint8 or normalized, at indices (B, K), or all tokens for None: (B, K, D)."""
        if visible is None:
            pixels = split_tubelets(video, self.tubelet).flatten(1, 3)
        else:
            pixels = pick_tubelets(video, self.tubelet, visible)  # (B, K, C, pt, ph, pw)
        conv = cast(nn.Conv3d, self.proj[1])
        if pixels.dtype == torch.uint8:
            pixels = (pixels.to(self.pixel_mean.dtype) / 255 - self.pixel_mean) / self.pixel_std
        elif video.shape[1] == 1:  # depth is not normalized yet
            pixels = (pixels.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        return F.linear(pixels.flatten(2), conv.weight.flatten(1), conv.bias)


class VisionTransformer(nn.Module):
    """Trunk of width D over a video of `num_frames` x `image_size` x `image_size`.

    Args:
        tubelet: frames, height and width of one token.
        drop_path: stochastic depth, rising linearly over the blocks from 0 to this value.
        activation_checkpointing: recompute the activations inside blocks in the backward pass.
        rgbd: add a second patch embedding, for depth.

    Raises UserError if the tubelet does not divide the video, or the heads the width.
    """

    pos_embed: Tensor

    def __init__(
        self,
        width: Width = 768,
        depth: Depth = 12,
        heads: Heads = 12,
        mlp_ratio: float = 4,
        num_frames: int = 16,
        image_size: int = 224,
        tubelet: Triple = (2, 16, 16),
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0,
        activation_checkpointing: bool = False,
        rgbd: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "depth": depth, "heads": heads, "mlp_ratio": mlp_ratio}
        inputs = {"num_frames": num_frames, "image_size": image_size, "tubelet": list(tubelet), "rgbd": rgbd}
        self.architecture = sizes | inputs  # saved in checkpoints
        self.width = width
        self.num_frames = num_frames
        self.image_size = image_size
        self.activation_checkpointing = activation_checkpointing
        self.tubelet: Triple = (tubelet[0], tubelet[1], tubelet[2])
        self.grid = token_grid((num_frames, image_size, image_size), self.tubelet)
        self.patch_embed = PatchEmbed(self.tubelet, width)
        self.depth_patch_embed = PatchEmbed(self.tubelet, width, DEPTH_STATISTICS) if rgbd else None
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.blocks.apply(init_linear)
        self.register_buffer("pos_embed", sinusoid_positions(math.prod(self.grid), width))

    def forward(self, video: Tensor, visible: Tensor | None = None, depth: Tensor | None = None) -> Tensor:
        """Return the tokens after the last block, before the final LayerNorm.

        Args:
            video: (B, C, T, H, W), uint8 in 0..255 or normalized; or an image (B, C, H, W), repeated to fill a tubelet.
            visible: indices (B, K) of the tokens to encode, in raster order; None means all N.
            depth: (B, 1, H, W) in [0, 1], for images and a trunk with `rgbd`.

        Returns: (B, K or N, D).
        """
        return run_blocks(self.blocks, self.embed(video, visible, depth), self.activation_checkpointing)

    def embed(self, video: Tensor, visible: Tensor | None = None, depth: Tensor | None = None) -> Tensor:
        """Return the tokens before the first block, with arguments and shape as for `forward`."""
        positions = self.positions_for(video, self.pos_embed)
        video = as_video(video, self.tubelet)
        x = self.patch_embed(video, visible)
        if depth is not None:
            assert self.depth_patch_embed is not None, "a model without `rgbd` was given depth"
            x = x + self.depth_patch_embed(as_video(depth, self.tubelet), visible)
        return x + (positions if visible is None else positions[0, visible])

    def last_layers(self, video: Tensor, depth: Tensor | None = None, count: int = 1) -> Tensor:
        """Return the tokens after each of the last `count` blocks, before the final LayerNorm: (B, count, N, D)."""
        x = self.embed(video, depth=depth)
        outputs = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number >= len(self.blocks) - count:
                outputs.append(x)
        return torch.stack(outputs, 1)

    def positions_for(self, video: Tensor, table: Tensor) -> Tensor:
        """Return the rows of a position table (1, N, D), the trunk's or a decoder's, for this video or image: (1, N', D)."""
        _, ph, pw = self.tubelet
        if video.ndim == 4:
            return image_positions(table, self.grid, video.shape[2] // ph, video.shape[3] // pw)
        frames = max(video.shape[2], self.tubelet[0])
        return resized_positions(table, self.grid, token_grid((frames, *video.shape[3:]), self.tubelet))


def as_video(video: Tensor, tubelet: Triple) -> Tensor:
    """Repeat an image (B, C, H, W) or a one-frame clip in time to fill a tubelet; a video stays as it is."""
    if video.ndim == 4:
        video = video[:, :, None]
    return video.expand(-1, -1, tubelet[0], -1, -1) if video.shape[2] == 1 else video
