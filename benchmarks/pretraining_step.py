"""Seconds per clip of a pretraining step (forward, backward, AdamW) of ViT-B by the recipe, against its operations.

    python -m benchmarks.pretraining_step [--model vitbase] [--batch 4] [--repeats 5]

Precisions are interleaved, medians are reported; the floor is the operations counted by torch divided by the matrix
multiplication rate measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch.utils.flop_counter import FlopCounterMode

from omnivision.models.mae import MaskedAutoencoder, reconstruction_error, reconstruction_target
from omnivision.models.vit import VisionTransformer

SIZES = {
    "vittiny": ((192, 12, 3), {"width": 192, "depth": 4, "heads": 8}),
    "vitsmall": ((384, 12, 6), {"width": 192, "depth": 4, "heads": 8}),
    "vitbase": ((768, 12, 12), {"width": 384, "depth": 4, "heads": 16}),
}
TUBELET, MASKED, TOKENS = (2, 16, 16), 1411, 1568


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=SIZES, default="vitbase")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    torch.manual_seed(0)
    trunk, decoder = SIZES[options.model]
    model = MaskedAutoencoder(VisionTransformer(*trunk), decoder)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    video = torch.randint(0, 256, (options.batch, 3, 16, 224, 224), dtype=torch.uint8)
    mask = torch.rand(options.batch, TOKENS).argsort(1) < MASKED

    def step(dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            prediction = model(video, mask, MASKED)
            target = reconstruction_target(video, TUBELET, prediction.masked, "channel")
            loss = reconstruction_error(prediction.pixels, target).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with FlopCounterMode(display=False) as counter:
        step(torch.float32)
    operations = counter.get_total_flops() / options.batch

    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(options.repeats):
        for dtype, measured in seconds.items():
            began = time.perf_counter()
            step(dtype)
            measured.append((time.perf_counter() - began) / options.batch)
    figures = {}
    for dtype, measured in seconds.items():
        rate = matmul_rate(dtype)
        figures[str(dtype).removeprefix("torch.")] = {
            "seconds_per_clip": {"min": min(measured), "median": statistics.median(measured), "max": max(measured)},
            "matmul_gflops_per_second": rate / 1e9,
            "floor_seconds_per_clip": operations / rate,
        }
    report = {
        "model": options.model,
        "batch": options.batch,
        "gflop_per_clip": operations / 1e9,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "step": figures,
    }
    print(json.dumps(report, indent=1))


def matmul_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Operations a second of one large matrix product; the best of three."""
    a, b = torch.rand(size, size).to(dtype), torch.rand(size, size).to(dtype)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


if __name__ == "__main__":
    main()
