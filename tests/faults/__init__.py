"""Faults that are injected on purpose, and what became of them: `make faults` prints the table, `make test` its quick part."""

from dataclasses import dataclass


@dataclass
class Outcome:
    """Of one promise. `lost`, `crashed` and `accepted` (wrongly; None where nothing could be) must be nothing; `details` names
    those that are not.
    """

    promise: str
    tried: int
    what: str
    lost: int = 0
    crashed: int = 0
    accepted: int | None = None
    seconds: float = 0.0
    details: str = ""

    @property
    def kept(self) -> bool:
        return not (self.lost or self.crashed or self.accepted)
