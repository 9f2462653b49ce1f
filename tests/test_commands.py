"""The `omnivision` command: help without torch, and wrong arguments."""

import subprocess
import sys
import unittest

from omnivision.tools.main import COMMANDS
from omnivision.utils.errors import UserError
from tests.runs import call_command


class Help(unittest.TestCase):
    def test_help_imports_no_torch(self):
        program = (
            "import sys\nfrom omnivision.tools.main import COMMANDS, main\n"
            "for words in [[], ['--help'], *([name, '--help'] for name in COMMANDS)]:\n"
            "    assert main(words) == 0\n"
            "assert 'torch' not in sys.modules\n"
        )
        made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        self.assertEqual(made.returncode, 0, made.stderr)
        for name in COMMANDS:
            self.assertIn(f"Usage: omnivision {name}", made.stdout)


class WrongArguments(unittest.TestCase):
    def test_the_argument_is_named(self):
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

    def test_an_option_that_comes_again_replaces_the_first(self):
        with self.assertRaisesRegex(UserError, "RUN"):  # the option is accepted; the run does not exist
            call_command("predict", "RUN", "a.mp4", "--top", 1, "--top", 2)


if __name__ == "__main__":
    unittest.main()
