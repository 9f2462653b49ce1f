"""`omnivision watch RUN`: probe the checkpoints of a run while it trains, in another process or job."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from omnivision.config.schema import OnlineMethod
from omnivision.tools.arguments import Flag, at_least
from omnivision.tools.features import DATA, DataOptions, open_data
from omnivision.utils.errors import UserError
from omnivision.utils.io import LATEST, append_line, to_json
from omnivision.utils.streams import print_text

if TYPE_CHECKING:
    from omnivision.training.online_eval import OnlineSource

LOG = "watch.jsonl"
END_STATUS = ("finished", "failed", "interrupted")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """What `watch` does.

    Attributes:
        data: Datasets of the catalog, with labels.
        methods: As trainer.online_eval.methods.
        limit: Videos of each split, drawn at random.
        interval: Seconds between looks for a new checkpoint.
        once: Probe the newest checkpoint and exit.
    """

    data: Annotated[list[str], Parameter(consume_multiple=True, metavar="NAME")]
    methods: Annotated[list[OnlineMethod], Parameter(consume_multiple=True)] = ("knn", "logistic", "rankme")  # type: ignore[assignment]
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

    The results are those of trainer.online_eval (two clips of one crop per video) and go to RUN/logs/watch.jsonl, from where
    `omnivision report` draws them. Checkpoints that another one replaced meanwhile are left out. On a cluster:
    sbatch --gpus=1 --wrap "omnivision watch RUN --data ucf101 --device cuda"

    Args:
        run: A run directory, in which a run trains or has trained.
    """
    from omnivision.reporting.run_directory import RunDir

    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} must be the directory of a run that has started; it has no config.yaml.")
    sources: list[OnlineSource] = []
    for checkpoint in new_checkpoints(run, what):
        if not sources:
            sources = draw_sources(run, what, options)
        line = probe_checkpoint(checkpoint, sources, what, options)
        append_line(run / "logs" / LOG, to_json(line))
        numbers = {name: value for name, value in line.items() if "_" in name}
        print_text(f"epoch {line['epoch'] + 1}: " + "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
    status = RunDir(run).read_summary().get("status")
    print_text(f"The run is {status}. Results: {run / 'logs' / LOG}")
    return 0


def new_checkpoints(run: Path, what: WatchOptions) -> Iterator[Path]:
    """Yield the newest checkpoint whenever it has changed, until the run has ended."""
    from omnivision.reporting.run_directory import RunDir

    path, seen = run / "checkpoints" / LATEST, None
    while True:
        ended = what.once or RunDir(run).read_summary().get("status") in END_STATUS  # before a last look
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
    checkpoint: Path, sources: list[OnlineSource], what: WatchOptions, options: DataOptions
) -> dict[str, Any]:
    """Return a line as trainer.online_eval logs it."""
    from datetime import timedelta

    import torch

    from omnivision.config.schema import OnlineEvalSettings
    from omnivision.data.loader import LoaderConfig
    from omnivision.distributed.process_group import Dist, RankInfo
    from omnivision.tools.video_model import load
    from omnivision.training.online_eval import OnlineEval
    from omnivision.utils.signals import StopSignal

    model = load(str(checkpoint), options.device, options.trust_targets or [])
    progress = model.origin.progress
    settings = OnlineEvalSettings(sources=what.data, every_epochs=1, limit=what.limit, methods=list(what.methods))
    loader = LoaderConfig(options.num_workers)
    online = OnlineEval(settings, sources, loader, model.config.clip_duration, None)
    accelerator = "cuda" if model.device.type == "cuda" else "cpu"
    dist = Dist(RankInfo(), accelerator, None, timedelta(minutes=30))
    dtype = torch.bfloat16 if options.bfloat16 else None
    start = time.monotonic()
    found = online.evaluate(model.model, dist, dtype, StopSignal())
    assert found is not None  # nothing asks it to stop
    epoch, step, steps = (progress.get(name) or 0 for name in ("epoch", "step", "steps_per_epoch"))
    position = {"epoch": epoch - (step == 0), "step": epoch * steps + step}
    return {"event": "epoch", "phase": "online", **position, "time": time.time(), **found[0],
            "seconds": time.monotonic() - start, "sha256": model.origin.sha256}  # fmt: skip
