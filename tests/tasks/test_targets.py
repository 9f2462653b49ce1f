"""Several classes per video, and numbers: losses, metrics, and runs from lists to predictions."""

import csv
import json
import unittest
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import omnivision
from omnivision.data.batch import Batch, Sample, collate
from omnivision.data.catalog import Dataset, LabelSets, Split
from omnivision.data.groups import stratify
from omnivision.data.mixing import MixupCutmix
from omnivision.reporting.predictions import draw_predictions, read_predictions
from omnivision.tasks.metrics import average_precisions, expected_precisions, prediction_metrics, regression_errors
from omnivision.tasks.multi_label import MultiLabel
from omnivision.tasks.regress import Regress
from omnivision.tools.timeline import Timeline
from omnivision.utils.errors import UserError
from tests import fixtures, runs
from tests import stage_runs as stages

NAN = float("nan")
SETS = LabelSets([3], {"a": 0}, [([1.0, 10.0, 0.0], [2.0, 5.0, 1.0])])


def batch(label: torch.Tensor) -> Batch:
    video = torch.rand((len(label), 3, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    return Batch(video, label, torch.arange(len(label)), "a", [""] * len(label))


class Model:
    """Gives fixed logits, and remembers the pixels."""

    def __init__(self, count: int) -> None:
        self.logits = torch.randn((count, 3), generator=torch.Generator().manual_seed(1))

    def __call__(self, video, head, depth):
        self.video = video
        return self.logits


class Loss(unittest.TestCase):
    def test_unknown_targets_and_samples_do_not_count(self) -> None:
        label = torch.tensor([[1.0, 0.0, NAN], [NAN, NAN, NAN], [0.0, 1.0, 1.0]])
        model = Model(3)
        found = MultiLabel(SETS).training_step(model, batch(label))
        each = F.binary_cross_entropy_with_logits(model.logits, label.nan_to_num(), reduction="none")
        torch.testing.assert_close(found.loss, (each[0, :2].mean() + each[2].mean()) / 2)
        self.assertEqual(int(found.count), 2)
        torch.testing.assert_close(MultiLabel(SETS).evaluation_step(model, batch(label)).loss, found.loss)

    def test_gradients_of_unknown_targets_are_zero(self) -> None:
        for task in (MultiLabel(SETS), Regress(SETS)):
            model = Model(2)
            model.logits.requires_grad_()
            task.training_step(model, batch(torch.tensor([[1.0, NAN, 0.0], [NAN, NAN, NAN]]))).loss.backward()
            zero = model.logits.grad == 0
            self.assertEqual(zero.tolist(), [[False, True, False], [True, True, True]])

    def test_targets_are_mixed_as_their_pixels(self) -> None:
        label = torch.tensor([[1.0, 0.0, NAN], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
        for mixing in (MixupCutmix(cutmix_alpha=0), MixupCutmix(mixup_alpha=0)):
            torch.manual_seed(1)
            lam, _ = mixing.draw(4, 4, np.random.default_rng(torch.initial_seed()))
            self.assertLess(lam, 1)
            model = Model(4)
            found = MultiLabel(SETS, mixing).training_step(model, batch(label))
            target = (label * lam + label.flip(0) * (1 - lam)) * 0.9 + 0.05
            each = F.binary_cross_entropy_with_logits(model.logits, target.nan_to_num(), reduction="none")
            known = target.isfinite()
            self.assertEqual(known.sum().item(), 10)  # unknown in one of two: unknown in both mixtures
            torch.testing.assert_close(found.loss, (torch.where(known, each, 0).sum(1) / known.sum(1)).mean())
            self.assertFalse(torch.equal(model.video, batch(label).video))

    def test_regression_is_in_the_units_of_the_targets(self) -> None:
        label, model = torch.tensor([[3.0, 0.0, NAN], [1.0, 10.0, 2.0]]), Model(2)
        found = Regress(SETS).evaluation_step(model, batch(label))
        wanted = (label - torch.tensor([1.0, 10.0, 0.0])) / torch.tensor([2.0, 5.0, 1.0])
        each = (model.logits - wanted) ** 2
        torch.testing.assert_close(found.loss, (each[0, :2].mean() + each[1].mean()) / 2)
        torch.testing.assert_close(
            found.scores, model.logits * torch.tensor([2.0, 5.0, 1.0]) + torch.tensor([1.0, 10.0, 0.0])
        )

    def test_numbers_are_not_smoothed(self) -> None:
        with self.assertRaisesRegex(UserError, "label_smoothing must be 0"):
            Regress(SETS, MixupCutmix())
        Regress(SETS, MixupCutmix(label_smoothing=0.0))

    def test_micro_batches_add_up(self) -> None:
        """Mixed with partners from the whole batch: the sums are those of one batch."""
        label = torch.randint(0, 2, (8, 3), generator=torch.Generator().manual_seed(2)).float()
        label[3] = NAN
        whole, task = batch(label), MultiLabel(SETS, MixupCutmix())

        class Mean:
            def __call__(self, video, head, depth):
                return video.flatten(1)[:, :3]

        sums = []
        for parts in (1, 2, 4):
            torch.manual_seed(5)
            outputs = [task.training_step(Mean(), piece) for piece in whole.split(parts)]
            sums.append(sum(float(output.sums["loss"]) for output in outputs))
        np.testing.assert_allclose(sums, sums[0], rtol=1e-5)


class Metrics(unittest.TestCase):
    def test_average_precision_is_its_definition(self) -> None:
        """The mean, over the positives, of the precision among all videos that score at least as high."""
        rng = np.random.default_rng(0)
        label = rng.integers(0, 2, (40, 5)).astype(np.float32)
        label[:, 3], label[::3, 1] = 0, np.nan
        scores = rng.integers(0, 6, (40, 5)).astype(np.float32)  # with ties
        found = average_precisions(label, scores)
        for k in (0, 1, 2, 4):
            known = np.isfinite(label[:, k])
            own, score = label[known, k], scores[known, k]
            each = [own[score >= score[v]].mean() for v in np.flatnonzero(own == 1)]
            self.assertAlmostEqual(found[k], np.mean(each), places=6)
        self.assertTrue(np.isnan(found[3]))
        self.assertAlmostEqual(
            prediction_metrics("multi_label", label, scores)["map"], 100 * np.nanmean(found), places=6
        )

    def test_guessing(self) -> None:
        """The expected average precision of random scores, which is far above the share of a rare class."""
        rng = np.random.default_rng(1)
        label = np.zeros((24, 3), np.float32)
        label[:1, 0], label[:7, 1] = 1, 1
        drawn = np.mean([average_precisions(label, rng.random((24, 3))) for _ in range(1500)], axis=0)
        np.testing.assert_allclose(expected_precisions(label)[:2], drawn[:2], rtol=0.06)
        self.assertTrue(np.isnan(expected_precisions(label)[2]))

    def test_errors_are_numpys(self) -> None:
        rng = np.random.default_rng(2)
        label, values = rng.normal(size=(30, 3)), rng.normal(size=(30, 3))
        label[4:9, 1], values[:, 2] = np.nan, 7
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = regression_errors(label, values)
        known = np.isfinite(label[:, 1])
        self.assertAlmostEqual(found["pearson"][1], np.corrcoef(label[known, 1], values[known, 1])[0, 1])
        self.assertAlmostEqual(found["mae"][1], np.abs(label[known, 1] - values[known, 1]).mean())
        self.assertAlmostEqual(found["rmse"][0], np.sqrt(((label[:, 0] - values[:, 0]) ** 2).mean()))
        self.assertTrue(np.isnan(found["pearson"][2]), "one side does not vary")
        values[0, 0] = np.inf
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            diverged = regression_errors(label, values)
        self.assertEqual(np.isfinite(diverged["mae"]).tolist(), [False, True, True], "not silently left out")
        self.assertTrue(np.isnan(average_precisions((label > 0).astype(float), values)[0]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            nothing = prediction_metrics("regression", np.full((3, 2), np.nan), np.ones((3, 2)))
        self.assertTrue(all(np.isnan(value) for value in nothing.values()))


class Labels(fixtures.Folder):
    def split(self, labels: np.ndarray, label_type: str, **more: object) -> Split:
        np.save(self.folder / "p.npy", np.array([f"{k}.mp4" for k in range(len(labels))]))
        np.save(self.folder / "l.npy", labels)
        files = {"paths": str(self.folder / "p.npy"), "labels": str(self.folder / "l.npy")}
        return Split(Dataset(name="a", label_type=label_type, train=files, **more), "train")

    def test_labels_of_samples(self) -> None:
        split = self.split(np.array([[1, -1], [0, 1]], np.int8), "multi_label", num_classes=2)
        np.testing.assert_array_equal(split.label(0), np.array([1, np.nan], np.float32))
        self.assertEqual(split.label_counts(), [1, 1])
        split = self.split(np.array([[1.5, np.nan]]), "regression", num_classes=2)
        np.testing.assert_array_equal(split.label(0), np.array([1.5, np.nan], np.float32))
        self.assertEqual((split.label_counts(), split.has_labels()), ([], True))
        self.assertFalse(self.split(np.full((3, 1), np.nan), "regression").has_labels())
        self.assertFalse(self.split(np.full((3, 1), -1), "multi_label").has_labels())

    def test_bad_arrays(self) -> None:
        cases = (
            (np.zeros(4, np.int64), "multi_label", {}, "for each sample a row of 1, 0 or -1"),
            (np.zeros((4, 2), np.int64), "class", {}, "integers, one label per sample"),
            (np.zeros((4, 2), np.int64), "regression", {}, "floating-point numbers"),
            (np.zeros((4, 2)), "multi_label", {}, "a row of 1, 0 or -1"),
            (np.full((4, 2), 3), "multi_label", {}, "holds 3 in row 0, column 0"),
            (np.full((4, 2), np.inf), "regression", {}, "holds inf in row 0"),
            (np.zeros((4, 2), np.int64), "multi_label", {"num_classes": 3}, "2 columns, and .*num_classes is 3"),
            (np.zeros((4, 0), np.int64), "multi_label", {}, "one column per class"),
        )
        for labels, label_type, more, message in cases:
            with self.assertRaisesRegex(UserError, message):
                self.split(labels, label_type, **more)

    def test_a_batch_has_a_row_for_each_view(self) -> None:
        video = torch.zeros((2, 3, 1, 2, 2), dtype=torch.uint8)
        labels = np.array([[1, 0], [0, np.nan]], np.float32)
        found = collate([Sample(video, None, label, "a", k, "") for k, label in enumerate(labels)])
        np.testing.assert_array_equal(found.label, labels[[0, 0, 1, 1]])
        self.assertEqual(found.label.dtype, torch.float32)

    def test_rare_classes_spread_over_held_out_parts(self) -> None:
        labels = np.array([[1, 1], [1, 0], [1, 0], [0, 0], [-1, -1]], np.int8)
        self.assertEqual(stratify(labels).tolist(), [1, 0, 0, -1, -1])
        self.assertEqual(stratify(labels.astype(float)).tolist(), [0] * 5)
        self.assertEqual(stratify(np.array([3, -1])).tolist(), [3, -1])


class Timelines(unittest.TestCase):
    times = np.array([(k, k + 2.0) for k in range(4)])

    def test_several_classes_may_be_present(self) -> None:
        probabilities = np.array([(1, 0, 0), (0.5, 1, 0), (0, 1, 0.4), (1, 0, 0)], np.float32)
        line = Timeline(self.times, probabilities, 5.0, ["a", "b", "c"], "multi_label")
        found = [(own.name, own.start, own.end) for own in line.segments()]
        self.assertEqual(found, [("a", 0, 2.5), ("b", 1.5, 3.5), ("a", 3.5, 5)])
        self.assertEqual(line.draw("x").size, (1200, 360))

    def test_numbers(self) -> None:
        line = Timeline(self.times, np.arange(8, dtype=np.float32).reshape(4, 2), 5.0, ["a", "b"], "regression")
        rows = list(csv.reader(line.to_csv(1).splitlines()))
        self.assertEqual((rows[0], rows[2]), (["start", "end", "a", "b"], ["1.000", "3.000", "2", "3"]))
        self.assertEqual(line.to_json(1)["windows"][1]["predictions"][1], {"name": "b", "label": 1, "value": 3.0})
        self.assertEqual((line.segments(), line.draw("x").size), ([], (1200, 360)))


class Run(fixtures.Folder):
    """From a list to predictions: prepare, train, resume, evaluate on two ranks, verify, predict, report."""

    def prepare(self, header: str, rows: list[str], *words: str) -> list[str]:
        self.paths = stages.write_videos(self.folder / "videos", 12)
        for which, part in (("train", rows), ("val", rows[:9])):
            lines = [f"{k}.mp4,{row}" for k, row in enumerate(part)]
            (self.folder / f"{which}.csv").write_text("\n".join([header, *lines]) + "\n")
        words = ("--name", "mine", "--train", self.folder / "train.csv", "--val", self.folder / "val.csv", *words)
        catalog = self.folder / "site" / "experiments" / "mine.yaml"
        catalog.parent.mkdir(parents=True, exist_ok=True)
        code, *_ = runs.call_command(
            "prepare", self.folder / "videos", self.folder / "out", *words, "--catalog", catalog
        )
        self.assertEqual(code, 0)
        (self.folder / "site" / "trainer").mkdir()
        recipe = f"defaults: [data: labelled_video, task: {self.task}, /experiments/mine, _self_]\n"
        recipe += "data: {sources: {mine: '${datasets.mine}'}}\n"
        (self.folder / "site" / "trainer" / "mae_ft_mine_config.yaml").write_text(recipe)
        return ["--config-dir", str(self.folder / "site"), "pretrained_checkpoint_path=null", "epochs=2"]

    @property
    def last(self) -> Path:
        """The weights of the last evaluation; best.pt may be of an earlier one."""
        return self.folder / "one" / "checkpoints" / "checkpoint.pt"

    def run_stage(self, name: str, *more: str, stage: str = "ft") -> stages.Result:
        result = stages.run_in_process(stages.command(stage, self.folder / name, *more, dataset="mine"))
        self.assertEqual(result.returncode, 0, result.stderr[-2000:] + result.stdout[-500:])
        return result

    def check_run(self, common: list[str], metric: str) -> None:
        """Two ranks give the metrics of one; what the run says is recomputed; the report and the pictures can be made."""
        out = self.run_stage("one", *common)
        last = runs.read_summary(self.folder / "one")["last"]
        self.assertIn(metric, out.stdout)
        both = [
            f"pretrained_checkpoint_path={self.last}",
            "trainer/checkpoint=load_all",
            "trainer.mode=val",
        ]
        for ranks in (1, 2):
            self.run_stage(f"again{ranks}", *common, *both, f"launcher.gpus_per_node={ranks}")
        one, two = (runs.read_summary(self.folder / f"again{ranks}")["last"] for ranks in (1, 2))
        for name in (f"val_{metric}", "val_loss", "val_videos"):
            self.assertAlmostEqual(one[name], two[name], delta=1e-5 * abs(one[name]))
            self.assertAlmostEqual(one[name], last[name], delta=1e-4 * abs(one[name]))
        code, said, _ = runs.call_command("verify", self.folder / "one")
        self.assertEqual(code, 0, said)
        self.assertIn(f"{metric} of the summary, from the predictions", said)
        self.assertNotIn("unchecked", said)
        code, _, errors = runs.call_command("report", self.folder / "one", "--out", self.folder / "report.html")
        self.assertEqual(code, 0, errors)
        predictions = read_predictions(self.folder / "one" / "predictions" / "mine.npz")
        self.assertGreater(draw_predictions(predictions, "$x").size[0], 100)

    def check_dry(self, common: list[str]) -> None:
        out = self.run_stage("dry", *common, "trainer.mode=dry", "trainer.logging.peak_tflops=1")
        self.assertIn("operations", out.stdout)

    def damage(self) -> None:
        """A wrong number in the predictions is found."""
        file = self.folder / "one" / "predictions" / "mine.npz"
        arrays = dict(np.load(file))
        arrays["scores"][0] += 3
        np.savez(file, **arrays)
        code, said, _ = runs.call_command("verify", self.folder / "one")
        self.assertEqual(code, 4, said)


class MultiLabelRun(Run):
    task = "multi_label"

    def test_from_a_list_to_predictions(self) -> None:
        rows = [
            "red;fast",
            "green",
            "blue;fast",
            "red",
            '""',
            "blue",
            "red;fast",
            "green;fast",
            "blue",
            "red",
            "green",
            "blue;fast",
        ]
        common = self.prepare("path,labels", rows, "--label-type", "multi_label")
        self.assertEqual(
            (self.folder / "out" / "class_names.txt").read_text().split(), ["blue", "fast", "green", "red"]
        )
        labels = np.load(self.folder / "out" / "train_labels.npy")
        self.assertEqual((labels.dtype, labels[0].tolist(), labels[4].tolist()), (np.int8, [0, 1, 0, 1], [0, 0, 0, 0]))
        common += ["mixing_prob=1"]
        self.check_dry(common)
        self.check_run(common, "map")
        prediction = omnivision.load(self.last).predict(self.folder / "videos" / "0.mp4", top=4)
        self.assertEqual({own.name for own in prediction}, {"blue", "fast", "green", "red"})
        with open(self.folder / "one" / "predictions" / "mine.csv", newline="") as opened:
            row = next(csv.DictReader(opened))
        self.assertEqual(row["labels"], "fast;red")
        self.assertAlmostEqual(prediction[0].probability, float(row["probability_1"]), delta=2e-4)
        self.assertIn("average precision", (self.folder / "report.html").read_text())
        self.assertIn("mAP", runs.call_command("runs", self.folder / "one")[1])
        code, said, _ = runs.call_command(
            "check-data", self.folder / "out" / "train_paths.npy", self.folder / "out" / "train_labels.npy",
            "--prefix", f"{self.folder}/videos/",
        )  # fmt: skip
        self.assertEqual(code, 0)
        self.assertIn("positives per class: 3 to 5; 1 samples have no class", said)
        self.damage()

    def test_a_single_attentive_probe_with_held_out_videos(self) -> None:
        rows = ["a", "b", "a;b", "a", "b", "a", "b", "a;b", "a", "b", "a", "b"]
        common = self.prepare("path,labels", rows, "--label-type", "multi_label")
        single = "trainer.model.lr_factors=[1]", "trainer.model.weight_decay_factors=[1]", "trainer.data.hold_out=0.3"
        out = self.run_stage("probe", *common, *single, "epochs=1", stage="attentive")
        self.assertRegex(out.stdout, r"held_out: loss .* map")

    def test_names_put_columns_in_order(self) -> None:
        (self.folder / "names.txt").write_text("b\na\n")
        rows = ["1,0", "0,1", "1,-1", ",1", *["0,1"] * 8]
        words = (
            "--label-type",
            "multi_label",
            "--columns",
            "path=path,label=a,label=b",
            "--class-names",
            self.folder / "names.txt",
        )
        self.prepare("path,a,b", rows, *words)
        self.assertEqual((self.folder / "out" / "class_names.txt").read_text().split(), ["b", "a"])
        labels = np.load(self.folder / "out" / "train_labels.npy")
        self.assertEqual(labels[:4].tolist(), [[0, 1], [1, 0], [-1, 1], [1, -1]])

    def test_a_single_column_of_yes_and_no_is_a_class(self) -> None:
        self.prepare(
            "path,jump",
            ["1", "0", "-1", *["1"] * 9],
            "--label-type",
            "multi_label",
            "--columns",
            "path=path,label=jump",
        )
        self.assertEqual((self.folder / "out" / "class_names.txt").read_text().split(), ["jump"])
        self.assertEqual(np.load(self.folder / "out" / "train_labels.npy")[:3].tolist(), [[1], [0], [-1]])

    def test_fields_and_classes_may_be_separated_alike(self) -> None:
        rows = ['"playing guitar,singing"', "singing", *['"singing,jumping"'] * 10]
        self.prepare("path,labels", rows, "--label-type", "multi_label", "--label-separator", ",")
        names = (self.folder / "out" / "class_names.txt").read_text().splitlines()
        self.assertEqual(names, ["jumping", "playing guitar", "singing"])

    def test_rows_of_the_same_video_add_up(self) -> None:
        rows = ["a\n0.mp4,b", *["a", "b"] * 5, "a"]  # two rows of the first video
        self.prepare("path,labels", rows, "--label-type", "multi_label")
        labels = np.load(self.folder / "out" / "train_labels.npy")
        self.assertEqual((len(labels), labels[:3].tolist()), (12, [[1, 1], [1, 0], [0, 1]]))

    def test_columns_of_yes_and_no(self) -> None:
        rows = ["1,0", "0,1", "1,-1", ",1", "0,0", "yes,no", "1,1", "0,0", "1,0", "0,1", "1,1", "0,0"]
        self.prepare("video,a,b", rows, "--label-type", "multi_label", "--columns", "path=video,label=a,label=b")
        labels = np.load(self.folder / "out" / "train_labels.npy")
        self.assertEqual(labels[:6].tolist(), [[1, 0], [0, 1], [1, -1], [-1, 1], [0, 0], [1, 0]])

    def test_other_tasks_and_tools_refuse(self) -> None:
        rows = ["a", "b", "a;b", "a", "b", "a", "b", "a;b", "a", "b", "a", "b"]
        common = self.prepare("path,labels", rows, "--label-type", "multi_label")
        for settings, message in (
            (
                ["trainer/task=classify"],
                "trainer.task must be MultiLabel for datasets.mine.label_type=multi_label, got Classify",
            ),
            (["trainer.data.balance=1"], "trainer.data.balance must be 0 for mine"),
            (["++trainer.online_eval.sources=[mine]"], "trainer.online_eval.sources must have one class per video"),
        ):
            result = stages.run_in_process(stages.command("ft", self.folder / "x", *common, *settings, dataset="mine"))
            self.assertEqual(result.returncode, 1)
            self.assertIn(message, " ".join(result.stderr.split()))
        several = stages.command("attentive", self.folder / "x", *common, "trainer.data.hold_out=0.2", dataset="mine")
        self.assertIn("must be a single probe for MultiLabel", " ".join(stages.run_in_process(several).stderr.split()))


class RegressRun(Run):
    task = "regress"

    def test_from_a_list_to_predictions(self) -> None:
        rows = [f"{k / 10},{'' if k == 3 else 100 + 7 * k}" for k in range(12)]
        words = "--label-type", "regression", "--columns", "path=path,label=share,label=metres"
        common = self.prepare("path,share,metres", rows, *words)
        entry = (self.folder / "site" / "experiments" / "mine.yaml").read_text()
        self.assertIn("label_mean: [0.55, 140.0909]", entry)
        self.check_dry(common)
        self.check_run(common, "mae")
        other = stages.command(
            "ft", self.folder / "other", *common, f"pretrained_checkpoint_path={self.last}", "trainer/checkpoint=load_all",
            "trainer.mode=val", "++datasets.mine.label_std=[1,2]", dataset="mine",
        )  # fmt: skip
        said = " ".join(stages.run_in_process(other).stderr.split())
        self.assertIn("must standardize the targets as this run does", said)
        found = omnivision.load(self.last).predict(self.folder / "videos" / "0.mp4")
        with open(self.folder / "one" / "predictions" / "mine.csv", newline="") as opened:
            rows = list(csv.DictReader(opened))
        self.assertEqual([own.name for own in found], ["share", "metres"])
        self.assertAlmostEqual(found[1].value, float(rows[0]["predicted metres"]), delta=0.02)
        self.assertTrue(100 < found[1].value < 180, "in its units")
        self.assertEqual((rows[3]["metres"], rows[2]["metres"]), ("", "114"))
        self.assertIn("Labels and predictions", (self.folder / "report.html").read_text())
        _, said, _ = runs.call_command("predict", self.folder / "one", self.folder / "videos" / "0.mp4", "--json")
        (values,) = json.loads(said).values()
        self.assertEqual(values[1]["name"], "metres")
        with self.assertRaisesRegex(UserError, "a regression model"):
            runs.call_command("export", self.last, self.folder / "hf", "--to", "hf")
        runs.call_command("export", self.last, self.folder / "one.safetensors", "--to", "safetensors")
        again = omnivision.load(self.folder / "one.safetensors").predict(self.folder / "videos" / "0.mp4")
        self.assertEqual(again, found)
        self.damage()

    def test_a_resumed_run_equals_an_uninterrupted_one(self) -> None:
        rows = [f"{k / 10}" for k in range(12)]
        common = self.prepare("path,label", rows, "--label-type", "regression")
        self.run_stage("whole", *common)
        # An epoch, then the rest: the schedule is that of two epochs, so that the first is stopped, not shortened.
        self.run_stage("cut", *common, "trainer.checkpoint.save_freq=1")
        checkpoints = self.folder / "cut" / "checkpoints"
        for file in checkpoints.glob("*"):
            if not file.name.startswith("checkpoint_1.pt"):
                file.unlink()
        for suffix in ("", ".json"):
            (checkpoints / f"checkpoint_1.pt{suffix}").rename(checkpoints / f"checkpoint.pt{suffix}")
        (self.folder / "cut" / "summary.json").unlink()
        self.assertIn("resumed after 1 epoch", self.run_stage("cut", *common, "trainer.checkpoint.save_freq=1").stdout)
        whole, cut = (stages.load_checkpoint(self.folder / name)["model"] for name in ("whole", "cut"))
        for name, tensor in whole.items():
            self.assertTrue(torch.equal(tensor, cut[name]), name)

    def test_other_numbers_than_the_catalog_says(self) -> None:
        common = self.prepare("path,label", [str(500 + k) for k in range(12)], "--label-type", "regression")
        nothing = "++datasets.mine.label_mean=null", "++datasets.mine.label_std=null"
        result = self.run_stage("x", *common, *nothing, "epochs=1")
        self.assertIn("target label has mean 505.5", " ".join(result.stderr.split()))
        for wrong in ("++datasets.mine.label_mean=[1,2]", nothing[0]):
            words = stages.command("ft", self.folder / "y", *common, wrong, dataset="mine")
            errors = " ".join(stages.run_in_process(words).stderr.split())
            self.assertIn("must be a number for each of 1 targets", errors)

    def test_values_that_are_no_numbers(self) -> None:
        for wrong in ("far", "inf", "1e39"):
            with self.assertRaisesRegex(UserError, f"must hold float32 numbers .*row 3: {wrong}"):
                self.prepare("path,label", ["1", wrong] + ["2"] * 10, "--label-type", "regression")
        with self.assertRaisesRegex(UserError, "more than float32 rounds off"):
            times = [str(1_700_000_000 + second) for second in range(12)]
            self.prepare("path,label", times, "--label-type", "regression")


del Run

if __name__ == "__main__":
    unittest.main()
