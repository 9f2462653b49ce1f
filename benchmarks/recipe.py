"""A trainer as the recipe's command builds it, with a film in place of the data."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from benchmarks import films
from omnivision.config.compose import use_yaml12_numbers
from omnivision.config.validate import validate_config
from omnivision.data.batch import Batch
from omnivision.distributed.process_group import Dist, RankInfo
from omnivision.reporting.reporter import Reporter
from omnivision.reporting.run_directory import RunDir
from omnivision.training import build
from omnivision.training.trainer import Trainer
from omnivision.utils.signals import StopSignal

CONFIG = Path(__file__).resolve().parent.parent / "config"
HERE = ("trainer.accelerator=cpu", "submitit.use_cluster=false", "launcher.num_nodes=1", "launcher.gpus_per_node=1")
MAE = ("+experiments=omnimae/omnimain_train_video", "+trainer=mae_k150_config", "trainer/model=vitbase")


def trainer(folder: Path, *overrides: str) -> Trainer:
    """What `train_app_submitit.py` with these overrides would train with, in this process."""
    (film,) = films.make(folder, 340, 256, seconds=3)
    np.save(folder / "paths.npy", np.array([str(film)] * 4096))
    np.save(folder / "labels.npy", np.zeros(4096, dtype=np.int64))
    data = [f"++datasets.k150.train.{what}={folder / what}.npy" for what in ("paths", "labels")]
    use_yaml12_numbers()
    with initialize_config_dir(str(CONFIG), version_base="1.3"):
        config = compose("config", [*MAE, *HERE, f"launcher.experiment_log_dir={folder / 'run'}", *data, *overrides])
    settings = validate_config(config)
    dist = Dist(RankInfo(), "cpu", None, timedelta(minutes=1))
    run_folder = RunDir(folder / "run")
    run_folder.create()
    run_folder.lock()
    return build.trainer(settings, dist, run_folder, Reporter(run_folder, enabled=True), StopSignal())


def batch(trainer: Trainer, clips: int, frames: int = 16, image: int = 224, hidden: float = 0.9) -> Batch:
    """Clips of noise with random masks, as a loader hands them over."""
    tokens = frames // 2 * (image // 16) ** 2
    masked = int(hidden * tokens)
    generator = torch.Generator().manual_seed(0)
    return Batch(
        video=torch.randint(0, 256, (clips, 3, frames, image, image), dtype=torch.uint8, generator=generator),
        label=torch.zeros(clips, dtype=torch.int64),
        index=torch.arange(clips),
        source="k150",
        paths=[str(number) for number in range(clips)],
        mask=torch.rand(clips, tokens, generator=generator).argsort(1) < masked,
        num_masked=masked,
        views=4,
    )
