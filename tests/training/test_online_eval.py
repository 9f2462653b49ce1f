"""Probes while a run trains: the run's weights do not change, ranks agree, dry tells the cost, settings are checked."""

import json
import os
import shutil
import time
import unittest
from unittest import mock

import numpy as np
import torch

from omnivision.reporting.run_directory import RunDir
from omnivision.tools import watch
from omnivision.tools.main import main
from tests import fixtures
from tests import stage_runs as stages

ONLINE = (
    "trainer.online_eval.sources=[hmdb51]",
    "trainer.online_eval.every_epochs=1",
    "trainer.online_eval.methods=[knn,logistic,linear,rankme]",
)


def status_of(run: RunDir, queue: object) -> tuple[str, str]:
    return run.read_summary()["status"], ""


class OnlineEval(fixtures.Folder):
    def setUp(self):
        super().setUp()
        self.paths = stages.write_videos(self.folder / "videos", 12)
        self.data = []
        for dataset in ("ucf101", "hmdb51", "k150"):
            for which in ("train", "val"):
                self.data += stages.write_split(self.folder, dataset, which, self.paths)

    def run_stage(self, stage, name, *more, ranks=1):
        dataset = "k150" if stage == "mae" else "ucf101"
        words = stages.command(
            stage, self.folder / name, *self.data, "epochs=2", f"launcher.gpus_per_node={ranks}", *more, dataset=dataset
        )
        words += [] if stage == "mae" else ["pretrained_checkpoint_path=null"]
        result = stages.run_in_process(words)
        self.assertEqual(result.returncode, 0, result.stderr[-3000:])
        return result

    def weights(self, name):
        return torch.load(self.folder / name / "checkpoints" / "checkpoint.pt", weights_only=True)["model"]

    def online(self, name):
        lines = (self.folder / name / "logs" / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["phase"] == "online"]

    def test_weights_are_bit_equal_with_and_without(self):
        for stage, more in (("mae", []), ("ft", ["trainer.ema_decay=0.9"])):
            with self.subTest(stage):
                self.run_stage(stage, f"{stage}_without", *more)
                self.run_stage(stage, f"{stage}_with", *more, *ONLINE)
                without, probed = self.weights(f"{stage}_without"), self.weights(f"{stage}_with")
                for name, tensor in without.items():
                    self.assertTrue(torch.equal(tensor, probed[name]), name)
                found = self.online(f"{stage}_with")
                self.assertEqual([line["epoch"] for line in found], [0, 1])
                self.assertEqual(
                    {key for key in found[0] if "_" in key},
                    {f"hmdb51_{m}" for m in ("knn", "logistic", "linear", "rankme")},
                )

    def test_two_ranks_probe_as_one(self):
        # A frozen trunk, since training on two ranks differs in the last bits.
        self.run_stage("lp", "one", *ONLINE)
        self.run_stage("lp", "two", *ONLINE, ranks=2)
        for one, two in zip(self.online("one"), self.online("two"), strict=True):
            for name in one.keys() - {"seconds", "time"}:
                self.assertEqual(one[name], two[name], name)

    def test_sharded_trunks_are_probed_as_whole_ones(self):
        frozen = *ONLINE, "trainer.val_epoch_freq=null"  # so that the probe is the first pass without a step
        self.run_stage("lp", "whole", *frozen)
        self.run_stage("lp", "sharded", *frozen, "trainer.distributed.strategy=fsdp", ranks=2)
        for one, two in zip(self.online("whole"), self.online("sharded"), strict=True):
            for name in one.keys() - {"seconds", "time"}:
                self.assertAlmostEqual(one[name], two[name], places=3, msg=name)

    def test_watching_a_run_gives_its_own_probes(self):
        self.run_stage("mae", "run", *ONLINE, "trainer.checkpoint.save_freq=1")
        run, (first, last) = self.folder / "run", self.online("run")
        summary = RunDir(run).read_summary()
        RunDir(run).replace_summary(summary | {"status": "running"})
        saves = iter(["checkpoint_2.pt", "checkpoint_2.pt", None])

        def save(name: str) -> None:
            for suffix in (".json", ""):
                copy = shutil.copy(run / "checkpoints" / f"{name}{suffix}", self.folder / f"copy{suffix}")
                os.replace(copy, run / "checkpoints" / f"checkpoint.pt{suffix}")

        def wait(_: float) -> None:  # the run goes on meanwhile
            if (name := next(saves)) is None:
                RunDir(run).replace_summary(summary)
            else:
                save(name)

        save("checkpoint_1.pt")

        self.enterContext(mock.patch.object(watch, "squeue_or_none", lambda: None))
        words = ["watch", str(run), "--data", "hmdb51", "--workers", "0", "--methods", "rankme"]
        with mock.patch.object(time, "sleep", wait), mock.patch.object(watch, "run_status", status_of):
            code = main([*words, "--methods", "knn"])
        self.assertEqual(code, 0)
        watched = [json.loads(line) for line in (run / "logs" / "watch.jsonl").read_text().splitlines()]
        self.assertEqual([line["epoch"] for line in watched], [0, 1])
        for name in ("hmdb51_knn", "hmdb51_rankme"):
            self.assertAlmostEqual(watched[-1][name], last[name], places=4)
        self.assertEqual((watched[-1]["step"], watched[-1]["phase"]), (last["step"], "online"))
        self.assertNotEqual(first["hmdb51_rankme"], last["hmdb51_rankme"])
        for more, lines in ((["--methods", "knn"], 2), ([], 3), ([], 3)):  # done already; other methods; done already
            self.assertEqual(main([*words, *more]), 0)
            self.assertEqual(len((run / "logs" / "watch.jsonl").read_text().splitlines()), lines)
        self.assertEqual(main(["watch", str(self.folder), "--data", "hmdb51"]), 1)
        self.assertEqual(main(["watch", str(run), "--data", "hmdb52", "--once"]), 1)

    def test_dry_tells_the_cost(self):
        result = self.run_stage("mae", "dry", "trainer.mode=dry", *ONLINE)
        self.assertRegex(
            result.stdout, r"online +hmdb51 \(24 videos\) every 1 epoch: 48 clips, [\d.e+]+ % of the operations"
        )

    def test_invalid_settings(self):
        np.save(self.folder / "hmdb51_val_labels.npy", np.zeros(12, int))
        for wanted, more in {
            "trainer.online_eval.sources must name datasets of the catalog, got hmdb5; did you mean hmdb51": "sources=[hmdb5]",
            "at least two classes, got 1 in hmdb51, val": "sources=[hmdb51]",
            "trainer.online_eval.methods": "methods=[tsne]",
        }.items():
            words = stages.command(
                "mae", self.folder / "bad", *self.data, f"trainer.online_eval.{more}", dataset="k150"
            )
            result = stages.run_in_process(words)
            self.assertEqual(result.returncode, 1, wanted)
            self.assertIn(wanted, result.stderr)
        self.assertFalse((self.folder / "bad" / "checkpoints" / "checkpoint.pt").exists())


if __name__ == "__main__":
    unittest.main()
