"""The `omnivision` command: help without torch, wrong arguments, and how commands end."""

import contextlib
import errno
import io
import subprocess
import sys
import unittest
from unittest import mock

from omnivision.tools.main import COMMANDS, main
from omnivision.utils.errors import EXIT_SIGINT, UserError
from omnivision.utils.streams import SafeStream
from tests.runs import call_command


class Help(unittest.TestCase):
    def test_help_imports_no_torch(self):
        program = (
            "import sys\nfrom omnivision.tools.main import COMMANDS, main\n"
            "for words in [[], ['--help'], *([name, '--help'] for name in COMMANDS)]:\n"
            "    assert main(words) == 0\n"
            "assert 'torch' not in sys.modules\n"
        )
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)
        for name in COMMANDS:
            self.assertIn(f"Usage: omnivision {name}", result.stdout)


class WrongArguments(unittest.TestCase):
    def test_wrong_argument_is_named(self):
        for words, named in (
            (("prediict", "a"), "predict"),
            (("predict", "run"), "VIDEO"),
            (("predict", "run", "a.mp4", "--clip", 3), "--clips"),
            (("predict", "run", "a.mp4", "--top", 2.5), "--top"),
            (("reconstruct", "run", "a.mp4", "x.gif", "--mask-ratio", "nan"), "--mask-ratio"),
            (("export", "run", "x.pt", "--to", "onnx"), "--to"),
            (("export", "run", "x.pt"), "--to"),
        ):
            with self.subTest(words), self.assertRaisesRegex(UserError, named):
                call_command(*words)

    def test_repeated_option_replaces_the_first(self):
        with self.assertRaisesRegex(UserError, "RUN"):  # the option is accepted; the run does not exist
            call_command("predict", "RUN", "a.mp4", "--top", 1, "--top", 2)


class Ends(unittest.TestCase):
    def test_unwritable_output_is_an_error_and_a_closed_pipe_is_not(self):
        for cause, code in ((OSError(errno.ENOSPC, "No space left on device"), 1), (BrokenPipeError(), 0), (None, 0)):
            stream = SafeStream(mock.Mock(write=mock.Mock(side_effect=cause), fileno=mock.Mock(side_effect=OSError)))
            with (
                mock.patch.object(sys, "stdout", stream),
                mock.patch("omnivision.tools.main.call", side_effect=lambda _: print("result") or 0),
                contextlib.redirect_stderr(io.StringIO()) as stderr,
            ):
                self.assertEqual(main([]), code)
            self.assertEqual(len(stderr.getvalue().splitlines()), code)

    def test_interrupted_command_has_its_exit_code(self):
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            with mock.patch("omnivision.tools.main.call", side_effect=KeyboardInterrupt):
                self.assertEqual(main(["runs", "x"]), EXIT_SIGINT)
        self.assertIn("runs", stderr.getvalue())


if __name__ == "__main__":
    unittest.main()
