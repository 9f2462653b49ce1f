"""The shuffled order without a list, and random draws by key."""

import time
import tracemalloc
import unittest

import numpy as np

from omnivision.data.sampling import keyed_rng, shuffled_index


class Permutation(unittest.TestCase):
    def test_every_position_comes_from_another_element(self):
        for size in (1, 2, 3, 10, 1000, 4096, 65537):
            found = shuffled_index(np.arange(size), size, 5, 1)
            self.assertEqual(sorted(found.tolist()), list(range(size)))

    def test_one_position_is_looked_up_without_the_others(self):
        whole = shuffled_index(np.arange(1000), 1000, 5, 1)
        self.assertEqual(
            [int(shuffled_index(np.array([i]), 1000, 5, 1)[0]) for i in range(0, 1000, 37)], whole[::37].tolist()
        )

    def test_seed_and_key_choose_the_order(self):
        orders = {
            tuple(shuffled_index(np.arange(50), 50, seed, *key)) for seed in (1, 2) for key in ((), (0,), (1,), (0, 1))
        }
        self.assertEqual(len(orders), 8)

    def test_all_places_are_equally_likely(self):
        for size in (7, 100):
            counts = np.bincount(
                [int(shuffled_index(np.array([0]), size, key)[0]) for key in range(4000)], minlength=size
            )
            expected = 4000 / size
            chi_square = ((counts - expected) ** 2 / expected).sum()
            self.assertLess(chi_square, size + 6 * (2 * size) ** 0.5)

    def test_neighbours_are_not_kept_together(self):
        order = shuffled_index(np.arange(10_000), 10_000, 1)
        self.assertLess((np.abs(np.diff(order)) == 1).mean(), 0.002)
        self.assertLess(abs(np.corrcoef(order, np.arange(10_000))[0, 1]), 0.05)

    def test_ten_million_cost_neither_memory_nor_time(self):
        tracemalloc.start()
        began = time.perf_counter()
        shuffled_index(np.arange(5_000_000, 5_000_064), 10_000_000, 1)
        self.assertLess(time.perf_counter() - began, 0.5)
        self.assertLess(tracemalloc.get_traced_memory()[1], 1_000_000)
        tracemalloc.stop()


class Draws(unittest.TestCase):
    def test_a_key_fixes_the_numbers_and_another_changes_them(self):
        keys = [(0,), (1,), (0, 0), (0, 1), (1, 0)]
        first = [keyed_rng(3, *key).random() for key in keys]
        self.assertEqual(first, [keyed_rng(3, *key).random() for key in reversed(keys)][::-1])
        self.assertEqual(len(set(first)), len(keys))
        self.assertNotEqual(keyed_rng(4, 0).random(), keyed_rng(3, 0).random())


if __name__ == "__main__":
    unittest.main()
