"""The model card of an export: what people read of a model before they use it, written down from what its file says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omnivision.checkpoint import fingerprint as experiment
from omnivision.checkpoint.weight_files import StateDictFile
from omnivision.interop.intake import Imported
from omnivision.models.architecture import Architecture
from omnivision.utils.io import run_name

PAPER = "https://arxiv.org/abs/2311.06231"
# What of a run's settings says how its model came to be.
SETTINGS = (
    "epochs",
    "batch_size",
    "launcher.num_nodes",
    "lr_scale_factor",
    "lr",
    "num_frames",
    "image_size",
    "clip_duration",
    "mask_ratio",
    "trainer.seed_value",
    "trainer.optim.optimizer._target_",
    "trainer.optim.layer_decay",
    "trainer.ema_decay",
    "pretrained_checkpoint_path",
)


def card(
    source: StateDictFile, model: Imported, out: str, judged: bool, names: Sequence[list[str] | None], hf: bool = False
) -> str:
    """The card, Markdown with the front matter that model hubs read.

    Args:
        out: the name of what was written; `hf` says whether it is a folder for transformers.
        judged: whether these are the weights that the run evaluated.
        names: of the classes of each head, None where nobody has named them.
    """
    architecture = model.architecture
    count = sum(tensor.numel() for name, tensor in model.state.items() if "pos_embed" not in name)
    kind = "a masked autoencoder" if architecture["kind"] == "autoencoder" else "a classifier of videos"
    parts = [
        front_matter(architecture, hf),
        f"# {out}\n\nA vision transformer for video, {kind}, trained or brought in with omnivision, which follows PPMA "
        f"(*Learning Human Action Recognition Representations Without Real Humans*, [arXiv 2311.06231]({PAPER})).",
        "## What it is\n\n" + rows(facts_of(architecture, count)),
        "## How it came to be\n\n" + history(source),
    ]
    if judged and (figures := last_figures(source.said)):
        told = "On the validation videos of the run, when this checkpoint was saved:"
        parts.append(f"## What was measured\n\n{told}\n\n" + rows(figures))
    for number, each in enumerate(names):
        if each is not None:
            shown = ", ".join(map(plain, each[:200])) + (f", and {len(each) - 200} more" if len(each) > 200 else "")
            heading = "Classes" if len(names) == 1 else f"Classes of head {number}"
            parts.append(f"## {heading}\n\n{len(each)}, in the order of their labels: {shown}.")
    parts.append("## How to use it\n\n" + usage(architecture, out, hf))
    parts.append(
        "## What to mind\n\nPixels are normalised with ImageNet's mean and deviation. Nothing here says who may use the "
        "weights for what: that follows from the data that they were trained on. What a model learnt of its data, its biases "
        "included, it keeps; figures on other data are not known from this card."
    )
    return "\n\n".join(parts) + "\n"


def front_matter(architecture: Architecture, hf: bool) -> str:
    task = "video-classification" if architecture["kind"] != "autoencoder" else "feature-extraction"
    library = "transformers" if hf else "omnivision"
    return f"---\nlibrary_name: {library}\npipeline_tag: {task}\ntags: [video, vit, videomae, ppma]\n---"


def facts_of(architecture: Architecture, count: int) -> dict[str, Any]:
    trunk = architecture["trunk"]
    found = {
        "parameters": f"{count / 1e6:.2f} M",
        "trunk": f"width {trunk['width']}, {trunk['depth']} blocks, {trunk['heads']} heads",
        "clip": f"{trunk['num_frames']} frames of {trunk['image_size']} x {trunk['image_size']}, "
        f"tubelets of {' x '.join(map(str, trunk['tubelet']))}",
    }
    if decoder := architecture.get("decoder"):
        found["decoder"] = f"width {decoder['width']}, {decoder['depth']} blocks, {decoder['heads']} heads"
    if classes := architecture.get("classes"):
        found["classes"] = ", ".join(map(str, classes))
    return found


def history(source: StateDictFile) -> str:
    """Where the weights come from, and the settings and data of the run that made them, as far as the file says."""
    of_run = f" of the run {plain(run_name(source.path))}" if source.path.parent.name == "checkpoints" else ""
    text = f"From the file {plain(source.path.name)}{of_run} (SHA-256 {source.sha256})."
    told = experiment.read(source.said.get("experiment"))
    if told is None:
        origin = source.said.get("origin")
        if isinstance(origin, Mapping):
            text += f" That was made of {plain(origin.get('name'))} (SHA-256 {plain(origin.get('sha256'))})."
        return f"{text} It says nothing of how it was trained."
    counted = {"epochs done": "epoch", "steps of the next": "step", "steps of an epoch": "steps_per_epoch"}
    done = {name: source.said.get(key) for name, key in counted.items() if isinstance(source.said.get(key), int)}
    settings = {name: told["settings"][name] for name in SETTINGS if told["settings"].get(name) is not None}
    if "mask_ratio" in settings and not any("decoder" in name for name in told["settings"]):
        del settings["mask_ratio"]
    start = settings.get("pretrained_checkpoint_path") or "nothing"
    starts = start if isinstance(start, list) else [start]
    settings["pretrained_checkpoint_path"] = " + ".join(run_name(Path(str(each))) for each in starts)
    data = {name: value for name, value in told["data"].items() if isinstance(value, str)}
    versions = {"source of omnivision (digest)" if n == "omnivision" else n: v for n, v in told["versions"].items()}
    return "\n\n".join([text, rows(done | settings), "Its data, by size and SHA-256:\n\n" + rows(data), rows(versions)])


def last_figures(said: Mapping[str, Any]) -> dict[str, str]:
    last = said.get("last")
    figures = last.items() if isinstance(last, Mapping) else ()
    return {
        str(name).removeprefix("val_"): f"{value:.4g}"
        for name, value in figures
        if str(name).startswith("val_") and isinstance(value, (int, float)) and abs(value) < 1e300
    }


def usage(architecture: Architecture, out: str, hf: bool) -> str:
    if hf:
        name = "VideoMAEForVideoClassification" if architecture.get("classes") else "VideoMAEModel"
        return (
            f'```python\nfrom transformers import {name}\n\nmodel = {name}.from_pretrained("{out}")\n```\n\n'
            "For transformers 4.57 and later. The biases of queries, keys and values are stored under the names of all these "
            "versions; each version reports those of the others as unexpected, which changes nothing."
        )
    call = 'reconstruct("film.mp4")' if architecture["kind"] == "autoencoder" else 'predict("film.mp4")'
    return f'```python\nimport omnivision\n\nomnivision.load("{out}").{call}\n```'


def rows(facts: Mapping[str, Any]) -> str:
    """A table of two columns."""
    return "\n".join(["| | |", "|---|---|", *(f"| {plain(name)} | {plain(value)} |" for name, value in facts.items())])


def plain(value: Any) -> str:
    """Text of a stranger's file as text: nothing in it is markup, no line ends."""
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", re.sub(r"\s+", " ", str(value)))[:300]
