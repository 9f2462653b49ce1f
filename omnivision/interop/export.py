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
from omnivision.interop.infer_architecture import position_tables
from omnivision.interop.published import EPSILON, ConvertedCheckpoint
from omnivision.models.architecture import Architecture, build
from omnivision.utils.errors import UserError
from omnivision.utils.io import replace_atomically, run_name, sync_folder, write_atomically

FORMAT = 1
# In double precision equal models differ by 1e-13, and a wrong tensor by far more than this.
ATOL = 1e-5
# The usual effect on scores of the other epsilon of the last norm. It is larger where features hardly vary.
TYPICAL_DIFFERENCE = 5e-5
CARD_START = "---\nlibrary_name: "
CARD = (
    CARD_START
    + """{library}
pipeline_tag: {task}
tags: [video, vit, videomae, ppma]
---

# {name}

A video vision transformer, {summary}, {parameters:.2f} M parameters, from omnivision, which follows PPMA (*Learning Human
Action Recognition Representations Without Real Humans*, [arXiv 2311.06231](https://arxiv.org/abs/2311.06231)).

{sections}

## Usage

```python
{usage}
```

## Limits

Pixels are normalized with ImageNet's mean and deviation. The licence of the weights follows from the data that they were
trained on; they keep its biases. Metrics on other data are unknown.
"""
)
# The settings of a run that its card names.
CARD_SETTINGS = """
    epochs batch_size launcher.num_nodes lr_scale_factor lr num_frames image_size clip_duration mask_ratio trainer.seed_value
    trainer.optim.optimizer._target_ trainer.optim.layer_decay trainer.ema_decay
""".split()


def origin(source: StateDictFile, format: str) -> dict[str, str]:
    """Return what a file keeps of its source."""
    return {"name": source.path.name, "sha256": source.sha256, "format": format}


def card_of(out: Path) -> Path:
    """Return the path of a file's model card."""
    return out.with_name(f"{out.name}.md")


def check_target(out: Path, source: StateDictFile, force: bool, folder: bool = False, card: Path | None = None) -> None:
    """Raise UserError when `out` exists (an empty folder may); and, even with `force`, when it is the source, a folder of other
    files, or when a file that is no model card is in the place of the card.
    """
    is_used = out.exists() and not (folder and out.is_dir() and not any(out.iterdir()))
    problem = ""
    if out.exists() and out.resolve() in (source.path.resolve(), source.path.resolve().parent):
        problem = "is the source"
    elif is_used and out.is_dir() and not (out / CONFIG).is_file():
        problem = f"is a folder without {CONFIG}, so not a former export"
    elif card is not None and card.exists() and not card.read_bytes().startswith(CARD_START.encode()):
        problem = f"would replace {card}, which is no model card"
    elif not force and (is_used or (card is not None and card.exists())):
        problem = "exists; --force replaces it"
    if problem:
        raise UserError(f"OUT ({out}) {problem}. Nothing was changed. Set another OUT.")


