"""Benchmarks on any machine: a peer that does not load is left out, and sides in other processes take turns."""

import sys
import time
import unittest
from unittest import mock

from benchmarks import decoding, harness, steps
from benchmarks.harness import Report


def slow_and_fast(kind: str, quick: bool) -> dict[str, harness.Side]:
    return {f"{kind} slow": lambda: time.sleep(0.02), f"{kind} fast": lambda: None}


class Benchmarks(unittest.TestCase):
    def test_a_peer_that_does_not_load(self):
        report = Report("name", "title", seconds={"ours": [1.0]})
        for number, error in enumerate((ImportError("no\nmodule"), OSError(""), RuntimeError("no libavutil"))):
            self.assertFalse(report.works(f"peer {number}", mock.Mock(side_effect=error)))
            self.assertIn(type(error).__name__, report.facts[f"peer {number}"])
            report.times_as_fast("against it", "ours", f"peer {number}")
        self.assertTrue(report.works("another", abs, -1))
        self.assertNotIn("another", report.facts)
        self.assertEqual(report.ratios, [])
        self.assertIn("no libavutil", report.text())

    def test_benchmarks_without_their_peers(self):
        gone = dict.fromkeys(("decord", "torchcodec", "torchcodec.decoders", "transformers"))
        with mock.patch.dict(sys.modules, gone), mock.patch.object(steps, "QUICK_SHAPES", [("vittiny", 4)]):
            frames, shapes = decoding.decoding(quick=True), steps.step_shapes(quick=True)
        self.assertEqual([ratio.what for ratio in frames.ratios], ["decoding 340x256 against the published way"])
        self.assertIn("left out", shapes.facts["Hugging Face"])
        self.assertEqual({side.partition(",")[0] for side in shapes.seconds}, {"ours"})

    def test_sides_in_other_processes(self):
        for quick in (False, True):
            with harness.in_processes({"a": (slow_and_fast, ["a slow", "a fast"])}, quick) as turns:
                seconds = harness.interleaved(turns, rounds=2)
            self.assertGreaterEqual(min(seconds["a slow"]), 0.02)
            self.assertLess(min(seconds["a fast"]), 0.02)


if __name__ == "__main__":
    unittest.main()
