"""trainer.mode=dry: what would stop a run comes first, with exit code 1, and stops the run itself, too."""

import contextlib
import copy
import os
import shutil
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from omegaconf import OmegaConf

from omnivision import train
from omnivision.config.validate import validate_config
from omnivision.data.encode import write_video
from omnivision.data.video import VideoFile
from omnivision.launch import slurm
from omnivision.reporting.run_directory import RunDir
from omnivision.training import build, dry_run, preflight
from omnivision.training.trainer import Trainer
from tests import stage_runs as stages

STOPS = "This run would stop before its first step:\n- "


class Dry(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        videos = stages.write_videos(cls.folder / "videos", 6)
        splits = [stages.write_split(cls.folder, "ucf101", which, videos) for which in ("train", "val")]
        cls.data = [override for split in splits for override in split]
        nothing = "pretrained_checkpoint_path=null"
        cls.config = stages.compose_config(*stages.command("ft", cls.folder, *cls.data, nothing))
        cls.config.datasets = {"ucf101": cls.config.datasets.ucf101}  # the others would only take time
        torch.save({"model": build.build_model(validate_config(cls.config)).state_dict()}, cls.folder / "fits.pt")
        finished = cls.start("finished", "train", {"trainer.limit_train_batches": 1})
        assert finished.returncode == 0, finished.stderr

    @classmethod
    def start(cls, run: str, mode: str, changes: dict) -> stages.Result:
        """The command of a run, in this process; `changes` are settings by name."""
        config = copy.deepcopy(cls.config)
        where = {"launcher.experiment_log_dir": str(cls.folder / run), "trainer.mode": mode}
        for name, value in (where | changes).items():
            OmegaConf.update(config, name, value, force_add=True)
        with mock.patch.object(train, "compose_configs", lambda _: [config]):
            return stages.run_in_process([])

    def dry(self, run: str, changes: dict) -> stages.Result:
        # Both are slow.
        with (
            mock.patch.object(dry_run, "draw_schedules"),
            mock.patch.object(build, "measure_clip_cost", return_value=None),
        ):
            return self.start(run, "dry", changes)

    def assert_stops(self, key: str, run: str, changes: dict) -> None:
        """The dry run names `key` first, with exit code 1, and the run refuses to start, naming it too."""
        shown = self.dry(run, changes)
        self.assertEqual((shown.returncode, shown.stderr), (1, ""))
        self.assertTrue(shown.stdout.startswith(STOPS), shown.stdout)
        self.assertIn(key, shown.stdout.partition("\n\n")[0])
        self.assertIn("\nmodel  ", shown.stdout)
        refused = self.start(run, "train", changes)
        self.assertEqual(refused.returncode, 1, refused.stdout)
        self.assertIn(key, refused.stderr)
        self.assertNotIn("step 1", refused.stdout)

    def test_valid_run_passes(self):
        shown = self.start("new", "dry", {"pretrained_checkpoint_path": f"{self.folder}/fits.pt"})
        self.assertEqual((shown.returncode, shown.stderr), (0, ""))
        self.assertRegex(shown.stdout, r"^(warning: .*\n)*model ")
        self.assertRegex(shown.stdout, r"Weights from .*fits.pt\n  loaded +29 ")
        self.assertEqual(os.listdir(self.folder / "new"), ["dry.png"])

    def test_missing_data_stops(self):
        nowhere = {"datasets.ucf101.prefix": "/nowhere"}
        self.assert_stops("datasets.ucf101.prefix", "none", nowhere)
        shown = self.dry("none", nowhere | {"pretrained_checkpoint_path": "/nowhere"})
        self.assertRegex(shown.stdout, r"(?s)datasets.ucf101.prefix.*\n- [^\n]*pretrained_checkpoint_path.*\nmodel  ")
        shown = self.dry("none", nowhere | {"submitit.use_cluster": True})
        self.assertRegex(shown.stdout, "\nwarning: .*datasets.ucf101.prefix", "compute nodes may see them")

    def test_labels_out_of_range_stop(self):
        np.save(self.folder / "labels.npy", [0, 1, 2, 3, 0, 1])
        self.assert_stops("datasets.ucf101", "labels", {"datasets.ucf101.train.labels": f"{self.folder}/labels.npy"})

    def test_unsuitable_weights_stop(self):
        weights = {"pretrained_checkpoint_path": f"{self.folder}/fits.pt"}
        self.assert_stops("trainer/model", "misfit", weights | {"trainer.model.trunk.width": 48})
        self.assert_stops("trunk_coverage", "misfit", weights | {"trainer.model.trunk.depth": 3})
        four = {"datasets.ucf101.num_classes": 4, "trainer.checkpoint.drop_if_present": []}
        self.assert_stops("heads", "misfit", weights | four)
        (self.folder / "broken.pt").write_bytes((self.folder / "fits.pt").read_bytes()[:-100])
        self.assert_stops("broken.pt", "misfit", {"pretrained_checkpoint_path": f"{self.folder}/broken.pt"})

    def test_sources_of_an_average_are_checked(self):
        sources = f"pretrained_checkpoint_path=[{self.folder}/fits.pt,{self.folder}/fits.pt]"
        average = stages.command("average", self.folder / "average", *self.data, sources, "trainer.mode=dry")
        with mock.patch.object(dry_run, "draw_schedules"):
            self.assertEqual(stages.run_in_process(average).returncode, 0)
            shown = stages.run_in_process([*average, "trainer.model.trunk.width=48"])
        self.assertEqual(shown.returncode, 1)
        self.assertRegex(shown.stdout, rf"^{STOPS}.*trunk\..*\(96.*pretrained_checkpoint_path")

    def test_run_directory_with_other_settings_stops(self):
        limit = {"trainer.limit_train_batches": 1}
        shown = self.dry("finished", limit | {"epochs": 3, "trainer.checkpoint.allow_changes": True})
        self.assertEqual(shown.returncode, 0)
        self.assertRegex(shown.stdout, r"\nsteps .* = 3, 2 of them left\n")
        self.assertRegex(shown.stdout, r"\nweights +its own, resumed after 1 epoch\n")
        self.assertNotIn("trainer.mode", shown.stdout)
        self.assertNotIn("weights      random", self.dry("finished", limit | {"epochs": 3}).stdout)
        self.assertEqual(self.dry("finished", limit).returncode, 0)
        self.assert_stops("allow_changes", "finished", limit | {"trainer.optim.gradient_clip": 1.0})
        settings = validate_config(self.config)
        estimated = preflight.checkpoint_bytes(settings, build.build_model(settings, "meta"))
        size = (self.folder / "finished/checkpoints/checkpoint.pt").stat().st_size
        self.assertAlmostEqual(size / estimated, 1, delta=0.1)
        allowed = limit | {"trainer.checkpoint.allow_changes": True}
        self.assertEqual(self.dry("finished", allowed | {"epochs": 2}).returncode, 0)
        self.assert_stops("trainer/model", "finished", allowed | {"trainer.model.trunk.width": 48})
        shutil.copytree(self.folder / "finished/checkpoints", self.folder / "broken/checkpoints")
        (self.folder / "broken/checkpoints/checkpoint.pt").write_bytes(b"x")
        self.assert_stops("launcher.experiment_log_dir", "broken", limit)

    def test_run_directory_in_use_stops(self):
        holder = RunDir(self.folder / "held")
        holder.create()
        holder.lock()
        self.addCleanup(holder.unlock)
        self.assert_stops("launcher.experiment_log_dir", "held", {})

    def test_settings_that_slurm_rejects_stop(self):
        wrong = {"submitit.use_cluster": True, "submitit.setup": ["if true; then"]}
        answers = {"is_available": True, "squeue": {}, "partition_limits": (None, None)}
        with contextlib.ExitStack() as stack:
            for name, answer in answers.items():
                stack.enter_context(mock.patch.object(slurm, name, return_value=answer))
            self.assert_stops("submitit.setup", "cluster", wrong)

    def test_too_little_memory_stops(self):
        with mock.patch.object(preflight, "host_memory", lambda: 10**6):
            self.assert_stops("trainer/model", "memory", {})

    def test_unreadable_data_stops(self):
        garbage = [str(self.folder / f"garbage{number}.mp4") for number in range(6)]
        for path in garbage:
            Path(path).write_bytes(b"no video " * 500)
        good = np.load(self.folder / "ucf101_train_paths.npy").tolist()
        np.save(self.folder / "garbage.npy", garbage)
        np.save(self.folder / "half.npy", garbage[:3] + good[3:])
        np.save(self.folder / "one.npy", garbage[:5] + good[5:])
        np.save(self.folder / "beyond.npy", [[100.0, 101.0]] * 6)
        for which in ("train", "val"):
            name = f"datasets.ucf101.{which}"
            self.assert_stops(name, "unreadable", {f"{name}.paths": f"{self.folder}/garbage.npy"})
            self.assert_stops(name, "unreadable", {f"{name}.segments": f"{self.folder}/beyond.npy"})
        for file in ("half", "one"):
            shown = self.dry("partly", {"datasets.ucf101.train.paths": f"{self.folder}/{file}.npy"})
            self.assertEqual(shown.returncode, 0, shown.stdout)
            self.assertRegex(shown.stdout, r"warning: .*ucf101 \(train\).*garbage0.mp4: .*bad_sample_budget")

    def test_missing_files_beyond_the_budget_are_warned_of(self):
        good = np.load(self.folder / "ucf101_train_paths.npy").tolist()
        np.save(self.folder / "gone.npy", [str(self.folder / f"gone{number}.mp4") for number in range(5)] + good[5:])
        shown = self.dry("gone", {"datasets.ucf101.train.paths": f"{self.folder}/gone.npy"})
        self.assertEqual(shown.returncode, 0, shown.stdout)
        self.assertRegex(shown.stdout, r"warning: 5 of 6 .*gone0.mp4.*bad_sample_budget.*datasets.ucf101.prefix")

    def test_dry_run_and_run_give_the_same_warnings(self):
        write_video(str(self.folder / "short.mp4"), np.zeros((3, 48, 64, 3), np.uint8), fps=25)
        np.save(self.folder / "short.npy", [str(self.folder / "short.mp4")] * 6)
        changes = {"datasets.ucf101.train.paths": f"{self.folder}/short.npy", "trainer.data.num_workers": 9}
        # Packets are not read, so that a start does not wait for them.
        with mock.patch.object(Trainer, "fit"), mock.patch.object(VideoFile, "info", side_effect=AssertionError):
            for mode in ("dry", "train"):
                shown = self.start("warned", mode, changes)
                said = shown.stdout + shown.stderr
                self.assertRegex(said, r"warning: 9 data workers share")
                self.assertRegex(said, r"warning: 4 of 4 sampled files of ucf101 .*num_frames=4 .*: 3 in .*short.mp4")
        with mock.patch.object(preflight, "open_video") as opened:
            self.assertEqual(self.start("finished", "train", {"trainer.limit_train_batches": 1}).returncode, 0)
        opened.assert_not_called()  # a run that is resumed said it at its start


if __name__ == "__main__":
    unittest.main()
