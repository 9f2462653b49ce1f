"""`omnivision val-split`: whole groups, as near to the share as they allow, the same for the same seed."""

import itertools
import tempfile
import unittest
from collections import Counter
from pathlib import Path

import numpy as np

from omnivision.tools.prepare.held_out import GROUPINGS, _nearest_sum, group_videos, hold_out, pattern_grouping
from omnivision.utils.errors import UserError
from tests.runs import call_command


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `omnivision val-split ...`."""
    return call_command("val-split", *arguments)


class Grouping(unittest.TestCase):
    def test_each_dataset(self):
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
            for path, group in names.items():
                self.assertEqual(group_videos([path], GROUPINGS[dataset]), [group], dataset)

    def test_a_pattern(self):
        self.assertEqual(group_videos(["a/s01_e02.mp4"], pattern_grouping(r"^s(\d+)")), ["01"])
        for pattern, saying in (
            ("(", "--group-pattern"),
            ("s..", "no parentheses"),
            ("x(.)", "does not match 's01_e02'"),
        ):
            with self.subTest(pattern), self.assertRaisesRegex(UserError, saying):
                group_videos(["a/s01_e02.mp4"], pattern_grouping(pattern))


class HeldOut(unittest.TestCase):
    def setUp(self):
        random = np.random.default_rng(0)
        sizes = random.integers(1, 8, 300)
        self.groups = [f"g{k}" for k, size in enumerate(sizes) for _ in range(size)]
        self.labels = np.array([k % 15 for k, size in enumerate(sizes) for _ in range(size)])

    def test_groups_stay_whole_and_the_share_is_met(self):
        for share in (0.01, 0.2, 0.5, 0.9):
            held = hold_out(self.groups, self.labels, share, seed=42)
            sides = [
                {g for g, is_held in zip(self.groups, held, strict=True) if is_held is np.bool_(side)}
                for side in (0, 1)
            ]
            self.assertFalse(sides[0] & sides[1])
            self.assertEqual(held.sum(), round(share * len(held)))

    def test_the_seed_and_nothing_else_decides(self):
        one, again, other = (hold_out(self.groups, self.labels, 0.2, seed) for seed in (42, 42, 43))
        self.assertTrue(np.array_equal(one, again))
        self.assertLess((one & other).sum(), 0.5 * one.sum())

    def test_classes_are_served_evenly(self):
        held = hold_out(self.groups, self.labels, 0.2, seed=42)
        groups = {label: Counter() for label in range(15)}
        for _, label, is_held in set(zip(self.groups, self.labels.tolist(), held.tolist(), strict=True)):
            groups[label][is_held] += 1
        for count in groups.values():  # of 20 groups each
            self.assertTrue(2 <= count[True] <= 6, count)

    def test_a_class_of_one_group_stays_in_training(self):
        for seed in range(10):
            held = hold_out(["alone", *self.groups], np.array([99, *self.labels]), 0.2, seed)
            self.assertFalse(held[0])

    def test_as_near_as_groups_allow(self):
        random = np.random.default_rng(1)
        for _ in range(60):
            sizes = random.integers(1, 30, random.integers(2, 9))
            target = int(random.integers(1, sizes.sum()))
            chosen = _nearest_sum(sizes, target)
            self.assertEqual(len(set(chosen.tolist())), len(chosen))
            sums = [
                sum(part) for count in range(1, len(sizes)) for part in itertools.combinations(sizes.tolist(), count)
            ]
            self.assertEqual(abs(sizes[chosen].sum() - target), min(abs(total - target) for total in sums))

    def test_one_group_cannot_be_split(self):
        with self.assertRaisesRegex(UserError, "All 3 videos are of one group"):
            hold_out(["a"] * 3, np.zeros(3, int), 0.2, 42)


class Command(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.paths = np.array([f"c{c}/v_c{c}_g{g:02}_c{k}.avi" for c in range(3) for g in range(10) for k in range(4)])
        self.labels = np.repeat(np.arange(3), 40)
        self.files = self.folder / "paths.npy", self.folder / "labels.npy"
        np.save(self.files[0], self.paths)
        np.save(self.files[1], self.labels)

    def read(self, side: str) -> list[tuple[str, int]]:
        arrays = [np.load(self.folder / f"out/{side}_{what}.npy", allow_pickle=False) for what in ("paths", "labels")]
        self.assertEqual((arrays[0].dtype.kind, arrays[1].dtype), ("U", np.int64))
        return list(zip(*(array.tolist() for array in arrays), strict=True))

    def test_writes_both_sides_and_tells(self):
        code, out, errors = run(*self.files, self.folder / "out", "--dataset", "ucf101")
        self.assertEqual((code, errors), (0, ""))
        self.assertIn("val: 24 videos (20.0%) in 6 groups, 3 classes", out)
        train, val = self.read("train"), self.read("val")
        whole = list(zip(self.paths.tolist(), self.labels.tolist(), strict=True))
        self.assertEqual(sorted(train + val), sorted(whole))
        self.assertEqual([len(train), len(val)], [96, 24])
        code, again, _ = run(*self.files, self.folder / "out", "--dataset", "ucf101")
        self.assertEqual((code, again), (0, out), "the same command again changes nothing")

    def test_segments_go_with_their_samples(self):
        """Also where a video is there as a file and as a folder of frames: both are on one side."""
        paths = [path for k in range(10) for path in (f"{k}.mp4", f"{k}.mp4", f"{k}/frames")]
        np.save(self.folder / "p.npy", np.array(paths))
        np.save(self.folder / "train_labels.npy", np.arange(30) % 2)
        np.save(self.folder / "train_segments.npy", np.stack([np.arange(30.0), np.arange(30.0) + 1], axis=1))
        files = self.folder / "p.npy", self.folder / "train_labels.npy", self.folder / "out"
        with self.assertRaisesRegex(UserError, "Pass --segments"):
            run(*files, "--group-pattern", "(.*)")
        for _ in range(2):
            run(*files, "--group-pattern", "(.*)", "--segments", self.folder / "train_segments.npy")
            groups = []
            for side in ("train", "val"):
                split, segments = (np.load(self.folder / f"out/{side}_{what}.npy") for what in ("paths", "segments"))
                self.assertEqual([paths[int(start)] for start, _ in segments], split.tolist())
                groups.append({path.partition(".")[0].partition("/")[0] for path in split})
            self.assertEqual(([len(group) for group in groups], groups[0] & groups[1]), ([8, 2], set()))

    def test_what_is_there_is_not_replaced(self):
        run(*self.files, self.folder / "out", "--dataset", "ucf101")
        before = self.read("val")
        with self.assertRaisesRegex(UserError, "Give another OUT"):
            run(*self.files, self.folder / "out", "--dataset", "ucf101", "--seed", 7)
        self.assertEqual(self.read("val"), before)

    def test_classes_on_one_side_are_named(self):
        np.save(self.files[1], np.where(np.arange(120) < 4, 7, self.labels))
        _, _, errors = run(*self.files, self.folder / "out", "--group-pattern", r"(c\d_g\d+)")
        self.assertIn("1 classes have no video in val: 7.", errors)

    def test_refused(self):
        out = self.folder / "out"
        for options, saying in (
            ("--share 1", "--share"),
            ("--share 0", "--share"),
            ("--seed -1", "--seed"),
        ):
            with self.subTest(options), self.assertRaisesRegex(UserError, saying):
                run(*self.files, out, "--dataset", "ikea", *options.split())
        np.save(self.folder / "short.npy", self.labels[:5])
        np.save(self.folder / "wide.npy", np.full(len(self.labels), 2**64 - 1, np.uint64))
        np.save(self.folder / "low.npy", np.array(self.labels) * 0 - 5)
        np.save(self.folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
        cases = {
            (self.files[0], self.folder / "short.npy"): r"holds \(5,\) of int64; expected a 1-D array of 120 integers",
            (self.files[1], self.files[1]): "expected a 1-D array of .* strings",
            (self.folder / "none.npy", self.files[1]): "no such file",
            (self.files[0], self.folder / "wide.npy"): "holds the label 18446744073709551615; expected",
            (self.files[0], self.folder / "low.npy"): "holds the label -5; expected",
            (self.folder / "objects.npy", self.files[1]): "never unpickled",
        }
        for files, saying in cases.items():
            with self.subTest(saying), self.assertRaisesRegex(UserError, saying):
                run(*files, out, "--dataset", "ucf101")
        self.assertFalse(out.exists())
        with self.assertRaisesRegex(UserError, "--dataset"):
            run(*self.files, out)


if __name__ == "__main__":
    unittest.main()
