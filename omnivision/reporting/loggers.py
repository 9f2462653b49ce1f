"""Loggers: TensorBoard always, Weights & Biases and MLflow when `trainer.logging.also` names them.

All get the same metrics under the same names. wandb follows its own environment (WANDB_MODE=offline); MLflow writes to
MLFLOW_TRACKING_URI, or into the run directory.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from omnivision.reporting.run_directory import RunDir
from omnivision.utils.errors import UserError
from omnivision.utils.io import write_atomically

PROJECT = "omnivision"
MAX_PARAMS = 100  # MLflow's limit per call


class TensorBoard:
    """TensorBoard's files in the run directory. All loggers have the same methods."""

    def __init__(self, run_dir: RunDir, step: int) -> None:
        """Open the log, and drop its entries after `step`."""
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(run_dir.tensorboard), purge_step=step + 1 if step else None)

    def log_scalars(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics by name, like train/loss, after a step."""
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def log_image(self, name: str, file: Path, step: int) -> None:
        """Log a PNG or GIF unchanged: `add_image` would encode it again, and `add_video` would need another package."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(file) as opened:
            width, height = opened.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.read_bytes())
        self._board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self, failed: bool) -> None:
        self._board.close()


class WeightsAndBiases:
    """One wandb run per run directory, even across restarts: `wandb_id` stores its ID."""

    def __init__(self, run_dir: RunDir, settings: Mapping[str, Any]) -> None:
        import wandb

        id_file = run_dir.path / "wandb_id"
        run_id = _read_id(id_file) or secrets.token_hex(4)
        write_atomically(id_file, f"{run_id}\n")
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=run_id, resume="allow", name=run_dir.path.resolve().name,
            dir=str(run_dir.path), config=dict(settings), settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        # wandb requires increasing steps, but those of a resumed run may decrease.
        self._run.define_metric("*", step_metric="step")

    def log_scalars(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log({**metrics, "step": step})

    def log_image(self, name: str, file: Path, step: int) -> None:
        kind = self._wandb.Image if file.suffix == ".png" else self._wandb.Video
        self._run.log({name: kind(str(file)), "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """One MLflow run per run directory, even across restarts: `mlflow_id` stores its ID."""

    def __init__(self, run_dir: RunDir, settings: Mapping[str, Any]) -> None:
        import mlflow

        server = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = mlflow.MlflowClient(server or f"sqlite:///{(run_dir.path / 'mlflow.db').resolve()}")
        id_file = run_dir.path / "mlflow_id"
        if (run_id := _read_id(id_file)) is not None:
            self._id = run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        artifacts = None if server else str(run_dir.path.resolve() / "mlflow")  # a server stores artifacts itself
        experiment = self._client.get_experiment_by_name(PROJECT)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT, artifacts)
        self._id = self._client.create_run(experiment_id, run_name=run_dir.path.resolve().name).info.run_id
        write_atomically(id_file, f"{self._id}\n")
        params = [mlflow.entities.Param(name, str(value)[:6000]) for name, value in settings.items()]
        for first in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(self._id, params=params[first : first + MAX_PARAMS])

    def log_scalars(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in metrics.items()])

    def log_image(self, name: str, file: Path, step: int) -> None:
        self._client.log_artifact(self._id, str(file), artifact_path=f"{name}/step_{step}")

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def _read_id(file: Path) -> str | None:
    """Read the ID that an earlier attempt stored; None if there is none."""
    return file.read_text(encoding="utf-8").strip() or None if file.exists() else None


Logger = TensorBoard | WeightsAndBiases | MLflow


def start_loggers(names: Sequence[str], run_dir: RunDir, settings: Mapping[str, Any], step: int) -> list[Logger]:
    """Start TensorBoard and the named loggers. Raises UserError for one that cannot be started."""
    loggers: list[Logger] = [TensorBoard(run_dir, step)]
    for name, kind in (("wandb", WeightsAndBiases), ("mlflow", MLflow)):
        if name not in names:
            continue
        try:
            loggers.append(kind(run_dir, settings))
        except Exception as error:  # its package, its server, its login
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise UserError(
                f"trainer.logging.also has {name}, which cannot be started: {reason}. Run pip install 'omnivision[{name}]', "
                "log in, set WANDB_MODE=offline or MLFLOW_TRACKING_URI, or remove it."
            ) from error
    return loggers
