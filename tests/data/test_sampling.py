"""Sample order, epoch plan, clip times and frame indices: the published figures, and what must always hold."""

import time
import tracemalloc
import unittest
from fractions import Fraction

import numpy as np

from omnivision.data.frames import subsample_indices
from omnivision.data.sampling import (
    ClassBalance,
    EpochPlan,
    Request,
    SourcePlan,
    clip_window,
    keyed_rng,
    random_clip_start,
    shuffled_index,
    uniform_clip_starts,
)
from omnivision.utils.errors import UserError


class Order(unittest.TestCase):
    def test_a_bijection_computed_position_by_position(self):
        for size in (1, 2, 3, 10, 1000, 4096, 65537):
            whole = shuffled_index(np.arange(size), size, 5, 1)
            self.assertEqual(sorted(whole.tolist()), list(range(size)))
            for i in range(0, size, 1 + size // 20):
                self.assertEqual(int(shuffled_index(np.array([i]), size, 5, 1)[0]), whole[i])

    def test_seed_and_key_choose_order_and_numbers(self):
        keys = [(seed, *key) for seed in (1, 2) for key in ((), (0,), (1,), (0, 1), (1, 0), (0, 0))]
        self.assertEqual(len({tuple(shuffled_index(np.arange(50), 50, *key)) for key in keys}), len(keys))
        draws = [keyed_rng(*key).random() for key in keys]
        self.assertEqual(draws, [keyed_rng(*key).random() for key in reversed(keys)][::-1])
        self.assertEqual(len(set(draws)), len(keys))

    def test_permutation_looks_random(self):
        for size in (7, 100):
            counts = np.bincount(
                [int(shuffled_index(np.array([0]), size, key)[0]) for key in range(4000)], minlength=size
            )
            chi_square = ((counts - 4000 / size) ** 2 / (4000 / size)).sum()
            self.assertLess(chi_square, size + 6 * (2 * size) ** 0.5, "all places are equally likely")
        order = shuffled_index(np.arange(10_000), 10_000, 1)
        self.assertLess((np.abs(np.diff(order)) == 1).mean(), 0.002, "neighbours are separated")
        self.assertLess(abs(np.corrcoef(order, np.arange(10_000))[0, 1]), 0.05)

    def test_ten_million_samples_need_no_memory_or_time(self):
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        start = time.perf_counter()
        shuffled_index(np.arange(5_000_000, 5_000_064), 10_000_000, 1)
        self.assertLess(time.perf_counter() - start, 0.5)
        self.assertLess(tracemalloc.get_traced_memory()[1], 1_000_000)
        plan = one_source(10_000_000, 512)
        self.assertEqual(len({r.sample_index for r in plan.requests(3, 15_000, 0, 1)}), 512)


def one_source(size: int, videos: int, limit: int | None = None, **more) -> EpochPlan:
    return EpochPlan({"a": SourcePlan(size, videos, **more)}, seed=1, limit=limit)


def steps(plan: EpochPlan, epoch: int = 0) -> list[list[Request]]:
    return [plan.requests(epoch, step, 0, 1) for step in range(plan.steps)]


def videos(plan: EpochPlan, epoch: int = 0) -> list[int]:
    return [request.sample_index for step in steps(plan, epoch) for request in step]


class Plan(unittest.TestCase):
    def test_each_video_once_an_epoch_in_another_order(self):
        plan = one_source(24, 6)
        for epoch in (0, 1):
            self.assertEqual(sorted(videos(plan, epoch)), list(range(24)))
        self.assertNotEqual(videos(plan, 0), videos(plan, 1))
        limited = one_source(40, 4, limit=3)
        self.assertEqual(steps(limited), steps(one_source(40, 4))[:3])
        self.assertEqual(one_source(40, 4, limit=99).steps, 10)

    def test_repeated_augmentation_sees_a_share_of_the_videos(self):
        plan = one_source(64, 4, views_per_video=4)
        self.assertEqual((plan.steps, len(videos(plan)), len(set(videos(plan)))), (4, 16, 16))

    def test_repeated_sources(self):
        plan = one_source(10, 4, repeat=2)
        requests = [request for step in steps(plan) for request in step]
        self.assertEqual(len(set(requests)), 20, "the second time with other random draws")
        for repeat_index in (0, 1):
            seen = [request.sample_index for request in requests if request.repeat_index == repeat_index]
            self.assertEqual(sorted(seen), list(range(10)))
        self.assertIn({0, 1}, [{request.repeat_index for request in step} for step in steps(plan)], "in one step")
        halves = [set(videos(one_source(40, 4, repeat=0.5), epoch)) for epoch in (0, 1)]
        self.assertEqual([len(half) for half in halves], [20, 20])
        self.assertNotEqual(*halves)

    def test_sources_take_turns_by_batch_in_a_seeded_order(self):
        plan = EpochPlan({"a": SourcePlan(40, 4), "b": SourcePlan(20, 4, repeat=2)}, seed=1)
        self.assertTrue(all(len({request.source for request in step}) == 1 for step in steps(plan)))
        order, other = ([step[0].source for step in steps(plan, epoch)] for epoch in (0, 1))
        self.assertEqual((order.count(0), order.count(1)), (10, 10))
        self.assertNotEqual(order, sorted(order))
        self.assertNotEqual(order, other)

    def test_ranks_share_a_step(self):
        for plan in (
            EpochPlan({"a": SourcePlan(40, 8), "b": SourcePlan(24, 8)}, seed=1),
            one_source(10, 4, repeat=2),  # a step may end one pass and begin the next
        ):
            for world in (2, 4):
                for step, whole in enumerate(steps(plan, 3)):
                    self.assertEqual([r for rank in range(world) for r in plan.requests(3, step, rank, world)], whole)

    def test_source_smaller_than_a_batch_is_refused(self):
        with self.assertRaisesRegex(UserError, r"\+\+trainer\.data\.repeats\.b=1\.334"):
            EpochPlan({"a": SourcePlan(40, 4), "b": SourcePlan(3, 4)}, seed=1)
        with self.assertRaisesRegex(UserError, r"batch_size, .*repeats\.a=50\.$"):
            one_source(4, 200)
        with self.assertRaisesRegex(UserError, r"batch_size\.$"):  # 101 repeats
            one_source(4, 404)
        for size in range(6, 200):  # the advice is enough
            with self.assertRaises(UserError) as caught:
                one_source(size, 512, repeat=0.001)
            advice = float(str(caught.exception).rpartition("repeats.a=")[2].rstrip("."))
            self.assertEqual(one_source(size, 512, repeat=advice).total_steps, 1)


class ClipTimes(unittest.TestCase):
    def test_random_clip_times(self) -> None:
        for duration, u, start in [
            (10.0, 0.0, 0.0),
            (10.0, 0.25, 1.825),
            (3.0, 0.25, 0.07499999999999996),
            (2.7, 0.25, 0.0),
            (1.5, 0.25, 0.0),
        ]:
            self.assertEqual(random_clip_start(duration, 2.7, u), start)
        for u in (0.0, 0.5, 1 - 2**-53):
            self.assertLessEqual(random_clip_start(7.3, 2.7, u) + 2.7, 7.3)

    def test_uniform_clip_times(self) -> None:
        for duration, published, ends in [
            (10.0, [0.0, 3.65], [0.0, 7.3]),
            (3.0, [0.0, 0.1499999999999999], [0.0, 0.2999999999999998]),
            (2.7, [0.0, 0.0], [0.0, 0.0]),
            (1.5, [0.0, 0.0], [0.0, 0.0]),
        ]:
            self.assertEqual(uniform_clip_starts(duration, 2.7, 2, "published"), published)
            self.assertEqual(uniform_clip_starts(duration, 2.7, 2), ends)
        for num in range(2, 50):
            starts = uniform_clip_starts(9.87, 2.7, num)
            self.assertEqual((len(starts), starts[0], starts[-1]), (num, 0.0, 9.87 - 2.7))
            self.assertEqual(starts, sorted(starts))
        self.assertEqual(uniform_clip_starts(10.0, 2.7, 1), [0.0])

    def test_every_whole_frame_start_of_30_fps_holds_82_frames(self) -> None:
        for start in range(200):
            low, high = clip_window(float(start), 2.7)
            self.assertEqual(sum(low <= Fraction(k, 30) < high for k in range(start * 30, start * 30 + 100)), 82)


class Subsample(unittest.TestCase):
    def test_published_figures(self) -> None:
        for num, total, indices in [
            (16, 81, [0, 5, 10, 16, 21, 26, 32, 37, 42, 48, 53, 58, 64, 69, 74, 80]),
            (16, 82, [0, 5, 10, 16, 21, 27, 32, 37, 43, 48, 54, 59, 64, 70, 75, 81]),
            (16, 10, [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8, 9]),
            (16, 17, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16]),
            (16, 1, [0] * 16),
            (8, 30, [0, 4, 8, 12, 16, 20, 24, 29]),
            (16, 300, [0, 19, 39, 59, 79, 99, 119, 139, 159, 179, 199, 219, 239, 259, 279, 299]),
        ]:
            self.assertEqual(subsample_indices(total, num), indices)

    def test_exact_for_every_size(self) -> None:
        for total in range(1, 200):
            for num in (2, 3, 8, 16, 32):
                expected = [int(Fraction(i * (total - 1), num - 1)) for i in range(num)]
                self.assertEqual(subsample_indices(total, num), expected)
        self.assertEqual(subsample_indices(2**60 + 1, 3), [0, 2**59, 2**60])  # beyond what a double can hold
        self.assertEqual(subsample_indices(9, 1), [0])
        for total, num in [(0, 4), (4, 0)]:
            self.assertRaises(ValueError, subsample_indices, total, num)


