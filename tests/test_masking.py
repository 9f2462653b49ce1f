"""Token masks: published counts, exact counts for any grid, shapes of each kind."""

import unittest

import numpy as np

from omnivision.data.masking import BlockMask, CausalMask, FrameMask, RandomMask, TubeMask
from omnivision.errors import UserError
from tests.parity_formula import record

GRIDS = [(8, 14, 14), (2, 4, 4), (1, 10, 10), (5, 1, 1), (3, 7, 2)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


class Published(unittest.TestCase):
    def test_counts(self):
        for ratio, t, h, w, _, random, _, tube in record("masks")["counts"]["rows"]:
            self.assertEqual(RandomMask(ratio)((t, h, w), rng()).sum(), random, (ratio, t, h, w))
            self.assertEqual(TubeMask(ratio)((t, h, w), rng()).sum(), tube, (ratio, t, h, w))

    def test_causal_hides_the_last_tokens(self):
        expected = record("masks")["causal_mask_of_grid_1x2x4_with_high_5.9"]["mask"]
        self.assertEqual(CausalMask(5.9 / 8)((1, 2, 4), rng()).astype(int).tolist(), expected)


class Kinds(unittest.TestCase):
    def test_every_sample_hides_the_same_number(self):
        for kind in (RandomMask, TubeMask, FrameMask, CausalMask, BlockMask):
            for grid in GRIDS:
                for ratio in (0.0, 0.3, 0.75, 0.9, 1.0):
                    masks = [kind(ratio)(grid, rng(seed)) for seed in range(20)]
                    self.assertEqual({(m.shape, m.dtype.kind) for m in masks}, {(grid, "b")})
                    self.assertEqual(len({int(m.sum()) for m in masks}), 1, (kind, grid, ratio))

    def test_a_tube_is_one_frame_repeated(self):
        mask = TubeMask(0.75)((8, 14, 14), rng())
        self.assertTrue((mask == mask[:1]).all())
        self.assertEqual(mask[0].sum(), 147)

    def test_frames_are_hidden_whole(self):
        mask = FrameMask(0.75)((8, 14, 14), rng())
        self.assertEqual(sorted(mask.reshape(8, -1).sum(1).tolist()), [0, 0] + [196] * 6)

    def test_blocks_hang_together(self):
        """A hidden token of a block mask has more hidden neighbours than one of a random mask."""

        def neighbours(mask: np.ndarray) -> float:
            slot = mask[0]
            return float((slot[1:] & slot[:-1]).sum() + (slot[:, 1:] & slot[:, :-1]).sum()) / slot.sum()

        block = np.mean([neighbours(BlockMask(0.4)((1, 14, 14), rng(i))) for i in range(30)])
        random = np.mean([neighbours(RandomMask(0.4)((1, 14, 14), rng(i))) for i in range(30)])
        self.assertGreater(block, 1.5 * random)
        self.assertEqual(BlockMask(0.4)((1, 14, 14), rng()).sum(), 78)

    def test_random_masks_are_uniform_and_differ(self):
        mean = np.mean([RandomMask(0.75)((2, 4, 4), rng(i)) for i in range(2000)], axis=0)
        self.assertLess(np.abs(mean - 0.75).max(), 0.05)
        self.assertTrue((RandomMask(0.5)((2, 4, 4), rng(1)) == RandomMask(0.5)((2, 4, 4), rng(1))).all())
        self.assertFalse((RandomMask(0.5)((2, 4, 4), rng(1)) == RandomMask(0.5)((2, 4, 4), rng(2))).all())

    def test_a_ratio_out_of_range(self):
        for ratio in (-0.1, 1.1):
            with self.assertRaisesRegex(UserError, "mask_ratio"):
                RandomMask(ratio)


if __name__ == "__main__":
    unittest.main()
