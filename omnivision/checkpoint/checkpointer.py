"""Checkpoints: written atomically, verified by a manifest, loaded with weights only.

`checkpoint.pt` is the newest, `previous.pt` the one before it, `checkpoint_<epoch>.pt` are kept, `best.pt` is the best by
validation. The manifest `<name>.json` has size and SHA-256 of the file. It is written before the file is replaced and lists
both sums, so that a kill at any moment leaves a file that its manifest lists.
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
from omnivision.utils.errors import UserError
from omnivision.utils.io import (
    LATEST,
    PREVIOUS,
    CorruptCheckpointError,
    is_archive,
    safe_load,
    sha256,
    sync_folder,
    temporary_beside,
    write_atomically,
)

FORMAT = 2
LAG_SECONDS = 60.0  # until a shared file system shows a checkpoint to other machines
KEYS = {
    "format",
    "experiment",
    "architecture",
    "model",
    "ema",
    "sources",
    "optimizer",
    "scaler",
    "epoch",
    "step",
    "steps_per_epoch",
    "best",
    "seconds",
    "skipped",
    "meter",
    "last",
}


def save(state: dict[str, Any], folder: Path, aliases: list[str]) -> None:
    """Write a checkpoint as `checkpoint.pt`; the one it replaces becomes `previous.pt`. `aliases` are further names for it.

    Raises OSError (disk full, no permission), and CorruptCheckpointError when the file read back differs from what was written;
    the files that were there before are then still in place.
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
        entry = {"size": temporary.stat().st_size, "sha256": verified_digest(temporary)}
        for name in aliases:
            _publish(temporary, folder / name, [entry])
        latest, before = folder / LATEST, []
        if latest.exists():
            try:
                before = [verify(latest)]
                _publish(latest, folder / PREVIOUS, before)
            except CorruptCheckpointError:
                pass  # the run resumed from `previous.pt`, which stays
        if not _manifest(latest).exists():  # the first one: a manifest without a file would mean a lost checkpoint
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
    """Turn errors of writing a checkpoint to `folder` into UserError."""
    try:
        yield
    except (OSError, CorruptCheckpointError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        with contextlib.suppress(OSError):
            reason += f" ({shutil.disk_usage(folder).free / 1e9:.2g} GB are free)"
        raise UserError(
            f"A checkpoint could not be written to {folder}: {reason}. Earlier ones are intact. Free space or set "
            "trainer.checkpoint.save_dir; the same command resumes from the newest."
        ) from error


def read(path: Path) -> Any:
    """Load a checkpoint or another file of `torch.save`, with its shards. Raises CorruptCheckpointError."""
    state = safe_load(path)
    if isinstance(state, dict):
        sharded.load_shards(state, path.parent)
    return state


def stat_latest(folder: Path) -> tuple[str, int]:
    """Manifest and size of the newest checkpoint as this machine sees it; ("", 0) when there is none."""
    latest = folder / LATEST
    try:
        return _manifest(latest).read_text(encoding="utf-8"), latest.stat().st_size
    except OSError:
        return "", 0


def wait_until_visible(what: tuple[str, int], folder: Path, seconds: float = LAG_SECONDS) -> None:
    """Wait, at most `seconds`, until this machine sees the checkpoint that rank 0 sees (`stat_latest`).

    Shared file systems show changes of other machines late.
    """
    deadline = time.monotonic() + seconds
    while stat_latest(folder) != what and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            os.listdir(folder)  # refreshes the cache of some file systems
        time.sleep(0.2)


def load_newest(folder: Path) -> tuple[dict[str, Any], Path, list[str]] | None:
    """Load the newest complete checkpoint; return it, its path, and the problems of newer ones. None when there is none.

    Raises CorruptCheckpointError when checkpoints exist but none is complete: starting over would lose the run.
    """
    problems: list[str] = []
    for name in (LATEST, PREVIOUS):
        path = folder / name
        if not path.is_file():
            if _manifest(path).exists() or path.is_symlink() or path.exists():
                problems.append(f"{path} is missing or not a file")
            continue
        try:
            verify(path) if _manifest(path).exists() else _check_archive(path)
            state = read(path)
            _check_structure(state, path)
            return state, path, problems
        except (CorruptCheckpointError, OSError) as error:  # of a disk that cannot read it
            problems.append(str(error))
    if problems:
        raise CorruptCheckpointError("; ".join(problems))
    return None


def verify(path: Path) -> dict[str, Any]:
    """Return the manifest entry that a file matches. Raises CorruptCheckpointError when there is none."""
    entry: dict[str, Any] = {"size": path.stat().st_size, "sha256": sha256(path)}
    if entry not in _entries(path):
        raise CorruptCheckpointError(
            f"{path} ({entry['size']} bytes, SHA-256 {entry['sha256'][:12]}...) does not match its manifest"
        )
    return entry


def verified_digest(path: Path) -> str:
    """SHA-256 of a file of weights, verified by its manifest if it has one, else by the checksums inside a zip archive.

    Raises CorruptCheckpointError.
    """
    if _manifest(path).exists():
        return str(verify(path)["sha256"])
    _check_archive(path)
    return sha256(path)


def _check_archive(path: Path) -> None:
    """Raise CorruptCheckpointError when the contents of an archive do not match its checksums; other files have none."""
    if not is_archive(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CorruptCheckpointError(f"{path} is a damaged archive: {error}") from error
    if damaged is not None:
        raise CorruptCheckpointError(f"{path} is damaged: {damaged} in it does not have the checksum that was noted")


def _check_structure(state: Any, path: Path) -> None:
    """Raise CorruptCheckpointError for a file that loads but is not a checkpoint of a run (other weights, say)."""
    lacking = sorted(KEYS - set(state)) if isinstance(state, dict) else sorted(KEYS)
    model = state["model"] if not lacking else {}
    if not isinstance(model, dict) or not all(isinstance(value, torch.Tensor) for value in model.values()):
        lacking = ["tensors under model"]
    if not lacking:
        kinds = {"optimizer": dict, "scaler": dict, "meter": dict, "last": dict, "sources": list, "architecture": dict}
        kinds["experiment"] = str
        lacking = [f"a {kind.__name__} under {key}" for key, kind in kinds.items() if not isinstance(state[key], kind)]
        counts = ("epoch", "step", "steps_per_epoch", "skipped")
        lacking += [f"a count under {key}" for key in counts if type(state[key]) is not int or state[key] < 0]
    if not lacking and state["format"] != FORMAT:
        raise CorruptCheckpointError(
            f"{path}: format must be {FORMAT}, got {state['format']!r}; it is of another version of omnivision"
        )
    if lacking:
        raise CorruptCheckpointError(f"{path} is not a checkpoint of a run: it lacks {', '.join(lacking)}")


def load_model(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load a run's own weights. Raises UserError, and changes nothing, when they belong to another model."""
    wanted = model.state_dict()
    missing, unexpected = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in sorted(set(wanted) & set(state))
        if state[name].shape != wanted[name].shape
    ]
    if missing or unexpected or shapes:
        parts = [("missing", missing), ("not in this model", unexpected), ("of another shape", shapes)]
        differences = "; ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in parts if names)
        raise UserError(
            f"{path} is a checkpoint of another model ({differences}). Set trainer/model, num_frames and image_size back, or "
            "start a new run in another launcher.experiment_log_dir."
        )
    model.load_state_dict(state)


def _publish(source: Path, target: Path, entries: list[dict[str, Any]]) -> None:
    """Hard-link a file to a second name, replacing that; copy it where the file system has no hard links."""
    temporary = temporary_beside(target)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            with open(temporary, "rb") as copy:
                os.fsync(copy.fileno())
        try:
            there = [verify(target)] if target.exists() else []
        except CorruptCheckpointError:
            there = []
        _write_manifest(target, [*entries, *there])
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _manifest(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _entries(path: Path) -> list[dict[str, Any]]:
    manifest = _manifest(path)
    if not manifest.exists():
        return []
    if not manifest.is_file():  # reading a pipe would block
        raise CorruptCheckpointError(f"{manifest} is not a file")
    try:
        return list(json.loads(manifest.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CorruptCheckpointError(f"{_manifest(path)} is not a manifest") from None


def _write_manifest(path: Path, entries: list[dict[str, Any]]) -> None:
    write_atomically(_manifest(path), json.dumps({"format": FORMAT, "files": entries}, indent=1) + "\n")
