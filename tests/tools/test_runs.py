"""`omnivision runs`: the table of the runs below a folder."""

import json
import unittest

from omnivision.utils.errors import UserError
from tests.fixtures import Folder
from tests.runs import call_command


class Runs(Folder):
    def write(self, name: str, started: float, **facts: object) -> None:
        (self.folder / name).mkdir(parents=True)
        run = {"model": "classifier", "trunk": "frozen", "sources": ["ucf101"], "classes": [101, 4], "started": started}
        summary = {"run": run, "status": "finished", "epochs": 30, "wall_time": 90.0} | facts
        (self.folder / name / "summary.json").write_text(json.dumps(summary))

    def table(self, *arguments: str) -> tuple[list[list[str]], str]:
        """The words of each line, and standard error."""
        code, out, errors = call_command("runs", self.folder, *arguments)
        self.assertEqual(code, 0)
        return [line.split() for line in out.splitlines()], errors

    def test_columns_oldest_first(self):
        self.write("b/probe", 1, last={"loss": 9, "val_loss": 1.23456, "val_top1": 45.67}, best=50.0)
        self.write("lr[/x]", 2, last={"loss": 0.5}, status="running", job={"job_id": "7"})
        (self.folder / "c").mkdir()
        (self.folder / "c/summary.json").write_text('{"status": "failed", "exit_reason": "no\\nmemory"}')
        (self.folder / "d").mkdir()
        (self.folder / "d/summary.json").write_text("[1")
        lines, errors = self.table()
        # A run that never started counts by the time of its summary.
        self.assertEqual([line[0] for line in lines], ["run", "b/probe", "lr[/x]", "c", "c:"])
        *cells, _, unit = lines[1]
        self.assertEqual(
            cells,
            "b/probe frozen nothing ucf101 30 1.5 45.7 1.0 50.0 1.235 classifier finished".split(),
        )
        self.assertEqual(unit, "s")
        self.assertIn("running", lines[2])
        self.assertEqual(lines[4], ["c:", "failed:", "no", "memory"])
        self.assertRegex(errors, r"^warning: \S*d/summary.json .*\n$")

    def test_top1_prints_only_accuracies(self):
        for number, (name, top1) in enumerate((("two", 20.0), ("one", 50.0), ("none", None), ("three", 30.0))):
            self.write(name, number, last={"val_top1": top1} if top1 else {"loss": 1.0})
        lines, _ = self.table("--top1")
        self.assertEqual([line[0] for line in lines], ["run", "two", "three", "one"])
        self.assertEqual(lines[3], ["one", "frozen", "nothing", "ucf101", "30", "1.5", "50.0", "1.0"])

    def test_refused(self):
        for place in (".", "nowhere"):
            with self.assertRaisesRegex(UserError, "summary.json"):
                call_command("runs", self.folder / place)


if __name__ == "__main__":
    unittest.main()
