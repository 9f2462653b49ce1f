"""Weights files, ours or another project's: tensors by name, and the metadata of their model."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omnivision.checkpoint import fingerprint
from omnivision.checkpoint.checkpointer import read_checkpoint, verify_and_hash
from omnivision.checkpoint.inference_config import InferenceConfig
from omnivision.tasks.metrics import RANKING_METRICS
from omnivision.utils.errors import UserError
from omnivision.utils.io import BEST, LATEST, CorruptCheckpointError, is_dense_cpu, sha256

CONFIG = "config.json"  # in a folder written by Hugging Face's `save_pretrained`
METADATA = "omnivision"  # the key of a safetensors file for all of a checkpoint but `model`, as JSON
# The weights in such a folder, the preferred one first.
FOLDER_WEIGHTS = [
    name + suffix for name in ("model.safetensors", "pytorch_model.bin") for suffix in ("", ".index.json")
]
_WRAPPERS = re.compile(r"(?<![^.])_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class StateDictFile:
    """Tensors by name and where they came from; `metadata` is the rest of a checkpoint (`architecture`, ...)."""

    path: Path
    sha256: str
    state: dict[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> Mapping[str, Any]:
        """The architecture in the file (`omnivision.models.architecture`), or empty."""
        architecture = self.metadata.get("architecture")
        return architecture if isinstance(architecture, Mapping) else {}

    @property
    def inference(self) -> InferenceConfig:
        """How to prepare videos for the model; the defaults if the file does not say."""
        return InferenceConfig.of_file(self.metadata)

    @property
    def own_class(self) -> str | None:
        """The full name of the model's class if it is not one of this project."""
        run = fingerprint.parse_fingerprint(self.metadata.get("experiment")) or {"settings": {}}
        target = run["settings"].get("trainer.model._target_")
        return target if isinstance(target, str) and not target.startswith("omnivision.") else None

    def refuse_own_class(self) -> None:
        """Raise UserError if the model's class is not one of this project, since its parameter names are unknown."""
        if self.own_class is not None:
            raise UserError(
                f"{self.path} must hold a model of this project, got one of {self.own_class}. Use it with "
                "`omnivision predict RUN VIDEO --trust-targets PACKAGE`, or read its tensors under 'model' of "
                "torch.load(FILE, weights_only=True)."
            )

    @property
    def ema(self) -> dict[str, Tensor]:
        """The EMA of a run; empty if it kept none."""
        ema = self.metadata.get("ema")
        return dict(ema) if isinstance(ema, dict) else {}

    def with_weights(self, kind: Literal["model", "ema"] | None = None) -> StateDictFile:
        """Return the file with its weights as trained ("model") or replaced by their EMA (the default if there is one).

        Raises UserError if there is no EMA, or if its tensors are not the model's.
        """
        if kind == "ema" and not self.ema:
            raise UserError(f"{self.path} has no EMA (trainer.ema_decay was null). Set --weights model.")
        if kind == "model" or not self.ema:
            return self
        if foreign := [name for name, t in self.ema.items() if name not in self.state or not isinstance(t, Tensor)]:
            raise UserError(f"The EMA in {self.path} must have tensors of its model only, got {foreign[0]!r}.")
        return replace(self, state=self.state | self.ema)

    @property
    def progress(self) -> dict[str, Any]:
        """The entries of a run's checkpoint that give its epoch and metrics; empty for other files."""
        if not self.checkpoint:
            return {}
        last = {str(name): value for name, value in self.metadata["last"].items() if isinstance(value, (int, float))}
        return {"last": last} | {name: self.metadata.get(name) for name in ("epoch", "step", "steps_per_epoch")}

    @property
    def checkpoint(self) -> str:
        """The epoch and metrics of a run's checkpoint in a few words; "" for other files."""
        return describe_checkpoint(self.metadata)

    def __str__(self) -> str:
        return f"{self.path} ({self.checkpoint})" if self.checkpoint else str(self.path)

    @property
    def config(self) -> Mapping[str, Any]:
        """The `config.json` beside Hugging Face weights, or empty. Raises UserError for an invalid one."""
        file = self.path.parent / CONFIG
        return _parse_json(file.read_bytes(), file) if file.is_file() else {}


def read_weights(source: str | Path) -> StateDictFile:
    """Read the weights of a run directory, a `save_pretrained` folder, or a file of torch.save or safetensors.

    Nothing is executed. Raises UserError for a missing file, pickled objects, and anything but a state dict.
    """
    path = resolve_checkpoint(source)
    metadata: dict[str, Any] = {}
    if path.name.endswith(".index.json"):
        state, digest = _read_shards(path)
    else:
        digest = verify_and_hash(path)
        state, metadata = _read_file(path)
    return StateDictFile(path, digest, _check_state_dict(state, path), metadata)


def read_several(sources: str | Sequence[str]) -> list[StateDictFile]:
    """Read the models to average: a list of sources (their EMA if they have one), or one file with a list of state dicts under
    `ensemble_weights`. Raises UserError as `read_weights`.
    """
    if not isinstance(sources, str):
        return [read_weights(source).with_weights() for source in sources]
    path = resolve_checkpoint(sources)
    digest = verify_and_hash(path)
    content = read_checkpoint(path)
    states = content.get("ensemble_weights") if isinstance(content, Mapping) else None
    if not isinstance(states, (list, tuple)) or not all(isinstance(state, Mapping) for state in states):
        raise UserError(f"{path} must hold a list of state dicts under ensemble_weights. Or give a list of files.")
    return [StateDictFile(path, digest, _check_state_dict(state, path)) for state in states]


