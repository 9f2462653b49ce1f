"""`omnivision check-data`: every sample is read, whatever it is; what is wrong is named, and nothing hangs."""

import json
import os
import shutil
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from omnivision.data.encode import write_video
from omnivision.tools import check_data
from omnivision.tools.workers import WorkerCrashedError
from omnivision.utils.errors import UserError
from tests.data import test_catalog as catalog
from tests.runs import call_command, real_videos


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and standard output of `omnivision check-data ...`, in this process."""
    return call_command("check-data", "--workers", 0, *arguments)[:2]


class Folder(catalog.Folder):
    def video(self, name: str, frames: int = 6, size: tuple[int, int] = (32, 48), gop: int = 12) -> str:
        noise = np.random.default_rng(len(name) + frames).integers(0, 256, (frames, *size, 3), dtype=np.uint8)
        write_video(self.folder / name, noise, fps=25, gop=gop)
        return name

    def check(self, paths: list[str], *arguments: object) -> tuple[int, str, dict]:
        """Exit code, what was printed, and the JSON, for paths below the folder."""
        report = self.folder / "report.json"
        code, out = run(self.save("paths.npy", paths), *arguments, "--prefix", self.folder, "--json", report)
        return code, out, json.loads(report.read_text(encoding="utf-8"))


class Samples(Folder):
    def test_real_videos(self):
        report = self.folder / "report.json"
        expected = dict(ok=True, reason=None, frames=250, duration=10.0, fps=25.0, width=640, height=272)
        expected |= dict(path=real_videos()[0], rate=25.0, rotation=0, mirrored=False, gop=61)
        for options in ([], ["--quick"]):
            code, out = run(self.save("paths.npy", real_videos()), "--json", report, *options)
            self.assertEqual(code, 0)
            self.assertIn("3 of 3 samples are good, 18.0 s of video.", out)
            self.assertIn("gop: least 61, 5% 66.9, median 120", out)
            self.assertEqual(json.loads(report.read_text())["samples"][0], expected)

    def test_every_bad_file_is_reported_without_hanging(self):
        self.video("good.mp4")
        complete = Path(real_videos()[1]).read_bytes()
        (self.folder / "half.mp4").write_bytes(complete[: len(complete) // 2])
        (self.folder / "empty.mp4").touch()
        (self.folder / "text.mp4").write_text("not a video")
        (self.folder / "list.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
        (self.folder / "folder").mkdir()
        os.mkfifo(self.folder / "pipe.mp4")
        bad = ["half.mp4", "empty.mp4", "text.mp4", "list.mp4", "folder", "pipe.mp4", "nowhere.mp4", "nul\0l.mp4"]
        code, out, report = self.check([*bad, "good.mp4"])
        self.assertEqual((code, report["summary"]["samples"], report["summary"]["bad"]), (1, 9, 8))
        for sample in report["samples"]:
            is_good = sample["path"] == "good.mp4"
            self.assertEqual((sample["ok"], not sample["reason"], sample["frames"] is not None), (is_good,) * 3)
        for path in bad[:-1]:
            self.assertIn(f"bad: {path}: ", out)

    def test_damage_and_truncation(self):
        noise = np.random.default_rng(0).integers(0, 256, (400, 32, 48, 3), dtype=np.uint8)
        write_video(self.folder / "v.mp4", noise, fps=25, gop=12)
        complete = (self.folder / "v.mp4").read_bytes()
        third = len(complete) // 3  # of 16 s: between the first and the middle clip
        moov = complete.rindex(b"moov") - 4  # in front of the data, so that a part of the file opens
        table = bytearray(complete[moov:])
        at = table.index(b"stco") + 12
        for k in range(int.from_bytes(table[at - 4 : at], "big")):
            where = slice(at + 4 * k, at + 4 * k + 4)
            table[where] = (int.from_bytes(table[where], "big") + len(table)).to_bytes(4, "big")
        start = complete.index(b"mdat") - 4
        fast = complete[:start] + bytes(table) + complete[start:moov]
        for data, codes in (
            (complete[:third] + bytes(400) + complete[third + 400 :], (1, 0)),
            (fast, (0, 0)),
            (fast[: int(0.7 * len(fast))], (1, 1)),
        ):
            (self.folder / "v.mp4").write_bytes(data)
            self.assertEqual((self.check(["v.mp4"])[0], self.check(["v.mp4"], "--quick")[0]), codes)

    def test_frame_folders(self):
        (self.folder / "clip").mkdir()
        for k in range(5):
            Image.new("RGB", (40, 30), (50 * k, 0, 0)).save(self.folder / "clip" / f"{k}.png")
        code, _, report = self.check(["clip"], "--fps", 10)
        sample = report["samples"][0]
        self.assertEqual((code, *map(sample.get, ("frames", "duration", "fps", "width"))), (0, 5, 0.5, 10.0, 40))
        for options in ((), ("--fps", 25)):
            arguments = self.folder / "paths.npy", "--prefix", self.folder, "--workers", 0, *options
            self.assertEqual("--fps" in call_command("check-data", *arguments)[2], not options)
        Image.new("RGB", (30, 40)).save(self.folder / "clip" / "3.png")
        self.assertIn("30x40, 40x30", self.check(["clip"])[1])

    def test_crashed_worker_costs_only_its_sample(self):
        paths = [self.video("a.mp4")]
        with mock.patch.object(check_data, "run_in_processes", return_value=iter([WorkerCrashedError("killed")])):
            code, out, _ = self.check(paths)
        self.assertEqual((code, "bad: a.mp4: killed" in out), (1, True))


class Splits(Folder):
    def test_labels(self):
        paths = [self.video("a.mp4"), self.video("bb.mp4"), self.video("ccc.mp4"), self.video("dddd.mp4")]
        labels = self.save("labels.npy", [0, 3, 3, -1])
        for options, code, classes, occurring, absent, out_of_range in (
            ((), 0, 4, 2, [1, 2], 0),
            (("--num-classes", 3), 1, 3, 1, [1, 2], 2),
            (("--num-classes", 6), 0, 6, 2, [1, 2, 4, 5], 0),
        ):
            found, out, report = self.check(paths, labels, *options)
            expected = {"classes": classes, "absent": absent, "ignored": 1, "out_of_range": out_of_range}
            self.assertEqual(report["summary"]["labels"], {**expected, "histogram": {"0": 1, "3": 2}})
            self.assertEqual(found, code)
            self.assertIn(f"labels: {occurring} of {classes} classes occur", out)
        words = self.folder / "paths.npy", labels, "--prefix", self.folder, "--workers", 0, "--num-classes", 3
        self.assertRegex(call_command("check-data", *words)[2], "(?m)^error: .*labels.npy has 2 labels.*--num-classes")
        for values, options, count in (
            ([1, 2], ["--num-classes", 2], 1),
            ([1, 2], [], 1),
            ([0, 2], [], 0),
            ([1, 2], ["--num-classes", 4], 0),
        ):
            out = self.check(paths[:2], self.save("labels.npy", values), *options)[1]
            self.assertEqual(out.count("start at 1"), count, (values, options))

    def test_duplicates_and_overlap(self):
        paths = [self.video("a.mp4"), self.video("bb.mp4"), self.video("ccc.mp4")]
        shutil.copy(self.folder / "a.mp4", self.folder / "copy.mp4")
        os.symlink("bb.mp4", self.folder / "link.mp4")
        other = self.save("other.npy", ["copy.mp4", "link.mp4", "nowhere.mp4"])
        code, out, report = self.check([*paths, "a.mp4"], "--against", other)
        self.assertEqual((code, "in both splits: 2 videos" in out), (0, True))
        full = {name: f"{self.folder}/{name}" for name in [*paths, "copy.mp4", "link.mp4"]}
        self.assertEqual(report["summary"]["duplicates"], [[full["a.mp4"]] * 2])
        overlap = [[full["a.mp4"], full["copy.mp4"]], [full["bb.mp4"], full["link.mp4"]]]
        self.assertEqual(report["summary"]["overlap"], overlap)
        files = [str(self.folder / name) for name in "xyz"]
        for file, data in zip(files, (b"1234", b"1235", b"1234"), strict=True):
            Path(file).write_bytes(data)
        self.assertEqual(check_data.find_duplicates(files), [[files[0], files[2]]], "not all of one size")
        with mock.patch.object(check_data, "sha256", side_effect=AssertionError):
            self.assertEqual(check_data.find_duplicates(files[:1]), [], "of another size than all")

    def test_refused(self):
        paths = self.save("paths.npy", [self.video("a.mp4")])
        os.mkfifo(self.folder / "pipe.npy")
        for *arguments, regex in (
            (self.folder / "none.npy", "none.npy"),
            (self.folder / "pipe.npy", "pipe.npy"),
            (self.save("empty.npy", np.array([], dtype=str)), "PATHS"),
            (self.save("numbers.npy", [1, 2]), "PATHS"),
            (paths, self.save("two.npy", [1, 2]), "LABELS"),
            *((paths, self.save(f"{label}.npy", [label]), f"{label}.*LABELS") for label in (2**62, -2)),
            (paths, "--num-classes", 3, "--num-classes"),
            (paths, "--workers", -1, "--workers"),
            (paths, "--fps", 0, "--fps"),
            *((paths, "--json", file, "--json") for file in ("/nowhere/x.json", self.folder, paths, "/dev/full")),
            (paths, "--json", self.folder / "pipe.npy", "--json"),
        ):
            with self.subTest(arguments), self.assertRaisesRegex(UserError, regex):
                run(*arguments)


if __name__ == "__main__":
    unittest.main()
