"""Dataset splits: what is read from their arrays, labels and class names, and what is refused."""

import pickle
import struct
import subprocess
import unittest
import warnings
from pathlib import Path

import numpy as np

from omnivision.data.catalog import Dataset, LabelSets, Split, label_sets, shift_command
from omnivision.training.preflight import label_warnings
from omnivision.utils.errors import UserError
from tests import fixtures
from tests.checkpoint.test_checkpoint import Canary


class Folder(fixtures.Folder):
    def save(self, name: str, array: object) -> str:
        np.save(self.folder / name, np.array(array))
        return str(self.folder / name)

    def split(self, paths: object = ("a.mp4", "b.mp4"), labels: object = (0, 1), **entry: object) -> Split:
        files = {"paths": self.save("paths.npy", paths)}
        if labels is not None:
            files["labels"] = self.save("labels.npy", labels)
        return Split(Dataset(name="d", train=files, **entry), "train")


class Reading(Folder):
    def test_paths_are_rewritten(self):
        (self.folder / "clips").mkdir()
        (self.folder / "clips_1.mp4").touch()
        for path, expected, entry in (
            ("/old/x.avi", "/new/x.avi", {"prefix": "/new/", "remove_prefix": "/old/"}),
            ("y.avi", "y.mp4", {"remove_prefix": "/old/", "remove_suffix": ".avi", "suffix": ".mp4"}),
            ("1.mp4", f"{self.folder}/clips/1.mp4", {"prefix": f"{self.folder}/clips"}),  # a folder needs no slash
            ("1.mp4", f"{self.folder}/clips/1.mp4", {"prefix": f"{self.folder}/clips/"}),
            ("1.mp4", f"{self.folder}/clips_1.mp4", {"prefix": f"{self.folder}/clips_"}),  # no folder, but how names begin
            ("_1.mp4", f"{self.folder}/clips/_1.mp4", {"prefix": f"{self.folder}/clips"}),
            ("1.mp4", "/nowhere1.mp4", {"prefix": "/nowhere"}),
            ("/x.mp4", "/x.mp4", {}),
        ):  # fmt: skip
            split = self.split([path], [0], **entry)
            self.assertEqual((split.path(0), len(split), split.label(0)), (expected, 1, 0))

    def test_first_existing_candidate_is_used(self):
        here = self.save("here.npy", ["a"])
        dataset = Dataset(name="d", fps=12, val={"paths": ["/nowhere.npy", here], "labels": None})
        split = Split(dataset, "val")
        self.assertEqual((split.path(0), split.label(0), dataset.fps), ("a", -1, 12.0))
        with self.assertRaisesRegex(UserError, r"datasets\.d\.train"):
            Split(dataset, "train")

    def test_arrays_are_mapped_and_workers_get_names_only(self):
        split = self.split([f"{i:0100d}.mp4" for i in range(5000)], np.zeros(5000, int))
        self.assertIsInstance(split._arrays["paths"], np.memmap)
        packed = pickle.dumps(split)
        self.assertLess(len(packed), 2000)
        self.assertEqual(pickle.loads(packed).path(4999), split.path(4999))  # noqa: S301


class Labels(Folder):
    def test_sources_of_one_set_share_a_head(self):
        sources = [
            Dataset(name=name, num_classes=count, label_set=label_set)
            for name, count, label_set in (("a", 3, None), ("b", 5, None), ("c", 3, "a"))
        ]
        self.assertEqual(label_sets(sources), LabelSets([3, 5], {"a": 0, "b": 1, "c": 0}))
        self.assertEqual(label_sets(sources, share_head=True), LabelSets([5], {"a": 0, "b": 0, "c": 0}))
        for wrong in (Dataset(name="e"), Dataset(name="e", num_classes=4, label_set="a")):
            with self.assertRaisesRegex(UserError, r"datasets\.e\.num_classes"):
                label_sets([*sources, wrong])

    def test_class_names_are_read(self):
        file = self.folder / "names.txt"
        file.write_text("jump\nrun\n\n")
        named = Dataset(name="d", num_classes=2, class_names=str(file))
        self.assertEqual((named.names(), Dataset(name="d", num_classes=2).names()), (["jump", "run"], ["0", "1"]))
        for text in ("run\n", "run\nrun\n", "\nrun\n", ""):
            file.write_text(text)
            with self.assertRaisesRegex(UserError, r"datasets\.d\.class_names"):
                named.names()
        file.unlink()
        with self.assertRaisesRegex(UserError, r"datasets\.d\.class_names"):
            named.names()

    def test_labels_from_one_are_refused_with_the_command_that_shifts_them(self):
        for labels in ([1, 2, 3], [3, -1, 1, 2], np.array([1, 3, 3, 2], np.uint8)):
            with self.assertRaisesRegex(UserError, r"start at 1.*python -c") as caught:
                self.split([str(i) for i in range(len(labels))], labels, num_classes=3)
            self.assertNotIn("num_classes", str(caught.exception))
            subprocess.run(shift_command(str(self.folder / "labels.npy")), shell=True, check=True)
            shifted = np.load(self.folder / "labels.npy")
            self.assertEqual(shifted.tolist(), [label - (label > 0) for label in np.asarray(labels).tolist()])
        self.assertEqual(self.split(labels=[1, 5]).label(1), 5, "without a number of classes")

    def test_labels_from_one_in_only_one_split_are_found(self):
        for train, val, shifted in (
            ([0, 1, 2], [1, 2, 3], True),
            ([1, 2, 3], [-1, 0, 2], True),
            ([0, 1, 2], [2, 0, 1], False),
            ([0, 1, 3], [1, 2, 3], False),
            ([0, 0, 0], [1, 1, 1], False),
            ([0, 1, 2], [-1, -1, -1], False),
        ):
            paths = self.save("p.npy", ["a", "b", "c"])
            files = {
                name: {"paths": paths, "labels": self.save(f"{name}.npy", labels)}
                for name, labels in (("train", train), ("val", val))
            }
            dataset = Dataset(name="d", num_classes=4, **files)
            found = "".join(label_warnings([Split(dataset, "train")], [Split(dataset, "val")]))
            self.assertEqual("datasets.d.train.labels" in found, shifted)

    def test_warnings(self):
        paths = ["a", "b", "c"]
        for labels, classes, from_one in (([1, 2, 3], 4, True), ([0, 2, 3], 4, False), ([1, 2, 5], 6, False)):
            (warning,) = label_warnings([self.split(paths, labels, num_classes=classes)], [])
            self.assertEqual("start at 1" in warning, from_one)
        split = self.split(paths, [0, 3, -1], num_classes=4)
        self.assertEqual(split.label_counts(), [1, 0, 0, 1])
        self.assertRegex("".join(label_warnings([split], [])), r"2 of 4 classes .*\(1\D+2\)")
        self.assertEqual(list(label_warnings([self.split(labels=None)], [])), [])


