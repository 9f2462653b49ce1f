"""What a run tells: the metrics log, the run folder and its lock, pictures, the progress line."""

import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image
from rich.console import Console

from omnivision.reporting import images as pictures
from omnivision.reporting.console import DataStallWarning, ProgressLine
from omnivision.reporting.logs import MetricsLog, read_lines
from omnivision.reporting.predictions import confusion_image
from omnivision.reporting.reporter import Reporter
from omnivision.reporting.run_directory import RunDir, finite, host_id, process_start
from omnivision.tasks.base import Visualization
from omnivision.utils.errors import UserError
from omnivision.utils.io import remove_stale_tmp


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

    def test_finite(self):
        self.assertEqual(finite((1, float("nan"), {"x": float("inf")})), [1, None, {"x": None}])


class Summary(Folder):
    def test_what_is_no_summary_is_replaced(self):
        folder = RunDir(self.folder)
        for damage in (b"", b"{", b"[]", b"[1]", b"null", b"\xff\xfe"):
            with self.subTest(damage):
                (self.folder / "summary.json").write_bytes(damage)
                self.assertEqual(folder.read_summary(), {})
                folder.write_summary(status="running")
                self.assertEqual(folder.read_summary(), {"status": "running"})

    def test_a_run_that_was_killed_is_told_by_its_launcher_but_a_live_or_ended_one_is_not(self):
        folder = RunDir(self.folder)
        folder.write_summary(status="finished", exit_reason="all epochs done")
        folder.note_silent_end("killed", interrupted=False)
        self.assertEqual(folder.read_summary()["status"], "finished")
        folder.write_summary(status="running", exit_reason=None)
        folder.lock()
        folder.note_silent_end("killed", interrupted=False)
        self.assertEqual(folder.read_summary()["status"], "running")
        folder.unlock()
        folder.note_silent_end("killed", interrupted=False)
        self.assertEqual(folder.read_summary(), {"status": "failed", "exit_reason": "killed", "last_lines": []})
        folder.write_summary(status="running", exit_reason=None)
        folder.note_silent_end("ended by SIGTERM", interrupted=True)
        self.assertEqual(folder.read_summary()["status"], "interrupted")


class Checkpoints(Folder):
    def test_a_folder_of_checkpoints_elsewhere_is_of_one_run(self):
        shared = self.folder / "shared"
        one, two = (RunDir(self.folder / name, shared) for name in ("one", "two"))
        for folder in (one, two):
            folder.create()
        for _ in range(2):
            one.claim_checkpoint_dir()
        with self.assertRaisesRegex(UserError, r"/one, .*save_dir"):
            two.claim_checkpoint_dir()
        inside = RunDir(self.folder / "three")
        inside.create()
        inside.claim_checkpoint_dir()
        self.assertEqual(list(inside.checkpoints.iterdir()), [])


