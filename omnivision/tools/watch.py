"""`omnivision watch RUN`: probe the checkpoints of a run while it trains, in another process or job."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from omnivision.config.schema import OnlineMethod
from omnivision.launch.slurm import squeue_or_none
from omnivision.launch.slurm_jobs import QUEUED_STATUSES, run_status
from omnivision.reporting.logs import read_lines
from omnivision.reporting.run_directory import RunDir
from omnivision.tools.arguments import Flag, at_least
from omnivision.tools.features import DATA, DataOptions, open_data
from omnivision.utils.errors import UserError
from omnivision.utils.io import LATEST, CorruptCheckpointError, append_line, to_json
from omnivision.utils.streams import print_text, warn

if TYPE_CHECKING:
    from omnivision.training.online_eval import OnlineSource

LOG = "watch.jsonl"
METHODS: tuple[OnlineMethod, ...] = ("knn", "logistic", "rankme")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """What `watch` does.

    Attributes:
        data: Datasets of the catalog, with labels.
        methods: What to measure (default: knn, logistic and rankme).
        limit: Videos of each split, drawn at random.
        interval: Seconds between looks for a new checkpoint.
        once: Probe the newest checkpoint and exit.
    """

    data: Annotated[list[str], Parameter(consume_multiple=True, metavar="NAME")]
    methods: Annotated[list[OnlineMethod] | None, Parameter(consume_multiple=True)] = None
    limit: Annotated[int, at_least(2)] = 2000
    interval: Annotated[int, at_least(1)] = 60
    once: Flag = False


def watch(
    run: Annotated[Path, Parameter(name="RUN")],
    /,
    *,
    what: WatchOptions,
    options: DataOptions = DATA,
) -> int:
    """Probe each new checkpoint of a run until the run ends.

    The measurements are those of trainer.online_eval (two clips of one crop per video), in float32 unless --bfloat16 is given.
    They go to RUN/logs/watch.jsonl, from where `omnivision report` draws them. Checkpoints that another one replaced meanwhile
    are left out. On a cluster:
    sbatch --gpus=1 --wrap "omnivision watch RUN --data ucf101 --device cuda"

    Args:
        run: A run directory, in which a run trains or has trained.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} must be the directory of a run that has started; it has no config.yaml.")
    sources = draw_sources(run, what, options)
    log = run / "logs" / LOG
    done = {line.get("sha256") for line in read_lines(log) if is_same_request(line, what)} if log.is_file() else set()
    measured = 0
    for checkpoint in new_checkpoints(run, what):
        try:
            line = probe_checkpoint(checkpoint, sources, what, options, done)
        except CorruptCheckpointError as error:  # replaced while it was read
            warn(f"{error} It is left out.")
            continue
        if line is None:
            print_text("The newest checkpoint has been measured already.")
            measured += 1
            continue
        numbers = {name: value for name, value in line.items() if name.startswith(tuple(f"{n}_" for n in what.data))}
        if not numbers:
            warn(f"Nothing could be measured on {', '.join(what.data)}; the log says why.")
            continue
        append_line(log, to_json(line))
        done.add(line["sha256"])
        measured += 1
        print_text(f"epoch {line['epoch'] + 1}: " + "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
    print_text(f"The run is {run_status(RunDir(run), squeue_or_none())[0]}. Results: {log}")
    return 0 if measured else 1


def is_same_request(line: Mapping[str, Any], what: WatchOptions) -> bool:
    """Return whether a line of the log has the measurements asked for; those of earlier versions do not tell."""
    request = request_of(what)
    return {name: line.get(name, value) for name, value in request.items()} == request


def request_of(what: WatchOptions) -> dict[str, Any]:
    return {"data": sorted(set(what.data)), "methods": sorted(what.methods or METHODS), "limit": what.limit}


def new_checkpoints(run: Path, what: WatchOptions) -> Iterator[Path]:
    """Yield the newest checkpoint whenever it has changed, until the run has ended."""
    path, seen = run / "checkpoints" / LATEST, None
    while True:
        status = run_status(RunDir(run), squeue_or_none())[0]  # before a last look
        ended = what.once or status not in ("running", *QUEUED_STATUSES)
        if path.exists() and (stamp := path.stat().st_mtime_ns) != seen:
            seen = stamp
            yield path
        elif ended and seen is None:
            raise UserError(f"{run} has no checkpoint, {path}. Watch a run that has saved one.")
        elif ended:
            return
        else:
            time.sleep(what.interval)


def draw_sources(run: Path, what: WatchOptions, options: DataOptions) -> list[OnlineSource]:
    """Draw the samples of each dataset. Raises UserError for one without both splits, or without labels."""
    from omnivision.training.online_eval import OnlineSource

    splits = list(open_data(what.data, run, run / "checkpoints" / LATEST, options))
    by_name: dict[str, dict[str, Any]] = {}
    for split in splits:
        by_name.setdefault(split.name, {})[split.which] = split
    if incomplete := [name for name, own in by_name.items() if len(own) < 2]:
        raise UserError(f"--data must name datasets with a train and a val split, got {', '.join(incomplete)}.")
    return [OnlineSource.draw(own["train"], own["val"], what.limit) for own in by_name.values()]


def probe_checkpoint(
    checkpoint: Path,
    sources: list[OnlineSource],
    what: WatchOptions,
    options: DataOptions,
    done: Collection[str | None],
) -> dict[str, Any] | None:
    """Return a line as trainer.online_eval logs it; None for a checkpoint whose hash is in `done`."""
    import torch

    from omnivision.config.schema import OnlineEvalSettings
    from omnivision.data.loader import LoaderConfig
    from omnivision.distributed.process_group import Dist, RankInfo
    from omnivision.tools.video_model import load
    from omnivision.training.online_eval import OnlineEval
    from omnivision.utils.signals import StopSignal

    model = load(checkpoint, options.device, options.trust_targets or [])
    if model.origin.sha256 in done:
        return None
    settings = OnlineEvalSettings(
        sources=what.data, every_epochs=1, limit=what.limit, methods=what.methods or list(METHODS)
    )
    online = OnlineEval(settings, sources, LoaderConfig(options.num_workers), model.config.clip_duration, None)
    dist = Dist(RankInfo(), "cpu", None, timedelta(minutes=30))
    dist.device = model.device
    start = time.monotonic()
    metrics = online.evaluate(model.trunk, dist, torch.bfloat16 if options.bfloat16 else None, StopSignal())
    assert metrics is not None  # nothing asks it to stop
    epoch, step, steps = (model.origin.progress.get(name) or 0 for name in ("epoch", "step", "steps_per_epoch"))
    position = {"epoch": epoch - (step == 0), "step": epoch * steps + step}
    times = {"time": time.time(), "seconds": time.monotonic() - start}
    return {
        "event": "epoch",
        "phase": "online",
        **position,
        **metrics,
        **times,
        "sha256": model.origin.sha256,
        **request_of(what),
    }
