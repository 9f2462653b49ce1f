"""What a run folder knows of its jobs, and what SLURM's answers mean; the cluster itself is in tests/slurm."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from datetime import datetime, timedelta
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from submitit.core.utils import FailedJobError, FailedSubmissionError

from omnivision.config.schema import Settings
from omnivision.config.validate import validate_config
from omnivision.distributed.process_group import RankInfo
from omnivision.launch import exit as ending
from omnivision.launch import launcher, slurm, slurm_jobs, submit
from omnivision.launch.launcher import Job
from omnivision.launch.run import run_rank
from omnivision.launch.slurm import JobState, explain_error, parse_limit, parse_time
from omnivision.launch.slurm_jobs import (
    JobLog,
    Task,
    history,
    note,
    parse_dependencies,
    public_environment,
    resolve_status,
    restarts_without_progress,
)
from omnivision.launch.submit import (
    batch_script_prologue,
    check_dependency,
    check_folders,
    check_setup,
    dependency_failed,
    is_finished,
    is_queued,
    require_free,
    signal_delay,
    warn_of_other_settings,
)
from omnivision.launch.watchdog import is_peer_lost
from omnivision.reporting.run_directory import RunDir
from omnivision.utils.errors import PeerLostError, StopRequested, UserError
from omnivision.utils.signals import TIME_LIMIT
from tests import runs, stage_runs

SLURM = {
    "SLURM_JOB_ID": "123456", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "node[3-4]",
}  # fmt: skip


class Folder(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = RunDir(Path(temporary.name) / "run")
        (self.folder.path / slurm_jobs.LOGS).mkdir(parents=True)

    def rank_end(self, restarts: int, error: BaseException, rank: int = 3, job: str | None = "123456") -> None:
        """Another rank's own word of its end."""
        self.folder.logs.mkdir(exist_ok=True)
        with mock.patch.object(ending, "own_job", return_value=job):
            with mock.patch.object(ending, "own_restarts", return_value=restarts):
                ending.write_end_file(self.folder, rank, error, f"{type(error).__name__}: {error}")


class Tasks(unittest.TestCase):
    def test_rank_world_address_and_port_are_slurms(self):
        with mock.patch.dict(os.environ, SLURM):
            task = Task.from_environment()
            self.assertEqual((task.job_id, task.restarts, task.nodes), ("123456", 0, "node[3-4]"))
            place = task.place("node3")
            self.assertEqual((place.rank, place.world_size, place.local_rank, place.local_world_size), (5, 8, 1, 4))
            self.assertEqual(place.init_method, "tcp://node3:15928")
        element = {"SLURM_ARRAY_JOB_ID": "123400", "SLURM_ARRAY_TASK_ID": "7", "SLURM_RESTART_COUNT": "2"}
        with mock.patch.dict(os.environ, SLURM | element):
            task = Task.from_environment()
            self.assertEqual((task.job_id, task.number, task.restarts), ("123400_7", 123456, 2))

    def test_neighbouring_jobs_never_share_a_port_and_none_is_one_that_systems_hand_out(self):
        with mock.patch.dict(os.environ, SLURM):
            task = Task.from_environment()
        starts = ((number, restarts) for number in range(987_654, 989_154) for restarts in range(13))
        tasks = (dataclasses.replace(task, number=number, restarts=restarts) for number, restarts in starts)
        ports = [int(each.place("a").init_method.rpartition(":")[2]) for each in tasks]
        self.assertEqual((len(set(ports)), min(ports), max(ports)), (13 * 1500, 10_000, 29_499))

    def test_a_job_that_comes_back_often_keeps_to_its_own_ports(self):
        with mock.patch.dict(os.environ, SLURM):
            task = Task.from_environment()
        ports = [
            {dataclasses.replace(task, number=number, restarts=n).place("a").init_method for n in range(100)}
            for number in (77, 78)
        ]
        self.assertEqual([len(own) for own in ports], [13, 13])
        self.assertEqual(ports[0] & ports[1], set())

    def test_one_process_needs_to_meet_nobody(self):
        with mock.patch.dict(os.environ, SLURM | {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}):
            self.assertIsNone(Task.from_environment().place("node3").init_method)


