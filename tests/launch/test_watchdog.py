"""Processes that hang: blocked ones that were asked to stop, suspended ones, and data workers that are killed or hang."""

import contextlib
import io
import json
import os
import signal
import subprocess
import threading
import time
import unittest
from collections.abc import Callable
from unittest import mock

import torch
import torch.distributed as dist

from omnivision.launch.exit import ExitHandler
from omnivision.launch.watchdog import PeerMonitor, Watchdog, as_peer_lost
from omnivision.reporting.run_directory import RunDir
from omnivision.utils.errors import EXIT_SIGINT, PeerLostError, StopRequested
from omnivision.utils.signals import StopSignal
from tests.fixtures import Folder


class Requests(unittest.TestCase):
    """The thread alone; `abort` notes what it was called with."""

    def aborts(self, *signals: int, seconds: float, grace: float = 60.0) -> list:
        stop, calls = StopSignal(), []
        stop.save_seconds = 0.0
        stop.set_phase("saving", 7)
        with stop.handle_signals():
            watchdog = Watchdog(stop, calls.append, grace)
            with watchdog.watching():
                for number in signals:
                    os.kill(os.getpid(), number)
                    time.sleep(1.1)
                time.sleep(seconds)
        return calls

    def test_hanging_process_is_aborted_after_the_grace_period(self):
        with mock.patch("omnivision.utils.signals.EXIT_SECONDS", 0.5):
            self.assertEqual(self.aborts(signal.SIGTERM, seconds=0, grace=3), [])
            error, *_ = self.aborts(signal.SIGUSR2, seconds=1, grace=1.5)
        self.assertIsInstance(error, StopRequested)
        self.assertEqual(error.cause, "SIGUSR2")
        self.assertRegex(error.__notes__[0], "saving, after step 7")

    def test_second_sigterm_aborts_after_a_few_seconds(self):
        with mock.patch("omnivision.launch.watchdog.SECOND_REQUEST_SECONDS", 0.5):
            error, *_ = self.aborts(signal.SIGTERM, signal.SIGTERM, seconds=0.5)
            self.assertEqual(error.cause, "SIGTERM")
            for signals in (
                (signal.SIGUSR2, signal.SIGTERM),
                (signal.SIGUSR2, signal.SIGUSR2),
            ):  # one request of SLURM's
                self.assertEqual(self.aborts(*signals, seconds=0.5), [])

    def test_watchdog_does_nothing_outside_the_main_thread(self):
        thread = threading.Thread(target=lambda: Watchdog(StopSignal(), self.fail, 1).watching().__enter__())
        thread.start()
        thread.join()


class Heartbeats(Folder):
    def peers(self, rank: int, world: int = 3, timeout: float = 40.0, calls: list | None = None) -> PeerMonitor:
        stop = StopSignal()
        stop.set_phase("in a step", 12)
        return PeerMonitor(self.folder, rank, world, stop, timeout, (calls or []).append)

    def test_silent_and_exited_peers_are_found(self):
        others = [self.peers(rank) for rank in (1, 2)]
        main = self.peers(0)
        self.assertIsNone(main.find_dead_peers())
        os.utime(self.folder / "rank_2.alive", (time.time() - 50, time.time() - 50))
        silent = main.find_dead_peers()
        self.assertRegex(
            str(silent), r"^rank 2 \(pid \d+ on .* for 5\d s; last seen in a step, after step 12, .* rank 0 was"
        )
        self.assertFalse(silent.gone)
        self.assertIsNone(others[0].find_dead_peers(), "it watches rank 0 alone")
        dead = subprocess.Popen(["true"])
        dead.wait()
        file = self.folder / "rank_1.alive"
        beat = json.loads(file.read_text())
        file.write_text(json.dumps(beat | {"pid": dead.pid}))
        gone = main.find_dead_peers()
        self.assertRegex(str(gone), rf"^rank 1 \(pid {dead.pid} on .*\) is gone; .*; rank 2 ")
        self.assertTrue(gone.gone)
        for damage in ("", "[1]", "{"):
            file.write_text(damage)
            self.assertRegex(str(main.find_dead_peers()), "^rank 2 ")

    def test_errors_caused_by_other_ranks_become_peer_lost(self):
        """Gloo's error comes out of the backward pass, as an error of the model may: the heartbeats decide."""

        def raised(action: Callable) -> BaseException:
            try:  # `assertRaises` drops the traceback
                action()
            except RuntimeError as error:
                return error
            raise AssertionError("no error")

        other, main = self.peers(1), self.peers(0, world=2)
        backward, model = raised(torch.ones(1).backward), raised(lambda: torch.ones(1) @ torch.ones(2))
        collective = dist.DistNetworkError("refused")
        for peers in (other, main):
            peers.start()
        for error, peers, lost in (
            (backward, None, False), (backward, main, False), (model, main, False), (ValueError("gloo"), main, False),
            (collective, None, True), (collective, main, True), (RuntimeError("CUDA out of memory"), main, False),
        ):  # fmt: skip
            found = as_peer_lost(error, peers)
            self.assertEqual(isinstance(found, PeerLostError), lost, error)
            self.assertIs(found.__cause__ if lost else found, error)
        other.end()
        for error in (backward, collective):
            self.assertRegex(str(as_peer_lost(error, main)), "^rank 1 has exited")
        self.assertIs(as_peer_lost(model, main), model, "both may fail alike")
        main.end()

    def test_missing_heartbeat_aborts(self):
        calls: list = [None]
        self.peers(1)
        main = self.peers(0, world=2, timeout=0.8, calls=calls)
        main.start()
        deadline = time.monotonic() + 10
        while len(calls) == 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        main.end()
        self.assertIsInstance(calls[1], PeerLostError)

    def test_ranks_suspended_together_continue(self):
        calls: list = [None]
        other = self.peers(1)
        main = self.peers(0, world=2, timeout=0.8, calls=calls)
        old = time.time() - 99
        os.utime(self.folder / "rank_1.alive", (old, old))
        main.start()
        time.sleep(0.3)  # it has looked once
        for _ in range(12):
            other._beat()
            time.sleep(0.1)
        main.end()
        self.assertEqual(calls, [None])
        self.assertFalse((self.folder / "rank_0.alive").exists())

    def test_single_rank_writes_no_heartbeat(self):
        self.peers(0, world=1).start()
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_ctrl_c_that_ends_another_rank_first_is_ctrl_c(self):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, before)
        settings = mock.MagicMock(**{"submitit.signal_delay_s": None})
        handler = ExitHandler(RunDir(self.folder), 0, settings, None, world_size=2)
        handler.peers = self.peers(0, world=2)
        with contextlib.redirect_stderr(io.StringIO()), handler.supervise():
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            raise PeerLostError("rank 1 is gone", gone=True)
        self.assertEqual(handler.exit_code, EXIT_SIGINT)

    def test_abort_exits_despite_file_system_errors(self):
        run = RunDir(self.folder)
        run.create()
        run.lock()
        handler = ExitHandler(run, 0, mock.MagicMock(**{"submitit.signal_delay_s": None}), None)
        handler.locked = True
        with (
            mock.patch("os._exit") as exited,
            mock.patch.object(RunDir, "lock_lost", side_effect=OSError(116, "Stale file handle")),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.suppress(OSError),  # `os._exit` would not have come back
        ):
            handler.abort(StopRequested("SIGTERM"))
        exited.assert_called_once_with(143)
        run.unlock()


if __name__ == "__main__":
    unittest.main()
