"""Export of one model to a file or folder with a model card, verified against transformers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from safetensors.torch import save
from torch import Tensor

from omnivision.checkpoint import fingerprint
from omnivision.checkpoint.state_dict_file import CONFIG, METADATA, StateDictFile
from omnivision.interop.formats import LAYER_NORM_EPS, ConvertedCheckpoint
from omnivision.interop.infer_architecture import position_tables
from omnivision.interop.merge import random_clip, require_finite_outputs
from omnivision.models.architecture import Architecture, from_architecture
from omnivision.utils.errors import UserError
from omnivision.utils.io import replace_atomically, run_name, sync_folder, write_atomically

EXPORT_FORMAT = 1
# In double precision, equal models differ by about 1e-13; a wrong tensor makes far more than this difference.
ATOL = 1e-5
# How much transformers' epsilon in the last norm usually changes scores. It is more where features hardly vary.
TYPICAL_DIFFERENCE = 5e-5
CARD_START = b"---\nlibrary_name: "
# The settings of a run that its card lists.
CARD_SETTINGS = """
    epochs batch_size launcher.num_nodes lr_scale_factor lr num_frames image_size clip_duration mask_ratio trainer.seed_value
    trainer.optim.optimizer._target_ trainer.optim.layer_decay trainer.ema_decay
""".split()


def origin(source: StateDictFile, format: str) -> dict[str, str]:
    """Return what an exported file records about its source."""
    return {"name": source.path.name, "sha256": source.sha256, "format": format}


def card_of(out: Path) -> Path:
    """Return the path of a file's model card."""
    return out.with_name(f"{out.name}.md")


def check_target(out: Path, source: StateDictFile, force: bool, card: Path | None = None) -> None:
    """Raise UserError when `out` exists (an empty folder may). Raise it even with `force` when `out` is the source or a folder
    of other files, or when a file that is not a model card would be overwritten by the card.
    """
    is_used = any(out.iterdir()) if out.is_dir() else out.exists()
    problem = ""
    if out.resolve() in (source.path.resolve(), source.path.resolve().parent):
        problem = "is the source"
    elif is_used and out.is_dir() and not (out / CONFIG).is_file():
        problem = f"is a folder without {CONFIG}, so not a former export"
    elif card is not None and card.exists() and not card.read_bytes().startswith(CARD_START):
        problem = f"would replace {card}, which is not a model card"
    elif not force and (is_used or (card is not None and card.exists())):
        problem = "exists; --force replaces it"
    if problem:
        raise UserError(f"OUT ({out}) {problem}. Nothing was changed. Set another OUT.")


def write_file(out: Path, to: str, model: ConvertedCheckpoint, metadata: Mapping[str, Any], card: str = "") -> None:
    """Write {"format", "model", "architecture"} and `metadata` as a file that `utils.io.safe_load` reads or, with
    to="safetensors", as safetensors with everything but the tensors as JSON in its metadata. The card goes beside it.
    """
    suffixes = (".safetensors",) if to == "safetensors" else (".pt", ".pth")
    if out.suffix not in suffixes:
        raise UserError(f"OUT must end in {suffixes[0]}, got {out}: readers go by the suffix.")
    rest = {"format": EXPORT_FORMAT, "architecture": model.architecture, **metadata}
    with _writing(out):
        with replace_atomically(out) as file:
            if to == "safetensors":
                file.write(save(dict(model.state), {"format": "pt", METADATA: json.dumps(rest)}))
            else:
                torch.save({"model": dict(model.state), **rest}, file)
        if card:
            write_atomically(card_of(out), card)


