"""Show that training on this GPU is right, and how fast it is: `python -m benchmarks.gpu`, in under eight minutes.

    python -m benchmarks.gpu [--quick] [--out gpu] [checks] [speed]
    python -m benchmarks.gpu --recipe MINUTES        the five stages on rendered videos

Without a GPU it is a rehearsal on the CPU, which needs --quick. Parts write checks.json, speed.json, table.md and steps.png,
--recipe writes recipe.json, recipe.md, reconstruction.gif, and its data and runs in recipe/. The exit code is 1 when a check
fails; missing a goal is not a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

PARTS = ("checks", "speed")
PART_SECONDS = 1200  # more than any part takes
STOP_SECONDS = 30  # for a part to end its step and remove its files


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    options = parse()
    folder = Path(options.out or ("gpu/quick" if options.quick else "gpu"))
    try:
        return run_part(options.here, options.quick, folder) if options.here else run(options, folder)
    except KeyboardInterrupt as stop:
        if not options.here:
            print(f"error: interrupted; the results so far are in {folder}", file=sys.stderr)
        return 128 + (stop.args or (signal.SIGINT,))[0]
    except Exception as error:
        from omnivision.utils.errors import UserError

        if not isinstance(error, (OSError, UserError)):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="checks, speed, or both (default)")
    parser.add_argument("--quick", action="store_true", help="small sizes: a test that everything works")
    parser.add_argument("--out", help="folder of the results; gpu, or gpu/quick when quick")
    what = "train the five stages in about so many minutes (1 to 1440); with --quick, one epoch of few videos, always"
    parser.add_argument("--recipe", type=minutes, metavar="MINUTES", help=what)
    parser.add_argument("--here", choices=PARTS, help=argparse.SUPPRESS)  # a part in its own process
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"PART must be checks or speed; got {', '.join(sorted(unknown))}")
    if options.out == "":
        parser.error("--out must be a folder; got ''")
    if options.recipe and options.parts:
        parser.error(f"--recipe runs alone; got {', '.join(options.parts)}, too")
    return options


def minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 1 <= float(text) <= 1440:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be minutes between 1 and 1440; got {text}")


def run_part(name: str, quick: bool, folder: Path) -> int:
    """Run a part in this process; it writes its results as they come."""
    from benchmarks.gpu import checks, speed
    from omnivision.utils.io import write_json

    write = functools.partial(write_json, folder / f"{name}.json")
    (checks.run_checks if name == "checks" else speed.run_speed)(quick, write)
    return 0


def run(options: argparse.Namespace, folder: Path) -> int:
    """Run the recipe, or parts in their own processes."""
    import torch

    if not (options.quick or torch.cuda.is_available()):
        print("error: there is no GPU here; --quick rehearses on the CPU", file=sys.stderr)
        return 2
    with lock(folder):
        if options.recipe is None:
            return run_parts(list(dict.fromkeys(options.parts)) or list(PARTS), options.quick, folder)
        from benchmarks.gpu.recipe import run_recipe

        run_recipe(folder, options.recipe, options.quick)
        return 0


def lock(folder: Path) -> TextIO:
    """Make the folder and return a file that keeps other runs out of it while it is open. Raises UserError."""
    from omnivision.utils.errors import UserError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        guard = open(folder / ".lock", "w")
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run writes to {folder}; wait for it, or set --out to another folder") from None
    except OSError as error:
        raise UserError(f"--out must be a folder that can be written to; got {error}") from error
    return guard


def run_parts(parts: list[str], quick: bool, folder: Path) -> int:
    """Run parts one after the other, write the table of what they found, and return the exit code."""
    from benchmarks.gpu import tables

    for name in (*(f"{part}.json" for part in parts), "table.md", "steps.png"):
        (folder / name).unlink(missing_ok=True)
    start, failed = time.monotonic(), []
    try:
        for part in parts:
            print(f"== {part}", flush=True)
            failed += run_in_child(part, quick, folder)
    finally:
        files = {part: folder / f"{part}.json" for part in parts}
        results: dict[str, Any] = {part: json.loads(file.read_text()) for part, file in files.items() if file.is_file()}
        table = tables.as_markdown(results)
        print(
            "\n".join(["", table, *tables.notes(results), "", f"{time.monotonic() - start:.0f} s; results in {folder}"])
        )
        (folder / "table.md").write_text(table)
        tables.write_charts(results, folder)
    failed += [row["what"] for row in results.get("checks", {}).get("rows", []) if row["verdict"] == "failed"]
    failed += results.get("speed", {}).get("failed", [])
    if failed:
        print(f"error: failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_in_child(part: str, quick: bool, folder: Path) -> list[str]:
    """Run a part in its own process, and end that and its workers with this one; return what went wrong."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--here", part, "--out", str(folder), *["--quick"] * quick]
    quiet = {"KINETO_LOG_LEVEL": "99"} if quick else {}  # a profiler without a GPU writes errors
    child = subprocess.Popen(command, env=os.environ | quiet, start_new_session=True)
    try:
        code = child.wait(PART_SECONDS)
    except subprocess.TimeoutExpired:
        return [f"{part} (ended after {PART_SECONDS} s)"]
    except KeyboardInterrupt:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_SECONDS)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return [f"{part} ({f'exit code {code}' if code > 0 else f'signal {-code}'})"] if code else []


if __name__ == "__main__":
    sys.exit(main())
