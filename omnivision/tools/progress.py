"""Progress on standard error: a bar on a terminal, a line at every tenth elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich import progress
from rich.console import Console

Item = TypeVar("Item")


def track(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Yield the items, and show how many of `total` are done."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from progress.track(items, what, total, console=console)
        return
    for done, item in enumerate(items, start=1):
        yield item
        if 10 * done // total > 10 * (done - 1) // total:
            console.print(f"{what}: {done} of {total}", highlight=False, soft_wrap=True)
