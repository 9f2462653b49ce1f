"""Test modules side by side, in a process more than there are processors (up to eight), when unittest discovers all of them.

A module that is named (`python -m unittest tests.models.test_mae`) runs in the calling process, so that breakpoints work.
"""

import contextlib
import io
import multiprocessing
import os
import traceback
import unittest
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = min(len(os.sched_getaffinity(0)) + 1, 8)  # many tests wait for runs of their own
LISTS = ("failures", "errors", "skipped")  # of a result: tests and texts


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None) -> unittest.TestSuite:
    """Return every module below this folder; unittest calls this instead of searching the folder itself."""
    # Whole runs, at the top, and larger files first: the last module to start should be a short one.
    files = sorted(
        Path(__file__).parent.rglob(pattern or "test*.py"), key=lambda file: (len(file.parts), -file.stat().st_size)
    )
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return SideBySide(names, loader.testNamePatterns)


class Description(str):
    """A test of another process, as results print it."""

    def shortDescription(self) -> None:
        return None


@contextlib.contextmanager
def measure_coverage() -> Iterator[None]:
    """Under `coverage run`, which measures its own process alone, measure this one, too."""
    if "COVERAGE_RUN" not in os.environ:
        yield
        return
    import coverage

    measured = coverage.Coverage(data_suffix=True)
    with measured.collect():
        yield
    measured.save()


def start_process() -> None:
    from tests.stage_runs import start_fork_server  # imports torch

    start_fork_server()


def run_module(name: str, patterns: list[str] | None, verbosity: int) -> tuple[str, int, dict[str, list]]:
    """Run a module; return what it printed, its number of tests, and the lists of its result."""
    loader, printed = unittest.TestLoader(), io.StringIO()
    loader.testNamePatterns = patterns
    result = unittest.TextTestResult(unittest.runner._WritelnDecorator(printed), True, verbosity)  # type: ignore[attr-defined]
    with measure_coverage():
        loader.loadTestsFromName(name).run(result)
    lists = {
        key: [(Description(result.getDescription(test)), text) for test, text in getattr(result, key)] for key in LISTS
    }
    return printed.getvalue(), result.testsRun, lists


class SideBySide(unittest.TestSuite):
    """Runs modules in a pool of processes and adds what became of their tests to the result, module by module."""

    def __init__(self, names: Sequence[str], patterns: list[str] | None) -> None:
        super().__init__()
        self.names, self.patterns = names, patterns

    def run(self, result: Any, debug: bool = False) -> Any:
        os.environ.setdefault(
            "OMP_NUM_THREADS", "1"
        )  # modules that share processors would wait for each other's threads
        verbosity = 2 if getattr(result, "showAll", False) else int(getattr(result, "dots", False))
        with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn"), start_process) as pool:
            running = {pool.submit(run_module, name, self.patterns, verbosity): name for name in self.names}
            for future in as_completed(running):
                try:
                    printed, count, lists = future.result()
                except Exception as error:  # the process was killed, or the module cannot be loaded
                    text = "".join(traceback.format_exception(error))
                    printed, count, lists = "E", 0, {"errors": [(Description(running[future]), text)]}
                if verbosity:
                    result.stream.write(printed)
                    result.stream.flush()
                result.testsRun += count
                for key, entries in lists.items():
                    getattr(result, key).extend(entries)
                if result.failfast and not result.wasSuccessful():
                    pool.shutdown(cancel_futures=True)
                    break
        return result
