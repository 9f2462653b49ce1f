"""What a run reports: the metrics log, visualizations, the progress line."""

import io
import json
import tempfile
import unittest
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from omnivision.reporting import images as pictures
from omnivision.reporting.console import DataStallWarning, ProgressLine
from omnivision.reporting.logs import MetricsLog, read_lines
from omnivision.reporting.predictions import confusion_image
from omnivision.reporting.reporter import Reporter
from omnivision.reporting.run_directory import RunDir
from omnivision.tasks.base import Visualization


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

    def test_rewinding_forgets_later_steps_and_a_cut_last_line(self):
        log = MetricsLog(self.folder / "m.jsonl")
        for step in range(1, 6):
            log.write("step", "train", 0, step)
        with open(log.path, "a") as file:
            file.write('{"event": "st')
        log.truncate_after(3)
        self.assertEqual([line["step"] for line in read_lines(log.path)], [1, 2, 3])
        log.write("step", "train", 0, 4)
        self.assertEqual([line["step"] for line in read_lines(log.path)], [1, 2, 3, 4])

    def test_a_phase_that_is_done_again_is_told_once(self):
        log = MetricsLog(self.folder / "m.jsonl")
        log.write("epoch", "val", 0, 1)
        log.write("epoch", "train", 1, 2)
        log.write("epoch", "val", 1, 2)
        log.truncate_after(2, "val")
        self.assertEqual([(line["phase"], line["step"]) for line in read_lines(log.path)], [("val", 1), ("train", 2)])

    def test_a_damaged_line_in_the_middle_is_left_out(self):
        log = MetricsLog(self.folder / "m.jsonl")
        for step in (1, 2, 3):
            log.write("step", "train", 0, step)
        first, _, last = log.path.read_bytes().splitlines(keepends=True)
        for damage in (b"\xff\xfe{", b"[1, 2]", b'{"event": "step"}', b'{"step": "two"}', b"null", b""):
            with self.subTest(damage):
                log.path.write_bytes(first + damage + b"\n" + last)
                log.truncate_after(3)
                self.assertEqual([line["step"] for line in read_lines(log.path)], [1, 3])


def some_pictures() -> Visualization:
    ramp = np.linspace(0, 255, 4 * 16 * 24 * 3).astype(np.uint8).reshape(4, 16, 24, 3)
    return Visualization(
        {"original": ramp, "a caption that is too long for its column of the picture": 255 - ramp}, [0, 3]
    )


