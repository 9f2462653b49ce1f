"""Parameters, gradients and optimizer state split among the processes: `trainer.distributed.strategy=fsdp`.

By torch's `fully_shard` (Zhao et al. 2023, "PyTorch FSDP"): each process keeps a part of every tensor; those of a block are
brought together just before the block computes, and its gradients are summed and split again just after.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from omnivision.distributed.process_group import COMMS_DTYPES, Dist

# torch's own modules for this are imported when a model is split: they take most of a second, and few runs need them.


def apply_fsdp(
    model: nn.Module,
    units: Sequence[nn.Module],
    dist: Dist,
    comms_dtype: str | None,
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Split the parameters of a model, in place; every process must hold the same ones. Parameter objects are new ones then.

    Args:
        units: parts of the model (its blocks) whose parameters are brought together one part at a time.
        comms_dtype: of gradients on the wire ("fp16", "bf16", None: as they are).
        compute_dtype: what the parameters of units are rounded to before they travel, when products are computed in it anyway
            (autocast); None: as they are. Those of norms, which autocast does not round, and those outside of units travel as
            they are. The optimizer keeps and changes all as they are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(dist.device.type, (dist.world_size,))
    on_wire = torch.float32 if comms_dtype is None else COMMS_DTYPES[comms_dtype]
    exact = MixedPrecisionPolicy(reduce_dtype=on_wire, cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(compute_dtype, reduce_dtype=on_wire, cast_forward_inputs=False)
    # Nobody changes the output of a model in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for unit in units:
        norms: list[nn.Module] = [part for part in unit.modules() if isinstance(part, nn.LayerNorm)]
        if norms and compute_dtype is not None:
            fully_shard(norms, mesh=mesh, mp_policy=exact)
        fully_shard(unit, mesh=mesh, mp_policy=rounded)
    fully_shard(model, mesh=mesh, mp_policy=exact)


@contextlib.contextmanager
def without_sync(model: Any, skip: bool) -> Iterator[None]:
    """Keep gradients at home in this backward pass, when `skip` and when there is anybody to send them to."""
    if skip and isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif skip and hasattr(model, "set_requires_gradient_sync"):  # an FSDPModule
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


@contextlib.contextmanager
def summon_full_params(model: nn.Module) -> Iterator[None]:
    """Every process holds the whole model inside this block, and may run it alone; all processes enter and leave together."""
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


def distribute_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that every process holds whole, split as a parameter of the same shape is; others stay as they are."""
    if not is_sharded(parameter) or is_sharded(value) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def full_tensor(value: Any) -> Tensor:
    """A tensor with what all processes hold of it."""
    found: Tensor = value.full_tensor() if is_sharded(value) else value
    return found


def local_tensor(value: Any) -> Tensor:
    """What this process holds of a tensor."""
    found: Tensor = value.to_local() if is_sharded(value) else value
    return found


def is_sharded(value: object) -> bool:
    """Whether this is a tensor of which each process holds a part, a DTensor."""
    return hasattr(value, "full_tensor")
