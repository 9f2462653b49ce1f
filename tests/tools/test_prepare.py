"""`omnivision prepare`: from how datasets are published to arrays, catalog and faster videos; and what it refuses."""

import csv
import io
import json
import os
import shutil
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
from omnivision.data.groups import video_key
from omnivision.data.video import VideoDecodeError, open_video
from omnivision.tools.prepare import transcode as transcoding
from omnivision.tools.prepare.index import SPLITS, guess_split
from omnivision.tools.prepare.output import format_entry, updated_catalog
from omnivision.tools.prepare.transcode import TranscodeConfig, TranscodeJob, destinations, target_size, transcode
from omnivision.tools.workers import run_in_processes
from omnivision.utils.errors import UserError
from tests.data import test_catalog as catalog
from tests.runs import call_command, real_videos

Samples = dict[str, list[tuple[object, ...]]]  # split -> (path, label), or (path, label, (start, end))


def moving(count: int = 12, height: int = 48, width: int = 64) -> np.ndarray:
    """A bright square on its way to the right: uint8 (T, H, W, 3)."""
    frames = np.full((count, height, width, 3), 40, dtype=np.uint8)
    for k in range(count):
        frames[k, 8:24, 2 * k : 2 * k + 16] = (220, 180, 60)
    return frames


class Folder(catalog.Folder):
    def setUp(self):
        super().setUp()
        self.out = self.folder / "out"

    def write(self, name: str, text: str = "x") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def videos(self, *names: str) -> None:
        for name in names:
            self.write(name)

    def tree(self, *names: str) -> None:
        """Files below s, and nothing else."""
        shutil.rmtree(self.folder / "s", ignore_errors=True)
        self.videos(*(f"s/{name}" for name in names))

    def run_again(self, source: object, *arguments: object) -> int:
        """Prepare to what may exist of OUT, keeping what is printed."""
        code, self.output, self.errors = call_command(
            "prepare", self.folder / source, self.out, "--name", "mine", *arguments
        )
        return code

    def prepare(self, source: object, *arguments: object) -> Samples:
        """Prepare to a new OUT; return the arrays, and keep the classes and the catalog entry."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.assertEqual(self.run_again(source, *arguments), 0)
        self.classes = (self.out / "class_names.txt").read_text(encoding="utf-8").splitlines()
        self.entry = yaml.safe_load(self.output[self.output.index("datasets:\n") :])["datasets"]["mine"]
        return self.samples()

    def prepare_list(self, text: str, *arguments: object) -> Samples:
        return self.prepare(self.write("list.csv", text), *arguments)

    def sizes(self, source: object, *arguments: object) -> dict[str, int]:
        return {split: len(samples) for split, samples in self.prepare(source, *arguments).items()}

    def samples(self) -> Samples:
        result: Samples = {}
        for split in SPLITS:
            files = [self.out / f"{split}_{what}.npy" for what in ("paths", "labels", "segments")]
            arrays = [np.load(file).tolist() for file in files if file.exists()]
            if arrays:
                arrays[2:] = [map(tuple, segments) for segments in arrays[2:]]
                result[split] = list(zip(*arrays, strict=True))
        return result

    def assert_refused(self, source: object, *arguments: object, regex: str) -> None:
        """A UserError of one paragraph, and nothing is written."""
        shutil.rmtree(self.out, ignore_errors=True)
        with self.assertRaisesRegex(UserError, regex) as caught:
            self.run_again(source, *arguments)
        self.assertNotIn("\n", str(caught.exception))
        self.assertFalse(self.out.exists())

    def assert_list_refused(self, text: str, *arguments: object, regex: str) -> None:
        self.assert_refused(self.write("list.csv", text), *arguments, regex=regex)


class CsvLists(Folder):
    def test_all_list_formats_give_the_same_arrays(self):
        self.videos("v/a b.mp4", "v/c;d.mp4", "v/e.mp4")
        rows = [("v/a b.mp4", "run"), ("v/c;d.mp4", "jump, high"), ("v/e.mp4", "run")]
        for delimiter in ";,\t":
            for header in ([], [("path", "label")], [("Video", "Class")]):
                for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
                    with self.subTest(delimiter=delimiter, header=header, quoting=quoting):
                        text = io.StringIO()
                        csv.writer(text, delimiter=delimiter, quoting=quoting).writerows([*header, *rows])
                        samples = self.prepare_list("\ufeff" + text.getvalue())
                        self.assertEqual(samples, {"train": [("v/a b.mp4", 1), ("v/c;d.mp4", 0), ("v/e.mp4", 1)]})
                        self.assertEqual(self.classes, ["jump, high", "run"])

    def test_lists_of_splits_share_their_classes(self):
        self.videos("s/a.mp4", "s/b.mp4", "s/c.mp4")
        train = self.write("train.csv", "a.mp4;class 2\nb.mp4;class 10\n")
        val = self.write("val.csv", "c.mp4;class 10\na.mp4;class 2\n")
        test = self.write("test.csv", "path,label,split\nc.mp4,class 2,test\n")
        lists = "--train", train, "--val", val, "--test", test
        samples = self.prepare("s", *lists)
        self.assertEqual(samples["train"], [("a.mp4", 0), ("b.mp4", 1)])
        self.assertEqual(samples["val"], [("c.mp4", 1), ("a.mp4", 0)])
        self.assertEqual(samples["test"], [("c.mp4", 0)])
        self.assertEqual(self.classes, ["class 2", "class 10"], "in natural order")
        self.assertIn("1 files are in train and in val: a.mp4", self.errors)
        self.write("test.csv", "path,label,split\nc.mp4,run,test\nb.mp4,run,train\n")
        self.assert_refused("s", *lists, regex="row 3 .*--test")
        os.mkfifo(self.folder / "pipe.csv")
        for name in ("none.csv", "pipe.csv"):
            self.assert_refused("s", "--val", self.folder / name, regex=name)
        self.assert_refused("train.csv", "--val", val, regex="--val")

    def test_paths_are_relative_to_the_prefix(self):
        self.videos("data/v/a.mp4", "other/b.mp4", "s/a/1.mp4")
        prefix = "--prefix", self.folder / "data"
        self.assertEqual(self.prepare_list("v/a.mp4,0\n", *prefix), {"train": [("v/a.mp4", 0)]})
        absolute = [self.folder / "data/v/a.mp4", self.folder / "other/b.mp4"]
        lists = self.write("lists/list.csv", "".join(f"{path},{k}\n" for k, path in enumerate(absolute)))
        self.prepare(lists)
        paths = [os.path.join(self.entry["prefix"], path) for path, _ in self.samples()["train"]]
        self.assertEqual(paths, list(map(str, absolute)))
        self.assert_refused(lists, *prefix, regex="--prefix")
        self.assertEqual(self.prepare("s", "--prefix", self.folder)["train"], [("s/a/1.mp4", 0)])
        self.prepare_list("a.mp4,0\n", "--no-check-files", "--prefix", "/cluster/videos")
        self.assertEqual((self.samples()["train"], self.entry["prefix"]), ([("a.mp4", 0)], "/cluster/videos/"))

    def test_integer_labels(self):
        self.videos(*(f"s/{k}.mp4" for k in range(6)))
        self.assertEqual(self.prepare_list("s/0.mp4,0\ns/1.mp4,3\n")["train"][1], ("s/1.mp4", 3), "gaps are kept")
        self.assertIn("2 of 4 classes never occur: 1, 2", self.errors)
        self.prepare_list("s/0.mp4,1\ns/1.mp4,2\n")
        self.assertIn("start at 1", self.errors)
        names = self.write("names.txt", "walk\nrun\n")
        self.assert_list_refused("s/0.mp4,1\ns/1.mp4,2\n", "--class-names", names, regex="start at 1.*--class-names")
        for first, other in ((0, 1), (1, 0)):
            options = []
            for split, start in (("train", first), ("val", other)):
                rows = "".join(f"{3 * (split == 'val') + k}.mp4,{start + k}\n" for k in range(3))
                options += [f"--{split}", self.write(f"{split}.csv", rows)]
            self.prepare("s", *options)
            self.assertIn("one split start at 0 and of another at 1", self.errors)

    def test_class_names_in_a_given_order(self):
        self.videos("a.mp4", "b.mp4")
        names = self.write("names.txt", "walk\nrun\njump\n")
        samples = self.prepare_list("a.mp4,run\nb.mp4,walk\n", "--class-names", names)
        self.assertEqual((samples["train"], self.classes), ([("a.mp4", 1), ("b.mp4", 0)], ["walk", "run", "jump"]))
        self.assertIn("1 of 3 classes never occur: jump", self.errors)
        self.assert_list_refused("a.mp4,swim\n", "--class-names", names, regex="row 1: swim.*--class-names")

    def test_invalid_rows_are_named_and_nothing_is_written(self):
        self.videos("a.mp4", "b.mp4", "c.mp4")
        (self.folder / "empty").mkdir()
        cases = {
            "a.mp4,run\nb.mp4\nc.mp4,run,fast\n": "row 2 .*1 of 2.*row 3 .*3 of 2",
            "a.mp4,run\n,run\nb.mp4,\n": "row 2 .*row 3 ",
            "path,label\na.mp4,run\nnone.mp4,run\n": r"1 of 2 .*list\.csv, row 3: .*none\.mp4.*--prefix",
            "path,label\na.mp4,run\nempty,run\n": "1 of 2 .*row 3: .*empty",
            f"a.mp4,0\nb.mp4,{'9' * 5000}\n": "row 2: 9999",
            f"a.mp4,run\nb.mp4,{'x' * 200_000}\n": r"list\.csv",
            "".join(f"no{k}.mp4,run\n" for k in range(9)): r"9 of 9 .*row 5: .*; and \d+ more",
            "a.mp4,Run\nb.mp4,run\n": "'Run' = 'run'",
            "a.mp4,brush hair\nb.mp4,brush  hair\n": "'brush  hair' = 'brush hair'",
            "a.mp4,0\nb.mp4,run\nc.mp4,2\n": "row 2: run",
            "clip,kind\na.mp4,0\nb.mp4,1\n": "kind.*--columns",
            "a.mp4,0\nb.mp4,-1\n": "row 2: -1",
            "a.mp4,0\nb.mp4,1.0\n": r"row 2: 1\.0",
            "path,label\n": r"list\.csv",
            'a.mp4,"run\nb.mp4,run\n': r"list\.csv",
            "a.mp4\nb.mp4\n": "row 1 .*1 of 2",
            "path|label\n0.mp4|a\n1.mp4|b\n": "semicolon, tab, comma, space",
        }
        cases |= {f"path,label\na.mp4,a\nb.mp4,{label}\n": "row 3 " for label in ("nan", "None", "NULL", "")}
        for text, regex in cases.items():
            with self.subTest(text[:60]):
                self.assert_list_refused(text, regex=regex)
        self.assertEqual(len(self.prepare_list("path,label\na.mp4,a\nb.mp4,none\n")["train"]), 2, "a gesture")
        (self.folder / "list.csv").write_bytes(b"a.mp4,\xff\xfe\n")
        for name in ("list.csv", "none.csv"):
            self.assert_refused(name, regex=name)

    def test_repeated_samples(self):
        self.videos("a.mp4", "b.mp4")
        self.prepare_list("a.mp4,run\na.mp4,walk\nb.mp4,run\nb.mp4,run\n")
        self.assertRegex(self.errors, r"(?s)2 .*train more than once: a\.mp4, b\.mp4.*1 .*different labels: a\.mp4\.")


class Columns(Folder):
    """Lists with more columns than path and label."""

    def test_a_column_of_splits(self):
        self.videos(*(f"{k}.mp4" for k in range(6)))
        values = ["train", "Validation", "TEST", "train", "validation", "test"]
        rows = "".join(f"{k}.mp4,{value},{'ab'[k % 2]}\n" for k, value in enumerate(values))
        for name in ("split", "Subset", "Data Split", "split_1", "what"):
            with self.subTest(name):
                samples = self.prepare_list(f"path,{name},label\n{rows}")
                self.assertEqual({split: len(found) for split, found in samples.items()}, dict.fromkeys(SPLITS, 2))
                self.assertEqual(samples["test"], [("2.mp4", 0), ("5.mp4", 1)])
                self.assertIn(f"split from column {name}", self.output)

    def test_ambiguous_split_columns_are_refused(self):
        self.videos(*(f"{k}.mp4" for k in range(3)))
        cases = {
            ("fold", "1,2,2"): "1, 2.*--splits",
            ("split", "train,,test"): r"\(nothing\).*--splits",
            ("Partition", "train,val,dev"): "--splits .*val=dev",
            ("is_test", "0,1,0"): "is_test.*--columns",
            ("train", "1,0,1"): "train.*--columns",
            ("held_out", "yes,no,no"): "held_out.*--columns",
            ("for_val", ",x,"): "for_val.*--columns",
            ("what", "train,eval,train"): "eval.*--splits",
            ("what", "ds_train,ds_test,ds_train"): "ds_test, ds_train.*--splits",
            ("split,subset", "train;train,val;val,dev;train"): "split, subset.*--columns",
        }
        for (name, values), regex in cases.items():
            with self.subTest(name=name, values=values):
                rows = [f"{k}.mp4,a,{value.replace(';', ',')}" for k, value in enumerate(values.split(","))]
                self.assert_list_refused("\n".join([f"path,label,{name}", *rows, ""]), regex=regex)
        text = "path,label,fold\n0.mp4,a,1\n1.mp4,b,2\n2.mp4,a,3\n"
        samples = self.prepare_list(text, "--splits", "train=1,val=2")
        self.assertEqual(samples, {"train": [("0.mp4", 0)], "val": [("1.mp4", 1)]})
        self.assertIn("1 rows of other splits", self.output)
        with self.assertRaisesRegex(UserError, "OUT.*splits"):
            self.run_again("list.csv", "--splits", "none")
        for options in (("--splits", "none"), ("--columns", "path=path,label=label")):
            self.assertEqual(self.sizes("list.csv", *options), {"train": 3})
            self.assertIn("Not used: fold", self.output)
        for value in ("train=4", "train=1,val=1", "train=1,train=1"):
            self.assert_refused("list.csv", "--splits", value, regex="--splits")

    def test_times_are_segments(self):
        self.videos("a.mp4", "b.mp4")
        rows = "a.mp4,0,1.5,run\na.mp4,00:01:30.25,1:31,run\nb.mp4,5,7,jump\n"
        more = ["Start Time (s),End Time (s)", "startSeconds,endSeconds", "start_timestamp,stop_timestamp"]
        for columns in ["start,end", "t_start,t_end", "begin,stop", "from,to", *more]:
            with self.subTest(columns):
                expected = [("a.mp4", 1, (0, 1.5)), ("a.mp4", 1, (90.25, 91)), ("b.mp4", 0, (5, 7))]
                self.assertEqual(self.prepare_list(f"path,{columns},label\n{rows}")["train"], expected)
                self.assertEqual(self.entry["train"]["segments"], str(self.out / "train_segments.npy"))
                self.assertEqual(np.load(self.out / "train_segments.npy").dtype, np.float64)
                self.assertNotIn("more than once", self.errors)
        cases = {
            ("path,start,duration,label\na.mp4,3,1.5,run\n",): ("a.mp4", 0, (3, 4.5)),
            ("path,start,end,label\na.mp4,3,4,run\n", "--columns", "path=path,label=label"): ("a.mp4", 0),
            ("a.mp4,x,3,4,run\n", "--columns", "path=1,label=5,start=3,end=4"): ("a.mp4", 0, (3, 4)),
        }
        for arguments, sample in cases.items():
            self.assertEqual(self.prepare_list(*arguments)["train"], [sample])
        self.prepare_list("path,start,end,label\na.mp4,3,4,run\na.mp4,3,4,jump\n")
        self.assertRegex(self.errors, "(?s)more than once.*different labels")

    def test_invalid_times(self):
        self.videos("a.mp4")
        for times in ("5,5", "-1,3", "nan,3", "0,inf", ",3", "1:2:3:4,9999"):
            with self.subTest(times):
                self.assert_list_refused(f"path,label,start,end\na.mp4,run,0,1\na.mp4,run,{times}\n", regex="row 3 ")

    def test_columns_that_select_a_part_in_another_way_are_refused_by_name(self):
        self.videos("a.mp4")
        pairs = (
            "start_frame,end_frame x,duration start_ms,end_ms start,x x,timestamp t0,t1 mark_in,mark_out t_min,t_max"
        )
        for columns in pairs.split():
            with self.subTest(columns):
                named = ", ".join(name for name in columns.split(",") if name != "x")
                self.assert_list_refused(f"path,{columns},label\na.mp4,0,9,run\n", regex=f"{named}.*--columns")
                self.assertEqual(self.sizes("list.csv", "--columns", "path=path,label=label"), {"train": 1})

    def test_which_columns_are_used(self):
        self.videos(*(f"{k}.mp4" for k in range(6)))
        cases = {
            "id,path,label": "{0}{k},{k}.mp4,{label}",
            "id,label": "{k},{label}",
            "label,seconds,path": "{label},2.5,{k}.mp4",
            "video_id,activity,fps": "{k},{label},25",
            ",path,label": "7,{k}.mp4,{label}",
        }
        for header, row in cases.items():
            with self.subTest(header):
                rows = [row.format(10, k=k, label="ab"[k % 2]) for k in range(6)]
                samples = self.prepare_list("\n".join([header, *rows, ""]))
                self.assertEqual(samples["train"], [(f"{k}.mp4", k % 2) for k in range(6)])
                for name in header.split(","):
                    self.assertIn(name or "Not used: 1", self.output.split("\n")[0])
        for header, row in (
            ("path,id,klass", "{k}.mp4,10{k},a"),  # ids are not classes
            ("path,label,Label", "{k}.mp4,a,c"),
            ("Video Path,video_path,label", "{k}.mp4,1.mp4,c"),
            ("0.mp4,120,1", "{k}.mp4,90,0"),
        ):
            with self.subTest(header):
                text = "\n".join([header, *(row.format(k=k) for k in range(6)), ""])
                self.assert_list_refused(text, regex="--columns")
                if header[0] != "0":
                    self.prepare_list(text, "--columns", "path=1,label=3")
                    self.assertEqual(self.classes, [row[-1]])
        self.write("list.csv", "path,id,klass\n0.mp4,100,a\n1.mp4,101,b\n")
        self.prepare("list.csv", "--columns", "path=path,label=klass")
        self.assertEqual(self.classes, ["a", "b"])
        for value in (
            *("path", "path=path", "path=path,label=x", "path=path,label=klass,start=id", "path=1,label=4"),
            *("path=0,label=3", "path=1,label=path", "path=1,label=2,label=3", "path=1,label=3,start=2,end=2"),
        ):
            self.assert_refused("list.csv", "--columns", value, regex="--columns")

    def test_kinetics(self):
        """Its files are trimmed or whole, in a folder or in those of classes; some do not exist any more."""
        rows = ["play chess,aa-_1,10,20,train", "ski,bb,3,13,train", "ski,aa-_1,0,10,val", ""]
        text = "\n".join(["label,youtube_id,time_start,time_end,split", *rows])
        trimmed = ["aa-_1_000010_000020.mp4", "bb_000003_000013.webm", "aa-_1_000000_000010.mp4"]
        folders = ["play_chess", "ski", "ski"]
        options = "--prefix", self.folder / "s"
        for way, files in {
            "trimmed": trimmed,
            "in classes": [f"train/{folder}/{name}" for folder, name in zip(folders, trimmed, strict=True)],
            "whole": ["aa-_1.mp4", "bb.mkv"],
            "whole, in folders": ["x/aa-_1.mp4", "y/bb.mkv"],
        }.items():
            with self.subTest(way):
                self.tree(*files)
                samples = self.prepare_list(text, *options)
                segments = [((10, 20),), ((3, 13),)] if "whole" in way else [(), ()]
                self.assertEqual(samples["train"], [(file, k, *segments[k]) for k, file in enumerate(files[:2])])
                self.assertEqual((len(samples["val"]), self.classes), (1, ["play chess", "ski"]))
        os.remove(self.folder / "s/y/bb.mkv")
        self.assert_refused("list.csv", *options, regex="1 of 3 .*--skip-missing")
        samples = self.prepare("list.csv", *options, "--skip-missing")
        self.assertEqual(samples["val"], [("x/aa-_1.mp4", 1, (0, 10))], "classes keep their numbers")
        self.assertRegex(self.errors, r"1 of 3 .*list\.csv, row 3")
        self.videos("s/bb_000003_000013.mp4")
        self.assert_refused("list.csv", *options, regex="1 of 3 .*row 2")

    def test_segments_of_a_video_stay_on_one_side(self):
        self.videos(*(f"{k}.mp4" for k in range(8)))
        rows = "".join(f"{k}.mp4,{'ab'[part % 2]},{part},{part + 1}\n" for part in range(3) for k in range(8))
        samples = self.prepare_list(f"path,label,start,end\n{rows}", "--hold-out", 0.25)
        sides = [{path for path, _, _ in samples[split]} for split in ("train", "val")]
        self.assertEqual(([len(side) for side in sides], sides[0] & sides[1]), ([6, 2], set()))
        self.assertEqual([part for _, _, part in samples["val"]], [(k, k + 1) for k in (0, 0, 1, 1, 2, 2)])

    def test_a_segment_is_the_same_in_a_transcoded_video(self):
        write_video(self.folder / "a.mp4", moving(12), fps=12, crf=4)
        text = "path,label,start,end\na.mp4,run,0.5,1\na.mp4,jump,0,0.25\n"
        for options, folder, fps in ((("--gop", 2, "--crf", 4), "films", {}), (("--frames", 6), "frames", {"fps": 6})):
            with self.subTest(options):
                samples = self.prepare_list(text, *options, "--workers", 0)["train"]
                self.assertEqual(len(os.listdir(self.out / folder)), 1, "one video, transcoded once")
                self.assertEqual([segment for _, _, segment in samples], [(0.5, 1), (0, 0.25)])
                for path, _, (start, end) in samples:
                    transcoded, source = str(self.out / folder / path), str(self.folder / "a.mp4")
                    with open_video(transcoded, **fps) as new, open_video(source) as old:
                        difference = new.read(start, end, 3).float() - old.read(start, end, 3)
                        self.assertAlmostEqual(new.duration, old.duration, delta=0.01)
                    self.assertLess(difference.abs().mean(), 4)


class ClassFolders(Folder):
    def test_folders_of_splits(self):
        for names, splits in (
            ("TRAIN validation testing", "train val test"),
            ("Train Test", "train test"),
            ("training dev", "train val"),
        ):
            for form in ("{name}/{label}/{k}.mp4", "{label}/{name}/{k}.mp4"):
                with self.subTest(names, form=form):
                    counts = {name: k + 1 for k, name in enumerate(names.split())}
                    clips = [(name, label, k) for name in counts for label in "ab" for k in range(counts[name])]
                    self.tree(*(form.format(name=name, label=label, k=k) for name, label, k in clips))
                    self.assertEqual(self.sizes("s"), {split: 2 * k + 2 for k, split in enumerate(splits.split())})
                    self.assertEqual(self.classes, ["a", "b"])
                    for name in counts:
                        self.assertIn(f"{name} is the ", self.output)

    def test_a_test_split_has_arrays_and_is_not_held_out_from(self):
        self.tree(*(f"{split}/{label}/{k}.mp4" for split in ("train", "test") for label in "ab" for k in range(4)))
        self.assertEqual(self.sizes("s"), {"train": 8, "test": 8})
        self.assertIn(f"++datasets.mine.val.paths={self.out}/test_paths.npy", self.output)
        self.assertIn("--hold-out", self.output)
        self.assertFalse({"val", "test"} & set(self.entry), "no run trains or validates on it")
        self.assertEqual(self.sizes("s", "--hold-out", 0.25), {"train": 6, "val": 2, "test": 8})
        self.assertEqual({path.partition("/")[0] for path, _ in self.samples()["test"]}, {"test"})

    def test_folders_that_may_be_splits_or_classes_are_refused(self):
        for files in (
            "train/a/1.mp4 val/a/2.mp4 dev/a/3.mp4",
            "train/a/1.mp4 test/a/2.mp4 bus/3.mp4",
            "train/1.mp4 bus/2.mp4",
            "test/1/1.jpg bus/2/1.jpg",
            "train/1.mp4 test/2.mp4",
            "train/a/1.mp4 test/1/1.jpg",
            "run/train/1.mp4 run/test/2.mp4 jump/3.mp4",
            "UCF101_train/a/1.mp4 UCF101_train/b/1.mp4 UCF101_test/a/2.mp4",
            "trainset/1.mp4 HoldOut/1.mp4",
            "train/a/1.mp4 val_256/a/2.mp4",
            "run/set_train/1.mp4 run/set_eval/2.mp4",
            "run/train/1.mp4 run/test/2.mp4 jump/train/3.mp4 jump/extra/4.mp4",
            "run/x/y/train/1/1.jpg run/x/y/val/2/1.jpg jump/1.mp4",
            # Below a folder, which is to be SOURCE.
            "data/train/a/1.mp4 data/val/b/2.mp4 annotations/x.txt",
            "data/UCF/train/a/1.mp4 data/UCF/test/a/2/1.jpg",
            "x/train/a/1.mp4 x/train/b/1.mp4",
        ):
            with self.subTest(files):
                self.tree(*files.split())
                self.assert_refused("s", regex="--splits none")
                self.prepare("s", "--splits", "none")
                self.assertEqual(self.classes, sorted({file.split("/")[0] for file in files.split()}, key=str.lower))
        self.tree("train/a/1.mp4", "Train/a/2.mp4")  # as classes, these are refused, too
        self.assert_refused("s", regex="--splits none")
        words = {
            "train": "train_256 UCF101_train split_train trains TrainSet trainset TrainData",
            "val": "Devdata val_256 development eval",
            "test": "test-set tst tests HoldOut held_out",
            None: "contest bus bottle valley",
        }
        for split, names in words.items():
            for name in names.split():
                self.assertEqual(guess_split(name), split, name)

    def test_classes_whose_names_hold_words_for_splits(self):
        for names in ("train_station bus_stop", "train_arrives train_leaves", "test_tube bottle"):
            with self.subTest(names):
                self.tree(*(f"{name}/1.mp4" for name in names.split()))
                self.assertEqual(self.sizes("s"), {"train": 2})
                self.assertEqual(self.classes, sorted(names.split()))

    def test_chosen_folders_are_splits(self):
        self.tree("train/a/1.mp4", "val/a/2.mp4", "dev/a/3.mp4", "fold2/b/4.mp4", "train/loose.mp4")
        self.assertEqual(self.sizes("s", "--splits", "train=train,val=val,val=dev"), {"train": 1, "val": 2})
        self.assertIn("2 clips are not in the folder of a class and split: fold2/b/4.mp4, train/loose.mp4", self.output)
        self.assertEqual(self.sizes("s", "--splits", "train=train,test=fold2"), {"train": 1, "test": 1})
        self.assertEqual(self.classes, ["a", "b"])
        self.assertIn("1 classes occur in test and not in train: b", self.errors)
        for value in ("train", "train=", "fit=train", "train=nothing"):
            self.assert_refused("s", "--splits", value, regex="--splits")

    def test_source_folder_a_level_too_high_or_low(self):
        both = ("train", "val")
        cases = [  # what a warning says, or None; files; SOURCE
            ("folders jump, run", [f"t/{c}/{x}/{k}.mp4" for c in ("jump", "run") for x in "xy" for k in "12"], "s"),
            ("folders x, y", [f"t/{c}/{x}/{k}.mp4" for c in ("jump", "run") for x in "xy" for k in "12"], "s/t"),
            ("folders x, y, z", [f"{name}/1.mp4" for name in ("1/x", "1/y", "1/z", "2/x", "2/y")], "s"),
            ("All samples are of one class, run", ["train/run/1.mp4", "test/run/1.mp4"], "s/train"),
            ("names of videos", [f"{k}/{k}.mp4" for k in range(3)], "s"),
            ("folders a, b", [f"{split}/videos/{label}/1.mp4" for split in both for label in "ab"], "s"),
            ("folders a, b", [f"{split}/{c}/{label}/1.mp4" for split in both for c in "xy" for label in "ab"], "s"),
            (None, [f"{split}/{c}/frames/{k}/1.jpg" for split in both for c in "ab" for k in "12"], "s"),
        ]
        for warning, files, source in cases:
            with self.subTest(files[0], source=source):
                self.tree(*files)
                self.prepare(source)
                self.assertRegex(self.errors, warning or "^(?!.*level)")
        self.tree("run/1.mp4", "frames/001/1.jpg", "frames/002/1.jpg")
        for source in ("s/run", "s/frames"):
            self.assert_refused(source, regex=f"{self.folder}/s")

    def test_a_video_and_its_frames_are_one_group(self):
        """Also a video in two formats, and frames in a folder that is called so."""
        for way in (
            *("{c}/{k}/1.jpg", "{c}/{k}.AVI", "{c}/frames/{k}/1.jpg", "{c}/{k}_frames/1.jpg"),
            *("{c}/{k}.mp4.Frames/1.jpg", "{c}/rgb_{k}/1.jpg", "{c}/{k}/rgb/1.jpg"),
        ):
            with self.subTest(way):
                forms = ["{c}/{k}.mp4", *way.split()]
                self.tree(*(form.format(c=c, k=k) for c in "ab" for k in range(6) for form in forms))
                self.assertEqual(self.sizes("s"), {"train": 24})
                self.assertIn("12 videos seem to be in train twice", self.errors)
                self.assertNotIn("level", self.errors)
                samples = self.prepare("s", "--hold-out", 0.5)
                self.assertNotIn("files are in train", self.errors)
                sides = [{video_key(path) for path, _ in samples[side]} for side in ("train", "val")]
                self.assertEqual((sides[0] & sides[1], len(sides[0]), len(samples["val"])), (set(), 6, 12))
        self.tree("a/clip.1/1.jpg", "a/clip.2/1.jpg", "a/1.mp4", "a/1_1.mp4")
        self.prepare("s")
        self.assertNotIn("two forms", self.errors)

    def test_videos_and_frame_folders(self):
        self.tree("class 10/x.mp4", "class 2/b.AVI", "class 2/deep/a.webm", "class 2/notes.txt", "readme.md")
        self.videos("s/class 2/clip/1.jpg", "s/class 2/clip/2.jpg", "s/class 2/.hidden/x.mp4")
        samples = self.prepare("s")["train"]
        two = ["class 2/b.AVI", "class 2/clip", "class 2/deep/a.webm"]
        self.assertEqual(sorted(samples), [("class 10/x.mp4", 1), *((path, 0) for path in two)])
        self.assertEqual(self.classes, ["class 2", "class 10"])
        self.assertIn("2 files are neither videos nor frames: readme.md, class 2/notes.txt", self.output)
        self.tree("train/a/1.mp4", "test/a/2.mp4", "annotations/labels.txt", ".git/x.mp4")
        self.assertEqual(self.sizes("s"), {"train": 1, "test": 1})

    def test_val_split_is_held_out(self):
        """Every class has its share; videos of one source stay together, and another share is another dataset."""
        self.tree(*(f"{c}/{name}_{part}.mp4" for c in ("jump", "run") for name in "abcd" for part in (1, 2)))
        samples = self.prepare("s", "--hold-out", 0.25)
        self.assertEqual(sorted(label for _, label in samples["val"]), [0, 0, 1, 1])
        self.assertEqual((len(samples["train"]), set(samples["train"]) & set(samples["val"])), (12, set()))
        with self.assertRaisesRegex(UserError, "OUT.*held out"):
            self.run_again("s", "--hold-out", 0.5)
        samples = self.prepare("s", "--hold-out", 0.25, "--group-pattern", "(.)_")
        self.assertEqual((len(samples["val"]), len({Path(path).name[0] for path, _ in samples["val"]})), (4, 1))
        for options in ("--hold-out 1", "--hold-out 0.2 --group-pattern ("):
            self.assert_refused("s", *options.split(), regex=options.split()[-2])
        self.tree("train/run/a.mp4", "val/run/b.mp4")
        self.assert_refused("s", "--hold-out", 0.2, regex="--hold-out")

    def test_held_out_part_depends_on_the_videos(self):
        self.tree(*(f"{label}/{k}.mp4" for label in "ab" for k in range(20)))
        before = self.prepare("s", "--hold-out", 0.2)
        self.run_again("s", "--hold-out", 0.2)
        self.assertNotIn("changed sides", self.errors)
        (self.folder / "s/a/0.mp4").unlink()
        self.run_again("s", "--hold-out", 0.2)
        after = self.samples()
        moved = [set(before[one]) & set(after[other]) for one, other in (("train", "val"), ("val", "train"))]
        self.assertTrue(all(moved))
        self.assertIn(f"{len(moved[0] | moved[1])} videos changed sides", self.errors)

    def test_frame_folders_need_a_rate(self):
        self.tree("a/1.mp4", "a/2/1.jpg", "b/3/1.jpg")
        for options, rate in ((), 25), (("--fps", 30), 30), (("--fps", 12.5), 12.5):
            with self.subTest(options):
                self.prepare("s", *options)
                self.assertEqual(self.entry["fps"], rate)
                self.assertEqual("--fps" in self.output, not options)
        self.tree("a/1.mp4")
        self.prepare("s")
        self.assertEqual(("fps" in self.entry, "--fps" in self.output), (False, False))
        for name, rate in (("far/1", 25), ("far/1.mp4", None)):
            self.prepare_list(f"{name},a\n", "--no-check-files")
            self.assertEqual(self.entry.get("fps"), rate)
        for k, frame in enumerate(moving(4)):
            (self.folder / f"t/a/{k % 2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(frame).save(self.folder / f"t/a/{k % 2}/img_{k}.jpg")
            Image.fromarray(frame[::2, ::2]).save(self.folder / f"t/a/{k % 2}/flow_{k}.jpg")
        for options, rate in (("--frames", 25), 25), (("--gop", 2), None):
            with self.subTest(options):
                sizes = self.sizes("t", *options, "--workers", 0, "--frame-pattern", "img_*.jpg")
                self.assertEqual((sizes, self.entry.get("fps")), ({"train": 2}, rate))
                self.assertEqual(("frame_pattern" in self.entry, "--fps" in self.output), (False, True))

    def test_several_series_of_frames(self):
        for pattern, names in (
            ("img_*.jpg", "img_1.jpg img_2.jpg flow_x_1.jpg flow_x_2.jpg"),
            ("*.jpg", "1.jpg 2.jpg 1.png 2.png"),
            ("cam1_*.jpg", "cam1_01.jpg cam1_02.jpg cam2_01.jpg cam2_02.jpg"),
            ("frame*.jpg", "frame1.jpg frame2.jpg thumb.jpg"),
        ):
            with self.subTest(pattern):
                self.tree(*(f"a/1/{name}" for name in names.split()), "a/2.mp4")
                self.assert_refused("s", regex="1 of 1 frame folders .*--frame-pattern")
                self.prepare("s", "--frame-pattern", pattern)
                self.assertEqual((self.entry["frame_pattern"], self.entry["fps"]), (pattern, 25))
                self.assert_refused("s", "--frame-pattern", "none_*.bmp", regex="--frame-pattern")

    def test_links_across_splits(self):
        self.tree("train/a/1.mp4", "train/a/2.mp4", "train/b/f/1.jpg", "val/a/4.mp4", "val/b/5.mp4")
        self.prepare("s")
        self.assertNotIn("files are in train", self.errors)
        os.symlink("../../train/a/1.mp4", self.folder / "s/val/a/6.mp4")
        os.link(self.folder / "s/train/a/2.mp4", self.folder / "s/val/b/7.mp4")
        os.symlink("../../train/b/f", self.folder / "s/val/b/g")
        self.prepare("s")
        first, second, third = "train/a/1.mp4 = val/a/6.mp4", "train/a/2.mp4 = val/b/7.mp4", "train/b/f = val/b/g"
        self.assertIn(f"3 files are in train and in val: {first}, {second}, {third}.", self.errors)

    def test_refused(self):
        self.videos("twice/Run/1.mp4", "twice/run/2.mp4", "empty/a/notes.txt", "images/a/1.jpg", "ok/a/1.mp4")
        self.videos("link/a/1.mp4", "loop/a/1.mp4", "ring/a/1.mp4", "pipe/a/1.mp4", "lacking/train/a/1.mp4")
        os.symlink("nowhere.mp4", self.folder / "link/a/2.mp4")
        os.symlink("..", self.folder / "loop/a/up")
        os.symlink("ring.mp4", self.folder / "ring/a/ring.mp4")
        os.mkfifo(self.folder / "pipe/a/2.mp4")
        (self.folder / "nothing").mkdir()
        (self.folder / "lacking/val").mkdir()
        for name, regex in (
            ("twice", "'Run' = 'run'"),
            ("empty", "empty"),
            ("images", "a holds images itself"),
            ("link", r"2\.mp4"),
            ("pipe", r"2\.mp4"),
            ("loop", "up is a link"),
            ("nothing", "SOURCE"),
            ("ring", r"ring\.mp4"),
            ("pipe/a/2.mp4", "SOURCE"),
            ("lacking", "no videos of val"),
        ):
            with self.subTest(name):
                self.assert_refused(name, regex=regex)
        with self.assertRaisesRegex(UserError, "OUT"):
            call_command("prepare", self.folder / "ok", self.folder / "ok/a/out", "--name", "mine")
        self.assertFalse((self.folder / "ok/a/out").exists())
        self.write("out/precious.txt")
        with self.assertRaisesRegex(UserError, "OUT"):
            self.run_again("ok")
        self.assertEqual(os.listdir(self.out), ["precious.txt"])


class Published(Folder):
    def test_ucf101(self):
        self.write("s/classInd.txt", "1 ApplyEyeMakeup\r\n2 Archery\r\n")
        self.write("s/trainlist01.txt", "Archery/v_Archery_g08_c01.avi 2\nApplyEyeMakeup/v_A_g08_c01.avi 1\n")
        self.write("s/testlist01.txt", "Archery/v_Archery_g01_c01.avi\n")
        self.videos("f/Archery/v_Archery_g08_c01.avi", "f/ApplyEyeMakeup/v_A_g08_c01.mp4")
        self.videos("f/Archery/v_Archery_g01_c01/1.jpg")
        samples = self.prepare("s", "--prefix", self.folder / "f")
        # Another suffix than the list says, and frames, are recognized, too.
        train = [("Archery/v_Archery_g08_c01.avi", 1), ("ApplyEyeMakeup/v_A_g08_c01.mp4", 0)]
        self.assertEqual(samples["train"], train)
        self.assertEqual(samples["val"], [("Archery/v_Archery_g01_c01", 1)])
        self.assertIn("test split is val", self.output)
        self.assert_refused("s", "--fold", 2, regex=r"trainlist02\.txt.*--fold")
        self.write("s/trainlist01.txt", "Archery/v_Archery_g08_c01.avi 1\n")
        self.assert_refused("s", regex=r"trainlist01\.txt, row 1: Archery/")
        self.write("s/trainlist01.txt", "\n")
        self.write("s/testlist01.txt", "")
        self.assert_refused("s", regex="SOURCE")
        self.write("s/trainlist01.txt", "Archery/v_Archery_g08_c01.avi\n")
        self.write("s/testlist01.txt", "Archery/v_Archery_g01_c01.avi\n")
        self.write("s/classInd.txt", "1 ApplyEyeMakeup\n3 Archery\n")
        self.assert_refused("s", regex=r"classInd\.txt")

    def test_hmdb51(self):
        self.write("s/brush_hair_test_split1.txt", "a_brush_hair_u.avi 1 \nb.avi 2 \nunused.avi 0 \n")
        self.write("s/cartwheel_test_split1.txt", "c.avi 1\n")
        self.write("s/cartwheel_test_split2.txt", "c.avi 2\n")
        self.videos("s/brush_hair/a_brush_hair_u.avi", "s/brush_hair/b.avi", "s/cartwheel/c.avi")
        samples = self.prepare("s")
        self.assertEqual(samples["train"], [("brush_hair/a_brush_hair_u.avi", 0), ("cartwheel/c.avi", 1)])
        self.assertEqual(samples["val"], [("brush_hair/b.avi", 0)])
        self.assertIn("1 videos are in neither split", self.output)
        self.write("s/cartwheel_test_split1.txt", "c.avi 3\n")
        self.assert_refused("s", regex="row 1: c.avi 3")

    def test_something_something(self):
        self.write("s/labels.json", json.dumps({"Pushing something": "1", "Holding something next to something": "0"}))
        entry = {"id": "7", "label": "holding a cup", "template": "Holding [something] next to [something]"}
        self.write("s/train.json", json.dumps([entry]))
        self.write("s/validation.json", json.dumps([{"id": "8", "template": "Pushing [something]"}]))
        self.videos("s/7.webm", "s/8.mp4")
        self.assertEqual(self.prepare("s"), {"train": [("7.webm", 0)], "val": [("8.mp4", 1)]})
        self.write("s/train.json", json.dumps([{"id": "7", "template": "Unknown"}]))
        self.assert_refused("s", regex="row 1: .*Unknown")
        for text in ("[", "{}", "[]", "[1]"):
            self.write("s/train.json", text)
            self.assert_refused("s", regex=r"train\.json")

    def test_diving48(self):
        entries = [{"vid_name": f"v_{label}", "label": label, "start_frame": 0, "end_frame": 9} for label in (0, 3)]
        self.write("s/Diving48_V2_train.json", json.dumps(entries))
        self.write("s/Diving48_V2_test.json", json.dumps(entries[:1]))
        self.videos("s/v_0.mp4", "s/v_3.mp4")
        self.assertEqual(self.prepare("s")["train"], [("v_0.mp4", 0), ("v_3.mp4", 3)])
        self.assertIn("2 of 4 classes never occur", self.errors)
        self.assertIn("1 files are in train and in val", self.errors)
        vocabulary = [["Back", "15som", "NoTwis", "FREE"], "1", "2", "3"]
        self.write("s/Diving48_vocab.json", json.dumps(vocabulary))
        self.prepare("s")
        self.assertEqual(self.classes, ["Back_15som_NoTwis_FREE", "1", "2", "3"])


class CatalogFile(Folder):
    def text(self, name: str, old: str) -> str:
        self.new = {"kind": "video", "prefix": '/a "b"/', "fps": 12.5, "train": {"paths": "/p.npy"}}
        return updated_catalog(self.write("catalog.yaml", old), name, self.new)

    def test_a_new_entry_and_a_changed_one_leave_the_rest_as_it_is(self):
        head = "# @package _global_\n# Ours.\ndata_root: data # here\n\ndatasets:\n"
        one, other = "  one: # first\n    kind: image\n\n", "  # about the other\n  other: {kind: video}\n"
        tail = "\ntrainer: {epochs: 3}\n"
        wide = head + "    one:\n        kind: image\n    other: {kind: video}\n" + tail
        olds = (head + one + other + tail, head + other + tail, head + tail, head.replace("datasets:\n", ""), wide)
        for old in olds:
            for name in ("one", "other", "third"):
                with self.subTest(old=old, name=name):
                    new = self.text(name, old)
                    before, after = yaml.safe_load(old), yaml.safe_load(new)
                    self.assertEqual(after, {**before, "datasets": {**(before.get("datasets") or {}), name: self.new}})
                    for comment in ("# Ours.", "# here", "# about the other"):
                        self.assertEqual(comment in new, comment in old)
                    self.assertEqual(self.text(name, new), new, "the second time changes nothing")
        self.assertTrue(self.text("one", "").startswith("# @package _global_\ndatasets:\n  one:\n"))

    def test_refused(self):
        head = "# @package _global_\n"
        for old in (f"{head}datasets: {{one: {{}}}}\n", "datasets:\n  one: {}\n", f"{head}- a\n", f"{head}a: [\n"):
            with self.subTest(old), self.assertRaisesRegex(UserError, "--catalog"):
                self.text("one", old)
        for name, prefix, regex in (("one", "/a/${b}", "Paths"), ("on", "/a", "--name")):
            with self.assertRaisesRegex(UserError, regex):
                format_entry(name, {"prefix": prefix})

    def test_the_entry_is_read_as_it_was_written(self):
        self.tree("train/b/1.mp4", "train/a/2.mp4", "val/c/3.mp4")
        catalog = self.folder / "catalog.yaml"
        self.run_again("s", "--catalog", catalog)
        dataset = Dataset(name="mine", **yaml.safe_load(catalog.read_text())["datasets"]["mine"])
        self.assertEqual((dataset.num_classes, dataset.names()), (3, ["a", "b", "c"]))
        train, val = Split(dataset, "train"), Split(dataset, "val")
        self.assertEqual([train.path(0), train.label(0)], [f"{self.folder}/s/train/a/2.mp4", 0])
        self.assertEqual([val.path(0), val.label(0)], [f"{self.folder}/s/val/c/3.mp4", 2])
        self.assertEqual(np.load(self.out / "train_labels.npy").dtype, np.int64)
        self.assertIn("1 classes occur in val and not in train: c", self.errors)


class Transcoding(Folder):
    def transcoded(self, source: Path | str, name: str = "transcoded.mp4", **config: object) -> Path:
        job = TranscodeJob(str(source), str(self.folder / name), TranscodeConfig(**{"short_side": None, **config}))
        self.assertIsNone(transcode(job))
        return self.folder / name

    def frames(self, path: object, **options: float) -> tuple[list[Fraction], np.ndarray]:
        with open_video(str(path), **options) as video:
            frames = [(tick * video.time_base, frame.astype(float)) for tick, frame in video.frames()]
        return [time for time, _ in frames], np.stack([frame for _, frame in frames])

    def test_transcoding_keeps_times_and_pixels_and_sets_key_frames(self):
        for source in real_videos()[:2]:
            transcoded = self.transcoded(source, gop=12, crf=10)
            with open_video(source) as old, open_video(str(transcoded)) as new:
                for (tick, before), (other, after) in zip(old.frames(), new.frames(), strict=True):
                    self.assertEqual(tick * old.time_base, other * new.time_base)
                    if tick % 5 == 0:
                        self.assertLess(np.abs(before[::4, ::4].astype(float) - after[::4, ::4]).mean(), 4)
                self.assertAlmostEqual(old.duration, new.duration, delta=1e-4)
                self.assertEqual((new.info().gop, old.info().gop > 50), (12, True))
        with av.open(str(self.transcoded(real_videos()[0]))) as container:
            self.assertEqual([stream.type for stream in container.streams], ["video"], "sound is dropped")

    def test_times(self):
        ticks = [0, 40, 80, 200, 210, 333, 1000]
        write_timed_video(self.folder / "v.mp4", zip(ticks, moving(7), strict=True), Fraction(1, 1000), fps=7, end=1500)
        transcoded = self.transcoded(self.folder / "v.mp4")
        self.assertEqual(self.frames(transcoded)[0], [Fraction(tick, 1000) for tick in ticks])
        with open_video(str(transcoded)) as video:
            self.assertEqual(video.duration, 1.5)
        frames = [(0, "a"), (2, "b"), (1, "c"), (1, "d"), (9, "e")]
        tick, ascending = transcoding._ascending(iter(frames), Fraction(1, 25))
        self.assertEqual((tick, list(ascending)), (Fraction(1, 25), [(0, "a"), (2, "b"), (3, "c"), (4, "d"), (9, "e")]))
        with self.assertRaises(VideoDecodeError):
            list(transcoding._ascending(iter([(0, "a"), (50, "b"), (3, "c")]), Fraction(1, 25))[1])

    def test_transcoded_video_is_verified_before_renaming(self):
        write_video(self.folder / "v.mp4", moving(), fps=25)

        def write_slower(path, frames, tick, **options):
            return encode.write_timed_video(path, [(2 * time, frame) for time, frame in frames], tick, **options)

        with mock.patch.object(transcoding, "write_timed_video", write_slower):
            job = TranscodeJob(str(self.folder / "v.mp4"), str(self.folder / "transcoded.mp4"), TranscodeConfig(None))
            self.assertIn("times", transcode(job))
        self.assertEqual(os.listdir(self.folder), ["v.mp4"])

    def test_short_side_and_rotation(self):
        write_video(self.folder / "v.mp4", moving(), fps=25, crf=4)
        for short_side, shape in ((24, (12, 24, 32, 3)), (480, (12, 48, 64, 3))):
            transcoded = self.transcoded(self.folder / "v.mp4", short_side=short_side)
            self.assertEqual(self.frames(transcoded)[1].shape, shape)
        self.assertEqual(target_size(1280, 720, 256, even=True), (456, 256))
        self.assertEqual(target_size(720, 1280, 256, even=False), (256, 455))
        self.assertEqual(target_size(321, 1, None, even=True), (320, 2))
        data = (self.folder / "v.mp4").read_bytes()
        at = data.index(b"tkhd") + 44  # the matrix of a track header of version 0: turn by 90 degrees
        turn = b"".join(value.to_bytes(4, "big", signed=True) for value in (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30))
        (self.folder / "turned.mp4").write_bytes(data[:at] + turn + data[at + 36 :])
        transcoded = self.transcoded(self.folder / "turned.mp4", crf=4)
        for file, rotation in (("turned.mp4", 90), ("transcoded.mp4", 0)):
            with open_video(str(self.folder / file)) as video:
                self.assertEqual((video.info().rotation, video.info().width), (rotation, 48))
        upright = np.rot90(moving().astype(float), -1, axes=(1, 2))
        self.assertLess(np.abs(self.frames(transcoded)[1] - upright).mean(), 8)

    def test_frame_folders_become_videos_and_back(self):
        (self.folder / "clip").mkdir()
        for k, frame in enumerate(moving()):
            Image.fromarray(frame).save(self.folder / "clip" / f"{k + 1:05}.png")
        times, frames = self.frames(self.transcoded(self.folder / "clip", source_fps=29.97, crf=4))
        self.assertLess(max(abs(time - k / Fraction("29.97")) for k, time in enumerate(times)), Fraction(1, 90_000))
        self.assertLess(np.abs(frames - moving()).mean(), 6)
        write_video(self.folder / "v.mp4", moving(), fps=25, crf=4)
        back = self.transcoded(self.folder / "v.mp4", "back", frames_fps=12.5)
        self.assertEqual(sorted(os.listdir(back)), [f"{k:05}.jpg" for k in range(1, 7)])
        self.assertLess(np.abs(self.frames(back)[1] - moving()[::2]).mean(), 6)
        write_video(self.folder / "v.mp4", moving(3), fps=10)
        frames = self.frames(self.transcoded(self.folder / "v.mp4", "higher", frames_fps=25))[1]
        # On screen at 0, 40, 80 | 120, 160 | 200, 240, 280 ms.
        repeats = [bool(np.array_equal(a, b)) for a, b in pairwise(frames)]
        self.assertEqual(repeats, [True, True, False, True, False, True, True])

    def test_destinations_are_distinct(self):
        paths = ["a/x.avi", "a/x.mp4", "a/y.v1.mov", "b/x.mp4", "c", "c/z.mp4", "clip.1", "clip.2"]
        for config in (TranscodeConfig(None), TranscodeConfig(None, frames_fps=5)):
            destination_of = destinations(paths, config)
            self.assertEqual(len(set(destination_of.values())), len(paths))
            for path in destination_of.values():
                self.assertFalse(any(other.startswith(f"{path}/") for other in destination_of.values()), path)
        self.assertEqual(destinations(paths, TranscodeConfig(None))["a/y.v1.mov"], "a/y.v1.mp4")


class PreparedVideos(Folder):
    """The whole command with --gop."""

    OPTIONS = "--gop", 2, "--workers", 0

    def setUp(self):
        super().setUp()
        for number, name in enumerate(("a/1", "a/2", "b/3", "b/4")):
            (self.folder / "s" / name).parent.mkdir(parents=True, exist_ok=True)
            write_video(self.folder / "s" / f"{name}.mp4", moving(6 + number), fps=25, gop=48)
        video = self.folder / "s/b/4.mp4"
        video.write_bytes(video.read_bytes()[:400])

    def results(self) -> list[str]:
        return sorted(path.name for path in (self.out / "films").rglob("*.*"))

    def test_bad_video_is_left_out_and_reported(self):
        samples = self.prepare("s", *self.OPTIONS)
        self.assertEqual(samples["train"], [("a/1.mp4", 0), ("a/2.mp4", 0), ("b/3.mp4", 1)])
        self.assertEqual(self.entry["prefix"], f"{self.out}/films/")
        rows = list(csv.DictReader(io.StringIO((self.out / "failed.csv").read_text())))
        self.assertEqual([row["path"] for row in rows], [str(self.folder / "s/b/4.mp4")])
        self.assertTrue(rows[0]["reason"])
        self.assertIn("failed.csv", self.errors)
        paths = [self.out / "films" / path for path, _ in samples["train"]]
        for path in paths:
            with open_video(str(path)) as video:
                self.assertEqual(video.info().gop, 2)
        # With the video fixed, the same command takes it in and keeps the others.
        times = [os.stat(path).st_mtime_ns for path in paths]
        write_video(self.folder / "s/b/4.mp4", moving(), fps=25)
        self.run_again("s", *self.OPTIONS)
        self.assertEqual(len(self.samples()["train"]), 4)
        self.assertFalse((self.out / "failed.csv").exists())
        self.assertEqual([os.stat(path).st_mtime_ns for path in paths], times)
        with self.assertRaisesRegex(UserError, "OUT.*transcoded"):
            self.run_again("s", "--gop", 3)

    def test_interrupted_preparation_is_completed(self):
        calls = []

        def interrupt(*arguments: object, **options: object) -> int:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return encode.write_timed_video(*arguments, **options)

        with mock.patch.object(transcoding, "write_timed_video", interrupt):
            with self.assertRaises(KeyboardInterrupt):
                self.run_again("s", *self.OPTIONS)
        self.assertFalse((self.out / "train_paths.npy").exists())
        self.assertEqual(self.results(), ["1.mp4", "2.mp4"])
        self.write("out/films/b/.3.mp4.123.part", "left by a killed process")
        self.run_again("s", *self.OPTIONS)
        self.assertIn("2 videos existed already", self.output)
        self.assertEqual(self.results(), ["1.mp4", "2.mp4", "3.mp4"])

    def test_errors_that_end_the_preparation(self):
        """A full disk is not the videos' fault; without any video there are no arrays, and none of the source is replaced."""
        with mock.patch.object(transcoding, "write_timed_video", side_effect=OSError(28, "No space left on device")):
            with self.assertRaisesRegex(UserError, "No space left.*OUT"):
                self.run_again("s", *self.OPTIONS)
        self.assertFalse((self.out / "failed.csv").exists())
        self.videos("out/films/a/1.mp4")
        with self.assertRaisesRegex(UserError, "OUT"):
            self.run_again(self.write("list.csv", "a/1.mp4,0\n"), *self.OPTIONS, "--prefix", self.out / "films")
        shutil.rmtree(self.out)
        shutil.rmtree(self.folder / "s/a")
        (self.folder / "s/b/3.mp4").write_bytes(b"nothing")
        with self.assertRaisesRegex(UserError, "failed.csv.*--gop"):
            self.run_again("s", *self.OPTIONS)
        self.assertFalse((self.out / "train_paths.npy").exists())

    def test_invalid_options(self):
        for options in (
            *("--gop 0", "--crf 52", "--short-side 3", "--frames 0", "--catalog /nowhere/x.yaml"),
            *("--catalog x.txt", "--workers -1", "--name a-b"),
        ):
            with self.subTest(options):
                self.assert_refused("s", *options.split(), regex=options.split()[0])


class Workers(unittest.TestCase):
    """With functions that need no torch: a process starts in no time."""

    def test_workers(self):
        items = ["a", "bb", "ccc", "dddd", "eeeee"]
        for count in (0, 2, 9):
            with self.subTest(count):
                self.assertEqual(list(run_in_processes(len, items, count)), [1, 2, 3, 4, 5])
        self.assertEqual(list(run_in_processes(len, [], 2)), [])
        for code, error in enumerate(run_in_processes(os._exit, [3, 4, 5], 2), start=3):
            self.assertIn(f"exit code {code}", str(error))
        with self.assertRaises(TypeError):
            list(run_in_processes(len, ["a", 3], 1))


if __name__ == "__main__":
    unittest.main()
