"""RandAugment and random erasing: the published figures, what is drawn how often, and that bytes fare as floats do."""

import ast
import inspect
import unittest
from collections import Counter

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as kernels

from omnivision.data import augment
from omnivision.data.augment import (
    OPERATIONS,
    RandAugment,
    RandomErasing,
    apply_operation,
    erased_size,
    operation_argument,
)
from omnivision.models.patches import normalize_pixels
from omnivision.utils.errors import UserError
from tests.parity_formula import error, record, stated

RECORDED = record("augmentation")
RAND, ERASING = RECORDED["rand_augment"], RECORDED["random_erasing"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def clip(frames: int = 2, height: int = 24, width: int = 32) -> Tensor:
    return torch.from_numpy(rng(7).integers(0, 256, (frames, 3, height, width), dtype=np.uint8))


def arguments() -> list[tuple[str, float]]:
    """Every operation at the levels of the recorded table, with both signs."""
    return [
        (name, operation_argument(name, level, sign)) for name in OPERATIONS for level in (0, 7, 10) for sign in (1, -1)
    ]


class PublishedOperations(unittest.TestCase):
    def test_pixels(self):
        video, rows = stated(RAND["pixels"]["input"]), RAND["pixels"]["rows"]
        self.assertEqual(({row["operation"] for row in rows}, len(rows)), (set(OPERATIONS), 23))
        for row in rows:
            got = apply_operation(row["operation"], video, row["argument"] or 0.0)
            self.assertLess(error(got, row["expected"]), 1e-5, (row["operation"], row["argument"]))

    def test_arguments_from_levels(self):
        self.assertEqual([row[0] for row in RAND["operations_in_order"]], list(OPERATIONS))
        for name, _, _, *by_level in RAND["operations_in_order"]:
            for level, recorded in zip((7, 6, 8, 10, 0), by_level, strict=True):
                for sign in (1, -1):
                    expected = recorded[(1 - sign) // 2] if isinstance(recorded, list) else recorded or 0.0
                    self.assertAlmostEqual(operation_argument(name, level, sign), expected, 12, (name, level, sign))

    def test_settings(self):
        recorded = RAND["settings"]
        view = RandAugment()
        self.assertEqual(
            (view.magnitude, view.num_layers, view.prob),
            tuple(recorded[k] for k in ("magnitude", "num_layers", "prob")),
        )
        self.assertIn(f"std {view.std}".replace("0.", "."), recorded["sampling"])


class Operations(unittest.TestCase):
    def test_bytes_fare_as_floats_do(self):
        """In grey levels. Moves and sharpness round once; the torchvision kernels for colours cut the fraction off, and
        two of them also that of the grey picture, which enters with the weight |1 - factor|."""
        frames = clip()
        for name, argument in arguments():
            bound = {
                "AdjustBrightness": 1.0,
                "AdjustContrast": 1 + abs(1 - argument),
                "AdjustSaturation": 1 + abs(1 - argument),
                "AutoContrast": 1.0,
                "Equalize": 0.0,
                "Invert": 0.0,
                "Posterize": 0.0,
                "Solarize": 0.0,
            }.get(name, 0.5)
            got = apply_operation(name, frames, argument)
            as_float = apply_operation(name, frames.float() / 255, argument) * 255
            self.assertEqual((got.dtype, got.shape), (torch.uint8, frames.shape))
            self.assertLess(float((got.float() - as_float).abs().max()), bound + 1e-3, (name, argument))

    def test_frames_are_treated_each_by_itself_and_all_alike(self):
        frames = clip(3)
        frames[1] //= 3  # another brightness and contrast, so that statistics of the whole clip would show
        for pixels in (frames, frames.float() / 255):
            before = pixels.clone()
            for name, argument in arguments():
                together = apply_operation(name, pixels, argument)
                alone = torch.cat([apply_operation(name, frame[None], argument) for frame in pixels])
                self.assertLess(float((together.float() - alone.float()).abs().max()), 1e-6, name)
            self.assertTrue(torch.equal(pixels, before), "the input is not changed")

    def test_what_moves_in_is_grey(self):
        for name, argument in (("Rotate", 30.0), ("ShearX", 0.3), ("ShearY", -0.3), ("TranslateX", 0.45)):
            for pixels, grey in ((torch.zeros_like(clip()), 128), (torch.zeros_like(clip()).float(), 0.5)):
                self.assertEqual(apply_operation(name, pixels, argument).max(), grey, name)

    def test_sharpness_is_torchvisions(self):
        for height, width in ((24, 32), (3, 3), (2, 5), (5, 1), (1, 1)):
            frames = clip(2, height, width).double() / 255
            for factor in (0.1, 0.37, 1.0, 1.63, 1.9):
                expected = kernels.adjust_sharpness(frames, factor)
                self.assertLess(float((augment.adjust_sharpness(frames, factor) - expected).abs().max()), 1e-12)

    def test_level_0_changes_nothing_where_it_is_a_strength(self):
        frames = clip()
        for name in OPERATIONS:
            if name not in ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize"):
                self.assertTrue(
                    torch.equal(apply_operation(name, frames, operation_argument(name, 0, 1)), frames), name
                )

    def test_torchvision_is_not_imported_with_the_module(self):
        top = [
            node for node in ast.parse(inspect.getsource(augment)).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        self.assertNotIn("torchvision", " ".join(map(ast.unparse, top)))


class Drawing(unittest.TestCase):
    def test_operations_differ_and_all_come_equally_often(self):
        dice, view = rng(), RandAugment()
        plans = [[name for name, _ in view.plan(dice)] for _ in range(7000)]
        self.assertTrue(all(len(set(plan)) == len(plan) <= 4 for plan in plans))
        counts = Counter(name for plan in plans for name in plan)
        self.assertEqual(set(counts), set(OPERATIONS))
        for name, count in counts.items():
            self.assertAlmostEqual(count / 7000, 4 / 14 * 0.5, delta=0.02, msg=name)
        sizes = Counter(map(len, plans))
        for size, share in enumerate((1, 4, 6, 4, 1)):  # binomial: each of the four is applied or not by itself
            self.assertAlmostEqual(sizes[size] / 7000, share / 16, delta=0.02)
        first = Counter(plan[0] for plan in plans if plan)
        self.assertLess(max(first.values()), 1.3 * min(first.values()), "the order is random, too")

    def test_levels_and_signs(self):
        dice, view = rng(), RandAugment(num_layers=14, prob=1.0)
        drawn: dict[str, list[float]] = {name: [] for name in OPERATIONS}
        for _ in range(2000):
            for name, argument in view.plan(dice):
                drawn[name].append(argument)
        levels = 10 * (1 - np.array(drawn["Solarize"]))
        self.assertAlmostEqual(float(levels.mean()), 7, delta=0.05)
        self.assertAlmostEqual(float(levels.std()), 0.5, delta=0.03)
        bits = Counter(drawn["Posterize"])
        self.assertAlmostEqual(bits[2] / 2000, 0.84, delta=0.03)
        self.assertAlmostEqual(bits[1] / 2000, 0.16, delta=0.03)
        for name in ("Rotate", "ShearX", "TranslateY"):
            self.assertAlmostEqual(float((np.array(drawn[name]) > 0).mean()), 0.5, delta=0.04, msg=name)
        self.assertAlmostEqual(float((np.array(drawn["AdjustContrast"]) > 1).mean()), 0.5, delta=0.04)

    def test_levels_are_clamped(self):
        view = RandAugment(magnitude=9.5, num_layers=14, prob=1.0, std=3.0)
        levels = [
            10 * (1 - argument) for seed in range(200) for name, argument in view.plan(rng(seed)) if name == "Solarize"
        ]
        self.assertEqual(max(levels), 10)
        self.assertGreater(levels.count(10), 50)
        low = RandAugment(magnitude=0, num_layers=14, prob=1.0, std=3.0)
        self.assertTrue(
            all(argument <= 1 for seed in range(99) for name, argument in low.plan(rng(seed)) if name == "Solarize")
        )

    def test_without_deviation_the_level_is_the_magnitude(self):
        plan = dict(RandAugment(std=0, num_layers=14, prob=1.0).plan(rng()))
        self.assertEqual((len(plan), plan["Solarize"], plan["Posterize"]), (14, 1 - 0.7, 2))
        self.assertEqual({abs(plan["Rotate"]), abs(plan["ShearX"]) * 100}, {21.0})

    def test_a_clip_is_a_function_of_its_generator(self):
        frames, view = clip(), RandAugment(prob=1.0)
        before = frames.clone()
        one, same, other = (view(frames, rng(seed)) for seed in (1, 1, 2))
        self.assertEqual((one.dtype, one.shape), (torch.uint8, frames.shape))
        self.assertTrue(torch.equal(one, same))
        self.assertFalse(torch.equal(one, other))
        self.assertTrue(torch.equal(frames, before))
        still = frames[:1].expand(4, -1, -1, -1)
        for seed in range(10):
            changed = view(still, rng(seed))
            self.assertTrue((changed == changed[:1]).all(), "one draw for all frames")

    def test_the_clip_is_the_plan_carried_out(self):
        frames, view = clip(), RandAugment(prob=1.0)
        expected = frames
        for name, argument in view.plan(rng(3)):
            expected = apply_operation(name, expected, argument)
        self.assertTrue(torch.equal(view(frames, rng(3)), expected))
        self.assertTrue(torch.equal(RandAugment(prob=0.0)(frames, rng()), frames))

    def test_impossible_settings(self):
        for wrong in (
            {"magnitude": 11},
            {"magnitude": -1},
            {"num_layers": 0},
            {"num_layers": 15},
            {"prob": 1.5},
            {"prob": float("nan")},
            {"std": -0.5},
            {"std": float("inf")},
        ):
            ((name, value),) = wrong.items()
            with self.assertRaisesRegex(
                UserError, f"{name} is {value}; expected .*trainer.data.view.rand_augment.{name}"
            ):
                RandAugment(**wrong)


class Erasing(unittest.TestCase):
    def test_published_sizes(self):
        for area, aspect, height, width, accepted in ERASING["size_examples_for_224"]["rows"]:
            expected = (height, width) if accepted else None
            self.assertEqual(erased_size(224, 224, area, aspect), expected, (area, aspect))

    def test_published_settings(self):
        recorded, ours = ERASING["settings"], RandomErasing()
        self.assertEqual(
            (ours.prob, list(ours.area), list(ours.aspect)),
            (recorded["probability"], recorded["area_fraction"], recorded["aspect"]),
        )

    def test_rounding_is_half_to_even(self):
        self.assertEqual(erased_size(100, 100, 6.25 / 1e4, 1.0), (2, 2))  # sides of 2.5
        self.assertEqual(erased_size(100, 100, 12.25 / 1e4, 1.0), (4, 4))  # of 3.5

    def test_how_often_where_and_how_large(self):
        dice, erasing = rng(), RandomErasing()
        boxes = [erasing.box(100, 60, dice) for _ in range(12000)]
        found = np.array([box for box in boxes if box is not None])
        self.assertAlmostEqual(len(found) / 12000, 0.25, delta=0.015)
        top, left, height, width = found.T
        self.assertTrue((top >= 0).all() and (left >= 0).all() and (height < 100).all() and (width < 60).all())
        self.assertEqual(((top + height).max(), (left + width).max()), (100, 60))
        area, aspect = height * width / 6000, height / width
        self.assertTrue((area > 0.015).all() and (area < 0.35).all())
        self.assertTrue((aspect > 0.25).all() and (aspect < 4).all())
        small = area < 0.15  # of these, few aspects are refused
        self.assertAlmostEqual(float(area[small].mean()), (0.02 + 0.15) / 2, delta=0.005)
        self.assertAlmostEqual(float(np.log(aspect[small]).mean()), 0, delta=0.1)
        self.assertAlmostEqual(float((top[small] / (100 - height[small])).mean()), 0.5, delta=0.03)
        self.assertAlmostEqual(float((left[small] / (60 - width[small])).mean()), 0.5, delta=0.03)

    def test_noise_in_one_rectangle_of_all_frames(self):
        erasing, frames = RandomErasing(prob=1.0), torch.full((4, 3, 60, 80), 255, dtype=torch.uint8)
        top, left, height, width = erasing.box(60, 80, rng(2))
        erased = erasing(frames, rng(2))
        self.assertTrue((frames == 255).all(), "the input is not changed")
        outside = torch.ones(60, 80, dtype=torch.bool)
        outside[top : top + height, left : left + width] = False
        self.assertTrue((erased[..., outside] == 255).all())
        noise = normalize_pixels(erased, 1)[..., top : top + height, left : left + width].flatten(2)  # (T, C, h * w)
        self.assertLess(float(noise.mean((0, 2)).abs().max()), 0.06)
        self.assertLess(float((noise.std((0, 2)) - 1).abs().max()), 0.08)
        series = torch.corrcoef(noise.flatten(0, 1))
        self.assertLess(float((series - torch.eye(12)).abs().max()), 0.15, "frames and channels share no noise")

    def test_how_much_of_the_noise_is_cut(self):
        """What the docstring says: black and white lie about two deviations from the mean."""
        ends = normalize_pixels(torch.tensor([0, 255], dtype=torch.uint8).expand(3, 2), 0)
        self.assertTrue(torch.equal((ends * 10).round() / 10, torch.tensor([[-2.1, 2.2], [-2.0, 2.4], [-1.8, 2.6]])))

    def test_a_clip_is_a_function_of_its_generator(self):
        frames, erasing = clip(), RandomErasing(prob=1.0)
        one, same, other = (erasing(frames, rng(seed)) for seed in (1, 1, 2))
        self.assertEqual((one.dtype, one.shape), (torch.uint8, frames.shape))
        self.assertTrue(torch.equal(one, same))
        self.assertFalse(torch.equal(one, other))

    def test_a_clip_that_is_not_erased_is_the_same(self):
        frames = clip()
        self.assertIs(RandomErasing(prob=0.0)(frames, rng()), frames)
        whole = RandomErasing(prob=1.0, area=(1.0, 1.0), aspect=(1.0, 1.0))
        self.assertIs(whole(frames, rng()), frames, "no rectangle is smaller than the frame")

    def test_impossible_settings(self):
        for wrong in (
            {"prob": -0.1},
            {"prob": float("nan")},
            {"area": (0.5, 0.2)},
            {"area": (0.0, 0.2)},
            {"area": (0.1, 1.2)},
            {"aspect": (0.0, 1.0)},
            {"aspect": (2.0, 1.0)},
            {"aspect": (1.0, float("inf"))},
        ):
            (name,) = wrong
            with self.assertRaisesRegex(UserError, f"{name} is .*; expected .*trainer.data.view.erasing.{name}"):
                RandomErasing(**wrong)


if __name__ == "__main__":
    unittest.main()
