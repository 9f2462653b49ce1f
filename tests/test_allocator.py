"""That freed memory stays with a process, so that it takes no new pages for as much again."""

import subprocess
import sys
import unittest

PROGRAM = """
import resource
from omnivision.allocator import keep_freed_memory
keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
make = lambda: b"x" * 2**26  # 16384 pages
make()
before = faults()
for _ in range(3):
    make()
print(faults() - before)
"""


class Allocator(unittest.TestCase):
    def test_no_new_pages_for_what_was_freed(self):
        def faults(program: str) -> int:
            return int(
                subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
            )

        self.assertLess(faults(PROGRAM), 1000)
        self.assertGreater(faults(PROGRAM.replace("keep_freed_memory()\n", "")), 3 * 10_000)


if __name__ == "__main__":
    unittest.main()