def resolve_checkpoint(source: str | Path) -> Path:
    """Return the file to read: `source` itself, the weights of a `save_pretrained` folder, or the best or newest of a run."""
    path = Path(source)
    candidates = [path] if str(source) else []
    if path.is_dir() and str(source):
        candidates = [folder / name for folder in (path / "checkpoints", path) for name in (BEST, LATEST)]
        if (path / CONFIG).is_file():
            candidates = [path / name for name in FOLDER_WEIGHTS]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(
        f"There is no file {' or '.join(map(str, candidates)) or repr(source)} (relative paths start at {Path.cwd()}). Give a "
        f"weights file, a run directory, or a folder with {CONFIG} and weights."
    )


def describe_checkpoint(metadata: Mapping[str, Any]) -> str:
    """Describe a run's checkpoint: "epoch 12, top-1 85.7 %, validation loss 0.41"; "" for other files."""
    epoch, step, last = metadata.get("epoch"), metadata.get("step"), metadata.get("last")
    if type(epoch) is not int or type(step) is not int or not isinstance(last, Mapping):
        return ""
    number = epoch + 1 if step else epoch
    middle = f", step {step} of {metadata.get('steps_per_epoch')}" if step else ""
    metrics = describe_metrics(last)
    evaluated = last.get("val_epoch", number)  # older checkpoints lack it
    earlier = f" (validated after epoch {evaluated})" if evaluated != number and "val_loss" in last else ""
    return f"epoch {number}{middle}" + (f", {metrics}{earlier}" if metrics else "")


def describe_metrics(last: Mapping[str, Any]) -> str:
    """Return top-1 (or mAP) and loss of a run's last evaluation, or its training loss if it never validates."""
    formats = {f"val_{name}": text for name, text in RANKING_METRICS.items()} | {"val_loss": "validation loss {:.4g}"}
    if not formats.keys() & last.keys():
        formats = {"loss": "training loss {:.4g}"}
    return ", ".join(
        text.format(last[name]) for name, text in formats.items() if isinstance(last.get(name), (int, float))
    )


def check_numbers(tensors: Mapping[str, Tensor], where: str = "") -> None:
    """Raise UserError for weights that are not finite floating-point numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            got = "values that are not finite" if tensor.is_floating_point() else tensor.dtype
            raise UserError(f"{where}{name} must hold finite floating-point numbers, got {got}.")


def strip_wrappers(state: Mapping[str, Tensor], prefix: str = "module.") -> dict[str, Tensor]:
    """Remove what wrappers add to names: `_orig_mod.` (torch.compile), `_fsdp_wrapped_module.` and
    `_checkpoint_wrapped_module.` anywhere, as any submodule may be wrapped; `prefix` (DDP's) if all names begin with it.
    """
    state = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    while state and all(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file written by safetensors or torch.save: its state dict, and the rest of its content."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            damaged = "it is truncated or corrupt; copy it again: " * isinstance(error, SafetensorError)
            raise CorruptCheckpointError(f"{path} does not load: {damaged}{error}") from error
        return state, _parse_json(metadata[METADATA], path) if METADATA in metadata else {}
    # Checkpoints of VideoMAE's repository also hold the command line, as a plain namespace.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = read_checkpoint(path)
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} must hold tensors by name, at the top or under 'model', got a {type(content).__name__}."
        )
    for key in ("model", "module", "state_dict"):
        if isinstance(content.get(key), Mapping):
            return dict(content[key]), {name: value for name, value in content.items() if name != key}
    return dict(content), {}


def _read_shards(index: Path) -> tuple[dict[str, Tensor], str]:
    """Read the tensors of all files in an index, and a SHA-256 over the files' hashes."""
    weight_map = _parse_json(index.read_bytes(), index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    beside = [f for f in files if isinstance(f, str) and Path(f).name == f and f.endswith((".safetensors", ".bin"))]
    if not files or beside != files:
        raise UserError(f"weight_map in {index} must name a .safetensors or .bin file beside it for each tensor.")
    paths = [index.parent / file for file in sorted(set(files))]
    state = {name: tensor for path in paths for name, tensor in _read_file(path)[0].items()}
    return state, hashlib.sha256("".join(map(sha256, paths)).encode()).hexdigest()


def _check_state_dict(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Return a state dict without wrappers in its names (`strip_wrappers`).

    Raises UserError for anything but dense tensors with all their values in the file, and for two entries with one name.
    """
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not is_dense_cpu(tensor):
            got = f"{tensor.layout}, {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(
                f"{path} must hold dense tensors by name, with all values, at the top or under 'model', got {name!r}: {got}."
            )
    if not state:
        raise UserError(f"{path} holds no tensors.")
    stripped = strip_wrappers(state)
    if len(stripped) < len(state):
        raise UserError(
            f"{path} holds the same tensor with and without a prefix such as `module.` or `_orig_mod.`. Save the state dict of "
            "the unwrapped model."
        )
    return stripped


def _parse_json(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must hold a JSON object: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content
