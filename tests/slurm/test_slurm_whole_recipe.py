"""`run_ppma.sh`: the whole recipe as jobs that wait for one another, on the cluster and here."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests import runs
from tests.slurm.cluster import wait
from tests.slurm.on_cluster import ONE_THREAD, OnCluster, history, told_time

SCRIPT = str(runs.ROOT / "utils" / "run_scripts" / "run_ppma.sh")
STAGES = ["mae", "align", "align_demo_nohuman", "ft_demo", "lp_demo", "average_demo"]
# The demo's data and a model small enough, as a site would say it.
SITE = """\
# @package _global_
defaults: [/experiments/demo_datasets]
data_root: {data}
image_size: 32
short_side: 40
num_frames: 4
trainer:
  accelerator: cpu
  optim: {{amp: {{enabled: false}}}}
  logging: {{log_freq: 1, pictures_every_epochs: null}}
submitit: {{cpus_per_task: 1}}
"""
RECIPE = {
    "PRETRAIN": "demo", "ALIGN": "demo_synthetic", "AVERAGE": "demo_synthetic demo_nohuman", "DOWNSTREAM": "demo",
    "SIZE": "vitmicro", "BATCH_SIZE": "8", "NUM_NODES": "1", "EPOCHS": "2", "NUM_WORKERS": "0", "PPMA": "ppma",
}  # fmt: skip


class Chain(OnCluster):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        data = cls.folder / "data"
        command = [Path(sys.executable).parent / "omnivision", "demo-data", str(data), "--train", "12", "--val", "1"]
        subprocess.run(command, check=True, capture_output=True)
        (cls.folder / "ours" / "site").mkdir(parents=True)
        (cls.folder / "ours" / "site" / "lab.yaml").write_text(SITE.format(data=data))
        # Without the cluster; test_3 asks for it. It takes as long as all the others.
        cls.here_log = cls.folder / "here.log"
        with open(cls.here_log, "wb") as log:
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            cls.without_cluster = subprocess.Popen(
                cls.command("submitit.use_cluster=false"), cwd=cls.folder, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | ONE_THREAD | RECIPE | {"PATH": path, "PPMA": "here"},
            )  # fmt: skip
        cls.addClassCleanup(cls.end_without_cluster)

    @classmethod
    def end_without_cluster(cls):
        if cls.without_cluster.poll() is None:
            os.killpg(cls.without_cluster.pid, signal.SIGKILL)
            cls.without_cluster.wait()

    @classmethod
    def command(cls, *arguments: str) -> list[str]:
        return ["sh", SCRIPT, *arguments, "--config-dir", str(cls.folder / "ours"), "+site=lab"]

    def chain(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return self.shell(*self.command(*arguments), **RECIPE | more)

    def jobs(self, result: subprocess.CompletedProcess[str], word: str) -> dict[str, str]:
        return dict(re.findall(rf"^(\S+) +{word} job_id=(\d+) ", result.stdout, re.MULTILINE))

    def assert_all_finished(self, folder: Path) -> None:
        for stage in STAGES:
            summary = runs.read_summary(folder / stage)
            self.assertEqual((summary["status"], summary["epochs"]), ("finished", 2), stage)
        begins = [runs.read_summary(folder / stage)["run"]["pretrained"] for stage in STAGES]
        self.assertEqual(begins, [None, "mae", "mae", "align", "align", "align + align_demo_nohuman"])

    def test_1_killed_in_the_middle_and_run_again(self):
        shown = self.chain("--dry")
        self.assertEqual(shown.returncode, 0, shown.stderr)
        self.assertEqual([line.split()[0] for line in shown.stdout.splitlines()], STAGES)
        self.assertRegex(shown.stdout, r"average_demo +after align align_demo_nohuman +not begun\n")
        self.assertEqual(self.cluster.ask("squeue", "--noheader"), "")

        self.cluster.ask("scontrol", "update", "PartitionName=main", "State=DOWN")  # nothing starts while we look
        began = time.time()
        first = self.jobs(self.chain(), "submitted")
        told_time("run_ppma.sh, until it returned", began)
        self.assertEqual(list(first), STAGES)
        again = self.chain(AVERAGE="demo_synthetic", DOWNSTREAM="")  # of the six, these two
        queued = {name: first[name] for name in ("mae", "align")}
        self.assertEqual(self.jobs(again, "queued"), queued, again.stdout)
        self.cluster.ask("scontrol", "update", "PartitionName=main", "State=UP")
        self.wait_for_state(first["mae"], "COMPLETED")
        wait("it to align", lambda: history(self.folder / "ppma/align", "start"))
        self.cluster.ask("scancel", first["align"])
        for name in ("ft_demo", "lp_demo", "average_demo"):
            self.wait_for_state(first[name], "CANCELLED")
        self.wait_for_state(first["align_demo_nohuman"], "COMPLETED")
        wait("the summary to say so", lambda: runs.read_summary(self.folder / "ppma/ft_demo")["status"] == "cancelled")
        reason = runs.read_summary(self.folder / "ppma/average_demo")["exit_reason"]
        self.assertRegex(reason, rf"^its dependency failed: job {first['align']} .*/align\) failed: .* was cancelled")
        self.assertIn("cancelled", self.chain("--dry").stdout)

        again = self.chain()
        self.assertRegex(again.stdout, r"mae +finished folder=ppma/mae\n")
        second = self.jobs(again, "submitted")
        self.assertEqual(list(second), ["align", "ft_demo", "lp_demo", "average_demo"])
        for job in second.values():
            self.wait_for_state(job, "COMPLETED")
        told_time("the whole chain, killed once", began)
        self.assert_all_finished(self.folder / "ppma")
        shown = self.chain("--dry").stdout
        self.assertEqual(len(re.findall("finished", shown)), 6, shown)

    def test_2_a_stage_that_fails(self):
        shutil.copytree(self.folder / "ppma/mae", self.folder / "broken/mae")
        for name in ("checkpoint.pt", "previous.pt"):
            damaged = self.folder / "broken/mae/checkpoints" / name
            damaged.write_bytes(damaged.read_bytes()[:-1000])
        submission = self.chain(PPMA="broken")
        self.assertRegex(submission.stdout, r"mae +finished folder=broken/mae\n")
        jobs = self.jobs(submission, "submitted")  # the later ones, too, unless alignment has failed by then
        for name, job in jobs.items():
            self.wait_for_state(job, "FAILED" if name.startswith("align") else "CANCELLED")
        for name in ("ft_demo", "lp_demo", "average_demo"):
            summary = runs.read_summary(self.folder / "broken" / name)
            self.assertEqual(summary["status"], "cancelled")
            self.assertRegex(summary["exit_reason"], "broken/align.*: .*manifest")
        listed = self.shell("omnivision", "runs", "broken").stdout
        self.assertRegex(listed, r"(?m)^ft_demo: cancelled: .*manifest")

    def test_3_without_a_cluster(self):
        self.assertEqual(self.without_cluster.wait(180), 0, self.here_log.read_text())
        self.assert_all_finished(self.folder / "here")
        for stage in ("align", "ft_demo", "average_demo"):
            self.assert_same_weights(self.folder / "here" / stage, self.folder / "ppma" / stage)
        failed = self.chain("submitit.use_cluster=false", PPMA="broken")
        self.assertEqual(failed.returncode, 1)
        self.assertRegex(failed.stderr.splitlines()[-1], "^error: failed: mae;")
        for stage, why in (("align", "mae (failed)"), ("ft_demo", "align (cancelled)")):
            summary = runs.read_summary(self.folder / "broken" / stage)
            self.assertEqual(summary["exit_reason"], f"it starts from broken/{why}")
