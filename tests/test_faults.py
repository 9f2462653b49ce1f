"""The quick part of `make faults`, and that its table can tell a promise that is not kept."""

import random
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from omnivision.checkpoint import checkpointer as checkpoint
from tests.faults import saving
from tests.faults.__main__ import FAULTS, inject


class Promises(unittest.TestCase):
    def test_each_is_kept(self):
        for name in FAULTS:
            with self.subTest(name):
                made = inject(name, 0)
                self.assertTrue(made.kept, f"{made.promise}: {made.details}")

    def test_one_that_is_not_kept_is_seen(self):
        with tempfile.TemporaryDirectory() as name:
            with mock.patch.object(checkpoint, "verify", lambda path: {"size": 0, "sha256": ""}):
                made = saving.damaged_checkpoints(Path(name) / "a", 20)
            self.assertGreater(made.accepted + made.crashed, 0)

    def test_a_mutation_changes_something(self):
        data = bytes(range(256)) * 20
        changed = [saving.mutate(data, random.Random(seed)) for seed in range(60)]
        self.assertGreater(sum(each != data for each in changed), 55)
        self.assertGreater(sum(len(each) < len(data) for each in changed), 10)


if __name__ == "__main__":
    unittest.main()
