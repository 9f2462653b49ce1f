"""The process group of a run: ranks, devices, collectives. The same code runs on one CPU and on many GPUs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from omnivision.utils.errors import UserError

Result = TypeVar("Result")
COMMS_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}  # dtypes for communicating gradients


@dataclass(frozen=True)
class RankInfo:
    """Rank and world size of a process; `init_method` is torch.distributed's (None: a single process)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    init_method: str | None = None

    @classmethod
    def from_torchrun(cls) -> RankInfo:
        """Read the environment variables that torchrun sets."""
        env = os.environ
        return cls(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env.get("LOCAL_RANK", "0")),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
            init_method="env://",
        )


def choose_device(accelerator: str, local_rank: int) -> torch.device:
    """Return the device of a rank; `auto` is CUDA if available, else the CPU. Raises UserError if the rank has no GPU."""
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda":
        if (count := torch.cuda.device_count()) <= local_rank:
            advice = f"Set launcher.gpus_per_node={count}" if count else "Check nvidia-smi and torch.version.cuda"
            raise UserError(
                f"trainer.accelerator=cuda needs one GPU for each rank of a node; got {count}. {advice}, or set "
                "trainer.accelerator=cpu."
            )
        return torch.device("cuda", local_rank)
    return torch.device(accelerator)


class Dist:
    """The process group of a run; with one process every collective is the identity.

    Control data goes over the CPU (gloo), so that no accelerator waits for it.
    """

    def __init__(self, rank_info: RankInfo, accelerator: str, backend: str | None, timeout: timedelta) -> None:
        self.rank = rank_info.rank
        self.world_size = rank_info.world_size
        self.local_rank = rank_info.local_rank
        self.device = choose_device(accelerator, rank_info.local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        elif "OMP_NUM_THREADS" not in os.environ or rank_info.world_size > 1:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // rank_info.local_world_size))
        self.control: Any = None
        if rank_info.world_size > 1:
            backend = backend or {"cuda": "nccl"}.get(self.device.type, "gloo")
            # With all ranks on this machine, its host name may not resolve.
            if rank_info.local_world_size == rank_info.world_size:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            torch.distributed.init_process_group(
                backend,
                init_method=rank_info.init_method,
                rank=rank_info.rank,
                world_size=rank_info.world_size,
                timeout=timeout,
            )
            world, new_group = torch.distributed.group.WORLD, torch.distributed.new_group
            self.control = world if backend == "gloo" else new_group(backend="gloo", timeout=timeout)

    @functools.cached_property
    def copy_stream(self) -> torch.cuda.Stream | None:
        """The stream that copies batches to the GPU while it computes."""
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, values: Tensor) -> None:
        """Sum `values` over all ranks in place, on the training device; the host does not wait."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the values of all ranks in order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self.control)
        return values

    def run_on_all(self, action: Callable[[], Result]) -> Result:
        """Run `action` on all ranks. A UserError on one rank is raised on all of them."""
        try:
            result = action()
        except UserError as error:
            self._raise_first(error)
            raise
        self._raise_first(None)
        return result

    def run_on_main(self, action: Callable[[], Result]) -> Result | None:
        """Run `action` on rank 0, and return None on the others. A UserError there is raised on all ranks."""
        return self.run_on_all(lambda: action() if self.is_main else None)

    def _raise_first(self, error: UserError | None) -> None:
        """Gather the ranks' errors, and raise the first if there is one."""
        errors = self.all_gather_object(error)
        errors[self.rank] = error  # pickling drops its cause and traceback
        if first := next((gathered for gathered in errors if gathered is not None), None):
            first.on_all_ranks = True
            raise first

    def close(self) -> None:
        if self.world_size > 1:
            torch.distributed.destroy_process_group()


def wrap_ddp(model: nn.Module, dist: Dist, comms_dtype: str | None, find_unused: bool = False) -> nn.Module:
    """Wrap a model in DDP; a single process gets the model itself.

    Args:
        comms_dtype: dtype in which gradients are communicated ("fp16", "bf16"); None: their own.
        find_unused: some parameters may get no gradient in a step (DDP's `find_unused_parameters`).
    """
    if dist.world_size == 1:
        return model
    # Buffers are constants (position tables). torch 2.14 renamed the argument.
    names = inspect.signature(DistributedDataParallel).parameters
    no_buffers: Any = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
    wrapped = DistributedDataParallel(
        model,
        device_ids=[dist.device] if dist.device.type == "cuda" else None,
        **no_buffers,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused,
    )
    hooks = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
    if comms_dtype is not None:
        wrapped.register_comm_hook(None, hooks[comms_dtype])
    return wrapped


@contextlib.contextmanager
def skip_gradient_sync(model: Any, skip: bool) -> Iterator[None]:
    """Skip the gradient synchronization of a backward pass, if `skip`."""
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
