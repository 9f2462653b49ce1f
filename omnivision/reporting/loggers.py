"""Loggers: TensorBoard always, Weights & Biases and MLflow when `trainer.logging.also` names them.

All get the same metrics under the same names. wandb follows its own environment (WANDB_MODE=offline); MLflow writes to
MLFLOW_TRACKING_URI, or into the run directory.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from omnivision.reporting.run_directory import RunDir
from omnivision.utils.errors import UserError
from omnivision.utils.io import write_atomically

PROJECT = "omnivision"
PARAMETERS = 100  # that MLflow takes at once


class Logger(Protocol):
    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics by name, like train/loss, after a step."""

    def image(self, name: str, file: Path, step: int) -> None:
        """A PNG, or a GIF that moves."""

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    def __init__(self, folder: RunDir, step: int) -> None:
        """Whatever was logged after `step` is forgotten."""
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder.tensorboard), purge_step=step + 1 if step else None)

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def image(self, name: str, file: Path, step: int) -> None:
        """TensorBoard shows GIF bytes moving; its own `add_video` would need another package to encode them."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(file) as opened:
            if file.suffix == ".png":
                self._board.add_image(name, np.asarray(opened.convert("RGB")), step, dataformats="HWC")
                return
            width, height = opened.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.read_bytes())
        self._board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self, failed: bool) -> None:
        self._board.close()


class WeightsAndBiases:
    """One run of wandb for one run folder, also over restarts: its id is kept in `wandb_id`."""

    def __init__(self, folder: RunDir, settings: Mapping[str, Any]) -> None:
        import wandb

        known = folder.path / "wandb_id"
        number = kept_id(known) or secrets.token_hex(4)
        write_atomically(known, f"{number}\n")
        name = folder.path.resolve().name
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=number, resume="allow", name=name, dir=str(folder.path),
            config=dict(settings), settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        # Its own count of steps must not go back, and a run that goes on from a checkpoint does.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log({**metrics, "step": step})

    def image(self, name: str, file: Path, step: int) -> None:
        kind = self._wandb.Image if file.suffix == ".png" else self._wandb.Video
        self._run.log({name: kind(str(file)), "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """One run of MLflow for one run folder, also over restarts: its id is kept in `mlflow_id`."""

    def __init__(self, folder: RunDir, settings: Mapping[str, Any]) -> None:
        import mlflow

        server = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = mlflow.MlflowClient(server or f"sqlite:///{(folder.path / 'mlflow.db').resolve()}")
        known = folder.path / "mlflow_id"
        if (number := kept_id(known)) is not None:
            self._id = number
            self._client.update_run(self._id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(PROJECT)
        # A server knows where it keeps things.
        kept = None if server else str(folder.path.resolve() / "mlflow")
        place = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT, kept)
        self._id = self._client.create_run(place, run_name=folder.path.resolve().name).info.run_id
        write_atomically(known, f"{self._id}\n")
        parameters = [mlflow.entities.Param(name, str(value)[:6000]) for name, value in settings.items()]
        for first in range(0, len(parameters), PARAMETERS):
            self._client.log_batch(self._id, params=parameters[first : first + PARAMETERS])

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in metrics.items()])

    def image(self, name: str, file: Path, step: int) -> None:
        self._client.log_artifact(self._id, str(file), artifact_path=f"{name}/step_{step}")

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def kept_id(file: Path) -> str | None:
    """Read the ID of an earlier start of the run; None if there is none. Raises UserError for anything else in the file."""
    if not file.exists():
        return None
    text = file.read_bytes()[:200].decode("utf-8", "replace").strip() if file.is_file() else ""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", text):
        raise UserError(f"{file} does not hold the ID of a run. Remove it to start a new one.")
    return text


def loggers(names: Sequence[str], folder: RunDir, settings: Mapping[str, Any], step: int) -> list[Logger]:
    """Start TensorBoard and the named loggers. Raises UserError for a missing package, or one that cannot be started."""
    made: list[Logger] = [TensorBoard(folder, step)]
    for name, kind in (("wandb", WeightsAndBiases), ("mlflow", MLflow)):
        if name in names:
            try:
                made.append(kind(folder, settings))
            except UserError:
                raise
            except ImportError:
                raise UserError(
                    f"trainer.logging.also has {name}, whose package is not installed. Run pip install "
                    f"'omnivision[{name}]', or remove it."
                ) from None
            except Exception as error:  # its servers, its login
                said = " ".join(str(error).split())[:300].rstrip(".")
                raise UserError(
                    f"{name} (trainer.logging.also) cannot be started: {said}. Log in, set WANDB_MODE=offline or "
                    "MLFLOW_TRACKING_URI, or remove it."
                ) from error
    return made
