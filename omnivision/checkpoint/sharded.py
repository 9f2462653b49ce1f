"""The part of a checkpoint that is split among the processes: a folder of safetensors files beside it, one from each process.

Written and read by `torch.distributed.checkpoint`, which fits the pieces to any number of processes. Its own format keeps an
index as a pickle; this one does not.
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

KEY = "shards"  # of what a checkpoint says of its folder
SEPARATOR = "/"  # between the keys that lead to a tensor


def save_split(state: dict[str, Any], folder: Path, step: int, dist: Dist) -> dict[str, Any]:
    """Write what is split among the processes of a checkpoint, all of them together; the rest, which says where that is."""
    rest, tensors = split_sharded(state)
    return rest | {KEY: write(tensors, folder, step, dist)} if tensors else state


def split_sharded(state: dict[Any, Any], where: str = "") -> tuple[dict[Any, Any], dict[str, Tensor]]:
    """A nested state without the tensors that are split among processes, and those, by the keys that lead to them."""
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
    """Write split tensors into a new folder inside `folder`, all processes together; what is to be kept of it to read it again.

    Raises OSError, in all processes, when one could not write.
    """
    import torch.distributed.checkpoint as dcp  # a third of a second, and few runs need it
    from torch.distributed.checkpoint.api import CheckpointException

    if dist.is_main:
        remove_unused(folder)  # what a save that failed has left
    name = dist.gather(f"{PARTS}{step}_{secrets.token_hex(4)}")[0]
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    try:
        dcp.save(dict(tensors), storage_writer=dcp.HuggingFaceStorageWriter(str(target), save_distributed=True))
    except CheckpointException as error:  # which is no Exception, and would pass by all who catch those
        rank, cause = _cause(error)
        code = cause.errno if isinstance(cause, OSError) else None
        raise OSError(code or errno.EIO, f"process {rank} could not write its part: {cause}", str(target)) from error
    # Each process sums up what it has written itself: reading all of it in one place takes as long as all wrote together.
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
        raise CorruptCheckpointError(f"{source}, the folder with the parts of the checkpoint, is not there")
    for file, entry in files.items():
        path = source / str(file)
        if Path(str(file)).name != file or not path.is_file() or _entry(path) != entry:
            raise CorruptCheckpointError(
                f"{path}, a part of the checkpoint, is not there or not the file that was written"
            )
    if {file.name for file in source.iterdir()} != set(files):
        raise CorruptCheckpointError(f"{source} holds other files than the parts of the checkpoint")
    for where, tensor in _read(source).items():
        *keys, last = where.split(SEPARATOR)
        node: Any = state
        for key in keys:
            node = node.setdefault(int(key) if key.isdecimal() else key, {})
            if not isinstance(node, dict):
                raise CorruptCheckpointError(f"a part of the checkpoint belongs to {where!r}, where it has no place")
        node[last] = tensor


def folder_of(state: Mapping[str, Any]) -> str | None:
    """The name of the folder with the parts of a checkpoint; None for one that is whole."""
    said = state.get(KEY)
    if not isinstance(said, dict) or set(said) != {"folder", "files"} or not isinstance(said["files"], dict):
        return None
    name = said["folder"]
    if not isinstance(name, str) or not re.fullmatch(rf"{PARTS}\w+", name):
        raise CorruptCheckpointError(
            f"a checkpoint names {str(name)[:60]!r} as the folder of its parts; expected {PARTS}..."
        )
    return name


def remove_unused(folder: Path) -> None:
    """Remove the folders of parts that no checkpoint in `folder` refers to; none while a checkpoint cannot be read."""
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
    """The first process of which torch tells that it failed, and with what."""
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
