"""The quick part of `make faults`, and that it reports a broken guarantee."""

import random
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from omnivision.checkpoint import checkpointer as checkpoint
from tests import faults


class Guarantees(unittest.TestCase):
    def test_each_holds(self):
        for name in faults.FAULTS.keys() - {"kills_2"}:  # test_end_to_end kills two processes
            with self.subTest(name):
                self.assertEqual(faults.inject(name, 0).problems(), [])

    def test_a_broken_one_is_reported(self):
        with tempfile.TemporaryDirectory() as folder:
            with mock.patch.object(checkpoint, "verify_manifest", lambda path: {"size": 0, "sha256": ""}):
                self.assertTrue(faults.damaged_checkpoints(Path(folder), 20).problems())

    def test_a_mutation_changes_something(self):
        data = bytes(range(256)) * 20
        changed = [faults.mutate(data, random.Random(seed)) for seed in range(60)]
        self.assertGreater(sum(each != data for each in changed), 55)
        self.assertGreater(sum(len(each) < len(data) for each in changed), 10)


if __name__ == "__main__":
    unittest.main()
