"""Requests to batches, on small films: what a step holds, whatever the workers and processes; and bad files."""

import errno
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

from omnivision.data.batch import BadSample, Batch, Sample, collate, vanished_files
from omnivision.data.catalog import Dataset, Split
from omnivision.data.dataset import REPLACEMENTS, ClipConfig, ClipDataset
from omnivision.data.encode import write_video
from omnivision.data.loader import LoaderConfig, evaluation_batches, train_batches
from omnivision.data.masking import RandomMask
from omnivision.data.sampling import EpochPlan, Request, SourcePlan
from omnivision.data.views import EvalView, PretrainView
from omnivision.reporting.logs import BadSampleLedger
from omnivision.utils.errors import DataWorkerError, UserError
from tests import runs


def videos(plan: EpochPlan, epoch: int, rank: int = 0, world: int = 1) -> list[list[Request]]:
    return [plan.requests(epoch, step, rank, world) for step in range(plan.steps)]


def one_source(size: int, videos: int, limit: int | None = None, **more) -> EpochPlan:
    return EpochPlan({"a": SourcePlan(size, videos, **more)}, seed=1, limit=limit)


class Plan(unittest.TestCase):
    def test_each_video_once_an_epoch(self):
        plan = one_source(24, 6)
        for epoch in (0, 1):
            seen = [request.video for step in videos(plan, epoch) for request in step]
            self.assertEqual(sorted(seen), list(range(24)))
        self.assertNotEqual(videos(plan, 0), [[r._replace(epoch=0) for r in step] for step in videos(plan, 1)])

    def test_repeated_augmentation_sees_a_share_of_the_videos(self):
        plan = one_source(64, 4, views=4)
        self.assertEqual(plan.steps, 4)
        seen = [request.video for step in videos(plan, 0) for request in step]
        self.assertEqual((len(seen), len(set(seen))), (16, 16))

    def test_repeats(self):
        twice = one_source(12, 4, repeat=2)
        requests = [request for step in videos(twice, 0) for request in step]
        self.assertEqual(sorted(request.video for request in requests), sorted([*range(12)] * 2))
        self.assertEqual({request.repeat_index for request in requests}, {0, 1})
        self.assertEqual(len(set(requests)), 24, "the second time with other random draws")

    def test_half_a_repeat_sees_another_half_each_epoch(self):
        plan = one_source(40, 4, repeat=0.5)
        halves = [{request.video for step in videos(plan, epoch) for request in step} for epoch in (0, 1)]
        self.assertEqual([len(half) for half in halves], [20, 20])
        self.assertNotEqual(*halves)

    def test_a_step_may_end_one_round_and_begin_the_next(self):
        plan = one_source(10, 4, repeat=2)
        steps = videos(plan, 0)
        self.assertIn({0, 1}, [{request.repeat_index for request in step} for step in steps])
        for repeat_index in (0, 1):
            seen = [request.video for step in steps for request in step if request.repeat_index == repeat_index]
            self.assertEqual(sorted(seen), list(range(10)))
        for step, whole in enumerate(steps):
            self.assertEqual([r for rank in range(4) for r in plan.requests(0, step, rank, 4)], whole)

    def test_sources_take_turns_by_batch_in_a_seeded_order(self):
        plan = EpochPlan({"a": SourcePlan(40, 4), "b": SourcePlan(20, 4, repeat=2)}, seed=1)
        steps = videos(plan, 0)
        self.assertTrue(all(len({request.source for request in step}) == 1 for step in steps))
        order = [step[0].source for step in steps]
        self.assertEqual((order.count(0), order.count(1)), (10, 10))
        self.assertNotEqual(order, sorted(order))
        self.assertEqual(steps, videos(plan, 0))
        self.assertNotEqual(order, [step[0].source for step in videos(plan, 1)])

    def test_processes_share_the_same_step(self):
        plan = EpochPlan({"a": SourcePlan(40, 8), "b": SourcePlan(24, 8)}, seed=1)
        for world in (2, 4):
            for step in range(plan.steps):
                together = [r for rank in range(world) for r in plan.requests(3, step, rank, world)]
                self.assertEqual(together, plan.requests(3, step, 0, 1))

    def test_limit(self):
        limited = one_source(40, 4, limit=3)
        self.assertEqual(videos(limited, 0), videos(one_source(40, 4), 0)[:3])
        self.assertEqual(one_source(40, 4, limit=99).steps, 10)

    def test_a_source_without_a_batch_and_an_unknown_repeat(self):
        with self.assertRaisesRegex(
            UserError, r"Source b has 3 samples .*batch of 4.*\+\+trainer\.data\.repeats\.b=1\.334"
        ):
            EpochPlan({"a": SourcePlan(40, 4), "b": SourcePlan(3, 4)}, seed=1)
        for size in range(1, 200):  # what is advised is enough
            with self.assertRaises(UserError) as caught:
                one_source(size, 512, repeat=0.001)
            advice = float(str(caught.exception).rpartition("repeats.a=")[2].rstrip("."))
            self.assertEqual(one_source(size, 512, repeat=advice).total_steps, 1)

    def test_ten_million(self):
        plan = one_source(10_000_000, 512)
        self.assertEqual(len({r.video for r in plan.requests(3, 15_000, 0, 1)}), 512)


