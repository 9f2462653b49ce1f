"""`omnivision probe`: what frozen features are worth, by several methods, over checkpoints and datasets."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from omnivision.data.groups import pattern_grouping
from omnivision.reporting.logs import read_lines
from omnivision.reporting.run_directory import RunDir
from omnivision.tools.arguments import OutFile, Regex
from omnivision.tools.features import (
    DATA,
    VIEWS,
    DataOptions,
    ViewOptions,
    extract_all,
    feature_config,
    load_on_rank,
    open_data,
    process_position,
)
from omnivision.utils.errors import UserError, truncate_list
from omnivision.utils.io import write_json
from omnivision.utils.streams import announce, print_text, warn, wide_console

if TYPE_CHECKING:
    from omnivision.tools.video_model import VideoModel

HEADER, RESULTS = "features.json", "probe.json"
POLL_SECONDS, WAIT_SECONDS = 5, 1800
Method = Literal["knn", "logistic", "linear", "low-shot"]
METHODS: tuple[Method, ...] = ("knn", "logistic", "linear", "low-shot")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What `probe` does.

    Attributes:
        data: Datasets of the catalog, with a training and a validation split (default: those in the folder of features).
        methods: Which methods (default: all).
        group_pattern: What the names of videos of one source share, to hold out whole sources (default: by the names of a
            known dataset, else each video is its own).
        out: Also write the results as JSON.
    """

    data: Annotated[list[str] | None, Parameter(consume_multiple=True, metavar="NAME")] = None
    methods: Annotated[list[Method] | None, Parameter(consume_multiple=True)] = None
    group_pattern: Regex = None
    out: OutFile = None


_OPTIONS = ProbeOptions()


def probe(
    sources: Annotated[list[str], Parameter(name="SOURCE")],
    /,
    *,
    what: ProbeOptions = _OPTIONS,
    views: ViewOptions = VIEWS,
    options: DataOptions = DATA,
) -> int:
    """Measure what frozen features are worth: k-NN, logistic regression, a linear layer, a few labels.

    Print one table per dataset: top-1 in percent on the validation split, with its standard error (for a few labels: the mean
    and standard deviation over five draws). What a method must choose (k, C, the learning rate) it chooses on a held-out fifth
    of the training split.

    Args:
        sources: Folders of `omnivision features`; run directories or files, whose features are computed first (into
            RUN/features or FILE.features); or "random" ("random:1", ...), random weights of the model before it (of a seed).
    """
    if not what.data and any(not (Path(source) / HEADER).is_file() for source in sources):
        if absent := [source for source in sources if not os.path.exists(source) and not source.startswith("random")]:
            raise UserError(
                f"SOURCE must be a folder of features, a run or a file, got {absent[0]}, which does not exist."
            )
        raise UserError("--data must name the datasets to probe runs and files on. Set --data NAME.")
    require_device(options.device)
    folders: list[tuple[Path, str]] = []  # features, and the run that they are of, if any
    trained = None
    for source in sources:
        if (Path(source) / HEADER).is_file():
            folders.append((Path(source), ""))
            continue
        random = re.fullmatch(r"random(?::(\d{1,9}))?", source)
        if random is None:
            trained = load_on_rank(source, options)
        elif trained is None:
            raise UserError(
                "random must follow the run or weights file (not features) whose architecture it takes. Put it after one."
            )
        model = trained if random is None else randomize(trained, source, seed=int(random[1] or 0))
        folders.append((extract(trained, model, what.data or [], views, options), "" if random else source))
    rank, world_size, _ = process_position()
    if rank > 0:
        return 0
    rows = []
    for folder, run in folders:
        if world_size > 1:
            wait_for_features(folder, what.data or [])
        rows += probe_folder(folder, what, options.device, run)
    print_tables(rows)
    print_text(f"Features and {RESULTS}: {', '.join(str(folder) for folder, _ in folders)}")
    if what.out is not None:
        write_json(what.out, rows)
        print_text(f"Wrote {what.out}")
    return 0


