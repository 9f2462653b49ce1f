"""The demo data: reproducible, well-formed, and without short cuts: only the motion tells the actions apart."""

import csv
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import av
import numpy as np
from numpy.typing import NDArray

from omnivision.tools import demo_data
from omnivision.utils.errors import UserError
from omnivision_demo.camera import Camera
from omnivision_demo.dataset import write_demo_data
from omnivision_demo.draws import stream
from omnivision_demo.person import Body
from omnivision_demo.places import Place
from omnivision_demo.render import render
from omnivision_demo.spec import ACTIONS, DOMAINS, PLACE_TYPES, SPLITS, VideoSpec, motion, video_spec
from tests.runs import ROOT, call_command

Array = NDArray[np.float64]
CLASSES = len(ACTIONS)
write_small = functools.partial(write_demo_data, train=1, val=1, workers=1)


def _digest(folder: Path) -> str:
    """One hash of all names and contents below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


class OnDisk(unittest.TestCase):
    """A small set, rendered by two processes."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory())) / "demo"
        cls.written = write_small(cls.folder, workers=2)

    def setUp(self) -> None:
        self.other = Path(self.enterContext(tempfile.TemporaryDirectory())) / "other"

    def _rows(self, domain: str, split: str) -> list[dict[str, str]]:
        with open(self.folder / domain / f"{split}.csv", encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def test_lists(self) -> None:
        self.assertEqual(self.written.videos, CLASSES * len(DOMAINS) * 2)
        self.assertEqual((self.folder / "class_names.txt").read_text().split(), list(ACTIONS))
        for domain in DOMAINS:
            for split in SPLITS:
                paths = np.load(self.folder / domain / f"{split}_paths.npy", allow_pickle=False)
                labels = np.load(self.folder / domain / f"{split}_labels.npy", allow_pickle=False)
                self.assertEqual((paths.dtype.kind, labels.dtype, paths.ndim), ("U", np.int64, 1))
                self.assertEqual(labels.tolist(), list(range(CLASSES)))
                on_disk = sorted(f"{split}/{path.name}" for path in (self.folder / domain / split).iterdir())
                self.assertEqual(paths.tolist(), on_disk)
                rows = [(row["path"], row["action"]) for row in self._rows(domain, split)]
                self.assertEqual(rows, list(zip(on_disk, ACTIONS, strict=True)))

    def test_videos_decode_to_their_row(self) -> None:
        for domain in DOMAINS:
            for row in self._rows(domain, "val"):
                with av.open(str(self.folder / domain / row["path"])) as container:
                    video = container.streams.video[0]
                    frames = list(container.decode(video))
                    self.assertEqual(video.average_rate, int(row["fps"]))
                keys = [t for t, frame in enumerate(frames) if frame.key_frame]
                self.assertEqual(len(frames), int(row["frames"]))
                self.assertLessEqual(max(np.diff([*keys, len(frames)])), int(row["gop"]))
                spec = video_spec(0, domain, "val", int(Path(row["path"]).stem))
                error = np.abs(frames[0].to_ndarray(format="rgb24").astype(float) - render(spec)[0]).mean()
                self.assertLess(error, 12.0)

    def test_no_body_place_or_camera_is_in_two_splits(self) -> None:
        for kind in ("body", "place", "camera"):
            pools = []
            for domain in DOMAINS:
                for split in SPLITS:
                    pools.append({getattr(video_spec(0, domain, split, index), kind) for index in range(400)})
                    self.assertLessEqual({int(row[kind]) for row in self._rows(domain, split)}, pools[-1])
            self.assertEqual(sum(map(len, pools)), len(set().union(*pools)), kind)
            self.assertGreater(min(map(len, pools)), 20, kind)

    def test_an_interrupted_run_is_completed(self) -> None:
        shutil.copytree(self.folder, self.other)
        self.assertEqual(write_small(self.other).new, 0)
        stamp = self.other / "demo-data.json"
        stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "complete": False}))
        (self.other / "target" / "train" / "00003.mp4").unlink()
        (self.other / "target" / "train" / ".00003.mp4.77.part").write_bytes(b"half a video")
        (self.other / "nohuman" / "val_labels.npy").unlink()
        self.assertEqual(write_small(self.other).new, 1)
        self.assertEqual(_digest(self.other), _digest(self.folder))

    def test_a_killed_run_leaves_no_process_and_can_be_completed(self) -> None:
        code = "import sys; from omnivision_demo.dataset import write_demo_data as w; w(sys.argv[1], train=1, val=1)"
        run = subprocess.Popen([sys.executable, "-c", code, self.other], stdout=subprocess.PIPE, cwd=ROOT)
        until = time.monotonic() + 20
        while not list(self.other.rglob("*.mp4")) and time.monotonic() < until:
            time.sleep(0.01)
        run.kill()
        run.communicate(timeout=10)  # returns once no worker holds the pipe any more
        again = write_small(self.other)  # by one process, with the same bytes
        self.assertTrue(0 < again.new < again.videos, again)
        self.assertEqual(_digest(self.other), _digest(self.folder))

    def test_a_dead_worker_ends_the_run(self) -> None:
        def kill_workers(videos, total):
            for video in videos:
                yield video
                for worker in multiprocessing.active_children()[:1]:  # none is left once its death was noticed
                    worker.kill()

        with self.assertRaises(RuntimeError):
            write_small(self.other, workers=2, track=kill_workers)
        self.assertFalse(json.loads((self.other / "demo-data.json").read_text())["complete"])

    def test_folders_with_anything_else_are_refused(self) -> None:
        before = _digest(self.folder)
        with self.assertRaisesRegex(UserError, "DIR.*settings"):
            write_small(self.folder, seed=5)
        self.assertEqual(_digest(self.folder), before)
        self.other.mkdir()
        file = self.other / "thesis.txt"
        file.write_text("years of work")
        for folder in (self.other, file, file / "below"):
            with self.subTest(folder), self.assertRaisesRegex(UserError, "DIR"):
                write_small(folder)
        self.assertEqual([path.name for path in self.other.iterdir()], ["thesis.txt"])
        for content in ("{", "[]", "{}", '{"complete": '):
            (self.other / "demo-data.json").write_text(content)
            with self.subTest(content), self.assertRaisesRegex(UserError, "DIR"):
                write_small(self.other)


