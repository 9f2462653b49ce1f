"""What people see of a run and of the commands: nothing is broken in a narrow window, starts and ends say what matters."""

import contextlib
import io
import os
import re
import sys
import unittest
from types import SimpleNamespace
from unittest import mock

from rich.console import Console

from omnivision.checkpoint.pretrained import LoadReport
from omnivision.launch import launcher
from omnivision.launch.exit import exit_code_and_reason, report_exit
from omnivision.reporting.reporter import ProgressLine, Reporter
from omnivision.reporting.run_directory import RunDir
from omnivision.tools import predict
from omnivision.tools.main import main
from omnivision.tools.video_model import Prediction
from omnivision.training.evaluate import Evaluation
from omnivision.training.run_messages import end_lines, start_lines
from omnivision.utils.errors import EXIT_SIGINT, StopRequested, UserError
from omnivision.utils.signals import StopSignal
from omnivision.utils.streams import announce, print_text
from tests.fixtures import Folder
from tests.training.test_trainer import NoiseDataset, make_trainer

WIDTHS = (60, 80, 120)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain(text: str) -> list[str]:
    """Lines without control sequences of a terminal."""
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).splitlines() if line.strip()]


class Windows(Folder):
    """Tables and lines in windows of several widths, and in a pipe."""

    def test_long_lines_are_wrapped_at_spaces_on_a_terminal(self):
        text = (
            "Weights from /data/a_path/that/is/almost/as/long/as/a/window.pt (epoch 12, top-1 85.714 %)\n"
            "device       cpu, float32, 2 ranks, ddp, and more [bold] that does not fit beside it in a narrow window"
        )
        for stream, width in ((io.StringIO(), 60), *((Terminal(), width) for width in WIDTHS)):
            with mock.patch.dict(os.environ, COLUMNS=str(width), TERM="xterm"), contextlib.redirect_stdout(stream):
                print_text(text)
            lines = plain(stream.getvalue())
            self.assertEqual(" ".join(lines).split(), text.split())
            if isinstance(stream, Terminal):
                self.assertLessEqual(max(map(len, lines)), width)
            else:
                self.assertEqual(stream.getvalue(), f"{text}\n")

    def test_a_slow_start_is_announced_on_a_terminal(self):
        for stream, text in ((Terminal(), "Loading ...\n"), (io.StringIO(), "")):
            with mock.patch.object(sys, "stderr", stream):
                announce("Loading")
            self.assertEqual(stream.getvalue(), text)

    def runs(self, out: io.StringIO, *arguments: str) -> list[str]:
        with contextlib.redirect_stdout(out):
            self.assertEqual(main(["runs", str(self.folder), *arguments]), 0)
        return plain(out.getvalue())

    def test_runs_table_fits_the_window(self):
        for name, top1 in (("sweep/lr_0.000125_batch_128", 85.714), ("ft", 42.9)):
            facts = {"model": "classifier", "trunk": "trained", "sources": ["ucf101"], "pretrained": "mae"}
            summary = {"run": facts | {"classes": [101]}, "status": "running", "job": {"job_id": "7"}, "epochs": 30,
                       "wall_time": 5400.0, "best": top1, "last": {"val_top1": top1, "val_loss": 1.23456}}  # fmt: skip
            (self.folder / name).mkdir(parents=True)
            RunDir(self.folder / name).replace_summary(summary)
        for width in (*WIDTHS, 160):
            with mock.patch.dict(os.environ, COLUMNS=str(width), TERM="xterm"):
                lines = self.runs(Terminal())
            self.assertLessEqual(max(map(len, lines)), width)
            for expected in ("sweep/lr_0.000125_batch_128", "85.7", "top-1 %", "running"):
                self.assertIn(expected, "\n".join(lines))
            self.assertEqual("No room for: age" in "\n".join(lines), width < 160, lines)
        lines = self.runs(io.StringIO())
        self.assertEqual(len(lines), 3)
        self.assertIn("age", lines[0])
        self.assertIn("ft (running)", "\n".join(self.runs(io.StringIO(), "--top1")))

    def test_long_class_name_is_not_truncated(self):
        name = "x" * 70
        for width in (*WIDTHS, 10_000):
            out = io.StringIO()
            predictions = [Prediction(name, 0, 0.75), Prediction("y", 1, 0.25)]
            Console(file=out, width=10_000).print(predict.make_table(predictions, width))
            lines = plain(out.getvalue())
            self.assertEqual([line.split()[0] for line in lines], [name, "y"])
            self.assertTrue(lines[0].endswith("75.0 %"))
            if width >= 90:
                self.assertLessEqual(len(lines[0]), width)
                self.assertIn("█", lines[0])

    def test_epoch_metrics_fit_the_window(self):
        metrics = {"loss": 0.41234, "mean_class_accuracy": 84.123, "top1": 85.714, "top5": 100.0, "videos": 1234}
        RunDir(self.folder).create()
        for width in WIDTHS:
            out = io.StringIO()
            reporter = Reporter(RunDir(self.folder), True, Console(file=out, width=width, force_terminal=True))
            reporter.log_epoch("val", 29, 9, metrics)
            text = "\n".join(plain(out.getvalue()))
            self.assertLessEqual(max(map(len, text.splitlines())), width)
            for name, value in metrics.items():
                self.assertIn(f"{name} {value:.4g}", " ".join(text.split()))

    def test_progress_bar_fits_the_window(self):
        for width in WIDTHS:
            out = io.StringIO()
            bar = ProgressLine(1200, 0, Console(file=out, width=width, force_terminal=True, color_system=None))
            bar.step(9, 30, 512, {"loss": 12.51234, "clips_per_second": 112.0, "data_wait": 0.25, "memory_gb": 1.5})
            bar.close()
            last = plain(out.getvalue().replace("\r", "\n"))[-1]
            self.assertLessEqual(len(last), width)
            self.assertIn("loss 12.5123", last)
            self.assertEqual("112.0 clips/s" in last, width >= 80)
            self.assertNotIn("…", last)


