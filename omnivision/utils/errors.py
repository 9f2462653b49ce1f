"""What can end a run, and with which exit code. The only module that every other one may import."""

import errno
import re
from collections.abc import Iterator

EXIT_USER = 1
EXIT_FAULT = 70
EXIT_NON_FINITE = 71
EXIT_HUNG_UP = 129
EXIT_INTERRUPTED = 130
EXIT_ANNOUNCED = 140
EXIT_TERMINATED = 143


class UserError(ValueError):
    """A mistake that its user can mend: one paragraph (what, got, expected, which setting to change), exit code 1.

    `on_all_ranks` says that all processes raise it alike, so that one of them is enough to tell it.
    """

    exit_code = EXIT_USER

    def __init__(self, message: str, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks
        self.problems = [message]  # one by one, when it tells of several

    @classmethod
    def of(cls, problems: list[str]) -> "UserError":
        """One that tells of one problem or of several."""
        several = len(problems) > 1
        error = cls("\n- ".join([f"{len(problems)} problems:", *problems]) if several else problems[0])
        error.problems = problems
        return error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, its cause, the cause of that, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # a chain of causes may come back to where it began
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or this machine has no memory left; torch has several kinds and wordings."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    wording = r"out of memory|(can't|cannot) allocate memory|not enough memory|_ALLOC_FAILED"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(wording, str(error), re.IGNORECASE) is not None
    )


def out_of_memory(error: BaseException, advice: str) -> str:
    """One paragraph about an error of `is_out_of_memory`."""
    text = " ".join(str(error).split())
    where = "GPU" if re.search(r"cuda|cublas|cudnn|\bhip\b|gpu", text, re.IGNORECASE) else "This machine"
    return f"{where} out of memory: {text[:300] or type(error).__name__}. {advice}"


class NonFiniteError(UserError):
    """The loss or the gradient stopped being a number; every process leaves with the same exit code."""

    exit_code = EXIT_NON_FINITE


class PeerLostError(RuntimeError):
    """Another process of the run is silent, or `gone` (killed, and its system knows with what); the message names it."""

    def __init__(self, message: str, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


class DataWorkerError(UserError):
    """A data worker was killed, or gives nothing any more. The run goes on from its checkpoint when it is started again."""

    exit_code = EXIT_FAULT


class StopRequested(BaseException):
    """A run was asked to stop. `cause` says by what (see `StopSignal`), `saved_step` which step is in its checkpoint when
    it has saved and all its processes leave together.
    """

    def __init__(self, cause: str, saved_step: int | None = None) -> None:
        super().__init__(cause)
        self.cause, self.saved_step = cause, saved_step
        self.exit_code = {"SIGTERM": EXIT_TERMINATED, "SIGHUP": EXIT_HUNG_UP}.get(cause, EXIT_ANNOUNCED)
