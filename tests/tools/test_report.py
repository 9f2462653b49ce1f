"""`omnivision report`: its content, that nobody's names break out of it, and that a real browser shows it."""

import html
import json
import re
import unittest
from pathlib import Path

import numpy as np

from omnivision.reporting.predictions import Predictions, write_predictions
from omnivision.reporting.run_directory import RunDir
from omnivision.tools.report import figures
from omnivision.tools.report.collect import MAX_POINTS, Run, find_differing_settings, find_runs, paper_table
from omnivision.utils.errors import UserError
from tests import fixtures
from tests.browser import CHROMIUM, probe
from tests.runs import call_command, real_videos

HOSTILE = "<script>alert(1)</script>"


def write_run(folder: Path, top1: float = 50.0, **facts: object) -> Path:
    """A run directory with metrics, predictions and settings, as a run leaves them."""
    run = {
        "started": 1.0,
        "sources": ["ucf101"],
        "trunk": "trained",
        "pretrained": "runs/mae",
        "model": "classifier",
    } | facts
    summary = {"run": run, "status": "finished", "epochs": 2, "wall_time": 7200.0, "best": top1 + 1, "best_epoch": 1,
               "last": {"loss": 1.0, "val_top1": top1, "val_loss": 2.0, "val_epoch": 2}}  # fmt: skip
    RunDir(folder).create()
    RunDir(folder).replace_summary(summary)
    (folder / "config.yaml").write_text(f"epochs: 2\nlr_scale_factor: {top1}\nname: '{HOSTILE}'\n")
    lines = [{"event": "step", "phase": "train", "epoch": 0, "step": step, "loss": 3 - step / 9, "lr": 0.1, "grad_norm": 1.0,
              "clips_per_second": 9.0, "data_wait": 0.5} for step in range(1, 9)]  # fmt: skip
    lines += [{"event": "epoch", "phase": "val", "epoch": epoch, "step": 4 + 4 * epoch, "loss": 2.0, "top1": top1,
               "mean_class_accuracy": 40.0} for epoch in (0, 1)]  # fmt: skip
    (folder / "logs/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = np.log(np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], np.float32))
    paths, names = [*real_videos(), "/gone.mp4"], ["run", HOSTILE, "jump"]
    predictions = Predictions(np.arange(4), np.array([0, 1, 1, -1]), scores, paths, class_names=names)
    write_predictions(folder / "predictions", "ucf101", predictions)
    return folder


class Folder(fixtures.Folder):
    def report(self, *runs: Path) -> str:
        code, out, self.errors = call_command("report", *runs, "--out", self.folder / "report.html")
        self.assertEqual(code, 0)
        self.assertRegex(out, r"^Wrote .*report.html \(\d+\.\d MB, \d runs?\)\n$")
        return (self.folder / "report.html").read_text()


class Page(Folder):
    def test_content(self):
        for name, top1, trunk in (("a", 50.0, "trained"), ("b", 60.0, "frozen")):
            write_run(self.folder / "runs" / name, top1, trunk=trunk)
        text = self.report(self.folder / "runs")
        self.assertNotIn(HOSTILE, text)
        body = html.unescape(re.sub(r"<script.*?</script>", "", text, flags=re.S))
        self.assertNotRegex(body, r'(src|href)="http')
        for expected in ("2 of 3 videos are right: 66.7 %", "Guessing would give 33.3 %", "lr_scale_factor", HOSTILE,
                         "The mistakes, the most confident first", "data:image/webp;base64,", "mae", "50.0\nepoch 2",
                         "51.0\nepoch 1", "60.0\nepoch 2", "after epoch 2; best.pt is of epoch 1",
                         "<td>50 (top-1, %)</td><td>60 (top-1, %)</td>"):  # fmt: skip
            self.assertIn(expected, body)
        self.assertEqual(text.count("plotly-graph-div"), 1 + 8 + 2 * 2)

    def test_damaged_or_missing_files_are_left_out(self):
        damaged = write_run(self.folder / "a")
        file = damaged / "predictions/ucf101.npz"
        file.write_bytes(file.read_bytes()[:400])
        text = self.report(damaged)
        self.assertNotIn("Confusion matrix", text)
        self.assertIn("Loss, training", text)
        self.assertIn("ucf101.npz", self.errors)
        empty = self.folder / "empty"
        empty.mkdir()
        for content in (b"\xff\x00", b"[]", b'{"status": 5}'):
            (empty / "summary.json").write_bytes(content)
            for command in ("report", "runs"):
                with self.subTest(command, content=content), self.assertRaisesRegex(UserError, "summary.json"):
                    call_command(command, empty)
        (empty / "summary.json").write_text('{"status": "failed", "exit_reason": "no <luck>"}')
        self.assertIn("no &lt;luck&gt;", self.report(empty))

    def test_inconsistent_predictions_are_left_out(self):
        run = write_run(self.folder / "a")
        file = run / "predictions/ucf101.npz"
        with np.load(file) as archive:
            good = dict(archive)
        for wrong in (
            {"label": good["label"][:2]},
            {"label": good["label"] + 9999},
            {"scores": good["scores"][:, :2]},
            {"scores": good["scores"] * np.nan},
            {"scores": good["scores"].astype(str)},
            {"path": np.arange(4)},
            {"segment": np.zeros((4, 3))},
        ):
            np.savez(file, **(good | wrong))
            with self.subTest(wrong):
                self.assertNotIn("Confusion matrix", self.report(run))
                self.assertRegex(self.errors, "^warning: .*ucf101.npz.*left out")

    def test_refused(self):
        run, empty = write_run(self.folder / "a"), self.folder / "empty"
        empty.mkdir()
        summary = (run / "summary.json").read_bytes()
        for runs, out, named in (
            (empty, "x.html", "summary.json"),
            (self.folder / "none", "x.html", "none"),
            (run, run / "summary.json", "--out"),
            (run, self.folder, "--out"),
            (run, "/nowhere/x.html", "--out"),
        ):
            with self.subTest(out=out), self.assertRaisesRegex(UserError, named):
                call_command("report", runs, "--out", self.folder / out)
        self.assertEqual((run / "summary.json").read_bytes(), summary)

    @unittest.skipIf(CHROMIUM is None, "no browser: apt-get install chromium")
    def test_in_a_browser(self):
        """Light and dark, wide and narrow: every figure is drawn, nothing is wider than the page, and the console is silent."""
        self.report(write_run(self.folder / "a"))
        for dark in (False, True):
            for width in (1200, 390):
                seen, console = probe(self.folder / "report.html", width, dark)
                self.assertGreaterEqual(seen["figures"], 10)
                self.assertEqual((seen["broken"], seen["narrow"], max(0, seen["wide"])), (0, 0, 0), (dark, width, seen))
                self.assertEqual(seen["page"], "rgb(22, 24, 27)" if dark else "rgb(255, 255, 255)")
                self.assertEqual(seen["ink"], "rgb(230, 230, 230)" if dark else "rgb(34, 34, 34)")
                self.assertEqual(console, [])


class Figures(unittest.TestCase):
    def test_most_confident_mistakes(self):
        shares = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.05, 0.95]], np.float32)
        predictions = Predictions(
            np.arange(4), np.array([1, 1, 1, 0]), np.log(shares), [*"abcd"], class_names=["x", "y"]
        )
        lists = [[mistake.path for mistake in found] for found in figures.mistakes(predictions, 1, {}).values()]
        self.assertEqual(lists, [["d"]])
        (found,) = figures.mistakes(predictions, 9, {}).values()
        self.assertEqual([mistake.path for mistake in found], ["d", "a", "b"])
        self.assertEqual(found[0].clip, "")
        self.assertEqual(found[0].caption, "<b>x</b>, 5 %, taken for <b>y</b>, 95 %")
        bars = figures.class_accuracy(predictions)
        self.assertLess(bars.index("0 of 1"), bars.index("1 of 3"))

    def test_mistakes_with_several_classes(self):
        label = np.array([[1, 0], [np.nan, 1], [0, 0]], np.float32)
        scores = np.array([[-2, -9], [9, 3], [1, -3]], np.float32)
        names = ["<b>", "y"]
        predictions = Predictions(np.arange(3), label, scores, [*"abc"], class_names=names, label_type="multi_label")
        missed, invented = figures.mistakes(predictions, 2, {}).values()
        self.assertEqual(
            [(own.path, own.caption) for own in missed], [("a", "<b>&lt;b&gt;</b>, 12 %"), ("b", "<b>y</b>, 95 %")]
        )
        self.assertEqual([own.caption for own in invented], ["<b>&lt;b&gt;</b>, 73 %", "<b>y</b>, 5 %"])
        self.assertNotIn("<b>", figures.class_precision(predictions))

    def test_mistakes_with_numbers(self):
        """In deviations of the target: a metre is more than a millimetre."""
        label = np.array([[1, 1000], [2, 2000], [3, np.nan]], np.float32)
        values = label + np.array([[0.1, 0], [0, 900], [1.5, 5]], np.float32)
        names = ["<b>", "mm"]
        predictions = Predictions(np.arange(3), label, values, [*"abc"], class_names=names, label_type="regression")
        (found,) = figures.mistakes(predictions, 3, {}).values()
        self.assertEqual([own.path for own in found], ["c", "b", "a"])
        self.assertEqual(found[1].caption, "mm <b>2000</b>, predicted 2900")
        self.assertNotIn("<b>", figures.values(predictions) + figures.errors(predictions))

    def test_curves(self):
        """A long curve ends with its last value; a run has its colour in every figure."""
        runs = [Run(name, RunDir(name), {}, {}) for name in "abc"]
        for run in runs:
            steps = range(2 * MAX_POINTS + 1)
            run.lines = [{"event": "step", "phase": "train", "step": step, "loss": 1.0} for step in steps]
        self.assertEqual(runs[0].curve("step", "train", "loss")[-1], (2 * MAX_POINTS, 1.0))
        runs[0].lines = runs[0].lines[:1]
        self.assertFalse(figures.curves(runs[:1], ("step", "train", "loss"), "loss", runs), "one value is no curve")
        drawn = figures.curves(runs[1:2], ("step", "train", "loss"), "loss", runs)
        self.assertEqual([colour in drawn for colour in figures.COLORS[:3]], [False, True, False])


