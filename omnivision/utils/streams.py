"""Standard output and error that never fail: a run continues after a broken pipe or on a full disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

MAX_WIDTH = 10_000  # columns of a console that breaks no line


class SafeStream:
    """A text stream that never raises: it drops text that cannot be written, and escapes characters that cannot be encoded."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failed: OSError | None = None

    def write(self, text: str) -> int:
        try:
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:  # file names may not be valid text
                return self._stream.write(
                    text.encode(self._stream.encoding, "backslashreplace").decode(self._stream.encoding)
                )
        except OSError as error:
            self._redirect(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._redirect(error)

    def _redirect(self, error: OSError) -> None:
        """Redirect the stream to /dev/null: Python's last flush would otherwise change the exit code."""
        self.failed = error
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def output_problem() -> str | None:
    """Return why standard output could not be written; None if it could, or if a pipe was closed."""
    sys.stdout.flush()
    failed = getattr(sys.stdout, "failed", None)
    if failed is None or isinstance(failed, BrokenPipeError):
        return None
    return f"Standard output cannot be written: {failed.strerror}. Send it to another file."


def plural(count: int, noun: str) -> str:
    """Return "1 epoch", "2 epochs"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def format_count(count: int) -> str:
    """Return a number of parameters in millions, "22.04 M", or a small one as it is."""
    return f"{count / 1e6:.2f} M" if count >= 1e5 else str(count)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def announce(text: str) -> None:
    """Print what a slow start is doing, if on a terminal."""
    if sys.stderr.isatty():
        print(f"{text} ...", file=sys.stderr, flush=True)


def print_text(text: str, console: Any = None) -> None:
    """Print text, wrapped on a terminal, with lines kept whole elsewhere.

    Args:
        console: rich's console; None: standard output.
    """
    from rich.console import Console

    console = console or Console()
    console.print(text, soft_wrap=not console.is_terminal, highlight=False, markup=False, emoji=False)


def wide_console(highlight: bool = True) -> tuple[Console, int]:
    """Return a console that breaks no line, and the width to fill: the terminal's; the console's where there is none."""
    from rich.console import Console

    console = Console(width=MAX_WIDTH, highlight=highlight)  # rich would break numbers, names and paths
    return console, shutil.get_terminal_size().columns if console.is_terminal else MAX_WIDTH


def ignore_broken_pipe() -> None:
    """Wrap both streams of this process in `SafeStream`; a closed one becomes /dev/null."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, SafeStream):
            setattr(sys, name, SafeStream(stream or open(os.devnull, "w")))  # until the process ends
