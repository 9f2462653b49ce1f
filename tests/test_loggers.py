"""Loggers: TensorBoard, Weights & Biases (offline) and MLflow are told the same figures, over a restart too."""

import importlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from omnivision.reporting.loggers import MLflow, TensorBoard, WeightsAndBiases, loggers
from omnivision.reporting.reporter import Reporter
from omnivision.reporting.run_directory import RunDir
from omnivision.utils.errors import UserError
from tests import runs

FIGURES = {"train/loss", "train/lr", "train/grad_norm", "train/clips_per_second", "train/data_wait", "train/memory_gb"}


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of an offline run: pieces in blocks of 32 KiB, each after checksum, length and kind, as in LevelDB."""
    place, whole = 7, b""  # after the header of the file
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def wandb_figures(folder: Path) -> dict[str, dict[int, float]]:
    """Figures by name and step of the offline runs of a run folder, in the order in which they were begun."""
    from wandb.proto import wandb_internal_pb2

    found: dict[str, dict[int, float]] = {}
    for file in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in wandb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            for name, value in items.items():
                if "/" in name and not value.startswith("{"):
                    found.setdefault(name, {})[json.loads(items["step"])] = float(json.loads(value))
    return found


def begin_and_stop(folder: Path, *overrides: str) -> None:
    """A run that is asked to leave after a step; a killed one may lose what wandb has not written yet."""
    log = folder / "logs/metrics.jsonl"
    with subprocess.Popen(
        runs.command(folder, *overrides), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        while not (log.exists() and log.read_text()):
            assert process.poll() is None, process.communicate()[0].decode()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=100)[0].decode()
        assert process.returncode == 128 + signal.SIGTERM, said


class Figures(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        cls.folder = Path(temporary.name)
        split = runs.write_split(cls.folder, [runs.real_films()[0]] * 16)
        quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(cls.folder / "home")}
        command = [
            *split, "trainer.logging.also=[wandb,mlflow]", "trainer.logging.peak_tflops=0.5", "epochs=2",
            "trainer.logging.pictures_every_epochs=1", "trainer.checkpoint.save_every_steps=1", "clip_duration=0.9",
        ]  # fmt: skip
        with mock.patch.dict(os.environ, quiet):
            begin_and_stop(cls.folder / "run", *command)
            made = runs.run(cls.folder / "run", *command)
        assert made.returncode == 0, made.stderr
        cls.said = made.stdout
        cls.lines = {line["step"]: line for line in runs.lines(cls.folder / "run")}

    def assert_the_same(self, found: dict[str, dict[int, float]]) -> None:
        self.assertLessEqual(FIGURES | {"train/mfu"}, set(found))
        for name in ("loss", "lr", "mfu"):
            logged = found[f"train/{name}"]
            self.assertEqual(sorted(logged), sorted(self.lines))
            for step, value in logged.items():
                self.assertAlmostEqual(value, self.lines[step][name], delta=1e-6 * max(1, abs(value)))

    def test_tensorboard(self):
        board = EventAccumulator(str(self.folder / "run/tensorboard"))
        board.Reload()
        self.assert_the_same({name: {e.step: e.value for e in board.Scalars(name)} for name in board.Tags()["scalars"]})
        self.assertIn("pictures", board.Tags()["images"])

    def test_wandb_offline(self):
        self.assert_the_same(wandb_figures(self.folder / "run"))
        self.assertEqual(len(list((self.folder / "run/wandb").glob("offline-run-*"))), 2, "a start each")
        names = {file.name.rpartition("-")[2] for file in (self.folder / "run/wandb").glob("offline-run-*")}
        self.assertEqual(len(names), 1, "of one run")
        self.assertTrue(list((self.folder / "run/wandb").rglob("*.gif")))

    def test_mlflow(self):
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{self.folder}/run/mlflow.db")
        number = (self.folder / "run/mlflow_id").read_text().strip()
        run = client.get_run(number)
        names = set(run.data.metrics)
        self.assert_the_same({n: {m.step: m.value for m in client.get_metric_history(number, n)} for n in names})
        self.assertEqual(run.data.params["mask_ratio"], "0.9")
        self.assertEqual(run.info.status, "FINISHED")
        kept = [path.suffix for path in (self.folder / "run/mlflow").rglob("*") if path.is_file()]
        self.assertIn(".gif", kept)

    def test_what_the_console_says(self):
        self.assertRegex(self.said, r"waiting for data \d+%  \d+\.\d GB  \d+% of the peak  ETA ")


class Failing(unittest.TestCase):
    def test_a_logger_that_fails_is_left_out(self):
        """What is asked of a server that is gone must not end a run; all else is told on."""

        class Broken:
            def scalars(self, figures: object, step: int) -> None:
                raise ConnectionError("nobody answers")

        with tempfile.TemporaryDirectory() as name:
            RunDir(name).create()
            out = io.StringIO()
            reporter = Reporter(RunDir(name), enabled=True, console=Console(file=out, width=200))
            reporter.start(0, 10)
            reporter._loggers.insert(0, Broken())
            for step in (1, 2):
                reporter.step(0, 1, step, {"loss": 1.0, "clips_per_second": 1.0, "data_wait": 0.0})
            reporter.close()
            self.assertEqual(out.getvalue().count("warning: Broken"), 1)
            board = EventAccumulator(f"{name}/tensorboard")
            board.Reload()
            self.assertEqual([event.step for event in board.Scalars("train/loss")], [1, 2])


class Ends(unittest.TestCase):
    """What a run that failed, has many settings, or goes on leaves in each logger."""

    def test_mlflow(self):
        from mlflow import MlflowClient

        with tempfile.TemporaryDirectory() as name:
            folder, began = RunDir(name), time.time()
            folder.create()
            logger = MLflow(folder, {f"setting_{n}": n for n in range(250)})
            logger.scalars({"train/loss": 1.0}, 1)
            logger.close(failed=True)
            client = MlflowClient(tracking_uri=f"sqlite:///{name}/mlflow.db")
            run = client.get_run((folder.path / "mlflow_id").read_text().strip())
            self.assertEqual((run.info.status, len(run.data.params)), ("FAILED", 250))
            [metric] = client.get_metric_history(run.info.run_id, "train/loss")
            self.assertLess(abs(metric.timestamp / 1000 - began), 600)

    def test_wandb(self):
        import wandb
        from wandb.proto import wandb_internal_pb2

        quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        with tempfile.TemporaryDirectory() as name, mock.patch.dict(os.environ, quiet | {"HOME": name}):
            RunDir(name).create()
            WeightsAndBiases(RunDir(name), {}).close(failed=True)
            wandb.teardown()  # its service, which would have the exit code of these tests
            [file] = Path(name).glob("wandb/offline-run-*/run-*.wandb")
            codes = []
            for data in wandb_records(file.read_bytes()):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(data)
                codes += [record.exit.exit_code] if record.HasField("exit") else []
        self.assertEqual(codes, [1])

    def test_tensorboard_forgets_what_comes_after_a_checkpoint(self):
        with tempfile.TemporaryDirectory() as name:
            for step, logged in ((0, (1, 2, 3)), (1, (2,))):
                board = TensorBoard(RunDir(name), step)
                for each in logged:
                    board.scalars({"train/loss": float(step)}, each)
                board.close(failed=False)
            found = EventAccumulator(f"{name}/tensorboard")
            found.Reload()
            self.assertEqual([(event.step, event.value) for event in found.Scalars("train/loss")], [(1, 0.0), (2, 1.0)])


class Refused(unittest.TestCase):
    def test_a_logger_that_is_not_there(self):
        with tempfile.TemporaryDirectory() as name:
            folder = RunDir(name)
            for package in ("wandb", "mlflow"):
                importlib.invalidate_caches()
                with mock.patch.dict(sys.modules, {package: None}):
                    with self.assertRaisesRegex(UserError, rf"trainer.logging.also.*{package}"):
                        loggers([package], folder, {}, 0)

    def test_a_server_that_does_not_answer(self):
        with tempfile.TemporaryDirectory() as name:
            environment = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
            with mock.patch.dict(os.environ, environment):
                with self.assertRaisesRegex(UserError, "mlflow .trainer.logging.also"):
                    loggers(["mlflow"], RunDir(name), {}, 0)


if __name__ == "__main__":
    unittest.main()
