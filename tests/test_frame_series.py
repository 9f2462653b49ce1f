"""Folders that hold several series of frames: found by their names, refused, or chosen by a pattern."""

import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from PIL import Image

from omnivision.data.catalog import Dataset, Split
from omnivision.data.frames import SeveralSeriesError, group_series, natural, sort_times
from omnivision.data.video import VideoDecodeError, open_video
from omnivision.tools.report.figures import animate
from omnivision.training import preflight
from omnivision.utils.errors import UserError
from tests.test_check_data import run as check_data


def numbered(text: str, count: int = 12) -> list[str]:
    return [text.format(number) for number in range(1, count + 1)]


class Names(unittest.TestCase):
    def test_one_series(self):
        for pattern, names in {
            "img_*.jpg": numbered("img_{:05d}.jpg"),
            "frame*.jpg": numbered("frame{}.jpg"),
            "*.png": ["1.png", "2.png", "77.png", "1403636579763555584.png"],
            "v_Biking_g01_c01_*.jpg": numbered("v_Biking_g01_c01_{:04d}.jpg"),
            "frame_*_pts_*.jpg": [f"frame_{i:03d}_pts_{512 * i}.jpg" for i in range(9)],
            "*.webp": [f"{i / 25:.2f}.webp" for i in range(60)],
            "2021-03-04_*.jpg": [f"2021-03-04_12-30-{i // 20:02d}.{i % 20:03d}.jpg" for i in range(60)],
            "shot*_*.jpg": [f"shot{i // 5}_{i}.jpg" for i in range(20)],
            "*.bmp": ["begin.bmp", "middle.bmp", "end.bmp"],
            "only_*.jpg": ["only_1.jpg"],
            "shot_*.*": ["shot_1.jpg", "shot_2.JPG", "shot_3.png"],
        }.items():
            self.assertEqual(group_series(names), {pattern: names})

    def test_several(self):
        for patterns, names in {
            ("img_*.jpg", "flow_x_*.jpg"): numbered("img_{}.jpg") + numbered("flow_x_{}.jpg"),
            ("*.png", "*_depth.png"): numbered("{:04d}.png") + numbered("{:04d}_depth.png"),
            ("*.jpg", "*.png"): numbered("{}.jpg") + numbered("{}.png"),
            ("cam1_*.jpg", "cam2_*.jpg"): numbered("cam1_{:04d}.jpg") + numbered("cam2_{:04d}.jpg"),
            ("a1.*.jpg", "a2.*.jpg"): numbered("a1.{:04d}.jpg") + numbered("a2.{:04d}.jpg"),
            ("cam1_*.jpg", "cam2_*.jpg", "cam3_*.jpg"): [
                f"cam{camera}_{40 * i + 7 * camera}.jpg" for camera in (1, 2, 3) for i in range(12)
            ],  # by time, which no two cameras share
            ("*.jpg", "thumb.jpg"): [*numbered("{}.jpg"), "thumb.jpg"],
            ("clip.jpg", "clip*.jpg"): ["clip.jpg", "clip1.jpg", "clip2.jpg"],
            ("*.jpg", "1 (*).jpg"): ["1.jpg", "2.jpg", "1 (1).jpg"],
        }.items():
            found = group_series(names)
            self.assertEqual(tuple(found), patterns)
            self.assertEqual([name for series in found.values() for name in series], names)

    def test_times_are_in_order(self):
        for names in (
            [f"{i / 25}.jpg" for i in range(60)],
            [f"frame_{i / 8}.png" for i in range(30)],
            [f"{i / 2:g}.jpg" for i in range(30)],
            [f"{i / 25:.2f}.jpg" for i in range(60)],
            [f"1.{i}.jpg" for i in range(1, 30)],
            [f"take{i // 20}.{i % 20}.jpg" for i in range(60)],
            [f"{i}.jpg" for i in range(30)],
        ):
            self.assertEqual(sort_times(sorted(names, key=natural)), names)


class Reading(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        clip = self.folder / "clip"
        clip.mkdir()
        for name, grey in (("img", 10), ("flow_x", 100), ("img_flow", 200)):
            for number in range(1, 6):
                Image.new("RGB", (32, 24), (grey,) * 3).save(clip / f"{name}_{number:05d}.png")

    def test_refused_unless_one_is_chosen(self):
        path = str(self.folder / "clip")
        with self.assertRaisesRegex(SeveralSeriesError, r"flow_x_\*\.png, img_\*\.png, img_flow_\*\.png"):
            with open_video(path):
                pass
        # A pattern is one of the series, though as a shell pattern it would match more, or else what it matches.
        for pattern, frames, grey in (
            ("img_*.png", 5, 10),
            ("flow_*", 5, 100),
            ("*_00002.png", 3, None),
            ("*", 15, None),
        ):
            with open_video(path, frame_pattern=pattern) as film:
                shown = film.read(0.0, 1.0, 16)
                self.assertEqual(film.info().frames, frames)
                if grey is not None:
                    self.assertEqual(set(shown.flatten().tolist()), {grey})
        with self.assertRaises(VideoDecodeError), open_video(path, frame_pattern="rgb_*"):
            pass
        self.assertTrue(animate(path, 25.0, "img_*.png"))
        self.assertFalse(animate(path, 25.0))

    def test_check_data(self):
        np.save(self.folder / "paths.npy", np.array(["clip"]))
        arguments = (self.folder / "paths.npy", "--prefix", f"{self.folder}/")
        code, out = check_data(*arguments)
        self.assertEqual((code, "img_flow_*.png" in out), (1, True))
        self.assertEqual(check_data(*arguments, "--frame-pattern", "img_*.png")[0], 0)

    def test_their_rate_is_said(self):
        (self.folder / "clip.mp4").touch()
        for name, expected in (
            ("clip", "d, train: 1 samples, folders of frames at 12.5 a s.*d.fps"),
            ("clip.mp4", "s$"),
        ):
            np.save(self.folder / "paths.npy", np.array([name]))
            files = {"paths": str(self.folder / "paths.npy")}
            split = Split(Dataset(name="d", fps=12.5, prefix=f"{self.folder}/", train=files), "train")
            self.assertRegex(preflight.describe_split(split), expected)

    def test_before_a_run(self):
        np.save(self.folder / "paths.npy", np.array(["clip", "nowhere"]))
        (self.folder / "empty").mkdir()
        train = {"paths": str(self.folder / "paths.npy")}
        data = SimpleNamespace(sources={"d": None})
        trainer = SimpleNamespace(data=data, model={"decoder": {}}, mode="train", val_epoch_freq=None)
        settings = SimpleNamespace(trainer=trainer, submitit=SimpleNamespace(use_cluster=False))
        entry = Dataset(name="d", prefix=f"{self.folder}/", train=train)
        self.enterContext(mock.patch.object(preflight, "epoch_plan"))
        with mock.patch.object(preflight, "datasets_of", lambda _: [entry]):
            with self.assertRaisesRegex(UserError, r"datasets\.d\.frame_pattern"):
                preflight.check_splits(settings)
            self.assertEqual(len(preflight.open_splits(settings)[0]), 1)  # each process of a run opens them again
        chosen = entry.model_copy(update={"frame_pattern": "img_*.png"})
        with mock.patch.object(preflight, "datasets_of", lambda _: [chosen]):
            self.assertEqual(len(preflight.check_splits(settings)[0]), 1)


if __name__ == "__main__":
    unittest.main()
