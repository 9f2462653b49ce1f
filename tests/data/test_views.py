"""Crops and sizes: the published figures, and boxes inside the frame."""

import math
import unittest

import numpy as np
import torch

from omnivision.data.views import EvalView, PretrainView, random_crop_box, resize, resize_short_side
from tests.parity_formula import error, record, tensor

RECORDED = record("sampling")
DEFAULTS = ((0.08, 1.0), (3 / 4, 4 / 3))


def frames(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)


class Sizes(unittest.TestCase):
    def test_published_sizes_of_the_short_side(self):
        for size, height, width, new_height, new_width in RECORDED["short_side_scale"]["rows"]:
            got = resize_short_side(torch.zeros(1, 3, height, width, dtype=torch.uint8), size).shape[-2:]
            self.assertEqual(tuple(got), (new_height, new_width), (size, height, width))
        pitfalls = RECORDED["short_side_scale"]["rounding_pitfalls"]["224"]  # the division comes before the product
        self.assertEqual(len(pitfalls), 6)
        for height, width, expected, _ in pitfalls:
            got = resize_short_side(torch.zeros(1, 1, height, width, dtype=torch.uint8), 224)
            self.assertEqual(got.shape[-1], expected)
        self.assertEqual(tuple(EvalView(64).prepare(frames(20, 30)).shape), (2, 3, 64, math.floor(30 / 20 * 64)))

    def test_published_pixels(self):
        case = RECORDED["short_side_scale"]["pixels"]
        video = tensor(**{k: v for k, v in case["input"].items()})
        self.assertLess(error(resize_short_side(video, case["size"]), case["expected"]), 1e-6)
        crop = RECORDED["resized_crop"]
        top, left, height, width = crop["box_top_left_height_width"]
        video = tensor(**{k: v for k, v in crop["input"].items()})
        got = resize(video[..., top : top + height, left : left + width], *crop["output"])
        expected = crop["antialias_off (torchvision 0.13, the version the ancestor names)"]
        self.assertLess(error(got, expected), 1e-6)

    def test_bytes_are_resized_like_floats(self):
        clip = frames(60, 80)
        as_float = resize(clip.float(), 45, 33)
        # Rounded once along each axis: at most half a grey level each, and a little for the weights.
        self.assertLess(float((resize(clip, 45, 33).float() - as_float).abs().max()), 1.1)
        self.assertIs(resize(clip, 60, 80), clip, "the same size costs nothing")


class Boxes(unittest.TestCase):
    def test_published_defaults(self):
        recorded = RECORDED["random_resized_crop_defaults"]
        view = PretrainView(224)
        self.assertEqual(
            (list(view.scale), list(view.ratio)), (recorded["area_fraction"], recorded["aspect_width_over_height"])
        )

    def test_boxes_are_inside_with_the_right_areas_and_aspects(self):
        rng = np.random.default_rng(0)
        boxes = np.array([random_crop_box(256, 340, *DEFAULTS, rng) for _ in range(4000)])
        top, left, height, width = boxes.T
        self.assertTrue((top >= 0).all() and (left >= 0).all())
        self.assertTrue((top + height <= 256).all() and (left + width <= 340).all())
        area, aspect = height * width / (256 * 340), width / height
        self.assertTrue((0.078 <= area).all() and (area <= 1.0).all())
        self.assertTrue((0.74 <= aspect).all() and (aspect <= 1.35).all())
        self.assertAlmostEqual(float(np.log(aspect[area < 0.5]).mean()), 0, delta=0.02)
        small = area[area < 0.7]
        self.assertAlmostEqual(float(small.mean()), (0.08 + 0.7) / 2, delta=0.02)

    def test_boxes_of_any_frame_are_inside_it(self):
        rng = np.random.default_rng(0)
        for _ in range(1000):
            height, width = (int(side) for side in rng.integers(1, 60, 2))
            top, left, h, w = random_crop_box(height, width, *DEFAULTS, rng)
            self.assertTrue(0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h > 0 and w > 0)
        # A strip gets the largest allowed box in its centre.
        self.assertEqual(random_crop_box(10, 1000, (1.0, 1.0), DEFAULTS[1], rng), (0, 493, 10, 13))
        self.assertEqual(random_crop_box(1000, 10, (1.0, 1.0), DEFAULTS[1], rng), (493, 0, 13, 10))


class Views(unittest.TestCase):
    def test_a_view_is_a_function_of_its_generator(self):
        view, clip = PretrainView(32, short_side=40), frames(60, 90)
        prepared = view.prepare(clip)
        self.assertEqual(tuple(prepared.shape), (2, 3, 40, 60))
        one, same, other = (view(prepared, np.random.default_rng(seed)) for seed in (1, 1, 2))
        self.assertEqual((tuple(one.shape), one.dtype), ((2, 3, 32, 32), torch.uint8))
        self.assertTrue(torch.equal(one, same))
        self.assertFalse(torch.equal(one, other))

    def test_evaluation_crops(self):
        for height, width, crops in RECORDED["spatial_crop_3"]["rows"]:
            clip = torch.arange(height * width, dtype=torch.int32).reshape(1, 1, height, width)
            for number, (top, left, _, _) in enumerate(crops):
                got = EvalView(224, crops=3)(clip, np.random.default_rng(0), number)
                self.assertTrue(
                    torch.equal(got, clip[..., top : top + 224, left : left + 224]), (height, width, number)
                )
            centre = EvalView(224)(clip, np.random.default_rng(0))
            self.assertTrue(torch.equal(centre, EvalView(224, crops=3)(clip, np.random.default_rng(0), 1)))


if __name__ == "__main__":
    unittest.main()
