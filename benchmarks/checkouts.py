"""The training command of this checkout beside that of a commit: `python -m benchmarks.checkouts COMMIT`.

Seconds of `--cfg job`, of a run of one step and of later steps of a larger model, and of batches that wait for decoding. The
checkouts take turns; a ratio above 1 means that this one is faster.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import videos
from benchmarks.harness import Ratio
from tests.runs import ROOT
from tests.stage_runs import write_split

ROUNDS = 5
RUN = (
    "+experiments=omnimae/omnimain_train_video +trainer=mae_k150_config epochs=1 trainer.mode=train_only "
    "trainer.accelerator=cpu submitit.use_cluster=false launcher.num_nodes=1 launcher.gpus_per_node=1 "
    "trainer.logging.log_freq=1 trainer.logging.pictures_every_epochs=null"
).split()
# One step of a tiny model; steps of ViT-S on small clips; a tiny model that waits for the recipe's clips.
TINY = "trainer/model=vitmicro batch_size=4 num_workers=0 image_size=32 short_side=40 num_frames=4".split()
STEPS = "trainer/model=vitsmall batch_size=16 num_workers=1 image_size=112 short_side=128".split()
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(32 << 30)}  # as `make demo` sets them
WAITING = "trainer/model=vitmicro batch_size=16 num_workers=2".split()


def run(root: Path, folder: Path, *arguments: str, **environment: str) -> float:
    """Run the command of a checkout; returns its seconds."""
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'examples/demo'}"} | environment
    command = [sys.executable, "train_app_submitit.py", *arguments, f"launcher.experiment_log_dir={folder}"]
    begin = time.perf_counter()
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
    return time.perf_counter() - begin


def step_seconds(root: Path, folder: Path, *arguments: str, **environment: str) -> float:
    """Run the command; returns the seconds of a step, the median over the second half of the run."""
    run(root, folder, *arguments, **environment)
    lines = [json.loads(line) for line in (folder / "logs/metrics.jsonl").read_text().splitlines()]
    rates = sorted(line["clips_per_second"] for line in lines if "clips_per_second" in line)
    later = sorted(line["clips_per_second"] for line in lines[len(lines) // 2 :] if "clips_per_second" in line)
    return 16 / (later or rates)[len(later or rates) // 2]


def main(commit: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
        tarfile.open(fileobj=io.BytesIO(archive)).extractall(folder / "before", filter="data")
        (folder / "videos").mkdir()
        files = [str(path) for path in videos.make(folder / "videos", 340, 256, copies=64)]
        data = write_split(folder, "k150", "train", files)
        kinds: dict[str, Callable[[Path, Path], float]] = {
            "--cfg job": lambda root, out: run(root, out, *RUN, "--cfg", "job"),
            "run of one step": lambda root, out: run(root, out, *RUN, *data, *TINY, "trainer.limit_train_batches=1"),
            "step": lambda root, out: step_seconds(root, out, *RUN, *data, *STEPS, "trainer.limit_train_batches=12"),
            "the same, glibc keeps freed memory": lambda root, out: step_seconds(
                root, out, *RUN, *data, *STEPS, "trainer.limit_train_batches=12", **KEEP_FREED_MEMORY
            ),
            "batch": lambda root, out: step_seconds(root, out, *RUN, *data, *WAITING, "trainer.limit_train_batches=12"),
        }
        print(f"| {commit} / now | times as fast | | |\n|---|---|---|---|")
        for kind, measure in kinds.items():
            rounds = []
            for number in range(ROUNDS):
                sides = {"before": folder / "before", "now": ROOT}
                order = list(sides) if number % 2 else list(sides)[::-1]
                seconds = {side: measure(sides[side], folder / f"{side} {kind} {number}") for side in order}
                rounds.append(seconds["before"] / seconds["now"])
            print(Ratio(kind, rounds).row(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