class CommandLine(unittest.TestCase):
    def test_options_and_a_second_call(self) -> None:
        one_domain = functools.partial(write_demo_data, domains=("synthetic",))  # a third of the time
        with tempfile.TemporaryDirectory() as folder:
            for new in (2 * CLASSES, 0):
                with mock.patch.object(demo_data, "write_demo_data", wraps=one_domain) as write:
                    code, output, errors = call_command("demo-data", folder, "--quick", "--train=1", "--seed=3")
                self.assertEqual((code, write.call_args.kwargs["val"], write.call_args.kwargs["seed"]), (0, 1, 3))
                self.assertIn(f"{new} of {2 * CLASSES} videos", output)
                self.assertIn(f"{folder}/target: {CLASSES} training", output)
                self.assertEqual(f"{2 * CLASSES} of {2 * CLASSES}" in errors, new > 0)
        for wrong in ("--train=0", "--val=-1", "--seed=-1", "--workers=0"):
            with self.subTest(wrong), self.assertRaisesRegex(UserError, wrong.partition("=")[0]):
                call_command("demo-data", folder, wrong)
        self.assertFalse(Path(folder).exists())


class Specs(unittest.TestCase):
    def test_videos_vary(self) -> None:
        for domain in DOMAINS:
            specs = [video_spec(0, domain, "train", index) for index in range(480)]
            self.assertEqual({spec.fps for spec in specs}, {10, 12, 15, 20, 25})
            self.assertEqual({spec.gop for spec in specs}, {1, 4, 8, 12, 24, 48})
            seconds = [spec.frames / spec.fps for spec in specs]
            self.assertGreater(min(seconds), 1.6)  # a clip of training length
            self.assertTrue(2.4 < max(seconds) < 2.7)
            self.assertEqual(np.bincount([spec.label for spec in specs]).tolist(), [80] * CLASSES)

    def test_seeds_and_ids_make_a_difference(self) -> None:
        first = dataclasses.replace(video_spec(0, "target", "train", 0), frames=2)
        self.assertNotEqual(video_spec(0, "target", "train", 0), video_spec(1, "target", "train", 0))
        np.testing.assert_array_equal(render(first), render(first))
        self.assertFalse(np.array_equal(render(first), render(dataclasses.replace(first, seed=1))))
        for domain in DOMAINS:
            specs = [video_spec(0, domain, split, index) for split in SPLITS for index in range(300)]
            for kind, make in (("body", Body), ("camera", Camera), ("place", Place)):
                ids = {getattr(spec, kind) for spec in specs}
                different = {str(vars(make(0, domain, number)) | {"number": None}) for number in ids}
                self.assertEqual(len(different), len(ids), kind)

    def test_any_clip_of_training_length_shows_the_motion(self) -> None:
        # At least 1.2 turns of the moving channel in the worst 1.6 seconds, and the others do not move.
        for number in range(60):
            value = motion(number % CLASSES, 400, 100.0, stream(0, "test", number))
            moving = value[:, number % CLASSES]
            swing = np.lib.stride_tricks.sliding_window_view(moving, 160)
            crossings = (np.diff(np.sign(swing - moving.mean()), axis=1) != 0).sum(axis=1)
            self.assertGreaterEqual(crossings.min(), 2)
            self.assertGreater(np.ptp(swing, axis=1).min(), 1.4)
            still = np.delete(np.ptp(value, axis=0), number % CLASSES)
            self.assertLess(still.max(), 0.1)

    def test_without_its_person_only_the_person_is_missing(self) -> None:
        spec = dataclasses.replace(video_spec(0, "target", "train", 5), frames=4)
        changed = (render(spec) != render(spec, person=False)).any(axis=(0, 3))
        self.assertTrue(0.03 < changed.mean() < 0.5)
        empty = dataclasses.replace(video_spec(0, "nohuman", "train", 5), frames=4)
        np.testing.assert_array_equal(render(empty), render(empty, person=False))
        self.assertFalse(np.array_equal(render(empty), render(empty, person=True)))
        self.assertGreater(np.abs(np.diff(render(empty).astype(float), axis=0)).mean(), 0.01)


