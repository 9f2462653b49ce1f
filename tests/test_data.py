"""Requests to batches, on small films: what a step holds, whatever the workers and processes; and bad files."""

import json
import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch

from omnivision.data.batch import BadSample, Batch, Sample, collate
from omnivision.data.catalog import Dataset, Split, SplitFiles
from omnivision.data.dataset import REPLACEMENTS, Request, VideoDataset
from omnivision.data.encode import write_film
from omnivision.data.loader import EpochPlan, Workers, evaluation_batches, train_batches
from omnivision.data.masking import RandomMask
from omnivision.data.views import CenterView, PretrainView
from omnivision.errors import UserError
from omnivision.reporting.bad_samples import BadSampleLedger


def videos(plan: EpochPlan, epoch: int, rank: int = 0, world: int = 1) -> list[list[Request]]:
    return [plan.requests(epoch, step, rank, world) for step in range(plan.steps)]


class Plan(unittest.TestCase):
    def test_each_video_once_an_epoch(self):
        plan = EpochPlan({"a": 24}, {}, videos_per_step=6, views_per_clip=1, seed=1)
        for epoch in (0, 1):
            seen = [request.video for step in videos(plan, epoch) for request in step]
            self.assertEqual(sorted(seen), list(range(24)))
        self.assertNotEqual(videos(plan, 0), [[r._replace(epoch=0) for r in step] for step in videos(plan, 1)])

    def test_repeated_augmentation_sees_a_share_of_the_videos(self):
        plan = EpochPlan({"a": 64}, {}, videos_per_step=4, views_per_clip=4, seed=1)
        self.assertEqual(plan.steps, 4)
        seen = [request.video for step in videos(plan, 0) for request in step]
        self.assertEqual((len(seen), len(set(seen))), (16, 16))

    def test_repeats(self):
        twice = EpochPlan({"a": 12}, {"a": 2}, 4, 1, seed=1)
        requests = [request for step in videos(twice, 0) for request in step]
        self.assertEqual(sorted(request.video for request in requests), sorted([*range(12)] * 2))
        self.assertEqual({request.occurrence for request in requests}, {0, 1})
        self.assertEqual(len(set(requests)), 24, "the second time with other random draws")
        self.assertEqual(EpochPlan({"a": 12}, {"a": 0.5}, 2, 1, seed=1).steps, 3)

    def test_sources_take_turns_by_batch_in_a_seeded_order(self):
        plan = EpochPlan({"a": 40, "b": 20}, {"b": 2}, 4, 1, seed=1)
        steps = videos(plan, 0)
        self.assertTrue(all(len({request.source for request in step}) == 1 for step in steps))
        order = [step[0].source for step in steps]
        self.assertEqual((order.count(0), order.count(1)), (10, 10))
        self.assertNotEqual(order, sorted(order))
        self.assertEqual(steps, videos(plan, 0))
        self.assertNotEqual(order, [step[0].source for step in videos(plan, 1)])

    def test_processes_share_the_same_step(self):
        plan = EpochPlan({"a": 40, "b": 24}, {}, 8, 1, seed=1)
        for world in (2, 4):
            for step in range(plan.steps):
                together = [r for rank in range(world) for r in plan.requests(3, step, rank, world)]
                self.assertEqual(together, plan.requests(3, step, 0, 1))

    def test_limit(self):
        limited = EpochPlan({"a": 40}, {}, 4, 1, seed=1, limit=3)
        self.assertEqual(videos(limited, 0), videos(EpochPlan({"a": 40}, {}, 4, 1, seed=1), 0)[:3])
        self.assertEqual(EpochPlan({"a": 40}, {}, 4, 1, seed=1, limit=99).steps, 10)

    def test_a_source_without_a_batch_and_an_unknown_repeat(self):
        with self.assertRaisesRegex(
            UserError, r"Source b has 3 samples .*batch of 4.*trainer\.data\.repeats\.b to at least 1\.33"
        ):
            EpochPlan({"a": 40, "b": 3}, {}, 4, 1, seed=1)
        with self.assertRaisesRegex(UserError, "repeats names c; the sources are a"):
            EpochPlan({"a": 40}, {"c": 2}, 4, 1, seed=1)

    def test_ten_million(self):
        plan = EpochPlan({"a": 10_000_000}, {}, 512, 1, seed=1)
        self.assertEqual(len({r.video for r in plan.requests(3, 15_000, 0, 1)}), 512)


