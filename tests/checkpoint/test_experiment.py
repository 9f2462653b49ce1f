"""What makes a run another experiment, and that nobody goes on with one by mistake."""

import contextlib
import fnmatch
import io
import json
import os
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

from omnivision.checkpoint import fingerprint as experiment
from omnivision.checkpoint.fingerprint import classify_changes, file_digest, list_changes_since
from omnivision.checkpoint.inference_config import InferenceConfig, describe_class_changes
from omnivision.config.flat import flatten
from omnivision.launch.job import Job
from omnivision.launch.run import write_run_metadata
from omnivision.optim.schedules import Scaled, WarmupCosine
from omnivision.reporting.run_directory import RunDir
from omnivision.training.resume_checks import check_same_averaged_checkpoints
from omnivision.utils.errors import UserError, truncate_list
from tests import runs
from tests import stage_runs as stages
from tests.checkpoint.test_checkpoint import Folder

SETTINGS = {
    "epochs": 3,
    "batch_size": 8,
    "datasets": {"ucf101": {"fps": 25, "prefix": "/a"}, "hmdb51": {"fps": 25}},
    "trainer": {"data": {"sources": {"ucf101": "${datasets.ucf101}"}}, "logging": {"log_freq": 1}},
}


def facts(**more: object) -> dict:
    fingerprint = {
        "settings": flatten(SETTINGS),
        "clips of a step": {"ucf101": 16},
        "data": {"datasets.ucf101.train.paths": "9 bytes, SHA-256 a"},
        "versions": {"torch": "2.10"},
    }
    return fingerprint | more


