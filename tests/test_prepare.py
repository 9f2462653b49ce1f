"""`omnivision prepare`: from how datasets are published to arrays, catalog and quicker videos; and what it refuses."""

import csv
import io
import json
import os
import re
import shutil
import tempfile
import unittest
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from unittest import mock

import av
import numpy as np
import yaml
from PIL import Image

from omnivision.data import encode
from omnivision.data.catalog import Dataset, Split
from omnivision.data.encode import write_timed_video, write_video
from omnivision.data.video import VideoDecodeError, open_video
from omnivision.tools.prepare import transcode as transcoding
from omnivision.tools.prepare.catalog_file import entry_lines, updated_catalog
from omnivision.tools.prepare.index import SPLITS, video_key
from omnivision.tools.prepare.transcode import (
    TranscodeConfig,
    TranscodeJob,
    TranscodeResult,
    destinations,
    target_size,
    transcode,
)
from omnivision.tools.prepare.workers import run_in_processes
from omnivision.utils.errors import EXIT_INTERRUPTED, UserError
from tests.runs import call_command, real_films


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `omnivision prepare ...`."""
    return call_command("prepare", *arguments)


def moving(count: int = 12, height: int = 48, width: int = 64) -> np.ndarray:
    """A bright square on its way to the right: uint8 (T, H, W, 3)."""
    frames = np.full((count, height, width, 3), 40, dtype=np.uint8)
    for k in range(count):
        frames[k, 8:24, 2 * k : 2 * k + 16] = (220, 180, 60)
    return frames


class Folder(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.out = self.folder / "out"

    def write(self, name: str, text: str = "x") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def videos(self, *names: str) -> None:
        for name in names:
            self.write(name)

    def prepared(self, source: object, *arguments: object, name: str = "mine") -> dict[str, list[tuple[str, int]]]:
        """Prepare, and read back through the catalog: (path, label) by split."""
        catalog = self.folder / "catalog.yaml"
        code, _, self.errors = run(source, self.out, "--name", name, "--catalog", catalog, *arguments)
        self.assertEqual(code, 0)
        entry = yaml.safe_load(catalog.read_text())["datasets"][name]
        dataset = Dataset(name=name, **entry)
        self.classes = Path(dataset.class_names).read_text(encoding="utf-8").splitlines()
        self.assertEqual(len(self.classes), dataset.num_classes)
        splits = {which: Split(dataset, which) for which in ("train", "val") if which in entry}
        for which in splits:
            self.assertEqual(np.load(self.out / f"{which}_labels.npy").dtype, np.int64)
        return {w: [(split.path(i), split.label(i)) for i in range(len(split))] for w, split in splits.items()}

    def relative(self, found: list[tuple[str, int]], base: str = "") -> list[tuple[str, int]]:
        return [(os.path.relpath(path, self.folder / base), label) for path, label in found]

    def split_sizes(self, *arguments: object, source: str = "s") -> dict[str, int]:
        """Prepare `source`; the samples of each split, and the classes' names in self.classes."""
        shutil.rmtree(self.out, ignore_errors=True)
        _, self.said, self.errors = run(self.folder / source, self.out, "--name", "mine", *arguments)
        self.classes = (self.out / "class_names.txt").read_text().splitlines()
        there = [which for which in SPLITS if (self.out / f"{which}_paths.npy").exists()]
        return {which: len(np.load(self.out / f"{which}_labels.npy")) for which in there}

    def assert_refused(self, *arguments: object, saying: str) -> None:
        with self.assertRaisesRegex(UserError, saying) as caught:
            run(*arguments, "--name", "mine")
        self.assertNotIn("\n", str(caught.exception), "one paragraph")
        self.assertFalse(self.out.exists(), "nothing is written")


class CsvLists(Folder):
    def test_every_way_to_write_the_same_list(self):
        self.videos("v/a b.mp4", "v/c;d.mp4", "v/e.mp4")
        rows = [("v/a b.mp4", "run"), ("v/c;d.mp4", "jump, high"), ("v/e.mp4", "run")]
        expected = [("v/a b.mp4", 1), ("v/c;d.mp4", 0), ("v/e.mp4", 1)]
        for delimiter in ";,\t":
            for header in ([], [("path", "label")], [("Video", "Class")]):
                for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
                    with self.subTest(delimiter=delimiter, header=header, quoting=quoting):
                        text = io.StringIO()
                        csv.writer(text, delimiter=delimiter, quoting=quoting).writerows([*header, *rows])
                        found = self.prepared(self.write("list.csv", "\ufeff" + text.getvalue()))
                        self.assertEqual(self.relative(found["train"]), expected)
                        self.assertEqual(self.classes, ["jump, high", "run"])

    def test_columns_by_the_names_in_the_header(self):
        self.videos("a.mp4", "b.mp4")
        file = self.write("list.csv", "label,seconds,path\n1,2.5,a.mp4\n0,3.5,b.mp4\n")
        self.assertEqual(self.relative(self.prepared(file)["train"]), [("a.mp4", 1), ("b.mp4", 0)])

    def test_train_and_val_share_their_classes(self):
        self.videos("films/a.mp4", "films/b.mp4", "films/c.mp4")
        train = self.write("train.csv", "a.mp4;class 2\nb.mp4;class 10\n")
        val = self.write("val.csv", "c.mp4;class 10\na.mp4;class 2\n")
        found = self.prepared(self.folder / "films", "--train", train, "--val", val)
        self.assertEqual(self.relative(found["train"], "films"), [("a.mp4", 0), ("b.mp4", 1)])
        self.assertEqual(self.relative(found["val"], "films"), [("c.mp4", 1), ("a.mp4", 0)])
        self.assertEqual(self.classes, ["class 2", "class 10"], "in natural order")
        self.assertIn("share 1 files: a.mp4", self.errors)

    def test_paths_are_relative_to_the_prefix(self):
        self.videos("data/films/a.mp4", "other/b.mp4")
        file = self.write("list.csv", "films/a.mp4,0\n")
        self.assertEqual(
            self.relative(self.prepared(file, "--prefix", self.folder / "data")["train"]), [("data/films/a.mp4", 0)]
        )
        self.assertEqual(np.load(self.out / "train_paths.npy").tolist(), ["films/a.mp4"])
        shutil.rmtree(self.out)
        absolute = [self.folder / "data/films/a.mp4", self.folder / "other/b.mp4"]
        lists = self.write("lists/list.csv", "".join(f"{path},{k}\n" for k, path in enumerate(absolute)))
        self.assertEqual([path for path, _ in self.prepared(lists)["train"]], list(map(str, absolute)))
        shutil.rmtree(self.out)
        self.assert_refused(
            lists, self.out, "--prefix", self.folder / "data", saying="1 of 2 videos are not below --prefix"
        )

    def test_integers_from_one(self):
        self.videos("a.mp4", "b.mp4")
        file, names = self.write("list.csv", "a.mp4,1\nb.mp4,2\n"), self.write("names.txt", "walk\nrun\n")
        self.prepared(file)
        self.assertIn("start at 1", self.errors)
        shutil.rmtree(self.out)
        self.assert_refused(file, self.out, "--class-names", names, saying="start at 1.*--class-names")

    def test_integers_from_one_in_one_list_alone(self):
        self.videos(*(f"s/{k}.mp4" for k in range(6)))
        for first, other in ((0, 1), (1, 0)):
            options = []
            for split, start in (("train", first), ("val", other)):
                rows = "".join(f"{3 * (split == 'val') + k}.mp4,{start + k}\n" for k in range(3))
                options += [f"--{split}", self.write(f"{split}.csv", rows)]
            self.split_sizes(*options)
            self.assertIn("Labels of train and val do not both start at 0", self.errors)

    def test_integers_keep_their_gaps(self):
        self.videos("a.mp4", "b.mp4")
        found = self.prepared(self.write("list.csv", "a.mp4,0\nb.mp4,3\n"))
        self.assertEqual([label for _, label in found["train"]], [0, 3])
        self.assertIn("2 of 4 classes never occur: 1, 2.", self.errors)

    def test_names_of_classes_in_the_order_that_is_wanted(self):
        self.videos("a.mp4", "b.mp4")
        names = self.write("names.txt", "walk\nrun\njump\n")
        found = self.prepared(self.write("list.csv", "a.mp4,run\nb.mp4,walk\n"), "--class-names", names)
        self.assertEqual(([label for _, label in found["train"]], self.classes), ([1, 0], ["walk", "run", "jump"]))
        self.assertIn("1 of 3 classes never occur: jump.", self.errors)
        shutil.rmtree(self.out)
        self.assert_refused(
            self.write("list.csv", "a.mp4,swim\n"),
            self.out,
            "--class-names",
            names,
            saying="row 1: swim.*walk, run, jump",
        )

    def test_mistakes_are_named_by_row_and_nothing_is_written(self):
        self.videos("a.mp4", "b.mp4", "c.mp4")
        (self.folder / "empty").mkdir()
        cases = {
            "a.mp4,run\nb.mp4\nc.mp4,run,fast\n": "row 2 has 1 of 2 fields; row 3 has 3 of 2 fields",
            "a.mp4,run\n,run\nb.mp4,\n": "row 2 has no path; row 3 has no label",
            "path,label\na.mp4,run\nnone.mp4,run\n": r"1 of 2 videos do not exist .*: list\.csv, row 3: .*none\.mp4.*--prefix",
            "path,label\na.mp4,run\nempty,run\n": r"1 of 2 .*\(or are folders without images\): .*row 3: .*empty",
            f"a.mp4,0\nb.mp4,{'9' * 5000}\n": "row 2: 9999",
            f"a.mp4,run\nb.mp4,{'x' * 200_000}\n": "row 2: field larger than field limit",
            "".join(f"no{k}.mp4,run\n" for k in range(9)): "9 of 9 videos .* row 5: .*; and 4 more",
            "a.mp4,Run\nb.mp4,run\n": "'Run' = 'run'.*spelled one way",
            "a.mp4,brush hair\nb.mp4,brush  hair\n": "differ only in case or spaces",
            "a.mp4,0\nb.mp4,run\nc.mp4,2\n": r"2 labels are integers and 1 are names.*row 2: run",
            "a.mp4,0\nb.mp4,-1\n": r"not from 0 to .*row 2: -1",
            "a.mp4,0\nb.mp4,1.0\n": r"not whole numbers: .*row 2: 1\.0",
            "a.mp4,0\nb.mp4,99999999999999999999\n": "row 2: 9999",
            "path,label\n": "a header and no rows",
            "\n \n": "has no rows",
            'a.mp4,"run\nb.mp4,run\n': "row 2: unexpected end of data",
            "a.mp4\nb.mp4\n": "row 1 has 1 of 2 fields",
            "a.mp4,\u0661\nb.mp4,\u00b2\nnone.mp4,1a\n": "1 of 3 videos do not exist",
        }
        for text, saying in cases.items():
            with self.subTest(text):
                self.assert_refused(self.write("list.csv", text), self.out, saying=saying)
        (self.folder / "list.csv").write_bytes(b"a.mp4,\xff\xfe\n")
        self.assert_refused(self.folder / "list.csv", self.out, saying="not a text in UTF-8")
        self.assert_refused(self.folder / "none.csv", self.out, saying="no such file or folder")
        self.assert_refused(self.folder, self.out, "--val", self.folder / "none.csv", saying=r"none\.csv: no such file")
        self.assert_refused(
            self.write("list.csv", "a.mp4,0\n"), self.out, "--val", "x.csv", saying="SOURCE is the file"
        )

    def test_names_of_classes_with_an_empty_line_are_refused(self):
        self.videos("a.mp4")
        names, listed = self.write("names.txt", "walk\n\nrun\n\n"), self.write("list.csv", "a.mp4,0\n")
        self.assert_refused(listed, self.out, "--class-names", names, saying="--class-names .*line 2")

    def test_a_video_with_two_labels_is_told(self):
        self.videos("a.mp4", "b.mp4")
        self.prepared(self.write("list.csv", "a.mp4,run\na.mp4,walk\nb.mp4,run\nb.mp4,run\n"))
        self.assertRegex(self.errors, r"2 files stand in train more than once: .*a\.mp4, .*b\.mp4")
        self.assertRegex(self.errors, r"1 files have different labels in train: \S*a\.mp4\.")

    def test_videos_that_are_elsewhere(self):
        found = self.prepared(self.write("list.csv", "a.mp4,0\n"), "--no-check-files", "--prefix", "/cluster/films")
        self.assertEqual(found["train"], [("/cluster/films/a.mp4", 0)])


