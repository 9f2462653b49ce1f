"""Ways to start a run: torchrun, local processes, and what happens when one of them fails."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

from omegaconf import OmegaConf

from omnivision.config.compose import check_distinct_run_dirs, compose_configs, parse_command_line
from omnivision.distributed.process_group import RankInfo
from omnivision.launch import launcher
from omnivision.launch.launcher import apply_torchrun_env, wait_for_processes
from omnivision.utils.errors import EXIT_FAULT, EXIT_SIGINT, UserError
from tests import runs
from tests.fixtures import Folder


class Runs(Folder):
    """Runs as a user starts them, and what is done to their processes."""

    def setUp(self):
        super().setUp()
        self.run_dir = self.folder / "run"
        self.data = runs.write_split(self.folder, runs.real_videos() * 4)

    def started(self, *settings: str, step: int = 2) -> subprocess.Popen:
        """A run that has done some steps and would continue for long."""
        process = subprocess.Popen(
            runs.command(self.run_dir, *self.data, *settings, "epochs=1000"),
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        log, deadline = self.run_dir / "logs/metrics.jsonl", time.monotonic() + 120
        while not (log.exists() and f'"step": {step},' in log.read_text()):
            self.assertLess(time.monotonic(), deadline)
            self.assertIsNone(process.poll())
            time.sleep(0.05)
        return process

    def assert_ended(self, process: subprocess.Popen, code: int, status: str, reason: str, *others: int) -> None:
        self.assertEqual(process.wait(timeout=30), code)
        summary = runs.read_summary(self.run_dir)
        self.assertEqual(summary["status"], status)
        self.assertRegex(str(summary["exit_reason"]), reason)
        deadline = time.monotonic() + 10
        while left := [pid for pid in others if Path(f"/proc/{pid}").exists()]:
            self.assertLess(time.monotonic(), deadline, left)
            time.sleep(0.05)

    def test_torchrun_equals_local_processes(self):
        local = runs.run(self.folder / "local", *self.data, "launcher.gpus_per_node=2")
        self.assertEqual(local.returncode, 0, local.stderr)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
        command = runs.command(self.folder / "torchrun", *self.data, "submitit.use_cluster=true")[1:]
        result = subprocess.run([*torchrun, *command], cwd=self.folder, capture_output=True, text=True, timeout=300)
        self.assertEqual(result.returncode, 0, result.stderr)
        losses = [[line["loss"] for line in runs.read_metrics(self.folder / run)] for run in ("local", "torchrun")]
        self.assertEqual(len(losses[0]), 2)
        self.assertEqual(*losses)
        self.assertEqual(result.stdout.count("step 2/2"), 1, "rank 0 alone prints")

    def test_sigterm_and_ctrl_c_end_all_processes(self):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        self.addCleanup(signal.signal, signal.SIGINT, before)
        for number, code, reason in (
            (signal.SIGTERM, 143, r"^ended by SIGTERM; step \d+ is saved$"),
            (signal.SIGINT, EXIT_SIGINT, "interrupted from the keyboard"),
        ):
            process = self.started("launcher.gpus_per_node=2")
            workers = children(process.pid)
            for pid in (*(workers if number == signal.SIGINT else ()), process.pid):  # Ctrl-C reaches all of a terminal
                os.kill(pid, number)
            self.assert_ended(process, code, "interrupted", reason, *workers)
            shutil.rmtree(self.run_dir)

    def test_killed_rank_ends_the_other_ranks(self):
        for rank, more in ((0, ""), (1, ".*after step")):  # rank 0 writes the summary, or saw the other one in a phase
            process = self.started("launcher.gpus_per_node=2", step=3)
            workers = children(process.pid)
            self.assertEqual(len(workers), 2)
            os.kill(workers[rank], signal.SIGKILL)
            self.assert_ended(process, EXIT_FAULT, "failed", f"rank {rank} was killed by SIGKILL{more}", *workers)
            shutil.rmtree(self.run_dir)

    def test_suspended_rank_is_reported_with_its_phase(self):
        process = self.started("launcher.gpus_per_node=2", "trainer.distributed.timeout_minutes=0.1", step=3)
        main, other = children(process.pid)
        os.kill(other, signal.SIGSTOP)
        reason = rf"^rank 1 \(pid {other} on .* no heartbeat for .* s; last seen .*, after step \d"
        self.assert_ended(process, EXIT_FAULT, "failed", reason, main, other)

    def test_sigterm_ends_a_rank_blocked_in_a_collective(self):
        process = self.started("launcher.gpus_per_node=2", "submitit.signal_delay_s=null", step=3)
        main, other = children(process.pid)
        os.kill(other, signal.SIGSTOP)
        for _ in range(2):
            time.sleep(1.5)
            os.kill(main, signal.SIGTERM)
        start = time.monotonic()
        while Path(f"/proc/{main}").exists() and Path(f"/proc/{main}/cmdline").read_bytes():
            self.assertLess(time.monotonic() - start, 6, "a second signal leaves it 5 s")
            time.sleep(0.05)
        reason = runs.read_summary(self.run_dir)["exit_reason"]
        self.assertRegex(reason, r"^ended by SIGTERM; .* (in a step|saving), after step \d+; thread stacks")
        # Gradients are reduced within the backward pass.
        stacks = (self.run_dir / "logs/rank_0_stacks.txt").read_text()
        self.assertRegex(stacks, "all_(reduce|gather)|in _engine_run_backward")

    def test_killed_or_hanging_data_worker_fails_the_run(self):
        for number, reason in ((signal.SIGKILL, "worker was killed"), (signal.SIGSTOP, "trainer.data.timeout_minutes")):
            process = self.started("num_workers=1", "trainer.data.timeout_minutes=0.1", step=3)
            [server] = children(process.pid, "forkserver")
            [worker] = children(server, "forkserver")
            os.kill(worker, number)
            self.assert_ended(process, EXIT_FAULT, "failed", rf"{reason}.*\.mp4", server, worker)
            self.assertNotIn("Traceback", process.stderr.read())
            shutil.rmtree(self.run_dir)

    def test_data_workers_exit_with_a_killed_run(self):
        process = self.started("num_workers=2")
        [server] = children(process.pid, "forkserver")
        workers = children(server, "forkserver")
        self.assertEqual(len(workers), 2)
        process.kill()
        self.assert_ended(process, -signal.SIGKILL, "running", "None", server, *workers)


def children(pid: int, kind: str = "spawn_main") -> list[int]:
    """Return the processes of one kind that a process has started (a launcher its ranks), in order of their start."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
            command = (entry.parent / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if int(fields[1]) == pid and kind in command:
            found.append(int(entry.parent.name))
    return sorted(found)


class Ends(unittest.TestCase):
    @staticmethod
    def ended(codes: tuple[int, ...]) -> list:
        return [mock.Mock(exitcode=code, is_alive=lambda: False, pid=None) for code in codes]

    def test_exit_code_of_several_ranks(self):
        """Those that ended between two looks; a request to stop hides no other end."""
        for codes, code, words, after_sigterm in (
            ((0, 0), 0, "", 0),
            ((0, 70), 70, "a rank ended with exit code 70", 70),
            ((1, -9), 1, "rank 1 was killed by SIGKILL", 1),
            ((1, 1), 1, "", 1),
            ((71, 71), 71, "", 71),
            ((143, 143), 143, "", 143),
            ((-15, 143), EXIT_FAULT, "rank 0 was killed by SIGTERM", 143),
        ):
            with self.subTest(codes):
                found, reason = wait_for_processes(self.ended(codes))
                self.assertEqual(found, code)
                self.assertIn(words, reason)
                processes, job = iter(self.ended(codes)), mock.Mock(**{"run_dir.logs": Path("/nowhere")})
                context = mock.Mock(Process=lambda processes=processes, **_: next(processes))
                received = mock.patch.object(
                    launcher, "forward_signals", lambda _: contextlib.nullcontext([signal.SIGTERM])
                )
                with received, mock.patch("multiprocessing.get_context", return_value=context):
                    self.assertEqual(launcher.run_local_processes(job, 2), after_sigterm)
                noted = [call.kwargs["interrupted"] for call in job.run_dir.record_unreported_exit.call_args_list]
                self.assertEqual(noted, [after_sigterm == 143] if after_sigterm > 1 else [])

    def test_data_worker_exits_if_its_run_was_killed_during_its_start(self):
        gone = subprocess.Popen(["true"])
        gone.wait()
        # torch keeps what a worker raises here for a process that is not there any more.
        program = (
            "import contextlib, time\nfrom omnivision.data.loader import worker_init\n"
            f"with contextlib.suppress(Exception):\n    worker_init({gone.pid}, 0)\ntime.sleep(20)"
        )
        self.assertEqual(subprocess.run([sys.executable, "-c", program], cwd=runs.ROOT, timeout=60).returncode, 1)


class Sweeps(unittest.TestCase):
    def test_runs_of_a_sweep_need_distinct_run_directories(self):
        one, two = (OmegaConf.create({"launcher": {"experiment_log_dir": name}}) for name in ("runs/a", "runs/b"))
        check_distinct_run_dirs([one, two])
        with self.assertRaisesRegex(UserError, "launcher.experiment_log_dir .*2"):
            check_distinct_run_dirs([one, two, one])

    def test_sweep_has_a_run_for_each_combination(self):
        with tempfile.TemporaryDirectory() as folder:
            command = parse_command_line(
                ["batch_size=8,16", "-m", "epochs=range(1,3)", "+site=a", f"--config-dir={folder}",
                 "hydra.job.chdir=False", "launcher.experiment_log_dir=runs/${batch_size}_${epochs}"],
                runs.ROOT / "config",
            )  # fmt: skip
            (Path(folder) / "site").mkdir()
            (Path(folder) / "site/a.yaml").write_text("# @package _global_\nlr: 3\n")
            configs = compose_configs(command)
            found = [(each.batch_size, each.epochs, each.lr, each.launcher.experiment_log_dir) for each in configs]
            self.assertEqual(found, [(b, e, 3, f"runs/{b}_{e}") for b in (8, 16) for e in (1, 2)])


class Environment(unittest.TestCase):
    def apply(self, use_cluster: bool, **variables: str) -> dict:
        config = OmegaConf.create(
            {"launcher": {"num_nodes": 1, "gpus_per_node": 1}, "submitit": {"use_cluster": use_cluster}}
        )
        with mock.patch.dict(os.environ, variables):
            apply_torchrun_env(config)
        return OmegaConf.to_container(config)

    def test_torchrun_variables_replace_settings(self):
        torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
        wanted = {"launcher": {"num_nodes": 2, "gpus_per_node": 2}, "submitit": {"use_cluster": False}}
        self.assertEqual(self.apply(False, **torchrun), wanted)
        self.assertEqual(self.apply(True, TORCHELASTIC_RUN_ID="1", **torchrun), wanted)
        with mock.patch.dict(os.environ, torchrun):
            self.assertEqual(RankInfo.from_torchrun(), RankInfo(3, 4, 0, 2, "env://"))
        self.assertTrue(self.apply(True, MASTER_PORT="1")["submitit"]["use_cluster"])
        with self.assertRaisesRegex(UserError, "RANK.*submitit.use_cluster"):
            self.apply(True, **torchrun)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
            with self.assertRaisesRegex(UserError, f"^{name} .*abc"):
                self.apply(False, **torchrun | {name: "abc"})
        for inherited in ({"RANK": "0"}, {"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}):
            with self.assertRaisesRegex(UserError, "MASTER_ADDR"):
                self.apply(False, **inherited)


if __name__ == "__main__":
    unittest.main()