class Seen(Folder):
    def test_stills_and_moving_pictures(self):
        pictures.save(some_pictures(), self.folder, "x")
        still = np.asarray(Image.open(self.folder / "x.png"))
        scale = round(pictures.MIN_SIDE / 16)
        self.assertEqual(still.shape[1], 62 + 2 * (24 * scale + pictures.GAP))
        first = some_pictures().columns["original"][0]
        row = np.flatnonzero((still[:, 62:, :] != 255).any((1, 2)))
        self.assertGreater(len(row), 2 * 16 * scale)
        self.assertTrue(
            (still[-scale * 16 - pictures.GAP, 62] == some_pictures().columns["original"][3, 0, 0]).all(), first
        )
        moving = Image.open(self.folder / "x.gif")
        self.assertEqual((moving.format, moving.n_frames), ("GIF", 4))

    def test_tensorboard_gets_scalars_and_the_moving_picture(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        reporter = Reporter(RunDir(self.folder), enabled=True, console=Console(file=io.StringIO()))
        (self.folder / "logs").mkdir()
        reporter.start(0, 10)
        reporter.step(0, 1, 1, {"loss": 2.0, "lr": 0.1, "grad_norm": 3.0, "clips_per_second": 4.0, "data_wait": 0.25})
        reporter.epoch("val", 0, 1, {"loss": 1.0, "per_source": {"a": {"loss": 1.0}}})
        reporter.visualization("x", some_pictures(), 1)
        reporter.close()
        events = EventAccumulator(str(self.folder / "tensorboard"))
        events.Reload()
        self.assertLessEqual({"train/lr", "train/grad_norm", "val_epoch/loss"}, set(events.Tags()["scalars"]))
        self.assertTrue(events.Images("pictures")[0].encoded_image_string.startswith(b"GIF89a"))

    def test_other_processes_are_silent(self):
        out = io.StringIO()
        reporter = Reporter(RunDir(self.folder), enabled=False, console=Console(file=out))
        reporter.start(0, 10)
        reporter.info("hello")
        reporter.step(0, 1, 1, {"loss": 2.0})
        reporter.epoch("train", 0, 1, {"loss": 2.0})
        reporter.close()
        self.assertEqual((out.getvalue(), list(self.folder.iterdir())), ("", []))


class Confused(unittest.TestCase):
    def test_a_dollar_in_a_name_is_no_formula(self):
        names = ["$\\frac$", "100 $ a_b $"]
        picture = confusion_image(np.array([[2, 1], [0, 3]]), names, "$x_$, step 3")
        self.assertGreater(min(picture.size), 300)


class Progress(unittest.TestCase):
    def test_plain_lines_where_there_is_no_terminal(self):
        out = io.StringIO()
        line = ProgressLine(10, 0, Console(file=out, width=40), seconds_between_lines=0)
        line.step(0, 2, 5, {"loss": 0.5, "clips_per_second": 12.0, "data_wait": 0.25, "memory_gb": 1.5, "mfu": 0.4})
        line.close()
        text = "epoch 1/2  step 5/10  loss 0.5000  12.0 clips/s  waiting for data 25%  1.5 GB  40% of the peak  ETA "
        self.assertTrue(out.getvalue().startswith(text), out.getvalue())
        self.assertEqual(out.getvalue().count("\n"), 1, "one line however narrow the window")

    def test_lines_are_not_printed_more_often_than_asked_but_the_last_one_is(self):
        out = io.StringIO()
        line = ProgressLine(5, 0, Console(file=out, width=200), seconds_between_lines=1000)
        for step in range(1, 6):
            line.step(0, 1, step, {"loss": 0.5, "clips_per_second": 1.0, "data_wait": 0.0})
        self.assertEqual([text.split("step ")[1][:3] for text in out.getvalue().splitlines()], ["1/5", "5/5"])

    def test_a_verdict_when_data_starves_the_step(self):
        starvation = DataStallWarning()
        self.assertEqual(
            [starvation.update(share) for share in (0.9, 0.8, 0.2, 0.1, 0.0)][:4], [None] * 4, "the first are late"
        )
        self.assertEqual([DataStallWarning().update(0.9) for _ in range(4)], [None] * 4)
        starvation = DataStallWarning()
        self.assertEqual(
            [starvation.update(share) for share in (0.99, 0.8, 0.2, 0.2, 0.2, 0.2)], [None] * 6, "a slow start"
        )
        starvation = DataStallWarning()
        said = [starvation.update(0.61) for _ in range(20)]
        self.assertEqual([text is not None for text in said], [place == 4 for place in range(20)], "once")
        self.assertRegex(said[4], "61%.*num_workers.*omnivision prepare")
        starvation = DataStallWarning()
        self.assertEqual([starvation.update(0.1) for _ in range(20)], [None] * 20)

    def test_a_bar_on_a_terminal(self):
        out = io.StringIO()
        line = ProgressLine(10, 2, Console(file=out, width=150, force_terminal=True))
        line.step(0, 2, 5, {"loss": 0.5, "clips_per_second": 12.0, "data_wait": 0.25, "memory_gb": 1.5, "mfu": 0.4})
        line.close()
        self.assertIn("5/10", out.getvalue())
        self.assertIn("waiting for data 25%", out.getvalue())


if __name__ == "__main__":
    unittest.main()
