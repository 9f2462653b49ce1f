"""Model FLOPs utilization (MFU; Chowdhery et al., PaLM, 2022, appendix B).

Operations per clip are counted on the trained model, once forward and once backward; a multiply-add counts as two.
Recomputation and padding do not count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from omnivision.data.batch import Batch
from omnivision.tasks.base import Task

# Dense matmuls on one device, in 10^12 operations per second, from the vendors' data sheets: in half precision, in fp32.
# The first match in the device name wins.
PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250, 75),
    ("GH200", 989, 67),
    ("H200", 989, 67),
    ("H100 NVL", 835, 60),
    ("H100 PCIe", 756, 51),
    ("H100", 989, 67),
    ("A100", 312, 19.5),
    ("A40", 149.7, 37.4),
    ("RTX A6000", 154.8, 38.7),
    ("A10G", 70, 31.5),
    ("A10", 125, 31.2),
    ("L40S", 362, 91.6),
    ("L40", 181, 90.5),
    ("L4", 121, 30.3),
    ("V100", 125, 15.7),
    ("T4", 65, 8.1),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71, 35.6),
    ("MI300X", 1307.4, 163.4),
    ("MI250X", 191.5, 47.9),  # torch counts each of its two dies as a device
)


def peak_flops(device: torch.device, dtype: torch.dtype | None, override: float | None) -> float | None:
    """Return the peak operations per second of a device; None if unknown. `override` is in 10^12."""
    if override is not None:
        return override * 1e12
    return peak_flops_by_name(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def peak_flops_by_name(name: str, dtype: torch.dtype | None) -> float | None:
    """Look up peak operations per second by device name, like "NVIDIA A100-SXM4-80GB"; None if unknown."""
    peaks = (peaks for known, *peaks in PEAKS if re.search(rf"\b{re.escape(known)}\b", name, re.IGNORECASE))
    if (found := next(peaks, None)) is None:
        return None
    return 1e12 * found[dtype not in (torch.float16, torch.bfloat16)]


class FusedAttention(TorchFunctionMode):
    """Count attention as a fused kernel: on the meta device, torch would decompose it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class ClipFlops:
    """Per clip: operations of a forward pass and of a training step; bytes kept for the backward pass, in fp32."""

    forward_flops: float
    step_flops: float
    activation_bytes: int


def count_clip_flops(
    task: Task,
    model: nn.Module,
    shape: tuple[int, int, int],
    mask: np.ndarray | None,
    source: str,
    label: Tensor | None = None,
) -> ClipFlops:
    """Count the operations of a training step for one clip; frozen parts have no backward pass.

    Args:
        model: on the meta device, so that nothing is computed.
        shape: frames, height and width of a clip.
        mask: bool (tokens of the clip), for an autoencoder.
        source: name of a source that the task knows.
        label: a label of the source, (1,) or (1, K) (None: a class).
    """
    from torch.utils.flop_counter import FlopCounterMode  # imported lazily: it imports triton, which takes 0.2 s

    batch = Batch(
        video=torch.empty(1, 3, *shape, dtype=torch.uint8, device="meta"),
        label=(torch.empty(1, dtype=torch.int64) if label is None else label).to("meta"),
        index=torch.empty(1, dtype=torch.int64, device="meta"),
        source=source,
        paths=[""],
        mask=None if mask is None else torch.empty((1, *mask.shape), dtype=torch.bool, device="meta"),
        num_masked=0 if mask is None else int(mask.sum()),
    )
    known = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}  # storage -> tensor; two saved tensors may share a storage

    def keep(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in known:
            kept[storage] = tensor
        return tensor

    with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task.training_step(model, batch)
    with FlopCounterMode(display=False) as counter:
        loss = task.training_step(model, batch).loss
        forward = counter.get_total_flops()
        loss.backward()
    return ClipFlops(
        float(forward), float(counter.get_total_flops()), sum(t.untyped_storage().nbytes() for t in kept.values())
    )


def count_forward_flops(trunk: nn.Module, shape: tuple[int, int, int]) -> float:
    """Count the operations of a forward pass over all tokens of a clip of this shape; `trunk` is on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with FusedAttention(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        trunk(torch.empty(1, 3, *shape, dtype=torch.uint8, device="meta"))
    return float(counter.get_total_flops())
