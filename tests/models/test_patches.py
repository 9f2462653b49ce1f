"""Patchify and its inverse, positions, and pixels: equivalences, and the published figures."""

import unittest

import torch

from omnivision.models import patches
from omnivision.utils.errors import UserError
from tests.parity_formula import error, record, stated


class Tubelets(unittest.TestCase):
    def test_published_figures(self):
        for case in record("patchify")["cases"]:
            image = case.get("image")
            video = stated(image or case["video"])
            tubelet = (1, *case["patch"]) if image else tuple(case["patch"])
            got = patches.patchify(video[:, :, None] if image else video, tubelet)
            self.assertLess(error(got, case["patchified"]), 1e-7)
            if image:
                continue
            self.assertLess(error(got.flatten(2), case["flattened_last_two"]), 1e-7)
            for place, pixel in case["pixel_flat_index_at_output_flat_index"].items():
                self.assertEqual(got.flatten()[int(place)], video.flatten()[pixel])
            grid = patches.token_grid(video.shape[2:], tubelet)
            tokens = stated(case["unpatchify"]["tokens"])
            self.assertLess(error(patches.unpatchify(tokens, grid, tubelet), case["unpatchify"]["expected"]), 1e-7)

    def test_unpatchify_inverts_patchify_for_boxes_of_any_shape(self):
        video = torch.rand(2, 3, 4, 12, 20)
        for tubelet in ((2, 4, 4), (1, 3, 5), (4, 12, 2), (2, 6, 10)):
            tokens = patches.patchify(video, tubelet)
            grid = patches.token_grid((4, 12, 20), tubelet)
            self.assertTrue(torch.equal(patches.unpatchify(tokens, grid, tubelet), video), tubelet)

    def test_picked_tubelets_are_those_of_patchify(self):
        video = torch.rand(2, 3, 4, 12, 20)
        tokens = torch.tensor([[0, 7, 29], [5, 5, 14]])
        picked = patches.pick_tubelets(video, (2, 4, 4), tokens).flatten(3).transpose(2, 3)  # (B, K, P, C)
        expected = patches.patchify(video, (2, 4, 4))[torch.arange(2)[:, None], tokens]
        self.assertTrue(torch.equal(picked, expected))

    def test_a_video_that_does_not_fit_is_refused(self):
        for size in ((15, 224, 224), (16, 220, 224), (16, 224, 230), (0, 224, 224)):
            with self.assertRaisesRegex(UserError, "num_frames, image_size or tubelet"):
                patches.token_grid(size, (2, 16, 16))


class Positions(unittest.TestCase):
    def test_published_tables(self):
        for table in record("sinusoid")["tables"]:
            got = patches.sinusoid_positions(table["positions"], table["width"])
            self.assertLess(error(got, table), 1e-7)
        table, grid = patches.sinusoid_positions(32, 48), (2, 4, 4)
        recorded = record("image")["position_table_for_images"]
        self.assertLess(error(patches.image_positions(table, grid, 4, 4), recorded["model_resolution"]), 1e-7)
        other = patches.image_positions(table.double(), grid, 6, 6)
        self.assertLess(error(other, recorded["other_resolution"]), 1e-9)

    def test_the_same_grid_returns_the_table(self):
        table = patches.sinusoid_positions(32, 48)
        self.assertIs(patches.resized_positions(table, (2, 4, 4), (2, 4, 4)), table)
        self.assertEqual(patches.resized_positions(table, (2, 4, 4), (4, 6, 2)).shape, (1, 48, 48))


class Pixels(unittest.TestCase):
    def test_normalizing_and_back(self):
        video = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8)
        normalized = patches.normalize_pixels(video, channel_dim=1, dtype=torch.float64)
        self.assertLess((patches.unnormalize_pixels(normalized, 1) - video.double() / 255).abs().max(), 1e-12)
        self.assertAlmostEqual(
            float(normalized[0, 1, 0, 0, 0]), (int(video[0, 1, 0, 0, 0]) / 255 - 0.456) / 0.224, places=12
        )

    def test_positions_of_another_grid_keep_their_places(self):
        """A code that is linear in (t, h, w) is the same at the same place of a finer grid, and nothing is mixed up."""
        grid = (2, 4, 6)
        t, h, w = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) + 0.5 for n in grid), indexing="ij")
        table = torch.stack([t / 2, h / 4, w / 6], dim=-1).reshape(1, -1, 3)
        for new in ((4, 4, 6), (2, 8, 6), (2, 4, 3), (4, 8, 12)):
            got = patches.resized_positions(table, grid, new).reshape(*new, 3)
            places = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in new), indexing="ij")
            for axis in range(3):
                inside = [slice(1, -1) if n > 2 else slice(None) for n in new]
                wanted, found = places[axis][tuple(inside)], got[..., axis][tuple(inside)]
                if new[axis] != grid[axis] or new[axis] > 2:
                    # At the border of an axis the code is held, not continued.
                    low, high = 0.5 / grid[axis], 1 - 0.5 / grid[axis]
                    self.assertLess(float((found - wanted.clamp(low, high)).abs().max()), 1e-6, (new, axis))


if __name__ == "__main__":
    unittest.main()
