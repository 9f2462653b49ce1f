"""`omnivision xray`: what a classifier looks at, by what its accuracy loses when something is taken away from videos."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from omnivision.tools.arguments import OutFolder, at_least
from omnivision.tools.features import DATA, VIEWS, DataOptions, ViewOptions, feature_config, open_data
from omnivision.tools.workers import track
from omnivision.utils.errors import UserError, truncate_list
from omnivision.utils.io import write_json
from omnivision.utils.streams import print_text, warn, wide_console

if TYPE_CHECKING:
    from omnivision.data.batch import Batch
    from omnivision.data.catalog import Split
    from omnivision.probing.xray import Xray
    from omnivision.tools.video_model import VideoModel

FOLDER = "xray"
EXAMPLES = 2


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class XrayOptions:
    """What `xray` does.

    Attributes:
        data: Datasets whose validation split is used (default: those of the run). They have the model's classes.
        limit: Only this many videos of each dataset, drawn at random.
        out: The folder to write to (default: RUN/xray, or FILE.xray).
    """

    data: Annotated[list[str] | None, Parameter(consume_multiple=True, metavar="NAME")] = None
    limit: Annotated[int | None, at_least(1)] = None
    out: OutFolder = None


_OPTIONS = XrayOptions()


def xray(
    checkpoint: str,
    /,
    *,
    what: XrayOptions = _OPTIONS,
    views: ViewOptions = VIEWS,
    options: DataOptions = DATA,
) -> int:
    """Find out what a classifier looks at: motion, places, or what a single frame shows.

    Evaluate the validation split again with frames shuffled, reversed, frozen, at half the rate, grey, blurred, with the
    background alone and without it. Print the accuracy of each, and what it loses against the intact videos with its standard
    error. `omnivision report` shows them by class, with moving examples.

    Args:
        checkpoint: A run directory (its best checkpoint) or a file, of a later stage.
    """
    from omnivision.probing.xray import summarize
    from omnivision.tools.video_model import load

    model = load(checkpoint, options.device, options.trust_targets or [])
    if not model.config.class_names:
        raise UserError(
            f"{model.path} holds {type(model.model).__name__}, which has no classes. Give a model of a later stage "
            "(alignment, fine-tuning, probing)."
        )
    if model.config.label_type != "class":
        raise UserError(
            f"xray needs a model with one class per video; {model.path} has label type {model.config.label_type}."
        )
    in_run = model.path.parent.name == "checkpoints"
    out = what.out or (model.path.parent.parent / FOLDER if in_run else Path(f"{model.path}.{FOLDER}"))
    names = what.data or sources_of(model)
    found: dict[str, dict[str, Any]] = {}
    for split in open_data(names, out, model.path, options, splits=["val"]):
        if not split.has_labels() or split.dataset.kind != "video" or split.label_type != "class":
            raise UserError(f"{split.name} must have videos with labels of the model's classes. Set --data NAME.")
        result, examples = examine(model, split, find_head(model, split), what.limit, views, options)
        found[split.name] = summarize(result) | {"views": feature_config(model, views, options).views()}
        save_examples(examples, out, split.name)
        print_table(split.name, found[split.name])
        if lost := found[split.name]["unreadable"]:
            warn(f"{lost} videos of {split.name} could not be read. They are left out.")
    file = out / "xray.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # no earlier file, or a damaged one
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if earlier["sha256"] == model.origin.sha256:
            found = earlier["datasets"] | found
    write_json(file, {"sha256": model.origin.sha256, "checkpoint": model.origin.checkpoint, "datasets": found})
    print_text(f"Wrote {out}: xray.json and moving examples")
    return 0


def sources_of(model: VideoModel) -> list[str]:
    """Return the sources of the model's run. Raises UserError for a file outside of a run."""
    from omnivision.config.flat import read_flat_file

    settings = read_flat_file(model.path.parent.parent / "config.yaml") or {}
    prefix = "trainer.data.sources."
    names = dict.fromkeys(key.removeprefix(prefix).split(".")[0] for key in settings if key.startswith(prefix))
    validated = [name for name in names if settings.get(f"datasets.{name}.val.paths")]
    if not validated:
        raise UserError(
            f"--data must name datasets, because {model.path} is not of a run that validates. Set --data NAME."
        )
    return validated


