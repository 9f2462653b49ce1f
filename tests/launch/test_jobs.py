"""What a run directory knows of its jobs, and what SLURM's answers mean; the cluster itself is in tests/slurm."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import unittest
from datetime import datetime, timedelta
from pathlib import Path
from unittest import mock

import omnivision.launch
from omnivision.config.schema import Settings
from omnivision.config.validate import validate_config
from omnivision.distributed.process_group import RankInfo
from omnivision.launch import batch_script, launcher, slurm, slurm_jobs, slurm_task, submit
from omnivision.launch import exit as ending
from omnivision.launch.batch_script import signal_delay
from omnivision.launch.job import Job
from omnivision.launch.run import run_rank
from omnivision.launch.slurm import QueueEntry, parse_limit, parse_time
from omnivision.launch.slurm_jobs import SUBMISSION_FOLDER, JobLog, history, parse_dependencies, run_status
from omnivision.launch.submit import check_submission, dependency_problem, is_queued
from omnivision.reporting.run_directory import RunDir
from omnivision.utils.errors import PeerLostError, StopRequested, UserError
from omnivision.utils.signals import TIME_LIMIT
from tests import runs, stage_runs

SLURM = {
    "SLURM_JOB_ID": "123456", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
}  # fmt: skip
NOW = datetime.now()
ENDING = {"JobState": "COMPLETING"}  # a job that scancel ends
PREEMPTED = ENDING | {"PreemptTime": NOW.isoformat()}
DISCONNECTED = PeerLostError("connection closed", gone=True)


def answer(**fields: str) -> contextlib.AbstractContextManager:
    """What `scontrol show job` says."""
    return mock.patch.object(slurm, "show_job", return_value=fields)


def settings_of(*overrides: str) -> Settings:
    return validate_config(
        stage_runs.compose_config(*runs.STAGE_1[2:], "launcher.experiment_log_dir=/runs/mae", *overrides)
    )


class Folder(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = RunDir(Path(temporary.name) / "run")
        self.logs = self.folder.path / SUBMISSION_FOLDER
        self.logs.mkdir(parents=True)
        for seconds in (
            mock.patch.object(slurm_jobs, "END_FILE_SECONDS", 0),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            self.enterContext(seconds)

    def job(self, *overrides: str) -> Job:
        where = f"launcher.experiment_log_dir={self.folder.path}"
        return Job(validate_config(stage_runs.compose_config(*runs.STAGE_1[2:], where, *overrides)), "epochs: 1\n")

    @property
    def runs_file(self) -> Path:
        return self.logs / "a_runs.json"

    def write_submission(self, limit: int = 100, config: str = "epochs: 1\n") -> str:
        """The file of a submission's runs; returns what squeue shows as the command."""
        runs = [{"token": "a", "folder": str(self.folder.path), "config_text": config, "max_requeues": limit}]
        self.runs_file.write_text(json.dumps(runs))
        return str(self.logs / "a_submission.sh")

    def log(self, restarts: int = 0, limit: int | None = 100, token: str = "a") -> JobLog:
        return JobLog(self.folder, "12", restarts, token, limit)

    def starts(self, *steps: int | None, token: str = "a") -> None:
        """Starts of a job that resumed from these steps; None: it did not get so far."""
        for restarts, step in enumerate(steps):
            log = self.log(restarts, token=token)
            log.record_start("node1", 1)
            if step is not None:
                log.record_resume(step)

    def rank_end(self, restarts: int, error: BaseException, rank: int = 3, job: str | None = "12") -> None:
        """Another rank's end file."""
        self.folder.logs.mkdir(exist_ok=True)
        with mock.patch.multiple(ending, slurm_job_id=lambda: job, slurm_restart_count=lambda: restarts):
            ending.write_end_file(self.folder, rank, error, f"{type(error).__name__}: {error}")


class Ranks(unittest.TestCase):
    def test_rank_info_comes_from_slurm(self):
        with mock.patch.dict(os.environ, SLURM):
            self.assertEqual(slurm_task.slurm_rank("node3"), RankInfo(5, 8, 1, 4, "tcp://node3:15928"))
        with mock.patch.dict(os.environ, SLURM | {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}):
            self.assertIsNone(slurm_task.slurm_rank("node3").init_method)

    def test_jobs_and_restarts_use_different_ports(self):
        ports: dict[int, set[int]] = {}
        for number in (*range(987_654, 987_754), *range(989_054, 989_154)):
            for restarts in (0, 1, 12, 13, 99):
                with mock.patch.dict(
                    os.environ, SLURM | {"SLURM_JOB_ID": str(number), "SLURM_RESTART_COUNT": str(restarts)}
                ):
                    port = int(slurm_task.slurm_rank("a").init_method.rpartition(":")[2])
                ports.setdefault(number, set()).add(port)
        self.assertEqual({len(own) for own in ports.values()}, {4}, "13 starts, then the first port again")
        every = [port for own in ports.values() for port in own]
        self.assertEqual(len(set(every)), len(every))
        self.assertTrue(10_000 <= min(every) and max(every) <= 29_499, "none that systems hand out")

    def test_job_submitted_by_an_earlier_version_runs(self):
        """Its pickle calls `omnivision.launch.run_slurm_task`, under submitit's signal handlers."""
        self.addCleanup(signal.signal, signal.SIGUSR2, signal.signal(signal.SIGUSR2, signal.SIG_IGN))
        with mock.patch.object(slurm_task, "run_slurm_task", side_effect=(0, 71)) as run:
            omnivision.launch.run_slurm_task("epochs: 1\n", "a")
            self.assertEqual(signal.getsignal(signal.SIGUSR2), signal.SIG_DFL)
            with self.assertRaises(SystemExit) as ended:
                omnivision.launch.run_slurm_task("epochs: 1\n", "a")
        self.assertEqual((ended.exception.code, run.call_args.args), (71, ("epochs: 1\n", "a")))


