"""Atomic file writes, appended lines, and output streams that are closed or cannot encode."""

import io
import os
import subprocess
import sys
import unittest
from pathlib import Path

from omnivision.utils.io import append_line, replace_atomically, write_atomically
from omnivision.utils.streams import SafeStream
from tests import runs
from tests.fixtures import Folder


class Files(Folder):
    def test_a_line_after_a_truncated_one(self):
        log = self.folder / "log"
        append_line(log, "first")
        with open(log, "a") as file:
            file.write("half of")
        append_line(log, "second")
        append_line(log, "caf\udce9")
        self.assertEqual(log.read_bytes(), b"first\nhalf of\nsecond\ncaf\xe9\n")

    def test_only_files_are_replaced(self):
        os.mkfifo(self.folder / "pipe")
        (self.folder / "folder").mkdir()
        for name in ("pipe", "folder"):
            with self.assertRaises(OSError):
                write_atomically(self.folder / name, "text")
        self.assertTrue((self.folder / "pipe").is_fifo())
        (self.folder / "link").symlink_to(self.folder / "real")
        write_atomically(self.folder / "link", "text")
        self.assertEqual(((self.folder / "real").read_text(), (self.folder / "link").is_symlink()), ("text", True))

    def test_an_error_names_the_file_that_was_asked_for(self):
        for file in ("/proc/x.html", self.folder / ("x" * 250)):
            with self.assertRaises(OSError) as caught:
                write_atomically(Path(file), "text")
            self.assertEqual((caught.exception.filename, caught.exception.filename2), (str(file), None))

    def test_two_writers_of_one_process(self):
        with replace_atomically(self.folder / "a") as first:
            write_atomically(self.folder / "a", "second")
            first.write(b"first")
        self.assertEqual((self.folder / "a").read_text(), "first")
        write_atomically(self.folder / "a", "caf\udce9")  # a file name that is no text
        self.assertEqual((self.folder / "a").read_text(), "caf\\udce9")


class Streams(unittest.TestCase):
    def test_what_cannot_be_encoded(self):
        raw = io.BytesIO()
        stream = SafeStream(io.TextIOWrapper(raw, "ascii"))
        stream.write("caf\xe9 \udce9")
        stream.flush()
        self.assertEqual(raw.getvalue(), b"caf\\xe9 \\udce9")

    def test_a_program_whose_output_nobody_takes_ends_as_it_would(self):
        code = (
            "from omnivision.utils.streams import ignore_broken_pipe; ignore_broken_pipe()\n"
            "import sys\n"
            "for _ in range(3): print('x' * 100_000, flush=True); print('y' * 100_000, file=sys.stderr)\n"
            "sys.exit(7)"
        )
        command = f'{sys.executable} -c "$CODE"'
        for redirected in (f"{command} 2>/dev/full | true", f"{command} >/dev/full 2>&1", f"{command} >&- 2>&-"):
            result = subprocess.run(
                ["bash", "-c", f"{redirected}; echo code ${{PIPESTATUS[0]}}"],
                env=os.environ | {"CODE": code},
                capture_output=True,
                text=True,
                cwd=runs.ROOT,
            )
            self.assertEqual((result.stdout, result.stderr), ("code 7\n", ""), redirected)


if __name__ == "__main__":
    unittest.main()
