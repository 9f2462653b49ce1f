"""Samples that are segments of videos: what training and evaluation see of them, and what is refused."""

import csv
import json
import unittest

import numpy as np
import torch
from PIL import Image

from omnivision.checkpoint.fingerprint import classify_changes
from omnivision.data.catalog import Dataset, Split
from omnivision.data.dataset import ClipConfig, ClipDataset
from omnivision.data.encode import write_video
from omnivision.data.sampling import Request
from omnivision.data.views import EvalView, PretrainView
from omnivision.tools.check_data import find_duplicates
from omnivision.tools.report.collect import find_runs
from omnivision.tools.report.figures import mistakes
from omnivision.utils.errors import UserError
from tests import stage_runs as stages
from tests.data import test_catalog as catalog
from tests.tools.test_check_data import run as check_data

FPS = 8  # a power of two, so that seconds of frames are exact


class Folder(catalog.Folder):
    def frames(self, name: str, numbers: range) -> None:
        """A folder of frames, each of one grey that tells its number."""
        (self.folder / name).mkdir()
        for number in numbers:
            Image.new("RGB", (64, 48), (12 * number,) * 3).save(self.folder / name / f"{number:05d}.png")

    def split(self, paths: list[str], segments: object = None, which: str = "train", **entry: object) -> Split:
        files = {"paths": self.save("paths.npy", paths), "segments": None}
        if segments is not None:
            files["segments"] = self.save("segments.npy", segments)
        return Split(Dataset(name="d", prefix=f"{self.folder}/", fps=FPS, **{which: files}, **entry), which)

    def clips(self, split: Split, training: bool, seconds: float = 0.5, index: int = 0) -> list[torch.Tensor]:
        """Clips of a sample in several epochs, or those of an evaluation."""
        view = PretrainView(32, short_side=40) if training else EvalView(32)
        config = ClipConfig(view, 1, num_frames=4, grid=(2, 2, 2), clips=1 if training else 3)
        data = ClipDataset([split], {"video": config}, seconds, seed=5, training=training)
        return [data[Request(0, index, epoch)].video for epoch in range(12 if training else 1)]


