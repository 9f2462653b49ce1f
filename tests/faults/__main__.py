"""`python -m tests.faults [--quick] [--nightly]`: inject every fault, print the table of promises, fail if one was not kept."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults import Outcome, fuzz, kills, saving

# How much of each: in `make test`, in `make faults`, in `make nightly`.
FAULTS: dict[str, tuple[Callable[..., Outcome], tuple, tuple, tuple]] = {
    "kills_1": (kills.killed_runs, (2, 1), (20, 1), (20, 1)),
    "kills_2": (kills.killed_runs, (2, 2), (20, 2), (20, 2)),
    "kills_while_saving": (saving.killed_while_saving, (4,), (100,), (100,)),
    "damaged_checkpoints": (saving.damaged_checkpoints, (10,), (50,), (500,)),
    "full_disk": (saving.full_disk, (), (), ()),
    "films": (fuzz.films, (60,), (300,), (2000,)),
    "weights": (fuzz.weights, (40,), (300,), (2000,)),
}


def inject(name: str, amount: int) -> Outcome:
    """One kind of fault; `amount` is 0 (quick), 1 or 2 (nightly)."""
    function, *amounts = FAULTS[name]
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        outcome = function(Path(folder) / name, *amounts[amount])
        outcome.seconds = time.monotonic() - began
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(FAULTS)}; all by default")
    parser.add_argument("--quick", action="store_const", dest="amount", const=0, default=1)
    parser.add_argument("--nightly", action="store_const", dest="amount", const=2)
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(FAULTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    print("| promise | tried | lost | crashed | wrongly accepted | s |")
    print("|---|---|---|---|---|---|")
    outcomes = []
    for name in asked.names or FAULTS:
        made = inject(name, asked.amount)
        outcomes.append(made)
        accepted = "–" if made.accepted is None else made.accepted
        cells = (f"{made.tried} {made.what}", made.lost, made.crashed, accepted, f"{made.seconds:.0f}")
        print(f"| {made.promise} | {' | '.join(map(str, cells))} |", flush=True)
    for made in outcomes:
        if not made.kept:
            print(f"{made.promise}: {made.details}", file=sys.stderr)
    sys.exit(0 if all(made.kept for made in outcomes) else 1)


if __name__ == "__main__":
    main()
