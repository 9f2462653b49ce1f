"""SIGKILL at random moments of a run, and while it saves: nothing is lost beyond the last checkpoint; the end is the same."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import torch

from omnivision.checkpoint import checkpointer as checkpoint
from omnivision.reporting.logs import read_lines
from tests import runs
from tests.faults import Outcome


def killed_runs(folder: Path, kills: int, processes: int, seed: int = 0) -> Outcome:
    """A run that is killed so often, and one that is not."""
    outcome = Outcome(f"resumed equals uninterrupted, {processes} process{'es' * (processes > 1)}", kills, "kills")
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    data = runs.write_split(folder, runs.real_films() * 16)
    settings = [
        *data,
        f"launcher.gpus_per_node={processes}",
        f"epochs={4 * kills + 2}",  # of six steps, more than a start comes to
        "trainer.checkpoint.save_every_steps=1",
    ]
    straight, killed = folder / "straight", folder / "killed"
    assert (made := runs.run(straight, *settings)).returncode == 0, made.stderr
    done = hits = 0
    while done < kills:
        process = subprocess.Popen(
            runs.command(killed, *settings), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        hits += moment(process, killed, rng, while_saving=done % 2 == 1)
        if process.poll() is not None:
            if process.returncode != 0:
                outcome.crashed += 1
                outcome.details += f"exit code {process.returncode} instead of a run; "
            break  # it came to its end before
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done += 1
        # A step is logged, then saved, then the next one begins.
        found, logged = last_saved(killed), last_logged(killed)
        if found < logged - 1:
            outcome.lost += 1
            outcome.details += f"step {logged} was done, and the checkpoint is of step {found}; "
    result = runs.run(killed, *settings)
    outcome.tried, outcome.what = done, f"kills at random moments, {hits} of them while saving"
    if result.returncode != 0:
        outcome.crashed += 1
        outcome.details += result.stderr[-300:]
        return outcome
    one, other = tensors_of(straight), tensors_of(killed)
    different = [name for name in {**one, **other} if not torch.equal(one[name], other[name])]
    lines = [[(line["step"], line["loss"]) for line in runs.lines(each)] for each in (straight, killed)]
    if different or lines[0] != lines[1]:
        outcome.lost += 1
        outcome.details += f"{len(different)} tensors differ; steps {[step for step, _ in lines[1]]}"
    return outcome


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """Weights, and what the optimizer knows of each, in the newest checkpoint of a run."""
    state = checkpoint.read(run / "checkpoints/checkpoint.pt")
    known = {
        f"{number} {name}": torch.as_tensor(value)
        for number, of in state["optimizer"]["state"].items()
        for name, value in of.items()
    }
    return state["model"] | known


def moment(process: subprocess.Popen[bytes], run: Path, rng: random.Random, while_saving: bool) -> bool:
    """Wait for a random moment after a step that this start has made, or for one while a checkpoint is written: True then."""
    before, deadline = last_logged(run), time.monotonic() + 120
    while process.poll() is None and last_logged(run) <= before:
        assert time.monotonic() < deadline, "no step in two minutes"
        time.sleep(0.01)
    if not while_saving:
        time.sleep(rng.random() * 0.3)
        return False
    until = time.monotonic() + 5
    while process.poll() is None and time.monotonic() < until:
        if any((run / "checkpoints").glob(".*.tmp")):
            time.sleep(rng.random() * 0.01)
            return True
    return False


def last_logged(run: Path) -> int:
    """The last step in the log of a run; -1 for none. A start that goes on from a checkpoint first forgets what came after."""
    log = run / "logs/metrics.jsonl"
    return max((line["step"] for line in read_lines(log)), default=-1) if log.is_file() else -1


def last_saved(run: Path) -> int:
    """The step of the newest checkpoint that is whole; -1 for none."""
    found = checkpoint.load_newest(run / "checkpoints") if (run / "checkpoints").is_dir() else None
    return -1 if found is None else found[0]["epoch"] * found[0]["steps_per_epoch"] + found[0]["step"]
