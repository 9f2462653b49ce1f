"""The study of what the demo learns: runs train, start from each other, and are not repeated."""

import json
import tempfile
import unittest
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import demo_study as study

FEW = dict.fromkeys(study.VIDEOS, 2)  # of each action


class Study(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        (cls.folder / "runs").mkdir()
        study.render_videos(cls.folder, FEW)

    def _curve(self, name: str) -> list[dict[str, float]]:
        return json.loads((self.folder / "runs" / f"{study.slug(name)}.json").read_text())["curve"]

    def _weights(self, name: str) -> dict[str, torch.Tensor]:
        return torch.load(self.folder / "runs" / f"{study.slug(name)}.pt", weights_only=True)

    def test_videos_are_those_of_the_demo(self) -> None:
        videos = study.Videos(self.folder, ("synthetic", "nohuman"), "train")
        self.assertEqual(len(videos), 2 * 2 * len(study.ACTIONS))
        spec = videos.specs[-1]
        self.assertEqual((spec.domain, spec.index), ("nohuman", 2 * len(study.ACTIONS) - 1))
        clip = videos.clip(len(videos) - 1, replace(study.Setup(), frames=study.num_frames(spec), seconds=9.0), 0.0)
        np.testing.assert_array_equal(clip, study.square_video(spec))

    def test_stages_start_from_each_other(self) -> None:
        few = {"clips": 32, "batch": 8}
        study.train("masked 0.5", replace(study.MAE, **few), self.folder)
        study.train("aligned", replace(study.Setup(), start="masked 0.5", frozen=True, **few), self.folder)
        study.train("convolution", replace(study.Setup(), model="convolution", **few), self.folder)
        before, after = self._weights("masked 0.5"), self._weights("aligned")
        trunk = [name for name in after if name.startswith("trunk.")]
        self.assertTrue(all(torch.equal(before[name], after[name]) for name in trunk))
        last = self._curve("aligned")[-1]
        self.assertEqual(set(last), {"clips", "loss", "top-1", "action", "type of place", "position", "posture"})
        self.assertEqual(last["clips"], 32)
        self.assertLess(self._curve("masked 0.5")[-1]["loss"], 20)
        file = self.folder / "runs" / "aligned.pt"
        written = file.stat().st_mtime_ns
        study.train("aligned", replace(study.Setup(), start="masked 0.5", frozen=True, **few), self.folder)
        self.assertEqual(file.stat().st_mtime_ns, written)  # not repeated
        study.train("aligned", replace(study.Setup(), start="masked 0.5", **few), self.folder)
        self.assertNotEqual(file.stat().st_mtime_ns, written)  # another setup
        study.plot(self.folder)
        self.assertTrue((self.folder / "demo_curves.png").stat().st_size)

    def test_a_ridge_finds_a_linear_map(self) -> None:
        rng = np.random.default_rng(0)
        features = rng.normal(size=(400, 8))
        wanted = features @ rng.normal(size=(8, 2)) + 3
        guess = study.ridge(features[:300], wanted[:300], features[300:])
        self.assertLess(np.abs(guess - wanted[300:]).mean(), 0.2)

    def test_runs_that_others_start_from_have_their_name(self) -> None:
        names = {study.run_name(group, label) for group, runs in study.GROUPS.items() for label in runs}
        starts = {setup.start for runs in study.GROUPS.values() for setup in runs.values()} - {None}
        self.assertLessEqual(starts, names)


if __name__ == "__main__":
    unittest.main()