class Threads(ClipDataset):
    """Tells in its labels how many threads torch uses where samples are made."""

    def __getitem__(self, request: Request) -> Sample:
        sample = super().__getitem__(request)
        sample.label = torch.get_num_threads()
        return sample


class Failing(ClipDataset):
    def __getitem__(self, request: Request) -> Sample:
        raise RuntimeError("no worker was killed")


class Uneven(ClipDataset):
    """Hides more and more of its samples."""

    def __getitem__(self, request: Request) -> Sample:
        sample = super().__getitem__(request)
        assert sample.mask is not None
        sample.mask[request.video % 4].fill_(True)
        return sample


class Told(ClipDataset):
    """Tells in its labels which process makes samples."""

    def __getitem__(self, request: Request) -> Sample:
        sample = super().__getitem__(request)
        sample.label = os.getpid()
        return sample


class Films(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.folder = Path(cls.temporary.name)
        names = []
        for number in range(11):
            rng = np.random.default_rng(number)
            film = rng.integers(0, 256, (20, 6, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
            write_video(cls.folder / f"{number}.mp4", film, fps=10)
            names.append(f"{number}.mp4")
        np.save(cls.folder / "paths.npy", np.array(names))
        np.save(cls.folder / "labels.npy", np.arange(11) % 3)
        # A film and a folder whose frames are of one grey each, brighter with time: a view tells the moments it shows.
        greys = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None, None] * 12, (20, 48, 64, 3))
        write_video(cls.folder / "greys.mp4", greys, fps=10, crf=0)
        (cls.folder / "greys").mkdir()
        for number, frame in enumerate(greys):
            Image.fromarray(frame).save(cls.folder / "greys" / f"{number:05d}.png")
        np.save(cls.folder / "greys.npy", np.array(["greys.mp4", "greys"]))
        broken = [name if number not in (2, 7) else f"missing_{number}.mp4" for number, name in enumerate(names)]
        np.save(cls.folder / "broken.npy", np.array(broken))

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def split(self, paths: str, name: str = "films") -> Split:
        labels = str(self.folder / "labels.npy") if paths != "greys.npy" else None
        files = {"paths": str(self.folder / paths), "labels": labels}
        return Split(Dataset(name=name, prefix=f"{self.folder}/", fps=10, train=files), "train")

    def dataset(
        self, paths: str = "paths.npy", views: int = 4, training: bool = True, max_pixels: int | None = None
    ) -> ClipDataset:
        view = PretrainView(32, short_side=40) if training else EvalView(32)
        cut = ClipConfig(view, views if training else 1, num_frames=4, grid=(2, 4, 4), mask=RandomMask(0.75))
        return ClipDataset([self.split(paths)], {"video": cut}, 0.7, 5, training, max_pixels)

    def batches(
        self,
        workers: int,
        start: tuple[int, int] = (0, 0),
        rank: int = 0,
        world: int = 1,
        paths: str = "paths.npy",
    ) -> list[Batch]:
        plan = EpochPlan({"films": SourcePlan(11, 2, views=4, repeat=4)}, seed=5)
        return list(train_batches(self.dataset(paths), plan, start, 2, rank, world, LoaderConfig(workers)))

    def assert_same(self, one: list[Batch], other: list[Batch]) -> None:
        self.assertEqual(len(one), len(other))
        for first, second in zip(one, other, strict=True):
            for name in ("video", "label", "index", "mask"):
                self.assertTrue(torch.equal(getattr(first, name), getattr(second, name)), name)
            self.assertEqual(
                (first.paths, first.source, first.bad, first.num_masked),
                (second.paths, second.source, second.bad, second.num_masked),
            )

    def test_a_batch(self):
        batch = self.batches(0)[0]
        self.assertEqual((tuple(batch.video.shape), batch.video.dtype), ((8, 3, 4, 32, 32), torch.uint8))
        self.assertTrue(batch.video.is_contiguous(memory_format=torch.channels_last_3d), "as it was decoded")
        self.assertEqual((tuple(batch.mask.shape), batch.num_masked), ((8, 2, 4, 4), 24))
        self.assertEqual(batch.index.tolist(), [batch.index[0].item()] * 4 + [batch.index[4].item()] * 4)
        self.assertEqual(batch.label.tolist(), [i % 3 for i in batch.index.tolist()])
        self.assertEqual(batch.paths[0], f"{self.folder}/{batch.index[0]}.mp4")
        views = {view.numpy().tobytes() for view in batch.video}
        masks = {mask.numpy().tobytes() for mask in batch.mask}
        self.assertEqual((len(views), len(masks)), (8, 8), "each view has its own crop and mask")

    def test_the_views_of_a_clip_show_the_same_moments_in_a_film_and_in_a_folder(self):
        moments = {}
        for video, epoch in ((0, 0), (0, 1), (1, 0)):
            clip = self.dataset("greys.npy")[Request(0, video, epoch)].video.float()
            shown = clip.mean((1, 3, 4))  # (V, T)
            self.assertLess(float((shown - shown[0]).abs().max()), 1)
            self.assertTrue((shown.diff(dim=1) > 6).all(), "in the order of time")
            moments[video, epoch] = shown[0].div(12).round().int().tolist()
        self.assertNotEqual(moments[0, 0], moments[0, 1], "another clip in another epoch")
        for shown in moments.values():  # 0.7 s at 10 frames a second
            self.assertIn(shown[-1] - shown[0], (6, 7))

    def test_a_second_epoch_cuts_other_views(self):
        one, other = (self.dataset()[Request(0, 3, epoch)] for epoch in (0, 1))
        again = self.dataset()[Request(0, 3, 0, repeat_index=1)]
        for sample in (other, again):
            self.assertFalse(torch.equal(one.video, sample.video))
            self.assertFalse(torch.equal(one.mask, sample.mask))

    def test_neither_workers_nor_the_place_of_resuming_matter(self):
        whole = self.batches(0)
        self.assertEqual(len(whole), 10)
        self.assert_same(whole, self.batches(2))
        self.assert_same(whole[3:], self.batches(1, start=(0, 3)))
        self.assert_same(whole[7:], self.batches(0, start=(1, 2)))

    def test_replacements_and_what_is_told_of_them_do_not_depend_on_workers(self):
        whole = self.batches(0, paths="broken.npy")
        self.assertEqual({bad.index for batch in whole for bad in batch.bad}, {2, 7})
        self.assertEqual({len(batch) for batch in whole}, {8})
        self.assert_same(whole, self.batches(2, paths="broken.npy"))

    def test_two_processes_hold_what_one_holds(self):
        whole = self.batches(0)
        halves = [self.batches(0, rank=rank, world=2) for rank in (0, 1)]
        for batch, one, other in zip(whole, *halves, strict=True):
            self.assertTrue(torch.equal(batch.video, torch.cat([one.video, other.video])))

    def test_the_memory_of_a_worker_does_not_grow(self):
        def resident() -> int:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

        dataset, found = self.dataset(training=True), []
        for number in range(300):
            dataset[Request(0, number % len(dataset.splits[0]), number)]
            if number in (100, 299):
                found.append(resident())
        self.assertLess(found[1] - found[0], 8 * 1024, f"kB after 100 and 300 samples: {found}")

    def test_evaluation_takes_every_video_once(self):
        for world in (1, 2, 3):
            seen = []
            for rank in range(world):
                for batch in evaluation_batches(self.dataset(training=False), 2, rank, world, LoaderConfig()):
                    seen += batch.index.tolist()
            self.assertEqual(sorted(seen), list(range(11)), world)
        two = self.dataset(training=False)
        two.splits.append(self.split("greys.npy", "greys"))
        for world in (1, 2, 3):
            batches = [b for rank in range(world) for b in evaluation_batches(two, 4, rank, world, LoaderConfig())]
            seen = sorted((batch.source, index) for batch in batches for index in batch.index.tolist())
            self.assertEqual(seen, [("films", i) for i in range(11)] + [("greys", 0), ("greys", 1)])
        one = evaluation_batches(self.dataset(training=False), 4, 0, 1, LoaderConfig())
        self.assert_same(list(one), list(evaluation_batches(self.dataset(training=False), 4, 0, 1, LoaderConfig(2))))
        limited = list(evaluation_batches(self.dataset(training=False), 2, 0, 1, LoaderConfig(), limit=2))
        self.assertEqual([batch.index.tolist() for batch in limited], [[0, 1], [2, 3]])

    def test_in_a_limited_evaluation_the_sources_take_turns(self):
        dataset = self.dataset(training=False)
        dataset.splits = [dataset.splits[0], dataset.splits[0]]
        batches = evaluation_batches(dataset, 4, 0, 1, LoaderConfig(), limit=2)
        self.assertEqual([batch.index.tolist() for batch in batches], [[0, 1, 2, 3]] * 2, "of either")

    def test_a_bad_file_is_replaced_by_the_same_one_each_time(self):
        dataset = self.dataset("broken.npy")
        sample = dataset[Request(0, 2, 0)]
        self.assertEqual([bad.index for bad in sample.bad][:1], [2])
        self.assertNotIn(sample.index, (2, 7))
        self.assertEqual(sample.path, f"{self.folder}/{sample.index}.mp4")
        self.assertEqual(sample.label, sample.index % 3)
        self.assertTrue(sample.bad[0].reason)
        again = self.dataset("broken.npy")[Request(0, 2, 0)]
        self.assertTrue(torch.equal(sample.video, again.video))
        others = {dataset[Request(0, 2, epoch)].index for epoch in range(8)}
        self.assertGreater(len(others), 1, "another one in another epoch")

    def test_in_evaluation_a_bad_file_is_left_out_and_named(self):
        batches = list(evaluation_batches(self.dataset("broken.npy", training=False), 4, 0, 1, LoaderConfig()))
        self.assertEqual([i for batch in batches for i in batch.index.tolist()], [0, 1, 3, 4, 5, 6, 8, 9, 10])
        self.assertEqual([bad.index for batch in batches for bad in batch.bad], [2, 7])

    def test_a_film_of_too_many_pixels_is_bad(self):
        self.assertEqual(self.dataset(training=False, max_pixels=48 * 64)[Request(0, 0, 0)].bad, [])
        (bad,) = self.dataset(training=False, max_pixels=48 * 64 - 1)[Request(0, 0, 0)].bad
        self.assertRegex(bad.reason, "64x48 is more than max_pixels")
        self.assertEqual((bad.source, bad.index, bad.path), ("films", 0, f"{self.folder}/0.mp4"))

    def test_a_strip_is_bad(self):
        for size in ((16, 16 * 16), (16 * 16, 16)):
            write_video(self.folder / "strip.mp4", np.zeros((4, *size, 3), np.uint8), fps=4)
            np.save(self.folder / "strip.npy", np.array(["strip.mp4"] * 11))
            self.assertEqual(self.dataset("strip.npy", training=False)[Request(0, 0, 0)].bad, [])
        for size in ((16, 16 * 16 + 2), (16 * 16 + 2, 16)):
            write_video(self.folder / "strip.mp4", np.zeros((4, *size, 3), np.uint8), fps=4)
            (bad,) = self.dataset("strip.npy", training=False)[Request(0, 0, 0)].bad
            self.assertRegex(bad.reason, "one side is more than 16 times the other")

    def test_when_everything_is_bad_the_sample_says_so(self):
        np.save(self.folder / "none.npy", np.array([f"none_{i}.mp4" for i in range(11)]))
        sample = self.dataset("none.npy")[Request(0, 2, 0)]
        self.assertEqual((len(sample.video), len(sample.bad)), (0, 1 + REPLACEMENTS))
        tried = [bad.path for bad in sample.bad]
        self.assertLess(len(set(tried)), len(tried))
        self.assertIn(f"None of {len(set(tried))} files", vanished_files(tried, "of a batch"), "files, not tries")

    def test_what_is_gone_with_its_disk_is_missing_and_what_is_damaged_is_not(self):
        dataset = self.dataset(training=False)
        for code, missing in (
            (errno.ENOTCONN, True),
            (errno.ESTALE, True),
            (errno.ENOENT, True),
            (errno.EINVAL, False),
        ):
            with mock.patch("os.open", side_effect=OSError(code, "x")):
                (bad,) = dataset[Request(0, 0, 0)].bad
            self.assertEqual(bad.missing, missing, errno.errorcode[code])

    def test_an_error_in_a_worker_is_what_it_is(self):
        plan = EpochPlan({"films": SourcePlan(11, 2, views=4)}, seed=5)
        for kind, expected, saying in (
            (Failing, RuntimeError, "no worker was killed"),
            (Uneven, UserError, "^The masks of a batch hide"),
        ):
            for workers in (0, 1):
                dataset = self.dataset()
                dataset.__class__ = kind
                with self.assertRaisesRegex(expected, saying) as told:
                    next(train_batches(dataset, plan, (0, 0), 1, 0, 1, LoaderConfig(workers)))
                self.assertNotIsInstance(told.exception, DataWorkerError)

    def test_workers_run_one_thread_and_carry_bytes_through_shared_memory(self):
        plan = EpochPlan({"films": SourcePlan(11, 2, views=4)}, seed=5)
        dataset = self.dataset()
        dataset.__class__ = Threads
        batch = next(train_batches(dataset, plan, (0, 0), 1, 0, 1, LoaderConfig(1)))
        self.assertEqual(batch.label.tolist(), [1] * 8)
        self.assertEqual(batch.video.dtype, torch.uint8)
        self.assertTrue(batch.video.is_shared())

    def test_a_worker_goes_on_when_all_processes_of_a_job_are_signalled(self):
        """The one that trains still needs its workers to save."""
        code = "from tests.test_data import Films; Films.setUpClass(); Films().in_a_process_of_its_own()"
        made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=runs.ROOT, timeout=60)
        self.assertEqual((made.returncode, made.stdout), (0, "4\n"), made.stderr)

    def in_a_process_of_its_own(self) -> None:
        dataset = self.dataset()
        dataset.__class__ = Told
        plan = EpochPlan({"films": SourcePlan(11, 2, views=4, repeat=4)}, seed=5)
        batches = train_batches(dataset, plan, (0, 0), 4, 0, 1, LoaderConfig(1, prefetch=1))
        workers = [int(next(batches).label[0]) for _ in range(2)]
        for number in (signal.SIGTERM, signal.SIGUSR2):
            os.kill(workers[0], number)
        workers += [int(next(batches).label[0]) for _ in range(2)]
        print(workers.count(workers[0]))


