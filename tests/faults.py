"""Inject faults: `python -m tests.faults [--quick | --nightly] [NAME ...]` prints a table and fails on a broken guarantee."""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from omnivision.checkpoint import checkpointer
from omnivision.checkpoint.state_dict_file import read_weights
from omnivision.data.video import VideoDecodeError, open_video
from omnivision.reporting.logs import read_lines
from omnivision.utils.errors import UserError
from omnivision.utils.io import CorruptCheckpointError
from tests import runs
from tests.checkpoint.test_checkpoint import state
from tests.data.test_decode import make_video

CASES_PER_PROCESS = 50  # a process that crashes takes the rest of its cases with it
SECONDS_PER_CASE = 20
CODECS = {"a.mp4": "libx264", "b.mkv": "libx265", "c.webm": "libvpx-vp9", "d.avi": "mpeg4", "e.ts": "mpeg2video",
          "f.gif": "gif"}  # fmt: skip
CODEC_OPTIONS = {"libx265": {"x265-params": "log-level=none"}, "libvpx-vp9": {"cpu-used": "8"}}
SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from omnivision.checkpoint import checkpointer
from tests.checkpoint.test_checkpoint import state
print(0, flush=True)
for step in range(1, 10**6):
    weights = {'w': torch.full((300_000,), float(step))}
    checkpointer.save(state(step, model=weights), Path(sys.argv[1]), ['best.pt'])
    print(step, flush=True)
"""


@dataclass
class Outcome:
    """Results of injecting the faults of a guarantee: what was lost, what crashed, and what was wrongly accepted."""

    guarantee: str
    injected: str
    lost: list[str] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        return self.lost + self.crashed + self.accepted


# ---- kills of a run -----------------------------------------------------------------------------------------------


def killed_runs(folder: Path, kills: int, processes: int) -> Outcome:
    """Kill a run at random moments, and compare it with one that is not killed."""
    outcome = Outcome(f"resumed equals uninterrupted, {processes} process{'es' * (processes > 1)}", "")
    rng = random.Random(0)
    settings = [
        *runs.write_split(folder, runs.real_videos() * 16),
        f"launcher.gpus_per_node={processes}",
        f"epochs={4 * kills + 2}",  # of six steps, more than a start makes
        "trainer.checkpoint.save_every_steps=1",
    ]
    straight, killed = folder / "straight", folder / "killed"
    assert (result := runs.run(straight, *settings)).returncode == 0, result.stderr
    done = while_saving = 0
    for done in range(1, kills + 1):
        command = runs.command(killed, *settings)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=folder, start_new_session=True, **quiet)
        while_saving += wait_for_moment(process, killed, rng, saving=done % 2 == 0)
        if process.poll() is not None:
            if process.returncode:
                outcome.crashed.append(f"a start exited with {process.returncode}")
            break  # at its end
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        saved, logged = last_saved(killed), last_logged(killed)
        if saved < logged - 1:  # a step is logged, then saved, then the next one begins
            outcome.lost.append(f"step {logged} was logged, the checkpoint is of step {saved}")
    outcome.injected = f"{done} kills at random moments, {while_saving} of them while saving"
    if (result := runs.run(killed, *settings)).returncode:
        outcome.crashed.append(result.stderr[-300:])
        return outcome
    expected, resumed = tensors_of(straight), tensors_of(killed)
    outcome.lost += [name for name in expected | resumed if not torch.equal(expected[name], resumed[name])]
    steps = [[(line["step"], line["loss"]) for line in runs.read_metrics(run)] for run in (straight, killed)]
    if steps[0] != steps[1]:
        outcome.lost.append(f"other steps: {steps[1]}")
    return outcome


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights and the optimizer's state in the newest checkpoint of a run."""
    contents = checkpointer.read_checkpoint(run / "checkpoints/checkpoint.pt")
    moments = {
        f"{number} {name}": torch.as_tensor(value)
        for number, each in contents["optimizer"]["state"].items()
        for name, value in each.items()
    }
    return contents["model"] | moments


def wait_for_moment(process: subprocess.Popen[bytes], run: Path, rng: random.Random, saving: bool) -> bool:
    """Wait for a random moment after a step of this attempt, or during a save; return whether it is during one."""
    before, deadline = last_logged(run), time.monotonic() + 120
    while process.poll() is None and last_logged(run) <= before:
        assert time.monotonic() < deadline, "no step in two minutes"
        time.sleep(0.01)
    if not saving:
        time.sleep(rng.random() * 0.3)
        return False
    until = time.monotonic() + 5
    while process.poll() is None and time.monotonic() < until:
        if any((run / "checkpoints").glob(".*.tmp")):
            time.sleep(rng.random() * 0.01)
            return True
    return False