class Records(Folder):
    def record(self, restarts: int, limit: int = 100, token: str = "a") -> JobLog:
        with mock.patch.dict(os.environ, SLURM | {"SLURM_RESTART_COUNT": str(restarts)}):
            task = Task.from_environment()
        return JobLog(task, self.folder, token, limit, watch_the_clock=False)

    def starts(self, *steps: int | None, token: str = "a") -> None:
        """Starts of a job that went on from these steps; None: it did not get so far."""
        for restarts, step in enumerate(steps):
            record = self.record(restarts, token=token)
            record.record_start()
            record.check_requeue_limits(mock.Mock())
            if step is not None:
                record.record_resume(step)

    def test_three_restarts_without_a_step_are_enough(self):
        self.starts(0, 0, 10, 10, 10)
        with self.assertRaisesRegex(UserError, "restarted 3 times without progress: it is at step 10 again"):
            self.starts(0, 0, 10, 10, 10, 10, token="b")

    def test_starts_that_did_not_even_get_so_far_count(self):
        self.starts(4, None, None, None)
        with self.assertRaisesRegex(UserError, "without progress: it did not get as far as its checkpoint"):
            self.starts(4, None, None, None, 9, token="b")
        gone = RuntimeError("gloo: Connection reset by peer")
        with (
            mock.patch.object(slurm_jobs, "END_FILE_SECONDS", 0),
            mock.patch.object(slurm, "show_job", return_value={}),
        ):
            self.assertFalse(self.record(4, token="b").classify_exit(gone, "gone").requeue)

    def test_what_was_won_in_between_is_progress(self):
        self.starts(0, 0, 0, 5, 5, 5, 6, None, None, 7)

    def test_an_older_job_of_the_same_number_does_not_count(self):
        self.starts(0, 0, 0, token="old")
        self.starts(0, token="new")
        self.assertEqual(restarts_without_progress(history(self.folder, "new")), 0)

    def test_a_job_comes_back_so_often(self):
        self.record(2, limit=2).check_requeue_limits(mock.Mock())
        with self.assertRaisesRegex(UserError, "requeued 3 times; submitit.max_requeues"):
            self.record(3, limit=2).check_requeue_limits(mock.Mock())

    def test_what_a_request_to_stop_means(self):
        record, now = self.record(1), datetime.now()
        facts = {"JobState": "RUNNING", "Restarts": "1", "StartTime": (now - timedelta(hours=1)).isoformat()}
        ending = {"JobState": "COMPLETING"}

        def decision(cause: str, **more: str) -> tuple[str, bool]:
            with mock.patch.object(slurm, "show_job", return_value=facts | more):
                made = record.classify_exit(StopRequested(cause, saved_step=7), "ended")
            return made.status, made.requeue

        self.assertEqual(decision("SIGTERM", **ending), ("interrupted", False), "scancel")
        self.assertEqual(decision("SIGTERM"), ("requeued", True), "a signal that is no cancellation")
        self.assertEqual(decision("SIGTERM", PreemptTime=now.isoformat(), **ending), ("requeued", True))
        before = (now - timedelta(hours=2)).isoformat()
        self.assertEqual(decision("SIGTERM", PreemptTime=before, **ending), ("interrupted", False))
        self.assertEqual(decision("SIGTERM", Restarts="2", **ending), ("requeued", False), "SLURM has done it")
        self.assertEqual(decision("SIGTERM", TimeLimit="01:00:00", **ending), ("requeued", True), "its time is over")
        cancelled = {"TimeLimit": "02:00:00", "EndTime": now.isoformat()} | ending
        self.assertEqual(decision("SIGTERM", **cancelled), ("interrupted", False))
        self.assertEqual(decision(TIME_LIMIT, **ending), ("interrupted", False), "cancelled meanwhile")
        self.assertEqual(decision("SIGUSR2"), ("requeued", True))
        self.assertEqual(decision(TIME_LIMIT), ("requeued", True))
        self.rank_end(1, ValueError("its workers were ended first"))
        self.assertEqual(decision("SIGUSR2"), ("requeued", True), "all of the job was asked, whatever fails meanwhile")
        with mock.patch.object(slurm, "show_job", return_value={}):
            silent = record.classify_exit(StopRequested("SIGTERM"), "ended")
        self.assertEqual(silent.status, "failed", "SLURM ends the others when a task has failed")

    def test_which_process_is_gone_or_that_none_is(self):
        for error, saying in (
            (
                PeerLostError("process 3 is gone; last seen in a step, after step 9"),
                "process 3 is gone; .*after step 9 ",
            ),
            (RuntimeError("NCCL error"), "another process is gone without a word, perhaps with its node "),
            (dist.DistNetworkError("port: 28745 EADDRINUSE"), "the port that the processes meet at is taken "),
        ):
            with (
                mock.patch.object(slurm_jobs, "END_FILE_SECONDS", 0),
                mock.patch.object(slurm, "show_job", return_value={}),
            ):
                classify_exit = self.record(1).classify_exit(error, str(error))
            self.assertTrue(classify_exit.requeue)
            self.assertRegex(classify_exit.reason, f"^{saying}")

    def test_a_cancelled_job_is_not_brought_back_because_its_processes_lost_one_another(self):
        gone = RuntimeError("gloo: Connection reset by peer")
        with (
            mock.patch.object(slurm_jobs, "END_FILE_SECONDS", 0),
            mock.patch.object(slurm, "show_job", return_value={"JobState": "COMPLETING"}),
        ):
            self.assertEqual(self.record(0).classify_exit(gone, "gone").status, "interrupted")

    def test_the_others_wait_until_rank_0_has_decided(self):
        record, began = self.record(2), time.monotonic()
        decide = threading.Timer(0.5, lambda: record.note("decided"))
        self.record(1).note("decided")  # of an earlier start
        decide.start()
        record.wait_for_decision(StopRequested("SIGUSR2"))
        self.assertGreaterEqual(time.monotonic() - began, 0.5)
        decide.join()
        with mock.patch.object(slurm_jobs, "DECISION_SECONDS", 0.3):
            self.record(3).wait_for_decision(StopRequested("SIGUSR2"))
        began = time.monotonic()
        self.record(1).wait_for_decision(PeerLostError("rank 0 is silent"))
        self.record(1).wait_for_decision(ValueError("of its own"))
        self.assertLess(time.monotonic() - began, 5)

    def test_the_cause_is_what_another_rank_wrote_down_before_it_left(self):
        gone = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3344")
        record = dataclasses.replace(self.record(1).task, rank=0)
        record = JobLog(record, self.folder, "a", 100, watch_the_clock=False)
        with (
            mock.patch.object(slurm_jobs, "END_FILE_SECONDS", 0),
            mock.patch.object(slurm, "show_job", return_value={}),
        ):
            self.assertTrue(record.classify_exit(gone, "gone").requeue)
            self.assertFalse(JobLog(record.task, self.folder, "a", 1, False).classify_exit(gone, "gone").requeue)
            for restarts, error in ((0, ValueError("of an earlier start")), (1, gone), (1, StopRequested("SIGTERM"))):
                self.rank_end(restarts, error)
                self.assertTrue(record.classify_exit(gone, "gone").requeue, error)
            self.rank_end(1, ValueError("no memory"), job="77")
            self.assertTrue(record.classify_exit(gone, "gone").requeue, "of another job")
            self.rank_end(1, ValueError("no memory"))
            decision = record.classify_exit(gone, "gone")
        self.assertEqual((decision.status, decision.reason), ("failed", "process 3 failed: ValueError: no memory"))
        with mock.patch.object(slurm, "show_job", return_value={"JobState": "RUNNING"}):
            ended = record.classify_exit(StopRequested("SIGTERM"), "ended by SIGTERM")  # by SLURM, because of process 3
        self.assertEqual((ended.status, ended.reason), ("failed", "process 3 failed: ValueError: no memory"))

    def test_which_errors_say_that_another_process_is_gone(self):
        self.assertTrue(is_peer_lost(RuntimeError("NCCL error: remote process exited")))
        self.assertFalse(is_peer_lost(RuntimeError("CUDA out of memory")))
        self.assertFalse(is_peer_lost(ValueError("gloo")))


