"""`omnivision report`: what the page says, that nobody's names break out of it, and that a real browser shows it."""

import base64
import contextlib
import html
import io
import json
import os
import re
import tempfile
import unittest
from pathlib import Path

import numpy as np

from omnivision.reporting.run_directory import RunDir
from omnivision.tools.main import main
from omnivision.tools.report import figures
from omnivision.tools.report.collect import Predicted, Run, differing, find_runs, lineage
from omnivision.tools.report.mistakes import most_confident, worst
from omnivision.tools.report.paper import table
from omnivision.utils.errors import UserError
from tests.browser import CHROMIUM, asked
from tests.runs import real_films

HOSTILE = "<script>alert(1)</script>"


def write_run(folder: Path, **facts: object) -> Path:
    """A run folder with figures, predictions and settings, as a run leaves them."""
    run = {
        "started": 1.0,
        "sources": ["ucf101"],
        "trunk": "trained",
        "pretrained": "runs/mae",
        "model": "classifier",
        "classes": [3],
    }
    top1 = facts.pop("top1", 50.0)
    (folder / "logs").mkdir(parents=True)
    (folder / "pictures").mkdir()
    (folder / "predictions").mkdir()
    summary = {"run": run | facts, "status": "finished", "epochs": 2, "wall_time": 7200.0, "best": top1 + 1, "best_epoch": 1,
               "last": {"loss": 1.0, "val_top1": top1, "val_loss": 2.0, "val_epoch": 2}}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(f"epochs: 2\nlr_scale_factor: {top1}\nname: '{HOSTILE}'\n")
    lines = [{"event": "step", "phase": "train", "epoch": 0, "step": step, "loss": 3 - step / 9, "lr": 0.1, "grad_norm": 1.0,
              "clips_per_second": 9.0, "data_wait": 0.5} for step in range(1, 9)]  # fmt: skip
    lines += [{"event": "epoch", "phase": "val", "epoch": epoch, "step": 4 + 4 * epoch, "loss": 2.0, "top1": top1,
               "mean_class_accuracy": 40.0} for epoch in (0, 1)]  # fmt: skip
    (folder / "logs/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = np.log(np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], np.float32))
    np.savez(
        folder / "predictions/ucf101.npz", index=np.arange(4), label=np.array([0, 1, 1, -1]), scores=scores,
        path=np.array([*real_films(), "/gone.mp4"]), class_names=np.array(["run", HOSTILE, "jump"]),
    )  # fmt: skip
    return folder


class Page(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def report(self, *runs: Path) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            self.assertEqual(main(["report", *map(str, runs), "--out", str(self.folder / "report.html")]), 0)
        self.assertRegex(said.getvalue(), r"(^|\n)Wrote .*report.html \(\d+\.\d MB, \d runs?\)\n$")
        return (self.folder / "report.html").read_text()

    def test_what_it_says(self):
        one, two = (
            write_run(self.folder / "runs/a", top1=50.0),
            write_run(self.folder / "runs/b", top1=60.0, trunk="frozen"),
        )
        (one / "logs/pretrained.json").write_text(
            json.dumps([{"path": str(two / "checkpoints/best.pt"), "sha256": "ab" * 32}])
        )
        text = self.report(self.folder / "runs")
        self.assertNotIn(HOSTILE, text)
        body = html.unescape(re.sub(r"<script.*?</script>", "", text, flags=re.S))
        self.assertNotRegex(body, r'(src|href)="http')
        for expected in ("2 of 3 videos are right: 66.7 %", "Guessing would give 33.3 %", "lr_scale_factor", "started from",
                         HOSTILE, "The mistakes, the most confident first",
                         "data:image/webp;base64,", "mae", "50.0 (epoch 2)", "51.0 (epoch 1)", "60.0 (epoch 2)",
                         "after epoch 2; best.pt is of epoch 1"):  # fmt: skip
            self.assertIn(expected, body)
        self.assertEqual(text.count("plotly-graph-div"), 1 + 8 + 2 * 2)

    def test_a_sweep(self):
        """What came of it, over each setting that differs and is a number."""
        for number, top1 in enumerate((50.0, 60.0, 55.0)):
            write_run(self.folder / f"sweep/lr_{number}", top1=top1)
        text = self.report(self.folder / "sweep")
        self.assertIn('<h2 id="swept">What was swept</h2>', text)
        self.assertEqual(len(re.findall(r"<h3><code>lr_scale_factor</code></h3>", text)), 1)
        self.assertIn("<td>last top-1, %</td><td>50</td><td>60</td><td>55</td>", text)
        self.assertNotIn("swept", self.report(self.folder / "sweep/lr_0").partition('<h2 id="runs">')[2])

    def test_a_damaged_folder(self):
        """What cannot be read is left out, and the rest is there."""
        for name, spoil in (
            ("cut", lambda file: file.write_bytes(file.read_bytes()[:400])),
            ("array", lambda file: np.save(file.with_suffix(".npy"), 3) or os.replace(file.with_suffix(".npy"), file)),
            ("far", lambda file: np.savez(file, scores=np.ones((1, 2)), label=[5], path=["x"], class_names=["a", "b"])),
            ("none", lambda file: np.savez(file, scores=np.ones((1, 0)), label=[0], path=["x"], class_names=[])),
            ("few", lambda file: np.savez(file, scores=np.ones((1, 2)), label=[0], path=["x"], class_names=["a"])),
            ("nan", lambda file: np.savez(file, scores=[[np.nan]], label=[0], path=["x"], class_names=["a"])),
        ):
            folder = write_run(self.folder / name)
            spoil(folder / "predictions/ucf101.npz")
            (folder / "config.yaml").write_text("a: &a {b: *a}\n")
            with open(folder / "logs/metrics.jsonl", "a") as log:
                log.write('{"event": "step", "loss": 1}\n[1]\n{"event": "epoch", "phase": "train"}\n')
            with self.subTest(name):
                text = self.report(folder)
                self.assertNotIn("Confusion matrix", text)
                self.assertIn("Loss, training", text)

    def test_what_does_not_belong_there(self):
        """Links that lead out, pipes and what is no GIF are passed by; numbers of hundreds of digits, too."""
        folder = write_run(self.folder / "a")
        (self.folder / "secret").write_text("GIF8 geheim")
        (folder / "pictures/last.gif").symlink_to(self.folder / "secret")
        (folder / "pictures/b.gif").write_text("geheim")
        (folder / "pictures/c.gif").symlink_to("c.gif")
        os.mkfifo(folder / "pictures/d.gif")
        os.mkfifo(folder / "predictions/pipe.npz")
        (folder / "config.yaml").unlink()
        os.mkfifo(folder / "config.yaml")
        os.mkfifo(folder / "logs/pretrained.json")
        summary = json.loads((folder / "summary.json").read_text())
        summary["last"]["val_top1"] = summary["wall_time"] = 10**400
        (folder / "summary.json").write_text(json.dumps(summary))
        for data in (b"GIF8 geheim", b"geheim"):  # the page shows the last picture that there is
            self.assertNotIn(base64.b64encode(data).decode()[:7], self.report(folder).replace("R0lGODlh", ""))
            (folder / "pictures/last.gif").unlink(missing_ok=True)
        (folder / "logs/pretrained.json").unlink()
        for path in ("a\0b", "\ud800/x/y", "x/" * 3000):
            (folder / "logs/pretrained.json").write_text(json.dumps([{"path": path, "sha256": "0"}]))
            self.report(folder)

    def test_a_run_that_has_nothing_yet(self):
        (self.folder / "run").mkdir()
        (self.folder / "run/summary.json").write_text('{"status": "failed", "exit_reason": "no <luck>"}')
        self.assertIn("no &lt;luck&gt;", self.report(self.folder / "run"))

    def test_refused(self):
        (self.folder / "empty").mkdir()
        for arguments, saying in (
            ([self.folder / "empty"], "There is no run in"),
            ([self.folder / "none"], "is no folder"),
        ):
            self.assertRaisesRegex(UserError, saying, find_runs, arguments)
        run = write_run(self.folder / "a")
        for out in (run / "summary.json", self.folder / ("a" * 300), self.folder):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                self.assertEqual(main(["report", str(run), "--out", str(out)]), 1)
            self.assertIn("error: --out is", said.getvalue())
        with contextlib.redirect_stderr(io.StringIO()) as said:
            self.assertEqual(main(["report", str(self.folder / "a"), "--out", "/nowhere/x.html"]), 1)
        self.assertIn("a file in a folder that is there", said.getvalue())

    @unittest.skipIf(CHROMIUM is None, "no browser: apt-get install chromium")
    def test_in_a_browser(self):
        """Light and dark, wide and narrow: every figure is drawn, nothing is wider than the page, and the console is silent."""
        self.report(write_run(self.folder / "a"))
        for dark in (False, True):
            for width in (1200, 390):
                seen, console = asked(self.folder / "report.html", width, dark)
                self.assertGreaterEqual(seen["figures"], 10)
                self.assertEqual((seen["broken"], seen["narrow"], max(0, seen["wide"])), (0, 0, 0), (dark, width, seen))
                self.assertEqual(seen["page"], "rgb(22, 24, 27)" if dark else "rgb(255, 255, 255)")
                self.assertEqual(seen["ink"], "rgb(230, 230, 230)" if dark else "rgb(34, 34, 34)")
                self.assertEqual(console, [])


class Parts(unittest.TestCase):
    def predicted(self) -> Predicted:
        shares = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.05, 0.95]], np.float32)
        return Predicted(np.array([1, 1, 1, 0]), shares, ["a", "b", "c", "d"], ["x", "y"])

    def test_mistakes_and_classes(self):
        predicted = self.predicted()
        self.assertEqual([each.path for each in most_confident(predicted, 2)], ["d", "a"])
        self.assertEqual([each.path for each in worst(predicted, 9)], ["d", "a", "b"])
        self.assertEqual((most_confident(predicted, 1)[0].label, most_confident(predicted, 1)[0].picture), ("x", ""))
        self.assertEqual(predicted.confusion().tolist(), [[0, 1], [2, 1]])
        (x, none, zero), (y, three, third) = predicted.by_class()
        self.assertEqual((x, none, zero, y, three), ("x", 1, 0.0, "y", 3))
        self.assertAlmostEqual(third, 100 / 3)

    def test_every_finished_run_counts(self):
        """Runs that others start from, too, and those on several sources; none that has not trained to its end."""
        start = self.run_of("start", None, "ucf101", "trained", 85.7)
        later = self.run_of("later", "runs/start", "ucf101", "trained", 42.9)
        later.pretrained.append({"path": "/nowhere/start/checkpoints/best.pt", "sha256": "0"})
        both = self.run_of("both", None, "ucf101+hmdb51", "trained", 30.0)
        self.assertEqual(
            table([start, later, both]).rows,
            [("nothing", [("85.7", True), ("30.0", True)]), ("start", [("42.9", False), ("", False)])],
        )
        self.assertEqual(table([start, later, both]).columns, [("ucf101", "FT"), ("ucf101 + hmdb51", "FT")])
        for facts in ({"status": "running"}, {"status": "interrupted"}, {"status": "failed"}, {"epochs": 0}):
            better = self.run_of("better", None, "ucf101", "trained", 99.0)
            better.summary |= facts
            made = table([start, later, better])
            self.assertEqual((made.rows[0][1][0], made.left_out), (("85.7", True), ["better"]), facts)

    def test_starts_that_are_files(self):
        made = [self.run_of(name, "vit.pt", "ucf101", "trained", 80.0) for name in ("ucf101", "other")]
        for run in made:
            run.pretrained.append({"path": "/data/ucf101/weights/vit.pt", "sha256": "0"})
        self.assertEqual(table(made).rows[0][1], [("80.0 (mean of 2)", True)])

    def test_weights_of_somebody_elses(self):
        run = self.run_of("a", "x", "ucf101", "trained", 80.0)
        run.pretrained.append({"path": f"/{'x' * 300}/checkpoints/best.pt", "sha256": "0"})
        self.assertEqual(len(lineage(run, [run])), 1)

    def test_a_long_curve_ends_with_its_last_value(self):
        run = self.run_of("a", None, "a", "trained", 1.0)
        run.lines += [
            {"event": "step", "step": step, "loss": float(step)} for step in range(2 * figures.MAX_POINTS + 1)
        ]
        self.assertIn(f"{2 * figures.MAX_POINTS}", figures.curves([run], "loss", "loss", Run.steps, [run]))

    def test_a_run_has_one_colour(self):
        runs = [self.run_of(name, None, "a", "trained", 1.0) for name in "abc"]
        for run in runs:
            run.lines += [{"event": "step", "step": step, "loss": 1.0} for step in (1, 2)]
        drawn = figures.curves(runs[1:2], "loss", "loss", Run.steps, runs)
        self.assertEqual([colour in drawn for colour in figures.COLOURS[:3]], [False, True, False])

    def run_of(self, name: str, start: str | None, task: str, trunk: str, top1: float, **settings: object) -> Run:
        facts = {"pretrained": start, "sources": task.split("+"), "trunk": trunk}
        summary = {"run": facts, "last": {"val_top1": top1}, "status": "finished", "epochs": 3}
        return Run(name, RunDir(f"/nowhere/{name}"), summary, settings, [])

    def test_the_papers_table(self):
        runs = [
            self.run_of("a", "runs/align", "ucf101", "trained", 80.0),
            self.run_of("b", "runs/align", "ucf101", "trained", 90.0),
            self.run_of("c", "runs/align", "ucf101", "frozen", 50.0),
            self.run_of("d", None, "ucf101", "trained", 60.0),
            self.run_of("e", "runs/align + runs/nohuman", "hmdb51", "frozen average", 40.0),
        ]
        made = table(runs)
        self.assertEqual(made.columns, [("ucf101", "FT"), ("ucf101", "LP"), ("hmdb51", "LP")])
        self.assertEqual(made.rows[0], ("align", [("85.0 (mean of 2)", True), ("50.0", True), ("", False)]))
        self.assertEqual(made.rows[1], ("nothing", [("60.0", False), ("", False), ("", False)]))
        self.assertEqual(made.rows[2][0], "align + nohuman (average)")
        self.assertIsNone(table(runs[:1]))

    def test_what_differs(self):
        runs = [
            self.run_of(name, None, "a", "trained", 1.0, **{"lr": lr, "same": 1, "launcher.experiment_log_dir": name})
            for name, lr in (("a", 1), ("b", 2))
        ]
        self.assertEqual(differing(runs), {"lr": ["1", "2"]})

    def test_a_lineage_that_bites_its_tail(self):
        with tempfile.TemporaryDirectory() as name:
            folders = [write_run(Path(name) / part) for part in "ab"]
            for one, other in (folders, folders[::-1]):
                (one / "logs/pretrained.json").write_text(
                    json.dumps([{"path": f"{other}/checkpoints/best.pt", "sha256": "0"}])
                )
            runs = find_runs([Path(name)])
            self.assertEqual(len(lineage(runs[0], runs)), 2)


if __name__ == "__main__":
    unittest.main()
