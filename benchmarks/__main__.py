"""Run benchmarks, each in its own process, and print a table of what they measured and of their goals.

    python -m benchmarks [--quick] [--out bench] [NAME ...]

Each benchmark writes NAME.json into the folder; a run of all adds the table as table.md. The exit code is 1 when a benchmark
fails; missing a goal is no failure. --quick runs small sizes, all in this process.
"""

import argparse
import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import Ratio, Report

# Name -> module; the function has the same name.
BENCHMARKS = {
    "pretraining_step": "steps",
    "step_shapes": "steps",
    "step_parts": "step_parts",
    "what_helped": "what_helped",
    "decoders": "steps",
    "memory": "memory",
    "cost_growth": "cost_growth",
    "decoding": "decoding",
    "loading": "loading",
    "data_wait": "commands",
    "splits": "splits",
    "evaluation": "evaluation",
    "features": "features",
    "probe_step": "steps",
    "start": "commands",
}

RUN_ONE = "import sys; from benchmarks.__main__ import run_here; run_here(sys.argv[1], False, sys.argv[2])"


def run_here(name: str, quick: bool, folder: Path | str) -> None:
    """Run one benchmark in this process."""
    report: Report = getattr(importlib.import_module(f"benchmarks.{BENCHMARKS[name]}"), name)(quick)
    report.machine["quick"] = quick
    print(report.text(), flush=True)  # before a file fails
    report.write(Path(folder))


def table(folder: Path, names: list[str]) -> list[str]:
    lines = ["| what | measured: median (least to most) | goal | |", "|---|---|---|---|"]
    for name in names:
        for row in json.loads((folder / f"{name}.json").read_text())["ratios"]:
            lines.append(Ratio(**{key: row[key] for key in ("what", "rounds", "goal", "unit", "at_most")}).row())
    return lines


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: a test that everything works")
    parser.add_argument("--out", type=Path, help="folder of the results; bench, or bench/quick when quick")
    options = parser.parse_args()
    names = list(dict.fromkeys(options.names)) or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"NAME must be some of {', '.join(BENCHMARKS)}; got {', '.join(sorted(unknown))}")
    folder = options.out or Path("bench/quick" if options.quick else "bench")
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # subprocess.run then kills its child
    failed = []
    for number, name in enumerate(names, start=1):
        start = time.monotonic()
        print(f"== {number} of {len(names)}: {name}", flush=True)
        if options.quick:
            run_here(name, True, folder)
        elif subprocess.run([sys.executable, "-c", RUN_ONE, name, str(folder)]).returncode:
            failed.append(name)
        print(f"   {time.monotonic() - start:.0f} s\n", flush=True)
    lines = table(folder, [name for name in names if name not in failed])
    print("\n".join(lines))
    if options.quick:
        print("\nSmall sizes: the ratios say nothing.")
    elif names == list(BENCHMARKS) and not failed:
        (folder / "table.md").write_text("\n".join(lines) + "\n")
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
