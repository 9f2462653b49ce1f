"""A training step beyond forward and backward: optimizer, clipping, reduction of metrics, log lines and checkpoints.

The recipe's trainer (ViT-B, 16 x 224 x 224, batch 8) runs whole steps beside forward and backward alone.
"""

import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

from benchmarks import videos
from benchmarks.geometry import Geometry
from benchmarks.harness import Report, interleaved
from omnivision.config.validate import validate_config
from omnivision.data.batch import Batch
from omnivision.distributed.process_group import Dist, RankInfo
from omnivision.reporting.reporter import Reporter
from omnivision.reporting.run_directory import RunDir
from omnivision.training import build
from omnivision.training.trainer import Trainer
from omnivision.utils.signals import StopSignal
from tests.runs import HERE, write_split
from tests.stage_runs import compose_config

LOG_FREQ, SAVE_EVERY = 10, 100  # steps
MAE = ("+experiments=omnimae/omnimain_train_video", "+trainer=mae_k150_config", "trainer/model=vitbase")


def step_parts(quick: bool) -> Report:
    report = Report("step_parts", "A training step, and forward and backward alone")
    shape = Geometry("vittiny", 8, 4, 64) if quick else Geometry("vitbase", 8)
    small = ["trainer/model=vitmicro", "num_frames=4", "image_size=64"] if quick else []
    with tempfile.TemporaryDirectory() as name:
        trainer = recipe_trainer(Path(name), "batch_size=8", "trainer.optim.gradient_clip=1", *small)
        trainer.context.reporter.start(0, 1)
        trainer.raw_model.train()
        batch = noise(shape)

        def forward_and_backward() -> None:
            with trainer._autocast():
                loss = trainer.task.training_step(trainer.raw_model, batch).loss
            loss.backward()
            trainer.raw_model.zero_grad(set_to_none=True)

        def whole_step() -> None:
            trainer.train_step(batch)
            trainer.step_stats.drain(keep_newest=1)

        sides = {"whole step": whole_step, "forward and backward": forward_and_backward}
        report.seconds = interleaved(sides, rounds=3)
        metrics = dict.fromkeys(("loss", "lr", "grad_norm", "clips_per_second", "data_wait"), 1.0)
        log = min(seconds_of(lambda: trainer.context.reporter.log_step(0, 1, 1, metrics)) for _ in range(3))
        save = min(seconds_of(lambda: trainer.save_checkpoint([])) for _ in range(3))
    report.facts |= {"s of a log line": round(log, 5), "s of a checkpoint": round(save, 3)}
    extra = [
        100 * (whole + log / LOG_FREQ + save / SAVE_EVERY - bare) / bare
        for whole, bare in zip(*report.seconds.values(), strict=True)
    ]
    report.at_most("a step beyond forward and backward", extra, 5, "%")
    return report


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def recipe_trainer(folder: Path, *overrides: str) -> Trainer:
    """Return the trainer of the command with these overrides; one video is all of its data."""
    data = write_split(folder, [str(videos.make(folder, 340, 256, seconds=3)[0])] * 4096)
    settings = validate_config(
        compose_config(*MAE, *HERE, f"launcher.experiment_log_dir={folder / 'run'}", *data, *overrides)
    )
    run_dir = RunDir(folder / "run")
    run_dir.create()
    run_dir.lock()
    dist = Dist(RankInfo(), "cpu", None, timedelta(minutes=1))
    return build.build_trainer(settings, "", dist, run_dir, Reporter(run_dir, enabled=True), StopSignal())


def noise(shape: Geometry) -> Batch:
    """Return a batch as a loader yields it."""
    return Batch(
        video=shape.video,
        label=torch.zeros(shape.batch, dtype=torch.int64),
        index=torch.arange(shape.batch),
        source="k150",
        paths=[str(number) for number in range(shape.batch)],
        mask=shape.mask,
        num_masked=shape.num_masked,
        views=4,
    )
