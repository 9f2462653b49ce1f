"""The device under test: a GPU, or the CPU, for which what only a GPU has is left out; and runs on it."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from omnivision.utils.errors import EXIT_SIGHUP, EXIT_SIGINT, EXIT_SIGTERM, UserError
from tests import stage_runs

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
MARGIN = 0.92  # of a GPU's memory, to fill: fragments and libraries need the rest


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def timed(action: Callable[[], object], times: int = 1) -> Callable[[], float]:
    """Return a function that runs `action` so often, after once untimed, and returns the seconds of one.

    All of the device's work is done then. The untimed one lets the allocator take back what the side before held.
    """

    def run() -> float:
        action()
        synchronize()
        start = time.perf_counter()
        for _ in range(times):
            action()
        synchronize()
        return (time.perf_counter() - start) / times

    return run


def peak_memory(action: Callable[[], object]) -> int:
    """Return by how many bytes `action` raises the allocated memory of a GPU at its peak; 0 on a CPU."""
    if not ON_GPU:
        action()
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


def free_memory() -> int:
    """Return the bytes that may be filled; on a CPU enough for little."""
    return int(torch.cuda.mem_get_info()[0] * MARGIN) if ON_GPU else 1 << 30


def sync_debug_mode(mode: str) -> None:
    """Set what happens when the host waits for a GPU: "error", or "default" for nothing."""
    if ON_GPU:
        torch.cuda.set_sync_debug_mode(mode)


@contextlib.contextmanager
def little_memory(more: int = 300 * 10**6) -> Iterator[None]:
    """Leave this process so many bytes of the GPU's memory more than it holds."""
    if ON_GPU:
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)
    try:
        yield
    finally:
        if ON_GPU:
            torch.cuda.set_per_process_memory_fraction(1.0)


def describe() -> dict[str, Any]:
    """Return name, memory, driver and clocks of the GPU; on a CPU only that it is one."""
    facts: dict[str, Any] = {"device": torch.cuda.get_device_name() if ON_GPU else "CPU"}
    if ON_GPU:
        facts |= {"memory_gb": round(torch.cuda.mem_get_info()[1] / 1e9, 1), "cuda": torch.version.cuda}
        fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        gpu = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
        query = ["nvidia-smi", gpu, f"--query-gpu={fields}", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # not installed, failed, or without an answer
            answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
            facts |= dict(zip(fields.split(","), answer.strip().split(", "), strict=False))
    return facts


def run_command(settings: list[str], code: int = 0) -> stage_runs.Result:
    """Run the training command in this process.

    Raises KeyboardInterrupt if it was interrupted, and UserError for another exit code than `code`.
    """
    result = stage_runs.run_in_process(settings)
    if result.returncode != code:
        if result.returncode in (EXIT_SIGHUP, EXIT_SIGINT, EXIT_SIGTERM):
            raise KeyboardInterrupt(result.returncode - 128)
        run = dict(setting.split("=", 1) for setting in settings)["launcher.experiment_log_dir"]
        lines = result.stderr.strip().splitlines() or ["no message"]
        print(*lines[-30:], sep="\n", file=sys.stderr)
        raise UserError(f"{run} ended with exit code {result.returncode} instead of {code}: {lines[-1]}")
    return result
