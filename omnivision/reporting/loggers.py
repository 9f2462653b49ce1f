"""Where the figures of a run go besides `metrics.jsonl`: TensorBoard always, Weights & Biases and MLflow when asked for.

All get the same figures under the same names. Whether wandb sends them anywhere is its own affair (WANDB_MODE=offline);
MLflow writes to MLFLOW_TRACKING_URI, or into the run folder.
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
    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        """Figures by name, like train/loss, after a step."""

    def picture(self, name: str, file: Path, step: int) -> None:
        """A PNG, or a GIF that moves."""

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    def __init__(self, folder: RunDir, step: int) -> None:
        """Whatever was logged after `step` is forgotten."""
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder.tensorboard), purge_step=step + 1 if step else None)

    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)

    def picture(self, name: str, file: Path, step: int) -> None:
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

    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log({**figures, "step": step})

    def picture(self, name: str, file: Path, step: int) -> None:
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

    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in figures.items()])

    def picture(self, name: str, file: Path, step: int) -> None:
        self._client.log_artifact(self._id, str(file), artifact_path=f"{name}/step_{step}")

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def kept_id(file: Path) -> str | None:
    """The id of a run that was begun before; None if there is none. Raises UserError for what is no id."""
    if not file.exists():
        return None
    text = file.read_bytes()[:200].decode("utf-8", "replace").strip() if file.is_file() else ""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", text):
        raise UserError(f"{file} does not hold the id of a run. Remove it, to begin a new run there.")
    return text


def loggers(also: Sequence[str], folder: RunDir, settings: Mapping[str, Any], step: int) -> list[Logger]:
    """TensorBoard and those named in `also`. Raises UserError for one whose package is not there, or that cannot be begun."""
    made: list[Logger] = [TensorBoard(folder, step)]
    for name, kind in (("wandb", WeightsAndBiases), ("mlflow", MLflow)):
        if name in also:
            try:
                made.append(kind(folder, settings))
            except UserError:
                raise
            except ImportError:
                raise UserError(
                    f"trainer.logging.also names {name}, and its package is not installed. pip install 'omnivision[{name}]', "
                    "or leave it out."
                ) from None
            except Exception as error:  # its servers, its login
                said = " ".join(str(error).split())[:300].rstrip(".")
                raise UserError(
                    f"{name} (trainer.logging.also) cannot be begun: {said}. Log in to it, set WANDB_MODE=offline or "
                    "MLFLOW_TRACKING_URI, or leave it out."
                ) from error
    return made
