"""An exponential moving average of the trained weights (Polyak & Juditsky 1992), which may be evaluated in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from omnivision.sharding import local, split_like


class MovingAverage:
    """After each step: `average = decay * average + (1 - decay) * weights`, over the parameters that are trained."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self, unless: Tensor) -> None:
        """After a step, `unless` (bool, a scalar on the device) it was skipped."""
        share = torch.where(unless, 0.0, 1 - self.decay)
        averages, weights = ([local(each) for each in part.values()] for part in (self.average, self._weights))
        torch._foreach_lerp_(averages, weights, [share] * len(averages))

    def take_parameters(self, model: nn.Module) -> None:
        """Go on with the parameters that a model has now under the same names; the average is split as they are."""
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: split_like(self.average[name], p).detach() for name, p in self._weights.items()}

    def start(self) -> None:
        """Begin anew at the weights as they are now, pretrained ones say."""
        self.load({name: weight.detach() for name, weight in self._weights.items()})

    def load(self, average: Mapping[str, Tensor]) -> None:
        for name, tensor in self.average.items():
            tensor.copy_(average[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside this block, and its own again afterwards."""
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
