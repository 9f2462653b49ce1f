"""Submission to a real SLURM: messages, refusals and leftovers; and that a run is the same however it is started."""

import difflib
import json
import re
import resource
import shlex
import subprocess
import sys
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from omnivision.config.validate import validate_config
from omnivision.launch.batch_script import batch_script
from omnivision.models.architecture import architecture_of
from omnivision.reporting.run_directory import RunDir
from tests import runs
from tests import tiny_models as tiny
from tests.slurm.on_cluster import ONE_THREAD, SUBMITTED, OnCluster, history, told_time

GOLDEN = Path(__file__).parent / "batch_script.sh"
# Every setting of the submitit block.
EVERYTHING = [
    "submitit.use_cluster=true", "submitit.name=mae", "submitit.partition=gpu", "submitit.account=vision",
    "submitit.qos=long", "submitit.timeout_hour=20", "submitit.cpus_per_task=10", "submitit.mem_gb=64.5",
    'submitit.constraints="a100&80gb"', "submitit.comment='for the paper'", "submitit.exclude=node7",
    'submitit.nodelist="node[1-4]"', "submitit.dependency='afterok:12:13'", "submitit.max_requeues=7",
    "submitit.signal_delay_s=300", "submitit.setup=[module load cuda]",
    "++submitit.additional_parameters.reservation=paper", "launcher.num_nodes=2", "launcher.gpus_per_node=4",
    "batch_size=64", "trainer.accelerator=auto",
]  # fmt: skip


