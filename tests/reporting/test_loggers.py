"""Loggers: TensorBoard, Weights & Biases (offline) and MLflow get the same metrics, across a restart, too."""

import io
import json
import os
import struct
import sys
import tempfile
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from omnivision.reporting.loggers import MLflow, TensorBoard, WeightsAndBiases, start_loggers
from omnivision.reporting.reporter import Reporter
from omnivision.reporting.run_directory import RunDir
from omnivision.utils.errors import UserError
from tests import runs
from tests.fixtures import Folder

OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
METRICS = {"train/loss", "train/lr", "train/grad_norm", "train/clips_per_second", "train/data_wait", "train/memory_gb"}


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records of the offline runs of a run directory, in order.

    A file has them in blocks of 32 KiB, in parts with checksum, length and kind, as in LevelDB.
    """
    from wandb.proto import wandb_internal_pb2

    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        data, place, parts = file.read_bytes(), 7, b""  # after the header of the file
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            length, kind = struct.unpack_from("<HB", data, place + 4)
            parts += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # complete, or the last part
                record = wandb_internal_pb2.Record()
                record.ParseFromString(parts)
                parts = b""
                yield record


def wandb_metrics(folder: Path) -> dict[str, dict[int, float]]:
    """Metrics by name and step."""
    metrics: dict[str, dict[int, float]] = {}
    for record in wandb_records(folder):
        items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
        for name, value in items.items():
            if "/" in name and not value.startswith("{"):
                metrics.setdefault(name, {})[json.loads(items["step"])] = float(json.loads(value))
    return metrics


def tensorboard(run_folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_folder / "tensorboard"))
    events.Reload()
    return events


class Metrics(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        split = runs.write_split(cls.folder, [runs.real_videos()[0]] * 16)
        options = [*split, "trainer.logging.also=[wandb,mlflow]", "trainer.logging.peak_tflops=0.5", "clip_duration=0.9",
                   "trainer.logging.pictures_every_epochs=1", "trainer.checkpoint.allow_changes=true"]  # fmt: skip
        with mock.patch.dict(os.environ, OFFLINE, HOME=str(cls.folder / "home")):
            for epochs in (1, 2):
                result = runs.run(cls.folder / "run", *options, f"epochs={epochs}")
                assert result.returncode == 0, result.stderr
        cls.stdout = result.stdout
        cls.lines = {line["step"]: line for line in runs.read_metrics(cls.folder / "run")}

    def assert_the_same(self, metrics: dict[str, dict[int, float]]) -> None:
        self.assertLessEqual(METRICS | {"train/mfu"}, set(metrics))
        for name in ("loss", "lr", "mfu"):
            logged = metrics[f"train/{name}"]
            self.assertEqual(sorted(logged), sorted(self.lines))
            for step, value in logged.items():
                self.assertAlmostEqual(value, self.lines[step][name], delta=1e-6 * max(1, abs(value)))

    def test_tensorboard_has_all_metrics(self):
        board = tensorboard(self.folder / "run")
        self.assert_the_same({name: {e.step: e.value for e in board.Scalars(name)} for name in board.Tags()["scalars"]})
        self.assertIn("train_epoch/loss", board.Tags()["scalars"])
        self.assertTrue(board.Images("pictures")[0].encoded_image_string.startswith(b"GIF89a"))

    def test_wandb_offline_has_all_metrics(self):
        self.assert_the_same(wandb_metrics(self.folder / "run"))
        names = [file.name.rpartition("-")[2] for file in (self.folder / "run/wandb").glob("offline-run-*")]
        self.assertEqual((len(names), len(set(names))), (2, 1), "two starts of one run")
        self.assertTrue(list((self.folder / "run/wandb").rglob("*.gif")))

    def test_mlflow_has_all_metrics(self):
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{self.folder}/run/mlflow.db")
        run = client.get_run((self.folder / "run/mlflow_id").read_text().strip())
        history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        self.assert_the_same({name: {each.step: each.value for each in values} for name, values in history.items()})
        self.assertEqual((run.data.params["mask_ratio"], run.info.status), ("0.9", "FINISHED"))
        self.assertTrue(list((self.folder / "run/mlflow").rglob("*.gif")))

    def test_console_shows_data_wait_memory_and_mfu(self):
        self.assertRegex(self.stdout, r"waiting for data \d+%  \d+\.\d GB  \d+% of the peak  ETA ")


class Alone(Folder):
    """Loggers without a run."""

    def setUp(self):
        super().setUp()
        self.run_dir = RunDir(self.folder)
        self.run_dir.create()

    def tensorboard_losses(self) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in tensorboard(self.folder).Scalars("train/loss")]

    def test_tensorboard_drops_steps_after_the_checkpoint(self):
        for step, logged in ((0, (1, 2, 3)), (1, (2,))):
            board = TensorBoard(self.run_dir, step)
            for each in logged:
                board.log_scalars({"train/loss": float(step)}, each)
            board.close(failed=False)
            time.sleep(1.1)  # files are ordered by the second in which they were opened
        self.assertEqual(self.tensorboard_losses(), [(1, 0.0), (2, 1.0)])

    def test_failing_logger_is_dropped(self):
        """A server that does not answer must not end a run; the other loggers continue."""
        out = io.StringIO()
        reporter = Reporter(self.run_dir, enabled=True, console=Console(file=out, width=200))
        reporter.start(0, 10)
        reporter._loggers.insert(0, mock.Mock(log_scalars=mock.Mock(side_effect=ConnectionError("nobody answers"))))
        for step in (1, 2):
            reporter.log_step(0, 1, step, {"loss": 1.0, "clips_per_second": 1.0, "data_wait": 0.0})
        reporter.close()
        self.assertEqual(out.getvalue().count("warning: Mock"), 1)
        self.assertEqual(self.tensorboard_losses(), [(1, 1.0), (2, 1.0)])

    def test_mlflow_status_of_a_failed_run(self):
        """Its status, and more settings than MLflow takes at once."""
        from mlflow import MlflowClient

        start = time.time()
        logger = MLflow(self.run_dir, {f"setting_{n}": n for n in range(250)})
        logger.log_scalars({"train/loss": 1.0}, 1)
        logger.close(failed=True)
        client = MlflowClient(tracking_uri=f"sqlite:///{self.folder}/mlflow.db")
        run = client.get_run((self.folder / "mlflow_id").read_text().strip())
        self.assertEqual((run.info.status, len(run.data.params)), ("FAILED", 250))
        [metric] = client.get_metric_history(run.info.run_id, "train/loss")
        self.assertLess(abs(metric.timestamp / 1000 - start), 600)

    def test_wandb_exit_code_of_a_failed_run(self):
        import wandb

        with mock.patch.dict(os.environ, OFFLINE, HOME=str(self.folder)):
            WeightsAndBiases(self.run_dir, {}).close(failed=True)
            wandb.teardown()  # its service, which would have the exit code of these tests
        codes = [record.exit.exit_code for record in wandb_records(self.folder) if record.HasField("exit")]
        self.assertEqual(codes, [1])

    def test_logger_that_cannot_be_started_is_named(self):
        no_server = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        for name, modules, environment in (
            ("wandb", {"wandb": None}, {}),
            ("mlflow", {"mlflow": None}, {}),
            ("mlflow", {}, no_server),
        ):
            with (
                self.subTest(name),
                mock.patch.dict(sys.modules, modules),
                mock.patch.dict(os.environ, environment),
                self.assertRaisesRegex(UserError, f"trainer.logging.also has {name}"),
            ):
                start_loggers([name], self.run_dir, {}, 0)


if __name__ == "__main__":
    unittest.main()
