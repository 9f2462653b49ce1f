"""Attentive probes: a probe of a grid is trained as if alone, and the one that counts is chosen on held-out training videos."""

import json
import unittest
from unittest import mock

import numpy as np
import torch

import omnivision
from omnivision.data.catalog import Dataset, LabelSets, Split
from omnivision.models.attentive import AttentiveClassifier
from omnivision.tasks.classify import Classify
from omnivision.tools.main import main
from tests import fixtures, runs
from tests import stage_runs as stages
from tests import tiny_models as tiny


class Model(unittest.TestCase):
    def model(self, **changes):
        torch.manual_seed(0)
        return AttentiveClassifier(tiny.trunk(), [3, 5], heads=3, **changes)

    def test_shapes(self):
        model = self.model(blocks=3, lr_factors=[1.0, 2.0], weight_decay_factors=[1.0, 3.0, 5.0])
        video = torch.zeros(2, 3, 4, 32, 32, dtype=torch.uint8)
        self.assertEqual(model(video, 1).shape, (6, 2, 5))
        self.assertEqual(model.eval()(video, 0).shape, (2, 3))

    def test_evaluation_uses_the_selected_probe(self):
        model = tiny.scrambled(self.model(lr_factors=[1.0, 2.0]))
        video = torch.zeros(2, 3, 4, 32, 32, dtype=torch.uint8)
        every = model(video, 0, every=True)
        for number in (0, 1):
            model.selected.fill_(number)
            self.assertTrue(torch.equal(model(video, 0), every[number]))
        self.assertFalse(torch.equal(every[0], every[1]))

    def test_the_loss_decides_between_probes_with_equal_top1(self):
        task, model = Classify(LabelSets({"set": 0}, [3])), self.model(lr_factors=[1.0, 2.0, 3.0])
        top1, loss = (50.0, 75.0, 75.0), (0.1, 0.9, 0.8)
        metrics = {f"{name}_{k}": own[k] for name, own in (("top1", top1), ("loss", loss)) for k in range(3)}
        self.assertEqual(task.choose(model, metrics | {"videos": 4})["probe"], 2)

    def test_it_attends_to_all_tokens(self):
        model = tiny.scrambled(self.model())
        video = torch.zeros(1, 3, 4, 32, 32, dtype=torch.uint8)
        for t, y, x in ((0, 0, 0), (3, 31, 31), (0, 31, 0)):
            changed = video.clone()
            changed[0, :, t, y, x] = 255
            self.assertFalse(torch.equal(model(video), model(changed)), (t, y, x))

    def test_attention_is_that_of_the_pool(self):
        """With values that are the tokens' numbers, the pooled value is the mean of the numbers under the attention."""
        probe = tiny.scrambled(self.model(blocks=2)).probes[0]
        tokens = torch.randn(2, 32, 48, generator=torch.Generator().manual_seed(0))
        weights = probe.attention(tokens)
        torch.testing.assert_close(weights.sum(1), torch.ones(2))
        found = {}

        def spy(q, k, v):
            found["weights"] = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 0]
            return original(q, k, v)

        original = torch.nn.functional.scaled_dot_product_attention
        with mock.patch("omnivision.models.mae.F.scaled_dot_product_attention", spy):
            probe(tokens, 0)
        torch.testing.assert_close(weights, found["weights"])


class HoldOut(fixtures.Folder):
    def test_whole_sources_are_held_out(self):
        paths = [f"v_Run_g{group:02}_c{clip:02}.avi" for group in range(10) for clip in range(4)]
        np.save(self.folder / "p.npy", np.array(paths))
        np.save(self.folder / "l.npy", np.arange(40) % 3)
        files = {"paths": str(self.folder / "p.npy"), "labels": str(self.folder / "l.npy")}
        split = Split(Dataset(name="ucf101", num_classes=3, train=files), "train")
        split.hold_out(0.2)
        parts = [[part.path(i) for i in range(len(part))] for part in (split, split.held_out)]
        self.assertEqual([len(part) for part in parts], [32, 8])
        groups = [{path[:9] for path in part} for part in parts]
        self.assertFalse(groups[0] & groups[1])
        for part in (split, split.held_out):
            for index in range(len(part)):
                self.assertEqual(part.label(index), paths.index(part.path(index)) % 3)
            self.assertEqual(sum(part.label_counts()), len(part))


