"""Being asked to stop: by signals, and by the end of a job's time."""

import os
import signal
import subprocess
import sys
import time
import unittest
from unittest import mock

from omnivision.utils import signals
from omnivision.utils.errors import StopRequested
from omnivision.utils.signals import TIME_LIMIT, StopSignal, signals_blocked, signals_ignored
from tests import runs


class Signals(unittest.TestCase):
    @staticmethod
    def send(*numbers: int) -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    def test_signal_raises_at_startup_and_is_recorded_while_training(self):
        for number, name, code in ((signal.SIGTERM, "SIGTERM", 143), (signal.SIGUSR2, "SIGUSR2", 140)):
            stop = StopSignal()
            with stop.handle_signals():
                stop.raise_on_signal()
                with self.assertRaises(StopRequested) as ended:
                    self.send(number)
                self.assertEqual((ended.exception.cause, ended.exception.exit_code), (name, code))
                self.send(signal.SIGUSR2, signal.SIGTERM)  # what the process does about the first is not interrupted
                self.assertRaises(StopRequested, stop.record_only)
            stop = StopSignal()
            with stop.handle_signals():
                stop.raise_on_signal()
                stop.record_only()
                self.assertIsNone(stop.cause)
                self.send(number)
                self.assertEqual(stop.cause, name)
        self.assertEqual(signal.getsignal(signal.SIGTERM), signal.SIG_DFL)

    def test_signals_within_a_second_count_once_and_a_later_sigterm_raises(self):
        for received, cause, last in (
            ([(100.0, signal.SIGTERM), (100.9, signal.SIGTERM)], "SIGTERM", 101.1),
            ([(100.0, signal.SIGUSR2), (130.0, signal.SIGTERM), (130.5, signal.SIGUSR2)], "SIGUSR2", None),
        ):
            stop = StopSignal()
            with stop.handle_signals(), mock.patch.object(signals.time, "monotonic") as clock:
                stop.raise_on_signal()
                stop.record_only()
                for clock.return_value, number in received:
                    self.send(number)
                self.assertEqual(stop.cause, cause)
                if last is not None:
                    clock.return_value = last
                    self.assertRaises(StopRequested, self.send, signal.SIGTERM)

    def test_signal_before_raise_on_signal_is_raised_once(self):
        stop = StopSignal()
        with stop.handle_signals():
            self.send(signal.SIGTERM)
            with self.assertRaisesRegex(StopRequested, "SIGTERM"):
                stop.raise_on_signal()
            stop.raise_on_signal()

    def test_signals_after_exit_are_ignored(self):
        code = (
            "import os, signal; from omnivision.utils.signals import StopSignal\n"
            "with StopSignal().handle_signals(ignore_after=True): pass\n"
            "for number in (signal.SIGTERM, signal.SIGUSR2): os.kill(os.getpid(), number)"
        )
        self.assertEqual(subprocess.run([sys.executable, "-c", code]).returncode, 0)

    def test_ignored_signals_do_not_interrupt_the_block_or_its_children(self):
        with signals_ignored():
            self.send(signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
            child = subprocess.run(["sh", "-c", "kill -TERM $$; echo survived"], capture_output=True, text=True)
        self.assertEqual(child.stdout, "survived\n")

    def test_blocked_signals_arrive_after_the_block_and_never_reach_children(self):
        code = (
            "import os, signal; os.kill(os.getpid(), signal.SIGUSR2); os.kill(os.getpid(), signal.SIGTERM); "
            "print('survived')"
        )
        stop = StopSignal()
        with stop.handle_signals():
            stop.raise_on_signal()
            stop.record_only()
            with signals_blocked():
                self.send(signal.SIGUSR2)
                child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            self.assertEqual(child.stdout, "survived\n", child.stderr)
            self.assertEqual(stop.cause, "SIGUSR2", "this process hears afterwards")

    def test_sighup_stops_a_run_unless_nohup_ignores_it(self):
        code = (
            "import os, signal, sys\n"
            "signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))\n"  # as nohup, which these tests may run under
            "from omnivision.utils.errors import StopRequested\n"
            "from omnivision.utils.signals import StopSignal\n"
            "stop = StopSignal()\n"
            "with stop.handle_signals():\n"
            "    stop.record_only()\n"
            "    os.kill(os.getpid(), signal.SIGHUP)\n"
            "    print(stop.cause, stop.cause and StopRequested(stop.cause).exit_code)"
        )
        for before, output in (("SIG_DFL", "SIGHUP 129"), ("SIG_IGN", "None None")):
            result = subprocess.run([sys.executable, "-c", code, before], capture_output=True, text=True, cwd=runs.ROOT)
            self.assertEqual(result.stdout.strip(), output, result.stderr)


class Clock(unittest.TestCase):
    def test_stops_when_remaining_time_equals_reserved_seconds(self):
        stop = StopSignal()
        with mock.patch.object(signals.time, "time") as now:
            now.return_value = 1000.0
            stop.set_deadline(5000.0)
            stop.update_step_time(4.0)
            stop.save_seconds = 11.0
            self.assertEqual(stop.reserved_seconds, 2 * (4 + 11) + 10)
            now.return_value = 4959.0
            self.assertIsNone(stop.cause)
            now.return_value = 4961.0
            self.assertEqual(stop.cause, TIME_LIMIT)
            stop.save_seconds = 0.1
            self.assertEqual(stop.cause, TIME_LIMIT, "all processes must find the same when they look again")

    def test_short_deadline_leaves_time_to_train(self):
        stop = StopSignal()
        self.assertIsNone(stop.cause, "without a deadline it never comes")
        stop.set_deadline(time.time() + 20)
        self.assertIsNone(stop.cause)
        self.assertLessEqual(stop.reserved_seconds, 10)

    def test_step_time_is_a_decaying_maximum(self):
        stop = StopSignal()
        for seconds in (1.0, 9.0, *[1.0] * 100):
            stop.update_step_time(seconds)
        self.assertLess(stop.step_seconds, 4)
        self.assertGreater(stop.step_seconds, 1)


if __name__ == "__main__":
    unittest.main()