class Ends(Folder):
    """What becomes of a job, decided by rank 0."""

    def decide(self, error: BaseException, restarts: int = 1, limit: int = 100, **fields: str) -> tuple[str, bool]:
        with answer(**fields), mock.patch.dict(os.environ, SLURM_JOB_ID="12", SLURM_RESTART_COUNT=str(restarts)):
            self.decision = self.log(restarts, limit).classify_exit(error, str(error))
        return self.decision.status, self.decision.requeue

    def test_too_many_restarts_without_progress_are_refused(self):
        self.starts(0, 0, 0, 5, 5, 5, 6, None, None, 7)
        self.starts(0, 0, 0, token="of an older job of the same number")
        self.starts(0, 0, 10, 10, 10, token="b")
        with self.assertRaisesRegex(UserError, "trainer.checkpoint.save_every_steps"):
            self.starts(0, 0, 10, 10, 10, 10, token="c")

    def test_starts_that_never_resume_are_limited(self):
        self.starts(4, None, None)
        self.assertEqual(self.decide(DISCONNECTED, 2), ("requeued", True))
        self.starts(4, None, None, None, token="b")
        with mock.patch.object(JobLog, "history", lambda log: history(log.run_dir, "b")):
            self.assertEqual(self.decide(DISCONNECTED, 3), ("failed", False))

    def test_max_requeues_limits_restarts(self):
        self.log(2, limit=2).record_resume(1)
        with self.assertRaisesRegex(UserError, "submitit.max_requeues"):  # when SLURM requeues it
            self.log(3, limit=2).record_resume(2)
        self.assertEqual(self.decide(DISCONNECTED, 1, limit=1), ("interrupted", False))

    def test_stop_requests_requeue_or_end_the_job(self):
        running = {"JobState": "RUNNING", "Restarts": "1", "StartTime": (NOW - timedelta(hours=1)).isoformat()}
        before = (NOW - timedelta(hours=2)).isoformat()
        again, ended = ("requeued", True), ("interrupted", False)
        for cause, fields, expected in (
            ("SIGTERM", ENDING, ended),
            ("SIGTERM", {}, again),  # no cancellation
            ("SIGTERM", PREEMPTED, again),
            ("SIGTERM", PREEMPTED | {"PreemptTime": before}, ended),
            ("SIGTERM", ENDING | {"Restarts": "2"}, ("requeued", False)),  # SLURM has requeued it
            ("SIGTERM", ENDING | {"TimeLimit": "01:00:00"}, again),
            ("SIGTERM", ENDING | {"TimeLimit": "02:00:00", "EndTime": NOW.isoformat()}, ended),
            (TIME_LIMIT, ENDING, ended),
            (TIME_LIMIT, {}, again),
            ("SIGUSR2", {}, again),
        ):
            with self.subTest(cause, fields=fields):
                self.assertEqual(self.decide(StopRequested(cause, saved_step=7), **running | fields), expected)
        self.assertEqual(self.decide(StopRequested("SIGTERM")), ended, "SLURM does not answer")
        self.rank_end(1, ValueError("its workers were ended first"))
        self.assertEqual(self.decide(StopRequested("SIGUSR2"), **running), again, "whatever fails meanwhile")
        self.assertEqual(
            self.decide(StopRequested("SIGTERM")), ("failed", False), "SLURM ends what is left of a failed job"
        )

    def test_lost_peer_requeues_the_job(self):
        self.assertEqual(self.decide(PeerLostError("rank 3 is silent")), ("requeued", True))
        self.assertRegex(self.decision.reason, "^rank 3 is silent")
        self.assertEqual(self.decide(DISCONNECTED, **ENDING), ("interrupted", False))
        self.assertEqual(self.decide(ValueError("of its own")), ("failed", False))

    def test_exit_reason_comes_from_another_ranks_end_file(self):
        for restarts, error, job in (
            (0, ValueError("of an earlier attempt"), "12"), (1, DISCONNECTED, "12"), (1, StopRequested("SIGTERM"), "12"),
            (1, ValueError("of another job"), "77"),
        ):  # fmt: skip
            self.rank_end(restarts, error, job=job)
            self.assertEqual(self.decide(DISCONNECTED), ("requeued", True), error)
        self.rank_end(1, ValueError("no memory"))
        for error, fields in ((DISCONNECTED, {}), (StopRequested("SIGTERM"), {"JobState": "RUNNING"})):
            self.assertEqual(self.decide(error, **fields), ("failed", False))
            self.assertEqual(self.decision.reason, "rank 3 failed: ValueError: no memory")

    def test_summary_of_a_local_run_has_the_cause(self):
        self.rank_end(0, ValueError("no such label"), rank=1, job=None)
        self.assertEqual(ending.report_exit(DISCONNECTED, self.folder, writes_summary=True, rank=0), 70)
        summary = self.folder.read_summary()
        self.assertEqual(summary["status"], "failed")
        self.assertEqual(summary["exit_reason"], "rank 1 failed: ValueError: no such label")
        ends = {end["rank"]: end["kind"] for end in ending.read_end_files(self.folder)}
        self.assertEqual(ends, {0: "disconnected", 1: "failed"})

    def test_other_ranks_do_not_end_the_job_before_rank_0_has_decided(self):
        """SLURM ends all tasks when one fails."""
        log = mock.Mock()
        for error, code in (
            (StopRequested("SIGUSR2"), 0), (DISCONNECTED, 0), (PeerLostError("gone", gone=True), 0),
            (PeerLostError("rank 0 is silent"), 70), (ValueError("of its own"), 70), (UserError("wrong"), 1),
        ):  # fmt: skip
            self.assertEqual(ending.report_exit(error, self.folder, False, 1, log), code, error)
        self.assertEqual(log.mock_calls, [])

    def test_a_decision_is_written_before_the_job_is_requeued(self):
        for refusal, status in ((None, "requeued"), ("Invalid job id", "failed")):

            def requeue(job: str, refusal: str | None = refusal) -> str | None:
                self.assertEqual((job, self.folder.read_summary()["status"]), ("12", "requeued"))
                return refusal

            with mock.patch.object(slurm, "requeue", requeue), mock.patch.object(slurm_jobs, "finalize_dependents"):
                self.log().apply_exit(
                    slurm_jobs.ExitDecision("requeued", "preempted", requeue=True), writes_summary=True
                )
            self.assertEqual(self.folder.read_summary()["status"], status)