class Threads(VideoDataset):
    """Tells in its labels how many threads torch uses where samples are made."""

    def __getitem__(self, request: Request) -> Sample:
        sample = super().__getitem__(request)
        sample.label = torch.get_num_threads()
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
            write_film(cls.folder / f"{number}.mp4", film, fps=10)
            names.append(f"{number}.mp4")
        np.save(cls.folder / "paths.npy", np.array(names))
        np.save(cls.folder / "labels.npy", np.arange(11) % 3)
        broken = [name if number not in (2, 7) else f"missing_{number}.mp4" for number, name in enumerate(names)]
        np.save(cls.folder / "broken.npy", np.array(broken))

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def dataset(self, paths: str = "paths.npy", views: int = 4, training: bool = True) -> VideoDataset:
        files = SplitFiles(str(self.folder / paths), str(self.folder / "labels.npy"))
        split = Split(Dataset("films", prefix=f"{self.folder}/", train=files), "train")
        return VideoDataset(
            [split],
            PretrainView(32, short_side=40) if training else CenterView(32),
            RandomMask(0.75),
            (2, 4, 4),
            num_frames=4,
            clip_duration=0.7,
            views_per_clip=views if training else 1,
            seed=5,
            replace_bad=training,
        )

    def batches(self, workers: int, start: tuple[int, int] = (0, 0), rank: int = 0, world: int = 1) -> list[Batch]:
        plan = EpochPlan({"films": 11}, {"films": 4}, videos_per_step=2, views_per_clip=4, seed=5)
        return list(train_batches(self.dataset(), plan, start, 2, rank, world, Workers(workers)))

    def assert_same(self, one: list[Batch], other: list[Batch]) -> None:
        self.assertEqual(len(one), len(other))
        for first, second in zip(one, other, strict=True):
            for name in ("video", "label", "index", "mask"):
                self.assertTrue(torch.equal(getattr(first, name), getattr(second, name)), name)
            self.assertEqual((first.paths, first.source), (second.paths, second.source))

    def test_a_batch(self):
        batch = self.batches(0)[0]
        self.assertEqual((tuple(batch.video.shape), batch.video.dtype), ((8, 3, 4, 32, 32), torch.uint8))
        self.assertTrue(batch.video.is_contiguous())
        self.assertEqual((tuple(batch.mask.shape), batch.num_masked), ((8, 2, 4, 4), 24))
        self.assertEqual(batch.index.tolist(), [batch.index[0].item()] * 4 + [batch.index[4].item()] * 4)
        self.assertEqual(batch.label.tolist(), [i % 3 for i in batch.index.tolist()])
        self.assertEqual(batch.paths[0], f"{self.folder}/{batch.index[0]}.mp4")
        views = {view.numpy().tobytes() for view in batch.video}
        masks = {mask.numpy().tobytes() for mask in batch.mask}
        self.assertEqual((len(views), len(masks)), (8, 8), "each view has its own crop and mask")

    def test_neither_workers_nor_the_place_of_resuming_matter(self):
        whole = self.batches(0)
        self.assertEqual(len(whole), 10)
        self.assert_same(whole, self.batches(2))
        self.assert_same(whole[7:], self.batches(1, start=(1, 2)))

    def test_two_processes_hold_what_one_holds(self):
        whole = self.batches(0)
        halves = [self.batches(0, rank=rank, world=2) for rank in (0, 1)]
        for batch, one, other in zip(whole, *halves, strict=True):
            self.assertTrue(torch.equal(batch.video, torch.cat([one.video, other.video])))

    def test_evaluation_takes_every_video_once(self):
        for world in (1, 2, 3):
            seen = []
            for rank in range(world):
                for batch in evaluation_batches(self.dataset(training=False), 2, rank, world, Workers()):
                    seen += batch.index.tolist()
            self.assertEqual(sorted(seen), list(range(11)), world)
        limited = list(evaluation_batches(self.dataset(training=False), 2, 0, 1, Workers(), limit=2))
        self.assertEqual([batch.index.tolist() for batch in limited], [[0, 1], [2, 3]])

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
        batches = list(evaluation_batches(self.dataset("broken.npy", training=False), 4, 0, 1, Workers()))
        self.assertEqual([i for batch in batches for i in batch.index.tolist()], [0, 1, 3, 4, 5, 6, 8, 9, 10])
        self.assertEqual([bad.index for batch in batches for bad in batch.bad], [2, 7])

    def test_when_everything_is_bad_the_sample_says_so(self):
        np.save(self.folder / "none.npy", np.array([f"none_{i}.mp4" for i in range(11)]))
        sample = self.dataset("none.npy")[Request(0, 2, 0)]
        self.assertEqual((len(sample.video), len(sample.bad)), (0, 1 + REPLACEMENTS))

    def test_workers_run_one_thread_and_carry_bytes_through_shared_memory(self):
        plan = EpochPlan({"films": 11}, {}, 2, 4, seed=5)
        dataset = self.dataset()
        dataset.__class__ = Threads
        batch = next(train_batches(dataset, plan, (0, 0), 1, 0, 1, Workers(1)))
        self.assertEqual(batch.label.tolist(), [1] * 8)
        self.assertEqual(batch.video.dtype, torch.uint8)
        self.assertTrue(batch.video.is_shared())


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
                UserError, r"(?s)3 of 100 files .*budget of 2\.00%.*2\.mp4: reason 2"
            ) as caught:
                resumed.add(bad, write=False)
            self.assertTrue(caught.exception.everywhere)
            self.assertEqual(len(path.read_text().splitlines()), 2)


if __name__ == "__main__":
    unittest.main()
