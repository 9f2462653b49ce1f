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
from omnivision_demo.actions import ACTIONS, motion
from omnivision_demo.body import body
from omnivision_demo.camera import camera
from omnivision_demo.dataset import DOMAINS, SPLITS, VideoSpec, Written, channels, render, video_spec, write_demo_data
from omnivision_demo.draws import stream
from omnivision_demo.places import PLACE_TYPES, place
from tests.runs import call_command

Array = NDArray[np.float64]
CLASSES = len(ACTIONS)
ROOT = Path(__file__).resolve().parents[1]


def _digest(folder: Path) -> str:
    """One hash of all names and contents below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


class OnDisk(unittest.TestCase):
    """What is on disk after one small set was made, by two processes."""

    folder: Path
    written: Written

    @classmethod
    def setUpClass(cls) -> None:
        parent = tempfile.TemporaryDirectory()
        cls.addClassCleanup(parent.cleanup)
        cls.folder = Path(parent.name) / "demo"
        cls.written = write_demo_data(cls.folder, train=1, val=1, workers=2)

    def _rows(self, domain: str, split: str) -> list[dict[str, str]]:
        with open(self.folder / domain / f"{split}.csv", encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def test_lists_have_the_promised_form(self) -> None:
        self.assertEqual(self.written.videos, CLASSES * len(DOMAINS) * 2)
        self.assertEqual((self.folder / "class_names.txt").read_text().split(), list(ACTIONS))
        self.assertGreaterEqual(CLASSES, 10)
        for domain in DOMAINS:
            for split in SPLITS:
                paths = np.load(self.folder / domain / f"{split}_paths.npy", allow_pickle=False)
                labels = np.load(self.folder / domain / f"{split}_labels.npy", allow_pickle=False)
                self.assertEqual((paths.dtype.kind, labels.dtype), ("U", np.int64))
                self.assertEqual((paths.shape, labels.shape), ((CLASSES,), (CLASSES,)))
                self.assertEqual(sorted(labels.tolist()), list(range(CLASSES)))
                on_disk = {f"{split}/{path.name}" for path in (self.folder / domain / split).iterdir()}
                self.assertEqual(set(paths.tolist()), on_disk)
                rows = self._rows(domain, split)
                self.assertEqual([row["path"] for row in rows], paths.tolist())
                self.assertEqual([row["action"] for row in rows], [ACTIONS[label] for label in labels])

    def test_videos_decode_to_what_the_table_says(self) -> None:
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
        # The ids of whole pools, from many specs, and those in the tables of the videos on disk.
        seen: dict[str, dict[str, set[int]]] = {"body": {}, "place": {}, "camera": {}}
        for domain in DOMAINS:
            for split in SPLITS:
                specs = [video_spec(0, domain, split, index) for index in range(400)]
                for kind, pools in seen.items():
                    pools[f"{domain}/{split}"] = {getattr(spec, kind) for spec in specs}
                    written = {int(row[kind]) for row in self._rows(domain, split)}
                    self.assertLessEqual(written, pools[f"{domain}/{split}"])
        for kind, pools in seen.items():
            self.assertEqual(sum(map(len, pools.values())), len(set().union(*pools.values())), kind)
            self.assertGreater(min(map(len, pools.values())), 20, kind)

    def test_one_process_gives_the_same_bytes(self) -> None:
        with tempfile.TemporaryDirectory() as other:
            write_demo_data(other, train=1, val=1, workers=1)
            self.assertEqual(_digest(self.folder), _digest(Path(other)))

    def test_what_an_interruption_left_is_completed(self) -> None:
        with tempfile.TemporaryDirectory() as parent:
            copy = Path(parent) / "copy"
            shutil.copytree(self.folder, copy)
            self.assertEqual(write_demo_data(copy, train=1, val=1, workers=1).made, 0)
            stamp = json.loads((copy / "demo-data.json").read_text())
            (copy / "demo-data.json").write_text(json.dumps({**stamp, "complete": False}))
            (copy / "target" / "train" / "00003.mp4").unlink()
            (copy / "target" / "train" / ".00003.mp4.77.part").write_bytes(b"half a video")
            (copy / "nohuman" / "val_labels.npy").unlink()
            made = []
            again = write_demo_data(copy, train=1, val=1, workers=1, progress=lambda done, total: made.append(done))
            self.assertEqual((again.made, made), (1, [again.videos]))
            self.assertEqual(_digest(copy), _digest(self.folder))

    def test_a_killed_run_leaves_no_process_and_can_be_completed(self) -> None:
        code = "import sys; from omnivision_demo.dataset import write_demo_data as w; w(sys.argv[1], train=1, val=1)"
        with tempfile.TemporaryDirectory() as folder:
            run = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, cwd=ROOT)
            until = time.monotonic() + 20
            while not list(Path(folder).rglob("*.mp4")) and time.monotonic() < until:
                time.sleep(0.01)
            run.kill()
            run.communicate(timeout=10)  # returns once no worker holds the pipe any more
            again = write_demo_data(folder, train=1, val=1, workers=1)
            self.assertGreater(again.made, 0)
            self.assertLess(again.made, again.videos)
            self.assertEqual(_digest(Path(folder)), _digest(self.folder))

    def test_a_dead_worker_ends_the_run(self) -> None:
        def kill_one(done: int, total: int) -> None:
            for worker in multiprocessing.active_children()[:1]:  # none is left once its death was noticed
                worker.kill()

        with tempfile.TemporaryDirectory() as folder:
            with self.assertRaisesRegex(RuntimeError, "--workers"):
                write_demo_data(folder, train=1, val=1, workers=2, progress=kill_one)
            self.assertFalse(json.loads((Path(folder) / "demo-data.json").read_text())["complete"])

    def test_other_settings_do_not_overwrite(self) -> None:
        before = _digest(self.folder)
        with self.assertRaisesRegex(UserError, "seed 0 instead of 5.*another DIR"):
            write_demo_data(self.folder, train=1, val=1, seed=5)
        self.assertEqual(_digest(self.folder), before)


class Refused(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def test_foreign_folders_are_left_alone(self) -> None:
        (self.folder / "thesis.txt").write_text("years of work")
        with self.assertRaisesRegex(UserError, r"thesis\.txt.*Choose another DIR"):
            write_demo_data(self.folder)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["thesis.txt"])

    def test_unreadable_stamps_are_reported(self) -> None:
        for content in ("{", "[]", "{}", '{"complete": '):
            (self.folder / "demo-data.json").write_text(content)
            with self.subTest(content), self.assertRaisesRegex(UserError, "cannot be read"):
                write_demo_data(self.folder)

    def test_places_that_cannot_be_written(self) -> None:
        file = self.folder / "file"
        file.write_text("")
        for target in (file, file / "below"):
            with self.assertRaisesRegex(UserError, "cannot be written.*choose another DIR"):
                write_demo_data(target)

    def test_impossible_settings(self) -> None:
        for setting in ({"train": 0}, {"val": -1}, {"seed": -1}, {"workers": 0}, {"domains": ("moon",)}):
            with self.subTest(setting), self.assertRaisesRegex(UserError, "expected"):
                write_demo_data(self.folder, **setting)
        self.assertEqual(list(self.folder.iterdir()), [])


class CommandLine(unittest.TestCase):
    def _run(self, *arguments: str) -> tuple[int, str, mock.MagicMock]:
        one_domain = functools.partial(write_demo_data, domains=("synthetic",))  # a third of the time
        with mock.patch.object(demo_data, "write_demo_data", wraps=one_domain) as write:
            status, output, errors = call_command("demo-data", *arguments)
        return status, output + errors, write

    def test_makes_a_set_and_finds_it_again(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (folder, "--quick", "--train", "1", "--seed", "3", "--workers", "1")
            status, output, write = self._run(*arguments)
            self.assertEqual(status, 0)
            asked = write.call_args.kwargs
            self.assertEqual([asked[key] for key in ("train", "val", "seed", "workers")], [1, 1, 3, 1])
            self.assertIn("Made 24 videos", output)
            self.assertIn(f"{folder}/target: 12 training and 12 validation videos", output)
            self.assertIn("24 of 24 videos", output)
            status, output, _ = self._run(*arguments)
            self.assertEqual(status, 0)
            self.assertIn("complete already", output)


class Specs(unittest.TestCase):
    def test_videos_vary(self) -> None:
        for domain in DOMAINS:
            specs = [video_spec(0, domain, "train", index) for index in range(480)]
            self.assertEqual({spec.fps for spec in specs}, {12, 15, 24, 25, 30})
            self.assertGreaterEqual(len({spec.gop for spec in specs}), 5)
            self.assertEqual((min(spec.gop for spec in specs), max(spec.gop for spec in specs)), (1, 48))
            seconds = [spec.frames / spec.fps for spec in specs]
            self.assertGreater(min(seconds), 1.1)
            self.assertLess(max(seconds), 4.1)
            self.assertGreater(max(seconds) - min(seconds), 2.0)
            self.assertEqual(np.bincount([spec.label for spec in specs]).tolist(), [40] * CLASSES)

    def test_seeds_and_ids_make_a_difference(self) -> None:
        first, other = video_spec(0, "target", "train", 0), video_spec(1, "target", "train", 0)
        short = [dataclasses.replace(spec, frames=2) for spec in (first, dataclasses.replace(first, seed=1))]
        self.assertNotEqual(first, other)
        self.assertFalse(np.array_equal(render(short[0]), render(short[1])))
        np.testing.assert_array_equal(render(short[0]), render(short[0]))
        for domain in DOMAINS:
            specs = [video_spec(0, domain, split, index) for split in SPLITS for index in range(300)]
            bodies = {number: body(0, domain, number) for number in {spec.body for spec in specs}}
            cameras = {number: camera(0, domain, number) for number in {spec.camera for spec in specs}}
            places = {number: place(0, domain, number) for number in {spec.place for spec in specs}}
            for things in (bodies, cameras, places):
                self.assertEqual(len({repr(thing) for thing in things.values()}), len(things))

    def test_any_clip_of_training_length_shows_the_motion(self) -> None:
        # At least 1.4 turns of the running channel in the worst 1.3 seconds, and the others stand still.
        for number in range(60):
            value = motion(number % CLASSES, 400, 100.0, stream(0, "test", number))
            running = value[:, number % CLASSES]
            swing = np.lib.stride_tricks.sliding_window_view(running, 130)
            crossings = (np.diff(np.sign(swing - running.mean()), axis=1) != 0).sum(axis=1)
            self.assertGreaterEqual(crossings.min(), 2)
            self.assertGreater(np.ptp(swing, axis=1).min(), 1.4)
            still = np.delete(np.ptp(value, axis=0), number % CLASSES)
            self.assertLess(still.max(), 0.1)

    def test_without_its_person_only_the_person_is_missing(self) -> None:
        spec = dataclasses.replace(video_spec(0, "target", "train", 5), frames=4)
        changed = (render(spec) != render(spec, person=False)).any(axis=(0, 3))
        self.assertGreater(changed.mean(), 0.03)
        self.assertLess(changed.mean(), 0.5)
        unseen = dataclasses.replace(video_spec(0, "nohuman", "train", 5), frames=4)
        np.testing.assert_array_equal(render(unseen), render(unseen, person=False))
        self.assertFalse(np.array_equal(render(unseen), render(unseen, person=True)))
        self.assertGreater(np.abs(np.diff(render(unseen).astype(float), axis=0)).mean(), 0.01)


def _ridge(train: Array, labels: Array, test: Array) -> NDArray[np.int64]:
    """Labels predicted by a ridge classifier on standardised features (N, F) and a constant."""
    mean, deviation = train.mean(axis=0), train.std(axis=0) + 1e-9
    train, test = ((features - mean) / deviation for features in (train, test))
    kernel = train @ train.T + 1.0  # the dual form: pictures have more pixels than there are videos
    weights = np.linalg.solve(kernel + 0.1 * train.shape[1] * np.eye(len(train)), np.eye(CLASSES)[labels.astype(int)])
    return ((test @ train.T + 1.0) @ weights).argmax(axis=1)


def _nearest(train: Array, labels: Array, test: Array, neighbours: int = 15) -> NDArray[np.int64]:
    """Labels predicted by the vote of the nearest neighbours."""
    mean, deviation = train.mean(axis=0), train.std(axis=0) + 1e-9
    train, test = ((features - mean) / deviation for features in (train, test))
    distance = (test**2).sum(axis=1)[:, None] + (train**2).sum(axis=1) - 2 * test @ train.T
    votes = labels.astype(int)[np.argpartition(distance, neighbours, axis=1)[:, :neighbours]]
    return np.array([np.bincount(row, minlength=CLASSES).argmax() for row in votes])


def _accuracy(features: Array, labels: Array) -> float:
    """Share of right labels in the last 40 percent, learnt from the rest; the better of two classifiers."""
    cut = int(0.6 * len(features))
    parts = features[:cut], labels[:cut], features[cut:]
    return float(max((_ridge(*parts) == labels[cut:]).mean(), (_nearest(*parts) == labels[cut:]).mean()))


def _bound(videos: int) -> float:
    """What guessing exceeds about once in a thousand tries, as the better of two: chance + 3.3 deviations."""
    tested = videos - int(0.6 * videos)
    chance = 1 / CLASSES
    return chance + 3.3 * float(np.sqrt(chance * (1 - chance) / tested))


def _with_powers(values: Array) -> Array:
    return np.concatenate([values, np.abs(values), values**2], axis=1)


class NoShortCuts(unittest.TestCase):
    """One frame, or the place, says nothing about the action in the synthetic and target domains; the motion does."""

    def test_true_joint_angles(self) -> None:
        videos = 1500
        for domain in ("synthetic", "target"):
            specs = [video_spec(0, domain, "train", index) for index in range(videos)]
            labels = np.array([spec.label for spec in specs])
            moments = stream(0, "moment").uniform(0, 1, videos)
            values = [channels(spec) for spec in specs]
            single = np.stack([value[int(at * len(value))] for value, at in zip(values, moments, strict=True)])
            self.assertLess(_accuracy(_with_powers(single), labels), _bound(videos))
            moving = np.stack([value.std(axis=0) for value in values])
            self.assertGreater(_accuracy(moving, labels), 0.95)
            # If idle channels rested nearer to the middle than the running one, this test would notice.
            running = np.eye(CLASSES, dtype=bool)[labels]
            leaky = np.where(running, single, 0.7 * single)
            self.assertGreater(_accuracy(_with_powers(leaky), labels), _bound(videos))

    def test_everything_else_in_a_spec(self) -> None:
        specs = [video_spec(0, "target", "train", index) for index in range(1500)]
        labels = np.array([spec.label for spec in specs])
        kinds = np.eye(CLASSES)[[PLACE_TYPES.index(spec.place_type) for spec in specs]]
        rest = np.array([[s.body, s.place, s.camera, s.fps, s.frames, s.gop, s.crf] for s in specs], dtype=float)
        self.assertLess(_accuracy(np.concatenate([kinds, rest], axis=1), labels), _bound(1500))

    def test_pixels(self) -> None:
        videos = 320
        # Eight frames over 1.3 seconds are enough to see the motion, and quick to draw.
        specs = [
            dataclasses.replace(video_spec(0, "target", "train", index), fps=6, frames=8) for index in range(videos)
        ]
        labels = np.array([spec.label for spec in specs])
        frames, backgrounds, poses, motions = [], [], [], []
        for number, spec in enumerate(specs):
            video, empty = render(spec), render(spec, person=False)
            frames.append(_small(video[number % 8]).ravel())
            seen = np.stack([_small(picture) for picture in empty])
            changes = np.abs(np.diff(seen, axis=0)).mean(axis=0)
            backgrounds.append(np.concatenate([seen[0].ravel(), seen[-1].ravel(), changes.ravel()]))
            shape = _silhouette((video != empty).any(axis=3))  # (8, features)
            poses.append(shape[number % 8])
            motions.append(np.log(shape.std(axis=0) + 1e-3))
        bound = _bound(videos)
        self.assertLess(_accuracy(np.stack(frames), labels), bound, "one frame")
        self.assertLess(_accuracy(np.stack(backgrounds), labels), bound, "the background")
        self.assertLess(_accuracy(np.stack(poses), labels), bound, "the silhouette in one frame")
        self.assertGreater(_accuracy(np.stack(motions), labels), 2 * bound, "the motion of the silhouette")

    def test_without_people_the_place_is_a_hint_but_no_proof(self) -> None:
        def kinds_and_labels(split: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            specs: list[VideoSpec] = [video_spec(0, "nohuman", split, index) for index in range(1200)]
            kinds = [PLACE_TYPES.index(spec.place_type) for spec in specs]
            return np.array(kinds), np.array([spec.label for spec in specs])

        kinds, labels = kinds_and_labels("train")
        usual = np.array([np.bincount(labels[kinds == kind]).argmax() for kind in range(len(PLACE_TYPES))])
        kinds, labels = kinds_and_labels("val")
        right = float((usual[kinds] == labels).mean())
        self.assertGreater(right, 0.4)
        self.assertLess(right, 0.8)


def _small(picture: NDArray[np.uint8]) -> Array:
    """The picture averaged down to (12, 12, 3), whatever its size."""
    height, width = picture.shape[:2]
    rows, columns = np.arange(12) * height // 12, np.arange(12) * width // 12
    sums = np.add.reduceat(np.add.reduceat(picture.astype(np.float64), rows, axis=0), columns, axis=1)
    area = np.diff([*rows, height])[:, None, None] * np.diff([*columns, width])[None, :, None]
    return np.asarray(sums / area)


def _silhouette(mask: NDArray[np.bool_]) -> Array:
    """Where a silhouette (T, H, W) is, how wide, and how it is spread over its own height: (T, 14)."""
    rows = []
    for frame in mask:
        y, x = np.nonzero(frame)
        if len(y) == 0:  # stepped out of the picture
            rows.append(np.zeros(14))
            continue
        top, low = np.percentile(y, (2, 90))
        bands = np.clip(((y - top) / max(low - top, 1) * 4).astype(int), 0, 3)
        widths = [np.ptp(x[bands == band]) if (bands == band).any() else 0 for band in range(4)]
        middles = [x[bands == band].mean() - x.mean() if (bands == band).any() else 0 for band in range(4)]
        rows.append(np.array([x.mean(), y.mean(), top, low, len(y) / 20, np.ptp(x), *widths, *middles]))
    return np.stack(rows)


if __name__ == "__main__":
    unittest.main()