class BatchExits(Folder):
    """What the batch script's last line makes of processes that could not write why they ended."""

    def end(
        self, code: int, started: tuple[int, ...] = (), restarts: int = 0, limit: int = 100, **fields: str
    ) -> tuple[str, bool]:
        for start in started:
            self.log(start).note("start", nodes="node1")
        self.write_submission(limit)
        known = {
            "JobState": "RUNNING",
            "Restarts": str(restarts),
            "StartTime": (NOW - timedelta(minutes=9)).isoformat(),
        }
        with (
            mock.patch.dict(os.environ, SLURM_JOB_ID="12", SLURM_RESTART_COUNT=str(restarts)),
            answer(**known | fields),
            mock.patch.object(slurm, "requeue", return_value=None) as requeue,
            mock.patch.object(slurm_jobs, "finalize_dependents"),
        ):
            slurm_jobs.record_batch_exit(self.runs_file, "12", code)
        summary = self.folder.read_summary()
        (self.logs / "history.jsonl").unlink(missing_ok=True)
        self.reason = summary["exit_reason"]
        return summary["status"], requeue.called

    def test_exit_codes_requeue_or_fail_the_job(self):
        again, failed = ("requeued", True), ("failed", False)
        for code, arguments, expected in (
            # Before they handled signals; SLURM says the one or the other of a job that scancel ends.
            (143, {"JobState": "CANCELLED"}, ("interrupted", False)),
            (143, ENDING, ("interrupted", False)),
            (143, PREEMPTED, again),
            (143, ENDING | {"TimeLimit": "00:09:00"}, again),
            (143, {"Restarts": "1"}, ("requeued", False)),  # SLURM has requeued it
            (140, {}, again),  # SIGUSR2
            (1, {}, failed),
            (137, {"started": (0,)}, failed),
            (134, {"started": (0,)}, again),  # SIGABRT, as by NCCL when a peer is gone
            (1, {"started": (0,), "restarts": 1}, again),  # its node is gone
            (1, {"started": (0,), "restarts": 3}, failed),  # for the third time
        ):
            with self.subTest(code, **arguments):
                self.assertEqual(self.end(code, **arguments), expected)
        self.assertRegex(self.reason, "exit code 1")

    def test_end_files_and_limits_decide_about_requeueing(self):
        for restarts, expected in (
            (1, ("requeued", True)),
            (0, ("failed", False)),
        ):  # of an earlier attempt it says nothing
            self.rank_end(1, PeerLostError("rank 0 is silent"), rank=5)
            self.assertEqual(self.end(137, started=(0, 1), restarts=restarts), expected)
        self.assertIn("SIGKILL", self.reason)
        self.assertEqual(self.end(134, (0,), limit=0), ("interrupted", False))
        self.assertIn("submitit.max_requeues", self.reason)
        self.rank_end(0, OSError("no such device"))
        self.assertEqual(self.end(134, (0,)), ("failed", False))
        self.assertEqual(self.reason, "rank 3 failed: OSError: no such device")

    def test_job_is_requeued_if_rank_0_was_killed_before_requeueing(self):
        for status, fields, expected in (
            ("requeued", {}, True), ("requeued", {"Restarts": "1"}, False), ("requeued", ENDING, False),
            ("finished", {}, False),
        ):  # fmt: skip
            self.folder.write_summary(status=status, exit_reason="preempted")
            self.log().note("end", status=status)
            self.assertEqual(self.end(137, (0,), **fields), (status, expected))


