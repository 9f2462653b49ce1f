"""Test modules side by side, one process for each of up to eight processors, when unittest discovers all of them.

A module that is named (`python -m unittest tests.test_mae`) runs in the process that was asked, so that breakpoints work.
"""

import contextlib
import multiprocessing
import os
import unittest
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = min(len(os.sched_getaffinity(0)), 8)


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None) -> unittest.TestSuite:
    """Return every module below this folder; unittest calls this instead of searching the folder itself."""
    # Larger files first: the last module to start should be a short one.
    files = sorted(Path(__file__).parent.rglob(pattern or "test*.py"), key=lambda file: -file.stat().st_size)
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return SideBySide(names, loader.testNamePatterns)


@dataclass(frozen=True)
class Named:
    """A test of another process, as results print it."""

    name: str
    text: str
    description: str | None
    failureException = AssertionError

    @classmethod
    def of(cls, test: Any) -> "Named":
        return cls(test.id(), str(test), test.shortDescription())

    def id(self) -> str:
        return self.name

    def shortDescription(self) -> str | None:
        return self.description

    def __str__(self) -> str:
        return self.text


class TracebackText(Exception):
    """The traceback of another process."""


class Recorder(unittest.TestResult):
    """Collects the calls that a result receives, in a form that can travel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Named, tuple[Any, ...]]] = []

    def startTest(self, test: Any) -> None:
        super().startTest(test)
        self.calls.append(("startTest", Named.of(test), ()))

    def stopTest(self, test: Any) -> None:
        super().stopTest(test)
        self.calls.append(("stopTest", Named.of(test), ()))

    def addSuccess(self, test: Any) -> None:
        self.calls.append(("addSuccess", Named.of(test), ()))

    def addSkip(self, test: Any, reason: str) -> None:
        self.calls.append(("addSkip", Named.of(test), (reason,)))

    def addFailure(self, test: Any, err: Any) -> None:
        self._add_problem("addFailure", test, err)

    def addError(self, test: Any, err: Any) -> None:
        self._add_problem("addError", test, err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            failed = issubclass(err[0], test.failureException)
            self._add_problem("addFailure" if failed else "addError", subtest, err)

    def _add_problem(self, kind: str, test: Any, err: Any) -> None:
        text = self._exc_info_to_string(err, test)  # type: ignore[attr-defined]
        self.calls.append((kind, Named.of(test), ((TracebackText, TracebackText(f"\n{text}"), None),)))


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


def run_module(name: str, patterns: list[str] | None) -> list[tuple[str, Named, tuple[Any, ...]]]:
    """Run a module in this process; return what its result was told."""
    loader, recorder = unittest.TestLoader(), Recorder()
    loader.testNamePatterns = patterns
    with measure_coverage():
        loader.loadTestsFromName(name).run(recorder)
    return recorder.calls


class SideBySide(unittest.TestSuite):
    """Runs modules in a pool of processes and repeats to the result what became of their tests, module by module."""

    def __init__(self, names: Sequence[str], patterns: list[str] | None) -> None:
        super().__init__()
        self.names, self.patterns = names, patterns

    def run(self, result: unittest.TestResult, debug: bool = False) -> unittest.TestResult:
        os.environ.setdefault(
            "OMP_NUM_THREADS", "1"
        )  # modules that share processors would wait for each other's threads
        with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
            running: dict[Future[Any], str] = {
                pool.submit(run_module, name, self.patterns): name for name in self.names
            }
            for future in as_completed(running):
                if (error := future.exception()) is not None:  # the process was killed, or the module cannot be loaded
                    name = running[future]
                    result.addError(Named(name, name, None), (type(error), error, error.__traceback__))  # type: ignore[arg-type]
                    continue
                for call, test, arguments in future.result():
                    getattr(result, call)(test, *arguments)
                if result.shouldStop:
                    pool.shutdown(cancel_futures=True)
                    break
        return result
