"""Estimates for 8, 64 and 512 GPUs: the tables of docs/scaling.md.

    python -m benchmarks.scaling [--tflops 125] [--link 25] [--samples 14] [--disk 20]

Torch counts operations and parameters on models without memory. The rates of the machines are assumptions, set by the options.
"""

import argparse

from benchmarks.geometry import Geometry

MODELS = {"ViT-B": "vitbase", "ViT-L": "vitlarge", "ViT-H": "vithuge"}
VIEWS, CLIPS_PER_GPU, GPUS_PER_NODE = 4, 16, 8
SAMPLE_MB = 0.3  # read from a video for one clip: 340 x 256, key frames 250 frames apart
COLUMNS = (
    "model", "GPUs", "compute, ms", "all-reduce, ms", "exposed, ms", "fsdp traffic, ms", "decoding cores per GPU",
    "video reads, GB/s", "checkpoint, GB", "save, one rank, s", "save, sharded, s", "load, all nodes, s",
)  # fmt: skip


def row(name: str, gpus: int, operations: float, parameters: int, machine: argparse.Namespace) -> str:
    """Return a line of the table: 16 clips on each GPU."""
    compute = CLIPS_PER_GPU * operations / 1e9 / machine.tflops  # ms
    ring = (gpus - 1) / gpus * parameters / machine.link / 1e6  # ms for a byte of each parameter
    ddp = 4 * ring  # an all-reduce in bf16
    exposed = max(0.0, ddp - 2 / 3 * compute)  # the backward pass hides the rest
    fsdp = 6 * ring  # in bf16: parameters twice, gradients once
    videos = gpus * CLIPS_PER_GPU / VIEWS / compute * 1000
    saved = 12 * parameters / 1e9
    cells = [
        name, str(gpus), f"{compute:.0f}", f"{ddp:.0f}", f"{exposed:.0f}", f"{fsdp:.0f}",
        f"{videos / gpus / machine.samples:.1f}", f"{videos * SAMPLE_MB / 1000:.1f}",
        f"{saved:.1f}", f"{saved / min(machine.disk, 1.0):.0f}",
        f"{saved / min(machine.disk, gpus / GPUS_PER_NODE):.1f}", f"{saved * gpus / GPUS_PER_NODE / machine.disk:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default, meaning in (
        ("tflops", 125.0, "TFLOP/s that a GPU sustains in bf16 (40 %% of an A100's peak)"),
        ("link", 25.0, "GB/s between nodes for each GPU (200 Gbit/s)"),
        ("samples", 14.0, "samples per second and core (`python -m benchmarks loading`)"),
        ("disk", 20.0, "GB/s from the file system, for all nodes together"),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{meaning}; %(default)s")
    machine = parser.parse_args()
    print(f"{vars(machine)}; {CLIPS_PER_GPU} clips per GPU")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name, size in MODELS.items():
        operations, parameters = Geometry(size, batch=1).count()
        print(f"<!-- {name}: {operations / 1e9:.0f} GFLOP per clip, {parameters / 1e6:.0f} M parameters -->")
        for gpus in (8, 64, 512):
            print(row(name, gpus, operations, parameters, machine))


if __name__ == "__main__":
    main()