class Lock(Folder):
    def test_only_one_live_holder(self):
        first, second = RunDir(self.folder), RunDir(self.folder)
        self.assertIsNone(first.lock())
        with self.assertRaisesRegex(UserError, f"in use by process {os.getpid()}"):
            second.lock()
        first.unlock()
        self.assertIsNone(second.lock())
        second.unlock()
        self.assertFalse((self.folder / ".lock").exists())

    def test_the_lock_of_a_dead_process_is_taken_over(self):
        dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
        holder = {"token": "x", "host": "here", "machine": host_id(), "pid": int(dead.stdout), "started": 1}
        (self.folder / ".lock").write_text(json.dumps(holder))
        folder = RunDir(self.folder)
        self.assertIn("Took over the lock", folder.lock())
        folder.unlock()

    def test_a_reused_process_id_is_not_the_holder(self):
        holder = {
            "token": "x",
            "machine": host_id(),
            "pid": os.getpid(),
            "started": process_start(os.getpid()) - 1,
        }
        (self.folder / ".lock").write_text(json.dumps(holder))
        folder = RunDir(self.folder)
        self.assertIsNotNone(folder.lock())
        folder.unlock()

    def test_another_machines_heartbeat_decides(self):
        """Another container of this machine counts as one: what has our number there is another process."""
        lock = self.folder / ".lock"
        for elsewhere in ({"host": "elsewhere"}, {"host": os.uname().nodename, "machine": "another container"}):
            lock.write_text(json.dumps({"token": "x", "pid": 1, "started": 1} | elsewhere))
            folder = RunDir(self.folder)
            with self.assertRaises(UserError):
                folder.lock()
            os.utime(lock, (1, 1))
            self.assertIsNotNone(folder.lock())
            folder.unlock()

    def test_one_that_has_lost_the_folder_writes_nothing_more(self):
        folder = RunDir(self.folder)
        folder.create()
        folder.lock()
        folder.write_summary(status="running")
        reporter = Reporter(folder, enabled=True, console=Console(file=io.StringIO()))
        reporter.start(0, 9)
        self.addCleanup(reporter.close)
        (self.folder / ".lock").write_text(json.dumps({"token": "another's", "host": "elsewhere", "pid": 1}))
        reporter.step(0, 1, 1, {"loss": 1.0, "clips_per_second": 1.0, "data_wait": 0.0})
        reporter.epoch("train", 0, 1, {"loss": 1.0})
        reporter.visualization("x", some_pictures(), 1)
        folder.write_end("failed", "lost")
        self.assertEqual(list(folder.pictures.iterdir()), [])
        self.assertFalse((folder.logs / "metrics.jsonl").exists())
        self.assertEqual(folder.read_summary(), {"status": "running"})
        folder.unlock()
        self.assertTrue((self.folder / ".lock").exists())

    def test_what_is_no_file_where_a_run_writes_one(self):
        for name in ("summary.json", ".lock", "logs/metrics.jsonl"):
            for make in (Path.mkdir, os.mkfifo):
                folder = self.folder / f"{name.replace('/', '_')}_{make.__name__}"
                (folder / name).parent.mkdir(parents=True)
                make(folder / name)
                with self.assertRaisesRegex(UserError, f"{name}.*experiment_log_dir"):
                    RunDir(folder).create()
        (self.folder / "tensorboard").write_text("")
        self.assertRaisesRegex(UserError, "cannot be written", RunDir(self.folder).create)

    def test_a_lock_that_is_nothing_but_brackets(self):
        (self.folder / ".lock").write_text("[" * 100_000)
        folder = RunDir(self.folder)
        self.assertIn("an unknown process", folder.lock())
        folder.unlock()

    def test_an_unreadable_lock_is_taken_over_and_a_stolen_one_is_not_removed(self):
        (self.folder / ".lock").write_text("{")
        folder = RunDir(self.folder)
        folder.lock()
        (self.folder / ".lock").write_text(json.dumps({"token": "another's"}))
        folder.unlock()
        self.assertTrue((self.folder / ".lock").exists())

    def test_only_one_of_many_takes_over_a_stale_lock(self):
        for _ in range(20):
            (self.folder / ".lock").write_text(json.dumps({"token": "x", "host": "elsewhere", "pid": 1}))
            os.utime(self.folder / ".lock", (1, 1))
            folders = [RunDir(self.folder) for _ in range(4)]
            outcomes: list[str] = []

            def take(folder: RunDir, outcomes: list[str] = outcomes) -> None:
                try:
                    folder.lock()
                    outcomes.append("taken")
                except UserError:
                    outcomes.append("refused")

            threads = [threading.Thread(target=take, args=(folder,)) for folder in folders]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(sorted(outcomes), ["refused"] * 3 + ["taken"])
            for folder in folders:
                folder.unlock()
            self.assertFalse((self.folder / ".lock").exists())

    def test_where_the_file_system_has_no_locks(self):
        with mock.patch("fcntl.flock", side_effect=OSError):
            first = RunDir(self.folder)
            first.lock()
            with self.assertRaises(UserError):
                RunDir(self.folder).lock()
            first.unlock()

    def test_leftovers_of_a_killed_writer_are_removed(self):
        (self.folder / ".checkpoint.pt.123.tmp").write_text("half")
        (self.folder / "checkpoint.pt").write_text("whole")
        remove_stale_tmp(self.folder)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["checkpoint.pt"])

    def test_summary_is_updated(self):
        folder = RunDir(self.folder)
        folder.write_summary(status="running", loss=float("nan"))
        folder.write_summary(status="finished")
        self.assertEqual(folder.read_summary(), {"status": "finished", "loss": None})

    def test_a_folder_that_cannot_be_made(self):
        (self.folder / "file").write_text("")
        with self.assertRaisesRegex(UserError, "launcher.experiment_log_dir"):
            RunDir(self.folder / "file" / "run").create()


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
