"""Checkpoints: SIGKILL while they are written, damage afterwards, and a full disk."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from omnivision.checkpoint import checkpointer as checkpoint
from omnivision.checkpoint.pretrained import read
from omnivision.utils.errors import UserError
from omnivision.utils.io import CorruptCheckpointError
from tests.faults import Outcome
from tests.runs import ROOT

PROGRAM = """
import sys, torch
from pathlib import Path
from omnivision.checkpoint import checkpointer as checkpoint
from tests.test_checkpoint import state
print(0, flush=True)
for step in range(1, 10**6):
    weights = {'w': torch.full((300_000,), float(step))}
    checkpoint.save(state(step, model=weights), Path(sys.argv[1]), ['best.pt'])
    print(step, flush=True)
"""


def killed_while_saving(folder: Path, kills: int, seed: int = 0) -> Outcome:
    """A process that saves again and again; after each kill the newest is whole and no older than the last that was done."""
    outcome, rng = Outcome("a kill while saving costs no checkpoint", kills, "kills while saving"), random.Random(seed)
    for number in range(kills):
        target = folder / str(number)
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(target)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert process.stdout is not None
        done = [int(process.stdout.readline()) for _ in range(1 + number % 4)]  # of every fourth the first save is hit
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        done += [int(line) for line in process.stdout.read().split("\n")[:-1]]
        process.stdout.close()
        process.wait()
        try:
            newest = checkpoint.load_newest(target) if target.is_dir() else None
            if newest is None and done[-1] == 0:
                continue  # nothing was saved yet, and nothing bars the way
            assert newest is not None
            found, _, problems = newest
            if done[-1]:
                checkpoint.verify(target / "best.pt")
        except (CorruptCheckpointError, AssertionError) as error:
            outcome.lost, outcome.details = outcome.lost + 1, str(error)
            continue
        whole = torch.equal(found["model"]["w"], torch.full((300_000,), float(found["step"])))
        if problems or found["step"] < done[-1] or not whole:
            outcome.lost, outcome.details = outcome.lost + 1, f"{problems}, step {found['step']} after {done[-1]}"
    return outcome


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Cut off somewhere, some bytes changed, or a hole of zeros."""
    place = rng.randrange(1, len(data))
    match rng.randrange(3):
        case 0:
            return data[:place]
        case 1:
            changed = bytearray(data)
            for _ in range(rng.randrange(1, 9)):
                changed[rng.randrange(len(data))] ^= rng.randrange(1, 256)
            return bytes(changed)
    hole = min(len(data) - place, rng.randrange(1, 4096))
    return data[:place] + bytes(hole) + data[place + hole :]


def damaged_checkpoints(folder: Path, count: int, seed: int = 0) -> Outcome:
    """Each is refused by its manifest, and the one before it is used; as weights to start from each is refused, too."""
    from tests.test_checkpoint import state

    outcome, rng = Outcome("a damaged checkpoint is refused", count, "files cut, flipped or holed"), random.Random(seed)
    outcome.accepted = 0
    folder.mkdir(parents=True)
    for step in (1, 2):
        checkpoint.save(state(step, model={"w": torch.arange(20_000.0) + step}), folder, [])
    latest = folder / "checkpoint.pt"
    whole = latest.read_bytes()
    for _ in range(count):
        data = mutate(whole, rng)
        if data == whole:
            continue
        latest.write_bytes(data)
        found, path, problems = checkpoint.load_newest(folder)
        if path == latest or found["step"] != 1 or len(problems) != 1:
            outcome.accepted, outcome.details = outcome.accepted + 1, f"{path}: {problems}"
        alone = folder / "alone.pt"
        alone.write_bytes(data)
        try:
            read(str(alone))
        except UserError:
            continue
        except Exception as error:
            outcome.crashed, outcome.details = outcome.crashed + 1, repr(error)
            continue
        outcome.accepted, outcome.details = outcome.accepted + 1, "as weights to start from"
    return outcome


def full_disk(folder: Path) -> Outcome:
    """A disk of 2 MB (tmpfs): saving says that it is full, and what was saved before is still there."""
    from tests.test_checkpoint import state

    outcome = Outcome("a full disk is told, and costs no checkpoint", 1, "disk of 2 MB")
    if os.geteuid() != 0:
        outcome.tried, outcome.what = 0, "disks: only root may mount one"
        return outcome
    outcome.accepted = 0
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], check=True)
    try:
        checkpoint.save(state(1, model={"w": torch.zeros(100_000)}), folder, [])
        try:
            checkpoint.save(state(2, model={"w": torch.zeros(1_000_000)}), folder, [])
            outcome.accepted += 1
        except OSError as error:
            if error.errno != 28:
                outcome.crashed, outcome.details = 1, str(error)
        found, path, problems = checkpoint.load_newest(folder)
        if found["step"] != 1 or problems or any(folder.glob(".*.tmp")):
            outcome.lost, outcome.details = 1, f"{path}: {problems}"
        del found  # mapped from there
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    return outcome
