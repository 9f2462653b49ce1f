"""How long a command takes to say something: --help, --cfg job, the first step of the demo's model, and a resume of ViT-B.

    python -m benchmarks.start [--quick]

(Submission to a cluster is timed by tests/slurm.)
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.command import command_line, run_quietly
from benchmarks.harness import Ratio, Report, own_memory
from omnivision.models.mae import MaskedAutoencoder
from omnivision.models.vit import VisionTransformer
from omnivision.utils.io import safe_load

SCRIPT = Path(__file__).resolve().parent.parent / "train_app_submitit.py"
DEMO = ["+experiments=demo/mae", "+trainer=mae_demo_config", "trainer.logging.log_freq=1"]


def demo_data(folder: Path, *counts: str) -> None:
    """Draw the demo's films."""
    command = [sys.executable, "-m", "omnivision.tools.main", "demo-data", str(folder), *counts]
    run_quietly(command, SCRIPT.parent)


def seconds_of(*arguments: str) -> float:
    began = time.perf_counter()
    run_quietly([sys.executable, str(SCRIPT), *arguments])
    return time.perf_counter() - began


def seconds_to_first_step(folder: Path, data: Path) -> float:
    """From the command until its log holds a step."""
    run = folder / f"run_{time.monotonic_ns()}"
    command = [sys.executable, str(SCRIPT), *DEMO, f"data_root={data}", f"launcher.experiment_log_dir={run}"]
    began, log = time.perf_counter(), run / "logs" / "metrics.jsonl"
    with open(folder / "said", "w+") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
        while not (log.exists() and '"step"' in log.read_text()):
            if process.poll() is not None:
                raise RuntimeError(f"the demo ended with {process.returncode}: {(folder / 'said').read_text()}")
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        process.terminate()
    return seconds


def mapped(folder: Path) -> dict[str, float]:
    """Reading a checkpoint of ViT-B with its optimizer's state: seconds, and MB that are not the file's own pages."""
    model = MaskedAutoencoder(VisionTransformer(), {"width": 384, "depth": 4, "heads": 16})
    weights = model.state_dict()
    file = folder / "checkpoint.pt"
    torch.save(
        {"model": weights, "moments": [{n: torch.zeros_like(t) for n, t in weights.items()} for _ in range(2)]}, file
    )

    del model, weights
    before, began = own_memory("Anonymous"), time.perf_counter()
    state = safe_load(file)
    seconds = time.perf_counter() - began
    assert state["model"]
    return {"file, MB": round(file.stat().st_size / 1e6), "s to open": round(seconds, 3),
            "private MB": round(own_memory("Anonymous") - before, 1)}  # fmt: skip


def run(quick: bool) -> Report:
    report, rounds = Report("start", "How long a command takes to say something"), 1 if quick else 6
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), Path(name) / "data"
        demo_data(data, "--train", "4", "--val", "1")
        sides = {
            "--help": lambda: seconds_of("--help"),
            "--cfg job": lambda: seconds_of("--cfg", "job", *DEMO),
            "first step of the demo": lambda: seconds_to_first_step(folder, data),
        }
        report.seconds = {name: [side() for _ in range(rounds)][0 if quick else 1 :] for name, side in sides.items()}
        report.facts["a checkpoint of ViT-B"] = mapped(folder)
    for what, goal in (("--help", 1.5), ("--cfg job", 1.5), ("first step of the demo", 12.0)):
        report.ratios.append(Ratio(what, report.seconds[what], goal, "s", at_most=True))
    private = report.facts["a checkpoint of ViT-B"]
    report.ratios.append(
        Ratio(
            "opening a checkpoint of ViT-B", [100 * private["private MB"] / private["file, MB"]], 5, "% in memory", True
        )
    )
    return report


def main(arguments: list[str] | None = None) -> None:
    command_line(run, __doc__, arguments)


if __name__ == "__main__":
    main()
