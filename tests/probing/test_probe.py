"""`omnivision probe`: from runs and folders of features to a table, JSON, and errors."""

import io
import json
import shutil
import unittest
from contextlib import redirect_stderr, redirect_stdout

import numpy as np

from omnivision.checkpoint.inference_config import InferenceConfig
from omnivision.reporting.run_directory import RunDir
from omnivision.tools.main import main
from omnivision.tools.report.collect import find_runs, probe_tables
from tests import stage_runs as stages
from tests import tiny_models as tiny


class Probe(tiny.WeightsCase):
    def setUp(self):
        super().setUp()
        paths = stages.write_videos(self.folder / "videos", 24)
        self.model = self.save_run(
            tiny.classifier(3), "run/checkpoints/best.pt", inference=InferenceConfig(clip_duration=0.5).model_dump()
        )
        self.write_catalog(paths[:15], paths[15:])

    def write_catalog(self, train, val, train_labels=None, val_labels=None):
        lines = ["datasets:", "  set:", "    num_classes: 4"]
        for which, paths, labels in (("train", train, train_labels), ("val", val, val_labels)):
            np.save(self.folder / f"{which}_paths.npy", np.array(paths))
            np.save(
                self.folder / f"{which}_labels.npy",
                np.arange(len(paths)) % 3 if labels is None else np.array(labels),
            )
            lines.append(
                f"    {which}: {{paths: {self.folder}/{which}_paths.npy, labels: {self.folder}/{which}_labels.npy}}"
            )
        self.catalog = self.folder / "catalog.yaml"
        self.catalog.write_text("\n".join(lines) + "\n")

    def call(self, *words):
        """Return the exit code, and what was printed."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main(["probe", *map(str, words)])
        return code, out.getvalue(), err.getvalue()

    def probe(self, *words):
        common = "--catalog", self.catalog, "--workers", 0, "--crops", 1, "--clips", 1
        return self.call(*words, *common)

    def test_run_and_random_weights(self):
        out = self.folder / "board.json"
        code, text, errors = self.probe(self.folder / "run", "random", "--data", "set", "--out", out)
        self.assertEqual(code, 0, errors)
        self.assertIn("set: 15 training, 9 validation videos", text)
        rows = json.loads(out.read_text())
        self.assertEqual([row["model"]["name"] for row in rows], ["run", "random"])
        methods = [result["method"] for result in rows[0]["results"]]
        self.assertEqual(methods, ["knn", "logistic", "linear", "1-shot", "5-shot", "1%", "10%"])
        (folder, _) = sorted((self.folder / "run" / "features").iterdir())
        again = self.call(folder, "--methods", "knn")
        self.assertEqual(again[0], 0, again[2])
        self.assertEqual(json.loads((folder / "probe.json").read_text())[0]["results"], rows[0]["results"][:1])

    def test_a_report_names_views_that_differ(self):
        RunDir(self.folder / "run").write_summary(status="finished", run={})
        (self.folder / "run" / "config.yaml").write_text("{}")
        data = "--data", "set", "--catalog", self.catalog, "--workers", 0, "--methods", "knn"
        self.assertEqual(self.call(self.folder / "run", "random", *data, "--crops", 1, "--clips", 1)[0], 0)
        names = {row[0] for row in probe_tables(find_runs([self.folder / "run"]))[0].rows}
        self.assertEqual(names, {"run, random", "run"})
        self.assertEqual(self.call(self.folder / "run", *data, "--crops", 3, "--clips", 2)[0], 0)
        names = {row[0] for row in probe_tables(find_runs([self.folder / "run"]))[0].rows}
        self.assertEqual(names, {"run, random (1 clip x 1 crop)", "run (2 clips x 3 crops)"})

    def test_invalid_input(self):
        paths = np.load(self.folder / "train_paths.npy").tolist()
        val = np.load(self.folder / "val_paths.npy").tolist()
        run = self.folder / "run"
        for wanted, words in {
            "--data must name": [run],
            "random must follow": ["random", "--data", "set"],
            "did you mean": [run, "--data", "sett"],
            "There is no file": [self.folder / "nothing", "--data", "set"],
            "which does not exist": [self.folder / "nothing"],
            "in an existing folder": [run, "--data", "set", "--out", self.folder / "nothing" / "board.json"],
        }.items():
            code, _, errors = self.probe(*words)
            self.assertEqual(code, 1, wanted)
            self.assertIn(wanted, errors)
        for wanted, labels in {
            "only label 1": ([1] * 15, None),
            "no labels": ([-1] * 15, None),
            "share no class": ([0, 1] * 7 + [0], [2, 3] * 4 + [2]),
        }.items():
            with self.subTest(wanted):
                self.write_catalog(paths, val, *labels)
                shutil.rmtree(run / "features", ignore_errors=True)
                code, _, errors = self.probe(run, "--data", "set")
                self.assertEqual(code, 1)
                self.assertIn(wanted, errors)
        self.write_catalog(paths, val, None, [3] * 5 + [0] * 4)
        shutil.rmtree(run / "features")
        code, _, errors = self.probe(run, "--data", "set", "--methods", "knn")
        self.assertEqual(code, 0, errors)
        self.assertIn("5 validation videos are of 1 classes without a training video", " ".join(errors.split()))
        (folder,) = (run / "features").iterdir()
        original = {what: np.load(folder / "set" / "train" / f"{what}.npy") for what in ("features", "labels")}
        for wanted, what, change in (
            ("holds float64", "labels", lambda array: array + 0.5),
            ("holds float64", "features", lambda array: array.astype(np.float64)),
            ("says 15 rows, 1 layers", "features", lambda array: array[:, None]),
            ("same features for all", "features", np.zeros_like),
        ):
            np.save(folder / "set" / "train" / f"{what}.npy", change(original[what]))
            code, _, errors = self.call(folder)
            self.assertEqual(code, 1, wanted)
            self.assertIn(wanted, " ".join(errors.split()))
            np.save(folder / "set" / "train" / f"{what}.npy", original[what])


if __name__ == "__main__":
    unittest.main()
