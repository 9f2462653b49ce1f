"""FSDP: parameters, gradients and optimizer state sharded over the ranks (`trainer.distributed.strategy=fsdp`).

Uses torch's `fully_shard` (Zhao et al. 2023, "PyTorch FSDP").
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omnivision.distributed.process_group import COMMS_DTYPES, Dist

# torch's FSDP modules are imported lazily: they take most of a second, and few runs need them.


def apply_fsdp(
    model: nn.Module,
    units: Sequence[nn.Module],
    dist: Dist,
    comms_dtype: str | None,
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Shard the parameters of a model in place; all ranks must hold the same values. The parameter objects are replaced.

    Args:
        units: modules (blocks) that are all-gathered one at a time.
        comms_dtype: dtype in which gradients are communicated ("fp16", "bf16", None: fp32).
        compute_dtype: dtype in which the parameters of units are all-gathered (FSDP's `param_dtype`), autocast's dtype; None:
            fp32. Norms, parameters outside of units, and the optimizer stay in fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(dist.device.type, (dist.world_size,))
    reduce_dtype = torch.float32 if comms_dtype is None else COMMS_DTYPES[comms_dtype]
    fp32_policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    mixed_policy = MixedPrecisionPolicy(compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    # We never modify model outputs in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for unit in units:
        norms: list[nn.Module] = [part for part in unit.modules() if isinstance(part, nn.LayerNorm)]
        if norms and compute_dtype is not None:
            fully_shard(norms, mesh=mesh, mp_policy=fp32_policy)
        fully_shard(unit, mesh=mesh, mp_policy=mixed_policy)
    fully_shard(model, mesh=mesh, mp_policy=fp32_policy)


@contextlib.contextmanager
def summon_full_params(model: nn.Module) -> Iterator[None]:
    """Hold the full model on every rank inside this block; all ranks enter and leave together."""
    parts: list[Any] = [part for part in model.modules() if hasattr(part, "unshard")]  # FSDPModules
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            if part is not model:
                part.set_reshard_after_forward(True, recurse=False)


def distribute_like(value: Any, parameter: Tensor) -> Any:
    """Shard a full tensor like a parameter of the same shape; other values are returned as they are."""
    if (
        not isinstance(value, Tensor)
        or not is_sharded(parameter)
        or is_sharded(value)
        or value.shape != parameter.shape
    ):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def full_tensor(value: Any) -> Tensor:
    """Return the full tensor, gathered from all ranks."""
    return value.full_tensor() if is_sharded(value) else value


def local_tensor(value: Any) -> Tensor:
    """Return this rank's shard of a tensor."""
    return value.to_local() if is_sharded(value) else value


def is_sharded(value: object) -> bool:
    """Return whether this is a DTensor."""
    return hasattr(value, "full_tensor")