def write_file(out: Path, to: str, model: ConvertedCheckpoint, metadata: Mapping[str, Any], card: str = "") -> None:
    """Write {"format", "model", "architecture"} and `metadata` as a file that `utils.io.safe_load` reads, or (`to`:
    "safetensors") as safetensors with all but the tensors as JSON in its metadata; and its card beside it.
    """
    suffixes = (".safetensors",) if to == "safetensors" else (".pt", ".pth")
    if out.suffix not in suffixes:
        raise UserError(f"OUT must end in {suffixes[0]}, got {out}: the suffix tells how to read the file.")
    rest = {"format": FORMAT, "architecture": model.architecture, **metadata}
    with _writing(out):
        with replace_atomically(out) as file:
            if to == "safetensors":
                file.write(save(dict(model.state), {"format": "pt", METADATA: json.dumps(rest)}))
            else:
                torch.save({"model": dict(model.state), **rest}, file)
        if card:
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
def _writing(out: Path) -> Iterator[None]:
    """Create the parent folder; an OSError becomes a UserError."""
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
    """Normalized noise of the model's clip size, (1, 3, T, S, S), always the same."""
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
    model: Any = build(architecture, "The model")
    model.load_state_dict({**state, **position_tables(architecture)})
    model.double().eval()
    clip, has_classes = random_clip(architecture).double(), bool(architecture.get("classes"))
    theirs: Any = (VideoMAEForVideoClassification if has_classes else VideoMAEModel).from_pretrained(
        folder, local_files_only=True
    )
    theirs.double().eval()
    ours = model(clip, head) if has_classes else model.trunk.norm(model.trunk(clip))
    check_finite(ours)

    def difference() -> float:
        return float((theirs(clip.transpose(1, 2))[0] - ours).abs().max())

    as_is = same_epsilon = difference()
    if has_classes:
        theirs.fc_norm.eps = EPSILON
        same_epsilon = difference()
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
    is_mae = model.architecture["kind"] == "autoencoder"
    usage = f'import omnivision\n\nomnivision.load("{out}").{"reconstruct" if is_mae else "predict"}("video.mp4")'
    if hf:
        kind = "VideoMAEForVideoClassification" if model.architecture.get("classes") else "VideoMAEModel"
        usage = f'from transformers import {kind}  # 4.57 or later\n\nmodel = {kind}.from_pretrained("{out}")'
    sections = {"Training": training_history(source)}
    last = source.metadata.get("last")
    if evaluated and isinstance(last, Mapping):
        numbers = {str(name): value for name, value in last.items() if isinstance(value, (int, float))}
        metrics = {n.removeprefix("val_"): f"{value:.4g}" for n, value in numbers.items() if n.startswith("val_")}
        if metrics:
            sections["Validation"] = f"Of the run, when it saved this checkpoint:\n\n{markdown_table(metrics)}"
    for head, each in enumerate(names):
        if each is not None:
            classes = f"{len(each)}, in the order of their labels: {', '.join(map(escape, each))}."
            sections[f"Classes of head {head}"] = classes
    return CARD.format(
        library="transformers" if hf else "omnivision",
        task="feature-extraction" if is_mae else "video-classification",
        name=out,
        summary=model.summary(),
        parameters=sum(tensor.numel() for name, tensor in model.state.items() if "pos_embed" not in name) / 1e6,
        sections="\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items()),
        usage=usage,
    )


def training_history(source: StateDictFile) -> str:
    """Return where the weights come from, with the settings, data and versions of their run as far as the file has them."""
    of_run = f" of the run {escape(run_name(source.path))}" if source.path.parent.name == "checkpoints" else ""
    text = f"From the file {escape(source.path.name)}{of_run} (SHA-256 {source.sha256})."
    run = experiment.read(source.metadata.get("experiment"))
    if run is None:
        former = source.metadata.get("origin")
        converted = f" It was converted from {escape(former)}." if isinstance(former, Mapping) else ""
        return f"{text}{converted} The file has no record of its training."
    start = run["settings"].get("pretrained_checkpoint_path") or "nothing"
    starts = start if isinstance(start, list) else [start]
    keys = {"epochs done": "epoch", "steps of the next": "step", "steps of an epoch": "steps_per_epoch"}
    facts = {name: source.metadata.get(key) for name, key in keys.items()}
    facts |= {name: run["settings"].get(name) for name in CARD_SETTINGS}
    facts["pretrained_checkpoint_path"] = " + ".join(run_name(Path(str(each))) for each in starts)
    if source.architecture.get("kind") != "autoencoder":
        del facts["mask_ratio"]
    versions = {"source digest of omnivision" if n == "omnivision" else n: v for n, v in run["versions"].items()}
    facts |= run["data"] | versions
    return f"{text}\n\n{markdown_table({name: value for name, value in facts.items() if value is not None})}"


def markdown_table(facts: Mapping[str, Any]) -> str:
    """Return a table of two columns."""
    rows = (f"| {escape(name)} | {escape(value)} |" for name, value in facts.items())
    return "\n".join(["| | |", "|---|---|", *rows])


def escape(value: Any) -> str:
    """Text of a file as one line of Markdown without markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", re.sub(r"\s+", " ", str(value)))[:300]