class Ended(Folder):
    """What the batch script's last line makes of processes that could not say themselves why they ended."""

    def end(self, code: int, started: tuple[int, ...] = (), restarts: int = 0, **facts: str) -> tuple[str, str, bool]:
        for start in started:
            note(self.folder, "start", "a", job="12", restarts=start, nodes="node1")
        note(self.folder, "submitted", "a", job="12", restarts=0)
        now = datetime.now()
        known = {
            "JobState": "RUNNING",
            "Restarts": str(restarts),
            "StartTime": (now - timedelta(minutes=9)).isoformat(),
        }
        with (
            mock.patch.dict(os.environ, {"SLURM_RESTART_COUNT": str(restarts)}),
            mock.patch.object(slurm, "show_job", return_value=known | facts),
            mock.patch.object(slurm, "requeue", return_value=None) as requeue,
            mock.patch.object(slurm_jobs, "finalize_dependents"),
        ):
            slurm_jobs.record_batch_exit(self.folder.path / slurm_jobs.LOGS, "12", code)
        told = self.folder.read_summary()
        (self.folder.path / slurm_jobs.LOGS / "history.jsonl").unlink()
        return told["status"], told["exit_reason"], requeue.called

    def test_told_to_leave_before_they_could_listen(self):
        for state in ("CANCELLED", "COMPLETING"):  # SLURM says the one or the other of a job that scancel ends
            self.assertEqual(
                self.end(143, JobState=state),
                ("interrupted", "job 12 was cancelled before its processes could save anything more", False),
            )
        for code, facts in (
            (143, {"PreemptTime": datetime.now().isoformat(), "JobState": "COMPLETING"}),
            (143, {"TimeLimit": "00:09:00", "JobState": "COMPLETING"}),
            (140, {}),  # SIGUSR2
        ):
            status, reason, requeued = self.end(code, **facts)
            self.assertEqual((status, requeued), ("requeued", True), facts)
            self.assertRegex(reason, "could not be started .*job 12 goes back into the queue")
        self.assertEqual(self.end(143, Restarts="1")[::2], ("requeued", False), "SLURM has done it")

    def test_other_ends(self):
        self.assertRegex(" ".join(map(str, self.end(1))), "failed .*could not be started .exit code 1.; see .* False")
        self.assertRegex(" ".join(map(str, self.end(137, (0,)))), "failed .*SIGKILL.* False")
        self.assertRegex(" ".join(map(str, self.end(135, (0,)))), "failed .*SIGBUS.*npy.* False")
        self.assertEqual(self.end(134, (0,))[::2], ("requeued", True))
        self.assertEqual(self.end(1, (0,), restarts=1)[::2], ("requeued", True), "its node is gone")
        self.assertEqual(self.end(1, (0,), restarts=3)[::2], ("failed", False), "for the third time")
        note(self.folder, "submitted", "a", job="12", restarts=0, max_requeues=0)
        status, reason, requeued = self.end(134, (0,))
        self.assertEqual((status, requeued), ("interrupted", False))
        self.assertRegex(reason, "does not come back: submitit.max_requeues is 0")
        self.rank_end(0, OSError("no such device"), job="12")
        self.assertEqual(self.end(134, (0,)), ("failed", "process 3 failed: OSError: no such device", False))

    def test_when_process_0_was_silent_the_job_comes_back(self):
        for restarts, expected in ((1, "requeued"), (0, "failed")):  # of an earlier start it says nothing
            self.rank_end(1, PeerLostError("process 0 is silent"), rank=5, job="12")
            status, reason, requeued = self.end(137, started=(0, 1), restarts=restarts)
            self.assertEqual((status, requeued), (expected, expected == "requeued"), reason)
        self.assertIn("SIGKILL", reason)

    def test_after_all_is_done(self):
        for mode, told, job, status in (
            ("train", "finished", "12", "finished"),
            ("val", "finished", "12", "failed"),
            ("train", "running", "12", "failed"),
            ("train", "finished", "11", "failed"),
        ):
            self.folder.write_summary(status=told, exit_reason="all epochs done", job={"job_id": job})
            note(self.folder, "submitted", "a", job="12", restarts=0, mode=mode)
            self.assertEqual(self.end(137, (0,))[0], status, (mode, told, job))


class NotSubmitted(Folder):
    def test_what_a_run_said_itself_is_kept(self):
        said = {"failed", "interrupted", "finished", "running"}
        for how, kept in (("unsubmitted", said), ("cancelled", {"finished", "running"})):
            for status in (*said, "cancelled"):
                self.folder.write_summary(status=status, exit_reason="no memory")
                with contextlib.redirect_stdout(io.StringIO()):
                    slurm_jobs.main([how, str(self.folder.path), "b"])
                found = self.folder.read_summary()
                wanted = (status, "no memory") if status in kept else ("cancelled", "b")
                self.assertEqual((found["status"], found["exit_reason"]), wanted, (how, status))


