"""The later stages on small films: hand-over, probing, averages, evaluation, resuming, several label sets, and mistakes."""

import csv
import hashlib
import json
import os
import pickle
import shutil
import signal
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import yaml
from PIL import Image

from omnivision.training.trainer import Trainer
from tests import runs
from tests import stage_runs as stages

ALLOW = "trainer.checkpoint.allow_changes=true"
FROM_NOTHING = "pretrained_checkpoint_path=null"
UNVALIDATED = "trainer.mode=train_only"
TIMES = {"time", "clips_per_second", "data_wait", "memory_gb"}  # what differs between two runs that are the same


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def figures(run_folder: Path, event: str = "step", phase: str = "train") -> list[dict]:
    """The lines of a run's log without times."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in runs.lines(run_folder, event, phase)]


class OnFilms(unittest.TestCase):
    """A folder with 14 films, and what tests say about runs in it."""

    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        cls.folder = Path(temporary.name)
        cls.films = stages.write_films(cls.folder / "films", 14)
        cls.data = cls.split("ucf101", cls.films, cls.films[:7])

    @classmethod
    def split(cls, dataset: str, train: list[str], val: list[str], classes: int = stages.CLASSES) -> list[str]:
        """The overrides of a dataset whose splits are these films."""
        return [
            *stages.write_split(cls.folder, dataset, "train", train, classes),
            *stages.write_split(cls.folder, dataset, "val", val, classes),
        ]

    @classmethod
    def trained(cls, stage: str, name: str, *overrides: str, dataset: str = "ucf101") -> stages.Result:
        """A run of a stage that must succeed."""
        result = stages.here(stages.command(stage, cls.folder / name, *overrides, dataset=dataset))
        assert result.returncode == 0, result.stderr
        return result

    def assert_equal_tensors(self, one, other, where: str = "") -> None:
        """Nested containers are equal, tensors to the last bit."""
        if isinstance(one, torch.Tensor):
            self.assertTrue(torch.equal(one, other), where)
        elif isinstance(one, dict):
            self.assertEqual(list(one), list(other), where)
            for key in one:
                self.assert_equal_tensors(one[key], other[key], f"{where}.{key}")
        elif isinstance(one, (list, tuple)):
            self.assertEqual(len(one), len(other), where)
            for number, (first, second) in enumerate(zip(one, other, strict=True)):
                self.assert_equal_tensors(first, second, f"{where}.{number}")
        else:
            self.assertEqual(one, other, where)

    def assert_same_run(self, one: str, other: str) -> None:
        """Two runs have the same checkpoint but for times, and the same log."""
        states = [stages.state(self.folder / name) for name in (one, other)]
        for state in states:
            state["last"] = {name: value for name, value in state["last"].items() if name not in TIMES}
            del state["seconds"], state["experiment"]  # which names the folder
        self.assert_equal_tensors(*states)
        self.assertEqual(figures(self.folder / one), figures(self.folder / other))
        for phase in ("train", "val"):
            self.assertEqual(figures(self.folder / one, "epoch", phase), figures(self.folder / other, "epoch", phase))

    def stopped(self, stage: str, name: str, step: int, *overrides: str) -> None:
        """A run that is asked to stop when the checkpoint before `step` is written: it still does that step."""
        save = Trainer.save_checkpoint

        def save_and_end(trainer: Trainer, aliases: tuple[str, ...] = ()) -> None:
            save(trainer, aliases)
            if trainer.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        with mock.patch.object(Trainer, "save_checkpoint", save_and_end):
            every = "trainer.checkpoint.save_every_steps=1"
            result = stages.here(stages.command(stage, self.folder / name, *overrides, every))
        self.assertEqual(result.returncode, 143, result.stderr)
        found = stages.state(self.folder / name)
        self.assertEqual(found["epoch"] * found["steps_per_epoch"] + found["step"], step)
        self.assertGreater(found["step"], 0, "it stands in the middle of an epoch")

    def assert_refused(self, arguments: list[str], saying: str) -> None:
        """One paragraph and exit code 1, before the first step; nothing that was there is changed, nothing begun."""
        before = stages.contents(self.folder)
        result = stages.here(arguments)
        self.assertEqual(result.returncode, 1, result.stdout + result.stderr)
        told = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
        self.assertEqual(len(told), 1, result.stderr)
        self.assertRegex(told[0], f"^error: .*{saying}")
        self.assertNotIn("step 1/", result.stdout)
        after = stages.contents(self.folder)
        self.assertEqual({path: after.get(path) for path in before}, before)
        self.assertLessEqual({path.name for path in set(after) - set(before)}, {"summary.json", ".lock.guard"})


class HandOver(OnFilms):
    """MAE -> Align -> fine-tuning -> linear probing, each from the run folder of the one before."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.start, cls.said = {}, {}
        cls.data += cls.split("k150", cls.films, cls.films[:1])
        cls.data += cls.split("inpk150", cls.films, cls.films[:5], classes=2)
        chain = [
            ("mae", "mae", "k150", "batch_size=8", UNVALIDATED),
            (
                "align",
                "ft",
                "inpk150",
                f"pretrained_checkpoint_path={cls.folder}/mae",
            ),  # validates, so there is a best.pt
            ("ft", "ft", "ucf101", f"pretrained_checkpoint_path={cls.folder}/align", UNVALIDATED),
            ("lp", "lp", "ucf101", f"pretrained_checkpoint_path={cls.folder}/ft", UNVALIDATED),
        ]
        for name, stage, dataset, *overrides in chain:
            with stages.watched() as steps:
                cls.said[name] = cls.trained(stage, name, *cls.data, *overrides, dataset=dataset).stdout
            cls.start[name] = steps.at[0]

    def test_every_tensor_of_the_trunk_arrives(self):
        for source, file, name in [
            ("mae", "checkpoint.pt", "align"),
            ("align", "best.pt", "ft"),
            ("ft", "checkpoint.pt", "lp"),
        ]:
            with self.subTest(name):
                given = stages.trunk(stages.state(self.folder / source, file)["model"])
                taken = stages.trunk(self.start[name])
                self.assertEqual(set(given), set(taken))
                self.assertEqual(set(taken), {entry for entry in self.start[name] if not entry.startswith("heads.")})
                for entry, tensor in given.items():
                    self.assertTrue(torch.equal(tensor, taken[entry]), entry)

    def test_what_became_of_each_entry_is_written(self):
        for source, file, name in [("mae", "checkpoint.pt", "align"), ("align", "best.pt", "ft")]:
            with self.subTest(name):
                path = self.folder / source / "checkpoints" / file
                (report,) = json.loads((self.folder / name / "logs/pretrained.json").read_text())
                entries = set(stages.state(self.folder / source, file)["model"])
                self.assertEqual((report["path"], report["sha256"]), (str(path), sha256(path)))
                self.assertEqual(set(report["loaded"]), set(stages.trunk(self.start[name])))
                self.assertEqual(set(report["dropped"]), entries - set(report["loaded"]))
                self.assertEqual(report["missing"], ["heads.0.0.bias", "heads.0.0.weight"])
                self.assertEqual(report["resized"], {})
                self.assertRegex(
                    self.said[name], rf"Weights from {path} \(epoch .*\)\n  loaded +{len(report['loaded'])}  "
                )

    def test_each_stage_trains_its_trunk_but_the_probe(self):
        for name in ("align", "ft"):
            ends = stages.state(self.folder / name)["model"]
            for entry, tensor in self.start[name].items():
                if not entry.endswith("pos_embed"):  # a constant
                    self.assertFalse(torch.equal(tensor, ends[entry]), f"{name}: {entry}")

    def test_a_linear_probe_leaves_the_trunk_as_it_is(self):
        end = stages.state(self.folder / "lp")
        for entry, tensor in self.start["lp"].items():
            self.assertEqual(torch.equal(tensor, end["model"][entry]), not entry.startswith("heads."), entry)
        sizes = [tuple(moments["exp_avg"].shape) for moments in end["optimizer"]["state"].values()]
        heads = [end["model"][f"heads.0.0.{what}"] for what in ("weight", "bias")]
        self.assertEqual(sorted(sizes), sorted(tuple(head.shape) for head in heads))
        self.assertEqual(sum(len(group["params"]) for group in end["optimizer"]["param_groups"]), 2)
        told = runs.summary(self.folder / "lp")["run"]
        self.assertEqual((told["trunk"], told["pretrained"], told["classes"]), ("frozen", "ft", [stages.CLASSES]))
        self.assertEqual(told["trained_parameters"], sum(head.numel() for head in heads))
        self.assertIn("parameters are frozen", self.said["lp"])
        self.assertEqual(runs.summary(self.folder / "ft")["run"]["trunk"], "trained")

    def test_a_run_goes_on_from_its_own_checkpoint_when_what_it_started_from_is_gone(self):
        before = (self.folder / "ft/logs/pretrained.json").read_bytes()
        told = ["pretrained_checkpoint_path=gone", ALLOW]
        said = self.trained("ft", "ft", *self.data, *told, UNVALIDATED).stdout
        self.assertIn("nothing is left to train", said)
        self.assertEqual((self.folder / "ft/logs/pretrained.json").read_bytes(), before)


