"""Output of a run: the metrics log, images, TensorBoard, the progress line."""

import io
import json
import tempfile
import unittest
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from omnivision.reporting import images
from omnivision.reporting.logs import MetricsLog, read_lines
from omnivision.reporting.predictions import Predictions, confusion_image
from omnivision.reporting.reporter import DataStallWarning, ProgressLine, Reporter
from omnivision.reporting.run_directory import RunDir
from omnivision.tasks.base import Visualization

STEP = {"loss": 0.5, "clips_per_second": 12.0, "data_wait": 0.25, "memory_gb": 1.5, "mfu": 0.4}


def visualization() -> Visualization:
    ramp = np.linspace(0, 255, 4 * 16 * 24 * 3).astype(np.uint8).reshape(4, 16, 24, 3)
    return Visualization(
        {"original": ramp, "a caption that is too long for its column of the image": 255 - ramp}, [0, 3]
    )


class Folder(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)


class Log(Folder):
    def test_lines_are_strict_json(self):
        log = MetricsLog(self.folder / "m.jsonl")
        log.write("step", "train", 0, 1, loss=float("nan"), lr=float("inf"), nested={"a": [float("-inf"), 1.5]})
        line = json.loads((self.folder / "m.jsonl").read_text(), parse_constant=self.fail)
        self.assertEqual((line["loss"], line["lr"], line["nested"]), (None, None, {"a": [None, 1.5]}))
        self.assertLessEqual({"event", "phase", "epoch", "step", "time"}, set(line))

    def test_truncating(self):
        """Later steps, a phase that is repeated, a damaged line and one truncated by a crash are dropped."""
        log = MetricsLog(self.folder / "m.jsonl")
        for step in (1, 2, 3):
            log.write("step", "train", 0, step)
            with open(log.path, "ab") as file:
                file.write(b"\xff\xfe{\n[1, 2]\nnull\n\n")
        log.write("epoch", "val", 0, 3)
        log.write("step", "train", 0, 4)
        with open(log.path, "a") as file:
            file.write('{"event": "st')
        log.truncate_after(3, "val")
        log.write("step", "train", 0, 4)
        self.assertEqual([line["step"] for line in read_lines(log.path)], [1, 2, 3, 4])
        self.assertEqual({line["phase"] for line in read_lines(log.path)}, {"train"})


class Output(Folder):
    def test_other_ranks_are_silent(self):
        out = io.StringIO()
        reporter = Reporter(RunDir(self.folder), enabled=False, console=Console(file=out))
        reporter.start(0, 10)
        reporter.info("hello")
        reporter.step(0, 1, 1, STEP)
        reporter.epoch("val", 0, 1, {"loss": 1.0, "per_source": {"a": {"loss": 1.0}}})
        reporter.visualization("x", visualization(), 1)
        reporter.close()
        self.assertEqual((out.getvalue(), list(self.folder.iterdir())), ("", []))


class Images(Folder):
    def test_still_and_animation(self):
        images.save(visualization(), self.folder, "x")
        still = np.asarray(Image.open(self.folder / "x.png"))
        scale = round(images.MIN_SIDE / 16)
        self.assertEqual(still.shape[1], images.ROW_NAME_WIDTH + 2 * (24 * scale + images.GAP))
        first = still[-scale * 16 - images.GAP, images.ROW_NAME_WIDTH]  # of the last row of frames
        self.assertEqual(first.tolist(), visualization().columns["original"][3, 0, 0].tolist())
        with Image.open(self.folder / "x.gif") as animation:
            self.assertEqual((animation.format, animation.n_frames), ("GIF", 4))

    def test_a_dollar_in_a_class_name_is_no_formula(self):
        names = ["$\\frac$", "100 $ a_b $"]
        predictions = Predictions(np.arange(2), np.arange(2), np.eye(2, dtype=np.float32), [*"ab"], class_names=names)
        self.assertGreater(min(confusion_image(predictions, "$x_$, step 3").size), 300)


class Progress(unittest.TestCase):
    def line(self, width: int, total: int, seconds: float) -> tuple[ProgressLine, io.StringIO]:
        out = io.StringIO()
        return ProgressLine(total, 0, Console(file=out, width=width), seconds), out

    def test_plain_lines_without_a_terminal(self):
        line, out = self.line(40, 10, seconds=0)
        line.step(0, 2, 5, STEP)
        line.close()
        text = "epoch 1/2  step 5/10  loss 0.5000  12.0 clips/s  waiting for data 25%  1.5 GB  40% of the peak  ETA "
        self.assertTrue(out.getvalue().startswith(text), out.getvalue())
        self.assertEqual(out.getvalue().count("\n"), 1, "one line however narrow the window")
        line, out = self.line(200, 5, seconds=1000)
        for step in range(1, 6):
            line.step(0, 1, step, STEP)
        self.assertEqual([text.split("step ")[1][:3] for text in out.getvalue().splitlines()], ["1/5", "5/5"])

    def test_a_warning_when_steps_wait_for_data(self):
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