def last_logged(run: Path) -> int:
    """Return the last step in the log of a run; -1 for none. A start first removes the steps after its checkpoint."""
    log = run / "logs/metrics.jsonl"
    return max((line["step"] for line in read_lines(log)), default=-1) if log.is_file() else -1


def last_saved(run: Path) -> int:
    """Return the step of the newest complete checkpoint; -1 for none."""
    newest = checkpointer.load_newest(run / "checkpoints") if (run / "checkpoints").is_dir() else None
    return -1 if newest is None else newest[0]["epoch"] * newest[0]["steps_per_epoch"] + newest[0]["step"]


# ---- checkpoints --------------------------------------------------------------------------------------------------


def killed_while_saving(folder: Path, kills: int) -> Outcome:
    """Kill a process that saves again and again: the newest checkpoint must be complete, and no older than the last."""
    outcome, rng = Outcome("a kill while saving loses no checkpoint", f"{kills} kills while saving"), random.Random(0)
    for number in range(kills):
        target = folder / str(number)
        command = [sys.executable, "-c", SAVE_FOREVER, str(target)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=runs.ROOT)
        assert process.stdout is not None
        done = [int(process.stdout.readline()) for _ in range(1 + number % 4)]  # every fourth kill hits the first save
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        done += [int(line) for line in process.stdout.read().split("\n")[:-1]]
        process.stdout.close()
        process.wait()
        try:
            newest = checkpointer.load_newest(target) if target.is_dir() else None
            if newest is None and done[-1] == 0:
                continue  # nothing was saved yet, and nothing prevents a start
            assert newest is not None
            contents, _, problems = newest
            if done[-1]:
                checkpointer.verify_manifest(target / "best.pt")
            complete = torch.equal(contents["model"]["w"], torch.full((300_000,), float(contents["step"])))
            if problems or contents["step"] < done[-1] or not complete:
                outcome.lost.append(f"{problems}, step {contents['step']} after {done[-1]}")
        except (CorruptCheckpointError, AssertionError) as error:
            outcome.lost.append(repr(error))
    return outcome


def damaged_checkpoints(folder: Path, count: int) -> Outcome:
    """Corrupt checkpoints: each must be rejected by its manifest, as pretrained weights too, and the previous one be used."""
    outcome = Outcome("a corrupt checkpoint is rejected", f"{count} files truncated, bit-flipped or with holes")
    for step in (1, 2):
        checkpointer.save(state(step, model={"w": torch.arange(20_000.0) + step}), folder, [])
    latest, alone = folder / "checkpoint.pt", folder / "alone.pt"
    complete, rng = latest.read_bytes(), random.Random(0)
    for _ in range(count):
        data = mutate(complete, rng)
        if data == complete:
            continue
        latest.write_bytes(data)
        alone.write_bytes(data)
        contents, path, problems = checkpointer.load_newest(folder)
        if path == latest or contents["step"] != 1 or len(problems) != 1:
            outcome.accepted.append(f"{path}: {problems}")
        try:
            read_weights(str(alone))
            outcome.accepted.append("as weights to start from")
        except UserError:
            pass
        except Exception as error:
            outcome.crashed.append(repr(error))
    return outcome


def full_disk(folder: Path) -> Outcome:
    """Fill a disk of 2 MB (tmpfs): saving must raise ENOSPC and keep the previous checkpoint."""
    outcome = Outcome("a full disk is reported and loses no checkpoint", "1 disk of 2 MB")
    if os.geteuid() != 0:
        outcome.injected = "none: only root may mount a disk"
        return outcome
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], check=True)
    try:
        checkpointer.save(state(1, model={"w": torch.zeros(100_000)}), folder, [])
        try:
            checkpointer.save(state(2, model={"w": torch.zeros(1_000_000)}), folder, [])
            outcome.accepted.append("saved to a full disk")
        except OSError as error:
            if error.errno != 28:
                outcome.crashed.append(str(error))
        contents, path, problems = checkpointer.load_newest(folder)
        if contents["step"] != 1 or problems or any(folder.glob(".*.tmp")):
            outcome.lost.append(f"{path}: {problems}")
        del contents  # mapped from there
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    return outcome


