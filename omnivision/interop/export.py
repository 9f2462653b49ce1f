"""Write one model to a file or folder with its model card, and verify that transformers computes the same from it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from omnivision.checkpoint import fingerprint as experiment
from omnivision.checkpoint.state_dict_file import CONFIG, METADATA, StateDictFile
from omnivision.interop.architecture import position_tables
from omnivision.interop.formats import EPSILON, ConvertedCheckpoint
from omnivision.models.architecture import Architecture, build
from omnivision.models.classifier import VideoClassifier
from omnivision.models.mae import MaskedAutoencoder
from omnivision.utils.errors import UserError
from omnivision.utils.io import replace_atomically, run_name, sync_folder, write_atomically

FORMAT = 1
CARD_START = b"---\nlibrary_name: "
PAPER = "https://arxiv.org/abs/2311.06231"
# The settings of a run that its card names.
CARD_SETTINGS = (
    *(
        "epochs",
        "batch_size",
        "launcher.num_nodes",
        "lr_scale_factor",
        "lr",
        "num_frames",
        "image_size",
        "clip_duration",
    ),
    *("mask_ratio", "trainer.seed_value", "trainer.optim.optimizer._target_", "trainer.optim.layer_decay"),
    *("trainer.ema_decay", "pretrained_checkpoint_path"),
)
# In double precision equal models differ by 1e-13, and a wrong tensor by far more than this.
ATOL = 1e-5
# The usual effect on scores of the other epsilon of the last norm. It is larger where features hardly vary.
TYPICAL_DIFFERENCE = 5e-5


def origin(source: StateDictFile, format: str) -> dict[str, str]:
    """Return what a file keeps of the one that it was made from."""
    return {"name": source.path.name, "sha256": source.sha256, "format": format}


def card_of(out: Path) -> Path:
    """Return the path of a file's model card."""
    return out.with_name(f"{out.name}.md")


def check_target(out: Path, source: StateDictFile, force: bool, folder: bool = False, card: Path | None = None) -> None:
    """Raise UserError when `out` exists (an empty folder may), is the source, or cannot be a file or a folder; and, even with
    `force`, when a file that is no model card is in the place of the card.
    """
    problem = ""
    if out.exists() and out.resolve() in (source.path.resolve(), source.path.resolve().parent):
        problem = "must not be the source"
    elif out.exists() and out.is_dir() != folder:
        problem = f"must be a {'folder' if folder else 'file'}, got a {'folder' if out.is_dir() else 'file'}"
    elif folder and out.is_dir() and any(out.iterdir()) and not (out / CONFIG).is_file():
        problem = f"must be a new folder or a former export, got a folder without {CONFIG}"
    elif card is not None and card.exists() and not (card.is_file() and card.read_bytes().startswith(CARD_START)):
        problem = f"would replace {card}, which is no model card"
    if problem:
        raise UserError(f"OUT ({out}) {problem}. Nothing was changed. Set another OUT.")
    existing = out if out.exists() or card is None or folder else card
    if existing.exists() and not force and not (folder and not any(out.iterdir())):
        raise UserError(f"OUT ({existing}) exists. Nothing was changed. Set another OUT, or --force to replace it.")


def write_pt(out: Path, state: Mapping[str, Tensor], architecture: Architecture, said: Mapping[str, Any]) -> None:
    """Write {"format", "model", "architecture"} and `said`, which `utils.io.safe_load` reads."""
    with _writing(out, ".pt", ".pth"), replace_atomically(out) as file:
        torch.save({"format": FORMAT, "model": dict(state), "architecture": architecture, **said}, file)


def write_safetensors(
    out: Path, state: Mapping[str, Tensor], architecture: Architecture, said: Mapping[str, Any]
) -> None:
    """Write the same as a safetensors file; all but the tensors is JSON in its metadata."""
    beside = json.dumps({"format": FORMAT, "architecture": architecture, **said})
    with _writing(out, ".safetensors"), replace_atomically(out) as file:
        file.write(save(dict(state), {"format": "pt", METADATA: beside}))


def write_card(out: Path, card: str) -> None:
    """Write the model card of a file beside it."""
    with _writing(out):
        write_atomically(card_of(out), card)