class BatchScript(Folder):
    """What its shell does around the tasks, which a command stands for here. (tests/slurm has the whole script, and SLURM.)"""

    def leave(self, tasks: str, *setup: str) -> tuple[int, str]:
        """The exit code, and what the summary says."""
        note(self.folder, "submitted", "a", job="12", restarts=0)
        script = "\n".join(["#!/bin/bash", *batch_script_prologue(self.folder.path / slurm_jobs.LOGS, setup), tasks])
        (self.folder.path / "slurm_script").write_text(script)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        made = subprocess.run(
            ["bash", self.folder.path / "slurm_script"], env=environment | {"SLURM_JOB_ID": "12"}, timeout=60
        )
        told = self.folder.read_summary()
        (self.folder.path / slurm_jobs.LOGS / "history.jsonl").unlink()
        self.folder.replace_summary({})
        return made.returncode, f"{told.get('status')}: {told.get('exit_reason')}"

    def test_tasks_that_never_began(self):
        told = self.leave("no_such_command 2>/dev/null")
        self.assertRegex(told[1], "^failed: job 12: its processes could not be started .exit code 127")

    def test_nothing_is_told_of_a_good_end(self):
        self.assertEqual(self.leave("true", "export A=1", "set -e"), (0, "None: None"))

    def test_what_the_users_lines_can_do(self):
        for *setup, code in (
            ("false", 1), ("exit 0", 1), ("true", "exit 3", 3), ("module load cuda", 127), ("cd / && exec /bin/true", 1),
            ("trap 'exit 0' EXIT", "false", 1), ("kill -9 $$", 137), ("export PYTHONHOME=/opt/python", "false", 1),
        ):  # fmt: skip
            left, told = self.leave("true", *setup)
            self.assertEqual(left, code, setup)
            self.assertIn(
                f"failed: job 12: submitit.setup ended the job, and nothing was trained: {setup[-1]} (exit code {code}",
                told,
            )
        self.assertEqual(self.leave("true", "# a comment", "", "PATH=/nowhere"), (0, "None: None"))

    def test_the_tasks_start_where_the_job_was_submitted(self):
        self.assertEqual(self.leave(f"[ $PWD = {os.getcwd()} ]", "cd /"), (0, "None: None"))

    def test_a_trap_of_the_users_is_kept(self):
        left, told = self.leave("(exit 7)", f"trap 'touch {self.folder.path}/cleaned' EXIT")
        self.assertEqual((left, (self.folder.path / "cleaned").exists()), (7, True))
        self.assertRegex(told, "^failed: job 12: .*exit code 7")

    def test_a_finished_run_whose_processes_fail_while_they_leave_has_ended_well(self):
        end = json.dumps({"event": "end", "status": "finished", "restarts": 0, "job": "12", "token": "a"})
        history = self.folder.path / slurm_jobs.LOGS / "history.jsonl"
        self.assertEqual(self.leave(f"echo '{end}' >>{history}; (exit 134)"), (0, "None: None"))
        failed = end.replace("finished", "failed")
        self.assertEqual(self.leave(f"echo '{failed}' >>{history}; (exit 1)"), (1, "None: None"), "it told so itself")

    def test_a_signal_to_the_whole_job_does_not_end_the_script_before_its_last_lines(self):
        for name in ("USR2", "TERM"):
            self.assertEqual(self.leave(f"kill -{name} $$; true"), (0, "None: None"))
            left, told = self.leave(f"kill -{name} $$; (exit 7)")
            self.assertEqual(left, 7, name)
            self.assertRegex(told, "^failed: job 12: .*exit code 7")

    def test_what_writes_the_end_down_is_not_ended_by_a_signal_to_the_whole_job(self):
        python = self.folder.path / "python"
        python.write_text(f'#!/bin/sh\nkill -TERM $$\nkill -USR2 $$\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        with mock.patch.object(sys, "executable", str(python)):
            left, told = self.leave("(exit 7)")
        self.assertEqual(left, 7)
        self.assertRegex(told, "^failed: job 12: .*exit code 7")

    def test_a_job_that_is_submitted_by_a_job_has_both_shells(self):
        self.assertEqual(self.leave('[ -z "$omnivision_within" ]'), (0, "None: None"))

    def test_the_end_of_the_tasks_is_told_whatever_the_users_lines_have_set(self):
        for setup in ([], ["set -e"], ["set -u"], ["job=x", "logs=/nowhere", "code=0"], ["cd /"]):
            left, told = self.leave("(exit 137)", *setup)
            self.assertEqual(left, 137, setup)
            self.assertRegex(told, "^failed: job 12: .*SIGKILL")


def settings_of(*overrides: str) -> Settings:
    return validate_config(stage_runs.composed(*runs.STAGE_1[2:], "launcher.experiment_log_dir=/runs/mae", *overrides))


class WhatSlurmWouldNotTake(unittest.TestCase):
    def problems(self, *overrides: str) -> str:
        with self.assertRaises(UserError) as refused:
            settings_of(*overrides)
        return str(refused.exception)

    def test_what_slurm_would_misunderstand(self):
        for override, saying in (
            ('submitit.name="a\nb"', r"submitit.name .*'a\\nb'"),
            (
                "++submitit.additional_parameters.time=1",
                "additional_parameters.time .*submitit.timeout_hour",
            ),
            ("++submitit.additional_parameters.test_only=true", "additional_parameters.test_only "),
            ("++submitit.additional_parameters.test_onl=true", "additional_parameters.test_onl "),
            (
                f"launcher.experiment_log_dir=/runs/{'x' * 300}",
                "launcher.experiment_log_dir .*306",
            ),
            (
                f"launcher.experiment_log_dir=/runs{'/xxx' * 800}",
                "launcher.experiment_log_dir .*3205",
            ),
            ("submitit.timeout_hour=1e9", "submitit.timeout_hour .*<= 100000"),
            ("submitit.dependency='afterok:1,afterok:2?singleton'", "submitit.dependency "),
        ):
            self.assertRegex(self.problems(override), saying)
        early = self.problems("submitit.signal_delay_s=3600", "submitit.timeout_hour=1")
        self.assertRegex(early, "submitit.signal_delay_s .*submitit.timeout_hour 1")

    def test_memory(self):
        given = {"4G": 4, "2048": 2, "1T": 1024, "524288K": 0.5, "64GB": 64, "0": None, "4g": 4}
        for text, gigabytes in given.items():
            self.assertEqual(settings_of(f"submitit.mem='{text}'").submitit.memory_gb, gigabytes, text)
        self.assertEqual(settings_of("submitit.mem_gb=1.5").submitit.memory_gb, 1.5)
        for text in ("much", "1.5G", "-4G", ""):
            self.assertRegex(self.problems(f"submitit.mem='{text}'"), "submitit.mem must")

    def test_a_shell_command_that_bash_cannot_read(self):
        check_setup(["module load cuda", "if true; then\n  echo yes\nfi", "cat <<E\nx\nE", "exec 2>log"])
        unreadable = "bash"
        for line, saying in (
            ("}", unreadable), ("echo 'open", unreadable), ("true\n} && {", unreadable),
            ("if true; then", "bash"),
            ("exec srun python", "exec"), (" exec /bin/true", "exec"),
        ):  # fmt: skip
            with self.assertRaisesRegex(UserError, rf"submitit.setup\[1\] is .*{saying}", msg=line):
                check_setup(["true", line])

    def test_a_login_node_without_bash_cannot_tell(self):
        with mock.patch.object(submit.shutil, "which", return_value=None):
            check_setup(["}"])

    def test_limits_of_a_partition(self):
        answer = (
            "PartitionName=gpu Default=YES MaxNodes=2 MaxTime=2-00:00:00 TotalCPUs=9 TotalNodes=4\n"
            "PartitionName=cpu Default=NO MaxTime=UNLIMITED TotalNodes=9\n"
        )
        with mock.patch.object(slurm, "run", return_value=mock.Mock(stdout=answer)), mock.patch.dict(os.environ):
            os.environ.pop("SBATCH_PARTITION", None)
            self.assertEqual(slurm.partition_limits(None), (4, 2880))
            self.assertEqual(slurm.partition_limits("gpu,cpu"), (9, None))
            self.assertEqual(slurm.partition_limits("unknown"), (None, None))
            os.environ["SBATCH_PARTITION"] = "cpu"
            self.assertEqual(slurm.partition_limits(None), (9, None))
            os.environ.pop("SBATCH_PARTITION")
            for setting, nodes, hours in (("launcher.num_nodes", 5, 1), ("submitit.timeout_hour", 4, 49)):
                with self.assertRaisesRegex(UserError, setting):
                    submit.check_partition(settings_of(f"launcher.num_nodes={nodes}", f"submitit.timeout_hour={hours}"))

    def test_jobs_of_other_kinds_in_the_queue(self):
        mine = ["12", "RUNNING", "None", "two\nlines \ufffd", "/x/submitit_logs/y.sh", "(null)"]
        answer = "".join(f"{slurm.SEPARATOR.join(fields)}{slurm.END}\n" for fields in (mine, ["13", "odd"]))
        with mock.patch.object(slurm, "run", return_value=mock.Mock(stdout=answer)):
            self.assertEqual(
                slurm.squeue(), {"12": JobState("RUNNING", "", "two\nlines \ufffd", "/x/submitit_logs/y.sh")}
            )


class Environment(unittest.TestCase):
    def test_of_secrets_the_name_alone(self):
        given = {
            "WANDB_API_KEY": "x", "GITHUB_TOKEN": "x", "MY_PASSWORD": "x", "DB_PASSWD": "x", "AWS_SECRET": "x",
            "SSH_AUTH_SOCK": "x",
            "SLURM_JOB_ID": "12", "URL": "https://me:word@host/path", "PATH": "/bin",
        }  # fmt: skip
        with mock.patch.dict(os.environ, given, clear=True):
            told = public_environment()
        secret = ["AWS_SECRET", "DB_PASSWD", "GITHUB_TOKEN", "MY_PASSWORD", "SSH_AUTH_SOCK", "WANDB_API_KEY"]
        self.assertEqual([name for name in told if told[name] is None], secret)
        self.assertEqual((told["SLURM_JOB_ID"], told["URL"], told["PATH"]), ("12", "https://...@host/path", "/bin"))


class Answers(unittest.TestCase):
    def test_time_limits(self):
        given = {"30": 30, "1:30": 1.5, "2:00:00": 120, "3-12:00:00": 5040, "3-12": 5040, "infinite": None, "n/a": None}
        self.assertEqual({text: parse_limit(text) for text in given}, given)

    def test_moments(self):
        self.assertEqual([parse_time(text) for text in ("Unknown", "None", "N/A", "", None)], [None] * 5)
        self.assertEqual(parse_time("2026-11-24T16:39:49") - parse_time("2026-11-24T16:38:49"), 60)

    def test_refusals_are_slurms_words(self):
        message = "Invalid account or account/partition combination specified"
        self.assertIn(message, explain_error(f"sbatch: error: Batch job submission failed: {message}\n"))

    def test_what_became_of_a_job(self):
        def told(status: str, *state: str) -> tuple[str, str]:
            summary = {"status": status, "exit_reason": None, "job": {"job_id": "12"}}
            return resolve_status(summary, {"12": JobState(*state)} if state else {})

        self.assertEqual(told("queued", "PENDING", "Resources"), ("queued", "job 12 waits (Resources)"))
        self.assertEqual(told("running", "RUNNING"), ("running", "job 12 is RUNNING"))
        self.assertEqual(told("queued", "RUNNING"), ("queued", "job 12 is starting"))
        self.assertEqual(told("running", "NODE_FAIL", "NodeDown"), ("failed", "job 12 is NODE_FAIL (NodeDown)"))
        self.assertEqual(told("queued", "CANCELLED", "")[0], "cancelled")
        never = JobState("PENDING", "DependencyNeverSatisfied", dependency="afterok:9(failed),afterok:8(unfulfilled)")
        align = JobState("FAILED", command="/runs/align/submitit_logs/x.sh")
        waiting = {"status": "queued", "job": {"job_id": "12"}}
        self.assertEqual(
            resolve_status(
                waiting, {"12": never, "9": align, "8": JobState("RUNNING", command="/runs/mae/submitit_logs/x.sh")}
            ),
            ("cancelled", "it waited for what did not end well: job 9 of /runs/align"),
        )
        self.assertRegex(resolve_status(waiting, {"12": never})[1], "afterok:9.failed.,afterok:8")
        after_waiting = told("queued", "CANCELLED", "BeginTime")
        self.assertEqual(after_waiting, ("cancelled", "job 12 is CANCELLED (ended from outside)"))
        ours = {"status": "running", "job": {"job_id": "12", "logs": "/runs/a/submitit_logs"}}
        for command, status in (("/runs/a/submitit_logs/x.sh", "running"), ("", "lost"), ("/runs/b/x.sh", "lost")):
            self.assertEqual(resolve_status(ours, {"12": JobState("RUNNING", command=command)})[0], status)
        self.assertEqual(told("running"), ("lost", "SLURM does not know job 12 any more; it was running"))
        self.assertEqual(told("finished", "RUNNING"), ("finished", ""))
        self.assertEqual(resolve_status({"status": "running"}, {}), ("running", ""), "not on a cluster")
        self.assertEqual(resolve_status({}, None), ("not begun", ""))


class SilentEnds(Folder):
    def test_the_summary_of_a_local_run_names_the_cause(self):
        gone = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3344")
        self.folder.create()
        self.rank_end(0, ValueError("no such label"), rank=1, job=None)
        with contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(ending.report_exit(gone, self.folder, tells=True, rank=0), 70)
        told = self.folder.read_summary()
        self.assertEqual(
            (told["status"], told["exit_reason"]), ("failed", "process 1 failed: ValueError: no such label")
        )
        kinds = {end["rank"]: end["kind"] for end in ending.read_end_files(self.folder)}
        self.assertEqual(kinds, {0: "disconnected", 1: "failed"})
        ending.remove_end_files(self.folder)
        self.assertEqual(list(ending.read_end_files(self.folder)), [])

    def test_a_killed_local_run_is_told_by_its_lock(self):
        self.folder.write_summary(status="running", job=None)
        self.folder.lock()
        self.assertEqual(slurm_jobs.settle_status(self.folder, None)[0], "running")
        self.folder.unlock()
        self.assertEqual(slurm_jobs.settle_status(self.folder, None)[0], "failed")
        self.assertEqual(self.folder.read_summary()["status"], "failed")

    def test_a_job_cancelled_while_it_waited_is_written_down(self):
        self.folder.write_summary(status="queued", job={"job_id": "12"})
        slurm_jobs.settle_status(self.folder, {"12": JobState("CANCELLED")})
        self.assertEqual(self.folder.read_summary()["status"], "cancelled")


class Submission(Folder):
    def job(self, *overrides: str) -> Job:
        where = f"launcher.experiment_log_dir={self.folder.path}"
        config = stage_runs.composed(*runs.STAGE_1[2:], where, *overrides)
        return Job(validate_config(config), "epochs: 1\n")

    def test_finished_is_as_many_epochs_as_are_asked_for(self):
        self.folder.write_summary(status="finished", epochs=3)
        for overrides, finished in (
            (["epochs=3"], True),
            (["epochs=4"], False),
            (["epochs=3", "trainer.mode=val"], False),
        ):
            self.assertEqual(is_finished(self.job(*overrides).settings, self.folder), finished, overrides)
        self.folder.write_summary(status="interrupted", epochs=3)
        self.assertFalse(is_finished(self.job("epochs=3").settings, self.folder))

    def test_a_finished_run_of_other_settings_is_told(self):
        config = self.folder.path / "config.yaml"
        for before, told in (
            ("epochs: 1\nlauncher: {num_nodes: 8}\nsubmitit: {mem_gb: 9}\n", None),
            ("epochs: 2\n", "had other settings: epochs: 2 -> 1"),
        ):
            config.write_text(before)
            with contextlib.redirect_stderr(io.StringIO()) as said:
                warn_of_other_settings(self.job())
            if told is None:
                self.assertEqual(said.getvalue(), "")
            else:
                self.assertRegex(said.getvalue(), f"^warning: .*{told}")

    def test_a_run_that_would_go_on_as_another_experiment_is_not_submitted(self):
        (self.folder.path / "config.yaml").write_text("epochs: 2\n")
        submit.require_same_experiment(self.job())  # it has no checkpoint to go on from
        (self.folder.path / "checkpoints").mkdir()
        (self.folder.path / "checkpoints/checkpoint.pt").touch()
        with self.assertRaisesRegex(UserError, "epochs: 2 -> 1.*allow_changes=true"):
            submit.require_same_experiment(self.job())
        for override in ("trainer.mode=val", "trainer.checkpoint.allow_changes=true"):
            submit.require_same_experiment(self.job(override))
        (self.folder.path / "config.yaml").write_text("epochs: 1\nnum_workers: 9\n")
        submit.require_same_experiment(self.job())

    def test_what_cannot_be_submitted_leaves_everything_as_it_was(self):
        logs = self.folder.path / slurm_jobs.LOGS
        self.folder.write_summary(status="interrupted", exit_reason="before", job={"job_id": "3"})
        before = self.folder.read_summary()

        def refused(*_: str) -> None:
            (logs / "new_submitted.pkl").touch()
            (logs / "new_submitted.pkl.save_tmp").touch()
            (logs / "70_1_0_log.out").touch()  # of a job that began meanwhile
            raise errors.pop()

        taken = "[Jj]ob 71.* was cancelled"
        queue = {
            "71": JobState("PENDING", command=str(logs / "new_submitted.pkl")),
            "72": JobState("PENDING", command=str(logs / "old.sh")),
            "73": JobState("RUNNING", command="/elsewhere/new_submitted.pkl"),
        }
        for error, kind, saying in (
            (
                FailedJobError("sbatch: error: Invalid qos specification\n"),
                UserError,
                "Invalid qos",
            ),
            (FailedJobError("sbatch: error: Socket timed out\n"), UserError, f"timed out.*{taken}"),
            (FailedSubmissionError("Could not make sense of sbatch output"), UserError, taken),
            (
                OSError(28, "No space left on device"),
                UserError,
                f"No space left .*launcher.experiment_log_dir.*{taken}",
            ),
            (KeyboardInterrupt(), KeyboardInterrupt, ""),
        ):
            errors = [error]
            executor = mock.Mock(submit=mock.Mock(side_effect=refused))
            with (
                mock.patch.object(submit, "slurm_executor", return_value=executor),
                mock.patch.object(slurm, "squeue", return_value=queue),
                mock.patch.object(slurm, "run") as asked,
            ):
                with self.assertRaisesRegex(kind, saying):
                    submit.sbatch([self.job()], logs)
            asked.assert_called_once_with("scancel", "71")
            self.assertEqual([file.name for file in logs.iterdir()], ["70_1_0_log.out"])
            (logs / "70_1_0_log.out").unlink()
            self.assertEqual(self.folder.read_summary(), before)
        silent = mock.patch.object(slurm, "squeue", side_effect=slurm.SlurmError("no answer"))
        with mock.patch.object(submit, "slurm_executor", return_value=executor), silent:
            errors = [OSError(28, "No space left on device")]
            with self.assertRaisesRegex(UserError, "look with squeue"):
                submit.sbatch([self.job()], logs)

    def test_ctrl_c_after_slurm_has_the_job_does_not_hide_it(self):
        def disturbed(*given: object) -> None:
            signal.raise_signal(signal.SIGINT)
            launch_note(*given)

        launch_note = submit.note_submission
        executor = mock.Mock(submit=mock.Mock(return_value=mock.Mock(job_id="71")))
        with (
            mock.patch.object(submit, "slurm_executor", return_value=executor),
            mock.patch.object(submit, "note_submission", disturbed),
            mock.patch("builtins.print"),
        ):
            submit.sbatch([self.job()], self.folder.path / slurm_jobs.LOGS)
        self.assertEqual(self.folder.read_summary()["job"]["job_id"], "71")

    def test_a_signal_while_a_run_is_built_ends_it_there(self):
        def asked(*_: object) -> None:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("went on")

        with mock.patch("omnivision.training.build.process_group", asked):
            code = run_rank(self.job(), RankInfo(0, 1, 0, 1, None))
        self.assertEqual(code, 128 + signal.SIGTERM)

    def test_a_signal_to_a_submission_rolls_it_back(self):
        def asked(*_: str) -> None:
            (self.folder.path / slurm_jobs.LOGS / "new_submitted.pkl").touch()
            signal.raise_signal(signal.SIGTERM)

        with (
            mock.patch.object(submit, "slurm_executor", return_value=mock.Mock(submit=asked)),
            mock.patch.object(submit, "check_submission"),
            mock.patch.object(slurm, "squeue", return_value={}),
            self.assertRaises(StopRequested) as stopped,
        ):
            submit.submit([self.job()])
        self.assertEqual(stopped.exception.exit_code, 143)
        self.assertEqual(self.folder.read_summary(), {})
        self.assertEqual(list((self.folder.path / slurm_jobs.LOGS).glob("*.pkl")), [])

    def test_only_the_settings_and_the_sites_defaults_count(self):
        leftovers = {
            "SLURM_JOB_ID": "9", "SLURM_MEM_PER_NODE": "1", "SLURM_GPUS": "8", "SLURM_GPUS_PER_NODE": "8",
            "SLURM_EXCLUSIVE": "user", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": "3",
            "SRUN_DEBUG": "1", "SBATCH_MEM": "1", "SALLOC_QOS": "a", "SQUEUE_STATES": "F",
            "SUBMITIT_PREEMPT_SIGNAL": "USR1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
            "MASTER_ADDR": "x", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "1", "SBATCH_PARTITION": "b",
            "PMI_RANK": "0",
        }  # fmt: skip
        site = {"SBATCH_ACCOUNT": "a", "SLURM_CONF": "/etc/slurm.conf"}
        settings = self.job("submitit.partition=gpu").settings.submitit
        with mock.patch.dict(os.environ, leftovers | site), contextlib.redirect_stderr(io.StringIO()) as said:
            with slurm.scrubbed_sbatch_env(settings):
                self.assertEqual({*leftovers, *site} & set(os.environ), set(site))
                self.assertIn("SBATCH_ACCOUNT", explain_error("Invalid account", settings))
            self.assertLessEqual((leftovers | site).items(), os.environ.items())
            environment = json.loads(
                slurm.run(sys.executable, "-c", "import json, os; print(json.dumps({**os.environ}))").stdout
            )
            self.assertEqual(environment.keys() & leftovers.keys(), set())
        self.assertRegex(said.getvalue(), "^warning: .*SBATCH_MEM, SBATCH_PARTITION")
        with self.assertRaisesRegex(slurm.SlurmError, "submitit.use_cluster=false"):
            slurm.run("false")

    def test_a_job_whose_submission_was_killed_is_cancelled(self):
        logs = self.folder.path.absolute() / slurm_jobs.LOGS
        queue = {"12": JobState("PENDING", command=f"{logs}/a.sh")}
        with mock.patch.object(slurm, "run") as called, contextlib.redirect_stderr(io.StringIO()):
            self.assertFalse(is_queued(self.job(), queue), "it may be under way")
            called.assert_not_called()
            self.assertFalse(is_queued(self.job(), queue, locked=True))
            called.assert_called_once_with("scancel", "12")

    def test_summaries_that_somebody_else_wrote(self):
        file, job = self.folder.path / "summary.json", self.job("epochs=3")
        for text in (
            "", "[", "[1]", "7", '{"job": [1]}', '{"job": "x", "status": "queued"}', '{"status": "finished", "epochs": "9"}',
            '{"status": ["queued"]}', '{"step_seconds": "a"}', '{"job": {"job_id": [1]}, "status": "running"}', '{"last": 3}',
            '{"step_seconds": 1e999}',
        ):  # fmt: skip
            file.write_text(text)
            with self.subTest(text):
                self.assertFalse(is_finished(job.settings, self.folder))
                self.assertFalse(is_queued(job, {"12": JobState("PENDING")}))
                self.assertEqual(signal_delay(job.settings, self.folder), 120)
                resolve_status(self.folder.read_summary(), {"12": JobState("PENDING")})
        file.unlink()
        file.mkdir()
        self.assertEqual(self.folder.read_summary(), {})

    def test_a_job_in_the_queue_is_not_submitted_again_unless_it_is_another_ones(self):
        self.folder.write_summary(status="queued", job={"job_id": "12"})
        logs = self.folder.path.absolute() / slurm_jobs.LOGS
        (logs / "12_config.yaml").write_text("epochs: 1\nsubmitit: {dependency: 'afterok:3'}\n")
        ours, theirs = f"{logs}/a.sh", "/home/other/run/submitit_logs/a.sh"
        with mock.patch("builtins.print"):
            self.assertTrue(is_queued(self.job(), {"12": JobState("PENDING", command=ours)}))
            self.assertFalse(is_queued(self.job(), {"12": JobState("PENDING", command=theirs)}))
            self.assertFalse(is_queued(self.job(), {"12": JobState("FAILED", command=ours)}))
            self.assertFalse(is_queued(self.job(), {}))
            (logs / "13_config.yaml").write_text("epochs: 1\n")
            both = {"12": JobState("COMPLETING", command=ours), "13": JobState("PENDING", command=ours)}
            for queue in (both, dict(reversed(both.items()))):
                with mock.patch("builtins.print") as said:
                    self.assertTrue(is_queued(self.job(), queue))
                self.assertIn("job_id=13", said.call_args[0][0])
            for status, queued in (("interrupted", False), ("requeued", True)):  # what it comes back as
                self.folder.write_summary(status=status)
                self.assertEqual(is_queued(self.job(), {"12": JobState("COMPLETING", command=ours)}), queued, status)
            self.folder.write_summary(status="failed")
            self.assertTrue(is_queued(self.job(), {"12": JobState("RUNNING", command=ours)}), "of an earlier job")
            (logs / "12_config.yaml").write_text("epochs: 7\n")
            with self.assertRaisesRegex(UserError, "Job 12 is in the queue .* epochs: 7 -> 1.*scancel 12"):
                is_queued(self.job(), {"12": JobState("RUNNING", command=ours)})

    def test_the_signal_comes_as_early_as_the_run_needs(self):
        def delay(*overrides: str) -> int:
            return signal_delay(self.job(*overrides).settings, self.folder)

        self.assertEqual(delay(), 120, "nothing is known yet")
        self.assertEqual(delay("submitit.timeout_hour=0.05"), 90, "half of it")
        self.folder.write_summary(step_seconds=3.5, save_seconds=40.0)
        self.assertEqual(delay(), 2 * (3.5 + 40) + 10)
        self.assertEqual(delay("submitit.signal_delay_s=600"), 600)

    def test_no_less_time_than_is_asked_for(self):
        for hours, minutes_asked in (("20", 1200), ("0.1", 6), ("0.02", 2), ("1e-9", 1)):
            script = submit.batch_script(self.job(f"submitit.timeout_hour={hours}").settings, self.folder)
            self.assertIn(f"#SBATCH --time={minutes_asked}\n", script, hours)

    def test_the_script_is_shown_where_slurm_is_not_installed(self):
        """It is the one that submitit would submit, for a single job and with every kind of setting."""
        with tempfile.TemporaryDirectory() as programs, mock.patch.dict(os.environ, PATH=programs):
            shown = [
                (settings, submit.batch_script(settings, self.folder))
                for settings in (
                    self.job().settings,
                    self.job("trainer.accelerator=cpu", "launcher.gpus_per_node=2", "submitit.mem_gb=1.5").settings,
                    self.job("submitit.setup=[module load cuda]", "submitit.partition=gpu").settings,
                    self.job(
                        "submitit.dependency=afterok:7", "++submitit.additional_parameters.reservation=x"
                    ).settings,
                )
            ]
            with self.assertRaisesRegex(UserError, "submitit.use_cluster"):
                launcher.validate_launch_mode(shown[0][0])
            srun = Path(programs, "srun")
            srun.touch(0o755)  # submitit looks for it, and does not call it
            for settings, script in shown:
                executor = submit.slurm_executor(settings, self.folder, self.folder.path.absolute() / slurm_jobs.LOGS)
                wanted = executor._make_submission_file_text(executor._submitit_command_str, "NUMBER")
                self.assertEqual(script, wanted)

    def test_a_folder_in_memory_is_refused_before_it_is_made(self):
        if not Path("/dev/shm").is_dir():
            self.skipTest("this machine has no /dev/shm")
        with self.assertRaisesRegex(UserError, "launcher.experiment_log_dir"):
            check_folders([Path("/dev/shm/omnivision/run")])

    def test_dependencies(self):
        for text in (
            "afterok:12",
            "afterok:12:13",
            "afterok:12_3",
            "afterany:1,afterok:2",
            "after:5+10",
            "singleton",
            "afterok:1?afterok:2",
        ):
            self.assertEqual(self.job(f"submitit.dependency='{text}'").settings.submitit.dependency, text)
        for text in ("afterok", "12", "afterok:x", "afterok:1;afterok:2", "later:3", "afterok:12; rm -r x"):
            with self.assertRaisesRegex(UserError, "submitit.dependency must", msg=text):
                self.job(f"submitit.dependency='{text}'")

    def test_jobs_to_wait_for_must_be_known_and_able_to_end_well(self):
        queue = {
            "11": JobState("COMPLETED"),
            "12": JobState("RUNNING"),
            "13": JobState("FAILED"),
            "14_0": JobState("COMPLETED"),
            "14_1": JobState("FAILED"),
        }
        with mock.patch.object(slurm, "show_job", return_value={}):
            for fine in (
                None,
                "afterok:12",
                "afterok:11",
                "afternotok:13",
                "afterany:13",
                "afterany:13,afterok:12",
                "afterok:13?afterok:12",
                "after:12+10",
            ):
                check_dependency(fine, queue)
            check_dependency("afterok:14_0", queue)
            for refused, saying in (
                ("afterok:13", "job 13 is FAILED"), ("afterok:12:13", "job 13 is FAILED"), ("afterok:14", "job 14 is FAILED"),
                ("afterok:14_1", "job 14_1 is FAILED"), ("aftercorr:13", "job 13 is FAILED"),
                ("afternotok:11", "job 11 is COMPLETED"), ("afterany:99", "does not know job 99"),
            ):  # fmt: skip
                with self.assertRaisesRegex(UserError, saying, msg=refused):
                    check_dependency(refused, queue)
            self.folder.write_summary(status="finished", job={"job_id": "20"})  # by a later job
            note(self.folder, "submitted", "a", job="13", restarts=0)
            queue["13"] = JobState("FAILED", command=f"{self.folder.path.absolute()}/{slurm_jobs.LOGS}/x.sh")
            with self.assertRaisesRegex(UserError, "13 is FAILED .*submitit.dependency=null"):
                check_dependency("afterok:13", queue)

    def test_what_it_waits_for_fails_while_it_is_submitted(self):
        before = RunDir(self.folder.path.parent / "align")
        before.create(slurm_jobs.LOGS)
        command = f"{before.path.absolute()}/{slurm_jobs.LOGS}/a.sh"

        def lost(state: str, status: str, job: str = "12", dependency: str = "afterok:12") -> str | None:
            before.write_summary(status=status, exit_reason="no memory", job={"job_id": job})
            with mock.patch.object(slurm, "squeue_or_none", return_value={"12": JobState(state, command=command)}):
                return dependency_failed(dependency)

        self.assertIsNone(lost("RUNNING", "running"))
        self.assertIsNone(lost("COMPLETED", "finished"))
        self.assertIsNone(lost("RUNNING", "requeued"))
        self.assertIsNone(lost("RUNNING", "failed", job="3"), "of an earlier job")
        self.assertIsNone(lost("FAILED", "failed", dependency="afterany:12"))
        for state, status in (("RUNNING", "failed"), ("COMPLETING", "interrupted"), ("FAILED", "running")):
            self.assertRegex(lost(state, status), "^it waited for job 12 .*align.* did not end well: no memory", state)

    def test_what_a_job_waits_for_as_slurm_tells_it(self):
        told = "afterok:12(unfulfilled),afterany:3(failed),afterok:14_*(unfulfilled)"
        self.assertEqual(list(parse_dependencies(told)), [("afterok", "12"), ("afterany", "3"), ("afterok", "14_*")])
        self.assertEqual(list(parse_dependencies("")), [])
        self.assertEqual(list(parse_dependencies("singleton")), [])

    def test_the_lock_of_a_job_that_is_over_holds_nobody_up(self):
        self.folder.create()
        with mock.patch.dict(os.environ, SLURM_JOB_ID="77"):
            self.folder.lock()
        self.addCleanup(self.folder.unlock)
        require_free(self.folder, {"77": JobState("FAILED")})
        require_free(self.folder, {})
        with self.assertRaisesRegex(UserError, "is in use by process"):
            require_free(self.folder, {"77": JobState("RUNNING")})

    def test_the_lock_of_an_element_of_an_array(self):
        self.folder.create()
        element = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "1"}
        with mock.patch.dict(os.environ, element, SLURM_JOB_ID="78"):
            self.folder.lock()
        self.addCleanup(self.folder.unlock)
        with mock.patch.dict(os.environ, element, SLURM_JOB_ID="78", SLURM_RESTART_COUNT="1"):
            self.folder.require_free()
        require_free(self.folder, {"77_1": JobState("FAILED"), "78": JobState("RUNNING")})
        with self.assertRaisesRegex(UserError, "is in use by process"):
            require_free(self.folder, {"77_1": JobState("RUNNING")})

    def test_a_job_waits_for_a_lock_that_may_be_a_dead_ones(self):
        self.folder.create()
        self.folder.lock()
        release = threading.Timer(0.4, self.folder.unlock)
        release.start()
        again = RunDir(self.folder.path)
        with mock.patch("builtins.print"):
            again.lock(patience=20)
        again.unlock()
        release.join()

    def test_the_lock_of_an_earlier_start_of_the_same_job_counts_for_nothing(self):
        self.folder.create()
        with mock.patch.dict(os.environ, SLURM_JOB_ID="77"):
            self.folder.lock()
        for job, restarts, free in (("77", "1", True), ("77", "0", False), ("78", "1", False)):
            with mock.patch.dict(os.environ, SLURM_JOB_ID=job, SLURM_RESTART_COUNT=restarts):
                if free:
                    self.folder.require_free()
                else:
                    self.assertRaises(UserError, self.folder.require_free)
        self.folder.unlock()

    def test_a_run_that_was_killed_before_it_had_a_folder_leaves_none(self):
        RunDir(self.folder.path / "never").note_silent_end("killed", interrupted=True)
        self.assertFalse((self.folder.path / "never").exists())


class Notes(Folder):
    def test_a_line_that_a_crash_cut_is_left_out(self):
        note(self.folder, "start", "a", job="1")
        with open(self.folder.path / slurm_jobs.LOGS / "history.jsonl", "a") as file:
            file.write('{"event": "en')
        self.assertEqual([line["event"] for line in history(self.folder)], ["start"])


if __name__ == "__main__":
    unittest.main()
