"""A pretraining step by the recipe (forward, backward, AdamW): ours, Hugging Face's VideoMAE, and the published way.

    python -m benchmarks.pretraining_step [--quick]

ViT-B, 16 x 224 x 224, nine tenths hidden, decoder 4 x 384 x 16 heads, batch 8, in fp32 and in bf16; ours compiled, too
(`trainer.compile=true`), Hugging Face's as it is shipped, and compiled beside the goals. Before anything is timed the published
way has to give our loss from the same weights, and Hugging Face's encoder our tokens, both in fp32 (its decoder has the same
size, but takes positions at another place). The floor is the operations that torch counts in a step, divided by the rate of one
large matrix product measured in the same run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.command import command_line
from benchmarks.harness import Report, interleaved
from benchmarks.peers.published_mae import PublishedMAE, normalised
from benchmarks.turns import in_turn
from omnivision.models.mae import MaskedAutoencoder
from omnivision.models.vit import VisionTransformer
from omnivision.tasks.reconstruct import Reconstruct

# Trunk (width, depth, heads) and decoder of each size of the recipe's configurations.
SIZES: dict[str, tuple[tuple[int, int, int], dict[str, int]]] = {
    "vittiny": ((192, 12, 3), {"width": 192, "depth": 4, "heads": 8}),
    "vitsmall": ((384, 12, 6), {"width": 192, "depth": 4, "heads": 8}),
    "vitbase": ((768, 12, 12), {"width": 384, "depth": 4, "heads": 16}),
    "vitlarge": ((1024, 24, 16), {"width": 512, "depth": 4, "heads": 16}),
}
TUBELET = (2, 16, 16)
HIDDEN = 0.9
# bf16 only where the processor has instructions for it: torch does it step by step elsewhere, hundreds of times slower.
HAS_BF16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
CAN_COMPILE = shutil.which("g++") is not None or shutil.which("clang++") is not None
DTYPES = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if HAS_BF16 else {})


class Geometry:
    """A clip, its mask and the models of one shape."""

    def __init__(self, size: str, batch: int, frames: int = 16, image: int = 224) -> None:
        self.size, self.batch, self.frames, self.image = size, batch, frames, image
        self.tokens = frames // 2 * (image // 16) ** 2
        self.masked = int(HIDDEN * self.tokens)
        generator = torch.Generator().manual_seed(0)
        self.video = torch.randint(0, 256, (batch, 3, frames, image, image), dtype=torch.uint8, generator=generator)
        self.mask = torch.rand(batch, self.tokens, generator=generator).argsort(1) < self.masked

    def ours(self, checkpointing: bool = False, **decoder: Any) -> MaskedAutoencoder:
        torch.manual_seed(0)
        (width, depth, heads), numbers = SIZES[self.size]
        trunk = VisionTransformer(
            width, depth, heads, num_frames=self.frames, image_size=self.image, activation_checkpointing=checkpointing
        )
        return MaskedAutoencoder(trunk, numbers | decoder)

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
        return VideoMAEForPreTraining(config)


def loss_of_ours(model: nn.Module, shape: Geometry, compiled: bool = False) -> Callable[[], Tensor]:
    """With `compiled` as `trainer.compile=true` does it."""
    task, run = Reconstruct(TUBELET), model
    if compiled:
        task.compile()
        run = torch.compile(model)  # type: ignore[assignment]
    return lambda: task.loss(run(shape.video, shape.mask, shape.masked), shape.video)


def loss_of_published(model: nn.Module, shape: Geometry) -> Callable[[], Tensor]:
    video = normalised(shape.video)
    return lambda: model(video, shape.mask)


def loss_of_huggingface(model: nn.Module, shape: Geometry) -> Callable[[], Tensor]:
    video = normalised(shape.video).transpose(1, 2)  # (B, T, C, H, W)
    return lambda: model(video, bool_masked_pos=shape.mask).loss


def step(
    model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    """A whole step of the optimizer; all sides have the same one, fused AdamW."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), fused=True)

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def check_equal(shape: Geometry, huggingface: bool) -> dict[str, float]:
    """Relative differences of what is the same function; ValueError when they are not rounding."""
    ours = shape.ours()
    with torch.no_grad():
        mine = loss_of_ours(ours, shape)()
        published = loss_of_published(PublishedMAE(ours, checkpointing=False), shape)()
    differences = {"published loss": float((published / mine - 1).abs())}
    if huggingface:
        differences["Hugging Face encoder"] = difference_of_huggingface(shape, ours)
    if max(differences.values()) > 1e-4:
        raise ValueError(f"the sides do not compute the same: {differences}")
    return differences