@contextlib.contextmanager
def hf_folder(
    out: Path, state: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]], card: str
) -> Iterator[Path]:
    """A `save_pretrained` folder under a temporary name, to verify; it becomes `out` when the block ends without an error.

    `configs` are JSON files by name, `config.json` among them.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with _writing(out):
        temporary.mkdir()
        try:
            with replace_atomically(temporary / "model.safetensors") as file:
                file.write(save(dict(state), {"format": "pt"}))
            for name, config in configs.items():
                write_atomically(temporary / name, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            write_atomically(temporary / "README.md", card)
            yield temporary
            out.mkdir(exist_ok=True)
            for file_ in sorted(temporary.iterdir()):
                os.replace(file_, out / file_.name)
            sync_folder(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _writing(out: Path, *suffixes: str) -> Iterator[None]:
    """Create the parent folder; an OSError becomes a UserError."""
    if suffixes and out.suffix not in suffixes:
        raise UserError(f"OUT must end in {suffixes[0]}, got {out}: the suffix tells how to read the file.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
        sync_folder(out.parent)
    except OSError as error:
        raise UserError(f"OUT ({out}) cannot be written: {error.strerror or error}. Set another OUT.") from error


class Difference(NamedTuple):
    """The largest differences of outputs: as they are, and once the last norms have one epsilon."""

    as_is: float
    same_epsilon: float


def random_clip(architecture: Architecture) -> Tensor:
    """Normalised noise of the model's clip size, (1, 3, T, S, S), always the same."""
    trunk = architecture["trunk"]
    size = (1, 3, trunk["num_frames"], trunk["image_size"], trunk["image_size"])
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def check_finite(*outputs: Tensor) -> None:
    """Raise UserError for a model whose outputs are not finite."""
    if not all(output.isfinite().all() for output in outputs):
        raise UserError(
            "The model computes infinite values or NaN for a random clip: its training diverged. Nothing was written. Give an "
            "earlier checkpoint."
        )


@torch.no_grad()
def verify(folder: Path, state: Mapping[str, Tensor], architecture: Architecture, head: int) -> Difference | None:
    """Compare a folder, as `transformers` loads it, with its model on a random clip; None without `transformers`.

    Both run in double precision, so that rounding hides no wrong tensor, and with the fixed position table (in `state` it may
    be rounded to 16 bits). Raises UserError when they differ by more than ATOL with our epsilon in the last norm, which
    transformers' configuration cannot set.
    """
    try:
        from transformers import VideoMAEForVideoClassification, VideoMAEModel
        from transformers.utils import logging
    except ImportError:
        return None
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it reports the names that other versions read
    model, clip = build(architecture, "The model"), random_clip(architecture).double()
    model.load_state_dict({**state, **position_tables(architecture)})
    assert isinstance(model, (VideoClassifier, MaskedAutoencoder))
    model.double().eval()
    pixels = clip.transpose(1, 2)  # (B, T, C, H, W)
    if architecture.get("classes"):
        assert isinstance(model, VideoClassifier)
        ours = model(clip, head)
        check_finite(ours)
        theirs = VideoMAEForVideoClassification.from_pretrained(folder, local_files_only=True).double().eval()
        as_is = float((theirs(pixels).logits - ours).abs().max())
        theirs.fc_norm.eps = EPSILON
        same_epsilon = float((theirs(pixels).logits - ours).abs().max())
    else:
        ours = model.trunk.norm(model.trunk(clip))
        check_finite(ours)
        theirs = VideoMAEModel.from_pretrained(folder, local_files_only=True).double().eval()
        as_is = same_epsilon = float((theirs(pixels).last_hidden_state - ours).abs().max())
    if not same_epsilon <= ATOL:
        raise UserError(
            f"transformers must compute the same from the exported files to {ATOL:g}, got a difference of {same_epsilon:.3g}. "
            "Nothing was written. Report it with the output of `pip show transformers`, or set --to pt."
        )
    return Difference(as_is, same_epsilon)


