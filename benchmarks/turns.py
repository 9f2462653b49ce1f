"""Sides of a comparison in processes of their own, which take turns: what one does with its memory is no other's business.

`python -m benchmarks.turns MODULE KIND` calls `MODULE.sides(KIND, False)` and then runs the side that each line of its input
names.
"""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence


@contextlib.contextmanager
def in_turn(module: str, kinds: Mapping[str, Sequence[str]], quick: bool) -> Iterator[dict[str, Callable[[], None]]]:
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


def _turn(process: subprocess.Popen[str], name: str) -> Callable[[], None]:
    def run() -> None:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{name}\n")
        process.stdin.flush()
        if process.stdout.readline() != "done\n":
            raise RuntimeError(f"the process of {name} has ended")

    return run


def main() -> None:
    module, kind, *_ = sys.argv[1:]
    made = importlib.import_module(module).sides(kind, False)
    for line in sys.stdin:
        made[line.rstrip("\n")]()
        print("done", flush=True)


if __name__ == "__main__":
    main()
