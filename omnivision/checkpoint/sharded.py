"""Shards of a checkpoint: a folder of safetensors files beside it, one of each rank.

`torch.distributed.checkpoint` writes and reads them for any number of ranks; in this format it needs no pickle.
"""

from __future__ import annotations

import errno
import math
import re
import secrets
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from omnivision.distributed.fsdp import is_sharded
from omnivision.distributed.process_group import Dist
from omnivision.utils.errors import is_out_of_memory
from omnivision.utils.io import PARTS, CorruptCheckpointError, safe_load, sha256

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException

KEY = "shards"  # of the entry that names the folder
SEPARATOR = "/"  # between the keys that lead to a tensor


def save_split(state: dict[str, Any], folder: Path, step: int, dist: Dist) -> dict[str, Any]:
    """Write the sharded tensors of a checkpoint, all ranks together; return the rest, which names their folder."""
    rest, tensors = split_sharded(state)
    return rest | {KEY: write(tensors, folder, step, dist)} if tensors else state


def split_sharded(state: dict[Any, Any], where: str = "") -> tuple[dict[Any, Any], dict[str, Tensor]]:
    """Split a nested state into its rest and its sharded tensors, named by the path of their keys."""
    rest: dict[Any, Any] = {}
    taken: dict[str, Tensor] = {}
    for key, value in state.items():
        if is_sharded(value):
            taken[f"{where}{key}"] = value
        elif isinstance(value, dict):
            rest[key], inner = split_sharded(value, f"{where}{key}{SEPARATOR}")
            taken |= inner
        else:
            rest[key] = value
    return rest, taken


def write(tensors: dict[str, Tensor], folder: Path, step: int, dist: Dist) -> dict[str, Any]:
    """Write sharded tensors to a new folder inside `folder`, all ranks together; return its name and its files.

    Raises OSError, on all ranks, when one could not write.
    """
    import torch.distributed.checkpoint as dcp  # a third of a second, and few runs need it
    from torch.distributed.checkpoint.api import CheckpointException

    if dist.is_main:
        remove_unused(folder)  # of a failed save
    name = dist.gather(f"{PARTS}{step}_{secrets.token_hex(4)}")[0]
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    try:
        dcp.save(dict(tensors), storage_writer=dcp.HuggingFaceStorageWriter(str(target), save_distributed=True))
    except CheckpointException as error:  # a BaseException
        rank, cause = _cause(error)
        code = cause.errno if isinstance(cause, OSError) else None
        raise OSError(code or errno.EIO, f"rank {rank} could not write its shard: {cause}", str(target)) from error
    # Each rank hashes its own files: reading all of them in one place would take long.
    mine = {file.name: _entry(file) for file in target.glob(f"shard-{dist.rank + 1:05d}-*")}
    files = {file: entry for part in dist.gather(mine) for file, entry in part.items()}
    return {"folder": name, "files": files}


def load_shards(state: dict[str, Any], folder: Path) -> None:
    """Put the tensors that were parted from it, whole, back into a state that was read from a checkpoint in `folder`.

    Raises CorruptCheckpointError when the files are not those that were written.
    """
    name = folder_of(state)
    if name is None:
        return
    source, files = folder / name, state.pop(KEY)["files"]
    if not source.is_dir():
        raise CorruptCheckpointError(f"{source}, the folder of the shards, is missing")
    for file, entry in files.items():
        path = source / str(file)
        if Path(str(file)).name != file or not path.is_file() or _entry(path) != entry:
            raise CorruptCheckpointError(f"{path}, a shard, is missing or was changed")
    if {file.name for file in source.iterdir()} != set(files):
        raise CorruptCheckpointError(f"{source} has other files than the shards")
    for where, tensor in _read(source).items():
        *keys, last = where.split(SEPARATOR)
        node: Any = state
        for key in keys:
            node = node.setdefault(int(key) if key.isdecimal() else key, {})
            if not isinstance(node, dict):
                raise CorruptCheckpointError(f"a shard has the key {where!r}, which does not fit the checkpoint")
        node[last] = tensor


def folder_of(state: Mapping[str, Any]) -> str | None:
    """The folder of the shards of a checkpoint; None for a checkpoint without shards."""
    said = state.get(KEY)
    if not isinstance(said, dict) or set(said) != {"folder", "files"} or not isinstance(said["files"], dict):
        return None
    name = said["folder"]
    if not isinstance(name, str) or not re.fullmatch(rf"{PARTS}\w+", name):
        raise CorruptCheckpointError(f"the folder of the shards must be {PARTS}..., got {str(name)[:60]!r}")
    return name


def remove_unused(folder: Path) -> None:
    """Remove folders of shards that no checkpoint in `folder` names; none while a checkpoint cannot be read."""
    if not any(folder.glob(f"{PARTS}*")):
        return
    try:
        used = {folder_of(safe_load(file)) for file in folder.glob("*.pt")}
    except CorruptCheckpointError:
        return
    for old in folder.glob(f"{PARTS}*"):
        if old.name not in used and old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)


def _entry(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": sha256(file)}


def _cause(error: CheckpointException) -> tuple[int, BaseException]:
    """The first failed rank, and its error."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return rank, cause


def _read(source: Path) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.HuggingFaceStorageReader(str(source))
    try:
        known = cast(dict[str, TensorStorageMetadata], reader.read_metadata().state_dict_metadata)
        claimed = sum(math.prod(said.size) * said.properties.dtype.itemsize for said in known.values())
        if claimed > (there := sum(file.stat().st_size for file in source.iterdir())):
            raise CorruptCheckpointError(f"its tensors would have {claimed} bytes, and there are {there}")
        tensors = {name: torch.empty(said.size, dtype=said.properties.dtype) for name, said in known.items()}
        with warnings.catch_warnings(action="ignore"):  # of reading in one process
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise CorruptCheckpointError(f"{source} cannot be read: {_cause(error)[1]}") from error
    except Exception as error:  # whatever torch and safetensors make of a damaged file
        if is_out_of_memory(error):
            raise
        raise CorruptCheckpointError(f"{source} cannot be read: {error}") from error
    return tensors
