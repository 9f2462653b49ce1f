"""The later stages on small videos: hand-over, probing, averages, evaluation, resuming, several label sets, refusals."""

import csv
import hashlib
import json
import os
import shutil
import signal
import tempfile
import unittest
from itertools import pairwise
from pathlib import Path
from typing import Any
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
VALIDATE = "trainer.mode=val"
ALL = "trainer/checkpoint=load_all"
TIMES = {"time", "clips_per_second", "data_wait", "memory_gb"}  # what differs between two runs that are the same
HEADS = {"heads.0.0.bias", "heads.0.0.weight"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metrics(run_folder: Path, event: str = "step", phase: str = "train") -> list[dict]:
    """The lines of a run's log without times."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in runs.read_metrics(run_folder, event, phase)]


def plain(value: Any) -> Any:
    """Nested containers with the numbers of their tensors."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


class OnVideos(unittest.TestCase):
    """A folder with 14 videos, and assertions about runs in it."""

    @classmethod
    def setUpClass(cls):
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.videos = stages.write_videos(cls.folder / "videos", 14)
        cls.data = cls.split("ucf101", cls.videos, cls.videos[:7])

    @classmethod
    def split(cls, dataset: str, train: list[str], val: list[str], classes: int = stages.CLASSES) -> list[str]:
        """The overrides of a dataset whose splits are these videos."""
        splits = {"train": train, "val": val}
        return [
            o for which, paths in splits.items() for o in stages.write_split(cls.folder, dataset, which, paths, classes)
        ]

    @classmethod
    def trained(cls, stage: str, name: str, *overrides: str, dataset: str = "ucf101") -> stages.Result:
        """A run of a stage that must succeed."""
        result = stages.run_in_process(stages.command(stage, cls.folder / name, *overrides, dataset=dataset))
        assert result.returncode == 0, result.stderr
        return result

    @classmethod
    def source(cls, *names: str) -> str:
        """The setting of the weights of runs or files of the folder; of several for an average."""
        paths = [str(cls.folder / name) for name in names]
        return f"pretrained_checkpoint_path={paths[0] if len(paths) == 1 else '[' + ','.join(paths) + ']'}"

    def state(self, name: str, file: str = "checkpoint.pt") -> dict:
        return stages.load_checkpoint(self.folder / name, file)

    def reports(self, name: str) -> list[dict]:
        return json.loads((self.folder / name / "logs/pretrained.json").read_text())

    def validation(self, name: str) -> dict:
        """The last validation of a run, without its time."""
        line = metrics(self.folder / name, "epoch", "val")[-1]
        return {name: value for name, value in line.items() if name not in ("epoch", "step")}

    def assert_same_run(self, one: str, other: str) -> None:
        """Two runs have the same checkpoint but for times, and the same log."""
        states = [self.state(name) for name in (one, other)]
        for state in states:
            state["last"] = {name: value for name, value in state["last"].items() if name not in TIMES}
            del state["seconds"], state["experiment"]  # which names the folder
        self.assertEqual(*map(plain, states))
        for event, phase in (("step", "train"), ("epoch", "train"), ("epoch", "val")):
            self.assertEqual(*(metrics(self.folder / name, event, phase) for name in (one, other)))

    def stopped(self, stage: str, name: str, step: int, *overrides: str) -> None:
        """A run that is asked to stop when the checkpoint before `step` is written: it still does that step."""
        save = Trainer.save_checkpoint

        def save_and_end(trainer: Trainer, aliases: tuple[str, ...] = ()) -> None:
            save(trainer, aliases)
            if trainer.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        with mock.patch.object(Trainer, "save_checkpoint", save_and_end):
            every = "trainer.checkpoint.save_every_steps=1"
            result = stages.run_in_process(stages.command(stage, self.folder / name, *overrides, every))
        self.assertEqual(result.returncode, 143, result.stderr)
        saved = self.state(name)
        self.assertEqual(saved["epoch"] * saved["steps_per_epoch"] + saved["step"], step)
        self.assertGreater(saved["step"], 0, "it stands in the middle of an epoch")

    def assert_refused(self, arguments: list[str], key: str) -> None:
        """One paragraph and exit code 1, before the first step; nothing that was there is changed, nothing begun."""
        before = stages.read_files(self.folder)
        result = stages.run_in_process(arguments)
        self.assertEqual(result.returncode, 1, result.stdout + result.stderr)
        errors = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
        self.assertEqual(len(errors), 1, result.stderr)
        self.assertRegex(errors[0], f"^error: .*{key}")
        self.assertNotIn("step 1/", result.stdout)
        after = stages.read_files(self.folder)
        self.assertEqual({path: after.get(path) for path in before}, before)
        self.assertLessEqual({path.name for path in set(after) - set(before)}, {"summary.json", ".lock.guard"})


class HandOver(OnVideos):
    """MAE -> Align -> fine-tuning -> linear probing, each from the run folder of the one before."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.start, cls.output = {}, {}
        cls.data += cls.split("k150", cls.videos, cls.videos[:1])
        cls.data += cls.split("inpk150", cls.videos, cls.videos[:5], classes=2)
        for name, stage, dataset, *overrides in (
            ("mae", "mae", "k150", "batch_size=8", UNVALIDATED),
            ("align", "ft", "inpk150", cls.source("mae")),  # validates, so there is a best.pt
            ("ft", "ft", "ucf101", cls.source("align"), UNVALIDATED),
            ("lp", "lp", "ucf101", cls.source("ft"), UNVALIDATED),
        ):
            with stages.record_weights() as steps:
                cls.output[name] = cls.trained(stage, name, *cls.data, *overrides, dataset=dataset).stdout
            cls.start[name] = steps[0]

    def test_trunk_is_loaded_completely_and_each_entry_is_reported(self):
        for source, file, name in (
            ("mae", "checkpoint.pt", "align"),
            ("align", "best.pt", "ft"),
            ("ft", "checkpoint.pt", "lp"),
        ):
            with self.subTest(name):
                entries = self.state(source, file)["model"]
                loaded = stages.encoder_weights(self.start[name])
                self.assertEqual(set(loaded), {entry for entry in self.start[name] if not entry.startswith("heads.")})
                torch.testing.assert_close(loaded, stages.encoder_weights(entries), rtol=0, atol=0)
                path = self.folder / source / "checkpoints" / file
                (report,) = self.reports(name)
                if name != "lp":  # its heads would fit
                    self.assertEqual((report["path"], report["sha256"]), (str(path), sha256(path)))
                    self.assertEqual(set(report["loaded"]), set(loaded))
                    self.assertEqual(set(report["dropped"]), set(entries) - set(loaded))
                    self.assertEqual((set(report["missing"]), report["resized"]), (HEADS, {}))
                    self.assertRegex(self.output[name], rf"Weights from {path} \(epoch .*\)\n  loaded +{len(loaded)}  ")

    def test_each_stage_trains_its_trunk_but_the_probe(self):
        for name in ("align", "ft", "lp"):
            weights = self.state(name)["model"]
            for entry, tensor in self.start[name].items():
                if not entry.endswith("pos_embed"):  # a constant
                    frozen = name == "lp" and not entry.startswith("heads.")
                    self.assertEqual(torch.equal(tensor, weights[entry]), frozen, f"{name}: {entry}")
        probe, heads = self.state("lp"), [self.state("lp")["model"][name] for name in sorted(HEADS)]
        sizes = [moments["exp_avg"].shape for moments in probe["optimizer"]["state"].values()]
        self.assertEqual(sorted(sizes), sorted(head.shape for head in heads))
        run = runs.read_summary(self.folder / "lp")["run"]
        self.assertEqual((run["trunk"], run["pretrained"], run["classes"]), ("frozen", "ft", [stages.CLASSES]))
        self.assertEqual(run["trained_parameters"], sum(head.numel() for head in heads))
        self.assertIn("parameters are frozen", self.output["lp"])
        self.assertEqual(runs.read_summary(self.folder / "ft")["run"]["trunk"], "trained")

    def test_run_resumes_without_the_weights_it_started_from(self):
        before = self.reports("ft")
        gone = ["pretrained_checkpoint_path=gone", ALLOW, UNVALIDATED]
        self.assertIn("nothing is left to train", self.trained("ft", "ft", *self.data, *gone).stdout)
        self.assertEqual(self.reports("ft"), before)


class Averages(OnVideos):
    """Linear probing of a learned average of two fine-tuned runs."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.data += [UNVALIDATED, "trainer.limit_train_batches=2", "epochs=2"]
        for name, seed in (("a", 1), ("b", 2)):
            cls.trained("ft", name, *cls.data, FROM_NOTHING, f"trainer.seed_value={seed}", "epochs=1")
        cls.sources = cls.source("a", "b")

    def test_both_modes_train_and_log_their_weights_and_one_resumes(self):
        for mode in ("learned_average_softmax", "learned_average_layer_softmax"):
            with self.subTest(mode):
                settings = [*self.data, self.sources, f"trainer.model.combine_mode={mode}"]
                self.trained("average", mode, *settings)
                first, second = runs.read_metrics(self.folder / mode, "epoch")
                self.assertNotIn(first["mixing_0"], (0.5, second["mixing_0"]))
                state = self.state(mode)
                trained = {"mixing_ratio", "model.heads.0.0.weight", "model.heads.0.0.bias"}
                self.assertEqual(set(state["model"]) - {"model.trunk.pos_embed"}, trained)  # that one is a constant
                files = [self.folder / name / "checkpoints/checkpoint.pt" for name in ("a", "b")]
                entries = set(self.state("a")["model"])
                for notes in (state["sources"], self.reports(mode)):
                    self.assertEqual(
                        [(n["path"], n["sha256"]) for n in notes], [(str(file), sha256(file)) for file in files]
                    )
                for report in self.reports(mode):
                    self.assertEqual((set(report["dropped"]), set(report["loaded"])), (HEADS, entries - HEADS))
                weights = state["model"]["mixing_ratio"].softmax(-1)
                if weights.ndim == 2:
                    self.assertIn("blocks.0.attn.qkv.weight", second["mixing_by_tensor"])
                    torch.testing.assert_close(torch.tensor(list(second["mixing_by_tensor"].values())), weights)
                    weights = weights.mean(0)
                torch.testing.assert_close(torch.tensor([second["mixing_0"], second["mixing_1"]]), weights)
                self.assertEqual(runs.read_summary(self.folder / mode)["run"]["trunk"], "frozen average")
        self.stopped("average", "resumed", 3, *settings)
        self.assertIn("epoch 2, step 1 of", self.trained("average", "resumed", *settings).stdout)
        self.assert_same_run(mode, "resumed")

    def test_one_file_of_several_models_equals_a_list(self):
        torch.save({"ensemble_weights": [self.state(name)["model"] for name in ("a", "b")]}, self.folder / "several.pt")
        for name, source in (("list", self.sources), ("file", self.source("several.pt"))):
            self.trained("average", name, *self.data, source, "epochs=1")
        torch.testing.assert_close(self.state("list")["model"], self.state("file")["model"], rtol=0, atol=0)
        note = (f"{self.folder}/several.pt", sha256(self.folder / "several.pt"))
        self.assertEqual([(source["path"], source["sha256"]) for source in self.state("file")["sources"]], [note, note])

    def test_resuming_with_other_sources_or_entries_is_refused(self):
        changed = self.state("b")["model"]
        torch.save({"model": changed}, self.folder / "c.pt")
        sources = self.source("a", "c.pt")
        self.trained("average", "changing", *self.data, sources, "epochs=1")
        again = stages.command("average", self.folder / "changing", *self.data, ALLOW)
        self.assert_refused([*again, self.source("c.pt", "a")], r"c\.pt .*pretrained_checkpoint_path")
        entries = [sources, "trainer/checkpoint=no_heads_ensemble"]
        self.assert_refused([*again, *entries], r"'heads\.\*'.*trainer/checkpoint")
        changed["trunk.norm.bias"][0] += 1e-3
        torch.save({"model": changed}, self.folder / "c.pt")
        self.assert_refused([*again, sources], r"c\.pt .*pretrained_checkpoint_path")

    def test_average_interpolates_positions_as_fine_tuning_does(self):
        longer = [*self.data, "num_frames=8", "epochs=1"]
        self.trained("average", "longer", *longer, self.sources)
        self.trained("ft", "longer_ft", *longer, self.source("a"), UNVALIDATED)
        table = self.state("longer")["model"]["model.trunk.pos_embed"]
        self.assertTrue(torch.equal(table, self.state("longer_ft")["model"]["trunk.pos_embed"]))
        self.assertEqual([r["resized"] for r in self.reports("longer")], [{"trunk.pos_embed": "1x4x4 -> 2x4x4"}] * 2)
        self.trained("ft", "longer_new", *longer, FROM_NOTHING, UNVALIDATED)  # its positions are not interpolated ones
        command = stages.command("average", self.folder / "mixed", *longer, self.source("a", "longer_new"))
        self.assert_refused(command, "positions .*longer_new")

    def test_checkpoint_of_an_average_loads_as_one_model(self):
        validated = [setting for setting in self.data if setting != UNVALIDATED]
        settings = [*validated, "trainer.val_epoch_freq=1", "epochs=1"]
        self.trained("average", "one", *settings, self.sources)
        output = self.trained("ft", "as_one", *settings, self.source("one"), ALL, VALIDATE).stdout
        self.assertIn("missing     0", output)
        own, other = self.validation("one"), self.validation("as_one")
        self.assertEqual(own["top1"], other["top1"])
        self.assertAlmostEqual(own["loss"], other["loss"], places=5)
        self.trained("ft", "tuned", *settings, self.source("one"))

    def test_unsuitable_sources_are_refused(self):
        weights = self.state("a")["model"]
        changed = {
            "narrow": ("trunk.norm.weight", weights["trunk.norm.weight"][:-1].clone()),
            "width": ("trunk.pos_embed", torch.zeros(1, 16, 5)),
            "vector": ("trunk.pos_embed", torch.zeros(3)),
            "integers": ("trunk.pos_embed", torch.zeros(1, 16, 96, dtype=torch.int64)),
            "nan": ("trunk.pos_embed", torch.full((1, 16, 96), float("nan"))),
        }
        for name, (entry, tensor) in changed.items():
            torch.save({"model": weights | {entry: tensor}}, self.folder / f"{name}.pt")
        twice = {name: self.source(f"{name}.pt", f"{name}.pt") for name in changed}
        for overrides, key in (
            ([twice["width"]], "width.pt"),
            ([twice["vector"]], "vector.pt"),
            ([twice["integers"]], "trunk.pos_embed .*torch.int64"),
            ([twice["nan"]], "trunk.pos_embed .*not finite"),
            ([self.sources, "ensemble_num_models=3"], "ensemble_num_models .*pretrained_checkpoint_path"),
            ([self.source("a")], "ensemble_weights"),
            ([self.source("a", "narrow.pt")], r"narrow\.pt .*trunk\.norm\.w"),
            ([self.source("a", "gone")], "pretrained_checkpoint_path.*gone|gone.*there is no"),
            ([FROM_NOTHING], "pretrained_checkpoint_path .*null"),
            ([self.sources, '++trainer.checkpoint.drop=["trunk.norm.*"]'], r"a/\S+ .*trunk\.norm\.\S+ is missing"),
            ([self.sources, VALIDATE], "trainer.mode=val.*trainer/checkpoint=load_all"),
        ):
            with self.subTest(key):
                self.assert_refused(stages.command("average", self.folder / "wrong", *self.data, *overrides), key)
        one_model = stages.command("ft", self.folder / "wrong", *self.data, self.sources)
        self.assert_refused(one_model, "pretrained_checkpoint_path .*_ensemble_ft")


class TwoLabelSets(OnVideos):
    """Co-training with a head for each label set, validated in splits of 7 and of 1 videos."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.data = cls.split("inpk150", cls.videos, cls.videos[:7], classes=3)
        cls.data += cls.split("sim150", cls.videos[::-1], cls.videos[9:10], classes=2)
        with stages.record_weights() as cls.steps:
            cls.trained("ft", "run", *cls.data, FROM_NOTHING)
        cls.whole = [cls.source("run/checkpoints/checkpoint.pt"), ALL]

    @classmethod
    def trained(cls, stage: str, name: str, *overrides: str, dataset: str = "inpk150_sim150") -> stages.Result:
        return super().trained(stage, name, *overrides, dataset=dataset)

    def test_each_source_trains_its_own_head(self):
        heads = [[weights[f"heads.{head}.0.weight"] for _, weights in sorted(self.steps.items())] for head in (0, 1)]
        self.assertEqual([len(head[0]) for head in heads], [3, 2])
        changed = [[not torch.equal(*pair) for pair in pairwise(head)] for head in heads]
        self.assertEqual(changed[0], [not each for each in changed[1]])
        self.assertEqual(sum(changed[0]), len(changed[0]) // 2)
        self.assertEqual(set(runs.read_metrics(self.folder / "run", "epoch")[0]["per_source"]), {"inpk150", "sim150"})

    def test_sources_can_share_one_head(self):
        self.trained("ft", "shared", *self.data, FROM_NOTHING, "trainer.data.share_head=true")
        model = self.state("shared")["model"]
        self.assertEqual({name for name in model if name.startswith("heads.")}, HEADS)
        self.assertEqual(len(model["heads.0.0.weight"]), 3)
        with np.load(self.folder / "shared/predictions/sim150.npz", allow_pickle=False) as predictions:
            self.assertEqual(predictions["scores"].shape, (1, 3))

    def test_metrics_are_those_of_the_predictions(self):
        logged, hits, accuracies = self.validation("run"), 0, []
        for source, classes, paths in (("inpk150", 3, self.videos[:7]), ("sim150", 2, self.videos[9:10])):
            with np.load(self.folder / f"run/predictions/{source}.npz", allow_pickle=False) as predictions:
                label, scores = predictions["label"], predictions["scores"]
                self.assertEqual(predictions["path"].tolist(), paths, "each video once, in the order of the split")
                self.assertEqual(predictions["index"].tolist(), list(range(len(paths))))
            self.assertEqual(label.tolist(), [i % classes for i in range(len(paths))])
            self.assertEqual(scores.shape, (len(paths), classes))
            right = scores.argmax(1) == label
            hits += right.sum()
            accuracies.append(100 * np.mean([right[label == k].mean() for k in set(label.tolist())]))
            self.assertAlmostEqual(logged["per_source"][source]["top1"], 100 * right.mean())
            self.assertAlmostEqual(logged["per_source"][source]["mean_class_accuracy"], accuracies[-1])
            with open(self.folder / f"run/predictions/{source}.csv", newline="") as file:
                rows = [(row["path"], row["correct"], row["predicted_1"], row["label"]) for row in csv.DictReader(file)]
            wanted = zip(paths, map(str, right.astype(int)), map(str, scores.argmax(1)), map(str, label), strict=True)
            self.assertEqual(rows, list(wanted))
            with Image.open(self.folder / f"run/pictures/confusion_{source}.png") as image:
                self.assertGreater(np.asarray(image.convert("RGB")).std(), 0)
        self.assertEqual((logged["videos"], logged["top5"]), (8, 100))
        self.assertAlmostEqual(logged["top1"], 100 * hits / 8)
        self.assertAlmostEqual(logged["mean_class_accuracy"], np.mean(accuracies))

    def test_validation_of_a_file_gives_the_metrics_of_the_run_that_wrote_it(self):
        """Also those of its EMA."""
        self.trained("ft", "again", *self.data, *self.whole, VALIDATE)
        self.assertEqual(self.validation("again"), self.validation("run"))
        self.assertFalse((self.folder / "again/checkpoints/checkpoint.pt").exists())
        ema = "trainer.ema_decay=0.5"
        self.trained("ft", "ema", *self.data, FROM_NOTHING, ema)
        self.assertNotEqual(self.validation("ema"), self.validation("run"))
        self.trained("ft", "ema_again", *self.data, self.source("ema/checkpoints/best.pt"), ALL, VALIDATE, ema)
        self.assertEqual(self.validation("ema_again"), self.validation("ema"))

    def test_validation_needs_no_training_data_and_keeps_the_status(self):
        self.trained("ft", "ended", *self.data, FROM_NOTHING)
        before = runs.read_summary(self.folder / "ended")
        gone = [f"++datasets.{name}.train.paths=gone.npy" for name in ("inpk150", "sim150")]
        again = [*self.data, FROM_NOTHING, *gone, VALIDATE, "batch_size=2"]
        for _ in range(2):
            self.trained("ft", "ended", *again)
        after = runs.read_summary(self.folder / "ended")
        self.assertEqual((after["status"], after["steps"]), ("finished", before["steps"]))
        (line,) = runs.read_metrics(self.folder / "ended", "epoch", "val")
        self.assertEqual(line["step"], before["steps"])
        with mock.patch.object(Trainer, "evaluate", side_effect=RuntimeError("broken")):
            result = stages.run_in_process(
                stages.command("ft", self.folder / "ended", *again, dataset="inpk150_sim150")
            )
        self.assertEqual((result.returncode, runs.read_summary(self.folder / "ended")["status"]), (70, "finished"))

    def test_validation_without_the_heads_is_refused(self):
        settings = [*self.data, self.whole[0], "trainer/checkpoint=no_heads", VALIDATE]
        arguments = stages.command("ft", self.folder / "headless", *settings, dataset="inpk150_sim150")
        self.assert_refused(arguments, "heads.*trainer/checkpoint=load_all")

    def test_two_processes_validate_as_one(self):
        self.trained("ft", "two", *self.data, *self.whole, VALIDATE, "launcher.gpus_per_node=2")
        one, two = self.validation("run"), self.validation("two")
        for name in ("top1", "top5", "videos", "mean_class_accuracy"):
            self.assertEqual(one[name], two[name], name)
        self.assertAlmostEqual(one["loss"], two["loss"], places=6)
        for source in ("inpk150", "sim150"):
            files = [self.folder / name / f"predictions/{source}.npz" for name in ("run", "two")]
            first, second = (dict(np.load(file, allow_pickle=False)) for file in files)
            self.assertEqual(set(first), set(second))
            np.testing.assert_allclose(first.pop("scores"), second.pop("scores"), atol=1e-5)
            for name in first:
                np.testing.assert_array_equal(first[name], second[name], name)

    def test_two_processes_train_as_one(self):
        # What is drawn for a batch, not for a sample, is off; gradients travel as they are. Most samples have no label, so that
        # processes and micro-batches hold unequal numbers of labelled ones, and some none.
        few = []
        for source, classes in (("inpk150", 3), ("sim150", 2)):
            labels = [number % classes if number % 5 in (0, 3) else -1 for number in range(len(self.videos))]
            stages.write_split(self.folder, f"few_{source}", "train", self.videos, classes, labels)
            few.append(f"++datasets.{source}.train.labels={self.folder}/few_{source}_train_labels.npy")
        settings = [
            *self.data,
            *few,
            FROM_NOTHING,
            UNVALIDATED,
            "trainer.task.mixing=null",
            "trainer.model.trunk.drop_path=0",
        ]
        self.trained("ft", "one", *settings)
        two = ["launcher.gpus_per_node=2", "trainer.distributed.comms_dtype=null", "trainer.optim.accumulation_steps=2"]
        self.trained("ft", "both", *settings, *two)
        self.assertEqual([line["step"] for line in runs.read_metrics(self.folder / "one")], [1, 2, 3, 4, 5, 6])
        for event in ("step", "epoch"):
            for one, other in zip(
                *(runs.read_metrics(self.folder / name, event) for name in ("one", "both")), strict=True
            ):
                for name in one.keys() & {"loss", "grad_norm", "top1", "top5"}:
                    self.assertAlmostEqual(one[name], other[name], delta=1e-4 * max(1, one[name]), msg=name)


class ClassNames(OnVideos):
    """A run whose classes have names, and data that names them in another order, or otherwise."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.named = [*cls.data, *cls.names("red", "green", "blue")]
        cls.trained("ft", "run", *cls.named, FROM_NOTHING, "trainer.ema_decay=0.5")
        # Class 0 is blue now, and the labels say so.
        labels = [(1, 2, 0)[i % 3] for i in range(7)]
        other = stages.write_split(cls.folder, "ucf101", "other", cls.videos[:7], labels=labels)
        cls.reordered = [override.replace(".other.", ".val.") for override in other] + cls.names("blue", "red", "green")

    @classmethod
    def names(cls, *names: str) -> list[str]:
        file = cls.folder / f"{'_'.join(names)}.txt"
        file.write_text("\n".join(names))
        return [f"++datasets.ucf101.class_names={file}"]

    def test_validation_gives_the_same_metrics(self):
        shutil.copytree(self.folder / "run", self.folder / "own")
        for name, more, epoch in (
            ("own", ["trainer.ema_decay=0.5"], "\nepoch 1 val: "),
            ("file", [self.source("run/checkpoints/checkpoint.pt"), ALL], "\nval: "),
        ):
            output = self.trained("ft", name, *self.data, *self.reordered, VALIDATE, *more).stdout
            self.assertRegex(output, epoch)
            self.assertNotRegex(output, r"\d trained\b")
            self.assertRegex(output, r"\npredictions .*predictions/ucf101\.csv.*pictures/confusion_ucf101\.png")
            for metric in ("loss", "top1", "mean_class_accuracy"):
                self.assertAlmostEqual(
                    self.validation(name)[metric], self.validation("run")[metric], places=5, msg=metric
                )
            one, other = (np.load(self.folder / n / "predictions/ucf101.npz") for n in ("run", name))
            np.testing.assert_allclose(one["scores"][:, [2, 0, 1]], other["scores"], atol=1e-6)

    def test_other_class_names_are_refused(self):
        other = [*self.data, *self.names("red", "green", "yellow")]
        for name, *more in (
            ("new", self.source("run"), VALIDATE, ALL),
            ("new", self.source("run"), "trainer/checkpoint=default"),
            ("run", VALIDATE),
        ):
            self.assert_refused(stages.command("ft", self.folder / name, *other, *more), "class_names")

    def test_training_does_not_resume_with_another_order(self):
        # The file of names is the same, its contents are not.
        shutil.copytree(self.folder / "run", self.folder / "cut")
        summary = self.folder / "cut/summary.json"
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"status": "running"}))
        file = self.folder / "red_green_blue.txt"
        self.addCleanup(file.write_text, file.read_text())
        arguments = stages.command("ft", self.folder / "cut", *self.named, FROM_NOTHING, "trainer.ema_decay=0.5")
        for names in ("green\nred\nblue", "red\ngreen\nyellow"):
            file.write_text(names)
            for more in ([], [ALLOW, "epochs=3"]):
                self.assert_refused([*arguments, *more], "datasets.NAME.class_names")


