"""Sides of a comparison in processes of their own, which take turns: what one does with its memory is no other's business.

`python -m benchmarks.turns MODULE KIND` calls `MODULE.sides(KIND, False)` and then runs the side that each line of its input
names, twice, and prints the seconds of the second time: while it waited the system may have taken its memory away.
"""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.harness import Side


@contextlib.contextmanager
def in_turn(module: str, kinds: Mapping[str, Sequence[str]], quick: bool) -> Iterator[dict[str, Side]]:
    """The sides that `module` has of each kind, one process for each kind; when quick, all in this process."""
    if quick:
        sides = importlib.import_module(module).sides
        yield {name: made[name] for kind, names in kinds.items() for made in (sides(kind, quick),) for name in names}
        return
    with contextlib.ExitStack() as running:
        found = {}
        for kind, names in kinds.items():
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.turns", module, kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            running.callback(process.wait)
            running.callback(process.kill)
            found |= {name: _turn(process, name) for name in names}
        yield found


def _turn(process: subprocess.Popen[str], name: str) -> Side:
    def run() -> float:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{name}\n")
        process.stdin.flush()
        if not (answer := process.stdout.readline()):
            raise RuntimeError(f"the process of {name} has ended")
        return float(answer)

    return run


def main() -> None:
    module, kind, *_ = sys.argv[1:]
    made = importlib.import_module(module).sides(kind, False)
    for line in sys.stdin:
        side = made[line.rstrip("\n")]
        side()
        began = time.perf_counter()
        side()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
