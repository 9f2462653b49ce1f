"""That freed memory stays with a process, so that it takes no new pages for as much again."""

import subprocess
import sys
import unittest

PROGRAM = """
import resource
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
make = lambda: b"x" * 2**26  # 16384 pages
make()
before = faults()
for _ in range(3):
    make()
print(faults() - before)
"""
PROCESS_OF_A_RUN = """
from datetime import timedelta
from omnivision.distributed.process_group import Place, Processes
Processes(Place(), "cpu", None, timedelta(minutes=1))
"""
DATA_WORKER = """
import os
from omnivision.data.loader import Begin
Begin(os.getppid())(0)
"""


class Allocator(unittest.TestCase):
    def test_no_new_pages_for_what_was_freed(self):
        def faults(beginning: str) -> int:
            made = subprocess.run(
                [sys.executable, "-c", beginning + PROGRAM], capture_output=True, text=True, check=True
            )
            return int(made.stdout)

        self.assertLess(faults(PROCESS_OF_A_RUN), 1000)
        self.assertLess(faults(DATA_WORKER), 1000)
        self.assertGreater(faults(""), 3 * 10_000)


if __name__ == "__main__":
    unittest.main()