class Batches(unittest.TestCase):
    def sample(self, hidden: int = 3, views: int = 2) -> Sample:
        mask = torch.arange(8).reshape(1, 2, 2, 2).expand(views, -1, -1, -1) < hidden
        return Sample(torch.zeros(views, 3, 2, 4, 4, dtype=torch.uint8), mask, 1, "s", 0, "a.mp4")

    def test_splitting(self):
        batch = collate([self.sample() for _ in range(3)])
        pieces = batch.split(3)
        self.assertEqual([len(piece) for piece in pieces], [2, 2, 2])
        self.assertTrue(torch.equal(torch.cat([piece.video for piece in pieces]), batch.video))
        self.assertEqual([piece.paths for piece in pieces], [["a.mp4"] * 2] * 3)
        self.assertEqual({piece.num_masked for piece in pieces}, {3})

    def test_moving(self):
        batch = collate([self.sample()]).to(torch.device("meta"))
        self.assertEqual({batch.video.device.type, batch.label.device.type, batch.mask.device.type}, {"meta"})

    def test_masks_of_different_counts(self):
        with self.assertRaisesRegex(UserError, r"hide \[3, 4\] tokens"):
            collate([self.sample(), self.sample(hidden=4)])

    def test_a_batch_of_nothing_but_bad_files(self):
        batch = collate([self.sample(views=0), self.sample(views=0)])
        self.assertEqual((len(batch), batch.paths, len(batch.label)), (0, [], 0))

    def test_a_video_without_views_is_named_and_not_counted(self):
        empty = self.sample(views=0)
        empty.bad = [BadSample("s", 4, "b.mp4", "why not")]
        batch = collate([self.sample(), empty, self.sample()])
        self.assertEqual((len(batch), len(batch.mask), batch.num_masked, batch.bad), (4, 4, 3, empty.bad))

    def test_without_masks(self):
        sample = self.sample()
        sample.mask = None
        batch = collate([sample, sample])
        self.assertEqual((batch.mask, batch.num_masked), (None, 0))
        self.assertEqual([piece.mask for piece in batch.split(2)], [None, None])


