"""Data and run directories that stop a run: one paragraph, exit code 1, before the first step, nothing overwritten."""

import json
import os
import shutil
import subprocess
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import numpy as np

from omnivision.reporting.logs import BadSampleLedger
from omnivision.utils.host import host_id
from tests import runs
from tests import stage_runs as stages


def here(run_folder: Path, *overrides: str) -> stages.Result:
    return stages.run_in_process(runs.command(run_folder, *overrides)[2:])


class BadInput(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.data = runs.write_split(cls.folder, runs.real_videos() * 4)

    def assert_refused(self, *overrides: str, saying: str, folder: str = "never") -> None:
        run_folder = self.folder / folder
        before = stages.read_files(run_folder)
        result = here(run_folder, *overrides)
        self.assertEqual(result.returncode, 1, result.stderr)
        self.assertRegex(result.stderr, f"(?s)^(warning: [^\n]*\n)*error: .*{saying}")
        self.assertEqual(result.stderr.count("error:"), 1, result.stderr)
        self.assertNotIn("Traceback", result.stderr)
        self.assertNotIn("step 1/", result.stdout)
        after = stages.read_files(run_folder)
        self.assertEqual({path: after.get(path) for path in before}, before, "something was overwritten")

    def split(self, name: str, array: np.ndarray, which: str = "labels") -> list[str]:
        file = self.folder / f"{name}.npy"
        np.save(file, array)
        return [*self.data, f"++datasets.k150.train.{which}={file}"]

    def test_settings_that_do_not_fit_data_or_model_are_refused(self):
        labels, name = np.arange(12) % 3, r"datasets\.k150\.train"
        for overrides, saying in (
            (self.split("object", np.array([{}] * 12, dtype=object)), f"never unpickled.*{name}"),
            (self.split("float", labels * 1.0), f"float64.*{name}"),
            (self.split("high", labels + 149), "149 to 151"),
            (["++datasets.k150.train.paths=/nowhere.npy"], f"{name}.paths"),
            ([*self.data, "batch_size=64"], "12 samples .* 64.* batch_size"),
            ([*self.data, "launcher.num_nodes=2"], "launcher.num_nodes"),
            ([*self.data, "trainer.mode=val", "++datasets.k150.val=null"], r"datasets\.NAME\.val"),
            ([*self.data, "trainer.accelerator=cuda"], "trainer.accelerator"),
            ([*self.data, "trainer.mode=val", *[o.replace("train", "val") for o in self.data]], "trainer.mode=val"),
        ):
            with self.subTest(saying):
                self.assert_refused(*overrides, saying=saying)
        with mock.patch.dict(os.environ, PATH=str(self.folder)):  # without SLURM
            self.assert_refused("submitit.use_cluster=true", saying="submitit.use_cluster=false")

    def test_second_process_in_a_run_directory_is_refused(self):
        folder = self.folder / "held"
        folder.mkdir()
        started = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
        holder = {"token": "x", "machine": host_id(), "pid": os.getpid(), "started": int(started)}
        (folder / ".lock").write_text(json.dumps(holder))
        self.assert_refused(*self.data, saying=f"in use by process {os.getpid()}", folder="held")
        self.assertEqual(json.loads((folder / ".lock").read_text()), holder)

    def test_checkpoint_of_another_model_is_refused(self):
        result = here(self.folder / "other", *self.data, "epochs=1")
        self.assertEqual(result.returncode, 0, result.stderr)
        for overrides, experiment, checkpoint in (
            (["trainer.model.trunk.depth=3"], "trainer.model.trunk.depth: 2 -> 3", "trainer/model"),
            (["batch_size=4"], "clips of a step of k150: 8 -> 4", "limit_train_batches"),
        ):
            again = [*self.data, "epochs=1", *overrides]
            self.assert_refused(*again, saying=f"{experiment}.*allow_changes", folder="other")
            allowed = [*again, "trainer.checkpoint.allow_changes=true"]
            self.assert_refused(*allowed, saying=checkpoint, folder="other")

    def test_bad_files_within_the_budget_are_replaced_and_beyond_it_stop_the_run(self):
        broken = self.folder / "broken.mp4"
        broken.write_bytes(b"not a film")
        split = self.folder / "split"
        split.mkdir()
        # One view of 12 of the 13 videos a step: two epochs meet every file.
        data = [*runs.write_split(split, [*runs.real_videos() * 4, str(broken)]), "trainer.data.views_per_clip=1"]
        data += ["batch_size=12"]
        result = here(self.folder / "few", *data, "trainer.data.bad_sample_budget=0.5")
        self.assertEqual(result.returncode, 0, result.stderr)
        ledger = [json.loads(line) for line in (self.folder / "few/logs/bad_samples.jsonl").read_text().splitlines()]
        self.assertEqual([entry["path"] for entry in ledger], [str(broken)])
        self.assertTrue(ledger[0]["reason"])
        self.assertEqual(runs.read_summary(self.folder / "few")["bad_samples"], 1)
        stopped = here(self.folder / "stopped", *data, "epochs=9", "launcher.gpus_per_node=2")
        self.assertEqual(stopped.returncode, 1, stopped.stderr)
        self.assertIn(str(broken), stopped.stderr)
        self.assertIn("bad_sample_budget", stopped.stderr)
        self.assertNotIn("Traceback", stopped.stderr)
        self.assertIn("could not be decoded", runs.read_summary(self.folder / "stopped")["exit_reason"])

    def test_restored_file_is_not_bad(self):
        ledger, film = self.folder / "back.jsonl", self.folder / "back.mp4"
        lines = [dict(source="k150", index=n, path=str(film), reason="No such file", missing=n == 0) for n in (0, 1)]
        ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.assertEqual(len(BadSampleLedger(ledger, 10, 0.5)), 2)
        film.touch()
        self.assertEqual(len(BadSampleLedger(ledger, 10, 0.5)), 1, "the other one was there, and bad")

    def test_vanished_data_root_stops_the_run_and_marks_no_file_as_bad(self):
        root, gone = self.folder / "root", self.folder / "unmounted"
        root.mkdir()
        films = [shutil.copy(film, root / f"{n}_{Path(film).name}") for n in range(40) for film in runs.real_videos()]
        split = self.folder / "vanishing"
        split.mkdir()
        data = [
            *runs.write_split(split, [str(film) for film in films]),
            "trainer.data.bad_sample_budget=1",
            "epochs=30",
        ]
        run = self.folder / "vanishing/run"
        process = subprocess.Popen(
            runs.command(run, *data, "num_workers=1", "trainer.checkpoint.save_every_steps=1"),
            cwd=split, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        log, deadline = run / "logs/metrics.jsonl", time.monotonic() + 60
        while not (log.exists() and '"step": 3,' in log.read_text()):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.05)
        root.rename(gone)
        _, said = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 1, said)
        self.assertRegex(said, "(?m)^error: None of .* files of a batch exists, e.g. .*Is the data mounted")
        gone.rename(root)
        steps = runs.read_summary(run)["steps"]
        process = subprocess.Popen(
            runs.command(run, *data), cwd=split, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while f'"step": {steps + 5},' not in log.read_text():
            self.assertIsNone(process.poll())
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.05)
        process.kill()
        process.wait()

    def test_nonfinite_loss_stops_all_ranks_with_one_exit_code_and_names_the_samples(self):
        settings = [f"trainer.optim.options.lr.0.scheduler.{name}=1e30" for name in ("start", "peak")]
        settings += ["launcher.gpus_per_node=2", "trainer.checkpoint.save_every_steps=1"]
        result = here(self.folder / "nan", *self.data, *settings)
        self.assertEqual(result.returncode, 71, result.stderr)
        self.assertRegex(result.stderr, r"not finite.*(bikes|carphone)")
        self.assertNotIn("Traceback", result.stderr)
        self.assertEqual(runs.read_summary(self.folder / "nan")["status"], "failed")


if __name__ == "__main__":
    unittest.main()
