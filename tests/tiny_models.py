"""Tiny models with random numbers everywhere, in biases and norms too, and their files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omnivision.checkpoint.state_dict_file import StateDictFile
from omnivision.models.architecture import architecture_of
from omnivision.models.classifier import VideoClassifier
from omnivision.models.mae import MaskedAutoencoder
from omnivision.models.vit import VisionTransformer
from tests.fixtures import Folder

CLIP = {"num_frames": 4, "image_size": 32}


def trunk(width: int = 48, depth: int = 2, heads: int = 3, **changes: Any) -> VisionTransformer:
    return VisionTransformer(width, depth, heads, **(CLIP | {"tubelet": (2, 8, 8)} | changes))


def scrambled(model: nn.Module, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def classifier(*classes: int, seed: int = 3, **changes: Any) -> VideoClassifier:
    return scrambled(VideoClassifier(trunk(**changes), classes or [7]), seed)


def autoencoder(**decoder: int) -> MaskedAutoencoder:
    return scrambled(MaskedAutoencoder(trunk(), {"width": 24, "depth": 2, "heads": 4} | decoder), seed=4)


def file_of(model: nn.Module | Mapping[str, Tensor], **metadata: Any) -> StateDictFile:
    """A file of a state dict, without an architecture unless `metadata` has one."""
    state = dict(model) if isinstance(model, Mapping) else model.state_dict()
    return StateDictFile(Path("there.pt"), "0" * 64, state, metadata)


def described(model: nn.Module) -> StateDictFile:
    return file_of(model, architecture=architecture_of(model))


class WeightsCase(Folder):
    def save(self, content: Any, name: str = "weights.pt") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
        return path

    def save_run(self, model: nn.Module, name: str = "checkpoint.pt", /, **more: Any) -> Path:
        """A checkpoint as a run writes it, as far as it matters here."""
        rest = {"format": 1, "ema": None, "sources": [], "optimizer": {"state": {}}}
        weights = {"model": model.state_dict(), "architecture": architecture_of(model)}
        return self.save(rest | weights | more, name)

    def assert_equal_states(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
        torch.testing.assert_close(dict(one), dict(other), rtol=0, atol=0)
