"""Standard output and error of a run: it goes on when nobody reads them any more, or when their disk is full."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO


class PatientStream:
    """A text stream that never raises: what cannot be written is lost, what cannot be encoded is written with backslashes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:  # names of files need not be text
                return self._stream.write(
                    text.encode(self._stream.encoding, "backslashreplace").decode(self._stream.encoding)
                )
        except OSError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        """What is written from here on goes nowhere; Python's last flush would otherwise change the exit code."""
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def be_patient() -> None:
    """Make both streams of this process patient; one that was closed leads nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, PatientStream):
            setattr(sys, name, PatientStream(stream or open(os.devnull, "w")))  # until the process ends