class Columns(Folder):
    """Lists with more columns than path and label."""

    def samples(self, which: str = "train") -> list[tuple[str, int, tuple[float, float] | None]]:
        paths, labels = (np.load(self.out / f"{which}_{what}.npy").tolist() for what in ("paths", "labels"))
        file = self.out / f"{which}_segments.npy"
        segments = list(map(tuple, np.load(file).tolist())) if file.exists() else [None] * len(paths)
        return list(zip(paths, labels, segments, strict=True))

    def list_sizes(self, text: str, *arguments: object) -> dict[str, int]:
        self.write("list.csv", text)
        return self.split_sizes(*arguments, source="list.csv")

    def test_a_column_of_splits(self):
        self.videos(*(f"{k}.mp4" for k in range(6)))
        values = ["train", "Validation", "TEST", "training", "validation", "testing"]
        for name in ("split", "Subset", "phase", "set", "partition", "usage", "Data Split", "split_1", "what"):
            with self.subTest(name):
                values[5] = "test"
                values[3] = "train"
                rows = "".join(f"{k}.mp4,{value},{'ab'[k % 2]}\n" for k, value in enumerate(values))
                sizes = self.list_sizes(f"path,{name},label\n{rows}")
                self.assertEqual(sizes, {"train": 2, "val": 2, "test": 2})
                self.assertEqual(self.samples("test"), [("2.mp4", 0, None), ("5.mp4", 1, None)])
                self.assertIn(f"path from column path, label from column label, split from column {name}", self.said)

    def test_columns_of_splits_that_are_asked_about(self):
        self.videos(*(f"{k}.mp4" for k in range(3)))
        cases = {
            "path,label,split\n0.mp4,a,1\n1.mp4,b,2\n2.mp4,a,3\n": "has 1, 2, 3 as splits",
            "path,label,fold\n0.mp4,a,1\n1.mp4,b,2\n2.mp4,a,2\n": "has 1, 2 as splits",
            "path,label,split\n0.mp4,a,train\n1.mp4,b,\n2.mp4,a,test\n": r"has \(nothing\) as splits",
            "path,label,split\n0.mp4,a,train\n1.mp4,b,val\n2.mp4,a,dev\n": "dev and val, which both name the val",
            "path,label,split,subset\n0.mp4,a,train,val\n1.mp4,b,val,val\n2.mp4,a,val,train\n": "--columns .*split=NAME",
            "path,label,is_test\n0.mp4,a,0\n1.mp4,b,1\n2.mp4,a,0\n": "is_test.*--columns",
            "path,label,train\n0.mp4,a,1\n1.mp4,b,0\n2.mp4,a,1\n": "train.*--columns",
            "path,label,Test\n0.mp4,a,False\n1.mp4,b,True\n2.mp4,a,False\n": "Test.*--columns",
            "path,label,held_out\n0.mp4,a,yes\n1.mp4,b,no\n2.mp4,a,no\n": "held_out.*--columns",
            "path,label,for_val\n0.mp4,a,\n1.mp4,b,x\n2.mp4,a,\n": "for_val.*--columns",
            "path,label,what\n0.mp4,a,train\n1.mp4,b,eval\n2.mp4,a,train\n": "has eval as splits.*--splits",
            "path,label,what\n0.mp4,a,train\n1.mp4,b,holdout\n2.mp4,a,train\n": "has holdout as splits.*--splits",
            "path,label,what\n0.mp4,a,Train\n1.mp4,b,Evaluation\n2.mp4,a,\n": r"has \(nothing\), evaluation as splits",
            "path,label,what\n0.mp4,a,ds_train\n1.mp4,b,ds_test\n2.mp4,a,ds_train\n": "has ds_test, ds_train as splits",
        }
        for text, saying in cases.items():
            with self.subTest(text):
                self.assert_refused(self.write("list.csv", text), self.out, saying=saying)
        text = "path,label,fold\n0.mp4,a,1\n1.mp4,b,2\n2.mp4,a,3\n"
        self.assertEqual(self.list_sizes(text, "--splits", "train=1,val=2"), {"train": 1, "val": 1})
        self.assertIn("1 rows of other splits are passed over", self.said)
        with self.assertRaisesRegex(UserError, "made with other settings .splits"):
            run(self.folder / "list.csv", self.out, "--name", "mine", "--splits", "none")
        self.assertEqual(self.list_sizes(text, "--splits", "none"), {"train": 3})
        self.assertIn("Not used: fold", self.said)
        self.assertEqual(self.list_sizes(text, "--columns", "path=path,label=label"), {"train": 3})
        shutil.rmtree(self.out)
        for value in ("train=4", "train=1,val=x", "train=1,val=1", "train=1,train=1"):
            self.assert_refused(self.folder / "list.csv", self.out, "--splits", value, saying="--splits")

    def test_lists_of_three_splits(self):
        self.videos("s/a.mp4", "s/b.mp4", "s/c.mp4")
        names = {
            split: self.write(f"{split}.csv", f"{path}.mp4,run\n") for split, path in zip(SPLITS, "abc", strict=True)
        }
        options = [option for split, file in names.items() for option in (f"--{split}", file)]
        self.assertEqual(self.split_sizes(*options), {"train": 1, "val": 1, "test": 1})
        self.write("test.csv", "path,label,split\nc.mp4,run,test\nb.mp4,run,train\n")
        shutil.rmtree(self.out)
        self.assert_refused(
            self.folder / "s", self.out, *options, saying="row 3 is of the train split in the list --test"
        )

    def test_times_are_segments(self):
        self.videos("a.mp4", "b.mp4")
        for start, end in (
            ("start", "end"),
            ("time_start", "time_end"),
            ("start_time", "end_time"),
            ("t_start", "t_end"),
            ("begin", "stop"),
            ("start_sec", "end_sec"),
            ("Start Time (s)", "End Time (s)"),
            ("startSeconds", "endSeconds"),
            ("start_timestamp", "stop_timestamp"),
            ("from", "to"),
        ):
            with self.subTest(start):
                self.list_sizes(
                    f"path,{start},{end},label\na.mp4,0,1.5,run\na.mp4,00:01:30.25,1:31,run\nb.mp4,5,7,jump\n"
                )
                expected = [("a.mp4", 1, (0, 1.5)), ("a.mp4", 1, (90.25, 91)), ("b.mp4", 0, (5, 7))]
                self.assertEqual(self.samples(), expected)
                self.assertEqual(np.load(self.out / "train_segments.npy").dtype, np.float64)
                self.assertIn(f'segments: "{self.out}/train_segments.npy"', self.said)
                self.assertNotIn("more than once", self.errors)
        self.list_sizes("path,start,duration,label\na.mp4,3,1.5,run\n")
        self.assertEqual(self.samples(), [("a.mp4", 0, (3, 4.5))])
        self.list_sizes("path,start,end,label\na.mp4,3,4,run\na.mp4,3,4,jump\n")
        self.assertIn("1 files stand in train more than once", self.errors)
        self.assertIn("different labels", self.errors)
        self.list_sizes("path,start,end,label\na.mp4,3,4,run\n", "--columns", "path=path,label=label")
        self.assertEqual(self.samples(), [("a.mp4", 0, None)])
        self.assertIn("Not used: start, end", self.said)
        self.list_sizes("a.mp4,x,3,4,run\n", "--columns", "path=1,label=5,start=3,end=4")
        self.assertEqual(self.samples(), [("a.mp4", 0, (3, 4))])

    def test_times_that_are_none(self):
        self.videos("a.mp4")
        for start, end in (
            ("5", "5"),
            ("-1", "3"),
            ("nan", "3"),
            ("0", "inf"),
            ("", "3"),
            ("1:2:3:4", "9999"),
            ("1,5", "x"),
            ("0s", "3s"),
        ):
            with self.subTest((start, end)):
                text = f'path,label,start,end\na.mp4,run,0,1\na.mp4,run,"{start}",{end}\n'
                self.assert_refused(self.write("list.csv", text), self.out, saying="row 3 has the times.*1:30.5")

    def test_columns_that_choose_a_part_in_another_way_are_refused_by_name(self):
        self.videos("a.mp4")
        for columns in (
            "start_frame,end_frame",
            "frame_start,frame_end",
            "x,duration",
            "start_ms,end_ms",
            "start,x",
            "x,timestamp",
            "t0,t1",
            "in,out",
            "in_point,outPoint",
            "x,center",
            "mark_in,mark_out",
            "first_sec,last_sec",
            "t_min,t_max",
        ):
            with self.subTest(columns):
                file = self.write("list.csv", f"path,{columns},label\na.mp4,0,9,run\n")
                named = ", ".join(name for name in columns.split(",") if name != "x")
                self.assert_refused(file, self.out, saying=f"{named}.*--columns path=path,label=label")
                self.assertEqual(
                    self.split_sizes("--columns", "path=path,label=label", source="list.csv"), {"train": 1}
                )
                shutil.rmtree(self.out)

    def test_which_column_is_the_label(self):
        self.videos(*(f"{k}.mp4" for k in range(6)))
        rows = range(6)
        cases = {
            "id,path,label": [f"{100 + k},{k}.mp4,{'ab'[k % 2]}" for k in rows],
            "path,id,class": [f"{k}.mp4,{k},{'ab'[k % 2]}" for k in rows],
            "id,label": [f"{k},{'ab'[k % 2]}" for k in rows],
            "video_id,activity,fps": [f"{k},{'ab'[k % 2]},25" for k in rows],
            "path,id": [f"{k}.mp4,{k % 2}" for k in rows],
        }
        for header, lines in cases.items():
            with self.subTest(header):
                self.list_sizes("\n".join([header, *lines, ""]))
                self.assertEqual(self.samples(), [(f"{k}.mp4", k % 2, None) for k in rows])
                for name in header.split(","):
                    self.assertIn(name, self.said.split("\n")[0])
        shutil.rmtree(self.out)
        file = self.write("list.csv", "\n".join(["path,id,klass", *(f"{k}.mp4,{100 + k},a" for k in rows), ""]))
        self.assert_refused(file, self.out, saying="--columns path=path,label=NAME.*klass")
        self.split_sizes("--columns", "path=path,label=klass", source="list.csv")
        self.assertEqual(self.classes, ["a"])
        shutil.rmtree(self.out)
        other = self.write("other.csv", "id,subject,actions\n0,p1,a\n1,p2,b\n")
        self.assert_refused(other, self.out, saying="id, subject, actions.*--columns path=")
        self.split_sizes("--columns", "path=id,label=actions", source="other.csv")
        self.assertEqual(self.classes, ["a", "b"])
        shutil.rmtree(self.out)
        for value in (
            *("path=path", "path=path,label=x", "path=path,label=klass,start=id", "path=1,label=4", "path"),
            *("path=1,label=0", "path=0,label=3", "path=1,label=1", "path=1,label=path", "path=1,label=2,label=3"),
            *("path=path,label=klass,split=klass", "path=1,label=3,start=2,end=2"),
        ):
            self.assert_refused(file, self.out, "--columns", value, saying="--columns")
        self.assert_refused(
            self.write("rows.csv", "a.mp4,120,1\nb.mp4,90,0\n"), self.out, saying="3 columns.*--columns"
        )

    def test_columns_without_a_name_or_of_one_name(self):
        self.videos("0.mp4", "1.mp4")
        self.list_sizes(",path,label\n0,0.mp4,a\n1,1.mp4,b\n")
        self.assertIn("Not used: 1.", self.said)
        shutil.rmtree(self.out)
        file = self.write("list.csv", "path,label,label\n0.mp4,a,c\n1.mp4,b,d\n")
        self.assert_refused(file, self.out, saying="several columns label")
        self.assert_refused(file, self.out, "--columns", "path=path,label=label", saying="--columns")
        self.split_sizes("--columns", "path=1,label=3", source="list.csv")
        self.assertEqual(self.classes, ["c", "d"])
        shutil.rmtree(self.out)
        for header in ("path,label,Label", "path,path,label", "Video Path,video_path,label"):
            with self.subTest(header):
                file = self.write("list.csv", f"{header}\n0.mp4,1.mp4,c\n1.mp4,1.mp4,d\n")
                self.assert_refused(file, self.out, saying="several columns")

    def test_labels_that_stand_for_none(self):
        self.videos("0.mp4", "1.mp4")
        for label in ("nan", "None", "NULL", ""):
            with self.subTest(label):
                file = self.write("list.csv", f"path,label\n0.mp4,a\n1.mp4,{label}\n")
                self.assert_refused(file, self.out, saying="row 3 has")
        self.assertEqual(self.list_sizes("path,label\n0.mp4,a\n1.mp4,none\n"), {"train": 2}, "a gesture")

    def test_another_delimiter(self):
        file = self.write("list.csv", "path|label\n0.mp4|a\n1.mp4|b\n")
        self.assert_refused(file, self.out, saying="semicolon, tab, comma, space")

    def test_kinetics(self):
        """Its files are cut or whole, in a folder or in those of classes; some do not exist any more."""
        rows = ["play chess,aa-_1,10,20,train", "ski,bb,3,13,train", "ski,aa-_1,0,10,val", ""]
        text = "\n".join(["label,youtube_id,time_start,time_end,split", *rows])
        cut = ["aa-_1_000010_000020.mp4", "bb_000003_000013.webm", "aa-_1_000000_000010.mp4"]
        folders = ["play_chess", "ski", "ski"]
        ways = {
            "cut": cut,
            "in classes": [f"train/{folder}/{name}" for folder, name in zip(folders, cut, strict=True)],
            "whole": ["aa-_1.mp4", "bb.mkv"],
            "whole, in folders": ["x/aa-_1.mp4", "y/bb.mkv"],
        }
        for way, files in ways.items():
            with self.subTest(way):
                shutil.rmtree(self.folder / "v", ignore_errors=True)
                self.videos(*(f"v/{file}" for file in files))
                sizes = self.list_sizes(text, "--prefix", self.folder / "v")
                self.assertEqual((sizes, self.classes), ({"train": 2, "val": 1}, ["play chess", "ski"]))
                segments = [(10, 20), (3, 13)] if "whole" in way else [None, None]
                self.assertEqual(self.samples(), [(file, k, segments[k]) for k, file in enumerate(files[:2])])
                self.assertEqual("are the segments themselves" in self.said, "whole" not in way)
        os.remove(self.folder / "v/y/bb.mkv")
        shutil.rmtree(self.out)
        options = "--prefix", self.folder / "v"
        self.assert_refused(
            self.folder / "list.csv", self.out, *options, saying="1 of 3 videos do not exist.*--skip-missing"
        )
        self.assertEqual(self.list_sizes(text, *options, "--skip-missing"), {"train": 1, "val": 1})
        self.assertEqual(self.samples("val"), [("x/aa-_1.mp4", 1, (0, 10))], "classes keep their numbers")
        self.assertIn("1 of 3 videos do not exist and left out: list.csv, row 3", self.errors)
        self.videos("v/bb_000003_000013.mp4")
        shutil.rmtree(self.out)
        self.assert_refused(
            self.folder / "list.csv",
            self.out,
            *options,
            saying="1 files of the train split are the segments themselves",
        )

    def test_segments_of_a_video_stay_on_one_side(self):
        self.videos(*(f"{k}.mp4" for k in range(8)))
        rows = "".join(f"{k}.mp4,{'ab'[part % 2]},{part},{part + 1}\n" for part in range(3) for k in range(8))
        self.assertEqual(self.list_sizes(f"path,label,start,end\n{rows}", "--hold-out", 0.25), {"train": 18, "val": 6})
        sides = [{path for path, _, _ in self.samples(which)} for which in ("train", "val")]
        self.assertEqual(([len(side) for side in sides], sides[0] & sides[1]), ([6, 2], set()))
        self.assertEqual([part for _, _, part in self.samples("val")], [(k, k + 1) for k in (0, 0, 1, 1, 2, 2)])

    def test_a_segment_is_the_same_in_a_transcoded_video(self):
        write_video(self.folder / "a.mp4", moving(12), fps=12, crf=4)
        self.write("list.csv", "path,label,start,end\na.mp4,run,0.5,1\na.mp4,jump,0,0.25\n")
        for options, folder, fps in ((("--gop", 2, "--crf", 4), "films", {}), (("--frames", 6), "frames", {"fps": 6})):
            with self.subTest(options):
                self.assertEqual(self.split_sizes(*options, "--workers", 0, source="list.csv"), {"train": 2})
                self.assertEqual(len(os.listdir(self.out / folder)), 1, "one video, made once")
                made = self.samples()
                self.assertEqual([segment for _, _, segment in made], [(0.5, 1), (0, 0.25)])
                for path, _, (start, end) in made:
                    with (
                        open_video(str(self.out / folder / path), **fps) as new,
                        open_video(str(self.folder / "a.mp4")) as old,
                    ):
                        difference = new.read(start, end, 3).float() - old.read(start, end, 3)
                        self.assertAlmostEqual(new.duration, old.duration, delta=0.01)
                    self.assertLess(difference.abs().mean(), 4)


