"""Dataset splits: what is read from the two arrays, and what is refused."""

import pickle
import struct
import subprocess
import tempfile
import unittest
import warnings
from pathlib import Path

import numpy as np

from omnivision.data.catalog import Dataset, LabelSets, Split, SplitFiles, label_sets, shift_command
from omnivision.training.preflight import file_warnings, label_warnings, shift_warnings
from omnivision.utils.errors import UserError


class Canary:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


class Folder(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def save(self, name: str, array: object, **options: object) -> str:
        np.save(self.folder / name, array, **options)
        return str(self.folder / name)

    def split(self, paths: object = ("a.mp4", "b.mp4"), labels: object = (0, 1), **entry: object) -> Split:
        files = SplitFiles(self.save("paths.npy", np.array(paths)), self.save("labels.npy", np.array(labels)))
        return Split(Dataset("films", train=files, **entry), "train")


class Reading(Folder):
    def test_paths_are_rewritten(self):
        split = self.split(
            ["/old/x.avi", "y.avi"], prefix="/new/", remove_prefix="/old/", suffix=".mp4", remove_suffix=".avi"
        )
        self.assertEqual([split.path(0), split.path(1)], ["/new/x.mp4", "/new/y.mp4"])
        self.assertEqual((len(split), split.label(1)), (2, 1))

    def test_a_prefix_that_is_a_folder_needs_no_slash(self):
        (self.folder / "clips").mkdir()
        (self.folder / "clips_1.mp4").touch()
        for prefix, path, expected in (
            ("clips", "1.mp4", "clips/1.mp4"),
            ("clips/", "1.mp4", "clips/1.mp4"),
            ("clips_", "1.mp4", "clips_1.mp4"),  # no folder, but how names begin
            ("clips", "_1.mp4", "clips/_1.mp4"),  # a folder, though files beside it begin so
            ("nowhere", "1.mp4", "nowhere1.mp4"),
        ):
            split = self.split([path], [0], prefix=f"{self.folder}/{prefix}")
            self.assertEqual(split.path(0), f"{self.folder}/{expected}")
            self.assertEqual(pickle.loads(pickle.dumps(split)).path(0), split.path(0))  # noqa: S301
        self.assertEqual(self.split(["/x.mp4"], [0]).path(0), "/x.mp4")

    def test_the_first_candidate_that_exists(self):
        here = self.save("here.npy", np.array(["a"]))
        split = Split(Dataset("films", val=SplitFiles(["/nowhere.npy", here])), "val")
        self.assertEqual(split.path(0), "a")
        self.assertEqual(split.label(0), -1, "without labels, every label is ignored")

    def test_an_entry_of_the_catalog(self):
        paths = self.save("p.npy", np.array(["a"]))
        entry = {"kind": "video", "num_classes": 3, "fps": 12.5, "train": {"paths": paths, "labels": None}, "val": None}
        dataset = Dataset.from_entry("films", entry)
        self.assertEqual((dataset.num_classes, dataset.fps, dataset.val), (3, 12.5, None))
        with self.assertRaisesRegex(UserError, "films has no val split"):
            Split(dataset, "val")

    def test_arrays_are_mapped_and_workers_get_names_only(self):
        split = self.split([f"{i:0100d}.mp4" for i in range(5000)], np.zeros(5000, int))
        self.assertIsInstance(split._paths, np.memmap)
        packed = pickle.dumps(split)
        self.assertLess(len(packed), 2000)
        self.assertEqual(pickle.loads(packed).path(4999), split.path(4999))  # noqa: S301


class Labels(Folder):
    def test_sources_of_one_set_share_a_head(self):
        sources = [Dataset("a", num_classes=3), Dataset("b", num_classes=5), Dataset("c", num_classes=3, label_set="a")]
        self.assertEqual(label_sets(sources), LabelSets([3, 5], {"a": 0, "b": 1, "c": 0}))
        self.assertEqual(label_sets(sources, share_head=True), LabelSets([5], {"a": 0, "b": 0, "c": 0}))
        with self.assertRaisesRegex(UserError, "The number of classes of d is unknown"):
            label_sets([*sources, Dataset("d")])
        with self.assertRaisesRegex(UserError, "e has 4 classes, other sources of its label set a have 3"):
            label_sets([*sources, Dataset("e", num_classes=4, label_set="a")])

    def test_names_of_classes(self):
        self.assertEqual(Dataset("a", num_classes=2).names(), ["0", "1"])
        file = self.folder / "names.txt"
        file.write_text("jump\nrun\n")
        self.assertEqual(Dataset("a", num_classes=2, class_names=str(file)).names(), ["jump", "run"])
        with self.assertRaisesRegex(UserError, r"names 2 classes, and datasets\.a\.num_classes is 3"):
            Dataset("a", num_classes=3, class_names=str(file)).names()
        file.write_text("run\nrun\n")
        with self.assertRaisesRegex(UserError, "names two classes 'run'"):
            Dataset("a", num_classes=2, class_names=str(file)).names()
        with self.assertRaisesRegex(UserError, r"datasets\.a\.class_names is .*cannot be read"):
            Dataset("a", num_classes=3, class_names=str(self.folder / "none.txt")).names()

    def test_no_sampled_file_exists(self):
        np.save(self.folder / "p.npy", np.array([f"{number}.mp4" for number in range(100)]))
        split = Split(
            Dataset("d", prefix=f"{self.folder}/", train=SplitFiles(str(self.folder / "p.npy"))),
            "train",
        )
        (warning,) = file_warnings([split])
        self.assertRegex(warning, r"^None of the 16 sampled files of d \(train\) exists, .* datasets\.d\.prefix")
        (self.folder / "0.mp4").touch()
        self.assertEqual(file_warnings([split]), [])

    def test_classes_that_never_occur_are_a_warning(self):
        np.save(self.folder / "p.npy", np.array(["a", "b", "c"]))
        np.save(self.folder / "l.npy", np.array([0, 3, -1]))
        files = SplitFiles(str(self.folder / "p.npy"), str(self.folder / "l.npy"))
        split = Split(Dataset("d", num_classes=4, train=files), "train")
        self.assertEqual(split.label_counts(), [1, 0, 0, 1])
        (warning,) = label_warnings([split])
        self.assertRegex(warning, r"d: 2 of 4 classes have no training sample \(1, 2\)")
        self.assertEqual(
            label_warnings([Split(Dataset("d", train=SplitFiles(str(self.folder / "p.npy"))), "train")]), []
        )


class LabelsFromOne(Folder):
    def test_they_are_told_with_the_command_that_shifts_them(self):
        for labels in ([1, 2, 3], [3, -1, 1, 2], np.array([1, 3, 3, 2], np.uint8)):
            with self.assertRaisesRegex(UserError, r"start at 1.*python -c") as caught:
                self.split([str(i) for i in range(len(labels))], labels, num_classes=3)
            self.assertNotIn("num_classes", str(caught.exception))
            subprocess.run(shift_command(str(self.folder / "labels.npy")), shell=True, check=True)
            shifted = np.load(self.folder / "labels.npy")
            self.assertEqual(shifted.tolist(), [label - (label > 0) for label in np.asarray(labels).tolist()])

    def test_in_one_split_alone(self):
        for train, val, shifted in (
            ([0, 1, 2], [1, 2, 3], True),
            ([1, 2, 3], [-1, 0, 2], True),
            ([0, 1, 2], [2, 0, 1], False),
            ([0, 1, 3], [1, 2, 3], False),
            ([0, 0, 0], [1, 1, 1], False),
            ([0, 1, 2], [-1, -1, -1], False),
        ):
            paths, files = self.save("p.npy", np.array(["a", "b", "c"])), {}
            for name, labels in (("train", train), ("val", val)):
                files[name] = SplitFiles(paths, self.save(f"{name}.npy", np.array(labels)))
            dataset = Dataset("d", num_classes=4, **files)
            warnings = shift_warnings([Split(dataset, "train")], [Split(dataset, "val")])
            self.assertEqual(["datasets.d.train.labels" in warning for warning in warnings], [True] * shifted)

    def test_any_labels_are_taken_where_the_number_of_classes_is_unknown(self):
        self.assertEqual(self.split(["a", "b"], [1, 5], num_classes=None).label(1), 5)

    def test_those_that_may_start_at_one_are_a_warning_and_others_are_not(self):
        for labels, classes, told in (([1, 2, 3], 4, True), ([0, 2, 3], 4, False), ([1, 2, 5], 6, False)):
            warnings = label_warnings([self.split(["a", "b", "c"], labels, num_classes=classes)])
            self.assertEqual("start at 1" in warnings[0], told)
        with self.assertRaisesRegex(UserError, "num_classes"):
            self.split(["a", "b"], [1, 7], num_classes=3)


class Refused(Folder):
    def assert_refused(self, saying: str, **arrays: object) -> None:
        with self.assertRaisesRegex(UserError, saying) as caught:
            self.split(**arrays)
        self.assertIn("datasets.films", str(caught.exception))

    def test_wrong_arrays(self):
        self.assert_refused(
            r"a 1-D array \(2,\) of bytes .*expected a 1-D array of \(unicode\) strings", paths=[b"a", b"b"]
        )
        self.assert_refused("of integers .*strings", paths=[1, 2])
        self.assert_refused(r"a 2-D array \(2, 1\)", paths=[["a"], ["b"]])
        self.assert_refused("a 0-D array", paths="a")
        self.assert_refused("is empty", paths=np.array([], dtype=str), labels=np.array([], int))
        self.assert_refused("floating-point numbers .*integers", labels=[0.0, 1.0])
        self.assert_refused("of booleans", labels=[True, False])
        self.assert_refused(r"a 2-D array \(1, 2\)", labels=[[0, 1]])
        self.assert_refused("3 labels for 2 paths", labels=[0, 1, 2])

    def test_labels_out_of_range(self):
        self.split(labels=[-1, 2], num_classes=3)
        with self.assertRaisesRegex(
            UserError, r"from 0 to 3; expected -1 \(ignored\) to 2.*datasets\.films\.num_classes"
        ):
            self.split(labels=[0, 3], num_classes=3)
        with self.assertRaisesRegex(UserError, r"from -2 to 0; expected -1 \(ignored\) or more"):
            self.split(labels=[0, -2])

    def assert_unreadable(self, file: str, saying: str = "") -> None:
        """Refused as paths and as labels, with the setting of each."""
        good = self.save("good.npy", np.array(["a.mp4"]))
        for which, files in (("paths", SplitFiles(file)), ("labels", SplitFiles(good, file))):
            with self.assertRaisesRegex(UserError, f"(?s)cannot be read as a .npy array: .*{saying}") as caught:
                Split(Dataset("films", train=files), "train")
            self.assertIn(file, str(caught.exception))
            self.assertIn(f"datasets.films.train.{which}", str(caught.exception))

    def test_files_that_are_no_arrays(self):
        missing = SplitFiles([str(self.folder / "a.npy"), str(self.folder / "b.npy")])
        with self.assertRaisesRegex(UserError, r"datasets\.films\.train\.paths: no such file: .*a\.npy, .*b\.npy"):
            Split(Dataset("films", train=missing), "train")
        whole = Path(self.save("whole.npy", np.arange(1000))).read_bytes()
        np.savez(self.folder / "archive.npz", a=np.arange(3))
        contents = {
            "text": b"a.mp4\nb.mp4\n",
            "nothing": b"",
            "cut": whole[:500],
            "cut_header": whole[:40],
            "archive": (self.folder / "archive.npz").read_bytes(),
            "broken_archive": b"PK\x03\x04 and no more",
        }
        for name, content in contents.items():
            file = self.folder / f"{name}.npy"
            file.write_bytes(content)
            with self.subTest(name):
                self.assert_unreadable(str(file))
        with self.assertRaisesRegex(UserError, "no such file"):
            Split(Dataset("films", train=SplitFiles(str(self.folder))), "train")

    def test_headers_that_are_no_description(self):
        for header in ("{[]: 1}", "{{}: 1}", "{1: 2, 'a': 3}", "-" * 9000 + "1", "[" * 9000, "{'shape': (True,)}",
                       "{'descr': '<U5', 'fortran_order': False, 'shape': (True,)}"):  # fmt: skip
            file = self.folder / "header.npy"
            text = header.encode()
            file.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
            with self.subTest(header[:20]):
                self.assert_unreadable(str(file))

    def test_numbers_that_are_no_characters(self):
        file = self.save("paths.npy", np.array(["a.mp4", "b.mp4"]))
        data = Path(file).read_bytes()
        Path(file).write_bytes(data[:-20] + b"\xff\xff\xff\x7f" * 5)
        split = Split(Dataset("films", train=SplitFiles(file)), "train")
        self.assertEqual(split.path(0), "a.mp4")
        self.assertRegex(split.path(1), "^entry 1 of .*paths.npy, which is no text$")

    def test_a_damaged_header_is_never_more_than_a_mistake(self):
        whole, rng, refused = (
            Path(self.save("whole.npy", np.array(["a.mp4"] * 9))).read_bytes(),
            np.random.default_rng(0),
            0,
        )
        file = self.folder / "damaged.npy"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, about odd headers
            for _ in range(300):
                content = bytearray(whole)
                for place in rng.integers(0, 128, 3):
                    content[place] = rng.choice([*b"0123456789'(),{}<U-\0\xff"])
                file.write_bytes(content)
                try:
                    Split(Dataset("films", train=SplitFiles(str(file))), "train")
                except UserError:
                    refused += 1
        self.assertGreater(refused, 250)

    def test_objects_are_never_unpickled(self):
        canary = self.folder / "canary"
        file = self.save("evil.npy", np.array([Canary(str(canary))], dtype=object), allow_pickle=True)
        raw = self.folder / "raw.npy"
        raw.write_bytes(pickle.dumps(Canary(str(canary))))
        self.assert_unreadable(file, "Python objects, which are never unpickled")
        self.assert_unreadable(str(raw))
        self.assertFalse(canary.exists())
        np.load(file, allow_pickle=True)[0].close()
        self.assertTrue(canary.exists(), "the canary sings when it is let out")


if __name__ == "__main__":
    unittest.main()