def find_head(model: VideoModel, split: Split) -> int:
    """Return the head with the classes of a dataset.

    Raises UserError if there is none: labels would mean other classes.
    """
    own, heads = split.dataset.names(), model.config.class_names
    if split.dataset.class_names is None:  # only their number is known
        matches = [head for head, names in enumerate(heads) if len(names) == split.dataset.num_classes]
    else:
        matches = [head for head, names in enumerate(heads) if names == own]
    if len(matches) > 1 and split.dataset.class_names is None:
        raise UserError(
            f"Heads {matches} of {model.path} have {len(own)} classes, like {split.name}. Set class_names in its catalog "
            "entry, to tell which is meant."
        )
    if not matches:
        raise UserError(
            f"{split.name} must have the classes of a head of {model.path}, in its order: {truncate_list(heads[0])}; got "
            f"{truncate_list(own) or 'an unknown number'}. Set --data NAME."
        )
    return matches[0]


def examine(
    model: VideoModel, split: Split, head: int, limit: int | None, views: ViewOptions, options: DataOptions
) -> tuple[Xray, list[Batch]]:
    """Return the x-ray of a split, and batches of single videos to show."""
    from omnivision.data.loader import LoaderConfig, load_batches
    from omnivision.data.sampling import Request, keyed_rng
    from omnivision.probing import xray as probing
    from omnivision.probing.extract import BATCH_CLIPS, Embedder, build_dataset

    config = feature_config(model, views, options)
    dataset = build_dataset(split, model.trunk, config, None)
    labelled = [index for index in range(len(split)) if split.label(index) >= 0]
    order = keyed_rng(0, 0).permutation(len(labelled))[:limit]
    chosen = [labelled[i] for i in sorted(order.tolist())]
    size = max(1, BATCH_CLIPS // (config.clips * config.crops))
    requests = [
        [Request(0, index, 0) for index in chosen[first : first + size]] for first in range(0, len(chosen), size)
    ]
    batches = load_batches(dataset, iter(requests), LoaderConfig(options.num_workers))
    show = track(batches, len(requests), f"xray of {split.name}")
    names = split.dataset.names() if split.dataset.class_names else model.config.class_names[head]
    autocast = Embedder(model.trunk, model.device, config).autocast
    result = probing.xray(model.model, show, head, model.config.average, names, model.device, autocast)
    first = {split.label(index): index for index in reversed(chosen)}  # the first video of each class
    shown = [first[label] for label in sorted(first)][:EXAMPLES]
    examples = list(load_batches(dataset, iter([[Request(0, index, 0)] for index in shown]), LoaderConfig()))
    return result, examples


def save_examples(examples: list[Batch], out: Path, name: str) -> None:
    """Write a GIF per video: the first view under each change, side by side."""
    from omnivision.probing.xray import show_changes
    from omnivision.reporting import images

    out.mkdir(parents=True, exist_ok=True)
    for number, batch in enumerate(batch for batch in examples if len(batch)):
        images.write(show_changes(batch.video[:1]), out / f"{name}_{number}.gif")


def print_table(name: str, summary: dict[str, Any]) -> None:
    """Print the accuracy under each change, what it loses, and what the classes rely on."""
    from omnivision.probing.xray import VERDICTS

    console, _ = wide_console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("video", no_wrap=True)
    for column in ("top-1 %", "lost"):
        table.add_column(column, justify="right", no_wrap=True)
    for change, (top1, error) in summary["top1"].items():
        loss = "{:.1f} ± {:.1f}".format(*summary["loss"][change]) if change in summary["loss"] else ""
        table.add_row(change, f"{top1:.1f} ± {error:.1f}", loss)
    chance, kind = summary["chance"], summary["verdict"]
    print_text(f"\n{name}: {summary['videos']} videos; always guessing the most frequent class gives {chance:.1f} %")
    console.print(table)
    print_text(f"Overall, {VERDICTS[kind]} ({kind}).")
    by_kind: dict[str, list[str]] = {}
    for label, own in summary["classes"].items():
        by_kind.setdefault(own["verdict"], []).append(label)
    for kind, members in by_kind.items():
        print_text(f"  {kind}: {', '.join(members)}")