def model_card(
    source: StateDictFile,
    model: ConvertedCheckpoint,
    out: str,
    evaluated: bool,
    names: Sequence[list[str] | None],
    hf: bool = False,
) -> str:
    """Return the model card: Markdown with the front matter that model hubs read.

    Args:
        out: the name of the export; `hf` if it is a folder for transformers.
        evaluated: whether these are the weights that the run evaluated.
        names: class names of each head, None where there are none.
    """
    architecture = model.architecture
    classes, library = architecture.get("classes"), "transformers" if hf else "omnivision"
    mae = architecture["kind"] == "autoencoder"
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: {'feature-extraction' if mae else 'video-classification'}\n"
        "tags: [video, vit, videomae, ppma]\n---",
        f"# {out}\n\nA video vision transformer, {'a masked autoencoder' if mae else 'a classifier'}, from omnivision, which "
        f"follows PPMA (*Learning Human Action Recognition Representations Without Real Humans*, [arXiv 2311.06231]({PAPER})).",
        "## Model\n\n" + markdown_table(_model_facts(model)),
        "## Training\n\n" + training_history(source),
    ]
    if evaluated and (metrics := _validation_metrics(source.metadata)):
        parts.append("## Validation\n\nOf the run, when it saved this checkpoint:\n\n" + markdown_table(metrics))
    for number, each in enumerate(names):
        if each is not None:
            shown = ", ".join(map(escape, each[:200])) + (f", and {len(each) - 200} more" if len(each) > 200 else "")
            heading = "Classes" if len(names) == 1 else f"Classes of head {number}"
            parts.append(f"## {heading}\n\n{len(each)}, in the order of their labels: {shown}.")
    if hf:
        name = "VideoMAEForVideoClassification" if classes else "VideoMAEModel"
        usage = f'from transformers import {name}\n\nmodel = {name}.from_pretrained("{out}")'
        note = (
            "\n\nFor transformers 4.57 and later. Biases of queries, keys and values have the names of all these versions; "
            "each version reports those of the others as unexpected, which changes nothing."
        )
    else:
        call = 'reconstruct("film.mp4")' if mae else 'predict("film.mp4")'
        usage, note = f'import omnivision\n\nomnivision.load("{out}").{call}', ""
    parts.append(f"## Usage\n\n```python\n{usage}\n```{note}")
    parts.append(
        "## Limits\n\nPixels are normalised with ImageNet's mean and deviation. The licence of the weights follows from the "
        "data that they were trained on; they keep its biases. Metrics on other data are unknown."
    )
    return "\n\n".join(parts) + "\n"


def training_history(source: StateDictFile) -> str:
    """Return where the weights come from, with the settings, data and versions of their run as far as the file has them."""
    of_run = f" of the run {escape(run_name(source.path))}" if source.path.parent.name == "checkpoints" else ""
    text = f"From the file {escape(source.path.name)}{of_run} (SHA-256 {source.sha256})."
    found = experiment.read(source.metadata.get("experiment"))
    if found is None:
        if isinstance(former := source.metadata.get("origin"), Mapping):
            text += f" It was made of {escape(former.get('name'))} (SHA-256 {escape(former.get('sha256'))})."
        return f"{text} The file has no record of its training."
    keys = {"epochs done": "epoch", "steps of the next": "step", "steps of an epoch": "steps_per_epoch"}
    done = {name: source.metadata.get(key) for name, key in keys.items() if isinstance(source.metadata.get(key), int)}
    settings = {name: found["settings"][name] for name in CARD_SETTINGS if found["settings"].get(name) is not None}
    if not any("decoder" in name for name in found["settings"]):
        settings.pop("mask_ratio", None)
    start = settings.get("pretrained_checkpoint_path") or "nothing"
    starts = start if isinstance(start, list) else [start]
    settings["pretrained_checkpoint_path"] = " + ".join(run_name(Path(str(each))) for each in starts)
    data = {name: value for name, value in found["data"].items() if isinstance(value, str)}
    versions = {"source of omnivision (digest)" if n == "omnivision" else n: v for n, v in found["versions"].items()}
    tables = [markdown_table(done | settings), "Data, by size and SHA-256:\n\n" + markdown_table(data)]
    return "\n\n".join([text, *tables, markdown_table(versions)])


def _model_facts(model: ConvertedCheckpoint) -> dict[str, Any]:
    trunk = model.architecture["trunk"]
    count = sum(tensor.numel() for name, tensor in model.state.items() if "pos_embed" not in name)
    facts = {
        "parameters": f"{count / 1e6:.2f} M",
        "trunk": f"width {trunk['width']}, {trunk['depth']} blocks, {trunk['heads']} heads",
        "clip": f"{trunk['num_frames']} frames of {trunk['image_size']} x {trunk['image_size']}, "
        f"tubelets of {' x '.join(map(str, trunk['tubelet']))}",
    }
    if decoder := model.architecture.get("decoder"):
        facts["decoder"] = f"width {decoder['width']}, {decoder['depth']} blocks, {decoder['heads']} heads"
    if classes := model.architecture.get("classes"):
        facts["classes"] = ", ".join(map(str, classes))
    return facts


def _validation_metrics(said: Mapping[str, Any]) -> dict[str, str]:
    last = said.get("last")
    return {
        str(name).removeprefix("val_"): f"{value:.4g}"
        for name, value in (last.items() if isinstance(last, Mapping) else ())
        if str(name).startswith("val_") and isinstance(value, (int, float)) and abs(value) < 1e300
    }


def markdown_table(facts: Mapping[str, Any]) -> str:
    """A table of two columns."""
    rows = (f"| {escape(name)} | {escape(value)} |" for name, value in facts.items())
    return "\n".join(["| | |", "|---|---|", *rows])


def escape(value: Any) -> str:
    """Text of a file as one line of Markdown without markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", re.sub(r"\s+", " ", str(value)))[:300]