def _accuracy(features: Array, labels: Array) -> float:
    """Accuracy on the last 40 percent, learnt from the rest: the better of a ridge and a nearest-neighbour classifier."""
    cut = int(0.6 * len(features))
    features = (features - features[:cut].mean(axis=0)) / (features[:cut].std(axis=0) + 1e-9)
    train, test, known = features[:cut], features[cut:], labels[:cut].astype(int)
    kernel = train @ train.T + 1.0  # the dual form: frames have more pixels than there are videos
    weights = np.linalg.solve(kernel + 0.1 * train.shape[1] * np.eye(cut), np.eye(CLASSES)[known])
    ridge = ((test @ train.T + 1.0) @ weights).argmax(axis=1)
    distance = (test**2).sum(axis=1)[:, None] + (train**2).sum(axis=1) - 2 * test @ train.T
    votes = known[np.argpartition(distance, 15, axis=1)[:, :15]]
    nearest = np.array([np.bincount(row, minlength=CLASSES).argmax() for row in votes])
    return float(max((ridge == labels[cut:]).mean(), (nearest == labels[cut:]).mean()))


def _bound(videos: int) -> float:
    """An accuracy that guessing exceeds about once in a thousand tries, as the better of two: chance + 3.3 deviations."""
    chance = 1 / CLASSES
    return chance + 3.3 * float(np.sqrt(chance * (1 - chance) / (videos - int(0.6 * videos))))


def _with_powers(values: Array) -> Array:
    return np.concatenate([values, np.abs(values), values**2], axis=1)


def _specs(domain: str, split: str, count: int) -> tuple[list[VideoSpec], NDArray[np.int64], NDArray[np.int64]]:
    """Specs, their labels and their types of place."""
    specs = [video_spec(0, domain, split, index) for index in range(count)]
    kinds = np.array([PLACE_TYPES.index(spec.place_type) for spec in specs])
    return specs, np.array([spec.label for spec in specs]), kinds


