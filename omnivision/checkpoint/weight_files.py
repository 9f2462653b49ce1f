"""What is in a file or folder of weights, ours or another project's: tensors by name, and what the file says of its model."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omnivision.checkpoint import fingerprint as experiment
from omnivision.checkpoint.checkpointer import read as read_checkpoint
from omnivision.checkpoint.checkpointer import verified_digest
from omnivision.utils.errors import UserError
from omnivision.utils.io import BEST, LATEST, CorruptCheckpointError, UnsafePickleError, is_dense_cpu, sha256

CONFIG = "config.json"  # of a folder of Hugging Face's `save_pretrained`
METADATA = "omnivision"  # the key of a safetensors file that holds what a checkpoint says beside `model`, as JSON
# The files of weights that such a folder may hold, the one to prefer first.
FOLDER_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


_WRAPPERS = re.compile(r"(?<![^.])_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class StateDictFile:
    """Tensors by name and where they came from; `said` is what a checkpoint holds beside them (`architecture`, ...)."""

    path: Path
    sha256: str
    state: dict[str, Tensor]
    said: Mapping[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> Mapping[str, Any]:
        """What the file says of its model (`omnivision.models.architecture`), empty if nothing."""
        architecture = self.said.get("architecture")
        return architecture if isinstance(architecture, Mapping) else {}

    @property
    def inference(self) -> Mapping[str, Any]:
        """How films were shown to its model, as far as the file says."""
        return experiment.inference(self.said)

    @property
    def class_names(self) -> list[list[str] | None]:
        """The names of the classes of each head; None for a head whose classes the file does not name."""
        return experiment.class_names(self.inference)

    @property
    def own_class(self) -> str | None:
        """The full name of the model's class where it is not one of this project, as far as the file says."""
        target = (experiment.read(self.said.get("experiment")) or {}).get("settings", {}).get("trainer.model._target_")
        return target if isinstance(target, str) and not target.startswith("omnivision.") else None

    def refuse_own_class(self) -> None:
        """Raise UserError where the model's class is not one of this project: its tensors have no names that others know."""
        if self.own_class is not None:
            raise UserError(
                f"{self.path} holds a model of a class of your own, {self.own_class}; expected one of this project, whose "
                "layout is known. `omnivision predict RUN VIDEO --trust-targets PACKAGE` uses it; its tensors are under "
                "'model' of torch.load(FILE, weights_only=True)."
            )

    @property
    def sources(self) -> Any:
        """What a checkpoint of an average says that it is an average of; the file does not hold them."""
        return self.said.get("sources")

    @property
    def average(self) -> dict[str, Tensor]:
        """The moving average of the weights that a run kept; empty if none."""
        found = self.said.get("ema")
        return dict(found) if isinstance(found, dict) else {}

    def weights(self, wanted: str | None = None) -> dict[str, Tensor]:
        """The weights as trained ("model"), or with the moving average in the place of those that it is of ("ema"; by default
        where there is one). Raises UserError where there is none, and for one of other tensors.
        """
        if wanted == "ema" and not self.average:
            raise UserError(
                f"--weights is ema, and {self.path} has no moving average (trainer.ema_decay was null). Use --weights model."
            )
        if wanted == "model" or not self.average:
            return self.state
        unknown = [name for name, t in self.average.items() if name not in self.state or not isinstance(t, Tensor)]
        if unknown:
            raise UserError(
                f"{self.path}: its moving average has {unknown[0]!r}, which its model has not. It is damaged."
            )
        return self.state | self.average

    def averaged(self) -> StateDictFile:
        """The same with the moving average in the place of the weights that it is of, where there is one."""
        return replace(self, state=self.weights())

    @property
    def progress(self) -> dict[str, Any]:
        """What tells the epoch and the metrics of a run's checkpoint, for another file of the same weights."""
        if not self.checkpoint:
            return {}
        last = {str(name): value for name, value in self.said["last"].items() if isinstance(value, (int, float))}
        return {"last": last} | {name: self.said.get(name) for name in ("epoch", "step", "steps_per_epoch")}

    @property
    def checkpoint(self) -> str:
        """The epoch and the metrics of a run's checkpoint, in a few words; "" for other files."""
        return describe_checkpoint(self.said)

    def __str__(self) -> str:
        return f"{self.path} ({self.checkpoint})" if self.checkpoint else str(self.path)

    @property
    def config(self) -> Mapping[str, Any]:
        """The `config.json` beside Hugging Face weights, empty if there is none. Raises UserError for one that is nonsense."""
        file = self.path.parent / CONFIG
        return _json_object(file) if file.is_file() else {}