class StartAndEnd(Folder):
    def assert_lines(self, lines: list[str], *expected: str) -> None:
        for each in expected:
            self.assertRegex("\n".join(lines), each)

    def test_start_lines(self):
        run = make_trainer(self.folder / "run", val=NoiseDataset(5), limit=2)
        report = LoadReport("runs/mae/checkpoints/best.pt", "0", "epoch 20, training loss 0.43")
        settings = SimpleNamespace(clips_per_step=4)
        for split in (*run.train_data.dataset.splits, *run.val_data.dataset.splits):
            split.which, split.dataset = "train", SimpleNamespace(kind="image")
        self.assert_lines(
            start_lines(settings, run, [report]),
            r"MaskedAutoencoder, \d+ parameters, \d+ trained",
            "cpu, float32",
            "noise, train: 12 samples",
            "noise, train: 5 samples",
            "4 clips per step, 2 steps per epoch, 2 epochs",
            r"peak lr +0\.0\d+",
            "seed +3",
            r"mae/checkpoints/best\.pt \(epoch 20, training loss 0\.43\)",
            f"directory +{self.folder}/run",
        )
        self.assert_lines(start_lines(settings, run, []), "weights +random")
        run.state.epoch = 1
        self.assert_lines(start_lines(settings, run, []), "resumed after 1 epoch\n")

    def test_end_lines(self):
        run = make_trainer(self.folder / "run", val=NoiseDataset(1), val_epoch_freq=1, limit=1)
        losses = iter([0.25, 0.5])
        run.evaluate = lambda: Evaluation({"loss": next(losses)}, {}, {}, [])
        run.fit()
        run.context.reporter.close()
        self.assert_lines(
            end_lines(run),
            rf"best +epoch 1, validation loss 0\.25: {self.folder}/run/checkpoints/best\.pt",
            rf"last +epoch 2, validation loss 0\.5: {self.folder}/run/checkpoints/checkpoint\.pt",
            f"omnivision report {self.folder}/run",
            f"omnivision reconstruct {self.folder}/run VIDEO",
        )
        run.state.best, run.state.best_loss, run.state.last_metrics["val_top1"] = 50.0, 0.5, 25.0
        self.assert_lines(end_lines(run), r"epoch 1, top-1 50\.0 %, validation loss 0\.5: ")
        unvalidated = make_trainer(self.folder / "unvalidated", limit=1, max_epochs=1)
        unvalidated.fit()
        unvalidated.context.reporter.close()
        self.assert_lines(end_lines(unvalidated), "last +epoch 1, training loss")
        self.assertNotIn("best ", "\n".join(end_lines(unvalidated)))
        unvalidated.context.run_dir.path = self.folder / "sp ace"
        self.assert_lines(end_lines(unvalidated), f"omnivision report '{self.folder}/sp ace'\n")


class Interrupted(Folder):
    def test_stopped_run_reports_no_error(self):
        for error, code, hint in (
            (StopRequested("SIGTERM", saved_step=5), 143, "the same command"),
            (StopRequested("SIGTERM"), 143, ""),
            (KeyboardInterrupt(), EXIT_SIGINT, ""),
            (UserError("wrong"), 1, "error: wrong\n"),
        ):
            with contextlib.redirect_stderr(io.StringIO()) as stderr:
                self.assertEqual(report_exit(error, RunDir(self.folder), False, 0), code)
            self.assertIn(hint, stderr.getvalue())
            self.assertEqual("error" in stderr.getvalue(), code == 1)

    def test_saved_step_is_reported(self):
        first = make_trainer(self.folder / "run", save_every_steps=2, max_epochs=1)
        self.assertIn("nothing is saved", first.context.stop.describe_saved())
        first.fit()
        first.context.reporter.close()
        resumed = make_trainer(self.folder / "run", max_epochs=2)
        for stop in (first.context.stop, resumed.context.stop):
            self.assertIn("saved step is 3", stop.describe_saved())
        error = KeyboardInterrupt()
        error.add_note(StopSignal().describe_saved())
        code, reason = exit_code_and_reason(error)
        self.assertEqual((code, "nothing is saved" in reason), (EXIT_SIGINT, True))

    def test_interrupted_run_ends_the_sweep(self):
        submitit = SimpleNamespace(use_cluster=False)
        launchers = [SimpleNamespace(experiment_log_dir=f"run_{number}", gpus_per_node=1) for number in range(3)]
        jobs = [SimpleNamespace(settings=SimpleNamespace(submitit=submitit, launcher=each)) for each in launchers]
        for codes, runs in (
            ([0, EXIT_SIGINT, 0], 2),
            ([0, 143, 0], 2),
            ([1, 0, 0], 3),
            ([0, 0, EXIT_SIGINT], 3),
        ):
            with (
                mock.patch("omnivision.launch.launcher.run_rank", side_effect=codes) as run,
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                self.assertEqual(launcher.launch(jobs), max(codes[:runs]))
            self.assertEqual(run.call_count, runs)


if __name__ == "__main__":
    unittest.main()