class Stage(fixtures.Folder):
    def setUp(self):
        super().setUp()
        paths = stages.write_videos(self.folder / "videos", 15)
        self.data = [
            word
            for which, own in (("train", paths), ("val", paths[:6]))
            for word in stages.write_split(self.folder, "ucf101", which, own)
        ]

    def run_stage(self, name, *more, ranks=1):
        words = stages.command("attentive", self.folder / name, *self.data, "epochs=2", "mixing_prob=0", *more)
        words += ["pretrained_checkpoint_path=null", "trainer.model.heads=2", f"launcher.gpus_per_node={ranks}"]
        result = stages.run_in_process(words)
        self.assertEqual(result.returncode, 0, result.stderr[-3000:])
        return stages.load_checkpoint(self.folder / name)["model"]

    def test_a_probe_of_a_grid_is_trained_as_if_alone(self):
        grid = self.run_stage("grid", "trainer.model.lr_factors=[1,30]", "trainer.model.weight_decay_factors=[1,50]")
        for number, (lr, weight_decay) in enumerate(((1, 1), (1, 50), (30, 1), (30, 50))):
            alone = self.run_stage(
                f"alone_{number}",
                f"trainer.model.lr_factors=[{lr}]",
                f"trainer.model.weight_decay_factors=[{weight_decay}]",
            )
            for name, tensor in alone.items():
                if name.startswith("probes.0."):
                    of_grid = grid[name.replace("probes.0.", f"probes.{number}.", 1)]
                    self.assertTrue(torch.equal(tensor, of_grid), (number, name))

    def test_the_choice_is_made_on_held_out_videos(self):
        self.run_stage("run", "lr=1e-3", "trainer.model.lr_factors=[1e-6,10]", "trainer.model.weight_decay_factors=[1]")
        lines = (self.folder / "run" / "logs" / "metrics.jsonl").read_text().splitlines()
        held_out = [line for line in map(json.loads, lines) if line["phase"] == "held_out"]
        self.assertEqual(len(held_out), 2)
        last = held_out[-1]
        self.assertEqual(last["videos"], 2)  # a tenth of 15
        self.assertEqual(last["top1_by_probe"][last["probe"]], max(last["top1_by_probe"]))
        model = stages.load_checkpoint(self.folder / "run")["model"]
        self.assertEqual(int(model["selected"]), last["probe"])

    def test_two_ranks_choose_as_one_and_resuming_changes_nothing(self):
        factors = "trainer.model.lr_factors=[1,30]", "trainer.model.weight_decay_factors=[1]"
        one, two = (self.run_stage(name, *factors, ranks=ranks) for name, ranks in (("one", 1), ("two", 2)))
        self.assertEqual(one["selected"], two["selected"])
        self.run_stage("cut", *factors, "epochs=1")
        cut = self.run_stage("cut", *factors, "trainer.checkpoint.allow_changes=true")
        self.assertEqual(cut.keys(), one.keys())

    def test_the_model_is_used_like_others(self):
        self.run_stage("run", "trainer.model.lr_factors=[1,30]", "trainer.model.weight_decay_factors=[1]")
        run, video = self.folder / "run", str(self.folder / "videos" / "0.mp4")
        scores = omnivision.load(run).scores(video)
        out = self.folder / "out.safetensors"
        self.assertEqual(main(["export", str(run), str(out), "--to", "safetensors"]), 0)
        np.testing.assert_allclose(omnivision.load(out).scores(video), scores, rtol=1e-6)
        self.assertEqual(main(["export", str(run), str(self.folder / "hf"), "--to", "hf"]), 1)
        self.assertEqual(main(["verify", str(run), "--all"]), 0)
        for name, code in (("attended.gif", 0), ("attended.png", 0), ("attended.gif", 1)):  # it exists then
            self.assertEqual(main(["attention", str(run), video, str(self.folder / name)]), code)
        summary = runs.read_summary(run)
        self.assertEqual((summary["run"]["model"], summary["run"]["trunk"]), ("attentive", "frozen"))

    def test_a_grid_needs_held_out_videos(self):
        words = stages.command("attentive", self.folder / "run", *self.data, "trainer.data.hold_out=0")
        result = stages.run_in_process([*words, "pretrained_checkpoint_path=null"])
        self.assertEqual(result.returncode, 1)
        self.assertIn("trainer.data.hold_out", result.stderr)


if __name__ == "__main__":
    unittest.main()