def read(source: str | Path) -> StateDictFile:
    """Weights of a run folder, a `save_pretrained` folder, or a file (.safetensors, or anything that torch.save wrote).

    Nothing is executed. Raises UserError, in one paragraph with the way out, when there is nothing to read, for pickled
    objects, and for what holds no state dict.
    """
    path = find(source)
    with _refusing_what_is_broken():
        if path.name.endswith(".index.json"):
            state, digest = _read_shards(path)
            return StateDictFile(path, digest, _plain(state, path))
        digest = verified_digest(path)
        state, said = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return StateDictFile(path, digest, _plain(state, path), said)


def read_several(sources: str | Sequence[str]) -> list[StateDictFile]:
    """The models to average: of a list of sources, each with the moving average in its place where it kept one, or of one file
    that holds a list of state dicts under `ensemble_weights`. Raises UserError as `read`.
    """
    if not isinstance(sources, str):
        return [found.averaged() for found in map(read, sources)]
    path = find(sources)
    with _refusing_what_is_broken():
        digest = verified_digest(path)
        found = read_checkpoint(path)
    states = found.get("ensemble_weights") if isinstance(found, Mapping) else None
    if not isinstance(states, (list, tuple)) or not all(isinstance(state, Mapping) for state in states):
        raise UserError(
            f"{path} holds one model; expected several to average: a list of files, or one with a list of state dicts under "
            "ensemble_weights."
        )
    return [StateDictFile(path, digest, _plain(state, path)) for state in states]


@contextlib.contextmanager
def _refusing_what_is_broken() -> Iterator[None]:
    """CorruptCheckpointError becomes UserError, with the way out."""
    try:
        yield
    except UnsafePickleError as error:
        raise UserError(
            f"{error}. Expected weights only: tensors in plain containers. A file that was pickled by older code is not "
            "opened, because it may run anything; load it where it was made and save its state dict alone: "
            "torch.save({'model': model.state_dict()}, FILE)."
        ) from None
    except CorruptCheckpointError as error:
        raise UserError(f"{error}. Expected a file of weights, whole. Copy it again, or give another.") from None


def find(source: str | Path) -> Path:
    """The file to read: `source` itself, the weights of a `save_pretrained` folder, or the best or newest of a run."""
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir() or not str(source):
        raise UserError(
            f"There is no file or folder {str(source)!r} (relative paths start at {Path.cwd()}). Expected a file of weights, a "
            "run folder, or a folder with config.json and weights. Change the path."
        )
    candidates = [folder / name for folder in (path / "checkpoints", path) for name in (BEST, LATEST)]
    if (path / CONFIG).is_file():
        candidates = [path / name for name in FOLDER_WEIGHTS]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    names = ", ".join(file.relative_to(path).as_posix() for file in candidates)
    raise UserError(
        f"The folder {path} holds no weights: none of {names} is there. Expected a run folder, or a folder with "
        "config.json and weights. Change the path."
    )


def describe_checkpoint(said: Mapping[str, Any]) -> str:
    """The epoch of a run's checkpoint and its metrics, "epoch 12, top-1 85.7 %, validation loss 0.41"; "" for other files."""
    epoch, step, last = said.get("epoch"), said.get("step"), said.get("last")
    if type(epoch) is not int or type(step) is not int or not isinstance(last, Mapping):
        return ""
    number = epoch + 1 if step else epoch
    middle = f", step {step} of {said.get('steps_per_epoch')}" if step else ""
    found = describe_metrics(last)
    evaluated = last.get("val_epoch", number)  # older checkpoints lack it
    earlier = f" (validated after epoch {evaluated})" if evaluated != number and "val_loss" in last else ""
    return f"epoch {number}{middle}" + (f", {found}{earlier}" if found else "")


def describe_metrics(last: Mapping[str, Any]) -> str:
    """Top-1 and loss of a run's last evaluation, or its training loss where it never validates."""
    shown: tuple[tuple[str, str], ...] = (("val_top1", "top-1 {:.1f} %"), ("val_loss", "validation loss {:.4g}"))
    if not any(name in last for name, _ in shown):
        shown = (("loss", "training loss {:.4g}"),)
    return ", ".join(text.format(last[name]) for name, text in shown if isinstance(last.get(name), (int, float)))