class Ledger(unittest.TestCase):
    def test_each_file_once_and_a_budget(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bad.jsonl"
            ledger = BadSampleLedger(path, files=100, budget=0.02)
            bad = [BadSample("films", i, f"{i}.mp4", f"reason {i}") for i in range(3)]
            ledger.add(bad[:2], write=True)
            ledger.add(bad[:1], write=True)
            self.assertEqual([json.loads(line)["path"] for line in path.read_text().splitlines()], ["0.mp4", "1.mp4"])
            resumed = BadSampleLedger(path, files=100, budget=0.02)
            self.assertEqual(len(resumed), 2)
            with self.assertRaisesRegex(
                UserError, r"(?s)3 of 100 samples .*bad_sample_budget is 2\.00%.*2\.mp4: reason 2"
            ) as caught:
                resumed.add(bad, write=False)
            self.assertTrue(caught.exception.on_all_ranks)
            self.assertEqual(len(path.read_text().splitlines()), 2)

    def test_a_file_that_was_mended_is_forgotten(self):
        with tempfile.TemporaryDirectory() as folder:
            path, film = Path(folder) / "bad.jsonl", Path(folder) / "a.mp4"
            film.write_bytes(b"")
            BadSampleLedger(path, 100, 1).add([BadSample("s", 0, str(film), "the file is empty")], write=True)
            self.assertEqual(len(BadSampleLedger(path, 100, 1)), 1)
            time.sleep(0.02)
            film.write_bytes(b"whole")
            self.assertEqual(len(BadSampleLedger(path, 100, 1)), 0)

    def test_a_crash_in_the_middle_of_a_line_costs_that_line_only(self):
        bad = [BadSample("films", i, f"{i}.mp4", "why") for i in range(3)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bad.jsonl"
            BadSampleLedger(path, files=100, budget=0.5).add(bad[:2], write=True)
            whole = path.read_bytes()
            for cut in range(len(whole) + 1):
                path.write_bytes(whole[:cut])
                resumed = BadSampleLedger(path, files=100, budget=0.5)
                for sample in bad:
                    resumed.add([sample], write=True)
                self.assertEqual(len(resumed), 3)
                self.assertEqual(len(BadSampleLedger(path, files=100, budget=0.5)), 3, cut)

    def test_what_is_no_ledger_line_is_passed_over(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bad.jsonl"
            for damage in (b"\xff\xfe", b"[]", b'{"path": 3}'):
                with self.subTest(damage):
                    path.write_bytes(damage + b"\n")
                    ledger = BadSampleLedger(path, files=4, budget=0.5)
                    ledger.add([BadSample("films", 0, "a.mp4", "why")], write=True)
                    self.assertEqual(len(BadSampleLedger(path, files=4, budget=0.5)), 1)

    def test_the_same_place_in_two_splits_is_two_files(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bad.jsonl"
            bad = [BadSample("films", 5, f"{split}/5.mp4", "why", split) for split in ("train", "val")]
            BadSampleLedger(path, files=100, budget=0.5).add(bad, write=True)
            self.assertEqual(len(BadSampleLedger(path, files=100, budget=0.5)), 2)

    def test_the_same_path_in_two_sources_is_two_files(self):
        with tempfile.TemporaryDirectory() as folder:
            ledger = BadSampleLedger(Path(folder) / "bad.jsonl", files=4, budget=0.5)
            ledger.add([BadSample(source, 0, "a.mp4", "why") for source in ("one", "two")], write=False)
            self.assertEqual((len(ledger), ledger.path.exists()), (2, False))


if __name__ == "__main__":
    unittest.main()
