"""Sums over the processes that are made on their devices and read later, so that no host waits for its device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from omnivision.distributed.process_group import Dist

Note = TypeVar("Note")


@dataclass(frozen=True)
class _Posted(Generic[Note]):
    note: Note
    sums: Tensor  # on the host, once `arrived`
    arrived: torch.Event | None


class Agreement(Generic[Note]):
    """Facts of steps on their way to the hosts. Every process posts the same number of facts of every step."""

    def __init__(self, dist: Dist) -> None:
        self.dist = dist
        self._posted: deque[_Posted[Note]] = deque()

    def post(self, note: Note, facts: Sequence[Tensor | float]) -> Tensor:
        """Sum these facts over the processes, without waiting for the result. `note` stays here, and comes back with it.

        Returns the sums on the device: float64, one for each fact.
        """
        device = self.dist.device
        # `full` fills on the device; a tensor made on the host would be copied there, and waited for.
        values = torch.stack(
            [
                fact.detach().double()
                if isinstance(fact, Tensor)
                else torch.full((), fact, dtype=torch.float64, device=device)
                for fact in facts
            ]
        )
        self.dist.all_reduce(values)
        sums, arrived = values.to("cpu", non_blocking=True), None
        if device.type != "cpu":
            arrived = torch.Event(device)
            arrived.record()
        self._posted.append(_Posted(note, sums, arrived))
        return values

    def read(self, but: int = 0) -> Iterator[tuple[Note, list[float]]]:
        """The notes and the sums of all steps posted and not yet read, but for the `but` newest; waits for them."""
        while len(self._posted) > but:
            posted = self._posted.popleft()
            if posted.arrived is not None:
                posted.arrived.synchronize()
            yield posted.note, posted.sums.tolist()
