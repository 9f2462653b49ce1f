"""Seconds until commands answer, and the share of the demo's time that is waiting for data.

The SLURM tests time a submission.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import Ratio, Report, own_memory
from omnivision.models.mae import MaskedAutoencoder
from omnivision.models.vit import VisionTransformer
from omnivision.utils.io import safe_load
from tests.runs import ROOT

SCRIPT = ROOT / "train_app_submitit.py"
DEMO = ["+experiments=demo/mae", "+trainer=mae_demo_config", "trainer.logging.log_freq=1"]


def call(*command: str) -> float:
    """Run a Python program quietly; return its seconds. Raises RuntimeError with its output if it fails."""
    start = time.perf_counter()
    process = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {process.returncode}:\n{process.stdout}{process.stderr}")
    return time.perf_counter() - start


def demo_data(folder: Path, *counts: str) -> None:
    call("-m", "omnivision.tools.main", "demo-data", str(folder), *counts)


def start(quick: bool) -> Report:
    """`--help`, `--cfg job`, the first step of the demo, and opening a checkpoint of ViT-B."""
    report, rounds = Report("start", "Time until a command answers"), 1 if quick else 6
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), Path(name) / "data"
        demo_data(data, "--train", "16", "--val", "1")
        sides = {
            "--help": (1.5, lambda: call(str(SCRIPT), "--help")),
            "--cfg job": (1.5, lambda: call(str(SCRIPT), "--cfg", "job", *DEMO)),
            "first step of the demo": (12.0, lambda: seconds_to_first_step(folder, data)),
        }
        for what, (goal, side) in sides.items():
            report.seconds[what] = [side() for _ in range(rounds)][0 if quick else 1 :]
            report.at_most(what, report.seconds[what], goal, "s")
        facts = report.facts["a checkpoint of ViT-B"] = open_checkpoint(folder)
    report.at_most("opening a checkpoint of ViT-B", 100 * facts["private MB"] / facts["file, MB"], 5, "% in memory")
    return report


def seconds_to_first_step(folder: Path, data: Path) -> float:
    """Return the seconds from the command until its log holds a step."""
    run = folder / f"run_{time.monotonic_ns()}"
    command = [sys.executable, str(SCRIPT), *DEMO, f"data_root={data}", f"launcher.experiment_log_dir={run}"]
    begin, log, output = time.perf_counter(), run / "logs" / "metrics.jsonl", folder / "output"
    with open(output, "w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        while not (log.exists() and '"step"' in log.read_text()):
            if process.poll() is not None:
                raise RuntimeError(f"the demo exited with {process.returncode}: {output.read_text()}")
            time.sleep(0.01)
        seconds = time.perf_counter() - begin
        process.terminate()
    return seconds


def open_checkpoint(folder: Path) -> dict[str, float]:
    """Open a checkpoint of ViT-B with its optimizer's state: seconds, and MB that are not the file's own pages."""
    weights = MaskedAutoencoder(VisionTransformer(), {"width": 384, "depth": 4, "heads": 16}).state_dict()
    moments = [{name: torch.zeros_like(tensor) for name, tensor in weights.items()} for _ in range(2)]
    file = folder / "checkpoint.pt"
    torch.save({"model": weights, "moments": moments}, file)
    del weights, moments
    before, begin = own_memory("Anonymous"), time.perf_counter()
    state = safe_load(file)
    seconds, private = time.perf_counter() - begin, own_memory("Anonymous") - before
    assert state["model"]
    return {
        "file, MB": round(file.stat().st_size / 1e6),
        "s to open": round(seconds, 3),
        "private MB": round(private, 1),
    }


def data_wait(quick: bool) -> Report:
    """The demo's stage 1 with its own settings: one data worker beside the process that trains. Then with a model that hides
    the decoding: nothing is left to wait for.
    """
    report = Report("data_wait", "Waiting for data, by step of the demo", "% of a step")
    runs = {"the demo's model": [], "a model that hides it": ["trainer/model=vitsmall", "num_frames=8"]}
    with tempfile.TemporaryDirectory() as name:
        folder, data, steps = Path(name), Path(name) / "data", 4 if quick else 60
        demo_data(data, "--val=1", *(["--train=16"] if quick else ["--train=160"]))
        for number, (what, overrides) in enumerate(runs.items()):
            run = folder / str(number)
            limits = [f"trainer.limit_train_batches={steps}", "epochs=1", "trainer.logging.pictures_every_epochs=null"]
            settings = [f"data_root={data}", f"launcher.experiment_log_dir={run}", *limits, *overrides]
            call(str(SCRIPT), *DEMO, *settings)
            lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
            waits = [100 * line["data_wait"] for line in lines if line["event"] == "step"]
            report.seconds[what] = waits[min(10, steps // 2) :]  # without the first ones
    demo, hidden = (statistics.mean(shares) for shares in report.seconds.values())
    report.ratios.append(Ratio("waiting for data, the demo", [demo], None, "%"))
    report.at_most("waiting for data, decoding hidden", hidden, 5, "%")
    return report
