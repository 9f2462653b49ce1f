"""Shards of a checkpoint: a folder of safetensors files beside it, one per rank.

`torch.distributed.checkpoint` writes and reads them for any number of ranks; in this format it needs no pickle.
"""

from __future__ import annotations

import errno
import secrets
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from omnivision.distributed.fsdp import is_sharded
from omnivision.distributed.process_group import Dist
from omnivision.utils.errors import is_out_of_memory
from omnivision.utils.io import SHARDS_PREFIX, CorruptCheckpointError, safe_load, sha256

SHARDS_KEY = "shards"  # the entry that names the folder and its files
SEPARATOR = "/"  # between the keys that lead to a tensor


def save_split(state: dict[str, Any], folder: Path, step: int, dist: Dist) -> dict[str, Any]:
    """Write the sharded tensors (collective) and return the remaining state, which records their folder."""
    rest, tensors = _split(state)
    return rest | {SHARDS_KEY: write(tensors, folder, step, dist)} if tensors else state


def _split(state: dict[Any, Any], prefix: str = "") -> tuple[dict[Any, Any], dict[str, Tensor]]:
    """Split a nested state into the sharded tensors, named by the path of their keys, and the rest."""
    rest: dict[Any, Any] = {}
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if is_sharded(value):
            tensors[f"{prefix}{key}"] = value
        elif isinstance(value, dict):
            rest[key], inner = _split(value, f"{prefix}{key}{SEPARATOR}")
            tensors |= inner
        else:
            rest[key] = value
    return rest, tensors


def write(tensors: dict[str, Tensor], folder: Path, step: int, dist: Dist) -> dict[str, Any]:
    """Write sharded tensors to a new folder inside `folder` (collective); return its name and its files.

    Raises OSError on all ranks if one of them could not write.
    """
    import torch.distributed.checkpoint as dcp  # a third of a second, and few runs need it
    from torch.distributed.checkpoint.api import CheckpointException

    if dist.is_main:
        remove_unused(folder)  # left by a failed save
    name = dist.all_gather_object(f"{SHARDS_PREFIX}{step}_{secrets.token_hex(4)}")[0]
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    try:
        dcp.save(dict(tensors), storage_writer=dcp.HuggingFaceStorageWriter(str(target), save_distributed=True))
    except CheckpointException as error:  # a BaseException
        rank, (cause, _) = next(iter(error.failures.items()))
        code = cause.errno if isinstance(cause, OSError) else None
        raise OSError(code or errno.EIO, f"rank {rank} could not write its shard: {cause}", str(target)) from error
    # Each rank hashes its own files: hashing all of them on one rank would take long.
    mine = {file.name: _entry(file) for file in target.glob(f"shard-{dist.rank + 1:05d}-*")}
    return {
        "folder": name,
        "files": {file: entry for part in dist.all_gather_object(mine) for file, entry in part.items()},
    }


def load_shards(state: dict[str, Any], folder: Path) -> None:
    """Put the full tensors back into a state that was read from a checkpoint in `folder`.

    Raises CorruptCheckpointError when the files differ from what was written.
    """
    name = _folder_of(state)
    if name is None:
        return
    source, files = folder / name, state.pop(SHARDS_KEY)["files"]
    is_inside = name.startswith(SHARDS_PREFIX) and Path(name).name == name  # else files elsewhere would be read
    if not is_inside or {file.name: _entry(file) for file in source.glob("*")} != files:
        raise CorruptCheckpointError(f"{source} must hold the shards that the checkpoint names, and nothing else")
    for key, tensor in _read(source).items():
        *parents, last = key.split(SEPARATOR)
        node: Any = state
        for parent in parents:
            node = node.setdefault(int(parent) if parent.isdecimal() else parent, {})
        node[last] = tensor


def remove_unused(folder: Path) -> None:
    """Remove folders of shards that no checkpoint in `folder` names; none while a checkpoint cannot be read."""
    if not any(folder.glob(f"{SHARDS_PREFIX}*")):
        return
    try:
        used = {_folder_of(safe_load(file)) for file in folder.glob("*.pt")}
    except CorruptCheckpointError:
        return
    for old in folder.glob(f"{SHARDS_PREFIX}*"):
        if old.name not in used and old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)


def _folder_of(state: Any) -> str | None:
    """Return the folder of the shards of a checkpoint; None for a file without shards."""
    shards = state.get(SHARDS_KEY) if isinstance(state, dict) else None
    return str(shards["folder"]) if isinstance(shards, dict) and shards.keys() == {"folder", "files"} else None


def _entry(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    return {"size": file.stat().st_size, "sha256": sha256(file)}


def _read(source: Path) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.HuggingFaceStorageReader(str(source))
    try:
        entries = cast(dict[str, TensorStorageMetadata], reader.read_metadata().state_dict_metadata)
        tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
        with warnings.catch_warnings(action="ignore"):  # torch warns about reading in one process
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (
        CheckpointException,
        Exception,
    ) as error:  # torch and safetensors raise many exception types for a damaged file
        if is_out_of_memory(error):
            raise
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise CorruptCheckpointError(f"{source} cannot be read: {cause}") from error
    return tensors
