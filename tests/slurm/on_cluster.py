"""A test case with a cluster of its own, on which the real command is submitted."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

from omnivision import train
from tests import runs
from tests.slurm.cluster import Cluster, missing, wait

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "SUBMITIT_PREEMPT_SIGNAL": "USR1",
    "OMNIVISION_SECRET_TOKEN": "hunter2",
    "PROXY": "http://me:hunter2@proxy:80",
}
# What an allocation, an array element and another launcher leave in the environment of whoever submits.
LEFTOVERS = {
    "SLURM_MEM_PER_NODE": "1", "SLURM_GPUS": "9", "SLURM_GPUS_PER_NODE": "9", "SLURM_EXCLUSIVE": "user",
    "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "7", "SLURM_RESTART_COUNT": "3", "SLURM_TIME_FORMAT": "relative",
    "SLURM_NTASKS": "7", "SBATCH_MEM": "1", "SLURM_CPUS_PER_TASK": "9", "SLURM_NTASKS_PER_NODE": "9",
    "SQUEUE_STATES": "FAILED", "SRUN_CPUS_PER_TASK": "9", "LOCAL_RANK": "9", "MASTER_ADDR": "nowhere",
    "MASTER_PORT": "1",
}  # fmt: skip
SUBMITTED = ["submitit.use_cluster=true", "submitit.cpus_per_task=1"]


@unittest.skipIf(missing(), f"no SLURM can be started here: {missing()}")
class OnCluster(unittest.TestCase):
    """`cluster` is started before the tests of a class; afterwards nothing of it may be left."""

    cluster: Cluster
    folder: Path

    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        cls.folder = Path(temporary.name).resolve()
        (cls.folder / "slurm").mkdir()
        cls.cluster = Cluster(cls.folder / "slurm")
        cls.addClassCleanup(cls.no_process_left)
        cls.addClassCleanup(cls.cluster.stop)
        cls.cluster.start()

    @classmethod
    def no_process_left(cls):
        wait("the cluster's processes to be gone", lambda: not cls.cluster.left(), 10)

    def shell(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A command on what would be the login node."""
        return subprocess.run(
            command, cwd=self.folder, env=self.login_node(**more), capture_output=True, text=True, timeout=300
        )

    def login_node(self, **more: str) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{self.cluster.environment['PATH']}"
        return self.cluster.environment | ONE_THREAD | LEFTOVERS | {"PATH": path} | more

    def call(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """`shell` for the training command, in this process, which has imported torch already."""
        with (
            contextlib.chdir(self.folder),
            mock.patch.dict(os.environ, self.login_node(**more), clear=True),
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as errors,
            self.assertRaises(SystemExit) as ended,
        ):
            train.main(command[2:])
        return subprocess.CompletedProcess(command, ended.exception.code or 0, out.getvalue(), errors.getvalue())  # type: ignore[arg-type]

    def submit(self, *command: str, **more: str) -> str:
        """Submit what a command line describes; returns the id of its job."""
        return self.job_of(self.call(*command, *SUBMITTED, **more))

    def job_of(self, result: subprocess.CompletedProcess[str]) -> str:
        self.assertEqual(result.returncode, 0, result.stderr)
        found = re.fullmatch(r"submitted job_id=(\S+) folder=\S+\n", result.stdout)
        assert found is not None, result.stdout
        return found[1]

    def here(self, *command: str) -> None:
        """Run a command to its end, outside the cluster."""
        result = subprocess.run(
            command, cwd=self.folder, env=os.environ | ONE_THREAD, capture_output=True, text=True, timeout=300
        )
        self.assertEqual(result.returncode, 0, result.stderr)

    def wait_for_state(self, job: str, *states: str, seconds: float = 120) -> None:
        try:
            wait(f"job {job} to be {states}", lambda: self.cluster.fact(job, "JobState") in states, seconds)
        except AssertionError as error:
            logs = [path for path in self.folder.rglob(f"{job}_*.log") if path.stat().st_size]
            logged = "\n".join(f"{path}:\n{path.read_text()[-2000:]}" for path in logs)
            raise AssertionError(f"{error}; it is {self.cluster.fact(job, 'JobState')}\n{logged}") from None

    def wait_for_step(self, run: Path, step: int, seconds: float = 60) -> None:
        log = run / "logs" / "metrics.jsonl"

        def reached() -> bool:
            return log.exists() and any(line["step"] >= step for line in runs.read_metrics(run))

        wait(f"step {step} of {run.name}", reached, seconds)

    def assert_steps_once(self, run: Path, count: int) -> None:
        self.assertEqual([line["step"] for line in runs.read_metrics(run)], list(range(1, count + 1)))

    def assert_same_weights(self, one: Path, other: Path) -> None:
        first, second = runs.load_weights(one), runs.load_weights(other)
        self.assertEqual(list(first), list(second))
        for name in first:
            self.assertEqual((first[name] - second[name]).abs().max().item(), 0, name)

    def assert_refused(self, result: subprocess.CompletedProcess[str], saying: str) -> None:
        self.assertEqual((result.returncode, result.stdout), (1, ""), result.stderr)
        errors = [line for line in result.stderr.splitlines() if not line.startswith("warning:")]
        self.assertEqual(len(errors), 1, result.stderr)
        self.assertRegex(errors[0], f"^error: .*{saying}")


def history(run: Path, event: str) -> list[dict]:
    file = run / "submitit_logs" / "history.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line for line in map(json.loads, lines) if line["event"] == event]


def told_time(what: str, began: float, ended: float | None = None) -> None:
    """Say in the test's output how long something took."""
    print(f"  slurm: {what}: {(ended or time.time()) - began:.1f} s", file=sys.stderr)
