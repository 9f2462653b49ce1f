"""`omnivision val-split`: whole groups, as near to the share as they allow, the same for the same seed."""

import itertools
import unittest
from collections import Counter

import numpy as np

from omnivision.data.groups import _nearest_sum, group_videos, hold_out, pattern_grouping
from omnivision.tools.val_split import GROUPINGS
from omnivision.utils.errors import UserError
from tests.data import test_catalog as catalog
from tests.runs import call_command


class Grouping(unittest.TestCase):
    def test_each_dataset_and_a_pattern(self):
        cases = {
            "ucf101": {"Archery/v_Archery_g08_c01.avi": "v_Archery_g08", "v_Archery_g08_c02.mp4": "v_Archery_g08"},
            "hmdb51": {
                "brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi": "April_09_brush_hair",
                "A_Film_1_smile_h_nm_np1_fr_goo_0.avi": "A_Film_1_smile",
                "plain.avi": "plain",
            },
            "ikea": {"GOPR01_part_2.mp4": "GOPR01"},
            "diving48": {"rgb/abc-DEF_00012.mp4": "abc-DEF"},
            "uav": {"P000S00G10B10H10UC022000LC021000R0_08241716.avi": "P000S00G10B10H10UC022000"},
            "minissv2": {"frames/78687/": "78687", "100.webm": "100"},
        }
        self.assertEqual(set(cases), set(GROUPINGS))
        for dataset, names in cases.items():
            self.assertEqual(group_videos(list(names), GROUPINGS[dataset]), list(names.values()), dataset)
        self.assertEqual(group_videos(["a/s01_e02.mp4"], pattern_grouping(r"^s(\d+)")), ["01"])
        for pattern in ("(", "s..", "x(.)"):
            with self.subTest(pattern), self.assertRaisesRegex(UserError, "--group-pattern"):
                group_videos(["a/s01_e02.mp4"], pattern_grouping(pattern))


class HeldOut(unittest.TestCase):
    def setUp(self):
        random = np.random.default_rng(0)
        sizes = random.integers(1, 8, 300)
        self.groups = [f"g{k}" for k, size in enumerate(sizes) for _ in range(size)]
        self.labels = np.array([k % 15 for k, size in enumerate(sizes) for _ in range(size)])

    def test_groups_stay_whole_and_the_share_is_met(self):
        groups = np.array(self.groups)
        for share in (0.01, 0.2, 0.5, 0.9):
            held = hold_out(self.groups, self.labels, share, seed=42)
            self.assertFalse(set(groups[held]) & set(groups[~held]))
            self.assertEqual(held.sum(), round(share * len(held)))
        with self.assertRaisesRegex(UserError, "--group-pattern"):
            hold_out(["a"] * 3, np.zeros(3, int), 0.2, 42)

    def test_val_split_depends_only_on_the_seed(self):
        one, again, other = (hold_out(self.groups, self.labels, 0.2, seed) for seed in (42, 42, 43))
        self.assertTrue(np.array_equal(one, again))
        self.assertLess((one & other).sum(), 0.5 * one.sum())

    def test_classes_are_represented_evenly(self):
        held = hold_out(self.groups, self.labels, 0.2, seed=42)
        groups = {label: Counter() for label in range(15)}
        for _, label, is_held in set(zip(self.groups, self.labels.tolist(), held.tolist(), strict=True)):
            groups[label][is_held] += 1
        for count in groups.values():  # of 20 groups each
            self.assertTrue(2 <= count[True] <= 6, count)
        for seed in range(10):
            held = hold_out(["single", *self.groups], np.array([99, *self.labels]), 0.2, seed)
            self.assertFalse(held[0], "a class of one group stays in training")

    def test_share_is_as_close_as_groups_allow(self):
        random = np.random.default_rng(1)
        for _ in range(60):
            sizes = random.integers(1, 30, random.integers(2, 9))
            target = int(random.integers(1, sizes.sum()))
            chosen = _nearest_sum(sizes, target)
            self.assertEqual(len(set(chosen.tolist())), len(chosen))
            parts = (itertools.combinations(sizes.tolist(), count) for count in range(1, len(sizes)))
            nearest = min(abs(sum(part) - target) for part in itertools.chain(*parts))
            self.assertEqual(abs(sizes[chosen].sum() - target), nearest)


