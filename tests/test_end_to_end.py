"""Stage 1 on real films, by the command that users type: what a run leaves, and that resuming changes nothing."""

import shutil
import tempfile
import unittest
from pathlib import Path

import torch

from tests import runs
from tests import stage_runs as stages


def here(run_folder: Path, *overrides: str) -> stages.Result:
    return stages.here(runs.command(run_folder, *overrides)[2:])


class Stage1(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.folder = Path(cls.temporary.name)
        cls.data = runs.write_split(cls.folder, runs.real_films() * 8)  # 24 samples: 3 steps an epoch
        cls.whole = cls.folder / "whole"
        cls.result = runs.run(cls.whole, *cls.data, "trainer.logging.pictures_every_epochs=1")

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def assert_same_weights(self, one: Path, other: Path) -> None:
        first, second = runs.weights(one), runs.weights(other)
        self.assertEqual(list(first), list(second))
        for name in first:
            self.assertTrue(torch.equal(first[name], second[name]), name)

    def test_what_a_run_leaves(self):
        self.assertEqual(self.result.returncode, 0, self.result.stderr)
        self.assertRegex(
            self.result.stdout,
            r"step 6/6  loss \d\.\d+  [\d.]+ clips/s  waiting for data \d+%  \d+\.\d GB  ETA 0:00:00",
        )
        found = {str(path.relative_to(self.whole)) for path in self.whole.rglob("*")}
        expected = {"config.yaml", "summary.json", "logs/metrics.jsonl", "logs/rank_0.log", "checkpoints/checkpoint.pt"}
        expected |= {"pictures/epoch_0000.png", "pictures/epoch_0001.gif", "pictures/last.png"}
        self.assertLessEqual(expected, found)
        self.assertFalse(any("outputs" in name for name in found), "Hydra left files of its own")
        self.assertEqual(sorted(p.name for p in self.folder.iterdir() if p.is_dir() and p.name == "outputs"), [])
        self.assertIn("${lr_scale_factor}", (self.whole / "config.yaml").read_text(), "kept unresolved")

    def test_the_log_has_every_step_once_with_its_figures(self):
        steps = runs.lines(self.whole)
        self.assertEqual([line["step"] for line in steps], [1, 2, 3, 4, 5, 6])
        self.assertEqual([line["epoch"] for line in steps], [0, 0, 0, 1, 1, 1])
        for line in steps:
            self.assertLessEqual({"time", "loss", "lr", "grad_norm", "clips_per_second", "data_wait"}, set(line))
        epochs = runs.lines(self.whole, event="epoch")
        self.assertEqual([line["step"] for line in epochs], [3, 6])
        mean = sum(line["loss"] for line in steps[:3]) / 3
        self.assertAlmostEqual(epochs[0]["loss"], mean, places=5)
        self.assertAlmostEqual(epochs[0]["per_source"]["k150"]["loss"], mean, places=5)

    def test_summary(self):
        summary = runs.summary(self.whole)
        self.assertEqual((summary["status"], summary["epochs"], summary["steps"]), ("finished", 2, 6))
        self.assertGreater(summary["clips_per_second"], 0)
        self.assertGreater(summary["wall_time"], 0)

    def test_killed_in_mid_epoch_and_resumed_equals_uninterrupted(self):
        resumed = self.folder / "resumed"
        every = "trainer.checkpoint.save_every_steps=1"
        runs.run_until(resumed, 5, *self.data, every)
        # Another number of workers must not matter either.
        result = runs.run(resumed, *self.data, every, "num_workers=2")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("Resumed from", result.stdout)
        self.assert_same_weights(self.whole, resumed)
        together = [(line["step"], line["loss"]) for line in runs.lines(resumed)]
        self.assertEqual(together, [(line["step"], line["loss"]) for line in runs.lines(self.whole)])

    def test_a_finished_run_ends_at_once(self):
        before = (self.whole / "logs" / "metrics.jsonl").read_text()
        result = here(self.whole, *self.data)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("nothing is left to train", result.stdout)
        self.assertEqual((self.whole / "logs" / "metrics.jsonl").read_text(), before)

    def test_two_processes_equal_one(self):
        two = self.folder / "two"
        result = here(two, *self.data, "launcher.gpus_per_node=2", "trainer.distributed.comms_dtype=null")
        self.assertEqual(result.returncode, 0, result.stderr)
        for one, other in zip(runs.lines(self.whole), runs.lines(two), strict=True):
            self.assertAlmostEqual(one["loss"], other["loss"], delta=1e-4)
        one, other = runs.lines(self.whole, "epoch"), runs.lines(two, "epoch")
        self.assertEqual(len(one), 2)
        for first, second in zip(one, other, strict=True):
            self.assertAlmostEqual(first["loss"], second["loss"], delta=1e-4)
        self.assertTrue((two / "logs" / "rank_1.log").exists())

    def test_two_processes_killed_and_resumed(self):
        straight, resumed = self.folder / "two_straight", self.folder / "two_resumed"
        settings = [*self.data, "launcher.gpus_per_node=2", "trainer.checkpoint.save_every_steps=2"]
        self.assertEqual(here(straight, *settings).returncode, 0)
        runs.run_until(resumed, 5, *settings)
        result = here(resumed, *settings)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assert_same_weights(straight, resumed)

    def test_begun_by_two_processes_and_ended_by_one(self):
        """The samples of each step are the same for any number of processes."""
        changed = self.folder / "changed"
        settings = [*self.data, "trainer.distributed.comms_dtype=null", "trainer.checkpoint.save_every_steps=1"]
        runs.run_until(changed, 3, *settings, "launcher.gpus_per_node=2")
        result = here(changed, *settings)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertRegex(result.stdout, "launcher.gpus_per_node: 2 -> 1")
        for one, other in zip(runs.lines(self.whole), runs.lines(changed), strict=True):
            self.assertEqual(one["step"], other["step"])
            self.assertAlmostEqual(one["loss"], other["loss"], delta=1e-4)

    def test_validation_of_a_checkpoint_counts_every_video_once_for_any_number_of_processes(self):
        films = runs.real_films() * 2 + runs.real_films()[:1]  # 7: divides neither by 2 nor into batches
        runs.np.save(self.folder / "val.npy", runs.np.array(films))
        settings = [
            *self.data,
            "trainer.mode=val",
            f"++datasets.k150.val.paths={self.folder}/val.npy",
            "++datasets.k150.val.labels=null",
        ]
        figures = []
        for count in (1, 2):
            folder = self.folder / f"val_{count}"
            shutil.copytree(self.whole / "checkpoints", folder / "checkpoints")
            result = here(folder, *settings, f"launcher.gpus_per_node={count}")
            self.assertEqual(result.returncode, 0, result.stderr)
            figures.append(runs.lines(folder, "epoch", "val")[-1])
        self.assertEqual([line["videos"] for line in figures], [7, 7])
        self.assertAlmostEqual(figures[0]["loss"], figures[1]["loss"], places=6)


if __name__ == "__main__":
    unittest.main()
