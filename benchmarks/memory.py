"""Peak memory of a pretraining step, each side in its own process, and growth of a data worker's memory."""

import tempfile
from pathlib import Path

import torch

from benchmarks import videos
from benchmarks.geometry import FASTEST_DTYPE, Geometry
from benchmarks.harness import Ratio, Report, in_new_process, own_memory
from benchmarks.peers.published_mae import PublishedMAE
from omnivision.data.sampling import Request

SIDES = ("ours", "ours, checkpointed", "Hugging Face", "ours, fp32", "Hugging Face, fp32", "the published way")
FP32 = SIDES[3:]  # the others use the fastest precision of this processor


def memory(quick: bool) -> Report:
    report = Report("memory", "Peak memory of a pretraining step", "MB")
    shape = Geometry("vittiny", 2, 4, 64)
    for side in SIDES:
        if "Hugging" not in side or report.works("Hugging Face", shape.huggingface):
            measured = of_step(side, quick) if quick else in_new_process(of_step, side, quick)
            report.seconds[side] = [measured]  # once: it does not vary as time does
    first, last = in_new_process(of_worker, quick)
    report.facts |= {"a data worker after a tenth of its samples, MB": round(first, 1), "after all": round(last, 1)}

    def share(side: str, other: str) -> float:
        return report.median(side) / report.median(other)

    for precision in ("", ", fp32"):
        if (peer := f"Hugging Face{precision}") in report.seconds:
            report.at_most(f"memory of a step against {peer}", share(f"ours{precision}", peer), 1.0, "x")
    report.at_most("growth of a data worker's memory", last - first, 20, "MB")
    report.ratios.append(Ratio("activation checkpointing against none", [share("ours, checkpointed", "ours")]))
    return report


def of_step(side: str, quick: bool) -> float:
    """Return the MB that two steps add to the peak of this process."""
    shape = Geometry("vittiny", 2, 4, 64) if quick else Geometry("vitbase", 8)
    if side.startswith("Hugging Face"):
        import transformers  # noqa: F401  # its code is not memory of the step
    before = own_memory("VmHWM")
    if side.startswith("Hugging Face"):
        model = shape.huggingface()
    elif side == "the published way":
        model = PublishedMAE(shape.ours(), checkpointing=True)
    else:
        model = shape.ours(checkpointing="checkpointed" in side)
    run = shape.step(model, torch.float32 if side in FP32 else FASTEST_DTYPE)
    run()
    run()
    return max(1.0, own_memory("VmHWM") - before)  # when quick, an earlier side has taken as much


def of_worker(quick: bool) -> list[float]:
    """Return the MB of a process that makes samples: after the first tenth of them, and at the end."""
    torch.set_num_threads(1)
    count, measured = 60 if quick else 3000, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = videos.pretraining_samples(videos.split(folder, "v", videos.make(folder, 340, 256, seconds=4, copies=4)))
        for number in range(count):
            data[Request(0, number % 4, number)]
            if number + 1 in (count // 10, count):
                measured.append(own_memory("VmRSS"))
    return measured
