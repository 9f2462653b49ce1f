"""Checkpoints: written atomically, verified by a manifest, loaded with weights only.

`checkpoint.pt` is the newest, `previous.pt` the one before it, `checkpoint_<epoch>.pt` are kept, `best.pt` is the best by
validation. The manifest `<name>.json` has the size and SHA-256 of the file. It is written before the file is replaced and lists
both the old and the new hash, so a kill at any moment leaves a file that matches its manifest.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omnivision.checkpoint import sharded
from omnivision.utils.errors import UserError, is_out_of_memory
from omnivision.utils.io import (
    LATEST,
    PREVIOUS,
    CorruptCheckpointError,
    is_archive,
    safe_load,
    sha256,
    sync_folder,
    temporary_beside,
    write_json,
)

FORMAT = 2  # marks a run's checkpoint; other weights files have another number or none
LAG_SECONDS = 60.0  # how long a shared file system may take to show a checkpoint to other machines


def save(state: dict[str, Any], folder: Path, aliases: list[str]) -> None:
    """Write a checkpoint as `checkpoint.pt`; the one it replaces becomes `previous.pt`. `aliases` are further names for it.

    Raises OSError (disk full, no permission), and CorruptCheckpointError when the file read back differs from what was written;
    the earlier files then remain in place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(folder / LATEST)
    try:
        with open(temporary, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:
                # The archive error hides its cause: a full disk, Ctrl-C, SIGTERM.
                raise error.__context__ or error from None
            file.flush()
            os.fsync(file.fileno())
        # Read the file back before an older one is replaced.
        if not is_archive(temporary):
            raise CorruptCheckpointError(f"{temporary} is incomplete")
        entry = {"size": temporary.stat().st_size, "sha256": verify_and_hash(temporary)}
        for name in aliases:
            _link_or_copy(temporary, folder / name, [entry])
        latest, before = folder / LATEST, []
        if latest.exists():
            with contextlib.suppress(CorruptCheckpointError):  # a corrupt newest one must not replace `previous.pt`
                before = [verify_manifest(latest)]
                _link_or_copy(latest, folder / PREVIOUS, before)
        if not _manifest(latest).exists():
            # First checkpoint: rename first; a manifest alone means a lost checkpoint.
            os.replace(temporary, latest)
            _write_manifest(latest, [entry])
        else:
            _write_manifest(latest, [entry, *before])
            os.replace(temporary, latest)
        sync_folder(folder)
        sharded.remove_unused(folder)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def report_write_errors(folder: Path) -> Iterator[None]:
    """Turn errors from writing a checkpoint to `folder` into UserError."""
    try:
        yield
    except (OSError, CorruptCheckpointError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        with contextlib.suppress(OSError):
            reason += f" ({shutil.disk_usage(folder).free / 1e9:.1f} GB are free)"
        raise UserError(
            f"A checkpoint could not be written to {folder}: {reason}. Earlier ones are intact. Free space or set "
            "trainer.checkpoint.save_dir; the same command resumes from the newest."
        ) from error


def read_checkpoint(path: Path) -> Any:
    """Load a checkpoint or another file written by `torch.save`, with its shards. Raises CorruptCheckpointError."""
    state = safe_load(path)
    if isinstance(state, dict):
        sharded.load_shards(state, path.parent)
    return state


def stat_latest(folder: Path) -> tuple[str, int]:
    """Return the manifest and size of the newest checkpoint as this machine sees it; ("", 0) when there is none."""
    latest = folder / LATEST
    try:
        return _manifest(latest).read_text(encoding="utf-8"), latest.stat().st_size
    except OSError:
        return "", 0


def wait_until_visible(expected: tuple[str, int], folder: Path, seconds: float = LAG_SECONDS) -> None:
    """Wait, at most `seconds`, until this machine sees the checkpoint that rank 0 sees (`stat_latest`)."""
    deadline = time.monotonic() + seconds
    while stat_latest(folder) != expected and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            os.listdir(folder)  # refreshes the cache of some file systems
        time.sleep(0.2)


def load_newest(folder: Path) -> tuple[dict[str, Any], Path, list[str]] | None:
    """Load the newest complete checkpoint; return it, its path, and the problems of newer ones. None when there is none.

    Raises CorruptCheckpointError when checkpoints exist but none is complete: starting over would lose the run.
    """
    problems: list[str] = []
    for path in (folder / LATEST, folder / PREVIOUS):
        if not path.is_file():
            if _manifest(path).exists() or path.is_symlink() or path.exists():
                problems.append(f"{path} is missing or not a file")
            continue
        try:
            verify_and_hash(path)
            state = read_checkpoint(path)
            if isinstance(state, dict) and state.get("format") == FORMAT:
                return state, path, problems
            problems.append(f"{path} is not a checkpoint of a run of this version: its format must be {FORMAT}")
        except (CorruptCheckpointError, OSError) as error:  # OSError: unreadable disk
            problems.append(str(error))
    if problems:
        raise CorruptCheckpointError("; ".join(problems))
    return None


def verify_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest entry that a file matches. Raises CorruptCheckpointError when there is none."""
    entry: dict[str, Any] = {"size": path.stat().st_size, "sha256": sha256(path)}
    try:
        matches = entry in json.loads(_manifest(path).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CorruptCheckpointError(f"{path} has no readable manifest ({error})") from None
    if not matches:
        raise CorruptCheckpointError(
            f"{path} ({entry['size']} bytes, SHA-256 {entry['sha256'][:12]}...) does not match its manifest"
        )
    return entry


def verify_and_hash(path: Path) -> str:
    """Return the SHA-256 of a weights file, verified by its manifest, else by the checksums inside a zip archive.

    Raises CorruptCheckpointError.
    """
    if _manifest(path).exists():
        return str(verify_manifest(path)["sha256"])
    if is_archive(path):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
            raise CorruptCheckpointError(f"{path} is a damaged archive: {error}") from error
        if damaged is not None:
            raise CorruptCheckpointError(f"{path} is damaged: the checksum of {damaged} in it is wrong")
    return sha256(path)


def load_model(model: nn.Module, state: dict[str, torch.Tensor], path: Path | str) -> None:
    """Load a run's own weights. Raises UserError when they belong to another model."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{path} is a checkpoint of another model: {' '.join(str(error).split()):.500}. Set trainer/model, num_frames and "
            "image_size back, or start a new run in another launcher.experiment_log_dir."
        ) from None


def _link_or_copy(source: Path, target: Path, entries: list[dict[str, Any]]) -> None:
    """Hard-link `source` as `target`, replacing `target`; copy it if the file system has no hard links."""
    temporary = temporary_beside(target)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            with open(temporary, "rb") as copy:
                os.fsync(copy.fileno())
        replaced = []
        if target.exists():
            with contextlib.suppress(CorruptCheckpointError):
                replaced = [verify_manifest(target)]
        _write_manifest(target, [*entries, *replaced])
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _manifest(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write_manifest(path: Path, entries: list[dict[str, Any]]) -> None:
    write_json(_manifest(path), {"format": FORMAT, "files": entries})