def children_seconds() -> float:
    """How long processors have worked for the commands that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Script(unittest.TestCase):
    def test_the_batch_script_is_the_golden_one(self):
        """Change tests/slurm/batch_script.sh when the script is meant to change; the difference is printed."""
        with initialize_config_dir(str(runs.ROOT / "config"), version_base="1.3"):
            config = compose("config", [*runs.STAGE_1[2:], *EVERYTHING, "launcher.experiment_log_dir=/runs/mae"])
        said = self.script(validate_config(config))
        wanted = GOLDEN.read_text()
        difference = "\n".join(
            difflib.unified_diff(wanted.splitlines(), said.splitlines(), "golden", "now", lineterm="")
        )
        self.assertEqual(said, wanted, f"\n{difference}")

    def script(self, settings) -> str:
        prologue = (runs.ROOT / "omnivision/launch/batch_prologue.sh").read_text()
        script = batch_script(settings, RunDir("/runs/mae")).replace(prologue, "# (batch_prologue.sh)\n") + "\n"
        return script.replace(sys.executable, "PYTHON").replace(str(runs.ROOT), "CHECKOUT")


class Submitted(OnCluster):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        data = cls.folder / "data"
        cls.films = ["omnivision", "demo-data", str(data), "--train", "8", "--val", "1"]
        assert (
            subprocess.run([Path(sys.executable).parent / cls.films[0], *cls.films[1:]], capture_output=True).returncode
            == 0
        )
        # Stage 1 on the demo's data.
        cls.demo = [
            sys.executable, str(runs.ROOT / "train_app_submitit.py"), "+experiments=demo/mae", "+trainer=mae_demo_config",
            f"data_root={data}", "trainer.accelerator=cpu", "trainer.optim.amp.enabled=false", "epochs=1", "batch_size=8",
            "trainer.model.decoder.share=1",  # which masked tokens are decoded depends on the rank
            "num_workers=0",
            "trainer.logging.log_freq=1", "trainer.logging.pictures_every_epochs=null", "trainer.distributed.comms_dtype=null",
        ]  # fmt: skip

    def setUp(self):
        if not hasattr(type(self), "hidden"):  # the node looks for the folder for a minute; test_8 asks what it said
            type(self).hidden = self.folder / "hidden"
            self.hidden.mkdir()
            self.cluster.hide("node4", self.hidden)
            settings = [f"launcher.experiment_log_dir={self.hidden / 'run'}", "submitit.nodelist=node4"]
            type(self).unseen = self.submit(*self.demo, *settings)
            two = ["launcher.num_nodes=2", 'submitit.nodelist="node[3-4]"']
            type(self).half_seen = self.submit(*self.demo, f"launcher.experiment_log_dir={self.hidden / 'two'}", *two)
            locked = self.folder / "read_only"
            locked.mkdir()
            self.cluster.make_read_only("node2", locked)
            settings = [f"launcher.experiment_log_dir={locked / 'run'}", "submitit.nodelist=node2"]
            type(self).read_only = self.submit(*self.demo, *settings)

    def test_1_a_run_is_the_same_on_slurm_as_local_processes_and_one_process(self):
        """tests.launch.test_launch compares torchrun with local processes."""

        def command(name: str, *settings: str) -> list[str]:
            return [*self.demo, f"launcher.experiment_log_dir={self.folder / name}", *settings]

        four = ["launcher.gpus_per_node=4", "batch_size=16"]
        began, worked = time.time(), children_seconds()
        result = self.shell(
            *command("on_slurm", "launcher.num_nodes=2", "launcher.gpus_per_node=2", "batch_size=8"), *SUBMITTED
        )
        job = self.job_of(result)
        told_time("submission", began)
        self.assertLess(children_seconds() - worked, 8, "of work: other tests are at work beside this one")
        self.here(*command("local", *four))
        self.here(*command("one", "batch_size=16"))
        self.wait_for_state(job, "COMPLETED")
        losses = {name: [line["loss"] for line in runs.read_metrics(self.folder / name)]
                  for name in ("on_slurm", "local", "one")}  # fmt: skip
        self.assertGreaterEqual(len(losses["on_slurm"]), 6)
        self.assertEqual(losses["on_slurm"], losses["local"])
        for one, other in zip(losses["on_slurm"], losses["one"], strict=True):
            self.assertAlmostEqual(one, other, delta=1e-4 * one)
        self.assert_same_weights(self.folder / "on_slurm", self.folder / "local")
        means = [runs.read_metrics(self.folder / name, "epoch")[-1]["loss"] for name in ("on_slurm", "local")]
        self.assertEqual(*means)

        run = self.folder / "on_slurm"
        summary = runs.read_summary(run)
        self.assertEqual(
            (summary["status"], summary["job"]["job_id"], summary["job"]["processes"]), ("finished", job, 4)
        )
        self.assertIn("run finished", summary["last_lines"][-1])
        logs = {path.name for path in (run / "submitit_logs").iterdir()}
        wanted = {f"{job}_{rank}_log.{end}" for rank in range(4) for end in ("out", "err")}
        wanted |= {f"{job}_{what}" for what in ("batch.log", "submission.sh", "environment.json", "config.yaml")}
        self.assertLessEqual(wanted, logs)
        self.assertEqual(
            {f"rank_{rank}.log" for rank in range(4)}, {path.name for path in (run / "logs").glob("rank_*")}
        )
        environment = json.loads((run / "submitit_logs" / f"{job}_environment.json").read_text())
        self.assertEqual(environment["SLURM_JOB_ID"], job)
        self.assertIsNone(environment["OMNIVISION_SECRET_TOKEN"])
        self.assertEqual(environment["PROXY"], "http://...@proxy:80")
        for path in run.rglob("*"):
            if path.is_file():
                self.assertNotIn(b"hunter2", path.read_bytes(), path)
        for event in ("submitted", "start", "resumed", "end"):
            self.assertEqual(len(history(run, event)), 1)
        again = self.call(
            *command("on_slurm", "launcher.num_nodes=2", "launcher.gpus_per_node=2", "batch_size=8"), *SUBMITTED
        )
        self.assertEqual((again.returncode, again.stdout), (0, f"finished folder={run}\n"), again.stderr)
        words = "watch", str(run), "--data", "synthetic", "--limit", "12", "--workers", "0"
        self.batch("watched", shlex.join([str(Path(sys.executable).parent / "omnivision"), *words]))
        (line,) = (run / "logs" / "watch.jsonl").read_text().splitlines()
        self.assertIn("synthetic_knn", json.loads(line))

    def batch(self, name: str, command: str, *options: str) -> None:
        """Run a command as a job, without the leftovers of `shell`, which srun would take."""
        sent = subprocess.run(
            ["sbatch", "--wait", *options, f"--output={name}.log", "--wrap", command],
            cwd=self.folder, env=self.cluster.environment | ONE_THREAD, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        self.assertEqual(sent.returncode, 0, sent.stderr + (self.folder / f"{name}.log").read_text())

    def test_9_features_of_two_tasks_are_those_of_one_process(self):
        model, lists = tiny.classifier(6), self.folder / "lists"
        lists.mkdir()
        torch.save({"model": model.state_dict(), "architecture": architecture_of(model)}, self.folder / "model.pt")
        videos = [str(path) for path in sorted((self.folder / "data" / "synthetic" / "train").glob("*.mp4"))]
        np.save(lists / "paths.npy", np.array(videos * 4))  # three parts
        np.save(lists / "labels.npy", np.arange(4 * len(videos)) % 6)
        catalog = self.folder / "catalog.yaml"
        catalog.write_text(
            f"datasets:\n  many: {{num_classes: 6, val: {{paths: {lists}/paths.npy, labels: {lists}/labels.npy}}}}\n"
        )
        command = [str(Path(sys.executable).parent / "omnivision"), "features", str(self.folder / "model.pt"), "many"]
        command += ["--catalog", str(catalog), "--workers", "0", "--clips", "1", "--crops", "1", "--out"]
        self.here(*command, str(self.folder / "one"))
        self.batch("features", shlex.join(["srun", *command, str(self.folder / "two")]), "--nodes=2", "--ntasks=2")
        files = [file.relative_to(self.folder / "one") for file in sorted((self.folder / "one").rglob("*.npy"))]
        self.assertEqual(len(files), 4)
        for file in files:
            self.assertEqual((self.folder / "one" / file).read_bytes(), (self.folder / "two" / file).read_bytes(), file)

    def test_2_a_submission_is_told_in_one_line(self):
        command = [
            *self.demo,
            f"launcher.experiment_log_dir={self.folder / 'quick'}",
            *SUBMITTED,
            "++submitit.additional_parameters.hold=true",  # else it may be over before it is asked about
        ]
        submission = self.shell(*command)
        self.assertRegex(submission.stdout, rf"^submitted job_id=\d+ folder={self.folder}/quick\n$", submission.stderr)
        job = re.findall(r"job_id=(\d+)", submission.stdout)[0]
        again = self.call(*command)
        self.assertRegex(again.stdout, rf"^queued job_id={job} state=PENDING folder=\S+\n$")
        link = self.folder / "link"
        link.symlink_to(self.folder)
        twice = [*self.demo, *SUBMITTED, "++submitit.additional_parameters.hold=true"]
        with ThreadPoolExecutor() as at_once:
            folders = [f"launcher.experiment_log_dir={base / 'twice'}" for base in (self.folder, link)]
            made_twice = list(at_once.map(lambda folder: self.shell(*twice, folder).stdout, folders))
        self.assertEqual(sorted(said.partition(" ")[0] for said in made_twice), ["queued", "submitted"], made_twice)
        [held] = {found for said in made_twice for found in re.findall(r"job_id=(\d+)", said)}
        self.cluster.ask("scancel", held)
        self.assert_refused(
            self.call(*command, "epochs=9"), f"Job {job} is in the queue .* epochs: 1 -> 9.*scancel {job}"
        )
        self.cluster.ask("scancel", job)

    def test_3_refusals(self):
        def refused(saying: str, *settings: str, **more: str) -> None:
            folder = f"launcher.experiment_log_dir={self.folder / 'refused'}"
            with self.subTest(settings):
                result = self.call(*self.demo, folder, *SUBMITTED, *settings, **more)
                self.assert_refused(result, saying)
                self.assertEqual(list((self.folder / "refused").rglob("*.sh")), [])

        refused("node configuration", "launcher.gpus_per_node=3", "batch_size=12", "trainer.accelerator=auto")
        refused("node configuration", "submitit.cpus_per_task=9")
        refused("node configuration", "submitit.mem_gb=99")
        refused("launcher.num_nodes .*4, ", "launcher.num_nodes=5")
        refused("submitit.timeout_hour .*1, .*short", "submitit.partition=short", "submitit.timeout_hour=2")
        refused("[Ii]nvalid partition.*submitit", "submitit.partition=nope")
        refused("Invalid feature.*submitit", "submitit.constraints=nope")
        refused("Invalid node name.*submitit", "submitit.nodelist=nope")
        refused("submitit.dependency is afterok:99999999", "submitit.dependency='afterok:99999999'")
        refused("submitit.dependency .*'after:x'", "submitit.dependency='after:x'")
        refused("launcher.experiment_log_dir", f"launcher.experiment_log_dir={self.folder / 'slurm' / 'slurm.conf'}")
        refused("cannot be written", "launcher.experiment_log_dir=/proc/run")
        refused("submitit .*mem_gb", "submitit.mem=4G", "submitit.mem_gb=4")
        refused("RANK.*submitit.use_cluster", RANK="0", WORLD_SIZE="2")
        unreachable = self.folder / "unreachable.conf"
        known = (self.folder / "slurm/slurm.conf").read_text()
        unreachable.write_text(re.sub("(?m)^SlurmctldPort=.*", "SlurmctldPort=9", known))
        refused("SLURM: squeue", SLURM_CONF=str(unreachable))
        self.assertEqual(self.cluster.ask("squeue", "--noheader", "--name=omnivision", "--states=pending"), "")

    def test_8_a_run_directory_that_a_node_does_not_see_or_may_only_read(self):
        """The reason is in the job's comment, since nothing can be written; `omnivision runs` shows it."""
        run, job = self.hidden / "run", self.unseen
        self.wait_for_state(job, "FAILED", seconds=90)
        listed = self.shell("omnivision", "runs", str(self.hidden)).stdout
        message = f"node4 cannot write to {run}/submitit_logs"
        self.assertIn(f"run: failed: job {job} is FAILED ({message})", listed)
        self.wait_for_state(self.read_only, "FAILED", seconds=90)
        listed = self.shell("omnivision", "runs", str(self.folder / "read_only")).stdout
        self.assertIn(f"node2 cannot write to {self.folder}/read_only/run/submitit_logs", listed)
        self.wait_for_state(self.half_seen, "FAILED", seconds=90)
        self.assertRegex(
            runs.read_summary(self.hidden / "two")["exit_reason"],
            f"job {self.half_seen}: node4 cannot write to {self.hidden}/two/submitit_logs ",
        )

    def test_5_an_array_of_points(self):
        sweep = "launcher.experiment_log_dir='" + str(self.folder) + "/sweep/seed_${trainer.seed_value}'"
        command = [*self.demo, "-m", "trainer.seed_value=1,2,3", sweep, "submitit.array_parallelism=2", *SUBMITTED]
        submission = self.shell(*command)
        self.assertEqual(submission.returncode, 0, submission.stderr)
        lines = re.findall(rf"submitted job_id=(\d+)_(\d) folder={self.folder}/sweep/seed_(\d)\n", submission.stdout)
        self.assertEqual([line[1:] for line in lines], [("0", "1"), ("1", "2"), ("2", "3")], submission.stdout)
        [array] = {line[0] for line in lines}
        self.assertEqual(self.cluster.fact(array, "ArrayTaskThrottle"), "2")
        for point in range(3):
            self.wait_for_state(f"{array}_{point}", "COMPLETED")
        summaries = {seed: runs.read_summary(self.folder / f"sweep/seed_{seed}") for seed in (1, 2, 3)}
        self.assertEqual({summaries[seed]["status"] for seed in summaries}, {"finished"})
        self.assertEqual(
            len({summaries[seed]["last"]["loss"] for seed in summaries}), 3, "each point is a run of its own"
        )
        self.here(
            *self.demo, f"launcher.experiment_log_dir={self.folder / 'alone'}", "trainer.seed_value=3", "epochs=1"
        )
        self.assert_same_weights(self.folder / "sweep/seed_3", self.folder / "alone")
        self.assertEqual(history(self.folder / "sweep/seed_3", "start")[0]["job"], f"{array}_2")
        self.assertFalse((self.folder / "multirun").exists(), "which Hydra makes for a sweep")
        again = self.call(*[word.replace("1,2,3", "1,2,3,4") for word in command])
        self.assertEqual(again.stdout.count("finished folder="), 3)
        [fourth] = re.findall(r"submitted job_id=(\d+) folder=\S+seed_4\n", again.stdout)
        self.cluster.ask("scancel", fourth)
        different = self.call(*command, "submitit.cpus_per_task=1,2")
        self.assert_refused(different, "cpus-per-task|launcher.experiment_log_dir")

    def test_6_settings_of_the_site_come_from_a_folder_of_ones_own(self):
        site = self.folder / "ours" / "site"
        site.mkdir(parents=True)
        (site / "lab.yaml").write_text(
            "# @package _global_\nsubmitit: {partition: short, timeout_hour: 1, cpus_per_task: 1, comment: from the lab}\n"
            "datasets: {nohuman: {prefix: /films/}}\n"
        )
        submission = self.call(*self.demo, "--config-dir", str(site.parent), "+site=lab", "submitit.use_cluster=true",
                          f"launcher.experiment_log_dir={self.folder / 'sited'}")  # fmt: skip
        self.assertEqual(submission.returncode, 0, submission.stderr)
        [job] = re.findall(r"job_id=(\d+)", submission.stdout)
        self.assertEqual(self.cluster.fact(job, "Partition"), "short")
        self.cluster.ask("scancel", job)
        self.assertIn("prefix: /films/", (self.folder / f"sited/submitit_logs/{job}_config.yaml").read_text())
        wrong = self.call(*self.demo, "--config-dir", str(site.parent), "+site=lap")
        self.assert_refused(wrong, r"site/lap.* mean lab\?")
        (site / "bare.yaml").write_text("submitit: {partition: short}\n")
        bare = self.call(*self.demo, "--config-dir", str(site.parent), "+site=bare", "launcher.experiment_log_dir=x")
        self.assert_refused(bare, "@package _global_")
        (site / "lab.yaml").write_text("# @package _global_\nsubmitit: {partitoin: short}\n")
        typo = self.call(
            *self.demo, "--config-dir", str(site.parent), "+site=lab", f"launcher.experiment_log_dir={self.folder}/x"
        )
        self.assert_refused(typo, "submitit.partitoin .* mean submitit.partition")

    def test_7_a_number_that_comes_again(self):
        """After SLURM was set up anew its ids start over: what an old job left is not taken for the new one's."""
        run = self.folder / "reused"
        command = [*self.demo, f"launcher.experiment_log_dir={run}"]
        first = self.submit(*command, SBATCH_EXPORT="NONE")  # of a site, say; the tasks get the script's environment
        self.wait_for_state(first, "COMPLETED")
        again = str(int(first) + 1)
        logs = run / "submitit_logs"
        for file in logs.glob(f"{first}_*"):
            file.rename(logs / file.name.replace(first, again))
        old = (logs / "history.jsonl").read_text()
        (logs / "history.jsonl").write_text("".join(f"{line}\n" for line in old.replace(first, again).splitlines()))
        summary = runs.read_summary(run)
        summary["job"]["job_id"] = again
        RunDir(run).write_summary(**summary)
        second = self.submit(*command, "trainer.max_epochs=2", "trainer.checkpoint.allow_changes=true")
        self.assertEqual(second, again, "the test needs it to come again")
        self.wait_for_state(second, "COMPLETED")
        self.assertEqual((runs.read_summary(run)["epochs"], runs.read_summary(run)["status"]), (2, "finished"))
