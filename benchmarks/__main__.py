"""Every benchmark in turn, each in a process of its own (but for --quick), and one table of what was reached of what was to be.

    python -m benchmarks [--quick] [--out bench] [NAME ...]

Writes NAME.json and NAME.png into the folder and, when all were run, the table as table.md. Exit code 1 when a benchmark fails;
a goal that is missed is told, and is no failure. From the root of a checkout, since the benchmarks are not installed.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

from benchmarks.command import ending_well, options_of, parser_of, run_apart
from benchmarks.harness import Ratio

NAMES = (
    "pretraining_step step_shapes step_parts what_helped decoders memory cost_growth decoding loading data_wait splits "
    "evaluation probe_step start"
).split()


def table(folder: Path, names: list[str]) -> list[str]:
    lines = ["| what | measured: median (least to most) | goal | |", "|---|---|---|---|"]
    for name in names:
        if (file := folder / f"{name}.json").exists():
            for found in json.loads(file.read_text())["ratios"]:
                known = {key: found[key] for key in ("what", "rounds", "goal", "unit", "at_most")}
                lines.append(Ratio(**known).row())
    return lines


def run_one(name: str, folder: Path, quick: bool) -> bool:
    """Whether it went well."""
    if not quick:
        return run_apart([sys.executable, "-m", f"benchmarks.{name}", "--out", str(folder)]) == 0
    importlib.import_module(f"benchmarks.{name}").main(["--quick", "--out", str(folder)])
    return True


def main() -> int:
    parser = parser_of("python -m benchmarks", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(NAMES)}; all by default")
    options = options_of(parser)
    names = list(dict.fromkeys(options.names)) or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"there is no benchmark {', '.join(unknown)}; expected some of {', '.join(NAMES)}")
    failed, done = [], []
    try:
        with ending_well():
            for number, name in enumerate(names):
                began = time.monotonic()
                print(f"== {number + 1} of {len(names)}: {name}", flush=True)
                (options.out / f"{name}.json").unlink(missing_ok=True)  # what an earlier run found is not of this one
                (done if run_one(name, options.out, options.quick) else failed).append(name)
                print(f"   {time.monotonic() - began:.0f} s\n", flush=True)
    finally:
        lines = table(options.out, done)
        print("\n".join(lines))
    if options.quick:
        lines.append("\nSmall sizes: the ratios say nothing.")
        print(lines[-1])
    elif done == NAMES:
        (options.out / "table.md").write_text("\n".join(lines) + "\n")
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
