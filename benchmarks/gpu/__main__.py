"""Show that training on this GPU is right, and how fast it is: `python -m benchmarks.gpu`, in under eight minutes.

    python -m benchmarks.gpu [--quick] [--out gpu] [checks] [speed]
    python -m benchmarks.gpu --recipe MINUTES        the five stages on rendered videos

Without a GPU it is a rehearsal on the CPU, which needs --quick. Writes checks.json, speed.json, recipe.json, table.md and
steps.png into the folder. The exit code is 1 when a check fails; missing a goal is not a failure.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

PARTS = ("checks", "speed")
# Before CUDA starts: what deterministic matrix products need.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def run_part(name: str, quick: bool, folder: Path) -> None:
    """Run a part in this process; it writes its results as they come."""
    from benchmarks.gpu import checks, speed
    from omnivision.utils.io import write_json

    write = functools.partial(write_json, folder / f"{name}.json")
    (checks.run_checks if name == "checks" else speed.run_speed)(quick, write)


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="checks, speed, or both (default)")
    parser.add_argument("--quick", action="store_true", help="small sizes: a test that everything works")
    parser.add_argument("--out", type=Path, help="folder of the results; gpu, or gpu/quick when quick")
    parser.add_argument(
        "--recipe", type=float, metavar="MINUTES", help="train the five stages in about so many minutes"
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # a part in its own process
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"PART must be checks or speed; got {', '.join(sorted(unknown))}")
    if not (options.quick or torch.cuda.is_available()):
        parser.error("there is no GPU here; --quick rehearses on the CPU")
    folder = options.out or Path("gpu/quick" if options.quick else "gpu")
    folder.mkdir(parents=True, exist_ok=True)
    if options.here:
        run_part(options.parts[0], options.quick, folder)
        return 0
    if options.recipe is not None:
        from benchmarks.gpu.recipe import run_recipe

        run_recipe(folder, options.recipe, options.quick)
        return 0
    start, failed = time.monotonic(), []
    for part in options.parts or PARTS:
        print(f"== {part}", flush=True)
        (folder / f"{part}.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu", part, "--here", "--out", str(folder)]
        code = subprocess.run(command + ["--quick"] * options.quick, env=os.environ | ENVIRONMENT).returncode
        failed += [part] if code else []
    from benchmarks.gpu.tables import write_charts, write_table

    done = {
        part: json.loads((folder / f"{part}.json").read_text()) for part in PARTS if (folder / f"{part}.json").is_file()
    }
    print("\n" + write_table(done, folder))
    write_charts(done, folder)
    if options.quick:
        print("Small sizes: the ratios say nothing.")
    print(f"\n{time.monotonic() - start:.0f} s; results in {folder}")
    wrong = [row["what"] for row in done.get("checks", {}).get("rows", []) if row["passed"] is False]
    wrong += done.get("speed", {}).get("failed", [])
    if failed or wrong:
        print(f"error: failed: {', '.join([*failed, *wrong])}", file=sys.stderr)
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