class Honoured(Folder):
    def test_segment_equals_a_video_of_its_frames(self):
        self.frames("whole", range(20))
        self.frames("part", range(4, 12))
        noise = np.random.default_rng(0).integers(0, 256, (20, 6, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
        write_video(self.folder / "whole.mp4", noise, fps=FPS, crf=0, gop=5)
        write_video(self.folder / "part.mp4", noise[4:12], fps=FPS, crf=0)
        for training in (True, False):
            for seconds in (0.5, 1.0, 2.7):  # shorter than the segment, as long, longer
                for kind in ("", ".mp4"):
                    segments = np.array([[0.5, 1.5]], np.float32)
                    of_segment = self.clips(self.split([f"whole{kind}"], segments), training, seconds)
                    of_part = self.clips(self.split([f"part{kind}"]), training, seconds)
                    for one, other in zip(of_segment, of_part, strict=True):
                        difference = (one.float() - other.float()).abs().mean()  # coded apart from one another
                        self.assertLess(float(difference), 3 if kind else 1e-9, (training, seconds, kind))

    def test_clips_cover_the_whole_segment_and_stay_inside(self):
        self.frames("whole", range(20))
        for segment, wanted in (([0.5, 1.5], set(range(4, 12))), ([1.0, 1.125], {8}), ([2.0, 3.0], {16, 17, 18, 19})):
            for training in (True, False):
                clips = torch.cat(self.clips(self.split(["whole"], [segment]), training))
                shown = set((clips.float().mean((1, 3, 4)) / 12).round().int().flatten().tolist())
                self.assertLessEqual(shown, wanted, (segment, training))
                self.assertGreaterEqual(
                    len(shown) + training, len(wanted)
                )  # random clips seldom start at the very start
        for training in (True, False):  # the segment of a whole video changes nothing
            plain = self.clips(self.split(["whole"]), training)
            whole = self.clips(self.split(["whole"], [[0.0, 2.5]]), training)
            self.assertTrue(all(map(torch.equal, plain, whole)))

    def test_segment_beyond_the_end_is_bad(self):
        self.frames("whole", range(20))
        config = ClipConfig(EvalView(32), 1, num_frames=4, grid=(2, 2, 2))
        segments = [[0.0, 3.4], [0.0, 9.0], [2.5, 2.75], [1.0, 2.5]]  # of 2.5 s; the first is rounded up
        data = ClipDataset([self.split(["whole"] * 4, segments)], {"video": config}, 0.5, 5, training=False)
        bad = [[each.reason for each in data[Request(0, i, 0)].bad] for i in range(4)]
        self.assertEqual([len(each) for each in bad], [0, 1, 1, 0])
        self.assertIn("0 to 9 s", bad[1][0])

    def test_check_data(self):
        self.frames("whole", range(20))
        self.frames("other", range(20))
        paths = self.save("paths.npy", ["whole", "whole", "other", "whole"])
        segments = self.save("segments.npy", [[0, 1.5], [0, 9], [1, 2], [0, 1.5]])
        report = self.folder / "report.json"
        code, _ = check_data(
            paths, "--segments", segments, "--prefix", f"{self.folder}/", "--fps", FPS, "--json", report
        )
        found = json.loads(report.read_text())
        self.assertEqual((code, [sample["ok"] for sample in found["samples"]]), (1, [True, False, True, True]))
        self.assertEqual([(sample["start"], sample["end"]) for sample in found["samples"]][1], (0, 9))
        self.assertIn("beyond the end", found["samples"][1]["reason"])
        self.assertEqual(found["summary"]["seconds"], 4, "of the good segments, not of whole videos")
        self.assertEqual(found["summary"]["duplicates"], [[f"{self.folder}/whole"] * 2], "the same segment twice")
        with self.assertRaisesRegex(UserError, "--segments"):
            check_data(paths, "--segments", paths)
        self.assertEqual(find_duplicates(["a", "a"], segments=[(0, 1), (1, 2)]), [])


class Refused(Folder):
    def test_invalid_segment_arrays_are_refused(self):
        for segments in (
            [[0.0, 1.0]],  # of another length
            [0.0, 1.0],
            [[0.0, 1.0, 2.0]] * 2,
            [[0, 1], [1, 2]],  # frame numbers, perhaps
            [[0.0, 1.0], [2.0, 2.0]],
            [[0.0, 1.0], [3.0, 2.0]],
            [[-1.0, 1.0], [0.0, 1.0]],
            [[0.0, np.inf], [0.0, 1.0]],
            [[np.nan, 1.0], [0.0, 1.0]],
        ):
            with self.subTest(segments), self.assertRaisesRegex(UserError, r"datasets\.d\.train\.segments"):
                self.split(["a", "b"], segments)
        self.assertEqual(self.split(["a", "b"], [[0.0, 1.0], [2.0, 3.0]]).segment(1), (2.0, 3.0))

    def test_segments_of_images_or_missing_files_are_refused(self):
        with self.assertRaisesRegex(UserError, r"datasets\.d\.train\.segments"):
            self.split(["a"], [[0.0, 1.0]], kind="image")
        files = {"paths": self.save("paths.npy", ["a"]), "segments": ["none.npy", "neither.npy"]}
        with self.assertRaisesRegex(UserError, r"datasets\.d\.val\.segments.*none\.npy, neither\.npy"):
            Split(Dataset(name="d", val=files), "val")


class Runs(Folder):
    def test_run_trains_on_segments(self):
        """Predictions tell them apart, the report shows them, and other segments are another experiment."""
        videos = stages.write_videos(self.folder / "videos", 4)  # of 0.8 s
        twice = [film for film in videos for _ in range(2)]
        segments = [[0.0, 0.4], [0.4, 0.8]] * 4
        data = [
            *stages.write_split(self.folder, "ucf101", "train", twice),
            *stages.write_split(self.folder, "ucf101", "val", twice),
            f"++datasets.ucf101.train.segments={self.save('train.npy', segments)}",
            f"++datasets.ucf101.val.segments={self.save('val.npy', segments)}",
        ]
        folder = self.folder / "run"
        result = stages.run_in_process(stages.command("ft", folder, *data))
        self.assertEqual(result.returncode, 0, result.stderr)
        with np.load(folder / "predictions/ucf101.npz") as found:
            self.assertEqual(found["segment"].tolist(), segments)
        with open(folder / "predictions/ucf101.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual([[float(row["start"]), float(row["end"])] for row in rows], segments)
        (run,) = find_runs([folder])
        for found in mistakes(run.predictions["ucf101"], 8, {}).values():
            self.assertEqual(len({mistake.path for mistake in found}), len(found))
            self.assertTrue(all(mistake.clip for mistake in found))

        self.save("train.npy", [[0.0, 0.3], [0.4, 0.8]] * 4)
        again = stages.run_in_process(stages.command("ft", folder, *data, "epochs=2"))
        self.assertEqual(again.returncode, 1)
        self.assertIn("datasets.ucf101.train.segments", again.stderr)

    def test_added_or_removed_segments_change_the_experiment(self):
        def facts(**data: str) -> dict:
            named = {f"datasets.d.train.{what}": text for what, text in data.items()}
            return {"settings": {}, "clips of a step": {}, "versions": {}, "data": named}

        self.assertEqual(classify_changes(facts(paths="a"), facts(paths="a")), ([], []))
        for saved, current in (
            (facts(paths="a"), facts(paths="a", segments="b")),
            (facts(paths="a", segments="b"), facts(paths="a")),
        ):
            (altering, others) = classify_changes(saved, current)
            self.assertEqual((len(altering), others), (1, []))
            self.assertIn("datasets.d.train.segments", altering[0])


if __name__ == "__main__":
    unittest.main()
