"""Token masks: published counts, exact counts for any grid, shapes of each kind."""

import unittest

import numpy as np

from omnivision.checkpoint.inference_config import InferenceConfig
from omnivision.data.masking import MASKS, BlockMask, CausalMask, FrameMask, RandomMask, TubeMask
from omnivision.models.patches import token_grid
from omnivision.utils.errors import UserError
from tests.parity_formula import record

GRIDS = [(8, 14, 14), (2, 4, 4), (1, 10, 10), (5, 1, 1), (3, 7, 2)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


class Published(unittest.TestCase):
    def test_counts(self):
        for ratio, t, h, w, _, random, slot, tube in record("masks")["counts"]["rows"]:
            self.assertEqual(RandomMask(ratio)((t, h, w), rng()).sum(), random, (ratio, t, h, w))
            mask = TubeMask(ratio)((t, h, w), rng())
            self.assertEqual(mask.sum(), tube, (ratio, t, h, w))
            self.assertEqual(mask.reshape(t, -1).sum(1).tolist(), [slot] * t, (ratio, t, h, w))

    def test_masks_from_the_size_of_an_input(self):
        refused = []
        for (_, *sides), tubelet, ratio, shape, _, random, tube in record("masks")["from_input"]["rows"]:
            frames, height, width = sides if len(sides) == 3 else (1, *sides)
            try:  # an image becomes a clip of one tubelet
                grid = token_grid((max(frames, tubelet[0]), height, width), tuple(tubelet))
            except UserError:
                refused.append((frames, height, width))
                continue
            self.assertEqual(grid, tuple(shape) if len(shape) == 3 else (1, *shape))
            self.assertEqual((RandomMask(ratio)(grid, rng()).sum(), TubeMask(ratio)(grid, rng()).sum()), (random, tube))
        self.assertEqual(refused, [(17, 230, 225)], "where the published code cuts the rest off silently")

    def test_causal_hides_the_last_tokens(self):
        expected = record("masks")["causal_mask_of_grid_1x2x4_with_high_5.9"]["mask"]
        self.assertEqual(CausalMask(5.9 / 8)((1, 2, 4), rng()).astype(int).tolist(), expected)


class Kinds(unittest.TestCase):
    def test_every_mask_hides_exactly_its_ratio_of_any_grid(self):
        dice = rng()
        grids = [*GRIDS * 5, *((int(side) for side in dice.integers(1, (9, 15, 15))) for _ in range(150))]
        ratios = [ratio for ratio in (0.0, 0.3, 0.75, 0.9, 1.0) for _ in GRIDS]
        for number, (t, h, w) in enumerate(grids):
            ratio = ratios[number] if number < len(ratios) else float(dice.random())
            expected = {
                RandomMask: int(ratio * t * h * w),
                CausalMask: int(ratio * t * h * w),
                TubeMask: int(ratio * h * w) * t,
                BlockMask: int(ratio * h * w) * t,
                FrameMask: int(ratio * t) * h * w,
            }
            for kind, count in expected.items():
                mask = kind(ratio)((t, h, w), dice)
                self.assertEqual((mask.shape, mask.dtype.kind), ((t, h, w), "b"))
                self.assertEqual(mask.sum(), count, (kind, ratio, t, h, w))

    def test_mask_is_a_function_of_its_generator(self):
        for kind in (RandomMask, TubeMask, FrameMask, BlockMask):
            one, same, other = (kind(0.5)((8, 14, 14), rng(seed)) for seed in (1, 1, 2))
            self.assertTrue((one == same).all(), kind)
            self.assertFalse((one == other).all(), kind)

    def test_every_mask_hides_equally_many_tokens_per_sample(self):
        for name, kind in MASKS.items():
            counts = {int(kind(0.6)((4, 6, 5), rng(seed)).sum()) for seed in range(20)}
            self.assertEqual(len(counts), 1, name)

    def test_weights_record_the_mask_of_their_run(self):
        for target, expected in (
            *((f"omnivision.data.masking.{name}", name) for name in MASKS),
            ("mine.My", "RandomMask"),
        ):
            settings = {"trainer.data.mask._target_": target, "trainer.data.mask.ratio": 0.6}
            found = InferenceConfig().with_settings(settings)
            self.assertEqual((found.mask, found.mask_ratio), (expected, 0.6))

    def test_tubes_and_frames(self):
        mask = TubeMask(0.75)((8, 14, 14), rng())
        self.assertTrue((mask == mask[:1]).all(), "one frame repeated")
        self.assertEqual(mask[0].sum(), 147)
        mask = FrameMask(0.75)((8, 14, 14), rng())
        self.assertEqual(sorted(mask.reshape(8, -1).sum(1).tolist()), [0, 0] + [196] * 6, "whole frames")

    def test_blocks_are_contiguous(self):
        """A hidden token of a block mask has more hidden neighbours than one of a random mask."""

        def neighbours(mask: np.ndarray) -> float:
            slot = mask[0]
            return float((slot[1:] & slot[:-1]).sum() + (slot[:, 1:] & slot[:, :-1]).sum()) / slot.sum()

        block = np.mean([neighbours(BlockMask(0.4)((1, 14, 14), rng(i))) for i in range(30)])
        random = np.mean([neighbours(RandomMask(0.4)((1, 14, 14), rng(i))) for i in range(30)])
        self.assertGreater(block, 1.5 * random)
        mask = BlockMask(0.4)((3, 14, 14), rng())
        self.assertTrue((mask == mask[:1]).all(), "the same blocks at all times")

    def test_random_masks_are_uniform(self):
        mean = np.mean([RandomMask(0.75)((2, 4, 4), rng(i)) for i in range(2000)], axis=0)
        self.assertLess(np.abs(mean - 0.75).max(), 0.05)


if __name__ == "__main__":
    unittest.main()
