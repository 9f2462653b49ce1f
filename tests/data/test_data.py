"""Requests to batches, on small videos: what a step holds, whatever the workers and ranks; and bad files."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from omnivision.data.batch import BadSample, Batch, Sample, collate, missing_files_message
from omnivision.data.catalog import Dataset, Split
from omnivision.data.dataset import REPLACEMENTS, ClipConfig, ClipDataset
from omnivision.data.encode import write_video
from omnivision.data.loader import LoaderConfig, TrainData, ValData
from omnivision.data.masking import RandomMask
from omnivision.data.sampling import EpochPlan, Request, SourcePlan
from omnivision.data.views import EvalView, PretrainView
from omnivision.reporting.logs import BadSampleLedger
from omnivision.utils.errors import DataWorkerError, UserError
from tests import runs


class Changed(ClipDataset):
    """Samples changed by `how`, in the process that makes them."""

    how = ""

    def __getitem__(self, request: Request) -> Sample:
        sample = super().__getitem__(request)
        if self.how == "fails":
            raise RuntimeError("no worker was killed")
        if self.how == "threads":
            sample.label = torch.get_num_threads()
        if self.how == "process":
            sample.label = os.getpid()
        if self.how == "masks":
            assert sample.mask is not None
            sample.mask[request.sample_index % 4].fill_(True)  # hides more and more of its samples
        return sample


class Videos(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.temporary.cleanup)
        cls.folder = Path(cls.temporary.name)
        names = [f"{number}.mp4" for number in range(11)]
        for number, name in enumerate(names):
            rng = np.random.default_rng(number)
            video = rng.integers(0, 256, (20, 6, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
            write_video(cls.folder / name, video, fps=10)
        # A video and a folder whose frames are of one grey each, brighter with time: a view tells the moments it shows.
        greys = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None, None] * 12, (20, 48, 64, 3))
        write_video(cls.folder / "greys.mp4", greys, fps=10, crf=0)
        (cls.folder / "greys").mkdir()
        for number, frame in enumerate(greys):
            Image.fromarray(frame).save(cls.folder / "greys" / f"{number:05d}.png")
        broken = [name if number not in (2, 7) else f"missing_{number}.mp4" for number, name in enumerate(names)]
        none = [f"none_{i}.mp4" for i in range(11)]
        paths = {
            "paths": names,
            "broken": broken,
            "greys": ["greys.mp4", "greys"],
            "none": none,
            "strip": ["strip.mp4"],
        }
        for name, files in paths.items():
            np.save(cls.folder / f"{name}.npy", np.array(files))
        np.save(cls.folder / "labels.npy", np.arange(11) % 3)

    def split(self, paths: str, name: str = "videos") -> Split:
        files = {"paths": str(self.folder / f"{paths}.npy")}
        if paths not in ("greys", "strip"):
            files["labels"] = str(self.folder / "labels.npy")
        return Split(Dataset(name=name, prefix=f"{self.folder}/", fps=10, train=files), "train")

    def dataset(
        self, paths: str = "paths", training: bool = True, max_pixels: int | None = None, how: str = ""
    ) -> ClipDataset:
        view = PretrainView(32, short_side=40) if training else EvalView(32)
        config = ClipConfig(view, 4 if training else 1, num_frames=4, grid=(2, 4, 4), mask=RandomMask(0.75))
        dataset = Changed([self.split(paths)], {"video": config}, 0.7, 5, training, max_pixels)
        dataset.how = how
        return dataset

    def train(self, workers: int = 0, paths: str = "paths", how: str = "", **config: float) -> TrainData:
        plan = EpochPlan({"videos": SourcePlan(11, 2, views_per_video=4, repeat=4)}, seed=5)
        return TrainData(self.dataset(paths, how=how), LoaderConfig(workers, **config), plan)

    def batches(
        self, workers: int = 0, start: tuple[int, int] = (0, 0), rank: int = 0, world: int = 1, paths: str = "paths"
    ) -> list[Batch]:
        return list(self.train(workers, paths).batches(start, 2, rank, world))

    def evaluated(self, videos: int = 4, workers: int = 0, rank: int = 0, world: int = 1, **more) -> list[Batch]:
        dataset = self.dataset(more.pop("paths", "paths"), training=False)
        dataset.splits += more.pop("splits", [])
        return list(ValData(dataset, LoaderConfig(workers), videos).batches(rank=rank, world=world, **more))

    def assert_same(self, one: list[Batch], other: list[Batch]) -> None:
        self.assertEqual(len(one), len(other))
        for first, second in zip(one, other, strict=True):
            for name in ("video", "label", "index", "mask"):
                self.assertTrue(torch.equal(getattr(first, name), getattr(second, name)), name)
            for name in ("paths", "source", "bad", "num_masked"):
                self.assertEqual(getattr(first, name), getattr(second, name))


class Training(Videos):
    def test_batch_shapes_and_dtypes(self):
        batch = self.batches()[0]
        self.assertEqual((tuple(batch.video.shape), batch.video.dtype), ((8, 3, 4, 32, 32), torch.uint8))
        self.assertTrue(batch.video.is_contiguous(memory_format=torch.channels_last_3d), "as it was decoded")
        self.assertEqual((tuple(batch.mask.shape), batch.num_masked), ((8, 2, 4, 4), 24))
        self.assertEqual(batch.index.tolist(), [batch.index[0].item()] * 4 + [batch.index[4].item()] * 4)
        self.assertEqual(batch.label.tolist(), [i % 3 for i in batch.index.tolist()])
        self.assertEqual(batch.paths[0], f"{self.folder}/{batch.index[0]}.mp4")
        views = {view.numpy().tobytes() for view in batch.video}
        masks = {mask.numpy().tobytes() for mask in batch.mask}
        self.assertEqual((len(views), len(masks)), (8, 8), "each view has its own crop and mask")

    def test_the_views_of_a_clip_show_the_same_moments_in_a_video_and_in_a_folder(self):
        moments = {}
        for video, epoch in ((0, 0), (0, 1), (1, 0)):
            clip = self.dataset("greys")[Request(0, video, epoch)].video.float()
            shades = clip.mean((1, 3, 4))  # (V, T)
            self.assertLess(float((shades - shades[0]).abs().max()), 1)
            self.assertTrue((shades.diff(dim=1) > 6).all(), "in the order of time")
            moments[video, epoch] = shades[0].div(12).round().int().tolist()
        self.assertNotEqual(moments[0, 0], moments[0, 1], "another clip in another epoch")
        for frames in moments.values():  # 0.7 s at 10 frames a second
            self.assertIn(frames[-1] - frames[0], (6, 7))

    def test_another_epoch_or_repeat_has_other_views(self):
        one = self.dataset()[Request(0, 3, 0)]
        for request in (Request(0, 3, 1), Request(0, 3, 0, repeat_index=1)):
            sample = self.dataset()[request]
            self.assertFalse(torch.equal(one.video, sample.video) or torch.equal(one.mask, sample.mask))

    def test_batches_do_not_depend_on_workers_ranks_or_resuming(self):
        whole = self.batches()
        self.assertEqual(len(whole), 10)
        self.assert_same(whole, self.batches(2))
        self.assert_same(whole[3:], self.batches(1, start=(0, 3)))
        self.assert_same(whole[7:], self.batches(start=(1, 2)))
        halves = [self.batches(rank=rank, world=2) for rank in (0, 1)]
        for batch, *parts in zip(whole, *halves, strict=True):
            self.assertTrue(torch.equal(batch.video, torch.cat([part.video for part in parts])))

    def test_the_memory_of_a_worker_does_not_grow(self):
        def resident() -> int:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

        dataset, kilobytes = self.dataset(), []
        for number in range(300):
            dataset[Request(0, number % len(dataset.splits[0]), number)]
            if number in (100, 299):
                kilobytes.append(resident())
        self.assertLess(kilobytes[1] - kilobytes[0], 8 * 1024, "after 100 and 300 samples")

    def test_worker_errors_are_raised_unchanged(self):
        for (how, expected, saying), workers in itertools.product(
            (("fails", RuntimeError, "no worker was killed"), ("masks", UserError, r"trainer\.data\.mask")), (0, 1)
        ):
            with self.assertRaisesRegex(expected, saying) as caught:
                next(self.train(workers, how=how).batches((0, 0), 1))
            self.assertNotIsInstance(caught.exception, DataWorkerError)
            self.assertEqual("Traceback" in str(caught.exception), how == "fails" and workers == 1)

    def test_workers_run_one_thread_and_carry_bytes_through_shared_memory(self):
        batch = next(self.train(1, how="threads").batches((0, 0), 1))
        self.assertEqual(batch.label.tolist(), [1] * 8)
        self.assertEqual((batch.video.dtype, batch.video.is_shared()), (torch.uint8, True))

    def test_a_worker_survives_a_signal_to_all_processes_of_a_job(self):
        """The one that trains still needs its workers to save."""
        code = "from tests.data.test_data import Training; Training.setUpClass(); Training().signal_a_worker()"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=runs.ROOT, timeout=60)
        self.assertEqual((run.returncode, run.stdout), (0, "1\n"), run.stderr)

    def signal_a_worker(self) -> None:
        batches = self.train(1, how="process", prefetch=1).batches((0, 0), 4)
        workers = [int(next(batches).label[0]) for _ in range(2)]
        for number in (signal.SIGTERM, signal.SIGUSR2):
            os.kill(workers[0], number)
        print(len({*workers, *(int(next(batches).label[0]) for _ in range(2))}))


class Evaluating(Videos):
    def test_evaluation_reads_each_video_once(self):
        greys = self.split("greys", "greys")
        for world in (1, 2, 3):
            batches = [batch for rank in range(world) for batch in self.evaluated(2, rank=rank, world=world)]
            self.assertEqual(sorted(i for batch in batches for i in batch.index.tolist()), list(range(11)), world)
            batches = [b for rank in range(world) for b in self.evaluated(rank=rank, world=world, splits=[greys])]
            seen = sorted((batch.source, index) for batch in batches for index in batch.index.tolist())
            self.assertEqual(seen, [("greys", 0), ("greys", 1)] + [("videos", i) for i in range(11)])
        self.assert_same(self.evaluated(), self.evaluated(workers=2))

    def test_limited_evaluation_alternates_sources(self):
        self.assertEqual([b.index.tolist() for b in self.evaluated(2, limit=2)], [[0, 1], [2, 3]])
        both = self.evaluated(limit=2, splits=[self.split("paths", "again")])
        self.assertEqual(
            [(b.source, b.index.tolist()) for b in both], [("videos", [0, 1, 2, 3]), ("again", [0, 1, 2, 3])]
        )


class BadFiles(Videos):
    def test_bad_training_video_is_replaced_reproducibly(self):
        dataset = self.dataset("broken")
        sample = dataset[Request(0, 2, 0)]
        self.assertEqual(([bad.index for bad in sample.bad][:1], bool(sample.bad[0].reason)), ([2], True))
        self.assertNotIn(sample.index, (2, 7))
        self.assertEqual((sample.path, sample.label), (f"{self.folder}/{sample.index}.mp4", sample.index % 3))
        self.assertTrue(torch.equal(sample.video, self.dataset("broken")[Request(0, 2, 0)].video))
        others = {dataset[Request(0, 2, epoch)].index for epoch in range(8)}
        self.assertGreater(len(others), 1, "another one in another epoch")
        whole = self.batches(paths="broken")
        self.assertEqual({bad.index for batch in whole for bad in batch.bad}, {2, 7})
        self.assertEqual({len(batch) for batch in whole}, {8})
        self.assert_same(whole, self.batches(2, paths="broken"))

    def test_bad_evaluation_video_is_skipped_and_reported(self):
        batches = self.evaluated(paths="broken")
        self.assertEqual([i for batch in batches for i in batch.index.tolist()], [0, 1, 3, 4, 5, 6, 8, 9, 10])
        self.assertEqual([bad.index for batch in batches for bad in batch.bad], [2, 7])

    def test_video_above_max_pixels_is_bad(self):
        self.assertEqual(self.dataset(training=False, max_pixels=48 * 64)[Request(0, 0, 0)].bad, [])
        (bad,) = self.dataset(training=False, max_pixels=48 * 64 - 1)[Request(0, 0, 0)].bad
        self.assertEqual((bad.source, bad.index, bad.path), ("videos", 0, f"{self.folder}/0.mp4"))
        self.assertIn("max_pixels", bad.reason)

    def test_extreme_aspect_ratio_is_bad(self):
        for side, count in ((16 * 16, 0), (16 * 16 + 2, 1)):
            for size in ((16, side), (side, 16)):
                write_video(self.folder / "strip.mp4", np.zeros((4, *size, 3), np.uint8), fps=4)
                self.assertEqual(len(self.dataset("strip", training=False)[Request(0, 0, 0)].bad), count, size)

    def test_sample_is_empty_if_all_videos_are_bad(self):
        sample = self.dataset("none")[Request(0, 2, 0)]
        self.assertEqual((len(sample.video), len(sample.bad)), (0, 1 + REPLACEMENTS))
        files = {bad.path for bad in sample.bad}
        self.assertLess(len(files), len(sample.bad))
        message = missing_files_message(sample.bad, "files of a batch")
        self.assertIn(f" {len(files)} files", message, "files, not tries")
        self.assertIn("datasets.videos.prefix", message)

    def test_lost_disk_makes_files_missing_and_damage_makes_them_bad(self):
        dataset = self.dataset(training=False)
        for code in (errno.ENOTCONN, errno.ESTALE, errno.ENOENT, errno.EINVAL):
            with mock.patch("os.open", side_effect=OSError(code, "x")):
                (bad,) = dataset[Request(0, 0, 0)].bad
            self.assertEqual(bad.missing, code != errno.EINVAL, errno.errorcode[code])


class Batches(unittest.TestCase):
    def sample(self, hidden: int | None = 3, views: int = 2, **more: object) -> Sample:
        mask = None
        if hidden is not None:
            mask = torch.arange(8).reshape(1, 2, 2, 2).expand(views, -1, -1, -1) < hidden
        return Sample(torch.zeros(views, 3, 2, 4, 4, dtype=torch.uint8), mask, 1, "s", 0, "a.mp4", **more)

    def test_batches_are_split_and_moved(self):
        batch = collate([self.sample() for _ in range(3)])
        parts = batch.split(3)
        self.assertEqual([len(part) for part in parts], [2, 2, 2])
        self.assertTrue(torch.equal(torch.cat([part.video for part in parts]), batch.video))
        self.assertEqual([(part.paths, part.num_masked) for part in parts], [(["a.mp4"] * 2, 3)] * 3)
        moved = batch.to(torch.device("meta"))
        self.assertEqual({t.device.type for t in (moved.video, moved.label, moved.index, moved.mask)}, {"meta"})

    def test_masks(self):
        with self.assertRaisesRegex(UserError, r"\[3, 4\].*trainer\.data\.mask"):
            collate([self.sample(), self.sample(hidden=4)])
        batch = collate([self.sample(hidden=None)] * 2)
        self.assertEqual((batch.mask, batch.num_masked, [part.mask for part in batch.split(2)]), (None, 0, [None] * 2))

    def test_videos_without_views_are_named_and_not_counted(self):
        bad = [BadSample("s", 4, "b.mp4", "why not")]
        batch = collate([self.sample(), self.sample(views=0, bad=bad), self.sample()])
        self.assertEqual((len(batch), len(batch.mask), batch.num_masked, batch.bad), (4, 4, 3, bad))
        batch = collate([self.sample(views=0), self.sample(views=0)])
        self.assertEqual((len(batch), batch.paths, len(batch.label)), (0, [], 0))
        self.assertEqual([len(batch.pad_to(3).video), len(batch.pad_to(3).paths)], [3, 3])


class Ledger(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.path = Path(temporary.name) / "bad.jsonl"
        self.bad = [BadSample("videos", i, f"{i}.mp4", f"reason {i}") for i in range(3)]

    def ledger(
        self, *add: list[BadSample], files: int = 100, budget: float = 0.5, write: bool = True
    ) -> BadSampleLedger:
        ledger = BadSampleLedger(self.path, files=files, budget=budget)
        for bad in add:
            ledger.add(bad, write=write)
        return ledger

    def test_ledger_counts_each_file_once_up_to_the_budget(self):
        self.ledger(self.bad[:2], self.bad[:1])
        self.assertEqual([json.loads(line)["path"] for line in self.path.read_text().splitlines()], ["0.mp4", "1.mp4"])
        resumed = self.ledger(budget=0.02)
        self.assertEqual(len(resumed), 2)
        with self.assertRaisesRegex(
            UserError, r"(?s)3 of 100 .*bad_sample_budget.*datasets.videos.prefix.*2\.mp4: reason 2"
        ) as caught:
            resumed.add(self.bad, write=False)
        self.assertTrue(caught.exception.on_all_ranks)
        self.assertEqual(len(self.path.read_text().splitlines()), 2)

    def test_a_repaired_file_is_forgotten(self):
        video = self.path.with_name("a.mp4")
        video.write_bytes(b"")
        self.ledger([BadSample("s", 0, str(video), "the file is empty")])
        self.assertEqual(len(self.ledger()), 1)
        time.sleep(0.02)
        video.write_bytes(b"whole")
        self.assertEqual(len(self.ledger()), 0)

    def test_truncated_ledger_line_is_skipped(self):
        self.ledger(self.bad[:2])
        whole = self.path.read_bytes()
        for cut in range(len(whole) + 1):
            self.path.write_bytes(whole[:cut])
            self.assertEqual(len(self.ledger(*([sample] for sample in self.bad))), 3)
            self.assertEqual(len(self.ledger()), 3, cut)

    def test_invalid_ledger_line_is_skipped(self):
        for damage in (b"\xff\xfe", b"[]", b'{"path": 3}'):
            with self.subTest(damage):
                self.path.write_bytes(damage + b"\n")
                self.ledger(self.bad[:1], files=4)
                self.assertEqual(len(self.ledger(files=4)), 1)

    def test_ledger_distinguishes_sources_and_splits(self):
        splits = [BadSample("s", 5, f"{split}/5.mp4", "why", split) for split in ("train", "val")]
        sources = [BadSample(source, 0, "a.mp4", "why") for source in ("one", "two")]
        ledger = self.ledger([*splits, *sources], write=False)
        self.assertEqual((len(ledger), self.path.exists()), (4, False))


if __name__ == "__main__":
    unittest.main()