class Commit(Folder):
    def setUp(self):
        super().setUp()
        self.file = self.folder / "omnivision/checkpoint/fingerprint.py"
        self.file.parent.mkdir(parents=True)
        self.file.write_text("one\n")

    def commit(self, **environment: str) -> str | None:
        with mock.patch.object(experiment, "__file__", str(self.file)), mock.patch.dict(os.environ, environment):
            return experiment.git_commit.__wrapped__()

    def git(self, *arguments: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run(["git", *identity, *arguments], cwd=self.folder, check=True, capture_output=True)

    @unittest.skipIf(shutil.which("git") is None, "no git; apt-get install git")
    def test_commit_of_a_checkout(self):
        self.git("init", "-q")
        self.assertIsNone(self.commit(), "nothing is committed")
        self.git("add", ".")
        self.git("commit", "-qm", "one")
        self.git("tag", "-a", "v1", "-m", "a tag is no commit")
        clean = self.commit()
        self.assertRegex(clean, "^[0-9a-f]{12}$")
        (self.folder / "notes.txt").write_text("not tracked")
        self.assertEqual(self.commit(GIT_DIR="/nowhere", GIT_WORK_TREE="/"), clean)
        self.file.write_text("two\n")
        self.assertEqual(self.commit(), f"{clean}-dirty")
        self.assertIsNone(self.commit(PATH="/nowhere"), "without git")

    def test_no_commit_outside_a_checkout(self):
        self.assertIsNone(self.commit())
        (self.folder / ".git").write_text("gitdir: /nowhere")
        self.assertIsNone(self.commit(), "a broken one")

    def test_a_run_keeps_each_commit_that_it_resumed_with(self):
        folder = RunDir(self.folder / "run")
        folder.create()
        job = Job(SimpleNamespace(trainer=SimpleNamespace(mode="train")), "epochs: 1\n")
        trainer = SimpleNamespace(raw_model=None, is_done=False)
        for commit in (None, "a", "a", "b-dirty", None):
            with (
                mock.patch("omnivision.launch.run.git_commit", return_value=commit),
                mock.patch("omnivision.launch.run.run_metadata", return_value={}),
            ):
                write_run_metadata(job, folder, trainer, on_cluster=False)
        self.assertEqual(folder.read_summary()["run"]["commits"], ["a", "b-dirty"])


class Comparison(unittest.TestCase):
    def test_setting_changes_are_classified(self):
        for name, value, alters in (
            ("epochs", 4, True),
            ("datasets.ucf101.fps", 30, True),
            ("datasets.hmdb51.fps", 30, None),  # no source of this run
            ("trainer.mode", "dry", None),
            ("trainer.checkpoint.allow_changes", True, None),
            ("datasets.ucf101.prefix", "/b", False),
            ("trainer.logging.log_freq", 7, False),
            ("batch_size", 4, False),  # on twice as many nodes a step has the same clips
            ("trainer.something_new", 1, True),
        ):
            altering, others = classify_changes(facts(), facts(settings=flatten(SETTINGS) | {name: value}))
            change = [f"{name}: {flatten(SETTINGS).get(name)} -> {value}"]
            wanted = {True: (change, []), False: ([], change), None: ([], [])}
            self.assertEqual((altering, others), wanted[alters], name)

    def test_changes_of_data_clips_per_step_and_versions_are_classified(self):
        paths, other = "datasets.ucf101.train.paths", {"datasets.ucf101.val.paths": "1 bytes, SHA-256 c"}
        for changes, wanted in (
            ({}, ([], [])),
            (
                {"data": {paths: f"8 bytes, SHA-256 {'b' * 64}"} | other},
                ([f"{paths}: 9 bytes, SHA-256 a -> 8 bytes, SHA-256 {'b' * 12}"], []),
            ),
            ({"clips of a step": {"ucf101": 8}}, (["clips of a step of ucf101: 16 -> 8"], [])),
            ({"versions": {"torch": "3"}}, ([], ["torch: 2.10 -> 3"])),
            ({"versions": {"torch": "2.10", "git commit": "b"}}, ([], ["git commit: None -> b"])),
        ):
            self.assertEqual(classify_changes(facts(), facts(**changes)), wanted)

    def test_settings_missing_in_older_runs_have_defaults(self):
        older = {"epochs": 3, "trainer.task.mixing.prob": 1.0, "trainer.max_epochs": "${epochs}"}
        newer = {
            "epochs": 3,
            "mixing_prob": 1.0,
            "crop_scale": [0.08, 1.0],
            "trainer.task.mixing.prob": "${mixing_prob}",
            "trainer.data.view.scale": "${crop_scale}",
            "trainer.max_epochs": 3,
        }
        self.assertEqual(experiment.classify_setting_changes(older, newer)[0], [])
        for name, value in (("mixing_prob", 0.5), ("crop_scale", [0.5, 1]), ("trainer.max_epochs", 4)):
            self.assertIn(name, " ".join(experiment.classify_setting_changes(older, newer | {name: value})[0]))

    def test_changed_class_names_are_described(self):
        for saved, current, count in (("ab", "ab", 0), ("abc", "bac", 2), ("ab", "az", 1), ("", "ab", 0)):
            one, other = (
                InferenceConfig.of_file(facts(inference={"class_names": [list(names)]} if names else {}))
                for names in (saved, current)
            )
            self.assertEqual(len(describe_class_changes(one, other)), count)

    def test_settings_that_do_not_affect_results(self):
        for harmless, names in (
            (True, "launcher.num_nodes submitit.partition batch_size stage datasets.ucf101.prefix datasets.ucf101.val.paths "
                   "trainer.mode trainer.logging.log_freq trainer.checkpoint.save_freq trainer.data.image.batch_size "
                   "trainer.model.trunk.activation_checkpointing trainer.optim.accumulation_steps"),
            (False, "epochs lr trainer.seed_value datasets.ucf101.fps trainer.checkpoint.drop trainer.data.val_clips "
                    "trainer.model.trunk.depth trainer.optim.layer_decay trainer.data.views_per_clip trainer.task.norm"),
        ):  # fmt: skip
            for name in names.split():
                found = any(fnmatch.fnmatchcase(name, each) for each in experiment.RUNTIME_ONLY_SETTINGS)
                self.assertEqual(found, harmless, name)

    def test_other_averaged_checkpoints_are_refused_with_short_hashes(self):
        saved, current = ([{"path": "a.pt", "sha256": digit * 64, "choice": None}] for digit in "ab")
        check_same_averaged_checkpoints(saved, saved, Path("run.pt"))
        with self.assertRaisesRegex(UserError, r"\['a{12}'\].*\['b{12}'\].*pretrained_checkpoint_path"):
            check_same_averaged_checkpoints(saved, current, Path("run.pt"))

    def test_values_from_the_environment_are_compared_by_digest(self):
        text = "epochs: 3\nlr: ${oc.decode:${oc.env:LR}}\nparts: ['${oc.env:A}']"
        one, same, other = (
            experiment.fingerprint(text, {"epochs": 3, "lr": lr, "parts": ["secret"]}, [], None)
            for lr in (0.125, 0.125, 0.25)
        )
        self.assertEqual(classify_changes(one, same), ([], []))
        [change] = classify_changes(one, other)[0]
        self.assertRegex(change, r"^lr: \$\{oc.decode:\$\{oc.env:LR\}\} \(SHA-256 \w{12}\) -> ")
        for value in ("0.125", "secret"):
            self.assertNotIn(value, json.dumps(one))

    def test_parsing_and_truncating(self):
        self.assertEqual(truncate_list(["a", "b"]), "a, b")
        self.assertEqual(truncate_list(["a"] * 9), "a, a, a, a, a, and 4 more")
        self.assertEqual(len(truncate_list(["a" * 900])), 203)
        self.assertEqual(experiment.parse_fingerprint(json.dumps(facts())), facts())
        for text in ("", "[", "[]", "{}", None, "[" * 100_000, json.dumps(facts(settings=[]))):
            self.assertIsNone(experiment.parse_fingerprint(text))


class Files(Folder):
    def test_file_digest_detects_a_changed_byte_and_samples_large_files(self):
        file, data = self.folder / "paths.npy", bytes(5000)
        file.write_bytes(data)
        before = file_digest(file)
        self.assertRegex(before, "^5000 bytes, SHA-256 [0-9a-f]{64}$")
        file.write_bytes(data[:-1] + b"b")
        self.assertNotEqual(file_digest(file), before)
        with mock.patch.multiple(experiment, WHOLE_BYTES=1000, PIECE_BYTES=100):
            complete, noticed = file_digest(file), 0
            for place in range(0, 5000, 10):
                file.write_bytes(data[:place] + b"x" + data[place + 1 : -1] + b"b")
                noticed += file_digest(file) != complete
            self.assertEqual(noticed, 1000 // 10)

    def test_changes_since_a_file_are_listed(self):
        file = self.folder / "config.yaml"
        file.write_text("epochs: 3\ndata: {path: a, list: [1, 2]}\nother: ${epochs}\ngone: 1\n")
        current = "epochs: 4\ndata: {path: a, list: [1, 3]}\nother: ${epochs}\n"
        changes = list_changes_since(file, current)
        self.assertEqual(changes, ["epochs: 3 -> 4", "data.list: [1, 2] -> [1, 3]", "gone: 1 -> None"])
        file.write_text(current)
        self.assertEqual(list_changes_since(file, current), [])
        for damage in ("[", "\0"):
            file.write_text(damage)
            self.assertEqual(len(list_changes_since(file, current)), 1)


class Resuming(unittest.TestCase):
    def test_resuming_requires_the_same_experiment(self):
        with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
            folder, run = Path(name), Path(name) / "run"
            films = runs.real_videos() * 8
            data = runs.write_split(folder, films)

            def again(*overrides: str) -> stages.Result:
                return stages.run_in_process(runs.command(run, *data, "epochs=1", *overrides)[2:])

            self.assertEqual(again().returncode, 0)
            before = (run / "checkpoints/checkpoint.pt").read_bytes()
            for overrides, saying in (
                (["epochs=2"], "epochs: 1 -> 2"),
                (["lr_scale_factor=3"], "lr_scale_factor: 2 -> 3"),
                (["batch_size=4"], "clips of a step of k150: 8 -> 4"),
                (["trainer.seed_value=5", "mask_ratio=0.5"], "mask_ratio: 0.9 -> 0.5; trainer.seed_value: 123 -> 5"),
            ):
                refused = again(*overrides)
                self.assertEqual(refused.returncode, 1, refused.stderr)
                self.assertRegex(refused.stderr, f"{saying}.*allow_changes=true")
            val = [f"++datasets.k150.val.paths={folder}/paths.npy", f"++datasets.k150.val.labels={folder}/labels.npy"]
            self.assertEqual(again("trainer.mode=val", "batch_size=4", "mask_ratio=0.5", *val).returncode, 0)
            np.save(folder / "paths.npy.new.npy", np.array(films[:-1] + films[:1]))
            (folder / "paths.npy.new.npy").replace(folder / "paths.npy")
            refused = again()
            self.assertRegex(refused.stderr, r"datasets.k150.train.paths: \d+ bytes, SHA-256 .* -> \d+ bytes")
            self.assertEqual((run / "checkpoints/checkpoint.pt").read_bytes(), before)

            harmless = again("num_workers=1", "trainer.logging.log_freq=3", "trainer.checkpoint.allow_changes=true")
            self.assertEqual(harmless.returncode, 0, harmless.stderr)
            self.assertRegex(harmless.stdout, "log_freq: 1 -> 3")
            on = again("epochs=2", "trainer.checkpoint.allow_changes=true")
            self.assertEqual(on.returncode, 0, on.stderr)
            self.assertRegex(on.stdout, "epochs: 1 -> 2; datasets.k150.train.paths: ")
            longer, steps = Scaled(WarmupCosine(1e-6, 1.6e-3, 0, 0.05), 1 / 2), runs.read_metrics(run)
            for line in steps[len(steps) // 2 :]:  # trained longer, on the curve of all epochs
                self.assertAlmostEqual(line["lr"], longer((line["step"] - 1) / len(steps)), places=12)
            self.assertEqual(again("epochs=2").returncode, 0, "it is what its checkpoint says now")


if __name__ == "__main__":
    unittest.main()
