"""The run directory: its lock, its summary, and who owns a directory of checkpoints."""

import json
import os
import subprocess
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

from omnivision.reporting.run_directory import RunDir, host_id, process_start
from omnivision.utils.errors import UserError
from omnivision.utils.io import remove_stale_tmp
from tests import fixtures


class Folder(fixtures.Folder):
    def setUp(self):
        super().setUp()
        self.lock = self.folder / ".lock"
        self.run_dir = RunDir(self.folder)

    def locked_by(self, age: float = 0.0, **holder: object) -> None:
        """A lock of another process, by default on another machine."""
        self.lock.write_text(json.dumps({"token": "x", "host": "elsewhere", "pid": 1} | holder))
        os.utime(self.lock, (time.time() - age, time.time() - age))

    def assert_taken_over(self) -> None:
        run = RunDir(self.folder)
        self.assertIsNotNone(run.lock())
        run.unlock()
        self.assertFalse(self.lock.exists())


class Summary(Folder):
    def test_summary_is_updated_and_an_invalid_one_replaced(self):
        for damage in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"status": ["queued"]}', b'{"job": "x"}'):
            with self.subTest(damage):
                (self.folder / "summary.json").write_bytes(damage)
                self.assertEqual(self.run_dir.read_summary(), {})
                self.run_dir.write_summary(status="running", loss=float("nan"))
                self.run_dir.write_summary(status="finished")
                self.assertEqual(self.run_dir.read_summary(), {"status": "finished", "loss": None})

    def test_unreadable_summary_is_not_replaced(self):
        self.run_dir.write_summary(status="running", run={"epochs": 3})
        with mock.patch.object(Path, "read_text", side_effect=OSError(116, "Stale file handle")):
            self.assertEqual(self.run_dir.read_summary(), {})
            with self.assertRaises(OSError):
                self.run_dir.write_summary(status="finished")
        self.assertEqual(self.run_dir.read_summary()["run"], {"epochs": 3})

    def test_killed_run_is_recorded_unless_it_ended_or_another_is_alive(self):
        for before, locked, interrupted, after in (
            ("finished", False, False, "finished"), ("running", True, False, "running"),
            ("running", False, False, "failed"), ("running", False, True, "interrupted"),
        ):  # fmt: skip
            with self.subTest(before=before, locked=locked, interrupted=interrupted):
                run = RunDir(self.folder)
                run.write_summary(status=before, exit_reason=None)
                if locked:
                    run.lock()
                run.record_unreported_exit("killed", interrupted=interrupted, killed=True)
                summary = run.read_summary()
                self.assertEqual(summary["status"], after)
                self.assertEqual(summary["exit_reason"], None if before == after else "killed")
                run.unlock()
        RunDir(self.folder / "never").record_unreported_exit("killed", interrupted=True, killed=True)
        self.assertFalse((self.folder / "never").exists())


class Directories(Folder):
    def test_checkpoint_directory_belongs_to_one_run(self):
        one, two = (RunDir(self.folder / name, self.folder / "shared") for name in ("one", "two"))
        inside = RunDir(self.folder / "three")
        for run in (one, two, inside):
            run.create()
        for run in (one, one, inside):
            run.claim_checkpoint_dir()
        self.assertEqual(list(inside.checkpoints.iterdir()), [])
        with self.assertRaisesRegex(UserError, "/one.*trainer.checkpoint.save_dir"):
            two.claim_checkpoint_dir()

    def test_unwritable_directories_are_refused(self):
        (self.folder / "tensorboard").write_text("")
        for run in (self.run_dir, RunDir(self.folder / "tensorboard" / "run")):
            self.assertRaisesRegex(UserError, "launcher.experiment_log_dir", run.create)

    def test_folder_in_place_of_a_file_is_refused(self):
        (self.folder / "summary.json").mkdir()
        self.assertRaisesRegex(UserError, "/summary.json", self.run_dir.create)

    def test_temporary_files_of_a_killed_writer_are_removed(self):
        (self.folder / ".checkpoint.pt.123.tmp").write_text("half")
        (self.folder / "checkpoint.pt").write_text("complete")
        remove_stale_tmp(self.folder)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["checkpoint.pt"])


class Lock(Folder):
    def test_only_one_live_holder(self):
        for file_system_locks in (None, OSError):
            with self.subTest(file_system_locks), mock.patch("fcntl.flock", side_effect=file_system_locks):
                run = RunDir(self.folder)
                self.assertIsNone(run.lock())
                with self.assertRaisesRegex(UserError, f"{os.getpid()}.*launcher.experiment_log_dir"):
                    self.run_dir.lock()
                run.unlock()
                self.assertFalse(self.lock.exists())

    def test_locks_of_ended_processes_are_taken_over(self):
        dead = subprocess.Popen(["true"])
        dead.wait()
        for holder in (
            {"pid": dead.pid, "started": 1},
            {"pid": os.getpid(), "started": process_start(os.getpid()) - 1},  # a reused id
        ):
            self.locked_by(machine=host_id(), **holder)
            self.assert_taken_over()
        self.lock.write_text("{")
        self.run_dir.lock()
        self.locked_by(token="another's")
        self.run_dir.unlock()
        self.assertTrue(self.lock.exists(), "one that was taken over is not removed")

    def test_lock_of_another_host_is_valid_while_its_heartbeat_is_recent(self):
        """Another container of this machine counts as one: the same process id there is another process."""
        for elsewhere in ({}, {"host": os.uname().nodename, "machine": "another container"}):
            self.locked_by(**elsewhere)
            self.assertRaises(UserError, self.run_dir.lock)
            self.locked_by(age=99, **elsewhere)
            with mock.patch("tempfile.NamedTemporaryFile", side_effect=PermissionError):
                self.assertTrue(self.run_dir.holder_message(), "the clock of another machine does not count")
            self.assert_taken_over()

    def test_earlier_start_of_the_same_job_does_not_hold_the_lock(self):
        with mock.patch.dict(os.environ, SLURM_JOB_ID="77"):
            self.run_dir.lock()
        self.addCleanup(self.run_dir.unlock)
        for job, restarts, free in (("77", "1", True), ("77", "0", False), ("78", "1", False)):
            with mock.patch.dict(os.environ, SLURM_JOB_ID=job, SLURM_RESTART_COUNT=restarts):
                self.assertEqual(self.run_dir.holder_message() is None, free, (job, restarts))

    def test_a_job_waits_for_the_lock(self):
        self.run_dir.lock()
        release = threading.Timer(0.4, self.run_dir.unlock)
        release.start()
        again = RunDir(self.folder)
        with mock.patch("builtins.print"):
            again.lock(timeout=20)
        again.unlock()
        release.join()

    def test_only_one_of_many_takes_over_a_stale_lock(self):
        def take(run: RunDir, outcomes: list[str]) -> None:
            try:
                run.lock()
                outcomes.append("taken")
            except UserError:
                outcomes.append("refused")

        for _ in range(20):
            self.locked_by(age=99)
            runs, outcomes = [RunDir(self.folder) for _ in range(4)], []
            threads = [threading.Thread(target=take, args=(run, outcomes)) for run in runs]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(sorted(outcomes), ["refused"] * 3 + ["taken"])
            for run in runs:
                run.unlock()
            self.assertFalse(self.lock.exists())


if __name__ == "__main__":
    unittest.main()
