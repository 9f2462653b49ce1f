"""Runs and checkpoints of an earlier release (tests/old_runs, written at e208b18) resume and load, with the same numbers.

Each run directory holds its last checkpoint and the one of a step before. A run resumed from the earlier one must reach the
weights of the last.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import torch

import omnivision
from omnivision.config.validate import read_run_config
from omnivision.utils.io import safe_load
from tests.runs import ROOT

OLD_RUNS = Path(__file__).parent / "old_runs"
SMALL = (
    "image_size=32 short_side=40 num_frames=4 clip_duration=0.7 num_workers=0 epochs=4 trainer.optim.amp.enabled=false "
    "trainer.logging.log_freq=1 trainer.logging.pictures_every_epochs=null trainer.accelerator=cpu submitit.use_cluster=false "
    "trainer.checkpoint.save_every_steps=1 trainer.model.trunk.width=12 trainer.model.trunk.depth=1 "
    "trainer.model.trunk.heads=2 trainer.model.trunk.tubelet=[2,8,8]"
).split()
LABELLED = (
    "+trainer=mae_ft_ucf101_config batch_size=2 lr_scale_factor=32 ++datasets.ucf101.train.paths=train.npy "
    "++datasets.ucf101.train.labels=train_labels.npy ++datasets.ucf101.val.paths=val.npy "
    "++datasets.ucf101.val.labels=val_labels.npy ++datasets.ucf101.num_classes=2"
).split()
COMMANDS = {
    "mae": "+experiments=omnimae/omnimain_train_video +trainer=mae_k150_config trainer/model=vitmicro batch_size=4 "
    "lr_scale_factor=64 ++datasets.k150.train.paths=train.npy ++datasets.k150.train.labels=null "
    "trainer.model.decoder.width=12 trainer.model.decoder.depth=1 trainer.model.decoder.heads=2".split(),
    "finetune": [
        *"+experiments=omnimae/omnimain_train_video_ft trainer/model=vitmicro_ft".split(),
        *LABELLED,
        *"trainer.ema_decay=0.9 pretrained_checkpoint_path=mae".split(),
    ],
    "average": [
        *"+experiments=omnimae/omnimain_train_video_ensemble_ft trainer/model=vitmicro_average_ft".split(),
        *LABELLED,
        "pretrained_checkpoint_path=[mae,finetune]",
    ],
}


class OldRuns(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name) / "old_runs"
        shutil.copytree(OLD_RUNS, self.folder)

    def test_their_settings_can_be_read(self):
        for run in COMMANDS:
            self.assertEqual(read_run_config(self.folder / run / "config.yaml").trainer.max_epochs, 4)

    def test_resumed_runs_reach_the_weights_of_the_uninterrupted_ones(self):
        # Sums in another order round differently: one thread, as when the runs were made.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        for run in COMMANDS:
            with self.subTest(run):
                checkpoints = self.folder / run / "checkpoints"
                expected = safe_load(OLD_RUNS / run / "checkpoints/checkpoint.pt")
                for suffix in (".pt", ".pt.json"):  # from the checkpoint before the last
                    (checkpoints / f"previous{suffix}").replace(checkpoints / f"checkpoint{suffix}")
                command = [sys.executable, str(ROOT / "train_app_submitit.py"), *SMALL, *COMMANDS[run]]
                command.append(f"launcher.experiment_log_dir={run}")
                result = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
                self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
                self.assertRegex(result.stdout, "resumed after 3 epochs")
                resumed = safe_load(checkpoints / "checkpoint.pt")
                self.assertLessEqual(expected.keys(), resumed.keys())
                self.assertEqual(list(resumed["model"]), list(expected["model"]))
                torch.testing.assert_close(resumed["model"], expected["model"], rtol=1e-4, atol=1e-6)
                shutil.rmtree(self.folder)  # other runs start from what this one had
                shutil.copytree(OLD_RUNS, self.folder)

    def test_checkpoints_load(self):
        best = self.folder / "average/checkpoints/best.pt"
        saved = safe_load(best)
        for source in saved["sources"]:  # absolute paths of the machine that made them
            source["path"] = str(self.folder / Path(source["path"]).relative_to("/tmp/old/w"))
        for file in (best, Path(f"{best}.json")):  # the tensors are mapped from the file
            file.unlink()
        torch.save(saved, best)
        for run in ("finetune", "average"):
            self.assertEqual(len(omnivision.load(self.folder / run).predict(self.folder / "video_0.mp4")), 2, run)
        omnivision.load(self.folder / "mae").reconstruct(self.folder / "video_0.mp4")


if __name__ == "__main__":
    unittest.main()
