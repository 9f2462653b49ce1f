"""Muon for matrices, NAdamW for vectors (Jordan et al. 2024, "Muon"; Liu et al. 2025, arXiv 2502.16982).

timm's Muon, beside which it is tested, multiplies in bfloat16 everywhere; CPUs without such instructions take 33 times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from omnivision.distributed.fsdp import distribute_like, full_tensor

# (a, b, c) of each Newton-Schulz step, X <- a X + b (X X^T) X + c (X X^T)^2 X, as modded-nanogpt has them: after five steps,
# all but the smallest singular values are near 1.
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class Muon(torch.optim.Optimizer):
    """Gives all directions of a matrix the same step, as large as AdamW's, so that AdamW's learning rates fit.

    Parameters with fewer than two rows or columns (rows: the first axis) are trained by NAdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-7,
    ) -> None:
        """`momentum` is for matrices; `betas` and `eps` are NAdamW's. Raises ValueError for values out of range."""
        if not (lr >= 0 and weight_decay >= 0 and eps > 0):
            raise ValueError(f"lr and weight_decay must be >= 0 and eps > 0, got {lr:g}, {weight_decay:g} and {eps:g}")
        if not all(0 <= rate < 1 for rate in (momentum, *betas)):
            raise ValueError(f"momentum and betas must be >= 0 and < 1, got {momentum:g} and {list(betas)}")
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": tuple(betas), "eps": eps},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    is_matrix = parameter.ndim > 1 and 1 < parameter.shape[0] < parameter.numel()
                    update = self._step_matrix if is_matrix else self._step_vector
                    update(parameter, self.state[parameter], group)
        return loss

    @staticmethod
    def _step_matrix(parameter: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = group["momentum"]
        grad, average = parameter.grad, state["momentum_buffer"]
        average.lerp_(grad, 1 - momentum)
        matrix = full_tensor(grad.lerp(average, momentum)).flatten(1)  # Nesterov
        step = orthogonalize(matrix).reshape(parameter.shape).to(parameter.dtype)
        parameter.add_(distribute_like(step, parameter), alpha=-0.2 * max(matrix.shape) ** 0.5 * group["lr"])

    @staticmethod
    def _step_vector(parameter: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            zeros = torch.zeros_like
            state |= {"step": torch.tensor(0.0), "exp_avg": zeros(parameter), "exp_avg_sq": zeros(parameter)}
        (beta1, beta2), grad, average, squares = group["betas"], parameter.grad, state["exp_avg"], state["exp_avg_sq"]
        state["step"] += 1
        steps = state["step"].item()
        average.lerp_(grad, 1 - beta1)
        squares.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        ahead = average.lerp(grad, 1 - beta1)  # Nesterov: AdamW would use the average
        scale = (squares.sqrt() / (1 - beta2**steps) ** 0.5).add_(group["eps"])
        parameter.addcdiv_(ahead, scale, value=-group["lr"] / (1 - beta1**steps))


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return about U V^T of a matrix's singular value decomposition U S V^T, by Newton-Schulz iteration.

    Args:
        matrix: floating point, (M, N).

    Returns: (M, N), bfloat16 on a GPU that has it, else float32.
    """
    has_bf16 = matrix.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    x = matrix.to(torch.bfloat16 if has_bf16 else torch.float32)
    if is_tall := x.shape[0] > x.shape[1]:
        x = x.T  # products of the smaller side
    x = x / x.norm().clamp(min=1e-7)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