def difference_of_huggingface(shape: Geometry, ours: MaskedAutoencoder) -> float:
    """Largest difference of the encoders' tokens from the same weights, relative to the largest token."""
    from omnivision.interop.formats import to_hf
    from omnivision.models.architecture import describe

    with torch.no_grad():
        visible = ours.encode(shape.video, (~shape.mask).nonzero()[:, 1].reshape(shape.batch, -1))
        theirs = shape.huggingface()
        exported = to_hf(ours.state_dict(), describe(ours)).state
        names = {f"videomae.{_in_memory(name)}": tensor for name, tensor in exported.items()}
        missing, unexpected = theirs.load_state_dict(names, strict=False)
        # Exports have the biases of all versions: keys' are zero, and softmax cancels them.
        if any(not name.endswith("key.bias") for name in unexpected) or any(
            name.startswith("videomae.") for name in missing
        ):
            raise ValueError(f"the weights do not fit: {missing} {unexpected}")
        encoded = theirs.videomae(normalised(shape.video).transpose(1, 2), bool_masked_pos=shape.mask).last_hidden_state
    return float((encoded - visible).abs().max() / visible.abs().max())


def _in_memory(name: str) -> str:
    """transformers 5 holds these two under other names than its files have."""
    return name.replace("attention.q_bias", "attention.query.bias").replace("attention.v_bias", "attention.value.bias")


def operations_of(shape: Geometry) -> float:
    """Operations of forward and backward, by torch's count on tensors without memory: it does not know the CPU's attention."""
    with torch.device("meta"):
        model, video = shape.ours(), torch.empty_like(shape.video, dtype=torch.float32, device="meta")
        with FlopCounterMode(display=False) as counter:
            model(video, torch.zeros_like(shape.mask, device="meta"), shape.masked).pixels.sum().backward()
    return float(counter.get_total_flops())


def matmul_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Operations a second of one large matrix product; the best of five."""
    a, b = torch.rand(size, size).to(dtype), torch.rand(size, size).to(dtype)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def geometry(quick: bool) -> Geometry:
    return Geometry("vittiny", batch=2, frames=4, image=64) if quick else Geometry("vitbase", batch=8)


def sides(kind: str, quick: bool) -> dict[str, Callable[[], None]]:
    """Ours as a run does it, which keeps its memory; peers as they are shipped."""
    shape = geometry(quick)
    if kind == "published":
        published = PublishedMAE(shape.ours(), checkpointing=True)
        loss = loss_of_published(published, shape)
        return {f"published {name}, checkpointed": step(published, loss, dtype) for name, dtype in DTYPES.items()}
    if kind == "Hugging Face":
        theirs = shape.huggingface()
        loss = loss_of_huggingface(theirs, shape)
        faster = loss_of_huggingface(torch.compile(theirs), shape)  # type: ignore[arg-type]
        found = {f"Hugging Face {name}": step(theirs, loss, dtype) for name, dtype in DTYPES.items()}
        return found | {f"Hugging Face {name}, compiled": step(theirs, faster, dtype) for name, dtype in DTYPES.items()}
    ours = shape.ours()
    eager, compiled = loss_of_ours(ours, shape), loss_of_ours(ours, shape, compiled=True)
    found = {f"ours {name}": step(ours, eager, dtype) for name, dtype in DTYPES.items()}
    return found | {f"ours {name}, compiled": step(ours, compiled, dtype) for name, dtype in DTYPES.items()}


def run(quick: bool) -> Report:
    shape = geometry(quick)
    report = Report(
        "pretraining_step", f"A pretraining step, {shape.size}, {shape.frames} x {shape.image}², batch {shape.batch}"
    )
    peers = ["Hugging Face"] if report.works("Hugging Face", shape.huggingface) else []
    report.facts["differences"] = check_equal(shape, bool(peers))
    report.unit = "s a clip"

    ways = ["", ", compiled"] if CAN_COMPILE and not quick else [""]  # compiling takes longer than all else
    kinds = {side: [f"{side} {name}{how}" for name in DTYPES for how in ways] for side in ("ours", *peers)}
    kinds["published"] = [f"published {name}, checkpointed" for name in DTYPES]
    with in_turn("benchmarks.pretraining_step", kinds, quick) as turns:
        report.seconds = interleaved(turns, rounds=2 if quick else 3, warm_up=int(quick), per=shape.batch)

    operations = operations_of(shape) / shape.batch
    report.facts["GFLOP a clip"] = round(operations / 1e9, 1)
    for name, dtype in DTYPES.items():
        rate = matmul_rate(dtype)
        report.facts[f"matrix product {name}, GFLOP/s"] = round(rate / 1e9)
        report.facts[f"floor {name}, s a clip"] = round(operations / rate, 4)

    def best(*sides: str) -> str:
        return min((name for name in sides if name in report.seconds), key=report.median)

    def compare(mine: str, theirs: str, goal: float | None = None) -> None:
        report.times_as_fast(f"a step: {mine}, against {theirs}", mine, theirs, goal)

    goals = {"fp32": 1.3, list(DTYPES)[-1]: 1.5}  # the last is the most that this processor can do
    for name in DTYPES:
        mine, peer = best(f"ours {name}", f"ours {name}, compiled"), f"Hugging Face {name}"
        compare(mine, peer, goals[name])
        if len(ways) > 1:
            if mine != f"ours {name}":
                compare(f"ours {name}", peer)
            compare(f"ours {name}, compiled", f"{peer}, compiled")
        compare(mine, f"published {name}, checkpointed")
    compare(best(*kinds["ours"]), "published fp32, checkpointed", 5.0)
    return report


def main(arguments: list[str] | None = None) -> None:
    command_line(run, __doc__, arguments)


if __name__ == "__main__":
    main()