class Averages(OnFilms):
    """Linear probing of a learned average of two fine-tuned runs."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.data += [UNVALIDATED, "trainer.limit_train_batches=2", "epochs=2"]
        for name, seed in (("a", 1), ("b", 2)):
            cls.trained("ft", name, *cls.data, FROM_NOTHING, f"trainer.seed_value={seed}", "epochs=1")
        cls.files = [cls.folder / name / "checkpoints" / "checkpoint.pt" for name in ("a", "b")]
        cls.sources = f"pretrained_checkpoint_path=[{cls.folder}/a,{cls.folder}/b]"

    def test_both_modes_train_log_their_weights_and_resume(self):
        for mode, names in (("learned_average_softmax", False), ("learned_average_layer_softmax", True)):
            with self.subTest(mode):
                settings = [*self.data, self.sources, f"trainer.model.combine_mode={mode}"]
                self.trained("average", mode, *settings)
                epochs = runs.lines(self.folder / mode, "epoch")
                self.assertEqual(len(epochs), 2)
                for line in epochs:
                    self.assertAlmostEqual(line["mixing_0"] + line["mixing_1"], 1, places=6)
                self.assertNotEqual(epochs[0]["mixing_0"], 0.5)
                self.assertNotEqual(epochs[0]["mixing_0"], epochs[1]["mixing_0"])
                state = stages.state(self.folder / mode)
                trained = {"mixing_ratio", "model.heads.0.0.weight", "model.heads.0.0.bias"}
                self.assertEqual(set(state["model"]) - {"model.trunk.pos_embed"}, trained)  # that one is a constant
                noted = [(str(file), sha256(file)) for file in self.files]
                self.assertEqual([(source["path"], source["sha256"]) for source in state["sources"]], noted)
                reports = json.loads((self.folder / mode / "logs/pretrained.json").read_text())
                self.assertEqual([(report["path"], report["sha256"]) for report in reports], noted)
                for report in reports:
                    left = {"heads.0.0.bias", "heads.0.0.weight"}
                    self.assertEqual(set(report["dropped"]), left)
                    self.assertEqual(set(report["loaded"]), set(stages.state(self.folder / "a")["model"]) - left)
                last = state["model"]["mixing_ratio"].softmax(-1)
                if names:
                    by_tensor = epochs[1]["mixing_by_tensor"]
                    self.assertEqual(len(by_tensor), len(last))
                    self.assertIn("blocks.0.attn.qkv.weight", by_tensor)
                    torch.testing.assert_close(torch.tensor(list(by_tensor.values())), last)
                    last = last.mean(0)
                torch.testing.assert_close(torch.tensor([epochs[1]["mixing_0"], epochs[1]["mixing_1"]]), last)
                self.assertEqual(runs.summary(self.folder / mode)["run"]["trunk"], "frozen average")

                self.stopped("average", f"{mode}_resumed", 3, *settings)
                said = self.trained("average", f"{mode}_resumed", *settings).stdout
                self.assertIn("epoch 2, step 1 of", said)
                self.assert_same_run(mode, f"{mode}_resumed")

    def test_one_file_of_several_models_is_as_good_as_a_list(self):
        states = [stages.state(self.folder / name)["model"] for name in ("a", "b")]
        torch.save({"ensemble_weights": states}, self.folder / "several.pt")
        for name, source in (("list", self.sources), ("file", f"pretrained_checkpoint_path={self.folder}/several.pt")):
            self.trained("average", name, *self.data, source, "epochs=1")
        one, other = (stages.state(self.folder / name) for name in ("list", "file"))
        self.assert_equal_tensors(one["model"], other["model"])
        several = (f"{self.folder}/several.pt", sha256(self.folder / "several.pt"))
        self.assertEqual([(source["path"], source["sha256"]) for source in other["sources"]], [several, several])

    def test_sources_that_changed_are_refused(self):
        torch.save({"model": stages.state(self.folder / "b")["model"]}, self.folder / "c.pt")
        sources = f"pretrained_checkpoint_path=[{self.folder}/a,{self.folder}/c.pt]"
        self.trained("average", "changing", *self.data, sources, "epochs=1")
        swapped = f"pretrained_checkpoint_path=[{self.folder}/c.pt,{self.folder}/a]"
        again = stages.command("average", self.folder / "changing", *self.data, ALLOW)
        self.assert_refused([*again, swapped], r"c\.pt .*pretrained_checkpoint_path")
        changed = stages.state(self.folder / "b")["model"]
        changed["trunk.norm.bias"][0] += 1e-3
        torch.save({"model": changed}, self.folder / "c.pt")
        self.assert_refused([*again, sources], r"c\.pt .*pretrained_checkpoint_path")

    def test_clips_of_another_length_have_the_positions_that_fine_tuning_has(self):
        longer = [*self.data, "num_frames=8", "epochs=1"]
        self.trained("average", "longer", *longer, self.sources)
        self.trained("ft", "longer_ft", *longer, f"pretrained_checkpoint_path={self.folder}/a", UNVALIDATED)
        table = stages.state(self.folder / "longer")["model"]["model.trunk.pos_embed"]
        self.assertTrue(torch.equal(table, stages.state(self.folder / "longer_ft")["model"]["trunk.pos_embed"]))
        reports = json.loads((self.folder / "longer/logs/pretrained.json").read_text())
        self.assertEqual([report["resized"] for report in reports], [{"trunk.pos_embed": "1x4x4 -> 2x4x4"}] * 2)
        self.trained("ft", "longer_new", *longer, FROM_NOTHING, UNVALIDATED)  # its positions are not interpolated ones
        mixed = f"pretrained_checkpoint_path=[{self.folder}/a,{self.folder}/longer_new]"
        command = stages.command("average", self.folder / "mixed", *longer, mixed)
        self.assert_refused(command, "have different positions .*longer_new")

    def test_position_tables_of_nonsense_are_refused(self):
        for table, saying in (
            (torch.zeros(1, 16, 5), "have different positions"),
            (torch.zeros(3), "have different positions"),
            (torch.zeros(1, 16, 96, dtype=torch.int64), "trunk.pos_embed .*torch.int64"),
            (torch.full((1, 16, 96), float("nan")), "trunk.pos_embed .*not finite"),
        ):
            state = stages.state(self.folder / "a")["model"] | {"trunk.pos_embed": table}
            torch.save({"model": state}, self.folder / "odd.pt")
            odd = f"pretrained_checkpoint_path=[{self.folder}/odd.pt,{self.folder}/odd.pt]"
            with self.subTest(saying):
                self.assert_refused(stages.command("average", self.folder / "odd", *self.data, odd), saying)

    def test_its_checkpoint_is_one_model_to_other_stages(self):
        validated = [setting for setting in self.data if setting != UNVALIDATED]
        settings = [*validated, "trainer.val_epoch_freq=1", "epochs=1"]
        self.trained("average", "one", *settings, self.sources)
        source = f"pretrained_checkpoint_path={self.folder}/one"
        said = self.trained("ft", "as_one", *settings, source, "trainer/checkpoint=load_all", "trainer.mode=val").stdout
        self.assertIn("missing     0", said)
        own, other = (runs.lines(self.folder / name, "epoch", "val")[-1] for name in ("one", "as_one"))
        self.assertEqual(own["top1"], other["top1"])
        self.assertAlmostEqual(own["loss"], other["loss"], places=5)
        self.trained("ft", "tuned", *settings, source)

    def test_another_choice_of_entries_is_refused(self):
        self.trained("average", "choosing", *self.data, self.sources, "epochs=1")
        other = stages.command("average", self.folder / "choosing", *self.data, self.sources, ALLOW)
        self.assert_refused([*other, "trainer/checkpoint=no_heads_ensemble"], r"'heads\.\*'.*trainer/checkpoint")

    def test_mistakes(self):
        narrow = stages.state(self.folder / "a")["model"]
        narrow["trunk.norm.weight"] = narrow["trunk.norm.weight"][:-1].clone()
        torch.save({"model": narrow}, self.folder / "narrow.pt")
        path = "pretrained_checkpoint_path"
        for overrides, saying in [
            ([self.sources, "ensemble_num_models=3"], "ensemble_num_models .*3.* pretrained_checkpoint_path .*2"),
            ([f"{path}={self.folder}/a"], "ensemble_weights"),
            (
                [f"{path}=[{self.folder}/a,{self.folder}/narrow.pt]"],
                r"narrow\.pt does not fit the model: trunk\.norm\.w",
            ),
            ([f"{path}=[{self.folder}/a,gone]"], "there is no such file or folder"),
            ([FROM_NOTHING], f"{path} is null"),
            ([self.sources, '++trainer.checkpoint.drop=["nothing*"]'], r"trainer\.checkpoint\.drop: 'nothing\*'"),
            (
                [self.sources, '++trainer.checkpoint.drop=["trunk.norm.*"]'],
                r"a/\S+ does not fit .*trunk\.norm\.\S+ is missing",
            ),
            (
                [self.sources, "trainer.mode=val"],
                "There is no checkpoint in .* to validate .*trainer/checkpoint=load_all",
            ),
        ]:
            with self.subTest(saying):
                self.assert_refused(stages.command("average", self.folder / "wrong", *self.data, *overrides), saying)
        one_model = stages.command("ft", self.folder / "wrong", *self.data, self.sources)
        self.assert_refused(one_model, "pretrained_checkpoint_path .*_ensemble_ft")


class TwoLabelSets(OnFilms):
    """Co-training with a head for each label set, validated in splits of 7 and of 1 videos."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.data = cls.split("inpk150", cls.films, cls.films[:7], classes=3)
        cls.data += cls.split("sim150", cls.films[::-1], cls.films[9:10], classes=2)
        with stages.watched() as cls.steps:
            cls.trained("ft", "run", *cls.data, FROM_NOTHING, dataset="inpk150_sim150")
        cls.run_folder = cls.folder / "run"
        cls.whole = [
            f"pretrained_checkpoint_path={cls.run_folder}/checkpoints/checkpoint.pt",
            "trainer/checkpoint=load_all",
        ]

    def validation(self, run_folder: Path) -> dict:
        """The last validation of a run, without what says when it was."""
        line = figures(run_folder, "epoch", "val")[-1]
        return {name: value for name, value in line.items() if name not in ("epoch", "step")}

    def test_each_source_trains_its_own_head(self):
        def changed(step: int, head: int) -> bool:
            before, after = (self.steps.at[n][f"heads.{head}.0.weight"] for n in (step - 1, step))
            return not torch.equal(before, after)

        sizes = [tuple(self.steps.at[0][f"heads.{head}.0.weight"].shape) for head in (0, 1)]
        self.assertEqual([size[0] for size in sizes], [3, 2])
        last = max(self.steps.at)
        by_step = [(changed(step, 0), changed(step, 1)) for step in range(1, last + 1)]
        self.assertEqual(set(by_step), {(True, False), (False, True)})
        self.assertEqual(sum(first for first, _ in by_step), last // 2)
        epoch = runs.lines(self.run_folder, "epoch")[0]
        self.assertEqual(set(epoch["per_source"]), {"inpk150", "sim150"})

    def test_one_head_for_all_when_told(self):
        self.trained("ft", "shared", *self.data, FROM_NOTHING, "trainer.data.share_head=true", dataset="inpk150_sim150")
        model = stages.state(self.folder / "shared")["model"]
        self.assertEqual([name for name in model if name.startswith("heads.")], ["heads.0.0.weight", "heads.0.0.bias"])
        self.assertEqual(len(model["heads.0.0.weight"]), 3)
        with np.load(self.folder / "shared/predictions/sim150.npz", allow_pickle=False) as found:
            self.assertEqual(found["scores"].shape, (1, 3))

    def test_figures_are_those_of_the_predictions(self):
        logged, hits, accuracies = self.validation(self.run_folder), 0, []
        for source, classes, paths in (("inpk150", 3, self.films[:7]), ("sim150", 2, self.films[9:10])):
            with np.load(self.run_folder / f"predictions/{source}.npz", allow_pickle=False) as found:
                label, scores = found["label"], found["scores"]
                self.assertEqual(found["path"].tolist(), paths, "each video once, in the order of the split")
                self.assertEqual(found["index"].tolist(), list(range(len(paths))))
            self.assertEqual(label.tolist(), [i % classes for i in range(len(paths))])
            self.assertEqual(scores.shape, (len(paths), classes))
            right = scores.argmax(1) == label
            hits += right.sum()
            accuracies.append(100 * np.mean([right[label == k].mean() for k in set(label.tolist())]))
            self.assertAlmostEqual(logged["per_source"][source]["top1"], 100 * right.mean())
            self.assertAlmostEqual(logged["per_source"][source]["mean_class_accuracy"], accuracies[-1])

            with open(self.run_folder / f"predictions/{source}.csv", newline="") as file:
                rows = list(csv.DictReader(file))
            self.assertEqual([row["path"] for row in rows], paths)
            self.assertEqual([row["correct"] for row in rows], [str(int(hit)) for hit in right])
            self.assertEqual([row["predicted_1"] for row in rows], [str(best) for best in scores.argmax(1)])
            self.assertEqual([row["label"] for row in rows], [str(true) for true in label])

            with Image.open(self.run_folder / f"pictures/confusion_{source}.png") as picture:
                self.assertEqual(picture.format, "PNG")
                self.assertGreater(np.asarray(picture.convert("RGB")).std(), 0)
        self.assertEqual(logged["videos"], 8)
        self.assertAlmostEqual(logged["top1"], 100 * hits / 8)
        self.assertEqual(logged["top5"], 100)
        self.assertAlmostEqual(logged["mean_class_accuracy"], np.mean(accuracies))

    def test_validation_of_a_file_gives_the_figures_of_the_run_that_wrote_it(self):
        self.trained("ft", "again", *self.data, *self.whole, "trainer.mode=val", dataset="inpk150_sim150")
        self.assertEqual(self.validation(self.folder / "again"), self.validation(self.run_folder))
        self.assertFalse((self.folder / "again/checkpoints/checkpoint.pt").exists())

    def test_validation_of_a_file_gives_the_figures_of_the_average_that_was_validated(self):
        average = "trainer.ema_decay=0.5"
        self.trained("ft", "ema", *self.data, FROM_NOTHING, average, dataset="inpk150_sim150")
        self.assertNotEqual(self.validation(self.folder / "ema"), self.validation(self.run_folder))
        file = f"pretrained_checkpoint_path={self.folder}/ema/checkpoints/best.pt"
        settings = [*self.data, file, "trainer/checkpoint=load_all", "trainer.mode=val", average]
        self.trained("ft", "ema_again", *settings, dataset="inpk150_sim150")
        self.assertEqual(self.validation(self.folder / "ema_again"), self.validation(self.folder / "ema"))

    def test_validation_asks_for_nothing_of_the_training(self):
        self.trained("ft", "ended", *self.data, FROM_NOTHING, dataset="inpk150_sim150")
        before = runs.summary(self.folder / "ended")
        gone = [f"++datasets.{name}.train.paths=gone.npy" for name in ("inpk150", "sim150")]
        again = [*self.data, FROM_NOTHING, *gone, "trainer.mode=val", "batch_size=2"]
        for _ in range(2):
            self.trained("ft", "ended", *again, dataset="inpk150_sim150")
        after = runs.summary(self.folder / "ended")
        self.assertEqual((after["status"], after["steps"]), ("finished", before["steps"]))
        (line,) = runs.lines(self.folder / "ended", "epoch", "val")
        self.assertEqual(line["step"], before["steps"])
        with mock.patch("omnivision.training.trainer.Trainer.evaluate", side_effect=RuntimeError("broken")):
            result = stages.here(stages.command("ft", self.folder / "ended", *again, dataset="inpk150_sim150"))
        self.assertEqual((result.returncode, runs.summary(self.folder / "ended")["status"]), (70, "finished"))

    def test_validation_without_the_heads_is_refused(self):
        for choice in ("no_heads", "no_heads_no_decoder"):
            settings = [*self.data, self.whole[0], f"trainer/checkpoint={choice}", "trainer.mode=val"]
            arguments = stages.command("ft", self.folder / choice, *settings, dataset="inpk150_sim150")
            self.assert_refused(arguments, "its heads were not loaded .*trainer/checkpoint=load_all")

    def test_two_processes_validate_as_one(self):
        settings = [*self.data, *self.whole, "trainer.mode=val", "launcher.gpus_per_node=2"]
        result = stages.here(stages.command("ft", self.folder / "two", *settings, dataset="inpk150_sim150"))
        self.assertEqual(result.returncode, 0, result.stderr)
        one, two = self.validation(self.run_folder), self.validation(self.folder / "two")
        for name in ("top1", "top5", "videos", "mean_class_accuracy"):
            self.assertEqual(one[name], two[name], name)
        self.assertAlmostEqual(one["loss"], two["loss"], places=6)
        for source in ("inpk150", "sim150"):
            files = [folder / f"predictions/{source}.npz" for folder in (self.run_folder, self.folder / "two")]
            first, second = (dict(np.load(file, allow_pickle=False)) for file in files)
            self.assertEqual(set(first), set(second))
            np.testing.assert_allclose(first.pop("scores"), second.pop("scores"), atol=1e-5)
            for name in first:
                np.testing.assert_array_equal(first[name], second[name], name)
            tables = [file.with_suffix(".csv").read_text().splitlines() for file in files]
            self.assertEqual([line.split(",")[:3] for line in tables[0]], [line.split(",")[:3] for line in tables[1]])

    def test_two_processes_train_as_one(self):
        # What is drawn for a batch, not for a sample, is off; gradients travel as they are. Most samples have no label, so that
        # processes and micro-batches hold unequal numbers of labelled ones, and some none.
        for source, classes in (("inpk150", 3), ("sim150", 2)):
            labels = [number % classes if number % 5 in (0, 3) else -1 for number in range(len(self.films))]
            stages.write_split(self.folder, f"few_{source}", "train", self.films, classes, labels)
        few = [
            f"++datasets.{source}.train.labels={self.folder}/few_{source}_train_labels.npy"
            for source in ("inpk150", "sim150")
        ]
        settings = [
            *self.data,
            *few,
            FROM_NOTHING,
            UNVALIDATED,
            "trainer.task.mixing=null",
            "trainer.model.trunk.drop_path=0",
        ]
        self.trained("ft", "one", *settings, dataset="inpk150_sim150")
        two = ["launcher.gpus_per_node=2", "trainer.distributed.comms_dtype=null", "trainer.optim.accumulation_steps=2"]
        result = stages.here(stages.command("ft", self.folder / "both", *settings, *two, dataset="inpk150_sim150"))
        self.assertEqual(result.returncode, 0, result.stderr[-2000:])
        for event in ("step", "epoch"):
            first, second = (runs.lines(self.folder / name, event) for name in ("one", "both"))
            if event == "step":
                self.assertEqual([line["step"] for line in first], [1, 2, 3, 4, 5, 6])
            for one, other in zip(first, second, strict=True):
                for name in one.keys() & {"loss", "grad_norm", "top1", "top5"}:
                    self.assertAlmostEqual(one[name], other[name], delta=1e-4 * max(1, one[name]), msg=name)


class ClassNames(OnFilms):
    """A run whose classes have names, and data that names them in another order, or otherwise."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.here = [*cls.data, *cls.names("red", "green", "blue")]
        cls.trained("ft", "run", *cls.here, FROM_NOTHING, "trainer.ema_decay=0.5")
        # Class 0 is blue now, and the labels say so.
        paths = cls.films[:7]
        cls.reordered = stages.write_split(
            cls.folder, "ucf101", "other", paths, labels=[(1, 2, 0)[i % 3] for i in range(7)]
        )
        cls.reordered = [override.replace(".other.", ".val.") for override in cls.reordered]
        cls.reordered += cls.names("blue", "red", "green")

    @classmethod
    def names(cls, *names: str) -> list[str]:
        file = cls.folder / f"{'_'.join(names)}.txt"
        file.write_text("\n".join(names))
        return [f"++datasets.ucf101.class_names={file}"]

    def validation(self, name: str) -> dict:
        line = figures(self.folder / name, "epoch", "val")[-1]
        return {name: line[name] for name in ("loss", "top1", "mean_class_accuracy")}

    def test_validation_gives_the_same_figures(self):
        wanted = self.validation("run")
        shutil.copytree(self.folder / "run", self.folder / "own")
        file = [
            f"pretrained_checkpoint_path={self.folder}/run/checkpoints/checkpoint.pt",
            "trainer/checkpoint=load_all",
        ]
        for name, more in (("own", ["trainer.ema_decay=0.5"]), ("file", file)):
            result = stages.here(
                stages.command("ft", self.folder / name, *self.data, *self.reordered, "trainer.mode=val", *more)
            )
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertRegex(result.stdout, "\nepoch 1 val: " if name == "own" else "\nval: ", name)
            self.assertNotRegex(result.stdout, r"\d trained\b")
            self.assertRegex(result.stdout, r"\npredictions .*predictions/ucf101\.csv.*pictures/confusion_ucf101\.png")
            for figure, value in self.validation(name).items():
                self.assertAlmostEqual(value, wanted[figure], places=5, msg=f"{name} {figure}")
            one, other = (np.load(self.folder / n / "predictions/ucf101.npz") for n in ("run", name))
            np.testing.assert_allclose(one["scores"][:, [2, 0, 1]], other["scores"], atol=1e-6)

    def test_other_names_are_refused(self):
        other = [*self.data, *self.names("red", "green", "yellow")]
        file = f"pretrained_checkpoint_path={self.folder}/run"
        for more in (["trainer.mode=val", "trainer/checkpoint=load_all"], ["trainer/checkpoint=default"]):
            self.assert_refused(stages.command("ft", self.folder / "new", *other, file, *more), "class_names")
        self.assert_refused(stages.command("ft", self.folder / "run", *other, "trainer.mode=val"), "class_names")

    def test_training_does_not_go_on_with_another_order(self):
        # The file of names is the same, what it says is not.
        shutil.copytree(self.folder / "run", self.folder / "cut")
        summary = self.folder / "cut/summary.json"
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"status": "running"}))
        file = self.folder / "red_green_blue.txt"
        self.addCleanup(file.write_text, file.read_text())
        arguments = stages.command("ft", self.folder / "cut", *self.here, FROM_NOTHING, "trainer.ema_decay=0.5")
        for names in ("green\nred\nblue", "red\ngreen\nyellow"):
            file.write_text(names)
            for more in ([], [ALLOW], [ALLOW, "epochs=3"]):
                self.assert_refused([*arguments, *more], "datasets.NAME.class_names")


class Resuming(OnFilms):
    def test_fine_tuning_stopped_in_mid_epoch_and_resumed_equals_uninterrupted(self):
        data = self.split("ucf101", self.films, self.films[:2])
        settings = [*data, FROM_NOTHING, "epochs=2", "trainer.ema_decay=0.9", "trainer.data.val_clips=1"]
        self.trained("ft", "whole", *settings)
        self.assertEqual([line["step"] for line in runs.lines(self.folder / "whole")], [1, 2, 3, 4, 5, 6])
        self.assertEqual(len(runs.lines(self.folder / "whole", "epoch", "val")), 2)
        for step, where in ((2, stages.here), (4, stages.apart)):
            with self.subTest(step):
                # The second is taken up by another process, and with workers.
                name, workers = f"stopped_{step}", [] if where is stages.here else ["num_workers=2"]
                self.stopped("ft", name, step, *settings)
                result = where(stages.command("ft", self.folder / name, *settings, *workers))
                self.assertEqual(result.returncode, 0, result.stderr)
                self.assertIn("Resumed from", result.stdout)
                self.assert_same_run("whole", name)

        config = yaml.safe_load((self.folder / "whole/config.yaml").read_text())
        trainer = config["trainer"]
        self.assertEqual((config["mixing_prob"], trainer["optim"]["layer_decay"]), (1, 0.75))
        self.assertGreater(trainer["model"]["trunk"]["drop_path"], 0)
        self.assertTrue(trainer["data"]["view"]["rand_augment"] and trainer["data"]["view"]["erasing"])


class Pickled:
    """What a stranger's file may do when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (Pickled.folder,)

    folder = ""


class Mistakes(OnFilms):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.trained("ft", "run", *cls.data, FROM_NOTHING, UNVALIDATED, "trainer.limit_train_batches=1")

    def assert_run_refused(self, *overrides: str, saying: str, stage: str = "ft", folder: str = "wrong") -> None:
        arguments = stages.command(stage, self.folder / folder, *self.data, UNVALIDATED, *overrides)
        self.assert_refused(arguments, saying)
        if folder == "wrong":
            self.assertNotIn("config.yaml", {path.name for path in (self.folder / folder).glob("*")})

    def test_names_of_classes_that_are_not_as_many(self):
        names = self.folder / "names.txt"
        names.write_text("one\n")
        self.assert_run_refused(
            FROM_NOTHING,
            f"++datasets.ucf101.class_names={names}",
            saying="datasets.ucf101.num_classes",
        )

    def test_weights_that_do_not_fit(self):
        source = f"pretrained_checkpoint_path={self.folder}/run"
        for overrides, saying in [
            (["trainer.model.trunk.width=48"], r"trunk\.\S+ \(.*48.*\), got \(.*96"),
            (['++trainer.checkpoint.keep=["heads.*"]'], r"trainer/checkpoint, or its keep"),
            (['++trainer.checkpoint.keep=["heads.*"]', "trainer.checkpoint.drop_if_present=[]"], "trunk_coverage"),
            (
                ['++trainer.checkpoint.keep=["nothing*"]'],
                r"trainer\.checkpoint\.keep: 'nothing\*'",
            ),
            (
                ['++trainer.checkpoint.drop=["nothing*"]'],
                r"trainer\.checkpoint\.drop: 'nothing\*'",
            ),
            (["++trainer.checkpoint.rename={nothing: some}"], r"trainer\.checkpoint\.rename: 'nothing'"),
        ]:
            with self.subTest(saying):
                self.assert_run_refused(source, *overrides, saying=saying)

    def test_files_that_hold_no_weights(self):
        Pickled.folder = str(self.folder / "made_by_a_pickle")
        (self.folder / "plain.pkl").write_bytes(pickle.dumps(Pickled()))
        torch.save({"model": Pickled()}, self.folder / "wrapped.pt")
        torch.save({"model": {"epoch": 3}}, self.folder / "numbers.pt")
        (self.folder / "empty").mkdir()
        for name, saying in [
            ("plain.pkl", r"plain\.pkl .*state dict"),
            ("wrapped.pt", r"wrapped\.pt .*state dict"),
            ("numbers.pt", "numbers.pt must hold tensors"),
            ("empty", r"pretrained_checkpoint_path.*empty/checkpoints/best\.pt"),
            ("gone", "there is no such file or folder"),
        ]:
            with self.subTest(name):
                self.assert_run_refused(f"pretrained_checkpoint_path={self.folder}/{name}", saying=saying)
        self.assertFalse(Path(Pickled.folder).exists(), "a pickle was executed")

    def test_settings_of_a_run_that_is_there(self):
        labels = {"high": [0, 1, 3] * 4 + [0, 1], "low": [-2] * 14}
        files = {name: self.folder / f"{name}.npy" for name in labels}
        for name, values in labels.items():
            np.save(files[name], np.array(values))
        for overrides, saying in [
            (['trainer.freeze=["trunk.*"]'], r"trainer\.optim\.layer_decay .*trainer\.freeze"),
            (['trainer.freeze=["nothing*"]'], r"trainer\.freeze: the pattern 'nothing\*' matches none"),
            (['trainer.freeze=["*"]', "trainer.optim.layer_decay=null"], "leaves nothing to train"),
            (["video_labels=5"], r"datasets\.ucf101\.num_classes .*video_labels is 5"),
            ([f"++datasets.ucf101.train.labels={files['high']}"], r"labels from 0 to 3; expected -1 \(ignored\) to 2"),
            ([f"++datasets.ucf101.train.labels={files['low']}"], "labels from -2 to -2"),
            (
                ["++datasets.ucf101.num_classes=4"],
                r"datasets\.ucf101\.num_classes: 3 -> 4; epochs: 1 -> 2",
            ),
            (
                ["++datasets.ucf101.num_classes=4", ALLOW],
                r"heads\.0\.0\.weight",
            ),
        ]:
            with self.subTest(saying):
                limited = [FROM_NOTHING, "trainer.limit_train_batches=1", "epochs=2"]
                self.assert_run_refused(*limited, *overrides, saying=saying, folder="run")

    def test_a_probe_has_no_layers_to_scale(self):
        self.assert_run_refused(
            f"pretrained_checkpoint_path={self.folder}/run",
            "trainer.optim.layer_decay=0.5",
            stage="lp",
            saying=r"trainer\.optim\.layer_decay .*trainer\.freeze",
        )


if __name__ == "__main__":
    unittest.main()