class Resuming(OnVideos):
    def test_fine_tuning_stopped_in_mid_epoch_and_resumed_equals_uninterrupted(self):
        data = self.split("ucf101", self.videos, self.videos[:2])
        settings = [*data, FROM_NOTHING, "epochs=2", "trainer.ema_decay=0.9", "trainer.data.val_clips=1"]
        self.trained("ft", "whole", *settings)
        self.assertEqual([line["step"] for line in runs.read_metrics(self.folder / "whole")], [1, 2, 3, 4, 5, 6])
        self.assertEqual(len(runs.read_metrics(self.folder / "whole", "epoch", "val")), 2)
        # The second is resumed by another process, and with workers.
        for step, where, workers in (
            (2, stages.run_in_process, "num_workers=0"),
            (4, stages.run_in_subprocess, "num_workers=2"),
        ):
            with self.subTest(step):
                self.stopped("ft", f"stopped_{step}", step, *settings)
                result = where(stages.command("ft", self.folder / f"stopped_{step}", *settings, workers))
                self.assertEqual(result.returncode, 0, result.stderr)
                self.assertIn("Resumed from", result.stdout)
                self.assert_same_run("whole", f"stopped_{step}")
        # It is a test of what draws random numbers.
        config = yaml.safe_load((self.folder / "whole/config.yaml").read_text())
        view, trunk = config["trainer"]["data"]["view"], config["trainer"]["model"]["trunk"]
        self.assertTrue(config["mixing_prob"] == 1 and trunk["drop_path"] and view["rand_augment"] and view["erasing"])


