"""RandAugment and random erasing: the published figures, draw frequencies, and bytes against floats."""

import ast
import inspect
import unittest
from collections import Counter

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as kernels

from omnivision.config.instantiate import target_problems
from omnivision.data import augment
from omnivision.data.augment import OPERATIONS, RandAugment, RandomErasing, erased_size
from omnivision.models.patches import normalize_pixels
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
        (name, operation.argument(share, sign))
        for name, operation in OPERATIONS.items()
        for share in (0, 0.7, 1)
        for sign in (1, -1)
    ]


class Operations(unittest.TestCase):
    def test_published_pixels(self):
        video, rows = stated(RAND["pixels"]["input"]), RAND["pixels"]["rows"]
        self.assertEqual(({row["operation"] for row in rows}, len(rows)), (set(OPERATIONS), 23))
        for row in rows:
            got = OPERATIONS[row["operation"]].apply(video, row["argument"] or 0.0)
            self.assertLess(error(got, row["expected"]), 1e-5, (row["operation"], row["argument"]))

    def test_published_arguments(self):
        self.assertEqual([row[0] for row in RAND["operations_in_order"]], list(OPERATIONS))
        for name, _, _, *by_level in RAND["operations_in_order"]:
            for level, recorded in zip((7, 6, 8, 10, 0), by_level, strict=True):
                for sign in (1, -1):
                    expected = recorded[(1 - sign) // 2] if isinstance(recorded, list) else recorded or 0.0
                    self.assertAlmostEqual(
                        OPERATIONS[name].argument(level / 10, sign), expected, 12, (name, level, sign)
                    )

    def test_bytes_and_floats_give_the_same(self):
        """In grey levels. Moves and sharpness round once; the torchvision kernels for colours cut the fraction off, and
        two of them also that of the grey image, which enters with the weight |1 - factor|."""
        frames = clip()
        for name, argument in arguments():
            bound = {
                **dict.fromkeys(("Equalize", "Invert", "Posterize", "Solarize"), 0.0),
                **dict.fromkeys(("AdjustBrightness", "AutoContrast"), 1.0),
                **dict.fromkeys(("AdjustContrast", "AdjustSaturation"), 1 + abs(1 - argument)),
            }.get(name, 0.5)
            got = OPERATIONS[name].apply(frames, argument)
            as_float = OPERATIONS[name].apply(frames.float() / 255, argument) * 255
            self.assertEqual((got.dtype, got.shape), (torch.uint8, frames.shape))
            self.assertLess(float((got.float() - as_float).abs().max()), bound + 1e-3, (name, argument))

    def test_operation_on_a_clip_equals_operation_on_each_frame(self):
        frames = clip(3)
        frames[1] //= 3  # another brightness and contrast, so that statistics of the whole clip would show
        for pixels in (frames, frames.float() / 255):
            before = pixels.clone()
            for name, argument in arguments():
                together = OPERATIONS[name].apply(pixels, argument)
                alone = torch.cat([OPERATIONS[name].apply(frame[None], argument) for frame in pixels])
                self.assertLess(float((together.float() - alone.float()).abs().max()), 1e-6, name)
                strength = name not in ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize")
                if strength and pixels is frames and argument == OPERATIONS[name].argument(0, 1):
                    self.assertTrue(torch.equal(together, pixels), f"{name} at level 0")
            self.assertTrue(torch.equal(pixels, before), "the input is not changed")

    def test_border_is_filled_with_grey(self):
        for name, argument in (("Rotate", 30.0), ("ShearX", 0.3), ("ShearY", -0.3), ("TranslateX", 0.45)):
            for pixels, grey in ((torch.zeros_like(clip()), 128), (torch.zeros_like(clip()).float(), 0.5)):
                self.assertEqual(OPERATIONS[name].apply(pixels, argument).max(), grey, name)

    def test_sharpness_equals_torchvision(self):
        for height, width in ((24, 32), (3, 3), (2, 5), (5, 1), (1, 1)):
            frames = clip(2, height, width).double() / 255
            for factor in (0.1, 0.37, 1.0, 1.63, 1.9):
                expected = kernels.adjust_sharpness(frames, factor)
                self.assertLess(float((augment.adjust_sharpness(frames, factor) - expected).abs().max()), 1e-12)

    def test_torchvision_is_not_imported_with_the_module(self):
        body = ast.parse(inspect.getsource(augment)).body
        imports = [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        self.assertNotIn("torchvision", " ".join(imports))


class Drawing(unittest.TestCase):
    def test_operations_differ_and_are_equally_frequent(self):
        dice, view = rng(), RandAugment()
        plans = [[name for name, _ in view.plan(dice)] for _ in range(7000)]
        self.assertTrue(all(len(set(plan)) == len(plan) <= 4 for plan in plans))
        counts = Counter(name for plan in plans for name in plan)
        self.assertEqual(set(counts), set(OPERATIONS))
        for name, count in counts.items():
            self.assertAlmostEqual(count / 7000, 4 / 14 * 0.5, delta=0.02, msg=name)
        sizes = Counter(map(len, plans))
        for size, share in enumerate((1, 4, 6, 4, 1)):  # binomial: each of the four is applied or not
            self.assertAlmostEqual(sizes[size] / 7000, share / 16, delta=0.02)
        first = Counter(plan[0] for plan in plans if plan)
        self.assertLess(max(first.values()), 1.3 * min(first.values()), "the order is random, too")

    def test_levels_and_signs(self):
        drawn: dict[str, list[float]] = {name: [] for name in OPERATIONS}
        dice, view = rng(), RandAugment(num_layers=14, prob=1.0)
        for _ in range(2000):
            for name, argument in view.plan(dice):
                drawn[name].append(argument)
        levels = 10 * (1 - np.array(drawn["Solarize"]))
        self.assertAlmostEqual(float(levels.mean()), 7, delta=0.05)
        self.assertAlmostEqual(float(levels.std()), 0.5, delta=0.03)
        bits = Counter(drawn["Posterize"])
        self.assertAlmostEqual(bits[2] / 2000, 0.84, delta=0.03)
        self.assertAlmostEqual(bits[1] / 2000, 0.16, delta=0.03)
        for name, middle in (("Rotate", 0), ("ShearX", 0), ("TranslateY", 0), ("AdjustContrast", 1)):
            self.assertAlmostEqual(float((np.array(drawn[name]) > middle).mean()), 0.5, delta=0.04, msg=name)

    def test_levels_are_clamped(self):
        for magnitude, bound in ((9.5, 10), (0, 0)):
            view = RandAugment(magnitude=magnitude, num_layers=14, prob=1.0, std=3.0)
            levels = [10 * (1 - dict(view.plan(rng(seed)))["Solarize"]) for seed in range(200)]
            self.assertTrue(0 <= min(levels) <= max(levels) <= 10)
            self.assertGreater(levels.count(bound), 50)
        plan = dict(RandAugment(std=0, num_layers=14, prob=1.0).plan(rng()))
        self.assertEqual((len(plan), plan["Solarize"], plan["Posterize"]), (14, 1 - 0.7, 2))
        self.assertEqual({abs(plan["Rotate"]), abs(plan["ShearX"]) * 100}, {21.0})

    def test_a_clip_is_its_plan_applied(self):
        frames, view = clip(), RandAugment(prob=1.0)
        before, expected = frames.clone(), frames
        for name, argument in view.plan(rng(1)):
            expected = OPERATIONS[name].apply(expected, argument)
        one, other = (view(frames, rng(seed)) for seed in (1, 2))
        self.assertEqual((one.dtype, one.shape), (torch.uint8, frames.shape))
        self.assertTrue(torch.equal(one, expected))
        self.assertFalse(torch.equal(one, other))
        self.assertTrue(torch.equal(frames, before))
        self.assertTrue(torch.equal(RandAugment(prob=0.0)(frames, rng()), frames))
        still = frames[:1].expand(4, -1, -1, -1)
        for seed in range(10):
            changed = view(still, rng(seed))
            self.assertTrue((changed == changed[:1]).all(), "one draw for all frames")


class Erasing(unittest.TestCase):
    def test_erased_sizes(self):
        for area, aspect, height, width, accepted in ERASING["size_examples_for_224"]["rows"]:
            expected = (height, width) if accepted else None
            self.assertEqual(erased_size(224, 224, area, aspect), expected, (area, aspect))
        self.assertEqual(erased_size(100, 100, 6.25 / 1e4, 1.0), (2, 2), "half to even: sides of 2.5")
        self.assertEqual(erased_size(100, 100, 12.25 / 1e4, 1.0), (4, 4), "and of 3.5")

    def test_erasing_frequency_position_and_size(self):
        dice, erasing = rng(), RandomErasing()
        drawn = [erasing.box(100, 60, dice) for _ in range(12000)]
        boxes = np.array([box for box in drawn if box is not None])
        self.assertAlmostEqual(len(boxes) / 12000, 0.25, delta=0.015)
        top, left, height, width = boxes.T
        self.assertTrue((top >= 0).all() and (left >= 0).all() and (height < 100).all() and (width < 60).all())
        self.assertEqual(((top + height).max(), (left + width).max()), (100, 60))
        area, aspect = height * width / 6000, height / width
        self.assertTrue((area > 0.015).all() and (area < 0.35).all())
        self.assertTrue((aspect > 0.25).all() and (aspect < 4).all())
        small = area < 0.15  # few aspects of these are refused
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
        correlation = torch.corrcoef(noise.flatten(0, 1))
        self.assertLess(float((correlation - torch.eye(12)).abs().max()), 0.15, "frames and channels share no noise")
        # Black and white lie about two deviations from the mean, as the docstring says.
        ends = normalize_pixels(torch.tensor([0, 255], dtype=torch.uint8).expand(3, 2), 0)
        self.assertTrue(torch.equal((ends * 10).round() / 10, torch.tensor([[-2.1, 2.2], [-2.0, 2.4], [-1.8, 2.6]])))

    def test_a_clip_is_a_function_of_its_generator(self):
        frames, erasing = clip(), RandomErasing(prob=1.0)
        one, same, other = (erasing(frames, rng(seed)) for seed in (1, 1, 2))
        self.assertEqual((one.dtype, one.shape), (torch.uint8, frames.shape))
        self.assertTrue(torch.equal(one, same))
        self.assertFalse(torch.equal(one, other))
        self.assertIs(RandomErasing(prob=0.0)(frames, rng()), frames)
        whole = RandomErasing(prob=1.0, area=(1.0, 1.0), aspect=(1.0, 1.0))
        self.assertIs(whole(frames, rng()), frames, "no rectangle is smaller than the frame")


class Settings(unittest.TestCase):
    def test_published_defaults(self):
        view, recorded = RandAugment(), RAND["settings"]
        for key in ("magnitude", "num_layers", "prob"):
            self.assertEqual(getattr(view, key), recorded[key])
        self.assertIn(f"std {view.std}".replace("0.", "."), recorded["sampling"])
        erasing, recorded = RandomErasing(), ERASING["settings"]
        self.assertEqual(
            (erasing.prob, list(erasing.area), list(erasing.aspect)),
            (recorded["probability"], recorded["area_fraction"], recorded["aspect"]),
        )

    def test_arguments_out_of_range_are_refused_in_a_configuration(self):
        """Of all objects that change samples; the ranges are in their signatures."""
        nan, inf = float("nan"), float("inf")
        for target, wrong in {
            "augment.RandAugment": {"magnitude": (11, -1), "num_layers": (0, 15), "prob": (1.5, nan), "std": (-1, inf)},
            "augment.RandomErasing": {
                "prob": (-0.1, nan),
                "area": ([0.5, 0.2], [0.0, 0.2], [0.1, 1.2], 0.1),
                "aspect": ([0.0, 1.0], [2.0, 1.0], [1.0, inf]),
            },
            "views.PretrainView": {
                "size": (0, 9999),
                "short_side": (0,),
                "scale": ([0.5, 0.2], [0.5, 2.0], 0.5, ["a", 1]),
                "ratio": ([0.0, 1.0], [0.5, nan]),
            },
            "views.EvalView": {"crops": (2,)},
            "mixing.MixupCutmix": {
                "prob": (1.1,),
                "switch_prob": (-0.1,),
                "label_smoothing": (nan,),
                "mixup_alpha": (-1, inf),
                "cutmix_alpha": (nan,),
            },
            **{f"masking.{kind}": {"ratio": (-0.1, 1.1, nan)} for kind in ("RandomMask", "TubeMask", "BlockMask")},
        }.items():
            for name, value in ((name, value) for name, values in wrong.items() for value in values):
                valid = {"size": 8} if "View" in target else {}
                problems = target_problems({"_target_": f"omnivision.data.{target}", **valid, name: value}, "key")
                self.assertEqual([key.partition("[")[0] for key in problems], [f"key.{name}"], (target, value))


if __name__ == "__main__":
    unittest.main()