def require_device(device: str) -> None:
    """Raise UserError for a device that torch does not have."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device must be available to torch, got {device!r}: {reason}") from None


def randomize(model: VideoModel, name: str, seed: int) -> VideoModel:
    """Return a model of the same architecture with random weights."""
    import torch

    from omnivision.models.architecture import architecture_of, from_architecture
    from omnivision.tools.video_model import Origin, VideoModel

    architecture = architecture_of(model.model)
    torch.manual_seed(seed)
    random = from_architecture(architecture, str(model.path))
    digest = hashlib.sha256(f"{seed}: {json.dumps(architecture['trunk'])}".encode()).hexdigest()
    return VideoModel(random, Path(name), model.config, str(model.device), None, Origin(digest))


def extract(
    trained: VideoModel, model: VideoModel, data: Sequence[str], views: ViewOptions, options: DataOptions
) -> Path:
    """Compute the features of a model that do not exist yet, in a folder beside the trained one; return the folder."""
    path = trained.path
    beside = path.parent.parent / "features" if path.parent.name == "checkpoints" else Path(f"{path}.features")
    name = model.origin.sha256[:12] if model is trained else model.path.name.replace(":", "_")
    folder = beside / f"{name}_{views.clips}x{views.crops}"
    splits = list(open_data(data, folder, path, options))
    if several := [split.name for split in splits if split.label_type != "class"]:
        raise UserError(f"A probe needs one class per video; {several[0]} has several, or numbers. Set other --data.")
    extract_all(model, splits, folder, feature_config(model, views, options), options)
    return folder


def wait_for_features(folder: Path, data: Sequence[str]) -> None:
    """Wait for the splits that other processes still compute. Raises UserError if nothing new appears for a long time."""
    from omnivision.probing.store import read_header

    seen, since = -1, time.monotonic()
    while True:
        splits = read_header(folder).splits
        missing = [key for key, record in splits.items() if key.rpartition("/")[0] in data and record.rows is None]
        if not missing:
            return
        parts = sum(1 for key in missing for _ in (folder / key).glob("parts/*.npz"))
        if parts != seen:
            seen, since = parts, time.monotonic()
        elif time.monotonic() - since > WAIT_SECONDS:
            raise UserError(
                f"{folder} still lacks parts of {truncate_list(missing)}, and nothing new came for {WAIT_SECONDS / 60:.0f} "
                "minutes: another process has failed. Run the same command again."
            )
        time.sleep(POLL_SECONDS)


def probe_folder(folder: Path, what: ProbeOptions, device: str, run: str) -> list[dict[str, Any]]:
    """Probe each dataset in a folder of features, write probe.json beside them, and return a row per dataset.

    run: the directory of the run that the features are of, or "".
    """
    import torch

    from omnivision.probing import board
    from omnivision.probing.store import open_split, read_header

    header = read_header(folder)
    complete = {key.rpartition("/")[0] for key in header.splits}
    paired = [name for name in sorted(complete) if {f"{name}/train", f"{name}/val"} <= header.splits.keys()]
    names = what.data or paired
    if not names or (missing := [name for name in names if name not in paired]):
        raise UserError(
            f"{folder} must hold a train and a val split of {truncate_list(missing) if names else 'a dataset'}; it holds "
            f"{truncate_list(list(header.splits)) or 'nothing'}. Extract them with `omnivision features`, or set --data."
        )
    grouping = None if what.group_pattern is None else pattern_grouping(what.group_pattern)
    rows = []
    for name in names:
        train, val = (open_split(folder, name, which) for which in ("train", "val"))
        data = board.make_data(train, val, torch.device(device), grouping)
        if unseen := set(data.val.labels.tolist()) - set(data.train.labels.tolist()):
            own = int(sum((data.val.labels == label).sum() for label in unseen))
            warn(f"{name}: {own} validation videos are of {len(unseen)} classes without a training video.")
        results = []
        for method in what.methods or METHODS:
            announce(f"probe: {method} on {header.model['name']}, {name}")
            results += [asdict(result) for result in board.METHODS[method](data)]
        for result in results:
            for note in result["notes"]:
                warn(f"{result['method']} on {name} {note}.")
        row = {
            "source": str(folder),
            "model": header.model,
            "dataset": name,
            "chance": 100 / data.classes,
            "train_videos": len(data.train),
            "views": header.config.views(),
            "rank": board.rank_of(train),
            "results": results + attentive_results(run, name),
        }
        rows.append(row)
    write_json(folder / RESULTS, rows)
    return rows


def attentive_results(run: str, dataset: str) -> list[dict[str, Any]]:
    """Return the result of a run of attentive probes on one of its datasets, from its log; none for other runs."""
    if not run or (RunDir(run).read_summary().get("run") or {}).get("model") != "attentive":
        return []
    file = RunDir(run).logs / "metrics.jsonl"
    lines = [line for line in read_lines(file) if line.get("phase") == "val"] if file.is_file() else []
    own = (lines[-1].get("per_source") or {}).get(dataset) if lines else None
    if own is None:
        return []
    from omnivision.reporting.predictions import read_predictions

    videos = len(read_predictions(RunDir(run).predictions / f"{dataset}.npz").index)
    error = math.sqrt(own["top1"] * (100 - own["top1"]) / videos)
    return [{"method": "attentive", "top1": own["top1"], "spread": error, "videos": videos, "notes": []}]


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table for each dataset: a row per model, a column per method."""
    console, _ = wide_console(highlight=False)
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        members = [row for row in rows if row["dataset"] == dataset]
        methods = dict.fromkeys(result["method"] for row in members for result in row["results"])
        table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
        table.add_column("model", no_wrap=True)
        for method in (*methods, "rank"):
            table.add_column(method, justify="right", no_wrap=True)
        for row in members:
            found = {result["method"]: result for result in row["results"]}
            cells = [format_result(found.get(method)) for method in methods]
            table.add_row(Text(row["model"]["name"]), *cells, f"{row['rank']:.0f}")
        table.add_row("chance", *[f"{members[0]['chance']:.1f}"] * len(methods), "")
        videos = members[0]["results"][0]["videos"]
        print_text(f"\n{dataset}: {members[0]['train_videos']} training, {videos} validation videos; top-1 in percent")
        console.print(table)


def format_result(result: dict[str, Any] | None) -> str:
    return "" if result is None else f"{result['top1']:.1f} ± {result['spread']:.1f}"