def check_numbers(tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError for weights that are no floating-point numbers, or not finite."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{name} holds {tensor.dtype} values; expected floating-point numbers.")
        if not tensor.isfinite().all():
            raise UserError(f"{name} has values that are not finite; expected weights that a model can be made of.")


def _read_torch(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    # Checkpoints of VideoMAE's own repository hold the command line beside the weights. It is a plain bag of values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = read_checkpoint(path)
    if isinstance(found, Mapping) and "ensemble_weights" in found:
        raise UserError(
            f"{path} holds several models (ensemble_weights); expected one. Save one of them to a file, or "
            "average them: trainer/checkpoint=default_ensemble with a model vit*_average_ft."
        )
    if isinstance(found, Mapping):
        for key in ("model", "module", "state_dict"):
            if isinstance(found.get(key), Mapping):
                return dict(found[key]), {name: value for name, value in found.items() if name != key}
        return dict(found), {}
    raise UserError(f"{path} holds a {type(found).__name__}; expected tensors by name, at the top or under 'model'.")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CorruptCheckpointError(f"{path} does not load: {error}") from error
    return state, _json_text(metadata[METADATA], f"The metadata of {path}") if METADATA in metadata else {}


def _read_shards(index: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of all files that an index names, and one SHA-256 over theirs."""
    where = _json_object(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"{index} has no weight_map; expected an object of tensor names and the files that hold them.")
    state: dict[str, Tensor] = {}
    digests = []
    for file in sorted(set(where.values())):
        if Path(file).name != file or "\\" in file or not file.endswith((".safetensors", ".bin")):
            raise UserError(
                f"{index} sends to the file {file!r}; expected names of .safetensors or .bin files beside it, without "
                "a folder. The index was tampered with, or it is not of save_pretrained."
            )
        if not (index.parent / file).is_file():
            raise UserError(f"{index} names {file}, which is not there. Fetch all files of the folder.")
        read_part = _read_safetensors if file.endswith(".safetensors") else _read_torch
        state |= read_part(index.parent / file)[0]
        digests.append(sha256(index.parent / file))
    if differing := sorted(set(where) ^ set(state)):
        raise UserError(
            f"{index} and the files that it names do not hold the same tensors: {differing[0]} is only in one of them "
            f"({len(differing)} such). Fetch all files of the folder again."
        )
    return state, hashlib.sha256("".join(digests).encode()).hexdigest()


def _plain(found: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """A state dict, without what wrappers of modules add to its names (see `strip_wrappers`).

    Raises UserError for entries that are no ordinary tensors (sparse, without values, larger than what is in the file), and
    for two entries that are one without their wrappers.
    """
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(
                f"{path} holds no state dict: its entry {name!r} is a {type(tensor).__name__}. Expected tensors by name, at "
                "the top or under 'model'."
            )
        if not is_dense_cpu(tensor):
            raise UserError(
                f"{path}: {name} is no ordinary tensor ({tensor.dtype}, {tensor.layout}, shape {tuple(tensor.shape)}); "
                "expected dense values, all of them in the file."
            )
    if not found:
        raise UserError(f"{path} is empty; expected tensors by name.")
    state = strip_wrappers(found)
    if len(state) < len(found):
        raise UserError(
            f"{path} holds {len(found)} entries, and {len(state)} without prefixes such as `module.` and `_orig_mod.`. "
            "Expected each tensor once. Save the state dict of the unwrapped model."
        )
    return state


def strip_wrappers(state: Mapping[str, Tensor], prefix: str = "module.") -> dict[str, Tensor]:
    """Remove from names what wrappers add: `_orig_mod.` (torch.compile), `_fsdp_wrapped_module.` and
    `_checkpoint_wrapped_module.` anywhere, as any submodule may be wrapped; `prefix` (DDP's) where all names begin with it.
    """
    state = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    while state and all(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _json_object(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Expected a JSON object.") from None
    return _json_text(text, str(path))


def _json_text(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}. Expected a JSON object.") from None
    if not isinstance(found, dict):
        raise UserError(f"{where} holds a {type(found).__name__}; expected a JSON object.")
    return found
