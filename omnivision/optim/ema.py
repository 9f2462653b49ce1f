"""Exponential moving average (EMA) of the trained weights (Polyak & Juditsky 1992)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from omnivision.distributed.fsdp import distribute_like, local_tensor


class MovingAverage:
    """After each step, `average = decay * average + (1 - decay) * weights`, over the trained parameters.

    The decay warms up: after `t` steps it is `min(decay, (1 + t) / (10 + t))`, so that a short run's average does not keep the
    initial weights. Skipped steps do not count.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        device = next(model.parameters()).device
        self.steps = torch.zeros((), dtype=torch.int64, device=device)  # on the device, like the `skip_step` flag
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self, skip_step: Tensor) -> None:
        """Update after a step, unless `skip_step` (bool, a scalar on the device) says that it was skipped."""
        self.steps += ~skip_step
        weight = torch.where(skip_step, 0.0, (9 / (10 + self.steps)).clamp(min=1 - self.decay))
        averages, weights = (
            [local_tensor(tensor) for tensor in part.values()] for part in (self.average, self._weights)
        )
        torch._foreach_lerp_(averages, weights, [weight] * len(averages))

    def rebind_parameters(self, model: nn.Module) -> None:
        """Follow the model's current parameters of the same names, and shard the average like them."""
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: distribute_like(self.average[name], p).detach() for name, p in self._weights.items()}

    def reset_to_weights(self) -> None:
        """Restart the average from the current weights."""
        self.load({name: weight.detach() for name, weight in self._weights.items()}, steps=0)

    def load(self, average: Mapping[str, Tensor], steps: int) -> None:
        """Resume an average over `steps` steps."""
        self.steps.fill_(steps)
        for name, tensor in self.average.items():
            tensor.copy_(average[name])

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the averaged weights inside this block."""
        own = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])