class ClassFolders(Folder):
    def test_folders_of_splits(self):
        cases = {
            ("train", "val", "test"): ("train", "val", "test"),
            ("Train", "Test"): ("train", "test"),
            ("training", "dev"): ("train", "val"),
            ("TRAIN", "validation", "testing"): ("train", "val", "test"),
            ("valid", "train"): ("train", "val"),
        }
        for names, splits in cases.items():
            for nested in (False, True):
                with self.subTest(names, nested=nested):
                    shutil.rmtree(self.folder / "s", ignore_errors=True)
                    for k, name in enumerate(names):
                        for label in ("jump", "run"):
                            folder = f"{label}/{name}" if nested else f"{name}/{label}"
                            self.videos(*(f"s/{folder}/{number}.mp4" for number in range(k + 1)))
                    sizes = self.split_sizes()
                    self.assertEqual((tuple(sizes), self.classes), (splits, ["jump", "run"]))
                    self.assertEqual(sorted(sizes.values()), [2 * (k + 1) for k in range(len(names))])
                    for name in names:
                        self.assertIn(f"{name} is the ", self.said)

    def test_a_test_split_has_arrays_and_is_not_held_out_from(self):
        self.videos(*(f"s/{split}/{label}/{k}.mp4" for split in ("train", "test") for label in "ab" for k in range(4)))
        self.assertEqual(self.split_sizes(), {"train": 8, "test": 8})
        self.assertIn(f"++datasets.mine.val.paths={self.out}/test_paths.npy", self.said)
        self.assertIn("--hold-out", self.said)
        found = self.prepared(self.folder / "s")
        self.assertEqual(set(found), {"train"}, "no run trains or validates on it")
        self.assertEqual(self.split_sizes("--hold-out", 0.25), {"train": 6, "val": 2, "test": 8})
        paths = np.load(self.out / "test_paths.npy").tolist()
        self.assertTrue(all(path.startswith("test/") for path in paths), paths)
        self.assertEqual(np.load(self.out / "test_labels.npy").tolist(), [0] * 4 + [1] * 4)

    def test_what_may_be_splits_or_classes_is_asked_about(self):
        cases = {
            "val and dev": ["train/a/1.mp4", "val/a/2.mp4", "dev/a/3.mp4"],
            "one of two spellings": ["train/a/1.mp4", "Train/a/2.mp4"],
            "a class beside splits": ["train/a/1.mp4", "test/a/2.mp4", "bus/3.mp4"],
            "a class called train, or videos without labels": ["train/1.mp4", "bus/2.mp4"],
            "a class called test, of frames": ["test/1/1.jpg", "bus/2/1.jpg"],
            "videos in a split": ["train/a/1.mp4", "test/2.mp4"],
            "splits without classes": ["train/1.mp4", "test/2.mp4"],
            "one folder of frames": ["train/a/1.mp4", "test/1/1.jpg"],
            "one class with splits": ["run/train/1.mp4", "run/test/2.mp4", "jump/3.mp4"],
            "parts of names": ["train_set/a/1.mp4", "test_set/a/2.mp4"],
            "names of datasets": ["UCF101_train/a/1.mp4", "UCF101_train/b/1.mp4", "UCF101_test/a/2.mp4"],
            "short names": ["trn/a/1.mp4", "tst/a/2.mp4"],
            "sizes": ["train_256/a/1.mp4", "val_256/b/2.mp4"],
            "parts of names before": ["split_train/a/1.mp4", "split_val/a/1.mp4"],
            "plurals": ["trains/a/1.mp4", "tests/a/1.mp4"],
            "camel case, without classes": ["TrainSet/1.mp4", "HoldOut/1.mp4"],
            "one word": ["trainset/a/1.mp4", "testset/a/2.mp4"],
            "one word in any case": ["TrainData/a/1.mp4", "Devdata/a/2.mp4"],
            "longer words": ["train_x/a/1.mp4", "development/a/2.mp4"],
            "a level deeper": ["run/deep/Train/1.mp4", "run/deep/Test/2.mp4"],
            "two levels deeper": ["run/x/y/train/1/1.jpg", "run/x/y/val/2/1.jpg", "jump/1.mp4"],
            "one split": ["train-set/a/1.mp4"],
            "one by its name and one by a part": ["train/a/1.mp4", "val_256/a/2.mp4"],
            "parts of names in classes": ["run/set train/1.mp4", "run/set eval/2.mp4"],
            "a class with other folders": ["run/train/1.mp4", "run/test/2.mp4", "jump/train/3.mp4", "jump/extra/4.mp4"],
        }
        for what, files in cases.items():
            with self.subTest(what):
                shutil.rmtree(self.folder / "s", ignore_errors=True)
                self.videos(*(f"s/{file}" for file in files))
                self.assert_refused(self.folder / "s", self.out, saying="--splits none")
                if what == "one of two spellings":  # as classes, too, these are refused
                    continue
                self.split_sizes("--splits", "none")
                self.assertEqual(self.classes, sorted({file.split("/")[0] for file in files}))
                shutil.rmtree(self.out)

    def test_classes_whose_names_hold_words_for_splits(self):
        for names in (
            ("train_station", "bus_stop"),
            ("train_arrives", "train_leaves"),
            ("test_tube", "bottle"),
            ("contest", "training_ground"),
        ):
            with self.subTest(names):
                shutil.rmtree(self.folder / "s", ignore_errors=True)
                self.videos(*(f"s/{name}/1.mp4" for name in names))
                self.assertEqual(self.split_sizes(), {"train": 2})
                self.assertEqual(self.classes, sorted(names))

    def test_splits_below_a_folder_are_not_of_one_class(self):
        cases = {
            "data": ["data/train/a/1.mp4", "data/val/b/2.mp4", "annotations/x.txt"],
            "data/UCF": ["data/UCF/train/a/1.mp4", "data/UCF/test/a/2/1.jpg"],
            "videos": ["videos/train_set/a/1.mp4", "videos/test_set/a/2.mp4"],
            "x": ["x/train/a/1.mp4", "x/train/b/1.mp4"],
        }
        for folder, files in cases.items():
            with self.subTest(folder):
                shutil.rmtree(self.folder / "s", ignore_errors=True)
                self.videos(*(f"s/{file}" for file in files))
                self.assert_refused(
                    self.folder / "s", self.out, saying=f"give {self.folder}/s/{folder} as SOURCE.*--splits"
                )
                self.split_sizes("--splits", "none")
                self.assertEqual(self.classes, sorted({file.split("/")[0] for file in files}, key=str.lower))
                shutil.rmtree(self.out)

    def test_chosen_folders_are_splits(self):
        self.videos("s/train/a/1.mp4", "s/val/a/2.mp4", "s/dev/a/3.mp4", "s/fold2/b/4.mp4", "s/train/loose.mp4")
        self.assertEqual(self.split_sizes("--splits", "train=train,val=val,val=dev"), {"train": 1, "val": 2})
        self.assertIn("1 clips in folders that are no split (fold2/b/4.mp4)", self.said)
        self.assertIn("1 videos outside of the folder of a class (train/loose.mp4)", self.said)
        self.assertEqual(self.split_sizes("--splits", "train=train,test=fold2"), {"train": 1, "test": 1})
        self.assertEqual(self.classes, ["a", "b"])
        self.assertIn("1 classes occur in test and not in train: b.", self.errors)
        shutil.rmtree(self.out)
        for value in ("train", "train=", "fit=train", "train=nothing"):
            self.assert_refused(self.folder / "s", self.out, "--splits", value, saying="--splits")

    def test_folders_that_hold_no_videos_leave_splits_alone(self):
        self.videos("s/train/a/1.mp4", "s/test/a/2.mp4", "s/annotations/labels.txt", "s/.git/x.mp4", "s/readme.md")
        self.assertEqual(self.split_sizes(), {"train": 1, "test": 1})
        self.assertIn(
            "1 hidden files or folders (.git), 2 files of other kinds (readme.md, annotations/labels.txt)", self.said
        )

    def test_a_level_too_high_or_low(self):
        self.videos(*(f"top/s/{label}/{split}/{k}.mp4" for label in ("jump", "run") for split in "xy" for k in "12"))
        self.videos(*(f"lacking/{name}/1.mp4" for name in ("1/x", "1/y", "1/z", "2/x", "2/y")))
        for source, saying in (
            ("top", "one level too high.*top/s has the folders jump, run.*All samples are of one class, s"),
            ("top/s", "The folders jump, run all hold the folders x, y.*--splits"),
            ("lacking", "The folders 1, 2 all hold the folders x, y"),
        ):
            with self.subTest(source):
                shutil.rmtree(self.out, ignore_errors=True)
                _, _, errors = run(self.folder / source, self.out, "--name", "mine")
                self.assertRegex(" ".join(errors.split()), saying)
        shutil.rmtree(self.out)
        self.videos("flat/run/1.mp4", "flat/jump/1.mp4", "data/train/run/1.mp4", "data/test/run/1.mp4")
        self.videos("frames/run/001/1.jpg", "frames/run/002/1.jpg")
        self.assert_refused(
            self.folder / "flat/run", self.out, saying=f"{self.folder}/flat, if this is the folder of one"
        )
        self.assert_refused(
            self.folder / "frames/run", self.out, saying=f"folder of one class, give {self.folder}/frames"
        )
        _, _, errors = run(self.folder / "data/train", self.out, "--name", "mine")
        self.assertIn(f"Give {self.folder}/data as SOURCE to use these splits, too", errors)
        self.assertIn("All samples are of one class, run", errors)
        shutil.rmtree(self.out)
        self.videos(*(f"clips/{k}/{k}.mp4" for k in range(3)))
        _, _, errors = run(self.folder / "clips", self.out, "--name", "mine")
        self.assertIn("Each sample has a class of its own", errors)

    def test_a_level_too_high_below_splits(self):
        for source, folders in (("one", ["videos"]), ("several", ["cam1", "cam2"])):
            self.videos(
                *(
                    f"{source}/{split}/{f}/{label}/1.mp4"
                    for split in ("train", "val")
                    for f in folders
                    for label in "ab"
                )
            )
            self.split_sizes(source=source)
            self.assertIn(f"The folders {', '.join(folders)} are taken for the classes", self.errors)
            shutil.rmtree(self.out)
        self.videos(
            *(f"right/{split}/{label}/frames/{k}/1.jpg" for split in ("train", "val") for label in "ab" for k in "12")
        )
        self.split_sizes(source="right")
        self.assertNotIn("taken for", self.errors)

    def test_a_video_and_its_frames_are_one_group(self):
        """Also a video in two formats, and frames in a folder that is called so."""
        names = [f"s/{label}/{k}" for label in "ab" for k in range(6)]
        ways = {
            "frames beside": [[f"{name}.mp4", f"{name}/1.jpg", f"{name}/2.jpg"] for name in names],
            "two formats": [[f"{name}.mp4", f"{name}.AVI"] for name in names],
            "a folder of frames": [[f"{name}.mp4", f"{name[:4]}frames/{name[4:]}/1.jpg"] for name in names],
            "frames by name": [[f"{name}.mp4", f"{name}_frames/1.jpg"] for name in names],
            "frames by the name of the file": [[f"{name}.mp4", f"{name}.mp4.Frames/1.jpg"] for name in names],
            "frames by another name": [[f"{name}.mp4", f"{name}_imgs/1.jpg"] for name in names],
            "frames by the beginning of the name": [
                [f"{name}.mp4", f"{name[:4]}rgb_{name[4:]}/1.jpg"] for name in names
            ],
            "frames within": [[f"{name}.mp4", f"{name}/rgb/1.jpg"] for name in names],
        }
        for way, groups in ways.items():
            with self.subTest(way):
                shutil.rmtree(self.folder / "s", ignore_errors=True)
                self.videos(*(file for group in groups for file in group))
                self.assertEqual(self.split_sizes(), {"train": 24})
                self.assertIn("12 videos seem to be in train in two forms", self.errors)
                self.assertNotIn("level", self.errors)
                self.assertEqual(self.split_sizes("--hold-out", 0.5), {"train": 12, "val": 12})
                self.assertNotIn("share", self.errors)
                sides = [
                    {video_key(path) for path in np.load(self.out / f"{side}_paths.npy")} for side in ("train", "val")
                ]
                self.assertEqual((len(sides[0] & sides[1]), len(sides[0])), (0, 6))
        shutil.rmtree(self.folder / "s")
        self.videos("s/a/clip.1/1.jpg", "s/a/clip.2/1.jpg", "s/a/1.mp4", "s/a/1_1.mp4")
        self.split_sizes()
        self.assertNotIn("two forms", self.errors)

    def test_videos_and_folders_of_frames(self):
        self.videos("s/class 10/x.mp4", "s/class 2/b.AVI", "s/class 2/deep/a.webm", "s/class 2/notes.txt")
        self.videos("s/class 2/clip/1.jpg", "s/class 2/clip/2.jpg", "s/class 2/.hidden/x.mp4")
        found = self.relative(self.prepared(self.folder / "s")["train"], "s")
        two, ten = [path for path, label in found if label == 0], [path for path, label in found if label == 1]
        self.assertEqual(sorted(two), ["class 2/b.AVI", "class 2/clip", "class 2/deep/a.webm"])
        self.assertEqual((ten, self.classes), (["class 10/x.mp4"], ["class 2", "class 10"]))

    def test_train_and_val(self):
        self.videos("s/train/b/1.mp4", "s/train/a/2.mp4", "s/val/c/3.mp4")
        found = self.prepared(self.folder / "s")
        self.assertEqual(self.relative(found["train"], "s"), [("train/a/2.mp4", 0), ("train/b/1.mp4", 1)])
        self.assertEqual(self.relative(found["val"], "s"), [("val/c/3.mp4", 2)])
        self.assertIn("1 classes occur in val and not in train: c.", self.errors)

    def test_a_part_held_out(self):
        """Every class has its share; videos of one source stay together, and another share is another dataset."""
        self.videos(
            *(f"s/{label}/{source}_{part}.mp4" for label in ("jump", "run") for source in "abcd" for part in (1, 2))
        )
        found = self.prepared(self.folder / "s", "--hold-out", 0.25)
        self.assertEqual([len(found["train"]), len(found["val"])], [12, 4])
        self.assertEqual(sorted(label for _, label in found["val"]), [0, 0, 1, 1])
        self.assertFalse({path for path, _ in found["train"]} & {path for path, _ in found["val"]})
        with self.assertRaisesRegex(UserError, "made with other settings .held out"):
            self.prepared(self.folder / "s", "--hold-out", 0.5)
        shutil.rmtree(self.out)
        found = self.prepared(self.folder / "s", "--hold-out", 0.25, "--group-pattern", "(.)_")
        held = [Path(path).name[0] for path, _ in found["val"]]
        self.assertEqual((len(held), len(set(held))), (4, 1))
        shutil.rmtree(self.out)
        for arguments, saying in (
            (("--hold-out", 1), "--hold-out"),
            (("--group-pattern", "(.)"), "--group-pattern"),
            (("--hold-out", 0.2, "--group-pattern", "("), "--group-pattern"),
        ):
            self.assert_refused(self.folder / "s", self.out, *arguments, saying=saying)
        self.videos("t/train/run/a.mp4", "t/val/run/b.mp4")
        self.assert_refused(self.folder / "t", self.out, "--hold-out", 0.2, saying="--hold-out")

    def entry(self) -> dict:
        return yaml.safe_load(self.said.split("datasets:\n")[1])["mine"]

    def test_frames_have_a_rate(self):
        self.videos("s/a/1.mp4", "s/a/2/1.jpg", "s/b/3/1.jpg")
        for options, rate in ((), 25), (("--fps", 30), 30), (("--fps", 12.5), 12.5):
            with self.subTest(options):
                self.split_sizes(*options)
                self.assertEqual(self.entry()["fps"], rate)
                self.assertEqual("--fps" in self.said, not options)
        shutil.rmtree(self.folder / "s/b/3")
        shutil.rmtree(self.folder / "s/a/2")
        self.split_sizes()
        self.assertNotIn("fps", self.entry())
        self.assertNotIn("folders of frames", self.said)
        for name, rate in (("far/1", 25), ("far/1.mp4", None)):
            self.split_sizes("--no-check-files", source=self.write("list.csv", f"{name},a\n"))
            self.assertEqual(self.entry().get("fps"), rate)

    def test_transcoded_frames_have_a_rate(self):
        for k, picture in enumerate(moving(4)):
            (self.folder / f"s/a/{k % 2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(self.folder / f"s/a/{k % 2}/img_{k}.jpg")
            Image.fromarray(picture[::2, ::2]).save(self.folder / f"s/a/{k % 2}/flow_{k}.jpg")
        for options, rate in (("--frames", 25), 25), (("--gop", 2), None):
            with self.subTest(options):
                self.assertEqual(
                    self.split_sizes(*options, "--workers", 0, "--frame-pattern", "img_*.jpg"), {"train": 2}
                )
                self.assertEqual((self.entry().get("fps"), "frame_pattern" in self.entry()), (rate, False))
                self.assertIn("--fps", self.said)

    def test_several_series_of_frames(self):
        series = {
            "img_*.jpg": ["img_1.jpg", "img_2.jpg", "flow_x_1.jpg", "flow_x_2.jpg"],
            "*.jpg": ["1.jpg", "2.jpg", "1.png", "2.png"],
            "cam1_*.jpg": ["cam1_01.jpg", "cam1_02.jpg", "cam2_01.jpg", "cam2_02.jpg"],
            "frame*.jpg": ["frame1.jpg", "frame2.jpg", "thumb.jpg"],
        }
        for pattern, names in series.items():
            with self.subTest(pattern):
                shutil.rmtree(self.folder / "s", ignore_errors=True)
                self.videos(*(f"s/a/1/{name}" for name in names), "s/a/2.mp4")
                saying = f"1 of 1 frame folders .*2 series.*{re.escape(pattern)}.*--frame-pattern"
                self.assert_refused(self.folder / "s", self.out, saying=saying)
                self.split_sizes("--frame-pattern", pattern)
                self.assertEqual((self.entry()["frame_pattern"], self.entry()["fps"]), (pattern, 25))
                shutil.rmtree(self.out)
                options = "--frame-pattern", "none_*.bmp"
                self.assert_refused(self.folder / "s", self.out, *options, saying="--frame-pattern")

    def test_what_is_held_out_changes_with_the_videos(self):
        self.videos(*(f"s/{label}/{k}.mp4" for label in "ab" for k in range(20)))
        for _ in range(2):
            self.prepared(self.folder / "s", "--hold-out", 0.2)
            self.assertNotIn("changed sides", self.errors)
        before = {split: set(np.load(self.out / f"{split}_paths.npy")) for split in ("train", "val")}
        (self.folder / "s/a/0.mp4").unlink()
        self.prepared(self.folder / "s", "--hold-out", 0.2)
        after = {split: set(np.load(self.out / f"{split}_paths.npy")) for split in ("train", "val")}
        seen = before["train"] & after["val"]
        self.assertTrue(seen)
        self.assertIn(f"{len(before['val'] & after['train']) + len(seen)} videos changed sides", self.errors)

    def test_links_across_splits(self):
        self.videos("s/train/a/1.mp4", "s/train/a/2.mp4", "s/train/b/f/1.jpg", "s/val/a/4.mp4", "s/val/b/5.mp4")
        self.split_sizes()
        self.assertNotIn("share", self.errors)
        os.symlink("../../train/a/1.mp4", self.folder / "s/val/a/6.mp4")
        os.link(self.folder / "s/train/a/2.mp4", self.folder / "s/val/b/7.mp4")
        os.symlink("../../train/b/f", self.folder / "s/val/b/g")
        self.split_sizes()
        self.assertIn(
            "train and val share 3 videos by links: train/a/1.mp4 = val/a/6.mp4, train/a/2.mp4 =", self.errors
        )
        self.assertIn("train/b/f = val/b/g", self.errors)

    def test_prefix_above_the_source(self):
        self.videos("s/a/1.mp4")
        self.prepared(self.folder / "s", "--prefix", self.folder)
        self.assertEqual(np.load(self.out / "train_paths.npy").tolist(), ["s/a/1.mp4"])

    def test_refused(self):
        self.videos("twice/Run/1.mp4", "twice/run/2.mp4", "empty/a/notes.txt", "images/a/1.jpg", "ok/a/1.mp4")
        os.symlink("nowhere.mp4", self.write("link/a/1.mp4").parent / "2.mp4")
        os.symlink("..", self.write("loop/a/1.mp4").parent / "up")
        os.symlink("ring.mp4", self.write("ring/a/1.mp4").parent / "ring.mp4")
        os.mkfifo(self.write("pipe/a/1.mp4").parent / "2.mp4")
        (self.folder / "nothing").mkdir()
        cases = {
            "twice": "'Run' = 'run'",
            "empty": "holds no videos",
            "images": "a holds images itself",
            "link": r"2\.mp4 is not a file, or a link",
            "pipe": r"2\.mp4 is not a file",
            "loop": "up.* is a link to a folder that it lies in",
            "nothing": "neither folders .* nor the split files",
            "ring": r"ring.mp4 is not a file, or a link",
            "pipe/a/2.mp4": "neither a file nor a folder",
        }
        for name, saying in cases.items():
            with self.subTest(name):
                self.assert_refused(self.folder / name, self.out, saying=saying)
        with self.assertRaisesRegex(UserError, "lies in .*ok, which is the source"):
            run(self.folder / "ok", self.folder / "ok/a/out", "--name", "mine")
        self.assertFalse((self.folder / "ok/a/out").exists())
        self.out.mkdir()
        self.write("out/precious.txt")
        with self.assertRaisesRegex(UserError, r"holds something else already \(precious\.txt\)"):
            run(self.folder / "ok", self.out, "--name", "mine")
        self.assertEqual(os.listdir(self.out), ["precious.txt"])


class Published(Folder):
    def test_ucf101(self):
        self.write("s/classInd.txt", "1 ApplyEyeMakeup\r\n2 Archery\r\n")
        self.write("s/trainlist01.txt", "Archery/v_Archery_g08_c01.avi 2\nApplyEyeMakeup/v_A_g08_c01.avi 1\n")
        self.write("s/testlist01.txt", "Archery/v_Archery_g01_c01.avi\n")
        self.videos("f/Archery/v_Archery_g08_c01.avi", "f/ApplyEyeMakeup/v_A_g08_c01.mp4")
        self.videos("f/Archery/v_Archery_g01_c01/1.jpg")
        found = self.prepared(self.folder / "s", "--prefix", self.folder / "f")
        # Another suffix than the list says, and frames, are found, too.
        expected = [("Archery/v_Archery_g08_c01.avi", 1), ("ApplyEyeMakeup/v_A_g08_c01.mp4", 0)]
        self.assertEqual(self.relative(found["train"], "f"), expected)
        self.assertEqual(self.relative(found["val"], "f"), [("Archery/v_Archery_g01_c01", 1)])
        shutil.rmtree(self.out)
        self.assert_refused(self.folder / "s", self.out, "--fold", 2, saying=r"trainlist02\.txt: no such file")
        self.write("s/trainlist01.txt", "Archery/v_Archery_g08_c01.avi 1\n")
        self.assert_refused(self.folder / "s", self.out, saying=r"trainlist01\.txt, row 1: Archery/")

    def test_hmdb51(self):
        self.write("s/brush_hair_test_split1.txt", "a_brush_hair_u.avi 1 \nb.avi 2 \nunused.avi 0 \n")
        self.write("s/cartwheel_test_split1.txt", "c.avi 1\n")
        self.write("s/cartwheel_test_split2.txt", "c.avi 2\n")
        self.videos("s/brush_hair/a_brush_hair_u.avi", "s/brush_hair/b.avi", "s/cartwheel/c.avi")
        found = self.prepared(self.folder / "s")
        expected = [("brush_hair/a_brush_hair_u.avi", 0), ("cartwheel/c.avi", 1)]
        self.assertEqual(self.relative(found["train"], "s"), expected)
        self.assertEqual(self.relative(found["val"], "s"), [("brush_hair/b.avi", 0)])

    def test_what_is_passed_over_is_said(self):
        self.write("s/run_test_split1.txt", "a.avi 1\nb.avi 2\nunused.avi 0 \n")
        self.videos("s/run/a.avi", "s/run/b.avi")
        self.split_sizes()
        self.assertIn("1 videos are in neither split", self.said)
        self.assertIn("test split is val", self.said)

    def test_something_something(self):
        self.write("s/labels.json", json.dumps({"Pushing something": "1", "Holding something next to something": "0"}))
        entry = {"id": "7", "label": "holding a cup", "template": "Holding [something] next to [something]"}
        self.write("s/train.json", json.dumps([entry]))
        self.write("s/validation.json", json.dumps([{"id": "8", "template": "Pushing [something]"}]))
        self.videos("s/7.webm", "s/8.mp4")
        found = self.prepared(self.folder / "s")
        self.assertEqual(self.relative(found["train"], "s"), [("7.webm", 0)])
        self.assertEqual(self.relative(found["val"], "s"), [("8.mp4", 1)])
        shutil.rmtree(self.out)
        self.write("s/train.json", json.dumps([{"id": "7", "template": "Unknown"}]))
        self.assert_refused(self.folder / "s", self.out, saying="entry 1: .*Unknown")
        self.write("s/train.json", "[")
        self.assert_refused(self.folder / "s", self.out, saying="is no JSON")

    def test_diving48(self):
        entries = [{"vid_name": f"v_{label}", "label": label, "start_frame": 0, "end_frame": 9} for label in (0, 3)]
        self.write("s/Diving48_V2_train.json", json.dumps(entries))
        self.write("s/Diving48_V2_test.json", json.dumps(entries[:1]))
        self.videos("s/v_0.mp4", "s/v_3.mp4")
        found = self.prepared(self.folder / "s")
        self.assertEqual(self.relative(found["train"], "s"), [("v_0.mp4", 0), ("v_3.mp4", 3)])
        self.assertIn("2 of 4 classes never occur", self.errors)
        self.assertIn("share 1 files", self.errors)
        self.write(
            "s/Diving48_vocab.json", json.dumps([["Back", "15som", "NoTwis", "FREE"]] + [str(k) for k in range(3)])
        )
        self.prepared(self.folder / "s")
        self.assertEqual(self.classes[0], "Back_15som_NoTwis_FREE")


class CatalogFile(Folder):
    def text(self, name: str, old: str) -> str:
        lines = entry_lines(
            name, Path("/out"), splits={"train": ["paths", "labels"]}, num_classes=3, prefix='/a "b"/', fps=12.5
        )
        return updated_catalog(self.write("catalog.yaml", old), name, lines)

    def test_a_new_entry_and_a_changed_one_leave_the_rest_as_it_is(self):
        head = "# @package _global_\n# Ours.\ndata_root: data # here\n\ndatasets:\n"
        one, other = "  one: # first\n    kind: image\n\n", "  # about the other\n  other: {kind: video}\n"
        tail = "\ntrainer: {epochs: 3}\n"
        for old in (head + one + other + tail, head + other + tail, head + tail, head.replace("datasets:\n", "")):
            for name in ("one", "other", "third"):
                with self.subTest(old=old, name=name):
                    new = self.text(name, old)
                    before, after = yaml.safe_load(old), yaml.safe_load(new)
                    entry = after["datasets"].pop(name)
                    self.assertEqual((entry["num_classes"], entry["fps"], entry["prefix"]), (3, 12.5, '/a "b"/'))
                    rest = {key: value for key, value in (before.get("datasets") or {}).items() if key != name}
                    self.assertEqual(after, {**before, "datasets": rest})
                    for comment in ("# Ours.", "# here", "# about the other"):
                        self.assertEqual(comment in new, comment in old)
                    self.assertEqual(self.text(name, new), new, "the second time changes nothing")

    def test_a_new_file_is_one_that_hydra_puts_at_the_top(self):
        self.assertTrue(self.text("one", "").startswith("# @package _global_\ndatasets:\n  one:\n"))

    def test_refused(self):
        head = "# @package _global_\n"
        cases = {
            head + "datasets: {one: {kind: video}}\n": "datasets",
            "datasets:\n  one: {}\n": "--catalog",
            head + "- a\n": "--catalog",
            head + "a: [\n": "--catalog",
        }
        for old, saying in cases.items():
            with self.subTest(old), self.assertRaisesRegex(UserError, saying):
                self.text("one", old)
        with self.assertRaisesRegex(UserError, r"\$\{"):
            entry_lines("one", Path("/a/${b}"), splits={}, num_classes=1, prefix="", fps=None)


class Transcoding(Folder):
    def made(self, source: Path | str, **recipe: object) -> Path:
        path = self.folder / "made.mp4"
        self.assertEqual(
            transcode(TranscodeJob(str(source), str(path), TranscodeConfig(**{"short_side": None, **recipe}))),
            TranscodeResult(),
        )
        return path

    def pictures(self, path: object, **options: float) -> tuple[list[Fraction], np.ndarray]:
        with open_video(str(path), **options) as video:
            frames = [(tick * video.time_base, picture.astype(float)) for tick, picture in video.frames()]
        return [time for time, _ in frames], np.stack([picture for _, picture in frames])

    def test_real_videos_keep_time_and_look_and_get_their_key_frames(self):
        for source in real_films()[:2]:
            made = self.made(source, gop=12, crf=10)
            with open_video(source) as old, open_video(str(made)) as new:
                for (tick, before), (other, after) in zip(old.frames(), new.frames(), strict=True):
                    self.assertEqual(tick * old.time_base, other * new.time_base)
                    if tick % 5 == 0:
                        self.assertLess(np.abs(before[::4, ::4].astype(float) - after[::4, ::4]).mean(), 4)
                self.assertAlmostEqual(old.duration, new.duration, delta=1e-4)
                self.assertEqual((new.info().gop, old.info().gop > 50), (12, True))
        with av.open(str(self.made(real_films()[0]))) as container:
            self.assertEqual([stream.type for stream in container.streams], ["video"], "sound is dropped")

    def test_uneven_timing_is_kept(self):
        ticks = [0, 40, 80, 200, 210, 333, 1000]
        write_timed_video(self.folder / "v.mp4", zip(ticks, moving(7), strict=True), Fraction(1, 1000), fps=7, end=1500)
        made = self.made(self.folder / "v.mp4")
        self.assertEqual(self.pictures(made)[0], [Fraction(tick, 1000) for tick in ticks])
        with open_video(str(made)) as video:
            self.assertEqual(video.duration, 1.5)

    def test_a_video_is_read_back_before_it_gets_its_name(self):
        write_video(self.folder / "v.mp4", moving(), fps=25)
        with mock.patch.object(
            transcoding,
            "write_timed_video",
            lambda path, frames, tick, **options: encode.write_timed_video(
                path, [(2 * time, picture) for time, picture in frames], tick, **options
            ),
        ):
            outcome = transcode(
                TranscodeJob(str(self.folder / "v.mp4"), str(self.folder / "made.mp4"), TranscodeConfig(None))
            )
        self.assertEqual(outcome.reason, "the times of its frames cannot be kept in an mp4")
        self.assertEqual(os.listdir(self.folder), ["v.mp4"])

    def test_short_side(self):
        write_video(self.folder / "v.mp4", moving(), fps=25)
        self.assertEqual(self.pictures(self.made(self.folder / "v.mp4", short_side=24))[1].shape, (12, 24, 32, 3))
        self.assertEqual(self.pictures(self.made(self.folder / "v.mp4", short_side=480))[1].shape, (12, 48, 64, 3))
        self.assertEqual(target_size(1280, 720, 256, even=True), (456, 256))
        self.assertEqual(target_size(720, 1280, 256, even=False), (256, 455))
        self.assertEqual(target_size(321, 1, None, even=True), (320, 2))

    def test_rotation_is_applied(self):
        write_video(self.folder / "v.mp4", moving(), fps=25, crf=4)
        data = (self.folder / "v.mp4").read_bytes()
        at = data.index(b"tkhd") + 44  # the matrix of a track header of version 0: turn by 90 degrees
        turn = b"".join(value.to_bytes(4, "big", signed=True) for value in (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30))
        (self.folder / "turned.mp4").write_bytes(data[:at] + turn + data[at + 36 :])
        with open_video(str(self.folder / "turned.mp4")) as video:
            self.assertEqual((video.info().rotation, video.info().width), (90, 48))
        made = self.made(self.folder / "turned.mp4", crf=4)
        with open_video(str(made)) as video:
            self.assertEqual((video.info().rotation, video.info().width), (0, 48))
        upright = np.rot90(moving().astype(float), -1, axes=(1, 2))
        self.assertLess(np.abs(self.pictures(made)[1] - upright).mean(), 8)

    def test_folders_of_frames_become_videos_and_back(self):
        (self.folder / "clip").mkdir()
        for k, picture in enumerate(moving()):
            Image.fromarray(picture).save(self.folder / "clip" / f"{k + 1:05}.png")
        made = self.made(self.folder / "clip", source_fps=29.97, crf=4)
        times, pictures = self.pictures(made)
        self.assertLess(max(abs(time - k / Fraction("29.97")) for k, time in enumerate(times)), Fraction(1, 90_000))
        self.assertLess(np.abs(pictures - moving()).mean(), 6)
        back = self.folder / "back"
        recipe = TranscodeConfig(None, frames_fps=12.5)
        write_video(self.folder / "v.mp4", moving(), fps=25, crf=4)
        self.assertEqual(transcode(TranscodeJob(str(self.folder / "v.mp4"), str(back), recipe)), TranscodeResult())
        self.assertEqual(sorted(os.listdir(back)), [f"{k:05}.jpg" for k in range(1, 7)])
        self.assertLess(np.abs(self.pictures(back)[1] - moving()[::2]).mean(), 6)

    def test_frames_at_a_higher_rate_repeat(self):
        write_video(self.folder / "v.mp4", moving(3), fps=10)
        transcode(
            TranscodeJob(str(self.folder / "v.mp4"), str(self.folder / "back"), TranscodeConfig(None, frames_fps=25))
        )
        pictures = self.pictures(self.folder / "back")[1]
        # On screen at 0, 40, 80 | 120, 160 | 200, 240, 280 ms.
        same = [bool(np.array_equal(a, b)) for a, b in pairwise(pictures)]
        self.assertEqual(same, [True, True, False, True, False, True, True])

    def test_time_stamps_that_repeat_or_go_back(self):
        frames = [(0, "a"), (2, "b"), (1, "c"), (1, "d"), (9, "e")]
        tick, fixed = transcoding._ascending(iter(frames), Fraction(1, 25))
        self.assertEqual((tick, list(fixed)), (Fraction(1, 25), [(0, "a"), (2, "b"), (3, "c"), (4, "d"), (9, "e")]))
        with self.assertRaisesRegex(VideoDecodeError, "go back"):
            list(transcoding._ascending(iter([(0, "a"), (50, "b"), (3, "c")]), Fraction(1, 25))[1])

    def test_destinations_are_all_different(self):
        paths = ["a/x.avi", "a/x.mp4", "a/y.v1.mov", "b/x.mp4", "c", "c/z.mp4", "clip.1", "clip.2"]
        for recipe in (TranscodeConfig(None), TranscodeConfig(None, frames_fps=5)):
            made = destinations(paths, recipe)
            self.assertEqual(len(set(made.values())), len(paths))
            for path in made.values():
                self.assertFalse(any(other.startswith(f"{path}/") for other in made.values()), path)
        self.assertEqual(destinations(paths, TranscodeConfig(None))["a/y.v1.mov"], "a/y.v1.mp4")


class PreparedVideos(Folder):
    """The whole command with --gop."""

    def setUp(self):
        super().setUp()
        for number, name in enumerate(("a/1", "a/2", "b/3", "b/4")):
            (self.folder / "s" / name).parent.mkdir(parents=True, exist_ok=True)
            write_video(self.folder / "s" / f"{name}.mp4", moving(6 + number), fps=25, gop=48)
        video = self.folder / "s/b/4.mp4"
        video.write_bytes(video.read_bytes()[:400])

    def test_a_bad_video_is_left_out_and_named(self):
        found = self.prepared(self.folder / "s", "--gop", 2, "--workers", 0)
        self.assertEqual(self.relative(found["train"], "out/films"), [("a/1.mp4", 0), ("a/2.mp4", 0), ("b/3.mp4", 1)])
        rows = list(csv.DictReader(io.StringIO((self.out / "failed.csv").read_text())))
        self.assertEqual([row["path"] for row in rows], [str(self.folder / "s/b/4.mp4")])
        self.assertTrue(rows[0]["reason"])
        self.assertIn("failed.csv", self.errors)
        for path, _ in found["train"]:
            with open_video(path) as video:
                self.assertEqual(video.info().gop, 2)
        # Mended, the same command takes it in and keeps the others.
        times = {path: os.stat(path).st_mtime_ns for path, _ in found["train"]}
        write_video(self.folder / "s/b/4.mp4", moving(), fps=25)
        again = self.prepared(self.folder / "s", "--gop", 2, "--workers", 0)
        self.assertEqual(len(again["train"]), 4)
        self.assertFalse((self.out / "failed.csv").exists())
        self.assertEqual({path: os.stat(path).st_mtime_ns for path in times}, times)
        with self.assertRaisesRegex(UserError, r"made with other settings \(transcoded"):
            run(self.folder / "s", self.out, "--name", "mine", "--gop", 3)

    def test_interrupted_and_completed(self):
        made = []

        def interrupt(*arguments: object, **options: object) -> int:
            made.append(1)
            if len(made) == 3:
                raise KeyboardInterrupt
            return encode.write_timed_video(*arguments, **options)

        with mock.patch.object(transcoding, "write_timed_video", interrupt):
            code, _, errors = run(self.folder / "s", self.out, "--name", "mine", "--gop", 2, "--workers", 0)
        self.assertEqual((code, "interrupted" in errors), (EXIT_INTERRUPTED, True))
        self.assertFalse((self.out / "train_paths.npy").exists())
        self.assertEqual(sorted(path.name for path in (self.out / "films").rglob("*.*")), ["1.mp4", "2.mp4"])
        self.write("out/films/b/.3.mp4.123.part", "left by a killed process")
        _, told, _ = run(self.folder / "s", self.out, "--name", "mine", "--gop", 2, "--workers", 0)
        self.assertIn("2 videos existed already", told)
        self.assertEqual(sorted(path.name for path in (self.out / "films").rglob("*.*")), ["1.mp4", "2.mp4", "3.mp4"])

    def test_a_full_disk_ends_it_and_is_not_the_videos_fault(self):
        with mock.patch.object(transcoding, "write_timed_video", side_effect=OSError(28, "No space left on device")):
            with self.assertRaisesRegex(UserError, "cannot be written to: .*No space left"):
                run(self.folder / "s", self.out, "--name", "mine", "--gop", 2, "--workers", 0)
        self.assertFalse((self.out / "failed.csv").exists())

    def test_no_video_at_all(self):
        shutil.rmtree(self.folder / "s/a")
        (self.folder / "s/b/3.mp4").write_bytes(b"nothing")
        with self.assertRaisesRegex(UserError, "No video of train could be transcoded"):
            run(self.folder / "s", self.out, "--name", "mine", "--gop", 2, "--workers", 0)
        self.assertFalse((self.out / "train_paths.npy").exists())

    def test_options_that_cannot_be(self):
        cases = [
            ("--frames 5 --gop 3", "--frames writes JPEGs"),
            ("--gop 0", "--gop"),
            ("--crf 52", "--crf"),
            ("--short-side 3", "--short-side"),
            ("--frames 0", "--frames"),
            ("--catalog /nowhere/x.yaml", "--catalog"),
            ("--catalog x.txt", "--catalog"),
            ("--gop 3 --no-check-files", "--no-check-files"),
            ("--workers -1", "--workers"),
        ]
        for options, saying in cases:
            with self.subTest(options):
                self.assert_refused(self.folder / "s", self.out, *options.split(), saying=saying)
        with self.assertRaisesRegex(UserError, "--name"):
            run(self.folder / "s", self.out, "--name", "a-b")

    def test_a_video_is_never_made_over_one_of_the_source(self):
        self.videos("out/films/a/1.mp4")
        lists = self.write("list.csv", "a/1.mp4,0\n")
        with self.assertRaisesRegex(UserError, "are videos of the source"):
            run(lists, self.out, "--name", "mine", "--gop", 2, "--prefix", self.out / "films")


class Workers(unittest.TestCase):
    """With functions that need no torch: a process starts in no time."""

    def test_results_of_all(self):
        items = ["a", "bb", "ccc", "dddd", "eeeee"]
        for count in (0, 2, 9):
            with self.subTest(count):
                self.assertEqual(sorted(run_in_processes(len, items, count)), [(k, k + 1) for k in range(5)])
        self.assertEqual(list(run_in_processes(len, [], 2)), [])

    def test_a_process_that_dies_costs_its_item_only(self):
        found = dict(run_in_processes(os._exit, [3, 4, 5], 2))
        self.assertEqual(
            {position: str(died)[-12:] for position, died in found.items()},
            {0: "exit code 3)", 1: "exit code 4)", 2: "exit code 5)"},
        )

    def test_what_it_raises_is_raised(self):
        with self.assertRaises(TypeError):
            list(run_in_processes(len, ["a", 3], 1))


if __name__ == "__main__":
    unittest.main()