class Balance(unittest.TestCase):
    """Class-balanced sampling."""

    labels = np.array([0] * 60 + [1] * 30 + [2] * 9 + [-1] * 1)

    def requests(self, balance: float, epoch: int = 0, world: int = 1) -> list[Request]:
        plan = EpochPlan({"a": SourcePlan(100, 4, balance=ClassBalance.of(self.labels, balance))}, seed=1)
        return [
            request
            for step in range(plan.steps)
            for rank in range(world)
            for request in plan.requests(epoch, step, rank, world)
        ]

    def counts(self, balance: float) -> list[int]:
        drawn = [int(self.labels[request.sample_index]) for request in self.requests(balance)]
        return [drawn.count(label) for label in (-1, 0, 1, 2)]

    def test_draws_by_class(self) -> None:
        self.assertEqual(self.counts(0), [1, 60, 30, 9])
        self.assertEqual(self.counts(1), [1, 33, 33, 33])
        self.assertEqual(self.counts(0.5), [1, 47, 34, 18])

    def test_samples_of_a_class_are_drawn_equally_often(self) -> None:
        drawn = [request.sample_index for request in self.requests(1)]
        for label, (least, most) in {0: (0, 1), 1: (1, 2), 2: (3, 4)}.items():
            counts = [drawn.count(index) for index in np.flatnonzero(self.labels == label)]
            self.assertEqual((min(counts), max(counts)), (least, most))

    def test_no_two_clips_have_the_same_draws(self) -> None:
        requests = self.requests(1)
        self.assertEqual(len(set(requests)), len(requests))

    def test_epochs_differ_and_ranks_do_not_matter(self) -> None:
        self.assertNotEqual(self.requests(1), self.requests(1, epoch=1))
        self.assertEqual(self.requests(1), self.requests(1, world=2))
        self.assertEqual(self.requests(1), self.requests(1))


if __name__ == "__main__":
    unittest.main()
