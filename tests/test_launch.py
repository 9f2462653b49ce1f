"""Ways to start a run: torchrun, local processes, and what happens when one of them fails."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from datetime import timedelta
from pathlib import Path
from unittest import mock

from omegaconf import OmegaConf

from omnivision.config.compose import check_distinct_run_dirs, compose_configs, parse_command_line
from omnivision.distributed.process_group import Dist, RankInfo
from omnivision.launch import local
from omnivision.launch.launcher import apply_torchrun_env
from omnivision.launch.local import wait_for_processes
from omnivision.utils.errors import EXIT_FAULT, EXIT_INTERRUPTED, UserError
from tests import runs


class Torchrun(unittest.TestCase):
    def test_torchrun_equals_local_processes(self):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            settings = [*runs.write_split(folder, runs.real_films() * 4)]
            local = runs.run(folder / "local", *settings, "launcher.gpus_per_node=2")
            self.assertEqual(local.returncode, 0, local.stderr)
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
            result = subprocess.run(
                [*torchrun, *runs.command(folder / "torchrun", *settings, "submitit.use_cluster=true")[1:]],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=300,
            )
            self.assertEqual(result.returncode, 0, result.stderr)
            losses = [[line["loss"] for line in runs.lines(folder / run)] for run in ("local", "torchrun")]
            self.assertEqual(len(losses[0]), 2)
            self.assertEqual(*losses)
            self.assertEqual(result.stdout.count("step 2/2"), 1, "one process speaks")

    def started(self, folder: Path, *settings: str, step: int) -> subprocess.Popen:
        """A run that has done some steps and would go on for long."""
        process = subprocess.Popen(
            runs.command(folder / "run", *settings, "epochs=1000"),
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        log = folder / "run/logs/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (log.exists() and f'"step": {step},' in log.read_text()):
            self.assertLess(time.monotonic(), deadline)
            self.assertIsNone(process.poll())
            time.sleep(0.05)
        return process

    def test_sigterm_ends_all_processes_and_is_written_down(self):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            data = runs.write_split(folder, runs.real_films() * 4)
            process = self.started(folder, *data, "launcher.gpus_per_node=2", step=2)
            workers = children(process.pid)
            process.terminate()
            self.assertEqual(process.wait(timeout=30), 143)
            for worker in workers:
                self.assertFalse(Path(f"/proc/{worker}").exists())
            told = runs.summary(folder / "run")
            self.assertEqual(told["status"], "interrupted")
            self.assertEqual(told["exit_reason"], f"ended by SIGTERM; step {told['steps']} is saved")
            self.assertGreaterEqual(told["steps"], 2)

    def test_data_workers_leave_with_a_killed_run(self):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            process = self.started(folder, *runs.write_split(folder, runs.real_films() * 4), "num_workers=2", step=2)
            servers = children(process.pid, "forkserver")
            workers = [worker for server in servers for worker in children(server, "forkserver")]
            self.assertEqual((len(servers), len(workers)), (1, 2))
            process.kill()
            process.wait()
            deadline = time.monotonic() + 10
            while left := [pid for pid in servers + workers if Path(f"/proc/{pid}").exists()]:
                self.assertLess(time.monotonic(), deadline, left)
                time.sleep(0.05)

    def test_a_killed_process_takes_the_others_with_it(self):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            data = runs.write_split(folder, runs.real_films() * 4)
            process = self.started(folder, *data, "launcher.gpus_per_node=2", step=3)
            workers = children(process.pid)
            self.assertEqual(len(workers), 2)
            os.kill(workers[0], 9)  # the one that writes the summary
            self.assertEqual(process.wait(timeout=30), EXIT_FAULT)
            for worker in workers:
                self.assertFalse(Path(f"/proc/{worker}").exists())
            told = runs.summary(folder / "run")
            self.assertEqual(told["status"], "failed")
            self.assertIn("process 0 was killed by SIGKILL", told["exit_reason"])

    def test_ctrl_c_on_two_processes_is_written_down(self):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        self.addCleanup(signal.signal, signal.SIGINT, before)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            data = runs.write_split(folder, runs.real_films() * 4)
            process = self.started(folder, *data, "launcher.gpus_per_node=2", step=2)
            for pid in (*children(process.pid), process.pid):  # as a terminal does
                os.kill(pid, signal.SIGINT)
            self.assertEqual(process.wait(timeout=30), EXIT_INTERRUPTED)
            told = runs.summary(folder / "run")
            self.assertEqual(told["status"], "interrupted")
            self.assertIn("interrupted from the keyboard", told["exit_reason"])


def children(pid: int, kind: str = "spawn_main") -> list[int]:
    """The processes of one kind that a process has started (a launcher its training processes), in order of their start."""
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
    def ended(*codes: int) -> list:
        return [mock.Mock(exitcode=code, is_alive=lambda: False) for code in codes]

    def test_of_processes_that_ended_between_two_looks(self):
        for codes, code, saying in (
            ((0, 0), 0, ""),
            ((0, 70), 70, "a process ended with exit code 70"),
            ((1, -9), 1, "process 1 was killed by SIGKILL"),
            ((-15, 70), EXIT_FAULT, "process 0 was killed by SIGTERM"),
        ):
            with self.subTest(codes):
                found, reason = wait_for_processes(self.ended(*codes))
                self.assertEqual(found, code)
                self.assertIn(saying, reason)

    def test_a_request_to_stop_hides_no_other_end(self):
        for codes, expected in (((71, 71), 71), ((143, 143), 143), ((-15, 143), 143), ((0, 0), 0), ((1, 1), 1)):
            processes = iter([mock.Mock(exitcode=code, is_alive=lambda: False, pid=None) for code in codes])
            context = mock.Mock(Process=lambda processes=processes, **_: next(processes))
            folder = mock.Mock(logs=Path("/nowhere"))
            with (
                self.subTest(codes),
                mock.patch("multiprocessing.get_context", return_value=context),
                mock.patch.object(local, "forward_signals", lambda _: contextlib.nullcontext([signal.SIGTERM])),
                mock.patch.object(local, "run_folder", return_value=folder),
            ):
                self.assertEqual(local.run_local_processes(mock.Mock(), 2), expected)
                interrupted = [call.kwargs["interrupted"] for call in folder.note_silent_end.call_args_list]
                self.assertEqual(interrupted, [expected == 143] if expected > 1 else [])

    def test_a_data_worker_whose_run_was_killed_while_it_began_ends(self):
        gone = subprocess.Popen(["true"])
        gone.wait()
        # torch keeps what a worker raises here for a process that is not there any more.
        program = (
            "import contextlib, time\nfrom omnivision.data.loader import worker_init\n"
            f"with contextlib.suppress(Exception):\n    worker_init({gone.pid}, 0)\ntime.sleep(20)"
        )
        self.assertEqual(subprocess.run([sys.executable, "-c", program], cwd=runs.ROOT, timeout=60).returncode, 1)


class Sweeps(unittest.TestCase):
    def test_each_run_of_a_sweep_needs_a_folder_of_its_own(self):
        one, two = (OmegaConf.create({"launcher": {"experiment_log_dir": name}}) for name in ("runs/a", "runs/b"))
        check_distinct_run_dirs([one, two])
        with self.assertRaisesRegex(UserError, "launcher.experiment_log_dir .*2"):
            check_distinct_run_dirs([one, two, one])

    def test_a_run_for_each_combination_of_values(self):
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


class Backends(unittest.TestCase):
    def test_nccl_without_a_gpu(self):
        with tempfile.TemporaryDirectory() as folder:
            place = RankInfo(0, 2, 0, 2, f"file://{folder}/store")
            with self.assertRaisesRegex(UserError, "trainer.distributed.backend"):
                Dist(place, "cpu", "nccl", timedelta(minutes=1))


class Leftovers(unittest.TestCase):
    def test_what_killed_runs_leave_behind_is_removed(self):
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(tempfile, "tempdir", folder):
            dead = Path(folder, "omnivision-rendezvous-dead")
            dead.mkdir()
            (dead / "lock").touch()
            with local.rendezvous_dir() as live, local.rendezvous_dir() as second:
                self.assertEqual(sorted(os.listdir(folder)), sorted(Path(name).name for name in (live, second)))
            self.assertEqual(os.listdir(folder), [])


class Environment(unittest.TestCase):
    def apply(self, use_cluster: bool, **variables: str) -> dict:
        config = OmegaConf.create(
            {"launcher": {"num_nodes": 1, "gpus_per_node": 1}, "submitit": {"use_cluster": use_cluster}}
        )
        with mock.patch.dict(os.environ, variables):
            apply_torchrun_env(config)
        return OmegaConf.to_container(config)

    def test_variables_of_torchrun_replace_settings(self):
        torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
        wanted = {"launcher": {"num_nodes": 2, "gpus_per_node": 2}, "submitit": {"use_cluster": False}}
        self.assertEqual(self.apply(False, **torchrun), wanted)
        self.assertEqual(self.apply(True, TORCHELASTIC_RUN_ID="1", **torchrun), wanted)
        self.assertTrue(self.apply(True, MASTER_PORT="1")["submitit"]["use_cluster"])
        with self.assertRaisesRegex(UserError, "RANK.*submitit.use_cluster"):
            self.apply(True, **torchrun)
        for leftover in ({"RANK": "0"}, {"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}):
            with self.assertRaisesRegex(UserError, "MASTER_ADDR"):
                self.apply(False, **leftover)


class Places(unittest.TestCase):
    def test_from_torchrun(self):
        before = dict(os.environ)
        try:
            os.environ |= {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
            self.assertEqual(RankInfo.from_torchrun(), RankInfo(3, 4, 1, 2, "env://"))
        finally:
            os.environ.clear()
            os.environ.update(before)


if __name__ == "__main__":
    unittest.main()