class NoShortCuts(unittest.TestCase):
    """One frame, or the place, says nothing about the action in the synthetic and target domains; the motion does."""

    def test_true_joint_angles(self) -> None:
        for domain in ("synthetic", "target"):
            specs, labels, _ = _specs(domain, "train", 1500)
            moments = stream(0, "moment").uniform(0, 1, len(specs))
            values = [spec.channels() for spec in specs]
            single = np.stack([value[int(at * len(value))] for value, at in zip(values, moments, strict=True)])
            self.assertLess(_accuracy(_with_powers(single), labels), _bound(len(specs)))
            self.assertGreater(_accuracy(np.stack([value.std(axis=0) for value in values]), labels), 0.95)
            # If idle channels rested nearer to the middle than the moving one, this test would notice.
            leaky = np.where(np.eye(CLASSES, dtype=bool)[labels], single, 0.7 * single)
            self.assertGreater(_accuracy(_with_powers(leaky), labels), _bound(len(specs)))

    def test_everything_else_in_a_spec(self) -> None:
        specs, labels, kinds = _specs("target", "train", 1500)
        rest = np.array([[s.body, s.place, s.camera, s.fps, s.frames, s.gop, s.crf] for s in specs], dtype=float)
        self.assertLess(
            _accuracy(np.concatenate([np.eye(len(PLACE_TYPES))[kinds], rest], axis=1), labels), _bound(1500)
        )

    def test_pixels(self) -> None:
        specs, labels, _ = _specs("target", "train", 320)
        frames, backgrounds, poses, motions = [], [], [], []
        for number, spec in enumerate(specs):
            # Eight frames over 1.6 seconds are enough to see the motion, and quick to draw.
            spec = dataclasses.replace(spec, fps=5, frames=8)
            video, empty = render(spec), render(spec, person=False)
            frames.append(_small(video[number % 8]).ravel())
            small = np.stack([_small(frame) for frame in empty])
            changes = np.abs(np.diff(small, axis=0)).mean(axis=0)
            backgrounds.append(np.concatenate([small[0].ravel(), small[-1].ravel(), changes.ravel()]))
            shape = _silhouette((video != empty).any(axis=3))  # (8, features)
            poses.append(shape[number % 8])
            motions.append(np.log(shape.std(axis=0) + 1e-3))
        bound = _bound(len(specs))
        for what, features in (("frame", frames), ("background", backgrounds), ("silhouette in a frame", poses)):
            self.assertLess(_accuracy(np.stack(features), labels), bound, what)
        self.assertGreater(_accuracy(np.stack(motions), labels), 2 * bound, "the motion of the silhouette")

    def test_without_people_the_place_is_a_hint_but_no_proof(self) -> None:
        _, labels, kinds = _specs("nohuman", "train", 1200)
        usual = np.array([np.bincount(labels[kinds == kind]).argmax() for kind in range(len(PLACE_TYPES))])
        _, labels, kinds = _specs("nohuman", "val", 1200)
        self.assertTrue(0.4 < (usual[kinds] == labels).mean() < 0.8)


def _small(frame: NDArray[np.uint8]) -> Array:
    """The frame averaged down to (12, 12, 3), whatever its size."""
    height, width = frame.shape[:2]
    rows, columns = np.arange(12) * height // 12, np.arange(12) * width // 12
    sums = np.add.reduceat(np.add.reduceat(frame.astype(np.float64), rows, axis=0), columns, axis=1)
    area = np.diff([*rows, height])[:, None, None] * np.diff([*columns, width])[None, :, None]
    return np.asarray(sums / area)


def _silhouette(mask: NDArray[np.bool_]) -> Array:
    """Position and width of a silhouette (T, H, W), and how it is spread over its height: (T, 14)."""
    features = np.zeros((len(mask), 14))
    for row, frame in zip(features, mask, strict=True):
        y, x = np.nonzero(frame)
        if len(y):  # inside the view
            top, low = np.percentile(y, (2, 90))
            bands = np.clip(((y - top) / max(low - top, 1) * 4).astype(int), 0, 3)
            widths = [np.ptp(x[bands == band]) if (bands == band).any() else 0 for band in range(4)]
            middles = [x[bands == band].mean() - x.mean() if (bands == band).any() else 0 for band in range(4)]
            row[:] = x.mean(), y.mean(), top, low, len(y) / 20, np.ptp(x), *widths, *middles
    return features


if __name__ == "__main__":
    unittest.main()
