"""Dist that stand still: blocked ones that were asked to stop, stopped ones, and data workers that are killed or hang."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

from omnivision.launch.exit import ExitHandler
from omnivision.launch.watchdog import PeerMonitor, Watchdog
from omnivision.reporting.run_directory import RunDir
from omnivision.utils.errors import PeerLostError, StopRequested
from omnivision.utils.signals import StopSignal
from tests import runs
from tests.test_launch import children


class Asked(unittest.TestCase):
    """The thread alone; `leave` notes what it was called with."""

    def leaves(self, *signals: int, seconds: float, grace: float = 60.0, answered: bool = False) -> list:
        stop, left = StopSignal(), []
        stop.save_seconds, stop.doing, stop.step = 0.0, "saving", 7
        with stop.handle_signals():
            watchdog = Watchdog(stop, lambda *given: left.append(given), grace)
            with watchdog.watching():
                for number in signals:
                    os.kill(os.getpid(), number)
                    time.sleep(1.1)
                watchdog.answered = answered
                time.sleep(seconds)
        return left

    def test_within_the_grace_nothing_happens_and_then_it_leaves(self):
        with mock.patch("omnivision.utils.signals.LEAVE_SECONDS", 0.5):
            self.assertEqual(self.leaves(signal.SIGTERM, seconds=0, grace=3), [])
            self.assertEqual(self.leaves(signal.SIGTERM, seconds=2, grace=2, answered=True), [], "it is leaving")
            (error, at_once), *_ = self.leaves(signal.SIGUSR2, seconds=1, grace=1.5)
        self.assertIsInstance(error, StopRequested)
        self.assertEqual((error.cause, at_once), ("SIGUSR2", False))
        self.assertRegex(error.__notes__[0], "it had not left . s later, saving, after step 7")

    def test_a_second_sigterm_leaves_it_a_few_seconds(self):
        with mock.patch("omnivision.launch.watchdog.SECOND_REQUEST_SECONDS", 0.5):
            (error, at_once), *_ = self.leaves(signal.SIGTERM, signal.SIGTERM, seconds=0.5, answered=True)
            self.assertEqual((error.cause, at_once), ("SIGTERM", True))
            self.assertEqual(self.leaves(signal.SIGUSR2, signal.SIGTERM, seconds=0.5), [], "SLURM's, of one request")
            self.assertEqual(self.leaves(signal.SIGUSR2, signal.SIGUSR2, seconds=0.5), [], "announced again")

    def test_outside_of_the_main_thread_nothing_is_watched(self):
        thread = threading.Thread(target=lambda: Watchdog(StopSignal(), self.fail, 1).watching().__enter__())
        thread.start()
        thread.join()


class Leaving(unittest.TestCase):
    def test_it_leaves_whatever_the_file_system_says(self):
        with tempfile.TemporaryDirectory() as name:
            folder = RunDir(name)
            folder.create()
            folder.lock()
            ending = ExitHandler(folder, 0, mock.MagicMock(**{"submitit.signal_delay_s": None}), None)
            ending.locked = True
            stale = OSError(116, "Stale file handle")
            with (
                mock.patch("os._exit") as left,
                mock.patch.object(RunDir, "lost", side_effect=stale),
                contextlib.redirect_stderr(io.StringIO()),
                contextlib.suppress(OSError),  # `os._exit` would not have come back
            ):
                ending.abort(StopRequested("SIGTERM"), at_once=True)
            left.assert_called_once_with(143)
            folder.unlock()


class Silence(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def peers(self, rank: int, world: int = 3, timeout: float = 40.0, left: list | None = None) -> PeerMonitor:
        stop = StopSignal()
        stop.set_phase("in a step", 12)
        return PeerMonitor(self.folder, rank, world, stop, timeout, lambda error, _: (left or []).append(error))

    def test_who_is_silent_and_who_is_gone(self):
        others = [self.peers(rank) for rank in (1, 2)]
        main = self.peers(0)
        self.assertIsNone(main.find_dead_peers())
        file = self.folder / "rank_2.alive"
        os.utime(file, (time.time() - 50, time.time() - 50))
        self.assertRegex(
            str(main.find_dead_peers()),
            r"^process 2 \(pid \d+ on .*\) has given no sign of life for 5\d s; last seen in a step, after step 12, 5\d s"
            r" before; process 0 was in a step, after step 12$",
        )
        self.assertIsNone(others[0].find_dead_peers(), "it watches process 0 alone")
        dead = subprocess.Popen(["true"])
        dead.wait()
        said = json.loads((self.folder / "rank_1.alive").read_text())
        (self.folder / "rank_1.alive").write_text(json.dumps(said | {"pid": dead.pid}))
        self.assertRegex(str(main.find_dead_peers()), rf"process 1 \(pid {dead.pid} on .*\) is gone; .*; process 2 ")
        for damage in ("", "[]", "{"):
            (self.folder / "rank_1.alive").write_text(damage)
            self.assertRegex(str(main.find_dead_peers()), "^process 2 ")

    def test_one_that_is_silent_for_too_long_is_told(self):
        left: list = [None]
        self.peers(1)
        main = self.peers(0, world=2, timeout=0.8, left=left)
        main.start()
        deadline = time.monotonic() + 10
        while len(left) == 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        main.end()
        self.assertIsInstance(left[1], PeerLostError)
        self.assertIn("process 1 ", str(left[1]))

    def test_all_that_were_suspended_together_go_on(self):
        left: list = [None]
        other = self.peers(1)
        main = self.peers(0, world=2, timeout=0.8, left=left)
        old = time.time() - 99
        os.utime(self.folder / "rank_1.alive", (old, old))
        main.start()
        time.sleep(0.3)  # it has looked once
        for _ in range(12):
            other._beat()
            time.sleep(0.1)
        main.end()
        self.assertEqual(left, [None])
        self.assertIsNone(main.find_dead_peers(), "it has left itself")
        self.assertFalse((self.folder / "rank_0.alive").exists())

    def test_one_process_writes_nothing(self):
        self.peers(0, world=1).start()
        self.assertEqual(list(self.folder.iterdir()), [])


class Runs(unittest.TestCase):
    """Runs as a user starts them, and what is done to their processes."""

    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.data = runs.write_split(self.folder, runs.real_films() * 40)

    def started(self, *overrides: str) -> subprocess.Popen[str]:
        command = runs.command(
            self.folder / "run", *self.data, "epochs=50", "trainer.checkpoint.save_every_steps=1", *overrides
        )
        process = subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        log, deadline = self.folder / "run/logs/metrics.jsonl", time.monotonic() + 200
        while not (log.exists() and '"step": 3,' in log.read_text()):
            self.assertIsNone(process.poll())
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.05)
        return process

    def assert_ended(self, process: subprocess.Popen[str], within: float, code: int, reason: str) -> float:
        began = time.monotonic()
        self.assertEqual(process.wait(timeout=within), code)
        took = time.monotonic() - began
        self.assertRegex(runs.summary(self.folder / "run")["exit_reason"], reason)
        deadline = time.monotonic() + 10
        while left := [line for line in self.of_the_run() if line != process.pid]:
            self.assertLess(time.monotonic(), deadline, left)
            time.sleep(0.1)
        return took

    def of_the_run(self) -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if str(self.folder) in entry.read_text():
                    found.append(int(entry.parent.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found

    def test_a_stopped_process_is_named_with_what_it_did(self):
        process = self.started("launcher.gpus_per_node=2", "trainer.distributed.timeout_minutes=0.1")
        main, other = children(process.pid)
        os.kill(other, signal.SIGSTOP)
        self.assert_ended(
            process,
            40,
            70,
            rf"process 1 \(pid {other} on .*\) has given no sign of life for .* s; last seen .*, after step \d",
        )
        self.assertFalse(Path(f"/proc/{other}").exists() or Path(f"/proc/{main}").exists())

    def test_sigterm_ends_a_process_that_is_blocked_in_a_collective_operation(self):
        process = self.started("launcher.gpus_per_node=2", "submitit.signal_delay_s=null")
        main, other = children(process.pid)
        os.kill(other, signal.SIGSTOP)
        time.sleep(1)
        os.kill(main, signal.SIGTERM)
        time.sleep(1.5)
        os.kill(main, signal.SIGTERM)
        began = time.monotonic()
        while Path(f"/proc/{main}").exists() and Path(f"/proc/{main}/cmdline").read_bytes():
            self.assertLess(time.monotonic() - began, 6, "a second signal leaves it 5 s")
            time.sleep(0.05)
        self.assertRegex(
            runs.summary(self.folder / "run")["exit_reason"],
            r"ended by SIGTERM; it had not left . s later, (in a step|saving), after step \d+; what each thread",
        )
        # Gradients are reduced within the backward pass.
        stacks = (self.folder / "run/logs/rank_0_stacks.txt").read_text()
        self.assertRegex(stacks, "all_(reduce|gather)|in _engine_run_backward")
        process.kill()

    def test_a_killed_process_is_told_within_seconds(self):
        process = self.started("launcher.gpus_per_node=2")
        _, other = children(process.pid)
        os.kill(other, signal.SIGKILL)
        self.assert_ended(process, 15, 70, "process 1 was killed by SIGKILL.*after step")

    def test_a_killed_data_worker_and_one_that_hangs(self):
        for number, code, saying in (
            (signal.SIGKILL, 70, "trainer.data.prefetch"),
            (signal.SIGSTOP, 70, "0.1 minutes .*trainer.data.timeout_minutes"),
        ):
            process = self.started("num_workers=1", "trainer.data.timeout_minutes=0.1")
            [server] = children(process.pid, "forkserver")
            [worker] = children(server, "forkserver")
            os.kill(worker, number)
            self.assert_ended(process, 30, code, rf"{saying}.*\.mp4")
            self.assertNotIn("Traceback", process.stderr.read())
            shutil.rmtree(self.folder / "run")


if __name__ == "__main__":
    unittest.main()
