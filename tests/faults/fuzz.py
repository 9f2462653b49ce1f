"""Bytes changed at random: films and files of weights give what they hold or are refused, whatever it is."""

import random
import subprocess
import sys
from pathlib import Path

from tests.faults import Outcome
from tests.faults.saving import mutate
from tests.runs import ROOT

AT_A_TIME = 50  # in one process: one that crashes takes the rest of its cases with it
SECONDS_A_CASE = 20
CODECS = {
    "a.mp4": "libx264",
    "b.mkv": "libx265",
    "c.webm": "libvpx-vp9",
    "d.avi": "mpeg4",
    "e.ts": "mpeg2video",
    "f.gif": "gif",
}


def films(folder: Path, cases: int, seed: int = 0) -> Outcome:
    """Of several codecs and containers."""
    from tests.test_decode import make_film

    folder.mkdir(parents=True)
    options = {"libx265": {"x265-params": "log-level=none"}, "libvpx-vp9": {"cpu-used": "8"}}
    sources = [
        make_film(
            folder / name, codec, frames=30, options=options.get(codec), pix_fmt="rgb8" if codec == "gif" else "yuv420p"
        )
        for name, codec in CODECS.items()
    ]
    return tried("a damaged film is decoded or refused", "films", sources, cases, seed)


def weights(folder: Path, cases: int, seed: int = 0) -> Outcome:
    """Archives of torch.save, old and new, and safetensors."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    state = {f"trunk.{name}": torch.arange(64.0).reshape(8, 8) for name in "abc"}
    torch.save(state, folder / "new.pt")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, str(folder / "x.safetensors"))
    names = ("new.pt", "old.pth", "x.safetensors")
    return tried("damaged weights are read or refused", "weights", [folder / name for name in names], cases, seed)


def tried(promise: str, kind: str, sources: list[Path], cases: int, seed: int) -> Outcome:
    """Mutations of `sources` in turn, in processes of their own."""
    outcome = Outcome(promise, cases, f"{kind} with random damage")
    for first in range(0, cases, AT_A_TIME):
        count = min(AT_A_TIME, cases - first)
        command = [sys.executable, "-m", "tests.faults.fuzz", kind, str(seed + first), str(count), *map(str, sources)]
        try:
            made = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=SECONDS_A_CASE * count
            )
        except subprocess.TimeoutExpired:
            outcome.crashed, outcome.details = outcome.crashed + 1, f"hangs: {' '.join(command)}"
            continue
        if made.returncode:
            outcome.crashed += 1
            outcome.details = f"exit code {made.returncode}: {' '.join(command)}: {made.stderr[-300:]}"
    return outcome


def main(kind: str, seed: int, count: int, sources: list[Path]) -> None:
    """Try `count` mutations; whatever is not a refusal ends this process."""
    from omnivision.checkpoint.pretrained import read
    from omnivision.data.video import VideoDecodeError, open_video
    from omnivision.utils.errors import UserError

    for number in range(seed, seed + count):
        rng, source = random.Random(number), sources[number % len(sources)]
        damaged = source.with_name(f"damaged_{number}{source.suffix}")
        damaged.write_bytes(mutate(source.read_bytes(), rng))
        try:
            if kind == "films":
                with open_video(str(damaged), max_pixels=10**6) as video:
                    start = rng.random() * min(video.duration, 2.0)
                    assert video.read(start, start + 0.5, 4).shape[:2] == (4, 3)
            else:
                read(str(damaged))
        except (VideoDecodeError, UserError):
            pass
        damaged.unlink()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), [Path(name) for name in sys.argv[4:]])
