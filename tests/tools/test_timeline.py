"""Timelines of long videos: windows, segments, files."""

import csv
import io
import json
import unittest
from contextlib import redirect_stderr, redirect_stdout

import numpy as np

import omnivision
from omnivision.checkpoint.inference_config import InferenceConfig
from omnivision.data.encode import write_video
from omnivision.data.sampling import window_starts
from omnivision.tools import video_model
from omnivision.tools.main import main
from omnivision.tools.timeline import Timeline
from tests import tiny_models as tiny


class Segments(unittest.TestCase):
    def test_equal_neighbors_are_merged(self) -> None:
        likeliest = [0, 0, 2, 2, 2, 0]
        probabilities = np.zeros((6, 3), np.float32)
        probabilities[np.arange(6), likeliest] = 1
        times = np.array([(k, k + 2.0) for k in range(6)])
        found = Timeline(times, probabilities, 7.0, ["a", "b", "c"]).segments()
        self.assertEqual(
            [(own.start, own.end, own.name) for own in found], [(0, 2.5, "a"), (2.5, 5.5, "c"), (5.5, 7, "a")]
        )
        self.assertAlmostEqual(found[0].probability, 1, places=5)

    def test_one_window(self) -> None:
        (found,) = Timeline(np.array([(0.0, 1.0)]), np.full((1, 2), 0.5, np.float32), 1.0, ["a", "b"]).segments()
        self.assertEqual((found.start, found.end, found.probability), (0, 1, 0.5))


class Command(tiny.WeightsCase):
    def setUp(self) -> None:
        super().setUp()
        self.video = self.folder / "a film.mp4"
        frames = np.random.default_rng(0).integers(0, 255, (150, 48, 64, 3), dtype=np.uint8)
        write_video(self.video, frames, fps=25)
        self.model = self.save_run(tiny.classifier(3), inference=InferenceConfig(clip_duration=0.5).model_dump())

    def predict(self, *words: object) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main(["predict", str(self.model), *map(str, words)])
        return code, out.getvalue(), err.getvalue()

    def test_windows_are_the_clips_at_their_times(self) -> None:
        model = omnivision.load(self.model)
        found = model.timeline(self.video, stride=0.3)
        self.assertEqual(found.times[:, 0].tolist(), window_starts(6.0, 0.5, 0.3))
        self.assertGreater(len(found.times), video_model.WINDOWS)
        for window in (0, 17, -1):
            views = model.views(self.video, 1, 1, start=found.times[window, 0])
            expected = model.model(views).detach()[0].softmax(0)
            np.testing.assert_allclose(found.outputs[window], expected, rtol=1e-4, atol=1e-5)

    def test_files(self) -> None:
        out = self.folder / "out"
        code, text, errors = self.predict(self.video, "--window", 1, "--stride", 0.5, "--out", out, "--top", 2)
        self.assertEqual(code, 0, errors)
        self.assertIn("(6.0 s, 11 windows)", text)
        content = json.loads((out / "a film.json").read_text())
        self.assertEqual(content["segments"][0]["start"], 0)
        self.assertEqual(content["segments"][-1]["end"], 6.0)
        rows = list(csv.DictReader(io.StringIO((out / "a film.csv").read_text())))
        self.assertEqual((len(rows), list(rows[0])[-1]), (11, "probability_2"))
        self.assertGreater((out / "a film.png").stat().st_size, 5000)
        code, text, _ = self.predict(self.video, "--stride", 0.5, "--json")
        self.assertEqual(len(json.loads(text)[str(self.video)]["windows"]), 12)

    def test_invalid_input(self) -> None:
        for words, wanted in (
            (["--window", 7], "shorter than the window of 7 s"),
            (["--out", self.folder], "--out is for timelines"),
            (["--window", 0], "--window"),
        ):
            code, _, errors = self.predict(self.video, *words)
            self.assertEqual(code, 1)
            self.assertIn(wanted, errors)
        (self.folder / "bad.mp4").write_bytes(b"no video")
        code, text, errors = self.predict(self.folder / "bad.mp4", self.video, "--stride", 1)
        self.assertEqual(code, 1)
        self.assertIn("6.0 s", text)


if __name__ == "__main__":
    unittest.main()