class PaperTable(unittest.TestCase):
    def run_of(self, name: str, start: str | None, task: str, trunk: str, top1: float, **settings: object) -> Run:
        facts = {"pretrained": start, "sources": task.split("+"), "trunk": trunk}
        summary = {"run": facts, "last": {"val_top1": top1}, "status": "finished", "epochs": 3}
        return Run(name, RunDir(f"/nowhere/{name}"), summary, settings)

    def test_tasks_ways_and_seeds(self):
        runs = [
            self.run_of("a", "runs/align", "ucf101", "trained", 80.0, **{"trainer.seed_value": 1}),
            self.run_of("b", "runs/align", "ucf101", "trained", 90.0, **{"trainer.seed_value": 2}),
            self.run_of("c", "runs/align", "ucf101", "frozen", 50.0, lr=1),
            self.run_of("c2", "runs/align", "ucf101", "frozen", 40.0, lr=2),
            self.run_of("d", None, "ucf101", "trained", 60.0),
            self.run_of("e", "runs/align + runs/nohuman", "hmdb51", "frozen average", 40.0),
        ]
        table = paper_table(runs)
        self.assertEqual(table.columns, [("ucf101", "FT"), ("ucf101", "LP"), ("hmdb51", "LP")])
        ft, lp, other = table.columns
        self.assertEqual(table.rows, {
            "align": {ft: ("85.0 (mean of 2)", True), lp: ("50.0 (best of 2)", True)},
            "nothing": {ft: ("60.0", False)},
            "align + nohuman (average)": {other: ("40.0", True)},
        })  # fmt: skip
        self.assertIsNone(paper_table(runs[:1]))

    def test_every_finished_run_counts(self):
        """Runs that others start from, too, and those on several sources; none that has not trained to its end."""
        start = self.run_of("start", None, "ucf101", "trained", 85.7)
        later = self.run_of("later", "runs/start", "ucf101", "trained", 42.9)
        both = self.run_of("both", None, "ucf101+hmdb51", "trained", 30.0)
        table = paper_table([start, later, both])
        one, several = table.columns
        self.assertEqual((one, several), (("ucf101", "FT"), ("ucf101 + hmdb51", "FT")))
        cells = {"nothing": {one: ("85.7", True), several: ("30.0", True)}, "start": {one: ("42.9", False)}}
        self.assertEqual(table.rows, cells)
        for facts in ({"status": "running"}, {"status": "interrupted"}, {"status": "failed"}, {"epochs": 0}):
            better = self.run_of("better", None, "ucf101", "trained", 99.0)
            better.summary |= facts
            table = paper_table([start, later, better])
            self.assertEqual((table.rows["nothing"][one], table.left_out), (("85.7", True), ["better"]), facts)

    def test_equal_names_of_other_weights(self):
        runs = [self.run_of(name, "vit.pt", "ucf101", "trained", 80.0) for name in "ab"]
        for digests, starts in (("00", ["vit.pt"]), ("01", ["vit.pt (0)", "vit.pt (1)"])):
            for run, digest in zip(runs, digests, strict=True):
                run.pretrained = [{"path": "/data/vit.pt", "sha256": digest}]
            self.assertEqual(list(paper_table(runs).rows), starts)


class Collected(Folder):
    def test_names_and_differences(self):
        for name, top1 in (("x/sweep/a", 1), ("x/sweep/b", 2), ("y/a", 3)):
            write_run(self.folder / name, top1)
        runs = find_runs([self.folder / "x", self.folder / "y"])
        self.assertEqual([run.name for run in runs], ["x/sweep/a", "x/sweep/b", "y/a"])
        self.assertEqual(find_differing_settings(runs), {"lr_scale_factor": ["1", "2", "3"]})
        self.assertEqual([run.name for run in find_runs([self.folder / "y/a"])], ["a"])


if __name__ == "__main__":
    unittest.main()