# ---- random damage ------------------------------------------------------------------------------------------------


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Truncate somewhere, change some bytes, or write a hole of zeros."""
    place, kind = rng.randrange(1, len(data)), rng.randrange(3)
    if kind == 0:
        return data[:place]
    changed = bytearray(data)
    if kind == 1:
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    else:
        hole = min(len(data) - place, rng.randrange(1, 4096))
        changed[place : place + hole] = bytes(hole)
    return bytes(changed)


def damaged_videos(folder: Path, cases: int) -> Outcome:
    """Damage videos of several codecs and containers."""
    sources = [
        make_video(folder / name, codec, frames=30, options=CODEC_OPTIONS.get(codec),
                  pix_fmt="rgb8" if codec == "gif" else "yuv420p")
        for name, codec in CODECS.items()
    ]  # fmt: skip
    return open_damaged("a damaged video is decoded or rejected", "video", sources, cases)


def damaged_weights(folder: Path, cases: int) -> Outcome:
    """Damage archives of torch.save, old and new, and safetensors."""
    weights = {f"trunk.{name}": torch.arange(64.0).reshape(8, 8) for name in "abc"}
    sources = [folder / name for name in ("new.pt", "old.pth", "x.safetensors")]
    torch.save(weights, sources[0])
    torch.save(weights, sources[1], _use_new_zipfile_serialization=False)
    save_file(weights, str(sources[2]))
    return open_damaged("damaged weights are loaded or rejected", "weights", sources, cases)


def open_damaged(guarantee: str, kind: str, sources: list[Path], cases: int) -> Outcome:
    """Open mutations of `sources` in turn, in other processes."""
    outcome = Outcome(guarantee, f"{cases} files with random damage")
    for first in range(0, cases, CASES_PER_PROCESS):
        count = min(CASES_PER_PROCESS, cases - first)
        code = f"from tests import faults; faults.open_mutations({kind!r}, {first}, {count}, {[*map(str, sources)]})"
        try:
            process = subprocess.run(
                [sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True, text=True, errors="replace",
                timeout=SECONDS_PER_CASE * count,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            outcome.crashed.append(f"hangs: {code}")
            continue
        if process.returncode:
            outcome.crashed.append(f"exit code {process.returncode}: {code}: {process.stderr[-300:]}")
    return outcome


def open_mutations(kind: str, seed: int, count: int, sources: list[str]) -> None:
    """Open `count` mutations; end this process on anything but a rejection."""
    for number in range(seed, seed + count):
        rng, source = random.Random(number), Path(sources[number % len(sources)])
        damaged = source.with_name(f"damaged_{number}{source.suffix}")
        damaged.write_bytes(mutate(source.read_bytes(), rng))
        try:
            if kind == "video":
                with open_video(str(damaged), max_pixels=10**6) as video:
                    start = rng.random() * min(video.duration, 2.0)
                    assert video.read(start, start + 0.5, 4).shape[:2] == (4, 3)
            else:
                read_weights(str(damaged))
        except (VideoDecodeError, UserError):
            pass
        damaged.unlink()


# Arguments in `make test`, in `make faults`, in `make nightly`.
FAULTS: dict[str, tuple[Callable[..., Outcome], tuple, tuple, tuple]] = {
    "kills_1": (killed_runs, (1, 1), (20, 1), (20, 1)),
    "kills_2": (killed_runs, (1, 2), (20, 2), (20, 2)),  # not in `make test`
    "kills_while_saving": (killed_while_saving, (4,), (100,), (100,)),
    "damaged_checkpoints": (damaged_checkpoints, (10,), (50,), (500,)),
    "full_disk": (full_disk, (), (), ()),
    "videos": (damaged_videos, (60,), (300,), (2000,)),
    "weights": (damaged_weights, (40,), (300,), (2000,)),
}


def inject(name: str, amount: int) -> Outcome:
    """Inject one kind of fault; `amount` is 0 (quick), 1 or 2 (nightly)."""
    function, *amounts = FAULTS[name]
    with tempfile.TemporaryDirectory() as folder:
        return function(Path(folder), *amounts[amount])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(FAULTS)}; all by default")
    parser.add_argument("--quick", action="store_const", dest="amount", const=0, default=1)
    parser.add_argument("--nightly", action="store_const", dest="amount", const=2)
    options = parser.parse_args()
    if unknown := set(options.names) - set(FAULTS):
        parser.error(f"NAME must be some of {', '.join(FAULTS)}; got {', '.join(unknown)}")
    print("| guarantee | injected | lost | crashed | wrongly accepted | s |\n|---|---|---|---|---|---|")
    problems = []
    for name in options.names or FAULTS:
        start = time.monotonic()
        outcome = inject(name, options.amount)
        counts = (len(outcome.lost), len(outcome.crashed), len(outcome.accepted), f"{time.monotonic() - start:.0f}")
        print(f"| {outcome.guarantee} | {outcome.injected} | {' | '.join(map(str, counts))} |", flush=True)
        problems += [f"{outcome.guarantee}: {problem}" for problem in outcome.problems()]
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