class BatchScript(Folder):
    """What its shell does around the tasks, for which a command stands here. (tests/slurm has the whole script, and SLURM.)"""

    def exit(self, tasks: str, *setup: str, **more: str) -> tuple[int, str]:
        """The exit code, and status and reason of the summary."""
        self.write_submission()
        script = self.folder.path / "slurm_script"
        script.write_text("\n".join(["#!/bin/bash", *batch_script.batch_script_prologue(self.runs_file, setup), tasks]))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        result = subprocess.run(["bash", script], env=environment | {"SLURM_JOB_ID": "12"} | more, timeout=60)
        summary = self.folder.read_summary()
        (self.logs / "history.jsonl").unlink(missing_ok=True)
        self.folder.replace_summary({})
        return result.returncode, f"{summary.get('status')}: {summary.get('exit_reason')}"

    def test_exit_code_of_the_tasks_is_kept(self):
        for tasks, setup, code, reason in (
            ("no_such_command 2>/dev/null", [], 127, "^failed: job 12: its processes could not be started .exit code 127"),
            ("true", ["export A=1", "set -e", "# a comment", "", "PATH=/nowhere"], 0, "^None"),
            ('[ -z "$omnivision_within" ]', [], 0, "^None"),  # a job that is submitted by a job has both shells
            (f"[ $PWD = {os.getcwd()} ]", ["cd /"], 0, "^None"),
            *[("(exit 137)", [line], 137, "^failed: job 12: .*SIGKILL") for line in ("set -e", "set -u", "code=0", "cd /")],
            *[(f"kill -{name} $$; (exit 7)", [], 7, "^failed: job 12: .*exit code 7") for name in ("USR2", "TERM")],
        ):  # fmt: skip
            with self.subTest(tasks, setup=setup):
                found = self.exit(tasks, *setup)
                self.assertEqual(found[0], code)
                self.assertRegex(found[1], reason)

    def test_setup_that_exits_fails_the_job(self):
        for *setup, code in (
            ("false", 1), ("exit 0", 1), ("true", "exit 3", 3), ("module load cuda", 127), ("cd / && exec /bin/true", 1),
            ("trap 'exit 0' EXIT", "false", 1), ("kill -9 $$", 137), ("export PYTHONHOME=/opt/python", "false", 1),
        ):  # fmt: skip
            found = self.exit("true", *setup)
            self.assertEqual(found[0], code, setup)
            self.assertIn(
                f"failed: job 12: submitit.setup ended the job, and nothing was trained: {setup[-1]} (", found[1]
            )

    def test_user_trap_is_kept(self):
        self.assertEqual(self.exit("(exit 7)", f"trap 'touch {self.folder.path}/cleaned' EXIT")[0], 7)
        self.assertTrue((self.folder.path / "cleaned").exists())

    def test_recorded_end_is_not_overwritten(self):
        end = json.dumps({"event": "end", "status": "finished", "restarts": 0, "job": "12", "token": "a"})
        file = self.logs / "history.jsonl"
        self.assertEqual(self.exit(f"echo '{end}' >>{file}; (exit 134)"), (0, "None: None"), "while it was leaving")
        self.assertEqual(self.exit(f"echo '{end.replace('finished', 'failed')}' >>{file}; (exit 1)"), (1, "None: None"))

    def test_signals_do_not_interrupt_recording_the_end(self):
        python = self.folder.path / "python"
        python.write_text(f'#!/bin/sh\nkill -TERM $$\nkill -USR2 $$\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        with mock.patch.object(sys, "executable", str(python)):
            self.assertRegex(self.exit("(exit 7)")[1], "^failed: job 12: .*exit code 7")

    def test_unwritable_run_directory_is_reported_in_the_job_comment(self):
        programs = self.folder.path / "bin"
        programs.mkdir()
        comment = self.folder.path / "comment"
        for name, script in (("scontrol", f'echo "$@" >{comment}'), ("seq", "echo 1"), ("hostname", "echo node4")):
            (programs / name).write_text(f"#!/bin/sh\n{script}\n")
            (programs / name).chmod(0o755)
        self.logs = self.folder.path / "elsewhere" / SUBMISSION_FOLDER
        with mock.patch.object(self, "write_submission"):
            self.assertEqual(self.exit("true", PATH=f"{programs}:{os.environ['PATH']}")[0], 1)
        self.assertEqual(comment.read_text(), f"update JobId=12 Comment=node4 cannot write to {self.logs}\n")


class Commands(Folder):
    def test_existing_exit_status_is_kept(self):
        ended = {"failed", "interrupted", "finished"}
        for how, kept in (("unsubmitted", ended), ("cancelled", {"finished"})):
            for status in (*ended, "cancelled"):
                self.folder.write_summary(status=status, exit_reason="no memory")
                with contextlib.redirect_stdout(io.StringIO()):
                    slurm_jobs.main([how, str(self.folder.path), "b"])
                found = self.folder.read_summary()
                wanted = (status, "no memory") if status in kept else ("cancelled", "b")
                self.assertEqual((found["status"], found["exit_reason"]), wanted, (how, status))


class Statuses(Folder):
    def test_status_of_slurm_runs(self):
        logs, waiting = str(self.logs), "DependencyNeverSatisfied"
        for status, state, expected in (
            ("queued", QueueEntry("PENDING", "Resources"), ("queued", "waits .Resources.")),
            ("queued", QueueEntry("RUNNING"), ("queued", "RUNNING")),
            ("running", QueueEntry("RUNNING"), ("running", "RUNNING")),
            ("running", QueueEntry("NODE_FAIL", "NodeDown", "no log"), ("failed", "NODE_FAIL .no log.")),
            ("queued", QueueEntry("CANCELLED", "BeginTime"), ("cancelled", "CANCELLED .ended from outside.")),
            (
                "queued",
                QueueEntry("PENDING", waiting, dependency="afterok:9(failed)"),
                ("cancelled", "afterok:9.failed."),
            ),
            ("running", None, ("lost", "job 12")),
            ("running", QueueEntry("RUNNING", command="/another/after/a/reset.sh"), ("lost", "job 12")),
            ("finished", QueueEntry("RUNNING"), ("finished", "^$")),
        ):
            with self.subTest(status, state=state):
                self.folder.write_summary(status=status, exit_reason=None, job={"job_id": "12", "logs": logs})
                if state is not None and not state.command:
                    state = QueueEntry(state.state, state.reason, state.comment, f"{logs}/x.sh", state.dependency)
                found = run_status(self.folder, {} if state is None else {"12": state})
                self.assertEqual(found[0], expected[0])
                self.assertRegex(found[1], expected[1])
                kept = status if expected[0] == "lost" else expected[0]
                self.assertEqual(
                    self.folder.read_summary()["status"], kept, "what ended without a word is written down"
                )

    def test_status_of_local_runs(self):
        self.assertEqual(run_status(self.folder, None), ("not begun", ""))
        self.folder.write_summary(status="running", job=None)
        self.folder.lock()
        self.assertEqual(run_status(self.folder, {})[0], "running")
        self.folder.unlock()
        self.assertEqual(run_status(self.folder, None)[0], "failed")
        self.assertEqual(self.folder.read_summary()["status"], "failed")


class Answers(unittest.TestCase):
    def test_slurm_times_are_parsed(self):
        limits = {
            "30": 30,
            "1:30": 1.5,
            "2:00:00": 120,
            "3-12:00:00": 5040,
            "3-12": 5040,
            "infinite": None,
            "n/a": None,
        }
        self.assertEqual({text: parse_limit(text) for text in limits}, limits)
        self.assertEqual([parse_time(text) for text in ("Unknown", "None", "N/A", "", None)], [None] * 5)
        self.assertEqual(parse_time("2026-11-24T16:39:49") - parse_time("2026-11-24T16:38:49"), 60)

    def test_partition_limits_are_parsed(self):
        default, both = "gpu* 4 2-00:00:00\ncpu 9 infinite\n", "gpu 4 1:00:00\ncpu 9 infinite\n"
        answers = {None: default, "gpu,cpu": both, "no": "", "cpu": "cpu 9 5\n"}

        def run(*command: str) -> str:
            return answers[command[-1].partition("--partition=")[2] or None]

        with mock.patch.object(slurm, "run_slurm_command", run), mock.patch.dict(os.environ):
            os.environ.pop("SBATCH_PARTITION", None)
            for name, limits in ((None, (4, 2880)), ("gpu,cpu", (9, None)), ("no", (None, None))):
                self.assertEqual(slurm.partition_limits(name), limits)
            os.environ["SBATCH_PARTITION"] = "cpu"
            self.assertEqual(slurm.partition_limits(None), (9, 5))

    def test_squeue_output_is_parsed(self):
        mine = ["12", "RUNNING", "None", "two\nlines \ufffd", "/x/submitit_logs/y.sh", "(null)"]
        output = "".join(f"{slurm.SEPARATOR.join(fields)}{slurm.END}\n" for fields in (mine, ["13", "odd"]))
        with mock.patch.object(slurm, "run_slurm_command", return_value=output):
            self.assertEqual(slurm.squeue(), {"12": QueueEntry("RUNNING", "", *mine[3:5])})

    def test_slurm_dependencies_are_parsed(self):
        text = "afterok:12(unfulfilled),afterany:3(failed),afterok:14_*(unfulfilled)"
        self.assertEqual(list(parse_dependencies(text)), [("afterok", "12"), ("afterany", "3"), ("afterok", "14_*")])
        self.assertEqual([*parse_dependencies(""), *parse_dependencies("singleton")], [])

    def test_secret_variables_are_saved_without_values(self):
        secret = dict.fromkeys(
            ("WANDB_API_KEY", "GITHUB_TOKEN", "MY_PASSWORD", "DB_PASSWD", "AWS_SECRET", "SSH_AUTH_SOCK"), "x"
        )
        others = {"SLURM_JOB_ID": "12", "URL": "https://me:word@host/path", "PATH": "/bin"}
        with mock.patch.dict(os.environ, secret | others, clear=True):
            public = slurm_task.public_environment()
        self.assertEqual({name for name in public if public[name] is None}, set(secret))
        self.assertEqual(
            (public["SLURM_JOB_ID"], public["URL"], public["PATH"]), ("12", "https://...@host/path", "/bin")
        )


class Settled(unittest.TestCase):
    """Settings that SLURM would misunderstand."""

    def test_settings_that_slurm_would_misread_are_refused(self):
        for override, key in (
            ('submitit.name="a\nb"', "submitit.name"),
            ("++submitit.additional_parameters.time=1", "additional_parameters.time"),
            ("++submitit.additional_parameters.test_only=true", "additional_parameters.test_only"),
            ("++submitit.additional_parameters.test_onl=true", "additional_parameters.test_onl"),
            (f"launcher.experiment_log_dir=/runs/{'x' * 300}", "launcher.experiment_log_dir"),
            ("submitit.timeout_hour=1e9", "submitit.timeout_hour"),
            ("submitit.dependency='afterok:1,afterok:2?singleton'", "submitit.dependency"),
            *((f"submitit.dependency='{text}'", "submitit.dependency")
              for text in ("afterok", "12", "afterok:x", "afterok:1;afterok:2", "later:3", "afterok:12; rm -r x")),
            *((f"submitit.mem='{text}'", "submitit.mem") for text in ("much", "1.5G", "-4G", "")),
        ):  # fmt: skip
            with self.subTest(override), self.assertRaisesRegex(UserError, key):
                settings_of(override)
        with self.assertRaisesRegex(UserError, "signal_delay_s .*timeout_hour"):
            settings_of("submitit.signal_delay_s=3600", "submitit.timeout_hour=1")

    def test_valid_memory_and_dependencies_are_accepted(self):
        for text in ("4G", "2048", "1T", "524288K", "64GB", "0", "4g"):
            self.assertEqual(settings_of(f"submitit.mem='{text}'").submitit.mem, text)
        for text in (
            "afterok:12:13",
            "afterok:12_3",
            "afterany:1,afterok:2",
            "after:5+10",
            "singleton",
            "afterok:1?afterok:2",
        ):
            self.assertEqual(settings_of(f"submitit.dependency='{text}'").submitit.dependency, text)


class Checks(Folder):
    """What is refused before a submission."""

    def test_run_is_finished_after_the_epochs_in_its_settings(self):
        for status, overrides, finished in (
            ("finished", ["epochs=3"], True), ("finished", ["epochs=4"], False),
            ("finished", ["epochs=3", "trainer.mode=val"], False), ("interrupted", ["epochs=3"], False),
        ):  # fmt: skip
            self.folder.write_summary(status=status, epochs=3)
            self.assertEqual(self.job(*overrides).is_finished, finished, overrides)

    def test_changed_settings_of_a_finished_run_are_listed(self):
        for before, warned in (
            ("epochs: 1\nlauncher: {num_nodes: 8}\nsubmitit: {mem_gb: 9}\n", False), ("epochs: 2\n", True),
        ):  # fmt: skip
            (self.folder.path / "config.yaml").write_text(before)
            with contextlib.redirect_stderr(io.StringIO()) as err:
                submit.warn_of_other_settings(self.job())
            self.assertEqual("epochs: 2 -> 1" in err.getvalue(), warned)

    def test_changed_settings_of_a_resumable_run_are_refused(self):
        (self.folder.path / "config.yaml").write_text("epochs: 2\n")
        submit.check_run_dir(self.job(), {})  # it has no checkpoint to resume from
        (self.folder.path / "checkpoints").mkdir()
        (self.folder.path / "checkpoints/checkpoint.pt").touch()
        with self.assertRaisesRegex(UserError, "epochs: 2 -> 1.*allow_changes=true"):
            submit.check_run_dir(self.job(), {})
        for override in ("trainer.mode=val", "trainer.checkpoint.allow_changes=true"):
            submit.check_run_dir(self.job(override), {})
        (self.folder.path / "config.yaml").write_text("epochs: 1\nnum_workers: 9\n")
        submit.check_run_dir(self.job(), {})

    def test_run_directory_in_use_or_with_an_unsafe_name_is_refused(self):
        for environment, job in (
            ({"SLURM_JOB_ID": "77"}, "77"),
            ({"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "78"}, "77_1"),
        ):
            run = RunDir(self.folder.path)
            with mock.patch.dict(os.environ, environment):
                run.lock()
            for free in ({}, {job: QueueEntry("FAILED"), "79": QueueEntry("RUNNING")}):
                submit.check_run_dir(self.job(), free)
            with self.assertRaisesRegex(UserError, "launcher.experiment_log_dir"):
                submit.check_run_dir(self.job(), {job: QueueEntry("RUNNING")})
            run.unlock()
        with self.assertRaisesRegex(UserError, "launcher.experiment_log_dir"):
            submit.check_run_dir(self.job(f"launcher.experiment_log_dir={self.folder.path}/a%j"), {})

    def test_invalid_setup_exceeded_limits_and_mixed_resources_are_refused(self):
        job = self.job()
        for lines, refused in (
            (["true", "}"], True), (["echo 'open"], True), (["if true; then"], True), (["exec 2>log"], False),
            (["module load cuda", "if true; then\n  echo yes\nfi", "cat <<E\nx\nE"], False),
        ):  # fmt: skip
            job.settings.submitit.setup[:] = lines
            with self.assertRaisesRegex(UserError, "submitit.setup") if refused else contextlib.nullcontext():
                check_submission([job], {})
        job.settings.submitit.setup[:] = ["}"]
        with mock.patch.object(submit.shutil, "which", return_value=None):
            check_submission([job], {})
        within = ("launcher.num_nodes=4", "submitit.timeout_hour=48")
        with mock.patch.object(slurm, "partition_limits", return_value=(4, 2880)):
            check_submission([self.job(*within)], {})
            for key, value in (("launcher.num_nodes", 5), ("submitit.timeout_hour", 49)):
                with self.assertRaisesRegex(UserError, key):
                    check_submission([self.job(*within, f"{key}={value}")], {})
        with self.assertRaisesRegex(UserError, "--mem="):
            check_submission([self.job(), self.job("submitit.mem_gb=9")], {})

    def test_unsatisfiable_dependencies_are_refused(self):
        before = RunDir(self.folder.path.parent / "align")
        before.create(SUBMISSION_FOLDER)
        command = str(before.path / SUBMISSION_FOLDER / "a_submission.sh")
        (before.path / SUBMISSION_FOLDER / "a_runs.json").write_text(
            json.dumps([{"token": "a", "folder": str(before.path), "config_text": ""}] * 2)
        )
        states = {
            "11": "COMPLETED",
            "12": "RUNNING",
            "13": "FAILED",
            "14_0": "COMPLETED",
            "14_1": "FAILED",
            "15": "COMPLETING",
        }
        queue = {job: QueueEntry(state, command=command) for job, state in states.items()}
        for summary, fine, bad in (
            ({}, ("afterok:12", "afterok:11", "afternotok:13", "afterany:13", "afterany:13,afterok:12", "afterok:13?afterok:12",
                  "after:12+10", "afterok:14_0", "afterok:15"),
             ("afterok:13", "afterok:12:13", "afterok:14", "afterok:14_1", "aftercorr:13", "afternotok:11", "afterany:99")),
            ({"status": "failed", "job": {"job_id": "12"}}, ("afterany:12", "afterok:11"), ("afterok:12",)),
            ({"status": "requeued", "job": {"job_id": "12"}}, ("afterok:12",), ()),
            ({"status": "interrupted", "job": {"job_id": "15"}}, ("afterok:12",), ("afterok:15",)),
        ):  # fmt: skip
            before.replace_summary(summary)
            with mock.patch.object(slurm, "show_job", return_value={}):
                for dependency in fine:
                    self.assertIsNone(dependency_problem(dependency, queue), (dependency, summary))
                for dependency in bad:
                    self.assertIsNotNone(dependency_problem(dependency, queue), (dependency, summary))


class Queued(Folder):
    def is_queued(self, config: str = "epochs: 1\n", **states: str) -> bool:
        command = self.write_submission(config=config)
        return is_queued(self.job(), {name[4:]: QueueEntry(state, command=command) for name, state in states.items()})

    def test_queued_job_is_not_submitted_again(self):
        self.enterContext(mock.patch("builtins.print"))
        self.folder.write_summary(status="queued", job={"job_id": "12"})
        self.assertTrue(self.is_queued("epochs: 1\nsubmitit: {dependency: 'afterok:3'}\n", job_12="PENDING"))
        self.assertFalse(self.is_queued(job_12="FAILED"))
        self.assertFalse(self.is_queued())
        other = "/home/another/run/submitit_logs/a_submission.sh"
        self.assertFalse(is_queued(self.job(), {"12": QueueEntry("PENDING", command=other)}))
        for states in ({"job_12": "COMPLETING", "job_13": "PENDING"}, {"job_13": "PENDING", "job_12": "COMPLETING"}):
            with mock.patch("builtins.print") as printed:
                self.assertTrue(self.is_queued(**states))
            self.assertIn("job_id=13", printed.call_args[0][0])
        for status, queued in (("interrupted", False), ("requeued", True)):  # what it comes back as
            self.folder.write_summary(status=status)
            self.assertEqual(self.is_queued(job_12="COMPLETING"), queued, status)
        self.folder.write_summary(status="failed")
        self.assertTrue(self.is_queued(job_12="RUNNING"), "the status is an earlier job's")
        with self.assertRaisesRegex(UserError, "epochs: 7 -> 1.*scancel 12.*launcher.experiment_log_dir"):
            self.is_queued("epochs: 7\n", job_12="RUNNING")


class Submissions(Folder):
    def setUp(self):
        super().setUp()
        self.folder.create()
        self.enterContext(mock.patch("builtins.print"))

    def test_failed_submission_is_rolled_back(self):
        self.folder.write_summary(status="interrupted", exit_reason="before", job={"job_id": "3"})
        before = self.folder.read_summary()
        refusal, full = slurm.SlurmError("sbatch: error: Invalid qos"), OSError(28, "No space left on device")
        for error, kind, words in (
            (refusal, UserError, "Invalid qos.*submitit.*[Jj]ob 71.* was cancelled"),
            (full, UserError, "No space left .*launcher.experiment_log_dir.*71"),
            (KeyboardInterrupt(), KeyboardInterrupt, ""),
        ):

            def sbatch(script: Path, settings: object, error=error) -> str:
                text = slurm_jobs.read_submission(slurm_jobs.runs_file(script), "71").config_text
                self.assertEqual((text, self.folder.read_summary()["status"]), ("epochs: 1\n", "queued"))
                scripts = {"71": script, "72": self.logs / "old.sh"}
                self.queue = {job: QueueEntry("PENDING", command=str(each)) for job, each in scripts.items()}
                raise error

            with (
                self.subTest(error),
                mock.patch.multiple(slurm, sbatch=sbatch, squeue=lambda: self.queue),
                mock.patch.object(slurm, "run_slurm_command") as called,
            ):
                with self.assertRaisesRegex(kind, words):
                    submit.submit_or_roll_back([self.job()], self.logs)
                called.assert_called_once_with("scancel", "71")
            self.assertEqual((list(self.logs.iterdir()), self.folder.read_summary()), ([], before))
        no_answer = mock.Mock(side_effect=slurm.SlurmError("no answer"))
        with mock.patch.multiple(slurm, sbatch=mock.Mock(side_effect=full), squeue=no_answer):
            with self.assertRaisesRegex(UserError, "squeue"):
                submit.submit_or_roll_back([self.job()], self.logs)

    def test_signals_roll_back_a_submission_or_wait_for_its_end(self):
        def signalled(*_: object) -> None:
            signal.raise_signal(signal.SIGTERM)

        with (
            mock.patch.multiple(slurm, sbatch=signalled, squeue=dict),
            mock.patch.object(submit, "check_submission"),
            self.assertRaises(StopRequested) as stopped,
        ):
            submit.submit([self.job()])
        self.assertEqual(stopped.exception.exit_code, 143)
        self.assertEqual((self.folder.read_summary(), list(self.logs.glob("*.json"))), ({}, []))

        def interrupted(*given: object) -> None:
            signal.raise_signal(signal.SIGINT)
            note_submission(*given)

        note_submission = submit.note_submission
        taken = mock.patch.multiple(slurm, sbatch=lambda *_: "71")
        with taken, mock.patch.object(submit, "note_submission", interrupted):
            submit.submit_or_roll_back([self.job()], self.logs)
        self.assertEqual(self.folder.job_id(), "71", "once SLURM has the job, it is noted")
        files = {"71_submission.sh", "71_config.yaml", "history.jsonl"}
        self.assertLessEqual(files, {file.name for file in self.logs.iterdir()})

    def test_dependency_failure_during_submission_cancels_the_run(self):
        problem = mock.patch.object(submit, "dependency_problem", return_value="job 9 failed: no memory")
        (self.logs / "a_submission.sh").touch()
        with problem, mock.patch.object(slurm, "squeue_or_none", return_value={}):
            submit.note_submission([self.job("submitit.dependency=afterok:9")], "71", self.logs / "a_submission.sh")
        self.assertEqual(self.folder.read_summary()["status"], "cancelled")
        self.assertIn("no memory", self.folder.read_summary()["exit_reason"])

    def test_signal_while_building_exits_at_once(self):
        def signalled(*_: object) -> None:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("went on")

        with mock.patch("omnivision.training.build.build_process_group", signalled):
            self.assertEqual(run_rank(self.job(), RankInfo()), 128 + signal.SIGTERM)

    def test_slurm_variables_are_removed_except_site_defaults(self):
        leftovers = (
            "SLURM_JOB_ID SLURM_MEM_PER_NODE SLURM_GPUS SLURM_EXCLUSIVE SLURM_ARRAY_TASK_ID SLURM_RESTART_COUNT SRUN_DEBUG "
            "SBATCH_MEM SALLOC_QOS SQUEUE_STATES SUBMITIT_PREEMPT_SIGNAL RANK WORLD_SIZE LOCAL_RANK GROUP_RANK "
            "ROLE_NAME MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID SBATCH_PARTITION PMI_RANK"
        ).split()
        site = {"SBATCH_ACCOUNT": "a", "SLURM_CONF": "/etc/slurm.conf", "MY_RANK": "1", "SITE_WORLD_SIZE": "2"}
        given = dict.fromkeys(leftovers, "1") | site
        settings = self.job("submitit.partition=gpu").settings.submitit
        program = "import json, os; print(json.dumps({**os.environ}))"
        with mock.patch.dict(os.environ, given):
            for submitted, kept in ((None, {*site, "SBATCH_PARTITION"}), (settings, set(site))):
                output = slurm.run_slurm_command(sys.executable, "-c", program, settings=submitted)
                self.assertEqual(given.keys() & json.loads(output).keys(), kept)
            with mock.patch.object(slurm, "run_slurm_command", return_value="Welcome!\n71;cluster\n"):
                self.assertEqual(slurm.sbatch(Path("a.sh"), settings), "71")
            self.assertRegex(str(print.call_args), "SBATCH_MEM, SBATCH_PARTITION")
        with self.assertRaisesRegex(slurm.SlurmError, "submitit.use_cluster=false"):
            slurm.run_slurm_command("false")

    def test_signal_delay_covers_step_and_save_time(self):
        def delay(*overrides: str) -> int:
            return signal_delay(self.job(*overrides).settings, self.folder)

        self.assertEqual(delay(), 120, "nothing is known yet")
        self.assertEqual(delay("submitit.timeout_hour=0.05"), 90, "half of it")
        self.folder.write_summary(step_seconds=3.5, save_seconds=40.0)
        self.assertEqual(delay(), 2 * (3.5 + 40) + 10)
        self.assertEqual(delay("submitit.signal_delay_s=600"), 600)

    def test_batch_script_needs_no_slurm(self):
        for hours, minutes in (("20", 1200), ("0.1", 6), ("0.02", 2), ("1e-9", 1)):
            script = batch_script.batch_script(self.job(f"submitit.timeout_hour={hours}").settings, self.folder)
            self.assertIn(f"#SBATCH --time={minutes}\n", script, hours)
        with tempfile.TemporaryDirectory() as programs, mock.patch.dict(os.environ, PATH=programs):
            settings = self.job(
                "launcher.gpus_per_node=2", "submitit.mem_gb=1.5", "submitit.setup=[module load cuda]", "submitit.qos=a",
                "submitit.dependency=afterok:7", "++submitit.additional_parameters.reservation=x",
            ).settings  # fmt: skip
            script = batch_script.batch_script(settings, self.folder)
            with self.assertRaisesRegex(UserError, "submitit.use_cluster"):
                launcher.validate_launch_mode(self.job("submitit.use_cluster=true").settings)
            self.assertIn("#SBATCH --reservation=x\n", script)

    def test_truncated_history_line_is_ignored(self):
        self.log().note("start")
        with open(self.logs / "history.jsonl", "a") as file:
            file.write('{"event": "en')
        self.assertEqual([line["event"] for line in history(self.folder)], ["start"])


if __name__ == "__main__":
    unittest.main()
