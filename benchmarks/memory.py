"""Peak memory of a pretraining step: ours, with activations made again, and Hugging Face's; and what a data worker holds.

    python -m benchmarks.memory [--quick]

Each side of a step runs in a process of its own, which says how much more memory it has had at most than before the model was
made. A worker's memory is that of a process that makes one sample after another.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.command import command_line
from benchmarks.harness import Ratio, Report, own_memory
from benchmarks.pretraining_step import Geometry

SIDES = (
    "ours",
    "ours, activations made again",
    "Hugging Face",
    "ours, fp32",
    "Hugging Face, fp32",
    "the published way",
)
FP32 = SIDES[3:]  # the others are as precise as is quickest here


def measure(side: str, quick: bool) -> float:
    """MB of two steps of one side, in this process."""
    from benchmarks.peers.published_mae import PublishedMAE
    from benchmarks.pretraining_step import DTYPES, loss_of_huggingface, loss_of_ours, loss_of_published, step

    shape = Geometry("vittiny", 2, 4, 64) if quick else Geometry("vitbase", 8)
    if side.startswith("Hugging Face"):
        import transformers  # noqa: F401  # its code is not memory of the step

        before = own_memory("VmHWM")
        model = shape.huggingface()
        loss = loss_of_huggingface(model, shape)
    elif side == "the published way":
        before = own_memory("VmHWM")
        model = PublishedMAE(shape.ours(), checkpointing=True)
        loss = loss_of_published(model, shape)
    else:
        before = own_memory("VmHWM")
        model = shape.ours(checkpointing="again" in side)
        loss = loss_of_ours(model, shape)
    run = step(model, loss, torch.float32 if side in FP32 else list(DTYPES.values())[-1])
    run()
    run()
    return own_memory("VmHWM") - before


def of_worker(quick: bool) -> list[float]:
    """MB of a process that makes samples: after the first tenth of them, and at the end."""
    from benchmarks import films
    from benchmarks.loading import dataset
    from omnivision.data.sampling import Request

    torch.set_num_threads(1)
    count, found = 60 if quick else 3000, []
    with tempfile.TemporaryDirectory() as folder:
        data = dataset(Path(folder), "films", films.make(Path(folder), 340, 256, seconds=4, copies=4))
        for number in range(count):
            data[Request(0, number % 4, number)]
            if number + 1 in (count // 10, count):
                found.append(own_memory("VmRSS"))
    return found


def apart(what: str, quick: bool) -> str:
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", what, *(["--quick"] if quick else [])]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run(quick: bool) -> Report:
    report = Report("memory", "Most memory of a pretraining step", unit="MB")
    rounds = 1  # memory does not vary as time does
    shape = Geometry("vittiny", 2, 4, 64)
    sides = [side for side in SIDES if "Hugging" not in side or report.works("Hugging Face", shape.huggingface)]
    for _ in range(rounds):
        for side in sides:
            report.seconds.setdefault(side, []).append(float(apart(side, quick)))
    began, ended = json.loads(apart("worker", quick))
    report.facts |= {"a data worker after a tenth of its samples, MB": round(began, 1), "after all": round(ended, 1)}

    def share(side: str, other: str) -> list[float]:
        return [one / two for one, two in zip(report.seconds[side], report.seconds[other], strict=True)]

    for what, precision in (("", ""), (" in fp32", ", fp32")):
        if (peer := f"Hugging Face{precision}") in sides:
            what = f"memory of a step{what} against Hugging Face"
            report.ratios.append(Ratio(what, share(f"ours{precision}", peer), 1.0, at_most=True))
    report.ratios.append(Ratio("growth of a data worker's memory", [ended - began], 20, "MB", at_most=True))
    again = share("ours, activations made again", "ours")
    report.ratios.append(Ratio("memory with activations made again against without", again))
    return report


def main(arguments: list[str] | None = None) -> None:
    command_line(run, __doc__, arguments)


if __name__ == "__main__":
    if "--measure" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--measure", choices=[*SIDES, "worker"])
        parser.add_argument("--quick", action="store_true")
        chosen = parser.parse_args()
        print(
            json.dumps(of_worker(chosen.quick) if chosen.measure == "worker" else measure(chosen.measure, chosen.quick))
        )
    else:
        main()