class Command(catalog.Folder):
    def setUp(self):
        super().setUp()
        self.paths = np.array([f"c{c}/v_c{c}_g{g:02}_c{k}.avi" for c in range(3) for g in range(10) for k in range(4)])
        self.labels = np.repeat(np.arange(3), 40)
        self.files = self.save("paths.npy", self.paths), self.save("labels.npy", self.labels)

    def run_command(self, *arguments: object, files: tuple[object, ...] = ()) -> tuple[int, str, str]:
        return call_command("val-split", *(files or self.files), self.folder / "out", *arguments)

    def read(self, side: str, second: str = "labels") -> list[tuple[str, object]]:
        arrays = [np.load(self.folder / f"out/{side}_{what}.npy", allow_pickle=False) for what in ("paths", second)]
        return list(zip(*(array.tolist() for array in arrays), strict=True))

    def test_writes_both_sides_and_replaces_nothing(self):
        code, out, errors = self.run_command("--dataset", "ucf101")
        self.assertEqual((code, errors), (0, ""))
        self.assertIn("val: 24 videos (20.0%) in 6 groups, 3 classes", out)
        train, val = self.read("train"), self.read("val")
        self.assertEqual(sorted(train + val), sorted(zip(self.paths.tolist(), self.labels.tolist(), strict=True)))
        self.assertEqual([len(train), len(val)], [96, 24])
        self.assertEqual(self.run_command("--dataset", "ucf101"), (0, out, ""), "the same command changes nothing")
        with self.assertRaisesRegex(UserError, "OUT"):
            self.run_command("--dataset", "ucf101", "--seed", 7)
        self.assertEqual(self.read("val"), val)

    def test_segments_go_with_their_samples(self):
        """Also where a video is there as a file and as a frame folder: both are on one side."""
        paths = [path for k in range(10) for path in (f"{k}.mp4", f"{k}.mp4", f"{k}/frames")]
        files = self.save("p.npy", np.array(paths)), self.save("train_labels.npy", np.arange(30) % 2)
        segments = self.save("train_segments.npy", np.stack([np.arange(30.0), np.arange(30.0) + 1], axis=1))
        with self.assertRaisesRegex(UserError, "--segments"):
            self.run_command("--group-pattern", "(.*)", files=files)
        self.run_command("--group-pattern", "(.*)", "--segments", segments, files=files)
        groups = []
        for side in ("train", "val"):
            for path, (start, _) in self.read(side, "segments"):
                self.assertEqual(path, paths[int(start)])
            groups.append({path.partition(".")[0].partition("/")[0] for path, _ in self.read(side)})
        self.assertEqual(([len(group) for group in groups], groups[0] & groups[1]), ([8, 2], set()))

    def test_classes_in_only_one_split_are_reported(self):
        self.save("labels.npy", np.where(np.arange(120) < 4, 7, self.labels))
        self.assertIn("without a video in val: 7.", self.run_command("--group-pattern", r"(c\d_g\d+)")[2])

    def test_refused(self):
        for options, regex in (
            ("--dataset ikea --share 1", "--share"),
            ("--dataset ikea --share 0", "--share"),
            ("--dataset ikea --seed -1", "--seed"),
            ("", "--dataset"),
            ("--dataset ikea --group-pattern (.*)", "--dataset"),
        ):
            with self.subTest(options), self.assertRaisesRegex(UserError, regex):
                self.run_command(*options.split())
        negative = self.save("negative.npy", self.labels - 2)
        with self.assertRaisesRegex(UserError, "-2.*LABELS"):
            self.run_command("--dataset", "ucf101", files=(self.files[0], negative))
        self.assertFalse((self.folder / "out").exists())


if __name__ == "__main__":
    unittest.main()
