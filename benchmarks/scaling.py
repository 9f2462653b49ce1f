"""Estimates for 8, 64 and 512 GPUs: the tables of docs/scaling.md.

    python -m benchmarks.scaling [--tflops 125] [--link 25] [--samples 14] [--disk 20]

Torch counts operations and parameters on models without memory. The rates of the machines are assumptions, set by the options.
"""

import argparse
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from omnivision.models.mae import MaskedAutoencoder
from omnivision.models.vit import VisionTransformer

MODELS = {
    "ViT-B": ((768, 12, 12), {"width": 384, "depth": 4, "heads": 16}),
    "ViT-L": ((1024, 24, 16), {"width": 512, "depth": 4, "heads": 16}),
    "ViT-H": ((1280, 32, 16), {"width": 512, "depth": 4, "heads": 16}),
}
TOKENS, MASKED = 1568, 1411
VIEWS, CLIPS_PER_GPU = 4, 16
SAMPLE_MB = 0.3  # read from a video for one clip: 340 x 256, key frames 250 frames apart
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Machine:
    tflops: float
    link: float  # GB/s for each GPU
    samples: float  # per second and core
    disk: float  # GB/s of the whole file system


def count(name: str) -> tuple[float, int]:
    """Return GFLOP of a clip, forward and backward, and parameters of the whole model."""
    size, decoder = MODELS[name]
    with torch.device("meta"):
        model = MaskedAutoencoder(VisionTransformer(*size), decoder)
        video, mask = torch.empty(1, 3, 16, 224, 224), torch.zeros(1, TOKENS, dtype=torch.bool)
        with FlopCounterMode(display=False) as counter:
            model(video, mask, MASKED).pixels.sum().backward()
    return counter.get_total_flops() / 1e9, sum(parameter.numel() for parameter in model.parameters())


def row(name: str, gpus: int, machine: Machine) -> str:
    """Return a line of the table: 16 clips on each GPU."""
    gflop, parameters = count(name)
    compute = CLIPS_PER_GPU * gflop / machine.tflops  # ms
    bytes_moved = 2 * (gpus - 1) / gpus * parameters * 2  # ring all-reduce in bf16
    ddp = bytes_moved / machine.link / 1e6  # ms
    fsdp = 3 * 2 * (gpus - 1) / gpus * parameters / machine.link / 1e6  # ms; bf16: parameters twice, gradients once
    hidden = 2 / 3 * compute  # the backward pass, beside which gradients travel
    videos = gpus * CLIPS_PER_GPU / VIEWS / compute * 1000
    saved = 12 * parameters / 1e9
    cells = [
        name, str(gpus), f"{compute:.0f}", f"{ddp:.0f}", f"{max(0.0, ddp - hidden):.0f}", f"{fsdp:.0f}",
        f"{videos / gpus / machine.samples:.1f}", f"{videos * SAMPLE_MB / 1000:.1f}",
        f"{saved:.1f}", f"{saved / min(machine.disk, 1.0):.0f}",
        f"{saved / min(machine.disk, gpus / GPUS_PER_NODE):.1f}", f"{saved * gpus / GPUS_PER_NODE / machine.disk:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tflops", type=float, default=125.0, help="of a GPU in bf16, sustained (40 %% of an A100's)")
    parser.add_argument("--link", type=float, default=25.0, help="GB/s between nodes for each GPU (200 Gbit/s)")
    parser.add_argument(
        "--samples", type=float, default=14.0, help="that a core makes per second (`python -m benchmarks loading`)"
    )
    parser.add_argument("--disk", type=float, default=20.0, help="GB/s of the file system, all nodes together")
    machine = Machine(**vars(parser.parse_args()))
    headings = ["model", "GPUs", "compute, ms", "all-reduce, ms", "exposed, ms", "fsdp traffic, ms",
                "decoding cores per GPU", "video reads, GB/s", "checkpoint, GB", "save, one rank, s", "save, sharded, s",
                "load, all nodes, s"]  # fmt: skip
    print(f"{machine}; {CLIPS_PER_GPU} clips a GPU")
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for name in MODELS:
        gflop, parameters = count(name)
        print(f"<!-- {name}: {gflop:.0f} GFLOP a clip, {parameters / 1e6:.0f} M parameters -->")
        for gpus in (8, 64, 512):
            print(row(name, gpus, machine))


if __name__ == "__main__":
    main()
