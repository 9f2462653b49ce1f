"""Timing the sides of a comparison in turn, and a report of seconds, ratios and goals as text and JSON."""

import contextlib
import datetime
import functools
import importlib.metadata
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import torch

from omnivision.utils.io import write_json

Side = Callable[[], object]
Sides = Callable[[str, bool], Mapping[str, Side]]  # the sides of a kind, quick or not


@dataclass(frozen=True)
class Ratio:
    """One line of the table: how many times as good as the other side, and the goal.

    `rounds` holds the ratio of each round, because the sides of a round meet the same load of the machine.
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
    """The results of a benchmark. `seconds`: of each side, one number per round; `facts`: other numbers."""

    name: str
    title: str
    unit: str = "s"
    draw: Callable[["Report", Any], None] | None = None  # on a matplotlib figure
    seconds: dict[str, list[float]] = field(default_factory=dict)
    ratios: list[Ratio] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=lambda: machine())  # before anything is measured

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

    def at_most(self, what: str, values: float | list[float], goal: float, unit: str) -> None:
        """Add a number with an upper bound."""
        self.ratios.append(Ratio(what, values if isinstance(values, list) else [values], goal, unit, at_most=True))

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    def write(self, folder: Path) -> None:
        """Write `NAME.json`, and `NAME.png` if the report has a chart."""
        content = {key: getattr(self, key) for key in ("name", "title", "unit", "machine", "facts")}
        content["sides"] = {side: _spread(seconds) | {"all": seconds} for side, seconds in self.seconds.items()}
        content["ratios"] = [asdict(ratio) | {"value": ratio.value, "reached": ratio.reached} for ratio in self.ratios]
        write_json(folder / f"{self.name}.json", content)
        if self.draw is not None:
            from matplotlib.figure import Figure

            figure = Figure(layout="constrained")
            figure.suptitle(self.title, fontsize=11)
            self.draw(self, figure)
            figure.savefig(folder / f"{self.name}.png", dpi=110)

    def text(self) -> str:
        lines = [self.title, ""]
        width = max(map(len, self.seconds), default=0)
        for side, seconds in self.seconds.items():
            low, middle, high = _spread(seconds).values()
            lines.append(
                f"  {side:{width}}  {middle:9.4f} {self.unit}   ({low:.4f} to {high:.4f}, {len(seconds)} rounds)"
            )
        lines += [f"  {name}: {value}" for name, value in self.facts.items()]
        return "\n".join([*lines, "", *(ratio.row() for ratio in self.ratios)])


def interleaved(
    sides: Mapping[str, Side],
    rounds: int,
    warm_up: int = 1,
    per: float = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of each side, one number per round; in each round all sides take their turn.

    Args:
        sides: one that returns a float has timed itself.
        per: clips (or other units) that a call works on: seconds are divided by it.
        clock: `time.process_time` for seconds of one core, whatever threads a side has.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        for name, side in sides.items():
            start = clock()
            result = side()
            if number >= warm_up:
                seconds[name].append((result if isinstance(result, float) else clock() - start) / per)
    return seconds


@contextlib.contextmanager
def in_processes(kinds: Mapping[str, tuple[Sides, Sequence[str]]], quick: bool) -> Iterator[dict[str, Side]]:
    """Yield the sides of each kind: (function that makes them, names). One process per kind, so that they share no memory.

    A turn runs its side twice and times the second run, because the system may have taken its memory away. When quick, all
    run in this process.
    """
    if quick:
        yield {name: make(kind, True)[name] for kind, (make, names) in kinds.items() for name in names}
        return
    context = multiprocessing.get_context("spawn")
    turns: dict[str, Side] = {}
    with contextlib.ExitStack() as stack:
        for kind, (make, names) in kinds.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_take_turns, args=(make, kind, theirs))
            process.start()
            stack.callback(process.kill)
            theirs.close()
            turns |= {name: functools.partial(_turn, ours, name) for name in names}
        yield turns


def _turn(pipe: Connection, name: str) -> float:
    pipe.send(name)
    return pipe.recv()  # EOFError if the process has ended


def _take_turns(make: Sides, kind: str, pipe: Connection) -> None:
    sides = make(kind, False)
    with contextlib.suppress(EOFError):  # the parent has ended
        while True:
            side = sides[pipe.recv()]
            side()
            start = time.perf_counter()
            side()
            pipe.send(time.perf_counter() - start)


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function that runs in a new interpreter."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


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
    """Return MB of this process: "VmRSS", "VmHWM" (its peak), or "Anonymous" (pages of no mapped file)."""
    file = "smaps_rollup" if what == "Anonymous" else "status"
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{what}:"))


def machine() -> dict[str, Any]:
    """Return what was measured: hardware, load and versions."""
    packages = {"torch", "torchvision", "av", "numpy", "transformers", "decord", "torchcodec"}
    installed = {
        package.name: package.version for package in importlib.metadata.distributions() if package.name in packages
    }
    describe = ["git", "describe", "--always", "--dirty=+"]
    git = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True) if shutil.which("git") else None
    info = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.decode().strip() if git else None,
        "processor": next((line.partition(": ")[2] for line in info if line.startswith("model name")), None),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16_matrix_unit": bool(torch.cpu._is_amx_tile_supported()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": dict(sorted(installed.items())),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
