"""Sides of a comparison timed in turn: what they took is printed, written as JSON and drawn, beside what was to be reached.

A benchmark is a module with `run(quick) -> Report`; `command.command_line` makes a program of it.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is there

import torch

from omnivision.utils.io import write_atomically

Side = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """One line of the table: how many times as good as the other side, with the goal beside it.

    `rounds` holds the ratio of each round, because the sides of a round meet the same moods of the machine.
    """

    what: str
    rounds: list[float]
    goal: float | None = None
    unit: str = "x"
    at_most: bool = False  # the goal is an upper bound

    @property
    def value(self) -> float:
        return statistics.median(self.rounds)

    @property
    def reached(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    def row(self) -> str:
        goal = "" if self.goal is None else f"{'at most' if self.at_most else 'at least'} {self.goal:g} {self.unit}"
        verdict = {None: "", True: "reached", False: "missed"}[self.reached]
        spread = f"{self.value:.2f} {self.unit}"
        if len(self.rounds) > 1:
            spread += f" ({min(self.rounds):.2f} to {max(self.rounds):.2f})"
        return f"| {self.what} | {spread} | {goal} | {verdict} |"


@dataclass
class Report:
    """What a benchmark found. `seconds` are those of each side, one number a round; `facts` are figures of other kinds."""

    name: str
    title: str
    unit: str = "s"
    seconds: dict[str, list[float]] = field(default_factory=dict)
    ratios: list[Ratio] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=lambda: machine())  # as it was before anything was measured

    def works(self, peer: str, use: Callable[..., object], *arguments: Any) -> bool:
        """Use a peer once. One that does not load, for whatever reason, is left out, and the facts say why."""
        try:
            use(*arguments)
        except Exception as error:
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            self.facts[peer] = f"left out, it does not load: {type(error).__name__}: {reason}"
        return peer not in self.facts

    def times_as_fast(self, what: str, ours: str, theirs: str, goal: float | None = None) -> None:
        """Add how many times as fast `ours` is as `theirs`, round by round, if both were measured."""
        if ours in self.seconds and theirs in self.seconds:
            pairs = zip(self.seconds[theirs], self.seconds[ours], strict=True)
            self.ratios.append(Ratio(what, [other / mine for other, mine in pairs], goal))

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    def write(self, folder: Path) -> None:
        """`NAME.json`, and `NAME.png` where there is something to draw."""
        table = {side: _spread(each) | {"all": each} for side, each in self.seconds.items()}
        content = {"name": self.name, "title": self.title, "unit": self.unit}
        content |= {"machine": self.machine, "sides": table}
        content["ratios"] = [asdict(ratio) | {"value": ratio.value, "reached": ratio.reached} for ratio in self.ratios]
        write_atomically(folder / f"{self.name}.json", json.dumps(content | {"facts": self.facts}, indent=1) + "\n")
        if self.seconds:
            self._draw(folder / f"{self.name}.png")

    def text(self) -> str:
        lines = [self.title, ""]
        width = max(map(len, self.seconds), default=0)
        for side, each in self.seconds.items():
            low, middle, high = _spread(each).values()
            lines.append(f"  {side:{width}}  {middle:9.4f} {self.unit}   ({low:.4f} to {high:.4f}, {len(each)} rounds)")
        lines += [f"  {name}: {value}" for name, value in self.facts.items()]
        return "\n".join([*lines, "", *(ratio.row() for ratio in self.ratios)])

    def _draw(self, file: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.42 * len(self.seconds)), layout="constrained")
        for place, (side, each) in enumerate(self.seconds.items()):
            middle = statistics.median(each)
            axes.barh(place, middle, color="#4477aa" if side.startswith("ours") else "#bbbbbb")
            axes.plot([min(each), max(each)], [place, place], color="black", linewidth=1)
            told = f"{middle:.3g}" if middle < 1000 else f"{middle:.0f}"
            axes.annotate(told, (max(each), place), (4, -3), textcoords="offset points", fontsize=8)
        axes.set_yticks(range(len(self.seconds)), list(self.seconds))
        axes.invert_yaxis()
        axes.margins(x=0.16, y=0.3 / len(self.seconds))
        figure.supxlabel(f"{self.unit} (median; line: from least to most)", fontsize=10)
        figure.suptitle(self.title, fontsize=10)
        figure.savefig(file, dpi=110)
        pyplot.close(figure)


def interleaved(
    sides: Mapping[str, Side],
    rounds: int,
    warm_up: int = 1,
    per: float = 1,
    prepare: Side | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each side, one number a round; in each round all sides take their turn.

    Args:
        per: clips (or other units) that a call works on: seconds are divided by it.
        sides: one that returns a float has timed itself.
        prepare: called before each call, untimed.
        clock: `time.process_time` for seconds of one core, whatever threads a side has.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        for name, side in sides.items():
            if prepare is not None:
                prepare()
            began = clock()
            took = side()
            if number >= warm_up:
                seconds[name].append((took if isinstance(took, float) else clock() - began) / per)
    return seconds


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread inside, as in a data worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def own_memory(what: str) -> float:
    """MB of this process: "VmRSS", "VmHWM" (the most so far), or "Anonymous" (what is no page of a mapped file)."""
    file = "smaps_rollup" if what == "Anonymous" else "status"
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{what}:"))


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    packages = ("torch", "torchvision", "av", "numpy", "transformers", "decord", "torchcodec")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16_matrix_unit": bool(torch.cpu._is_amx_tile_supported()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": {name: version for name in packages if (version := _version(name))},
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """Of the checkout, with a + when files differ from it."""
    if shutil.which("git") is None:
        return None
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return said.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
