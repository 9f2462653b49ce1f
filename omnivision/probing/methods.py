"""Classifiers on frozen features, each a function of features and labels that returns scores; and the rank of features.

Features are float tensors (N, D), labels int64 (N,) from 0 to classes - 1. What is random comes from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.07  # of the neighbors' votes (Wu et al. 2018; DINO)
QUERY_BLOCK = 512
MAX_ITERATIONS = 2000
GRADIENT_TOLERANCE = 1e-6  # of the mean loss
SGD_EPOCHS, SGD_BATCH, SGD_MOMENTUM = 100, 128, 0.9
RANK_SAMPLES = 8192


class Scaler(NamedTuple):
    """Mean and standard deviation of each channel; channels that hardly vary keep their size."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Scaler:
        std, mean = torch.std_mean(features.double(), 0, correction=0)
        return cls(mean, torch.where(std > 1e-8, std, 1.0))

    def __call__(self, features: Tensor) -> Tensor:
        """Return standardized features, float64."""
        return (features.double() - self.mean) / self.std


def knn_scores(
    train: Tensor, labels: Tensor, queries: Tensor, neighbors: Sequence[int], classes: int
) -> dict[int, Tensor]:
    """Classify by the nearest training samples in cosine similarity s, each with a vote exp(s / 0.07).

    neighbors: values of k, at most N. Returns for each the sums of votes of each class: float32 (M, classes).
    """
    train, queries = F.normalize(train.float(), dim=1), F.normalize(queries.float(), dim=1)
    scores: dict[int, list[Tensor]] = {k: [] for k in neighbors}
    for block in queries.split(QUERY_BLOCK):
        similarity, nearest = (block @ train.T).topk(max(neighbors), dim=1)
        votes = ((similarity - 1) / TEMPERATURE).exp()  # at most 1
        for k in neighbors:
            empty = votes.new_zeros(len(block), classes)
            scores[k].append(empty.scatter_add_(1, labels[nearest[:, :k]], votes[:, :k]))
    return {k: torch.cat(parts) for k, parts in scores.items()}


class Linear(NamedTuple):
    """Weights (classes, D) and biases (classes,) of standardized features."""

    weight: Tensor
    bias: Tensor
    converged: bool = True

    def __call__(self, features: Tensor) -> Tensor:
        return features @ self.weight.T + self.bias


def fit_logistic(features: Tensor, labels: Tensor, strengths: Sequence[float], classes: int) -> Iterator[Linear]:
    """Fit a multinomial logistic regression for each C in `strengths`, in ascending order, to convergence.

    It minimizes sum(cross-entropy) + |weight|^2 / (2 C), as scikit-learn does, by L-BFGS in float64; each starts at the last.
    """
    weight = features.new_zeros(classes, features.shape[1]).requires_grad_()
    bias = features.new_zeros(classes).requires_grad_()
    for strength in strengths:
        scale = 1 / (2 * strength * len(features))
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=MAX_ITERATIONS, max_eval=2 * MAX_ITERATIONS, tolerance_grad=GRADIENT_TOLERANCE,
            tolerance_change=1e-14, history_size=20, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            optimizer.zero_grad()  # noqa: B023 (called within this iteration)
            value = F.cross_entropy(features @ weight.T + bias, labels) + scale * weight.square().sum()  # noqa: B023
            value.backward()
            return value

        optimizer.step(loss)
        gradients = [parameter.grad for parameter in (weight, bias) if parameter.grad is not None]
        largest = max(float(gradient.abs().max()) for gradient in gradients)
        yield Linear(weight.detach().clone(), bias.detach().clone(), largest < 1e-4)


def fit_sgd(features: Tensor, labels: Tensor, rate: float, classes: int, seed: int) -> Linear:
    """Train a linear layer by SGD with momentum, a cosine schedule from `rate` and no weight decay, in float32."""
    generator = torch.Generator().manual_seed(seed)
    features = features.float()
    layer = torch.nn.utils.skip_init(torch.nn.Linear, features.shape[1], classes).to(features.device)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=SGD_MOMENTUM)
    steps = math.ceil(len(features) / SGD_BATCH)
    for epoch in range(SGD_EPOCHS):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for step, batch in enumerate(order.split(SGD_BATCH)):
            progress = (epoch + step / steps) / SGD_EPOCHS
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * progress)) / 2
            optimizer.zero_grad()
            F.cross_entropy(layer(features[batch]), labels[batch]).backward()
            optimizer.step()
    return Linear(layer.weight.detach(), layer.bias.detach())


def effective_rank(features: Tensor) -> float:
    """Return RankMe (Garrido et al. 2023): the exponential of the entropy of the normalized singular values of (N, D)."""
    chosen = torch.linspace(0, len(features) - 1, min(len(features), RANK_SAMPLES)).long()
    values = torch.linalg.svdvals(features[chosen.to(features.device)].double())
    shares = values / values.sum() + 1e-7
    return float((-(shares * shares.log()).sum()).exp())
