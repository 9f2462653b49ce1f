"""The demo's page and table: accuracies, their spread, and clips."""

import json
import shutil
import statistics
import tempfile
import unittest
from pathlib import Path

import numpy as np

from omnivision.data.encode import write_video
from omnivision.reporting.predictions import Predictions, write_predictions
from omnivision.utils.errors import UserError
from omnivision_demo import report
from omnivision_demo.spec import ACTIONS

RUNS = {  # source, pretrained, trunk, top-1 of two seeds
    "align_synthetic": ("synthetic", "mae", "trained", (80.0, 90.0)),
    "align_nohuman": ("nohuman", "mae", "trained", (50.0, 60.0)),
    "scratch": ("target", None, "trained", (20.0, 25.0)),
    "finetune": ("target", "align_synthetic", "trained", (70.0, 72.0)),
    "probe": ("target", "align_synthetic", "frozen", (69.0, 71.0)),
    "finetune_mae": ("target", "mae", "trained", (30.0, 31.0)),
    "average": ("target", "align_synthetic + align_nohuman", "frozen average", (69.0, 70.0)),
}


class Report(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        video = folder / "<b>.mp4"
        write_video(video, np.zeros((30, 48, 64, 3), np.uint8), fps=12)
        cls.demos = [folder / "1", folder / "2"]
        labels = np.arange(len(ACTIONS))
        for seed, demo in enumerate(cls.demos):
            for name, (source, start, trunk, top1) in RUNS.items():
                run = demo / name
                run.mkdir(parents=True)
                metadata = {"model": "classifier", "trunk": trunk, "pretrained": start, "sources": [source]}
                last = {"val_top1": top1[seed], "val_videos": len(ACTIONS), "val_epoch": 10}
                summary = {"status": "finished", "run": metadata, "epochs": 10, "steps": 30, "last": last}
                (run / "summary.json").write_text(json.dumps(summary))
                (run / "config.yaml").write_text("batch_size: 16\n")
                scores = np.eye(len(ACTIONS), dtype=np.float32)[[0, *labels[:-1]]]  # only the first is right
                paths = [str(video)] * len(labels)
                write_predictions(
                    run / "predictions", source, Predictions(labels, labels, scores, paths, None, ACTIONS)
                )

    def test_one_seed_has_the_standard_error_of_its_videos(self) -> None:
        results = report.collect_results(self.demos[:1])
        self.assertEqual([result.name for result in results][:3], ["align_synthetic", "align_nohuman", "scratch"])
        self.assertAlmostEqual(results[0].spread, 100 * (0.8 * 0.2 / len(ACTIONS)) ** 0.5)
        self.assertIn("| `scratch` | nothing | trained | target | 20.0 ± 16.3 |", report.format_table(results))

    def test_seeds_have_their_standard_deviation(self) -> None:
        results = report.collect_results(self.demos)
        self.assertEqual(results[0].top1, [80.0, 90.0])
        self.assertEqual(results[0].spread, statistics.stdev([80, 90]))
        self.assertIn(
            "| `scratch` | nothing | trained | target | 22.5 ± 3.5 (20.0, 25.0) |", report.format_table(results)
        )

    def test_page_starts_with_the_results(self) -> None:
        page = report.render_page(self.demos[0], report.collect_results(self.demos))
        intro, _, tables = page.partition('<h2 id="runs">')
        text = " ".join(intro.partition("<body>")[2].split())
        self.assertIn("<b>71.0 %</b> of 6 new videos", text)
        self.assertIn("the same training gives <b>22.5 %</b>; guessing gives 16.7 %", text)
        self.assertIn("standard deviation of 2 seeds", text)
        self.assertEqual(text.count("data:image/webp"), 3 * len(ACTIONS))
        self.assertIn("march: taken for raise_arms", text)
        self.assertIn("align_synthetic", tables)
        self.assertNotIn("<b>.mp4", page)

    def test_a_run_without_predictions_is_named(self) -> None:
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        shutil.copytree(self.demos[0], folder / "demo")
        shutil.rmtree(folder / "demo" / "probe" / "predictions")
        with self.assertRaisesRegex(UserError, "missing: probe"):
            report.render_page(folder / "demo", report.collect_results([folder / "demo"]))
        shutil.rmtree(folder / "demo" / "probe")
        with self.assertRaisesRegex(UserError, "must hold an evaluated run probe"):
            report.collect_results([folder / "demo", *self.demos])


if __name__ == "__main__":
    unittest.main()
