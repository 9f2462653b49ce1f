"""`omnivision check-data`: every sample is read, whatever it is; what is wrong is named, and nothing hangs."""

import contextlib
import io
import json
import os
import shutil
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from omnivision.data.encode import write_video
from omnivision.tools import check_data
from omnivision.tools.main import main
from omnivision.tools.prepare.duplicates import find_duplicates
from omnivision.tools.prepare.workers import WorkerCrashedError
from omnivision.utils.errors import EXIT_INTERRUPTED, UserError
from tests.runs import call_command, real_films


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and standard output of `omnivision check-data ...`, in this process."""
    return call_command("check-data", "--workers", 0, *arguments)[:2]


class Folder(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def video(self, name: str, frames: int = 6, size: tuple[int, int] = (32, 48), gop: int = 12) -> str:
        noise = np.random.default_rng(len(name) + frames).integers(0, 256, (frames, *size, 3), dtype=np.uint8)
        write_video(self.folder / name, noise, fps=25, gop=gop)
        return name

    def save(self, name: str, array: object) -> Path:
        np.save(self.folder / name, np.array(array))
        return self.folder / name

    def check(self, paths: list[str], *arguments: object) -> tuple[int, str, dict]:
        """Exit code, what was printed, and the JSON, for paths below the folder."""
        report = self.folder / "report.json"
        code, out = run(self.save("paths.npy", paths), *arguments, "--prefix", f"{self.folder}/", "--json", report)
        return code, out, json.loads(report.read_text(encoding="utf-8"))


class Samples(Folder):
    def test_real_films(self):
        report = self.folder / "report.json"
        for options in ([], ["--quick"]):
            code, out = run(self.save("paths.npy", real_films()), "--json", report, *options)
            self.assertEqual(code, 0)
            self.assertIn("3 of 3 samples are good, 18.0 s of video.", out)
            self.assertIn("most frames between key frames: least 61, 5% 66.9, median 120", out)
            self.assertIn("`omnivision prepare ... --gop 12` would make", out)
            expected = {
                "ok": True,
                "reason": None,
                "frames": 250,
                "duration": 10.0,
                "fps": 25.0,
                "width": 640,
                "height": 272,
            }
            sample = json.loads(report.read_text())["samples"][0]
            self.assertEqual(
                sample, {"path": real_films()[0], **expected, "rate": 25.0, "rotation": 0, "mirrored": False, "gop": 61}
            )

    def test_every_bad_file_is_named_and_none_hangs(self):
        self.video("good.mp4")
        whole = Path(real_films()[1]).read_bytes()
        (self.folder / "half.mp4").write_bytes(whole[: len(whole) // 2])
        (self.folder / "empty.mp4").touch()
        (self.folder / "text.mp4").write_text("not a film")
        (self.folder / "list.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
        (self.folder / "folder").mkdir()
        os.mkfifo(self.folder / "pipe.mp4")
        bad = ["half.mp4", "empty.mp4", "text.mp4", "list.mp4", "folder", "pipe.mp4", "nowhere.mp4", "nul\0l.mp4"]
        code, out, report = self.check([*bad, "good.mp4"])
        self.assertEqual(code, 1)
        samples = {sample["path"]: sample for sample in report["samples"]}
        self.assertEqual([path for path, sample in samples.items() if sample["ok"]], ["good.mp4"])
        for path in bad:
            self.assertTrue(samples[path]["reason"])
            self.assertIsNone(samples[path]["frames"])
        self.assertIn("bad: pipe.mp4: not a regular file", out)
        self.assertIn("bad: folder: the folder holds no images", out)
        self.assertEqual((report["summary"]["samples"], report["summary"]["bad"]), (9, 8))

    def test_damage_in_the_middle_is_found_unless_quick(self):
        noise = np.random.default_rng(0).integers(0, 256, (400, 32, 48, 3), dtype=np.uint8)
        write_video(self.folder / "v.mp4", noise, fps=25, gop=12)
        data = bytearray((self.folder / "v.mp4").read_bytes())
        third = len(data) // 3  # of 16 s: between the first and the middle clip
        data[third : third + 400] = bytes(400)
        (self.folder / "v.mp4").write_bytes(data)
        self.assertEqual(self.check(["v.mp4"])[0], 1)
        self.assertEqual(self.check(["v.mp4"], "--quick")[0], 0)

    def test_a_truncated_video_is_bad_quick_or_not(self):
        noise = np.random.default_rng(0).integers(0, 256, (100, 32, 48, 3), dtype=np.uint8)
        write_video(self.folder / "v.mp4", noise, fps=25)
        data = (self.folder / "v.mp4").read_bytes()
        moov = data.rindex(b"moov") - 4  # its index first, so that the video opens
        table = bytearray(data[moov:])
        at = table.index(b"stco") + 12
        for k in range(int.from_bytes(table[at - 4 : at], "big")):
            where = slice(at + 4 * k, at + 4 * k + 4)
            table[where] = (int.from_bytes(table[where], "big") + len(table)).to_bytes(4, "big")
        start = data.index(b"mdat") - 4
        fast = data[:start] + bytes(table) + data[start:moov]
        for share, good in ((1, True), (0.7, False)):
            (self.folder / "v.mp4").write_bytes(fast[: int(share * len(fast))])
            for options in ([], ["--quick"]):
                self.assertEqual(self.check(["v.mp4"], *options)[0], 0 if good else 1, (share, options))

    def test_folders_of_frames(self):
        (self.folder / "clip").mkdir()
        for k in range(5):
            Image.new("RGB", (40, 30), (50 * k, 0, 0)).save(self.folder / "clip" / f"{k}.png")
        code, out, report = self.check(["clip"], "--fps", 10)
        sample = report["samples"][0]
        self.assertEqual(
            (code, sample["frames"], sample["duration"], sample["fps"], sample["width"]), (0, 5, 0.5, 10.0, 40)
        )
        self.assertNotIn("omnivision prepare", out)
        paths = self.folder / "folders.npy"
        np.save(paths, np.array(["clip"]))
        for options, said in (([], True), (["--fps", 25], False)):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
                main(["check-data", *map(str, (paths, "--prefix", f"{self.folder}/", "--workers", 0, *options))])
            self.assertEqual("--fps" in errors.getvalue(), said)
        Image.new("RGB", (30, 40)).save(self.folder / "clip" / "3.png")
        self.assertIn("frames of different sizes: 30x40, 40x30", self.check(["clip"])[1])

    def test_a_process_that_dies_costs_its_sample(self):
        self.video("a.mp4")
        with mock.patch.object(check_data, "run_in_processes", return_value=iter([(0, WorkerCrashedError("killed"))])):
            code, out, _ = self.check(["a.mp4"])
        self.assertEqual((code, "bad: a.mp4: killed" in out), (1, True))

    def test_interrupted(self):
        paths = self.save("paths.npy", [self.video("a.mp4")])
        with mock.patch.object(check_data, "run_in_processes", side_effect=KeyboardInterrupt):
            self.assertEqual(run(paths, "--json", self.folder / "x.json")[0], EXIT_INTERRUPTED)
        self.assertFalse((self.folder / "x.json").exists())


class Splits(Folder):
    def test_labels(self):
        paths = [self.video("a.mp4"), self.video("bb.mp4"), self.video("ccc.mp4"), self.video("dddd.mp4")]
        labels = self.save("labels.npy", [0, 3, 3, -1])
        code, out, report = self.check(paths, labels)
        self.assertEqual(code, 0)
        self.assertIn("labels: 2 of 4 classes occur, 1 to 2 samples each (median 1.5); 1 samples are ignored", out)
        self.assertIn("labels that never occur: 1, 2\n", out)
        self.assertEqual(report["summary"]["labels"]["histogram"], {"0": 1, "3": 2})
        code, out, _ = self.check(paths, labels, "--num-classes", 3)
        self.assertEqual(code, 1)
        self.assertIn("bad: 2 labels are not from -1 to 2", out)
        self.assertEqual(self.check(paths, labels, "--num-classes", 6)[2]["summary"]["labels"]["absent"], [1, 2, 4, 5])

    def test_labels_that_start_at_one(self):
        paths = [self.video("a.mp4"), self.video("bb.mp4")]
        for labels, options, told in (
            ([1, 2], ["--num-classes", 2], 1),
            ([1, 2], [], 1),
            ([0, 2], [], 0),
            ([1, 2], ["--num-classes", 4], 0),
        ):
            out = self.check(paths, self.save("labels.npy", labels), *options)[1]
            self.assertEqual(out.count("start at 1"), told, (labels, options))

    def test_a_folder_as_prefix_needs_no_slash(self):
        paths = self.save("paths.npy", [self.video("a.mp4")])
        self.assertEqual(run(paths, "--prefix", self.folder)[0], 0)

    def test_duplicates_and_overlap(self):
        paths = [self.video("a.mp4"), self.video("bb.mp4"), self.video("ccc.mp4")]
        shutil.copy(self.folder / "a.mp4", self.folder / "copy.mp4")
        os.symlink("bb.mp4", self.folder / "link.mp4")
        other = self.save("other.npy", ["copy.mp4", "link.mp4", "nowhere.mp4"])
        code, out, report = self.check([*paths, "a.mp4"], "--against", other)
        self.assertEqual(code, 0, "they are told, not refused")
        full = {name: f"{self.folder}/{name}" for name in [*paths, "copy.mp4", "link.mp4"]}
        self.assertEqual(report["summary"]["duplicates"], [[full["a.mp4"]] * 2])
        self.assertEqual(
            report["summary"]["overlap"], [[full["a.mp4"], full["copy.mp4"]], [full["bb.mp4"], full["link.mp4"]]]
        )
        self.assertIn("in both splits: 2 videos", out)

    def test_files_of_one_size_are_not_yet_the_same(self):
        (self.folder / "a").write_bytes(b"1234")
        (self.folder / "b").write_bytes(b"1235")
        (self.folder / "c").write_bytes(b"1234")
        files = [str(self.folder / name) for name in "abc"]
        self.assertEqual(find_duplicates(files), [[files[0], files[2]]])
        with mock.patch("omnivision.tools.prepare.duplicates._digest") as digest:
            self.assertEqual(find_duplicates(files[:1]), [])
            digest.assert_not_called()

    def test_advice_only_where_it_helps(self):
        self.assertNotIn("omnivision prepare", self.check([self.video("a.mp4", frames=30, gop=12)])[1])
        self.assertIn("30 frames or more between", self.check([self.video("a.mp4", frames=30, gop=99)])[1])
        self.assertIn("short side of 400 pixels", self.check([self.video("a.mp4", size=(400, 500))])[1])

    def test_no_advice_on_the_size_of_small_films(self):
        for side, advised in ((120, False), (256, False), (300, True)):
            with self.subTest(side):
                said = self.check([self.video("a.mp4", frames=30, size=(side, side + 20), gop=99)])[1]
                self.assertIn("--gop 12", said)
                self.assertEqual("short" in said, advised)

    def test_refused(self):
        paths = self.save("paths.npy", [self.video("a.mp4")])
        os.mkfifo(self.folder / "pipe.npy")
        cases = [
            ((self.folder / "none.npy",), "no such file"),
            ((self.folder / "pipe.npy",), "no such file"),
            ((self.save("empty.npy", np.array([], dtype=str)),), "at least one"),
            ((paths, self.save("two.npy", [1, 2])), "1-D array of 1 integers"),
            ((paths, "--num-classes", 3), "--num-classes"),
            ((paths, "--workers", -1), "--workers"),
            ((paths, "--fps", 0), "--fps"),
            ((paths, "--json", "/nowhere/x.json"), "in a folder that is there"),
            ((paths, "--json", self.folder), "in a folder that is there"),
            ((paths, "--json", paths), "is a file that is read here"),
            ((paths, "--json", "/dev/full"), "expected a file"),
            ((paths, "--json", self.folder / "pipe.npy"), "expected a file"),
            ((paths, self.save("large.npy", [2**62])), "holds the label 4611686018427387904; expected"),
        ]
        for arguments, saying in cases:
            with self.subTest(saying), self.assertRaisesRegex(UserError, saying):
                run(*arguments)


if __name__ == "__main__":
    unittest.main()
