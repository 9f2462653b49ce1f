"""Exceptions that end a run, and exit codes. Every other module may import this one."""

import errno
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

EXIT_USER = 1
EXIT_FAULT = 70  # EX_SOFTWARE of sysexits.h
EXIT_NON_FINITE = 71
EXIT_SIGHUP = 128 + 1
EXIT_SIGINT = 128 + 2
EXIT_SIGUSR2 = 128 + 12  # also at the time limit, which SLURM announces with this signal
EXIT_SIGTERM = 128 + 15

Result = TypeVar("Result")


class UserError(ValueError):
    """Invalid input that the user can fix: one paragraph (what, got, expected, which setting to change), exit code 1.

    `on_all_ranks`: all ranks raise it alike, so only one of them reports it.
    """

    exit_code = EXIT_USER

    def __init__(self, message: str, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks
        self.problems = [message]

    @classmethod
    def from_problems(cls, problems: list[str]) -> "UserError":
        """Return an error that lists one problem or several."""
        several = len(problems) > 1
        error = cls("\n- ".join([f"{len(problems)} problems:", *problems]) if several else problems[0])
        error.problems = problems
        return error


def collect_problems(problems: list[str], action: Callable[..., Result], *arguments: Any) -> Result | None:
    """Call a function; return its result, or None after adding the problems of a UserError to `problems`."""
    try:
        return action(*arguments)
    except UserError as error:
        problems.extend(error.problems)
        return None


def truncate_list(items: Iterable[object], count: int = 5, separator: str = ", ") -> str:
    """Join the first `count` items, each truncated to 200 characters, and say how many more there are."""
    items = list(items)
    shown = [text if len(text) <= 200 else f"{text[:200]}..." for text in map(str, items[:count])]
    if more := len(items) - len(shown):
        shown.append(f"and {more} more")
    return separator.join(shown)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, its cause, the cause's cause, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # a chain of causes may be a cycle
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or this machine is out of memory; torch has several exception types and wordings for this."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    wording = r"out of memory|(can't|cannot) allocate memory|not enough memory|_ALLOC_FAILED"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(wording, str(error), re.IGNORECASE) is not None
    )


def oom_message(error: BaseException, advice: str) -> str:
    """Return one paragraph about an out-of-memory error."""
    text = " ".join(str(error).split())
    where = "GPU" if re.search(r"cuda|cublas|cudnn|\bhip\b|gpu", text, re.IGNORECASE) else "This machine"
    return f"{where} out of memory: {text[:300] or type(error).__name__}. {advice}"


class NonFiniteError(UserError):
    """The loss or the gradient is not finite; all ranks exit with the same code."""

    exit_code = EXIT_NON_FINITE


class PeerLostError(RuntimeError):
    """Another rank, named in the message, sends no heartbeat or is `gone` (killed; its own host reports why)."""

    def __init__(self, message: str, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


class DataWorkerError(UserError):
    """A data worker was killed or hangs. The same command resumes the run from its checkpoint."""

    exit_code = EXIT_FAULT


class VideoDecodeError(Exception):
    """A file cannot give the frames asked for. The message is one line: the reason, without the path."""


class StopRequested(BaseException):
    """A run was asked to stop by `cause` (see `StopSignal`). With a `saved_step`, it has saved and all ranks exit together."""

    def __init__(self, cause: str, saved_step: int | None = None) -> None:
        super().__init__(cause)
        self.cause, self.saved_step = cause, saved_step
        self.exit_code = {"SIGTERM": EXIT_SIGTERM, "SIGHUP": EXIT_SIGHUP}.get(cause, EXIT_SIGUSR2)
