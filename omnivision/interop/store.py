"""Files of one model: written whole or not at all, and nothing overwritten unasked."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from omnivision.checkpoint.weight_files import CONFIG, METADATA, StateDictFile
from omnivision.models.architecture import Architecture
from omnivision.utils.errors import UserError
from omnivision.utils.io import replace_atomically, sync_folder, write_atomically

FORMAT = 1
CARD = b"---\nlibrary_name: "  # how a model card begins


def origin(source: StateDictFile, format: str) -> dict[str, str]:
    """Where a model came from, as its file will say: the name of the file alone, its SHA-256, and its format."""
    return {"name": source.path.name, "sha256": source.sha256, "format": format}


def check_target(out: Path, source: StateDictFile, force: bool, folder: bool = False, card: Path | None = None) -> None:
    """Raise UserError when `out` is there already (an empty folder may be), is the source, or cannot be a file or a folder;
    and when there is a file in the place of its `card` that is none of ours, even with `force`.
    """
    if out.exists() and out.resolve() in (source.path.resolve(), source.path.resolve().parent):
        raise UserError(f"OUT ({out}) is what is read. Give another path.")
    if out.exists() and out.is_dir() != folder:
        kind = "a folder" if out.is_dir() else "a file"
        raise UserError(f"OUT ({out}) is {kind}; expected {'a folder' if folder else 'a file'}. Give another path.")
    if folder and out.is_dir() and any(out.iterdir()) and not (out / CONFIG).is_file():
        raise UserError(
            f"OUT ({out}) is a folder of something else: no {CONFIG} is in it. Nothing was changed. Give another path."
        )
    if card is not None and card.exists() and not (card.is_file() and card.read_bytes().startswith(CARD)):
        raise UserError(f"{card}, where the model card goes, is a text of somebody. Move it, or give another OUT.")
    there = out if out.exists() or card is None or folder else card
    if there.exists() and not force and not (folder and not any(out.iterdir())):
        raise UserError(
            f"OUT ({there}) is there already. Nothing was changed. Give another path, or --force to replace it."
        )


def write_pt(out: Path, state: Mapping[str, Tensor], architecture: Architecture, said: Mapping[str, Any]) -> None:
    """A file that `safe_load` reads: {"format", "model", "architecture"} and what else is said, `origin` for one."""
    _check_suffix(out, out.suffix in (".pt", ".pth"), ".pt")
    with _writing(out), replace_atomically(out) as file:
        torch.save({"format": FORMAT, "model": dict(state), "architecture": architecture, **said}, file)


def write_safetensors(
    out: Path, state: Mapping[str, Tensor], architecture: Architecture, said: Mapping[str, Any]
) -> None:
    """The same as a safetensors file; what stands beside the tensors is JSON in its metadata."""
    _check_suffix(out, out.suffix == ".safetensors", ".safetensors")
    beside = json.dumps({"format": FORMAT, "architecture": architecture, **said})
    with _writing(out), replace_atomically(out) as file:
        file.write(save(dict(state), {"format": "pt", METADATA: beside}))


def write_card(out: Path, card: str) -> None:
    """What people read of the model in a file, beside it."""
    with _writing(out):
        write_atomically(card_of(out), card)


def card_of(out: Path) -> Path:
    """Where the card of a file lies."""
    return out.with_name(f"{out.name}.md")


@contextlib.contextmanager
def hf_folder(
    out: Path, state: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]], card: str
) -> Iterator[Path]:
    """A `save_pretrained` folder, at first under another name, to look at; it becomes `out` when the block ends well.

    Args:
        configs: JSON files by name, `config.json` among them.
        card: what people read of the model, as Markdown.
    """
    assert CONFIG in configs
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with _writing(out):
        temporary.mkdir()
        try:
            with replace_atomically(temporary / "model.safetensors") as file:
                file.write(save(dict(state), {"format": "pt"}))
            for name, config in configs.items():
                with replace_atomically(temporary / name) as file:
                    file.write((json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
            write_atomically(temporary / "README.md", card)
            yield temporary
            out.mkdir(exist_ok=True)
            for file_ in sorted(temporary.iterdir()):
                os.replace(file_, out / file_.name)
            sync_folder(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _check_suffix(out: Path, right: bool, expected: str) -> None:
    if not right:
        raise UserError(
            f"OUT is {out}; expected a name that ends in {expected}, because files are read by it. Change OUT."
        )


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Make the folder to write to; errors of the disk become the user's."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
        sync_folder(out.parent)
    except OSError as error:
        raise UserError(f"OUT ({out}) cannot be written: {error.strerror or error}. Give another path.") from error
