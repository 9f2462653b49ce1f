"""Class weights in the training loss, and class-balanced sampling, from settings to the run."""

import shutil
import unittest

import torch
from torch.nn import functional as F

from omnivision.data.batch import Batch
from omnivision.data.catalog import LabelSets
from omnivision.tasks.classify import Classify, balanced_weights, soft_cross_entropy
from omnivision.utils.errors import UserError
from tests import fixtures
from tests import stage_runs as stages

SETS = LabelSets([3], {"ucf101": 0})


class Weights(unittest.TestCase):
    def test_the_loss_is_torchs(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits, target = torch.randn(6, 3, generator=generator), torch.rand(6, 3, generator=generator)
        target /= target.sum(1, keepdim=True)
        weights = torch.tensor([0.5, 2.0, 3.0])
        expected = F.cross_entropy(logits, target, weights)
        torch.testing.assert_close(soft_cross_entropy(logits, target, weights), expected)

    def test_balanced(self) -> None:
        counts = [10, 30, 0, 20]
        weights = balanced_weights(counts)
        torch.testing.assert_close(weights, torch.tensor([2.0, 2 / 3, 1.0, 1.0]))
        self.assertAlmostEqual(float((weights * torch.tensor(counts)).sum()), 60, places=4)  # 1 on average

    def test_training_has_weights_and_evaluation_has_none(self) -> None:
        task, plain = (
            Classify(SETS, class_weights=[1.0, 5.0, 0.0]),
            Classify(SETS),
        )
        label = torch.tensor([1, 2, 0, 1])
        batch = Batch(torch.zeros(4, 3, 1, 2, 2, dtype=torch.uint8), label, label, "ucf101", [""] * 4)
        logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))

        def model(video, head, depth):
            return logits

        each = F.cross_entropy(logits, label, reduction="none")
        expected = (each * torch.tensor([5.0, 0.0, 1.0, 5.0])).mean()
        torch.testing.assert_close(task.training_step(model, batch).loss, expected)
        for own in (task, plain):
            torch.testing.assert_close(own.evaluation_step(model, batch).loss, each.mean())

    def test_as_many_weights_as_classes(self) -> None:
        with self.assertRaisesRegex(UserError, "class_weights"):
            Classify(SETS, class_weights=[1.0, 2.0])


class Run(fixtures.Folder):
    def setUp(self) -> None:
        super().setUp()
        self.paths = stages.write_videos(self.folder / "videos", 12)
        labels = [0] * 8 + [1] * 3 + [2]
        self.data = [
            word
            for which in ("train", "val")
            for word in stages.write_split(self.folder, "ucf101", which, self.paths, labels=labels)
        ]

    def run_stage(self, name: str, *more: str) -> stages.Result:
        words = stages.command("ft", self.folder / name, *self.data, "pretrained_checkpoint_path=null", *more)
        result = stages.run_in_process(words)
        self.assertEqual(result.returncode, 0, result.stderr[-2000:])
        return result

    def test_dry_shows_weights_and_draws(self) -> None:
        out = self.run_stage("dry", "trainer.mode=dry", "trainer.task.class_weights=balanced")
        self.assertIn("classes of head 0 have weights 0.5 to 4", out.stdout)
        out = self.run_stage("dry", "trainer.mode=dry", "trainer.data.balance=1")
        self.assertIn("each class is drawn 4 to 4 times in a pass; classes have 1 to 8 samples", out.stdout)

    def test_a_resumed_balanced_run_equals_an_uninterrupted_one(self) -> None:
        common = "trainer.data.balance=1", "trainer.task.class_weights=[1,2,3]", "epochs=2"
        self.run_stage("whole", *common, "trainer.checkpoint.save_freq=1")
        run = self.folder / "cut"
        shutil.copytree(self.folder / "whole", run)
        for file in (run / "checkpoints").glob("*"):
            if not file.name.startswith("checkpoint_1.pt"):
                file.unlink()
        for suffix in ("", ".json"):
            (run / "checkpoints" / f"checkpoint_1.pt{suffix}").rename(run / "checkpoints" / f"checkpoint.pt{suffix}")
        (run / "summary.json").unlink()
        resumed = self.run_stage("cut", *common, "trainer.checkpoint.save_freq=1")
        self.assertIn("resumed after 1 epoch", resumed.stdout)
        whole, cut = (stages.load_checkpoint(self.folder / name)["model"] for name in ("whole", "cut"))
        for name, tensor in whole.items():
            self.assertTrue(torch.equal(tensor, cut[name]), name)

    def test_settings_of_another_number_of_classes(self) -> None:
        words = stages.command("ft", self.folder / "bad", *self.data, "pretrained_checkpoint_path=null")
        for wrong in ("class_weights=[1,2]", "class_weights=[1,2,-1]", "class_weights=balancd"):
            result = stages.run_in_process([*words, f"trainer.task.{wrong}"])
            self.assertEqual(result.returncode, 1, wrong)
            self.assertIn("trainer.task.class_weights", result.stderr)
        both = "trainer.task.class_weights=balanced", "trainer.data.balance=1"
        self.assertEqual(stages.run_in_process([*words, *both]).returncode, 1)


if __name__ == "__main__":
    unittest.main()
