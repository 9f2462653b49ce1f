"""Runs of the later stages on small videos made here: in this process where that is faithful, else in a subprocess."""

import contextlib
import io
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from omegaconf import DictConfig

from omnivision import train
from omnivision.config.compose import CommandLine, compose_configs
from omnivision.data.encode import write_video
from omnivision.launch import launcher
from omnivision.training.trainer import Trainer
from tests.runs import ROOT

CLASSES = 3
# Stage -> experiment, beginning of the recipe's name, model.
STAGES = {
    "mae": ("omnimain_train_video", "mae", "vitmicro"),
    "ft": ("omnimain_train_video_ft", "mae_ft", "vitmicro_ft"),  # alignment, too
    "lp": ("omnimain_train_video_lp", "mae_ft", "vitmicro_ft"),
    "attentive": ("omnimain_train_video_attentive", "mae_ft", "vitmicro_attentive"),
    "average": ("omnimain_train_video_ensemble_ft", "mae_ft", "vitmicro_average_ft"),
}
# Clips and batches small enough for a test; full precision, so that figures compare across processes.
SMALL = (
    "image_size=32 short_side=40 num_frames=4 clip_duration=0.7 batch_size=4 epochs=1 num_workers=0 "
    "trainer.optim.amp.enabled=false trainer.logging.log_freq=1 trainer.logging.pictures_every_epochs=null "
    "trainer.accelerator=cpu submitit.use_cluster=false"
).split()

# Faster for such clips, and sums come out the same in every process.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


Result = subprocess.CompletedProcess[str]


def write_videos(folder: Path, count: int) -> list[str]:
    """Videos of 20 frames, 48 x 64, 25 a second: a bar of its class's colour moves over the noise of a video."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"{number}.mp4") for number in range(count)]
    for number, path in enumerate(paths):
        rng = np.random.default_rng(number)
        frames = rng.integers(0, 60, (20, 48, 64, 3), dtype=np.uint8)
        for time, frame in enumerate(frames):
            left = (2 * time + 5 * number) % 56
            frame[:, left : left + 8, number % CLASSES] = 200
        write_video(path, frames, fps=25)
    return paths


def write_split(
    folder: Path, dataset: str, which: str, paths: Sequence[str], classes: int = CLASSES, labels: Any = None
) -> list[str]:
    """Write the arrays of a split, video i with label i modulo `classes`; returns its overrides."""
    files = {what: folder / f"{dataset}_{which}_{what}.npy" for what in ("paths", "labels")}
    np.save(files["paths"], np.array(paths))
    np.save(files["labels"], np.arange(len(paths)) % classes if labels is None else np.array(labels))
    overrides = [f"++datasets.{dataset}.{which}.{what}={file}" for what, file in files.items()]
    return [*overrides, f"++datasets.{dataset}.num_classes={classes}"]


def command(stage: str, run_folder: Path, *overrides: str, dataset: str = "ucf101") -> list[str]:
    """The arguments of a run of a stage on a dataset."""
    experiment, recipe, model = STAGES[stage]
    chosen = [f"+experiments=omnimae/{experiment}", f"+trainer={recipe}_{dataset}_config", f"trainer/model={model}"]
    return [*chosen, f"launcher.experiment_log_dir={run_folder}", *SMALL, *overrides]


def start_fork_server() -> None:
    """Start the server that processes of tests are forked from, with what they import: what starts it first decides."""
    multiprocessing.set_forkserver_preload(["omnivision.training.trainer", "torch._dynamo", "torch.distributed.fsdp"])
    multiprocessing.forkserver.ensure_running()


class Ranks:
    """Stands in for `multiprocessing`: forks the processes of a run from a server that has imported torch."""

    def __init__(self, folder: str) -> None:
        self.folder, self.context = folder, multiprocessing.get_context("forkserver")

    def get_context(self, method: str) -> "Ranks":
        start_fork_server()
        return self

    def Process(self, target: Callable[..., None], args: tuple[Any, ...]) -> Any:
        return self.context.Process(target=run_rank, args=(self.folder, dict(os.environ), target, args))

    def read(self, stream: str) -> str:
        return "".join(file.read_text() for file in sorted(Path(self.folder).glob(f"*.{stream}")))


def run_rank(folder: str, environment: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    path = Path(folder, str(os.getpid()))
    with open(f"{path}.out", "w") as out, open(f"{path}.err", "w") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            target(*args)


def run_in_process(arguments: Sequence[str]) -> Result:
    """The command in this process, without the seconds that torch takes to start; ranks are forked."""
    code: Any = 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(launcher, "multiprocessing", Ranks(folder)) as ranks,
        mock.patch.dict(os.environ, ONE_THREAD),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            train.main(arguments)
        except SystemExit as end:
            code = end.code
        finally:
            torch.set_num_threads(threads)
            logging.basicConfig(handlers=[logging.NullHandler()], force=True)  # closes the log of the run
        return Result(arguments, code or 0, out.getvalue() + ranks.read("out"), err.getvalue() + ranks.read("err"))


def compose_config(*overrides: str) -> DictConfig:
    """What a command line composes."""
    return compose_configs(CommandLine(list(overrides), [ROOT / "config"]))[0]


def run_in_subprocess(arguments: Sequence[str]) -> Result:
    """The command in a process of its own, from a folder that is not the project's."""
    command = [sys.executable, str(ROOT / "train_app_submitit.py"), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | ONE_THREAD
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def load_checkpoint(run_folder: Path, name: str = "checkpoint.pt") -> dict[str, Any]:
    """A checkpoint of a run, with weights only."""
    return torch.load(run_folder / "checkpoints" / name, weights_only=True)


def encoder_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The encoder among weights: the trunk without the decoder of its pretraining."""
    decoder = ("trunk.decoder.", "trunk.mask_token")
    return {
        name: tensor for name, tensor in weights.items() if name.startswith("trunk.") and not name.startswith(decoder)
    }


def read_files(folder: Path) -> dict[Path, bytes]:
    """Every file of a folder but logs, which may grow."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}


@contextlib.contextmanager
def record_weights() -> Iterator[dict[int, dict[str, torch.Tensor]]]:
    """The weights of a run in this block, by the number of optimizer steps it had done."""
    steps, fit, step = {}, Trainer.fit, Trainer.train_step

    def note(trainer: Trainer, done: int) -> None:
        steps[done] = {name: tensor.detach().clone() for name, tensor in trainer.raw_model.state_dict().items()}

    def noting_fit(trainer: Trainer) -> None:
        note(trainer, trainer.global_step)
        fit(trainer)

    def noting_step(trainer: Trainer, batch: Any) -> None:
        step(trainer, batch)
        note(trainer, trainer.global_step + 1)

    with mock.patch.object(Trainer, "fit", noting_fit), mock.patch.object(Trainer, "train_step", noting_step):
        yield steps
