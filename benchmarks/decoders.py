"""The two cheaper decoders, alone and together, against the recipe's and against Hugging Face's VideoMAE.

    python -m benchmarks.decoders [--quick]

Whole steps (forward, backward, AdamW) at the recipe's geometry, batch 8, each at its best precision here. What they cost in
quality on the demo is in docs/performance.md (`python -m benchmarks.decoder_quality`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.command import command_line
from benchmarks.harness import Report, interleaved
from benchmarks.pretraining_step import DTYPES, geometry, loss_of_ours, step
from benchmarks.turns import in_turn

KINDS: dict[str, dict[str, Any]] = {
    "ours, the recipe": {},
    "ours, half of the masked tokens": {"share": 0.5},
    "ours, cross-attention": {"attention": "cross"},
    "ours, cross-attention to half": {"attention": "cross", "share": 0.5},
}


def run(quick: bool) -> Report:
    shape, precision = geometry(quick), list(DTYPES)[-1]
    report = Report("decoders", f"A pretraining step with other decoders, {shape.size}, {precision}", unit="s a clip")
    peer = f"Hugging Face {precision}"
    kinds = {"benchmarks.decoders": {"ours": list(KINDS)}}
    if report.works("Hugging Face", shape.huggingface):
        kinds = {"benchmarks.pretraining_step": {"Hugging Face": [peer]}} | kinds
    with contextlib.ExitStack() as running:
        turns: dict[str, Any] = {}
        for module, kind in kinds.items():
            turns |= running.enter_context(in_turn(module, kind, quick))
        report.seconds = interleaved(turns, rounds=2 if quick else 3, warm_up=int(quick), per=shape.batch)
    report.facts["threads"] = torch.get_num_threads()
    goals = {"ours, half of the masked tokens": 1.8, "ours, cross-attention": 3.0}
    for name in KINDS:
        report.times_as_fast(f"{name.removeprefix('ours, ')}, against Hugging Face", name, peer, goals.get(name))
    return report


def sides(kind: str, quick: bool) -> dict[str, Callable[[], None]]:
    """As a run does them."""
    shape, found = geometry(quick), {}
    for name, decoder in KINDS.items():
        model = shape.ours(**decoder)
        prediction = model(shape.video, shape.mask, shape.masked)
        wanted = int(shape.masked * decoder.get("share", 1))
        if prediction.pixels.shape[1] != wanted or not prediction.pixels.isfinite().all():
            raise ValueError(f"{name} predicts {prediction.pixels.shape[1]} tokens; expected {wanted}")
        found[name] = step(model, loss_of_ours(model, shape), list(DTYPES.values())[-1])
    return found


def main(arguments: list[str] | None = None) -> None:
    command_line(run, __doc__, arguments)


if __name__ == "__main__":
    main()