class Refused(Folder):
    def test_wrong_arrays_are_refused(self):
        two = {"paths": ["a", "b"]}
        for what, arrays in (
            ("paths", {"paths": [b"a", b"b"]}),
            ("paths", {"paths": [1, 2]}),
            ("paths", {"paths": [["a"], ["b"]]}),
            ("paths", {"paths": "a"}),
            ("paths", {"paths": np.array([], dtype=str), "labels": np.array([], int)}),
            ("labels", two | {"labels": [0.0, 1.0]}),
            ("labels", two | {"labels": [True, False]}),
            ("labels", two | {"labels": [[0, 1]]}),
            ("labels", two | {"labels": [0, 1, 2]}),
        ):
            with self.subTest(arrays), self.assertRaisesRegex(UserError, rf"datasets\.d\.train\.{what}") as caught:
                self.split(**arrays)
            self.assertEqual("same list as the paths" in str(caught.exception), what != "paths")

    def test_labels_out_of_range_are_refused(self):
        self.split(labels=[-1, 2], num_classes=3)
        for labels, classes in (([0, 3], 3), ([1, 7], 3), ([0, -2], None)):
            with self.assertRaisesRegex(UserError, r"datasets\.d\.num_classes"):
                self.split(labels=labels, num_classes=classes)

    def test_files_that_are_not_arrays_are_refused(self):
        whole = Path(self.save("whole.npy", np.arange(1000))).read_bytes()
        np.savez(self.folder / "archive.npz", a=np.arange(3))
        contents = {
            "text": b"a.mp4\nb.mp4\n",
            "nothing": b"",
            "cut": whole[:500],
            "cut_header": whole[:40],
            "archive": (self.folder / "archive.npz").read_bytes(),
            "broken_archive": b"PK\x03\x04 and no more",
            "pickle": pickle.dumps(Canary(str(self.folder / "canary"))),
            "missing": None,
        }
        objects = np.array([Canary(str(self.folder / "canary"))], dtype=object)
        np.save(self.folder / "objects.npy", objects, allow_pickle=True)
        contents["objects"] = (self.folder / "objects.npy").read_bytes()
        for number, header in enumerate(("{[]: 1}", "{{}: 1}", "{1: 2, 'a': 3}", "-" * 9000 + "1", "[" * 9000,
                                         "{'shape': (True,)}",
                                         "{'descr': '<U5', 'fortran_order': False, 'shape': (True,)}")):  # fmt: skip
            contents[f"header_{number}"] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
        good = self.save("good.npy", ["a.mp4"])
        for name, content in contents.items():
            file = str(self.folder / f"bad_{name}.npy")
            if content is not None:
                Path(file).write_bytes(content)
            for what, files in (("paths", {"paths": [file, file]}), ("labels", {"paths": good, "labels": file})):
                with self.subTest(name, what=what):
                    with self.assertRaisesRegex(UserError, rf"datasets\.d\.train\.{what}") as caught:
                        Split(Dataset(name="d", train=files), "train")
                    self.assertIn(file, str(caught.exception))
                    for word, names in (("truncated", ("nothing", "cut", "cut_header")), ("objects", ("objects",))):
                        if name in names:
                            self.assertIn(word, str(caught.exception).replace(file, ""))
        for files in ({"paths": str(self.folder)}, {"paths": good, "labels": str(self.folder)}):
            with self.assertRaisesRegex(UserError, "a folder"):
                Split(Dataset(name="d", train=files), "train")
        self.assertFalse((self.folder / "canary").exists(), "objects are never unpickled")
        np.load(self.folder / "objects.npy", allow_pickle=True)[0].close()
        self.assertTrue((self.folder / "canary").exists(), "the canary sings when it is let out")

    def test_damaged_header_raises_at_most_a_user_error(self):
        whole = Path(self.save("whole.npy", ["a.mp4"] * 9)).read_bytes()
        file, rng, refused = self.folder / "damaged.npy", np.random.default_rng(0), 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, about odd headers
            for _ in range(300):
                content = bytearray(whole)
                for place in rng.integers(0, 128, 3):
                    content[place] = rng.choice([*b"0123456789'(),{}<U-\0\xff"])
                file.write_bytes(content)
                try:
                    Split(Dataset(name="d", train={"paths": str(file)}), "train")
                except UserError:
                    refused += 1
        self.assertGreater(refused, 250)


if __name__ == "__main__":
    unittest.main()
