"""Stage 1 on real videos, by the command that users type: what a run leaves, and that resuming changes nothing."""

import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch

from tests import runs
from tests import stage_runs as stages

EVERY_STEP = "trainer.checkpoint.save_every_steps=1"
TWO, EXACT = "launcher.gpus_per_node=2", "trainer.distributed.comms_dtype=null"


class Stage1(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.data = runs.write_split(cls.folder, runs.real_videos() * 8)  # 24 samples: 3 steps an epoch
        cls.whole = cls.folder / "whole"
        cls.result = runs.run(cls.whole, *cls.data, "trainer.logging.pictures_every_epochs=1")

    def here(self, name: str, *overrides: str) -> stages.Result:
        result = stages.run_in_process(runs.command(self.folder / name, *self.data, *overrides)[2:])
        self.assertEqual(result.returncode, 0, result.stderr)
        return result

    def assert_same_weights(self, one: Path, other: Path) -> None:
        first, second = runs.load_weights(one), runs.load_weights(other)
        self.assertEqual(list(first), list(second))
        torch.testing.assert_close(first, second, rtol=0, atol=0)

    def assert_close_losses(self, name: str) -> None:
        for event in ("step", "epoch"):
            one, other = (runs.read_metrics(folder, event) for folder in (self.whole, self.folder / name))
            self.assertEqual([line["step"] for line in one], [line["step"] for line in other])
            np.testing.assert_allclose(
                [line["loss"] for line in one], [line["loss"] for line in other], rtol=0, atol=1e-4
            )

    def test_what_a_run_leaves(self):
        self.assertEqual(self.result.returncode, 0, self.result.stderr)
        line = r"step 6/6  loss \d\.\d+  [\d.]+ clips/s  waiting for data \d+%  \d+\.\d GB  ETA 0:00:00"
        self.assertRegex(self.result.stdout, line)
        found = {str(path.relative_to(self.whole)) for path in self.whole.rglob("*")}
        expected = {"config.yaml", "summary.json", "logs/metrics.jsonl", "logs/rank_0.log", "checkpoints/checkpoint.pt"}
        expected |= {"pictures/epoch_0000.png", "pictures/epoch_0001.gif", "pictures/last.png"}
        self.assertLessEqual(expected, found)
        self.assertFalse(any("outputs" in name for name in found), "Hydra left files of its own")
        self.assertIn("${lr_scale_factor}", (self.whole / "config.yaml").read_text(), "kept unresolved")
        summary = runs.read_summary(self.whole)
        self.assertEqual((summary["status"], summary["epochs"], summary["steps"]), ("finished", 2, 6))
        self.assertTrue(summary["clips_per_second"] > 0 and summary["wall_time"] > 0)

    def test_the_log_has_every_step_once_with_its_metrics(self):
        steps, epochs = runs.read_metrics(self.whole), runs.read_metrics(self.whole, "epoch")
        self.assertEqual([(line["step"], line["epoch"]) for line in steps], [(k, (k - 1) // 3) for k in range(1, 7)])
        for line in steps:
            self.assertLessEqual({"time", "loss", "lr", "grad_norm", "clips_per_second", "data_wait"}, set(line))
        self.assertEqual([line["step"] for line in epochs], [3, 6])
        mean = sum(line["loss"] for line in steps[:3]) / 3
        for average in (epochs[0]["loss"], epochs[0]["per_source"]["k150"]["loss"]):
            self.assertAlmostEqual(average, mean, places=5)

    def test_killed_in_mid_epoch_and_resumed_equals_uninterrupted(self):
        resumed = self.folder / "resumed"
        runs.run_and_kill(resumed, 5, *self.data, EVERY_STEP)
        # Another number of workers must not matter either.
        result = runs.run(resumed, *self.data, EVERY_STEP, "num_workers=2")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("Resumed from", result.stdout)
        self.assert_same_weights(self.whole, resumed)
        losses = [[(line["step"], line["loss"]) for line in runs.read_metrics(run)] for run in (self.whole, resumed)]
        self.assertEqual(*losses)

    def test_killed_and_resumed_with_an_optimizer_of_timm(self):
        lamb = "trainer.optim.optimizer._target_=timm.optim.Lamb", "~trainer.optim.optimizer.fused"
        runs.run(self.folder / "lamb", *self.data, *lamb)
        runs.run_and_kill(self.folder / "lamb_resumed", 5, *self.data, *lamb, EVERY_STEP)
        runs.run(self.folder / "lamb_resumed", *self.data, *lamb, EVERY_STEP)
        self.assert_same_weights(self.folder / "lamb", self.folder / "lamb_resumed")

    def test_a_finished_run_ends_at_once(self):
        before = (self.whole / "logs/metrics.jsonl").read_text()
        self.assertIn("nothing is left to train", self.here("whole").stdout)
        self.assertEqual((self.whole / "logs/metrics.jsonl").read_text(), before)

    def test_two_processes_equal_one_also_after_a_kill(self):
        self.here("two", TWO, EXACT)
        self.assert_close_losses("two")
        self.assertTrue((self.folder / "two/logs/rank_1.log").exists())
        runs.run_and_kill(self.folder / "two_resumed", 5, *self.data, TWO, EXACT, EVERY_STEP)
        self.here("two_resumed", TWO, EXACT, EVERY_STEP)
        self.assert_same_weights(self.folder / "two", self.folder / "two_resumed")

    def test_begun_by_two_processes_and_ended_by_one(self):
        """The samples of each step are the same for any number of processes."""
        runs.run_and_kill(self.folder / "changed", 3, *self.data, EXACT, EVERY_STEP, TWO)
        self.assertRegex(self.here("changed", EXACT, EVERY_STEP).stdout, "launcher.gpus_per_node: 2 -> 1")
        self.assert_close_losses("changed")


if __name__ == "__main__":
    unittest.main()
