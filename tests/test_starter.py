"""The starter weights: complete, small, and as good as their README says."""

import json
import tempfile
import unittest
from pathlib import Path

from omnivision.utils.io import sha256
from omnivision_demo import starter
from tests.runs import ROOT

FOLDER = ROOT / "examples" / "starter"
MAX_BYTES = 5_000_000
POINTS = 2.5  # three of 120 videos: other processors round differently


class Starter(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.record = json.loads((FOLDER / starter.RESULTS).read_text(encoding="utf-8"))

    def test_files_are_the_recorded_ones(self) -> None:
        for file, facts in self.record["files"].items():
            with self.subTest(file):
                self.assertEqual(facts, {"sha256": sha256(FOLDER / file), "bytes": (FOLDER / file).stat().st_size})
                self.assertLess(facts["bytes"], MAX_BYTES)
        self.assertEqual(starter.render_readme(**self.record), (FOLDER / "README.md").read_text(encoding="utf-8"))

    def test_new_videos_give_the_recorded_results(self) -> None:
        measured = starter.measure(FOLDER, Path(self.enterContext(tempfile.TemporaryDirectory())))
        for name, recorded in self.record["results"].items():
            self.assertAlmostEqual(measured[name], recorded, delta=0.02 if "loss" in name else POINTS, msg=name)


if __name__ == "__main__":
    unittest.main()
