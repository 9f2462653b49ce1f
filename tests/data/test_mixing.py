"""Mixup and CutMix: the published figures, draw frequencies, odd batches and missing labels."""

import itertools
import unittest

import numpy as np
import torch
from torch import Tensor

from omnivision.data.batch import Batch
from omnivision.data.catalog import LabelSets
from omnivision.data.mixing import MixupCutmix, cutmix_box, kept_share, mix, mixed_targets, soft_targets
from omnivision.models.patches import normalize_pixels
from omnivision.tasks.classify import Classify
from omnivision.utils.errors import UserError
from tests.parity_formula import error, record, stated, tensor

RECORDED = record("augmentation")
CLASSES, SMOOTHING = RECORDED["settings"]["num_classes"], RECORDED["settings"]["label_smoothing"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def batch(size: int) -> tuple[Tensor, Tensor]:
    return tensor("mixing.video", [size, 3, 2, 9, 12], 0.0, 2.0), torch.arange(size) % CLASSES


class Published(unittest.TestCase):
    def test_the_recorded_cases(self):
        self.assertEqual(len(RECORDED["cases"]), 6)
        for case in RECORDED["cases"]:
            video, share, box = stated(case["input"]), case["lambda_drawn"], None
            if "box_centre_row_col" in case:
                (top, bottom), (left, right) = case["box_rows_cols"]
                box = cutmix_box(*video.shape[-2:], share, *case["box_centre_row_col"])
                self.assertEqual(box, (top, left, bottom - top, right - left), case["title"])
                share = kept_share(*video.shape[-2:], box)
                self.assertAlmostEqual(share, case["lambda_after_correction"], 12, case["title"])
            before, label = video.clone(), torch.tensor(case["labels"])
            mixed, targets = mix(video, share, box), mixed_targets(label, CLASSES, SMOOTHING, share)
            if len(video) % 2:  # the published code leaves the last sample alone and does not smooth its target
                mixed[-1], targets[-1] = video[-1], soft_targets(label, CLASSES, 0.0)[-1]
            self.assertLess(error(mixed, case["video"]), 1e-6, case["title"])
            self.assertTrue(torch.equal(video, before), "the input is not changed")
            self.assertLess(float((targets - torch.tensor(case["targets"])).abs().max()), 1e-6, case["title"])

    def test_defaults(self):
        for name in ("mixup_alpha", "cutmix_alpha", "prob", "switch_prob", "label_smoothing"):
            self.assertEqual(getattr(MixupCutmix(), name), RECORDED["settings"][name])


class Boxes(unittest.TestCase):
    def test_boxes_are_inside_and_leave_their_share(self):
        dice = rng()
        for _ in range(500):
            height, width = (int(side) for side in dice.integers(1, 60, 2))
            row, column, share = int(dice.integers(height)), int(dice.integers(width)), float(dice.random())
            top, left, h, w = box = cutmix_box(height, width, share, row, column)
            self.assertTrue(0 <= top <= top + h <= height and 0 <= left <= left + w <= width)
            outside = torch.ones(height, width)
            outside[top : top + h, left : left + w] = 0
            self.assertAlmostEqual(kept_share(height, width, box), float(outside.mean()), 5)
            # A box is clipped, and odd sides lose one: it never takes more than was drawn.
            self.assertGreaterEqual(kept_share(height, width, box), share - 1e-12)
        for share in (0.3, 0.5, 0.9):  # in the middle of a large frame it is not clipped
            self.assertAlmostEqual(kept_share(2000, 3000, cutmix_box(2000, 3000, share, 1000, 1500)), share, delta=2e-3)


class Pixels(unittest.TestCase):
    def test_the_last_sample_of_an_odd_batch_is_mixed_with_the_first(self):
        video, label = batch(5)
        for share, box in ((0.3, None), (0.8, (1, 2, 3, 4))):
            mixed, targets = mix(video, share, box), mixed_targets(label, CLASSES, 0.1, share)
            last_and_first = torch.tensor([4, 0])
            self.assertTrue(torch.equal(mixed[4], mix(video[last_and_first], share, box)[0]))
            expected = mixed_targets(label[last_and_first], CLASSES, 0.1, share)[0]
            self.assertTrue(torch.equal(targets[4], expected))
            self.assertTrue(torch.equal(mixed[:4], mix(video[:4], share, box)))
            self.assertTrue(torch.equal(targets[:4], mixed_targets(label[:4], CLASSES, 0.1, share)))

    def test_single_sample_is_only_smoothed(self):
        video, label = batch(1)
        for seed in range(6):
            pixels, lam = MixupCutmix()(video, rng(seed))
            targets = mixed_targets(label, CLASSES, 0.1, lam)
            self.assertTrue(torch.equal(pixels, video))
            self.assertLess(float((targets - soft_targets(label, CLASSES, 0.1)).abs().max()), 1e-6)

    def test_micro_batches_are_mixed_as_their_whole_batch(self):
        """Whatever their size, one sample too; an odd batch, images, and images with depth as well."""
        shapes = (([8, 3, 2, 9, 12], False), ([5, 3, 2, 9, 12], False), ([6, 3, 9, 12], False), ([6, 3, 9, 12], True))
        for shape, rgbd in shapes:
            size = shape[0]
            depth = tensor("depth", [size, 1, *shape[2:]], 0.0, 1.0) if rgbd else None
            label = torch.arange(size) % 4 - 1
            whole = Batch(tensor("video", shape, 0.0, 2.0), label, label, "a", ["x"] * size, depth=depth)
            for seed, parts in itertools.product(range(3), [n for n in (1, 2, 3, 4, 5, 6, 8) if size % n == 0]):
                seen: list[tuple[Tensor, Tensor | None]] = []

                def model(video: Tensor, head: int, depth: Tensor | None, seen: list = seen) -> Tensor:
                    torch.rand(3)  # as drop path does
                    seen.append((video, depth))
                    return video.flatten(1)[:, :CLASSES]

                torch.manual_seed(seed)  # once a step
                task = Classify(LabelSets([CLASSES], {"a": 0}), MixupCutmix())
                outputs = [task.training_step(model, piece) for piece in whole.split(parts)]
                pixels = normalize_pixels(whole.video, channel_dim=1)
                if depth is not None:
                    pixels = torch.cat([pixels, depth], 1)
                mixed, lam = MixupCutmix()(pixels, rng(seed))
                targets = mixed_targets(label, CLASSES, 0.1, lam)
                self.assertTrue(torch.equal(torch.cat([video for video, _ in seen]), mixed[:, :3]), (shape, parts))
                if depth is not None:
                    self.assertTrue(torch.equal(torch.cat([part for _, part in seen]), mixed[:, 3:]))
                loss = sum(float(output.sums["loss"]) for output in outputs)
                wanted = -(targets * mixed[:, :3].flatten(1)[:, :CLASSES].log_softmax(-1)).sum()
                self.assertAlmostEqual(loss, float(wanted), delta=1e-4)
                self.assertEqual(sum(int(output.count) for output in outputs), int(targets.any(1).sum()))

    def test_images_and_half_precision(self):
        video, _ = batch(4)
        for seed in range(6):
            full, lam = MixupCutmix()(video, rng(seed))
            image = MixupCutmix()(video[:, :, 0], rng(seed))
            self.assertTrue(torch.equal(image[0], full[:, :, 0]) and image[1] == lam, "as the frame of a clip")
            pixels, _ = MixupCutmix()(video.bfloat16(), rng(seed))
            self.assertEqual(pixels.dtype, torch.bfloat16)
            self.assertLess(float((pixels.float() - full).abs().max()), 0.03)


class Targets(unittest.TestCase):
    def test_smoothed_targets_sum_to_one(self):
        label = torch.tensor([0, 3, 2])
        hard = soft_targets(label, 4, 0.0)
        self.assertEqual(hard.tolist(), [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
        self.assertEqual(hard.dtype, torch.float32)
        smooth = soft_targets(label, 4, 0.1)
        self.assertLess(float((smooth - (0.9 * hard + 0.1 / 4)).abs().max()), 1e-7)
        self.assertLess(float((smooth.sum(1) - 1).abs().max()), 1e-6)
        # The loss is torch's with smoothing.
        scores, label = tensor("scores", [6, 4], 0.0, 3.0), torch.tensor([0, 3, -1, 1, -1, 2])
        ours = torch.nn.functional.cross_entropy(scores, soft_targets(label, 4, 0.1), reduction="sum")
        theirs = torch.nn.functional.cross_entropy(scores, label, ignore_index=-1, label_smoothing=0.1, reduction="sum")
        self.assertAlmostEqual(float(ours), float(theirs), 5)

    def test_sample_without_a_label_has_no_target(self):
        self.assertEqual(soft_targets(torch.tensor([-1, 1]), 3, 0.1)[0].tolist(), [0, 0, 0])
        mixed = mixed_targets(torch.tensor([-1, 0, 1, 2, -1]), 3, 0.1, 0.3)
        expected = torch.tensor([0.7, 1.0, 1.0, 0.3, 0.0])  # what a sample and its partner bring; of the last, neither
        self.assertLess(float((mixed.sum(1) - expected).abs().max()), 1e-6)
        self.assertLess(float((mixed[0] - 0.7 * soft_targets(torch.tensor([2]), 3, 0.1)[0]).abs().max()), 1e-7)


class Drawing(unittest.TestCase):
    def draws(self, mixing: MixupCutmix, count: int = 3000) -> tuple[np.ndarray, np.ndarray]:
        """Shares and whether there was a box."""
        drawn = [mixing.draw(224, 224, rng(seed)) for seed in range(count)]
        return np.array([share for share, _ in drawn]), np.array([box is not None for _, box in drawn])

    def test_mixup_and_cutmix_are_equally_frequent(self):
        shares, boxes = self.draws(MixupCutmix())
        self.assertAlmostEqual(float(boxes.mean()), 0.5, delta=0.03)
        self.assertTrue((shares < 1).mean() > 0.99, "always one of them")
        mixup = shares[~boxes]
        self.assertAlmostEqual(float(mixup.mean()), 0.5, delta=0.02)
        self.assertAlmostEqual(float(mixup.var()), 1 / (4 * (2 * 0.8 + 1)), delta=0.006)
        # A uniform share whose box is clipped at the border: the mean was worked out by the integral below.
        self.assertAlmostEqual(float(shares[boxes].mean()), self.mean_kept_share(), delta=0.02)

    @staticmethod
    def mean_kept_share() -> float:
        """1 - E[(s - s^2 / 4)^2] for s = sqrt(1 - share): of a side s at a uniform centre, s - s^2 / 4 lies inside."""
        s = np.sqrt((np.arange(100000) + 0.5) / 100000)
        return float(1 - ((s - s**2 / 4) ** 2).mean())

    def test_only_mixup_or_only_cutmix(self):
        for wanted, other in ((0.8, 0.0), (1.0, 0.0)):
            self.assertFalse(self.draws(MixupCutmix(mixup_alpha=wanted, cutmix_alpha=other), 300)[1].any())
            self.assertTrue(self.draws(MixupCutmix(mixup_alpha=other, cutmix_alpha=wanted), 300)[1].all())
        self.assertFalse(self.draws(MixupCutmix(switch_prob=0.0), 300)[1].any())
        self.assertTrue(self.draws(MixupCutmix(switch_prob=1.0), 300)[1].all())

    def test_mixing_probability(self):
        shares, boxes = self.draws(MixupCutmix(prob=0.3))
        self.assertAlmostEqual(float((shares < 1).mean()), 0.3, delta=0.03)
        self.assertFalse(boxes[shares == 1].all())
        video, label = batch(4)
        same, lam = MixupCutmix(prob=0.0)(video, rng())
        self.assertTrue(torch.equal(same, video))
        targets = mixed_targets(label, CLASSES, 0.1, lam)
        self.assertTrue(torch.equal(targets, soft_targets(label, CLASSES, 0.1)), "smoothed all the same")

    def test_centres_are_uniform(self):
        boxes = [MixupCutmix(mixup_alpha=0).draw(40, 60, rng(seed))[1] for seed in range(3000)]
        inside = np.zeros((40, 60))
        for top, left, height, width in boxes:
            inside[top : top + height, left : left + width] += 1 / len(boxes)
        self.assertLess(np.abs(inside - inside[::-1, ::-1]).max(), 0.06)

    def test_a_batch_is_its_draw_applied(self):
        video, _ = batch(4)
        before, seen = video.clone(), set()
        for seed in range(8):
            share, box = MixupCutmix().draw(9, 12, rng(seed))
            pixels, lam = MixupCutmix()(video, rng(seed))
            self.assertTrue(torch.equal(pixels, mix(video, share, box)))
            self.assertEqual(lam, share)
            seen.add(pixels.numpy().tobytes())
        self.assertTrue(torch.equal(video, before) and len(seen) > 4)
        # Nothing waits for a device: on the meta device there are no values, and asking for one raises.
        for seed in range(8):
            video, label = torch.empty(5, 3, 2, 8, 8, device="meta"), torch.empty(5, dtype=torch.int64, device="meta")
            pixels, lam = MixupCutmix()(video, rng(seed))
            targets = mixed_targets(label, CLASSES, 0.1, lam)
            self.assertEqual((pixels.shape, targets.shape), (video.shape, (5, CLASSES)))
            self.assertEqual((pixels.device.type, targets.device.type), ("meta", "meta"))

    def test_neither_mixup_nor_cutmix_is_refused(self):
        with self.assertRaisesRegex(UserError, "mixup_alpha and cutmix_alpha"):
            MixupCutmix(0, 0)


if __name__ == "__main__":
    unittest.main()
