"""Benchmarks on any machine: a peer that does not load is left out, and the report says so."""

import sys
import unittest
from unittest import mock

from benchmarks import decoding, step_shapes
from benchmarks.harness import Report


class Peers(unittest.TestCase):
    def test_whatever_keeps_a_peer_from_loading(self):
        report = Report("name", "title", seconds={"ours": [1.0]})
        for number, error in enumerate(
            (ImportError("no\nmodule"), OSError(""), RuntimeError("no libavutil"), ValueError())
        ):
            self.assertFalse(report.works(f"peer {number}", mock.Mock(side_effect=error)))
            self.assertIn(type(error).__name__, report.facts[f"peer {number}"])
            report.times_as_fast("against it", "ours", f"peer {number}")
        self.assertTrue(report.works("another", abs, -1))
        self.assertNotIn("another", report.facts)
        self.assertEqual(report.ratios, [])
        self.assertIn("no libavutil", report.text())

    def test_decoding_without_its_peers(self):
        with mock.patch.dict(sys.modules, {"decord": None, "torchcodec": None, "torchcodec.decoders": None}):
            report = decoding.run(quick=True)
        self.assertEqual(
            {name for name in ("decord", "torchcodec") if "left out" in report.facts[name]}, {"decord", "torchcodec"}
        )
        self.assertEqual([ratio.what for ratio in report.ratios], ["decoding 340x256 against the published way"])

    def test_steps_without_a_peer(self):
        with (
            mock.patch.dict(sys.modules, {"transformers": None}),
            mock.patch.object(step_shapes, "QUICK", [("vittiny", 4)]),
        ):
            report = step_shapes.run(quick=True)
        self.assertIn("left out", report.facts["Hugging Face"])
        self.assertEqual({side.partition(",")[0] for side in report.seconds}, {"ours"})
