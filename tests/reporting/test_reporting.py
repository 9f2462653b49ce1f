"""Output of a run: the metrics log, images, the reporter, the progress line."""

import io
import json
import unittest

import numpy as np
from PIL import Image
from rich.console import Console

from omnivision.reporting import images
from omnivision.reporting.logs import MetricsLog, read_lines
from omnivision.reporting.predictions import Predictions, draw_predictions
from omnivision.reporting.reporter import DataStallWarning, ProgressLine, Reporter
from omnivision.reporting.run_directory import RunDir
from omnivision.tasks.base import Visualization
from omnivision.utils.errors import UserError
from tests.fixtures import Folder

STEP = {"loss": 0.5, "clips_per_second": 12.0, "data_wait": 0.25, "memory_gb": 1.5, "mfu": 0.4}


def visualization() -> Visualization:
    ramp = np.linspace(0, 255, 4 * 16 * 24 * 3).astype(np.uint8).reshape(4, 16, 24, 3)
    return Visualization(
        {"original": ramp, "a caption that is too long for its column of the image": 255 - ramp}, [0, 3]
    )


class Log(Folder):
    def setUp(self):
        super().setUp()
        self.log = MetricsLog(self.folder / "m.jsonl")

    def test_lines_are_strict_json(self):
        self.log.write("step", "train", 0, 1, loss=float("nan"), lr=float("inf"), nested={"a": [float("-inf"), 1.5]})
        line = json.loads(self.log.path.read_text(), parse_constant=self.fail)
        self.assertEqual((line["loss"], line["lr"], line["nested"]), (None, None, {"a": [None, 1.5]}))
        self.assertLessEqual({"event", "phase", "epoch", "step", "time"}, set(line))

    def test_log_is_truncated_when_resuming(self):
        """Later steps, a phase that is repeated, a damaged line and one truncated by a crash are dropped."""
        for step in (1, 2, 3):
            self.log.write("step", "train", 0, step)
            with open(self.log.path, "ab") as file:
                file.write(b"\xff\xfe{\n[1, 2]\nnull\n\n")
        self.log.write("epoch", "val", 0, 3)
        self.log.write("step", "train", 0, 4)
        with open(self.log.path, "a") as file:
            file.write('{"event": "st')
        self.log.truncate_after(3, "val")
        self.log.write("step", "train", 0, 4)
        lines = [(line["step"], line["phase"]) for line in read_lines(self.log.path)]
        self.assertEqual(lines, [(step, "train") for step in (1, 2, 3, 4)])


class Output(Folder):
    def report(self, run_dir: RunDir, enabled: bool) -> tuple[Reporter, str]:
        """Give a reporter one of everything; return what it printed, too."""
        out = io.StringIO()
        reporter = Reporter(run_dir, enabled, console=Console(file=out))
        reporter.start(0, 10)
        if enabled:
            self.take_lock()
        reporter.log_step(0, 1, 1, STEP)
        reporter.log_epoch("val", 0, 1, {"loss": 1.0, "per_source": {"a": {"loss": 1.0}}})
        reporter.save_visualization("x", visualization(), 1)
        reporter.save_predictions("a", Predictions(np.arange(2), np.arange(2), np.eye(2, dtype=np.float32), [*"ab"]), 1)
        reporter.close()
        return reporter, out.getvalue()

    def take_lock(self) -> None:
        (self.folder / ".lock").write_text(json.dumps({"token": "another's", "host": "elsewhere", "pid": 1}))

    def test_other_ranks_write_nothing(self):
        reporter, printed = self.report(RunDir(self.folder), enabled=False)
        reporter.info("hello")
        self.assertEqual((printed, list(self.folder.iterdir())), ("", []))

    def test_run_that_lost_its_directory_writes_nothing(self):
        run_dir = RunDir(self.folder)
        run_dir.create()
        run_dir.lock()
        run_dir.write_summary(status="running")
        self.report(run_dir, enabled=True)
        self.assertRaises(UserError, run_dir.require_lock)
        run_dir.write_exit("failed", "lost")
        for left in (run_dir.pictures, run_dir.predictions, run_dir.logs):
            self.assertEqual(list(left.iterdir()), [])
        self.assertEqual(run_dir.read_summary(), {"status": "running"})


class Images(Folder):
    def test_visualization_is_saved_as_png_and_gif(self):
        images.save(visualization(), self.folder, "x")
        still = np.asarray(Image.open(self.folder / "x.png"))
        scale = round(images.MIN_SIDE / 16)
        self.assertEqual(still.shape[1], images.ROW_NAME_WIDTH + 2 * (24 * scale + images.GAP))
        first = still[-scale * 16 - images.GAP, images.ROW_NAME_WIDTH]  # of the last row of frames
        self.assertEqual(first.tolist(), visualization().columns["original"][3, 0, 0].tolist())
        with Image.open(self.folder / "x.gif") as animation:
            self.assertEqual((animation.format, animation.n_frames), ("GIF", 4))

    def test_dollar_in_a_class_name_is_not_a_formula(self):
        names = ["$\\frac$", "100 $ a_b $"]
        predictions = Predictions(np.arange(2), np.arange(2), np.eye(2, dtype=np.float32), [*"ab"], class_names=names)
        self.assertGreater(min(draw_predictions(predictions, "$x_$, step 3").size), 300)


class Progress(unittest.TestCase):
    def line(self, width: int, total: int, seconds: float) -> tuple[ProgressLine, io.StringIO]:
        out = io.StringIO()
        return ProgressLine(total, 0, Console(file=out, width=width), seconds), out

    def test_plain_lines_without_a_terminal(self):
        line, out = self.line(40, 10, seconds=0)
        for step in (5, 7):
            line.step(0, 2, step, STEP)
        line.close()
        first, second = out.getvalue().splitlines()  # one line each however narrow the window
        text = "epoch 1/2  step 5/10  loss 0.5000  12.0 clips/s  waiting for data 25%  1.5 GB  40% of the peak  ETA "
        self.assertEqual(first, f"{text}-:--:--", "nothing is known after the first")
        self.assertRegex(second, r"ETA 0:00:0\d$")
        line, out = self.line(200, 5, seconds=1000)
        for step in range(1, 6):
            line.step(0, 1, step, STEP)
        self.assertEqual([text.split("step ")[1][:3] for text in out.getvalue().splitlines()], ["1/5", "5/5"])

    def test_waiting_for_data_is_warned_about(self):
        for shares, warned_at in (
            ([0.9] * 4, None),  # the first batches are late
            ([0.99, 0.8, 0.2, 0.2, 0.2, 0.2], None),
            ([0.1] * 20, None),
            ([0.61] * 20, 4),  # once
        ):
            warning = DataStallWarning()
            texts = [warning.update(share) for share in shares]
            self.assertEqual([text is not None for text in texts], [at == warned_at for at in range(len(shares))])
        self.assertRegex(texts[4], "61%.*num_workers.*omnivision prepare")


if __name__ == "__main__":
    unittest.main()