def write_folder(
    out: Path,
    state: Mapping[str, Tensor],
    configs: Mapping[str, Mapping[str, Any]],
    card: str,
    verify: Callable[[Path], str],
) -> str:
    """Write a `save_pretrained` folder unless `verify`, called with a temporary copy, raises; return the result of `verify`.

    `configs` are JSON files by name, including `config.json`.
    """
    with _writing(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name[:99]}.") as name:
        folder = Path(name)
        with replace_atomically(folder / "model.safetensors") as file:
            file.write(save(dict(state), {"format": "pt"}))
        for config_name, config in configs.items():
            write_atomically(folder / config_name, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        write_atomically(folder / "README.md", card)
        verified = verify(folder)
        out.mkdir(exist_ok=True)
        for written in sorted(folder.iterdir()):
            os.replace(written, out / written.name)
        sync_folder(out)
    return verified


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Create the parent folder; an OSError becomes a UserError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
        sync_folder(out.parent)
    except OSError as error:
        raise UserError(f"OUT ({out}) cannot be written: {error.strerror or error}. Set another OUT.") from error


@torch.no_grad()
def verify(folder: Path, state: Mapping[str, Tensor], architecture: Architecture, head: int) -> str:
    """Compare a folder, as `transformers` loads it, with our model on a random clip; return a report of the difference.

    Both run in double precision, so that rounding cannot hide a wrong tensor, and with the fixed position table (the one in
    `state` may be rounded to 16 bits). Raises UserError when they differ by more than ATOL with our epsilon in the last norm,
    which transformers' configuration cannot set.
    """
    try:
        from transformers import VideoMAEForVideoClassification, VideoMAEModel
        from transformers.utils import logging
    except ImportError:
        return "Not verified: transformers is not installed. Run `pip install 'omnivision[hf]'` and export again."
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it would warn about the names for other versions
    model: Any = from_architecture(architecture, "The model")
    model.load_state_dict({**state, **position_tables(architecture)})
    model.double().eval()
    clip, has_classes = random_clip(architecture).double(), bool(architecture.get("classes"))
    theirs: Any = (VideoMAEForVideoClassification if has_classes else VideoMAEModel).from_pretrained(
        folder, local_files_only=True
    )
    theirs.double().eval()
    ours = model(clip, head) if has_classes else model.trunk.norm(model.trunk(clip))
    require_finite_outputs(ours)

    def difference() -> float:
        return float((theirs(clip.transpose(1, 2))[0] - ours).abs().max())

    as_is = found = difference()
    if has_classes:
        theirs.fc_norm.eps = LAYER_NORM_EPS
        found = difference()
    if not found <= ATOL:
        raise UserError(
            f"transformers must compute the same from the exported files to {ATOL:g}, got a difference of {found:.3g}. Nothing "
            "was written. Report this with the output of `pip show transformers`, or set --to pt."
        )
    what = "scores" if has_classes else "tokens"
    text = f"Verified: transformers' {what} of a random clip differ by {found:.1g} (double precision)"
    if has_classes:
        text += f" with our epsilon of fc_norm, and by {as_is:.1g} with its own, 1e-5"
    if as_is > TYPICAL_DIFFERENCE:
        text += "\nwarning: features vary little over channels. Set model.fc_norm.eps = 1e-6 after loading."
    return text


def model_card(
    source: StateDictFile,
    model: ConvertedCheckpoint,
    out: str,
    evaluated: bool,
    names: Sequence[list[str] | None],
    transformers_class: str = "",
) -> str:
    """Return the model card: Markdown with the front matter that model hubs read.

    Args:
        out: the name of the export.
        evaluated: whether these are the weights that the run evaluated.
        names: class names of each head, None for a head without names.
        transformers_class: the class that loads the export, if it is a folder for transformers.
    """
    environment = jinja2.Environment(loader=jinja2.PackageLoader("omnivision.interop", "."), keep_trailing_newline=True)
    environment.filters["escape_markdown"] = escape_markdown
    last = source.progress.get("last", {}) if evaluated else {}
    return environment.get_template("model_card.md.j2").render(
        file=source,
        run_name=run_name(source.path) if source.path.parent.name == "checkpoints" else "",
        training=training_facts(source),
        origin=source.metadata.get("origin"),
        metrics={n.removeprefix("val_"): f"{value:.4g}" for n, value in last.items() if n.startswith("val_")},
        class_names={head: own_names for head, own_names in enumerate(names) if own_names is not None},
        name=out,
        summary=model.summary(),
        parameters=sum(tensor.numel() for name, tensor in model.state.items() if "pos_embed" not in name),
        is_regression=source.inference.label_type == "regression",
        is_mae=model.architecture["kind"] == "autoencoder",
        transformers_class=transformers_class,
    )


def training_facts(source: StateDictFile) -> dict[str, Any]:
    """Return the progress, settings, data and versions of the run that trained the weights; empty if the file lacks them."""
    run = fingerprint.parse_fingerprint(source.metadata.get("experiment"))
    if run is None:
        return {}
    keys = {"epochs done": "epoch", "steps of the next": "step", "steps of an epoch": "steps_per_epoch"}
    facts = {name: source.metadata.get(key) for name, key in keys.items()}
    facts |= {name: run["settings"].get(name) for name in CARD_SETTINGS}
    start = run["settings"].get("pretrained_checkpoint_path") or "nothing"
    starts = start if isinstance(start, list) else [start]
    facts["pretrained_checkpoint_path"] = " + ".join(run_name(Path(str(path))) for path in starts)
    if source.architecture.get("kind") != "autoencoder":
        del facts["mask_ratio"]
    versions = {"source digest of omnivision" if n == "omnivision" else n: v for n, v in run["versions"].items()}
    return facts | run["data"] | versions


def escape_markdown(value: Any) -> str:
    """Return untrusted text as one line of Markdown without markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", re.sub(r"\s+", " ", str(value)))[:300]