class Refusals(OnVideos):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.data += [UNVALIDATED]
        cls.trained("ft", "run", *cls.data, FROM_NOTHING, "trainer.limit_train_batches=1")

    def test_unsuitable_weights_are_refused(self):
        torch.save({"model": {"epoch": 3}}, self.folder / "numbers.pt")
        (self.folder / "empty").mkdir()
        (self.folder / "names.txt").write_text("one\n")
        heads = '++trainer.checkpoint.keep=["heads.*"]'
        for source, overrides, key in (
            ("run", ["trainer.model.trunk.width=48"], r"trunk\.\S+ \(.*48.*\), got \(.*96"),
            ("run", [heads], "trainer/checkpoint"),
            ("run", [heads, "trainer.checkpoint.drop_if_present=[]"], "trunk_coverage"),
            ("run", ['++trainer.checkpoint.drop=["nothing*"]'], r"trainer\.checkpoint\.drop: 'nothing\*'"),
            ("numbers.pt", [], "numbers.pt"),
            ("empty", [], r"empty.*checkpoints/best\.pt.*checkpoints/checkpoint\.pt"),
            ("gone", [], "gone"),
            ("run", [f"++datasets.ucf101.class_names={self.folder}/names.txt"], "datasets.ucf101.num_classes"),
        ):
            with self.subTest(key):
                self.assert_refused(
                    stages.command("ft", self.folder / "wrong", *self.data, self.source(source), *overrides), key
                )
                self.assertFalse((self.folder / "wrong/config.yaml").exists())

    def test_settings_of_a_run_that_is_there(self):
        four = "++datasets.ucf101.num_classes=4"
        for overrides, key in (
            (['trainer.freeze=["nothing*"]'], r"trainer\.freeze.*'nothing\*'"),
            (['trainer.freeze=["*"]', "trainer.optim.layer_decay=null"], r"trainer\.freeze"),
            ([four], r"datasets\.ucf101\.num_classes: 3 -> 4; epochs: 1 -> 2"),
            ([four, ALLOW], r"heads\.0\.0\.weight.*3, 96.*4, 96"),
        ):
            with self.subTest(key):
                limited = [FROM_NOTHING, "trainer.limit_train_batches=1", "epochs=2"]
                self.assert_refused(stages.command("ft", self.folder / "run", *self.data, *limited, *overrides), key)


if __name__ == "__main__":
    unittest.main()
