"""`omnivision runs`: the table of what lies below a folder."""

import contextlib
import io
import json
import os
import tempfile
import unittest
from pathlib import Path

from omnivision.tools.main import main


class Runs(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def write(self, name: str, started: float, **facts: object) -> None:
        (self.folder / name).mkdir(parents=True)
        run = {"model": "classifier", "trunk": "frozen", "sources": ["ucf101"], "classes": [101, 4], "started": started}
        summary = {"run": run, "status": "finished", "epochs": 30, "wall_time": 90.0} | facts
        (self.folder / name / "summary.json").write_text(json.dumps(summary))

    def told(self, *arguments: str) -> tuple[int, list[list[str]], str]:
        """Exit code, the words of each line, and what went to the other stream."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["runs", str(self.folder), *arguments])
        return code, [line.split() for line in out.getvalue().splitlines()], err.getvalue()

    def test_all_runs_oldest_first_with_what_is_known_of_them(self):
        self.write("b/probe", 1, last={"loss": 9, "val_loss": 1.23456, "val_top1": 45.67}, best=50.0)
        self.write("a", 2, last={"loss": 0.5}, status="running", job={"job_id": "7"})
        (self.folder / "c").mkdir()
        (self.folder / "c/summary.json").write_text('{"status": "failed"}')
        code, lines, _ = self.told()
        self.assertEqual(code, 0)
        # Of one that never started the time of its summary counts.
        self.assertEqual([line[0] for line in lines], ["run", "b/probe", "a", "c"])
        self.assertIn("failed", lines[3])
        age = lines[1][-2:]
        self.assertEqual(
            lines[1][:-2],
            [
                "b/probe",
                "frozen",
                "nothing",
                "ucf101",
                "30",
                "1.5",
                "45.7",
                "1.0",
                "50.0",
                "1.235",
                "classifier",
                "finished",
            ],
        )
        self.assertEqual(age[1], "s")
        self.assertIn("running", lines[2])

    def test_whatever_a_summary_says(self):
        for number, facts in enumerate(({"run": None}, {"last": None}, {"changed": "x"}, {"last": {"val_top1": "x"}})):
            self.write(f"odd_{number}", 1, **facts)
        self.write("lr[/x]", 1)
        self.write("lr[red]q", 1)
        os.mkfifo(self.folder / "lr[/x]" / "below.json")
        (self.folder / "deep").mkdir()
        (self.folder / "deep/summary.json").write_text("[" * 100_000)
        (self.folder / "pipe").mkdir()
        os.mkfifo(self.folder / "pipe/summary.json")
        for arguments in ((), ("--top1",)):
            code, _, error = self.told(*arguments)
            self.assertEqual(code, 0)
        names = {line[0] for line in self.told()[1]}
        self.assertLessEqual({"lr[/x]", "lr[red]q", "odd_2"}, names)
        self.assertIn("deep/summary.json is no summary", error)

    def test_what_a_terminal_would_obey_is_left_out(self):
        self.write("a", 1, status="failed\x1b[31m", exit_reason="x\n\x1b[2Jerror: fake" + "y" * 5000)
        _, lines, _ = self.told()
        said = "\n".join(" ".join(line) for line in lines)
        self.assertNotRegex(said, r"\x1b")
        self.assertIn("failed [31m: x [2Jerror: fakeyyy", said)
        self.assertLess(len(said), 3000)
        self.write("b", 1, last={"val_top1": None})
        self.assertEqual(self.told("--top1")[0], 0)

    def test_accuracies_worst_first(self):
        for name, top1 in (("one", 50.0), ("two", 20.0), ("three", 30.0)):
            self.write(name, 1, last={"val_top1": top1})
        self.write("mae", 0, last={"loss": 0.1})
        code, lines, _ = self.told("--top1")
        self.assertEqual(code, 0)
        self.assertEqual([line[0] for line in lines], ["run", "two", "three", "one"])
        self.assertEqual(lines[3], ["one", "frozen", "nothing", "ucf101", "30", "1.5", "50.0", "1.0"])

    def test_what_is_no_folder_of_runs(self):
        for place, saying in ((".", "no summary.json was found"), ("nowhere", "is no folder")):
            with self.subTest(place):
                out, err = io.StringIO(), io.StringIO()
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    code = main(["runs", str(self.folder / place)])
                self.assertEqual((code, out.getvalue()), (1, ""))
                self.assertIn(saying, err.getvalue())

    def test_a_damaged_summary_is_named(self):
        self.write("whole", 1)
        (self.folder / "summary.json").write_text("[1")
        code, lines, err = self.told()
        self.assertEqual((code, [line[0] for line in lines]), (0, ["run", "whole"]))
        self.assertRegex(err, r"warning: \S*summary.json is no summary of a run")


if __name__ == "__main__":
    unittest.main()
