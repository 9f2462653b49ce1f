"""The stated weights and inputs behind `tests/parity/*.json`: tensors by formula, and the comparison with recorded figures.

The figures are what the published implementation (OmniMAE / PPMA) computes for these tensors; see section "Parity" of
docs/architecture.md.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "parity"
# Fair for a result that passes through float32 on both sides; gradients are differences and lose a digit.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
GRADIENT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def record(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def raw(name: str, count: int, seed: int = 20230822, mult: int = 2654435761) -> np.ndarray:
    """uint32 (count,): an integer hash of (name, flat index)."""
    x = np.arange(count, dtype=np.uint32) * np.uint32(mult) + np.uint32(zlib.crc32(name.encode()) ^ seed)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def tensor(name: str, shape: list[int], offset: float, scale: float) -> Tensor:
    """float32 tensor by formula."""
    values = offset + scale * (raw(name, int(np.prod(shape))).astype(np.float64) / 2**31 - 1)
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def stated(entry: dict[str, Any]) -> Tensor:
    return tensor(entry["name"], entry["shape"], entry["offset"], entry["scale"])


def weights(entries: list[list]) -> dict[str, Tensor]:
    """The formula tensors of a recorded state dict (position tables, marked "sinusoid", are the model's own)."""
    return {name: tensor(name, shape, *rest[1:]) for name, shape, *rest in entries if rest[0] == "formula"}


def token_mask(entry: dict[str, Any]) -> Tensor:
    """bool (B, N): the `masked` tokens with the smallest hash of each sample."""
    keys = raw(entry["name"], entry["batch"] * entry["tokens"]).reshape(entry["batch"], entry["tokens"])
    mask = np.zeros(keys.shape, dtype=bool)
    np.put_along_axis(mask, keys.argsort(1)[:, : entry["masked"]], True, axis=1)
    return torch.from_numpy(mask)


def gradient_error(model: nn.Module, recorded: dict[str, Any]) -> float:
    """Largest relative difference of the norms of gradients from the recorded ones."""
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    norms["<all parameters>"] = sum(norm**2 for norm in norms.values()) ** 0.5
    return max(abs(norms[name] / norm - 1) for name, (_, norm) in recorded.items())


def error(got: Tensor, recorded: dict[str, Any]) -> float:
    """Largest difference from the recorded float64 values, relative to the tensor's largest entry."""
    if list(got.shape) != recorded["shape"]:
        raise AssertionError(f"shape {list(got.shape)}, recorded {recorded['shape']}")
    values = recorded.get("f64", recorded["f32"])["values"]
    found = got.detach().double().flatten()[torch.tensor(recorded["idx"])]
    largest = recorded.get("absmax", max(map(abs, values)))
    return float((found - torch.tensor(values, dtype=torch.float64)).abs().max() / largest)
