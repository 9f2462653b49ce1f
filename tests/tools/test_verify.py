"""`omnivision verify`: an untouched run holds; altered numbers are wrong; altered weights and data are told apart from them."""

import csv
import json
import os
import shutil
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path

import numpy as np

from omnivision.config.validate import read_run_config
from omnivision.reporting.predictions import Predictions, read_predictions, write_predictions
from omnivision.tools.main import main
from omnivision.tools.verify import EXIT_CHANGED, EXIT_WRONG
from omnivision.training.verify import metric_claims, sum_losses
from tests import stage_runs as stages


def alter_summary(run: Path, data: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["last"]["val_top1"] += 1
    (run / "summary.json").write_text(json.dumps(summary))


def alter_log(run: Path, data: Path) -> None:
    file = run / "logs" / "metrics.jsonl"
    *lines, last = file.read_text().splitlines()
    line = json.loads(last)
    line["top1"] += 1
    file.write_text("\n".join([*lines, json.dumps(line)]) + "\n")


def alter_scores(run: Path, data: Path) -> None:
    """A prediction that the metrics do not show: the order of the classes stays."""
    predictions = read_predictions(run / "predictions" / "ucf101.npz")
    predictions.scores[0] *= 2
    write_predictions(run / "predictions", "ucf101", predictions)


def alter_table(run: Path, data: Path) -> None:
    file = run / "predictions" / "ucf101.csv"
    file.write_text(file.read_text().replace("1.mp4", "7.mp4", 1))


def forge(run: Path, data: Path, keep: slice, forged: Callable[[Predictions], None] = lambda predictions: None) -> None:
    """Alter predictions, and make table, summary and log fit them."""
    predictions = read_predictions(run / "predictions" / "ucf101.npz")
    predictions = Predictions(
        predictions.index[keep], predictions.label[keep], predictions.scores[keep], predictions.paths[keep],
        class_names=predictions.class_names,
    )  # fmt: skip
    forged(predictions)
    write_predictions(run / "predictions", "ucf101", predictions)
    summary = json.loads((run / "summary.json").read_text())
    (run / "logs" / "metrics.jsonl").unlink()
    found = metric_claims({"last": {}}, {"ucf101": predictions}, read_run_config(run / "config.yaml"))
    summary["last"] |= {f"val_{claim.what.split()[0]}": float(claim.found) for claim in found}
    (run / "summary.json").write_text(json.dumps(summary))


def forge_scores(run: Path, data: Path) -> None:
    def forged(predictions: Predictions) -> None:
        predictions.scores[:] = 9 * (np.arange(predictions.scores.shape[1]) == predictions.label[:, None])

    forge(run, data, slice(None), forged)


def forge_labels(run: Path, data: Path) -> None:
    def forged(predictions: Predictions) -> None:
        predictions.label[:] = predictions.scores.argmax(1)

    forge(run, data, slice(None), forged)


def forge_paths(run: Path, data: Path) -> None:
    forge(run, data, slice(None), lambda predictions: predictions.paths.reverse())


def leave_out_videos(run: Path, data: Path) -> None:
    forge(run, data, slice(1, None))


def alter_marks(run: Path, data: Path) -> None:
    """The column that says which predictions are correct."""
    file = run / "predictions" / "ucf101.csv"
    rows = list(csv.reader(file.read_text().splitlines()))
    column = rows[0].index("correct")
    lines = [rows[0], *([*row[:column], str(1 - int(row[column])), *row[column + 1 :]] for row in rows[1:])]
    file.write_text("".join(f"{','.join(row)}\n" for row in lines))


def alter_index(run: Path, data: Path) -> None:
    predictions = read_predictions(run / "predictions" / "ucf101.npz")
    predictions.index += 1000
    write_predictions(run / "predictions", "ucf101", predictions)


def break_summary(run: Path, data: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["last"]["val_top1"], summary["best"] = "100", "abc"
    (run / "summary.json").write_text(json.dumps(summary))


def break_table(run: Path, data: Path) -> None:
    (run / "predictions" / "ucf101.csv").write_bytes(b"\xff\xfe" * 9)


def swap_checkpoints(run: Path, data: Path) -> None:
    """Those of another seed, with their manifests."""
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(run.parent / "other" / "checkpoints", run / "checkpoints")


def alter_checkpoint(run: Path, data: Path) -> None:
    for name in ("checkpoint.pt", "best.pt"):
        file = run / "checkpoints" / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.unlink()
        file.write_bytes(content)


def alter_labels(run: Path, data: Path) -> None:
    labels = np.load(data / "ucf101_val_labels.npy")
    np.save(data / "ucf101_val_labels.npy", labels[::-1])


def replace_video(run: Path, data: Path) -> None:
    shutil.copy(data / "videos" / "1.mp4", data / "videos" / "0.mp4")


def replace_video_unnoticed(run: Path, data: Path) -> None:
    replace_video(run, data)
    os.utime(data / "videos" / "0.mp4", (1, 1))


def remove_checkpoints(run: Path, data: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def remove_labels(run: Path, data: Path) -> None:
    (data / "ucf101_val_labels.npy").unlink()


def remove_predictions(run: Path, data: Path) -> None:
    shutil.rmtree(run / "predictions")


def alter_unvalidated(run: Path, data: Path) -> None:
    remove_predictions(run, data)
    alter_checkpoint(run, data)


class Verify(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.data, cls.run_folder = cls.folder / "data", cls.folder / "run"
        paths = stages.write_videos(cls.data / "videos", 6)
        overrides = [
            word for which in ("train", "val") for word in stages.write_split(cls.data, "ucf101", which, paths)
        ]
        settings = [*overrides, "pretrained_checkpoint_path=null", "epochs=2", "lr=0.01"]
        for folder, seed in ((cls.run_folder, []), (cls.folder / "other", ["trainer.seed_value=2"])):
            result = stages.run_in_process(stages.command("ft", folder, *settings, *seed))
            assert result.returncode == 0, result.stderr
        cls.original = cls.folder / "original"
        shutil.copytree(cls.data, cls.original)

    def check(self, alter: Callable[[Path, Path], None] | None) -> tuple[int, dict[str, str]]:
        """Return the exit code and the verdict of each claim, after a change to a copy of the run and to its data."""
        run = self.folder / "copy"
        shutil.copytree(self.run_folder, run)
        try:
            if alter is not None:
                alter(run, self.data)
            code = main(["verify", str(run), "--all", "--json", str(self.folder / "claims.json")])
        finally:
            shutil.rmtree(run)
            shutil.rmtree(self.data)
            shutil.copytree(self.original, self.data)
        return code, {
            claim["what"]: claim["verdict"] for claim in json.loads((self.folder / "claims.json").read_text())
        }

    def test_an_untouched_run_holds(self) -> None:
        code, verdicts = self.check(None)
        self.assertEqual((code, set(verdicts.values())), (0, {"holds"}), verdicts)
        self.assertIn("predictions of ucf101, from weights and data", verdicts)

    def test_wrong_numbers(self) -> None:
        for alter, claim in (
            (alter_summary, "top1 of the summary, from the predictions"),
            (alter_log, "top1 of the summary, from the log"),
            (alter_scores, "predictions of ucf101, from weights and data"),
            (alter_table, "ucf101.csv"),
            (forge_labels, "paths and labels of ucf101"),
            (forge_paths, "paths and labels of ucf101"),
            (forge_scores, "loss of the summary, from checkpoint.pt"),
            (leave_out_videos, "videos without a prediction in ucf101"),
            (alter_marks, "ucf101.csv"),
            (alter_index, "paths and labels of ucf101"),
            (break_summary, "best top1 of the summary, from the log"),
            (break_table, "ucf101.csv"),
            (replace_video_unnoticed, "predictions of ucf101, from weights and data"),
        ):
            with self.subTest(alter.__name__):
                code, verdicts = self.check(alter)
                self.assertEqual((code, verdicts[claim]), (EXIT_WRONG, "wrong"), verdicts)

    def test_changed_weights_and_data(self) -> None:
        for alter, claim in (
            (alter_checkpoint, "checkpoint.pt"),
            (swap_checkpoints, "loss of the summary, from checkpoint.pt"),
            (alter_labels, "datasets.ucf101.val.labels"),
            (replace_video, "predictions of ucf101, from weights and data"),
        ):
            with self.subTest(alter.__name__):
                code, verdicts = self.check(alter)
                self.assertEqual((code, verdicts[claim]), (EXIT_CHANGED, "changed"), verdicts)

    def test_missing_files_cannot_be_checked(self) -> None:
        for alter, claim in (
            (remove_checkpoints, "checkpoint.pt"),  # those of the run that was copied do not count
            (remove_labels, "datasets.ucf101.val.labels"),
        ):
            with self.subTest(alter.__name__):
                code, verdicts = self.check(alter)
                self.assertEqual((code, verdicts[claim]), (0, "unchecked"), verdicts)
                self.assertEqual(verdicts["predictions"], "unchecked", verdicts)

    def test_a_run_that_has_not_validated(self) -> None:
        for alter, expected in ((remove_predictions, (0, "holds")), (alter_unvalidated, (EXIT_CHANGED, "changed"))):
            code, verdicts = self.check(alter)
            self.assertEqual((code, verdicts["checkpoint.pt"]), expected, verdicts)
            self.assertEqual(verdicts["predictions"], "unchecked")
            self.assertEqual("datasets.ucf101.val.labels" in verdicts, expected[0] == 0)

    def test_checkpoints_elsewhere(self) -> None:
        run, saved = self.folder / "split_up", self.folder / "saved"
        settings = [f"trainer.checkpoint.save_dir={saved}", "pretrained_checkpoint_path=null"]
        data = [word for which in ("train", "val") for word in self.lists(which)]
        result = stages.run_in_process(stages.command("ft", run, *data, *settings))
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(main(["verify", str(run), "--json", str(self.folder / "claims.json")]), 0)
        claims = json.loads((self.folder / "claims.json").read_text())
        self.assertEqual({claim["verdict"] for claim in claims}, {"holds"}, claims)

    def lists(self, which: str) -> list[str]:
        paths = [str(path) for path in sorted((self.data / "videos").glob("*.mp4"))]
        return stages.write_split(self.data, "ucf101", which, paths)

    def test_videos_without_a_label_count_in_no_metric(self) -> None:
        scores = np.array([[2, 0, 0], [0, 3, 0], [0, 0, 4]], np.float32)
        part = Predictions(np.arange(3), np.array([0, -1, 1]), scores, ["a.mp4", "b.mp4", "c.mp4"])
        sums, videos = sum_losses(part, read_run_config(self.run_folder / "config.yaml"), "ucf101")
        self.assertEqual((videos, sums["top1"], sums["top5"]), (2, 100.0, 200.0))

    def test_no_run(self) -> None:
        self.assertEqual(main(["verify", str(self.data)]), 1)


if __name__ == "__main__":
    unittest.main()
