"""Models of one shape, ours and the peers', with a batch for them, and their training steps."""

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers.published_mae import PublishedMAE, normalised
from omnivision.models.mae import MaskedAutoencoder
from omnivision.models.vit import VisionTransformer
from omnivision.tasks.reconstruct import Reconstruct

# Trunk (width, depth, heads) and decoder of each size of the recipe's configurations.
SIZES: dict[str, tuple[tuple[int, int, int], dict[str, int]]] = {
    "vittiny": ((192, 12, 3), {"width": 192, "depth": 4, "heads": 8}),
    "vitsmall": ((384, 12, 6), {"width": 192, "depth": 4, "heads": 8}),
    "vitbase": ((768, 12, 12), {"width": 384, "depth": 4, "heads": 16}),
    "vitlarge": ((1024, 24, 16), {"width": 512, "depth": 4, "heads": 16}),
    "vithuge": ((1280, 32, 16), {"width": 512, "depth": 4, "heads": 16}),
}
TUBELET = (2, 16, 16)
MASKED = 0.9
# bf16 only where the processor has instructions for it: elsewhere torch emulates it, hundreds of times slower.
HAS_BF16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
CAN_COMPILE = shutil.which("g++") is not None or shutil.which("clang++") is not None
DTYPES = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if HAS_BF16 else {})
FASTEST, FASTEST_DTYPE = list(DTYPES.items())[-1]


class Geometry:
    """A batch of uint8 videos, its mask, and models of one shape."""

    def __init__(
        self, size: str, batch: int, frames: int = 16, image: int = 224, device: torch.device | str = "cpu"
    ) -> None:
        self.size, self.batch, self.frames, self.image, self.device = size, batch, frames, image, device
        self.tokens = frames // 2 * (image // 16) ** 2
        self.num_masked = int(MASKED * self.tokens)
        generator = torch.Generator().manual_seed(0)
        video = torch.randint(0, 256, (batch, 3, frames, image, image), dtype=torch.uint8, generator=generator)
        mask = torch.rand(batch, self.tokens, generator=generator).argsort(1) < self.num_masked
        self.video, self.mask = video.to(device), mask.to(device)

    def ours(self, checkpointing: bool = False, **decoder: Any) -> MaskedAutoencoder:
        torch.manual_seed(0)
        with torch.device(self.device):
            return self.autoencoder(checkpointing, **decoder).to(self.device)

    def autoencoder(self, checkpointing: bool = False, **decoder: Any) -> MaskedAutoencoder:
        """Return our model on torch's default device."""
        trunk, numbers = SIZES[self.size]
        shape = {"num_frames": self.frames, "image_size": self.image, "activation_checkpointing": checkpointing}
        return MaskedAutoencoder(VisionTransformer(*trunk, **shape), numbers | decoder)  # type: ignore[arg-type]

    def count(self) -> tuple[float, int]:
        """Return operations of forward and backward, which torch counts on tensors without memory, and parameters."""
        with torch.device("meta"):
            model = self.autoencoder()
            video, mask = torch.empty(self.video.shape), torch.zeros_like(self.mask, device="meta")
            with FlopCounterMode(display=False) as counter:
                model(video, mask, self.num_masked).pixels.sum().backward()
        return float(counter.get_total_flops()), sum(parameter.numel() for parameter in model.parameters())

    def huggingface(self) -> nn.Module:
        from transformers import VideoMAEConfig, VideoMAEForPreTraining

        (width, depth, heads), decoder = SIZES[self.size]
        config = VideoMAEConfig(
            image_size=self.image, patch_size=16, num_frames=self.frames, tubelet_size=2, hidden_size=width,
            num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width, layer_norm_eps=1e-6,
            decoder_hidden_size=decoder["width"], decoder_num_hidden_layers=decoder["depth"],
            decoder_num_attention_heads=decoder["heads"], decoder_intermediate_size=4 * decoder["width"],
            norm_pix_loss=True, use_mean_pooling=False,
        )  # fmt: skip
        with torch.device(self.device):
            return VideoMAEForPreTraining(config).to(self.device)

    def loss(self, model: nn.Module, compiled: bool = False) -> Callable[[], Tensor]:
        """Return the loss of a model of any side; `compiled` as `trainer.compile=true` does it."""
        run: Any = torch.compile(model) if compiled else model
        if isinstance(model, MaskedAutoencoder):
            task = Reconstruct(TUBELET)
            if compiled:
                task.compile()
            return lambda: task.loss(run(self.video, self.mask, self.num_masked), self.video)
        video = normalised(self.video)
        if isinstance(model, PublishedMAE):
            return lambda: run(video, self.mask)
        video = video.transpose(1, 2)  # (B, T, C, H, W)
        return lambda: run(video, bool_masked_pos=self.mask).loss

    def step(self, model: nn.Module, dtype: torch.dtype, compiled: bool = False) -> Callable[[], None]:
        """Return a pretraining step of a model of any side."""
        return step(model, self.loss(model, compiled), dtype)


def step(
    model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    """Return forward, backward and a step of the optimizer, by default fused AdamW."""
    device = next(model.parameters()).device.type
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def run() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run
