"""A run's SLURM jobs: `submitit_logs/history.jsonl`, how a job ends, and whether it is requeued.

`python -m omnivision.launch.slurm_jobs ended ...` is the last line of every batch script: it records the end of a run whose
processes could not record it.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omnivision.launch import slurm
from omnivision.launch.exit import END_FILE_SECONDS, first_failure, read_end_files
from omnivision.reporting.logs import read_lines
from omnivision.reporting.run_directory import QUEUED_STATUSES, RunDir
from omnivision.utils.errors import PeerLostError, StopRequested, UserError
from omnivision.utils.host import slurm_restart_count
from omnivision.utils.io import append_line
from omnivision.utils.signals import TIME_LIMIT

SUBMISSION_FOLDER = "submitit_logs"
MAX_RESTARTS_WITHOUT_PROGRESS = 3
TIME_LIMIT_MARGIN = 5.0  # seconds; SIGTERM this close to the time limit counts as SLURM's


# ---- history ------------------------------------------------------------------------------------------------------


def history(run_dir: RunDir, token: str | None = None) -> list[dict[str, Any]]:
    """Return the events of a run's jobs, or of one submission, oldest first."""
    file = run_dir.path / SUBMISSION_FOLDER / "history.jsonl"
    lines = [line for line in read_lines(file) if "event" in line] if file.is_file() else []
    return [line for line in lines if token is None or line.get("token") == token]


def restarts_without_progress(lines: list[dict[str, Any]]) -> int:
    """Count attempts since the last one that resumed from a new step.

    An attempt that has not resumed yet is included.
    """
    best, count = -1, 0
    for line in lines:
        if line["event"] == "start":
            count += 1
        elif line["event"] == "resumed" and line["step"] > best:
            best, count = line["step"], 0
    return count


# ---- submissions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submission:
    """A submitted run. `TOKEN_runs.json` lists the runs of an array.

    `token` identifies the submission, since job ids may be reused.
    """

    token: str
    folder: str
    config_text: str
    max_requeues: int | None = None

    @property
    def run_dir(self) -> RunDir:
        return RunDir(self.folder)


def runs_file(script: Path) -> Path:
    """Return the file that lists the runs of a batch script."""
    return script.with_name(script.name.removesuffix("_submission.sh") + "_runs.json")


def read_submission(file: Path, job_id: str) -> Submission:
    """Return the run of a job or of an array element. Raises OSError if the file is missing."""
    runs = json.loads(file.read_text(encoding="utf-8"))
    return Submission(**runs[int(job_id.partition("_")[2] or 0)])


def find_submission(command: str, job_id: str) -> Submission | None:
    """Return the run of a job whose batch script squeue shows as `command`; None if the job is not ours."""
    try:
        return read_submission(runs_file(Path(command)), job_id)
    except (OSError, ValueError, LookupError, TypeError):
        return None


# ---- how a job ends -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExitDecision:
    """Status and reason of a run, and whether to requeue its job."""

    status: str
    reason: str
    requeue: bool = False


class JobStatus:
    """What SLURM reports about a job; all False if it does not answer."""

    def __init__(self, job_id: str, restarts: int) -> None:
        fields = slurm.show_job(job_id)
        started = slurm.parse_time(fields.get("StartTime")) or 1
        self.known = bool(fields)
        self.requeued = int(fields.get("Restarts", "0")) > restarts
        self.preempted = (slurm.parse_time(fields.get("PreemptTime")) or 0) >= started
        self.late = time.time() >= (slurm.planned_end(fields) or float("inf")) - TIME_LIMIT_MARGIN
        ending = fields.get("JobState", "RUNNING") != "RUNNING"  # ended from outside, e.g. by scancel
        self.cancelled = ending and not self.preempted and not self.late


@dataclass(frozen=True)
class JobLog:
    """One attempt of a job: logs its events, and decides whether the job is requeued.

    `job_id` is 12, or 12_3 for an array element; `token` identifies the submission. `max_requeues` None: no limit.
    """

    run_dir: RunDir
    job_id: str
    restarts: int = 0
    token: str = ""
    max_requeues: int | None = None

    def note(self, event: str, **fields: Any) -> None:
        """Append a line to the history."""
        line = {"time": time.time(), "event": event, "token": self.token, "job": self.job_id, "restarts": self.restarts}
        append_line(self.run_dir.path / SUBMISSION_FOLDER / "history.jsonl", json.dumps(line | fields))

    def history(self) -> list[dict[str, Any]]:
        return history(self.run_dir, self.token)

    def record_start(self, nodes: str, processes: int) -> None:
        """Record the start of an attempt, and the end of the previous one if that could not record it."""
        before = self.history()
        if self.restarts and before and before[-1]["event"] not in ("end", "submitted"):
            reason = "the previous attempt recorded no reason (its node may have failed); SLURM restarted the job"
            replace(self, restarts=self.restarts - 1).note("end", status="requeued", reason=reason)
        self.note("start", nodes=nodes)
        fields = {"job_id": self.job_id, "restarts": self.restarts, "processes": processes, "nodes": nodes}
        self.run_dir.write_summary(job=(self.run_dir.read_summary().get("job") or {}) | fields)

    def record_resume(self, step: int) -> None:
        """Record the step that the run resumes from. Raises UserError if it was restarted too often (SLURM also requeues)."""
        self.note("resumed", step=step)
        if limit := self.reached_limit(self.restarts):
            raise UserError(f"At step {step}, {limit.reason}.")

    def owns_summary(self) -> bool:
        """Return whether the summary is about this job and no other process works in the run directory."""
        return self.run_dir.job_id() == self.job_id and not self.run_dir.holder_message()

    def classify_exit(self, error: BaseException, reason: str) -> ExitDecision:
        """Decide what happens to the job after rank 0 failed or was asked to stop."""
        job_status = JobStatus(self.job_id, self.restarts)
        cause = None
        requeue_reason = None
        match error:
            case PeerLostError():
                cause = first_failure(self.run_dir, 0, END_FILE_SECONDS)
                requeue_reason = f"{reason} (its node may have failed)"
            case StopRequested():
                # SLURM sends the same signal when another task fails and when the job is cancelled.
                cause = first_failure(self.run_dir, 0) if error.cause == "SIGTERM" else None
                late = job_status.late or error.cause == TIME_LIMIT
                why = "time limit reached" if late else "signalled by SLURM or by hand, not cancelled"
                requeue_reason = f"{reason} ({'preempted' if job_status.preempted else why})"
                if error.cause == "SIGTERM" and not job_status.known:
                    requeue_reason, reason = None, f"{reason}; SLURM gives no reason"
        return self._decide(
            job_status, reason, cause, requeue_reason, "failed" if isinstance(error, Exception) else "interrupted"
        )

    def classify_batch_exit(self, code: int, why: str) -> ExitDecision:
        """Decide what happens to a job whose rank 0 could not decide.

        Requeue if a peer went silent, a library aborted (NCCL), the processes had no signal handlers yet, or they could not
        start although an earlier attempt ran.
        """
        starts = [line["restarts"] for line in self.history() if line["event"] == "start"]
        job_status, not_started = JobStatus(self.job_id, self.restarts), self.restarts not in starts
        number = code - 128 if code - 128 in set(signal.Signals) else 0
        name = f", {signal.Signals(number).name}" if number else ""
        why = why if not_started else "its processes ended"
        reason = f"job {self.job_id}: {why} (exit code {code}{name}); see {SUBMISSION_FOLDER}/"
        silent = [end["reason"] for end in read_end_files(self.run_dir) if end["kind"] == "peer silent"]
        had_to_exit = number in (signal.SIGABRT, signal.SIGUSR2) or job_status.preempted or job_status.late
        requeue_reason = reason if had_to_exit or (not_started and starts) else None
        if silent:
            requeue_reason = f"{silent[0]} (its node may have failed)"
        return self._decide(job_status, reason, first_failure(self.run_dir), requeue_reason, "failed")

    def _decide(
        self, job_status: JobStatus, reason: str, cause: str | None, requeue_reason: str | None, status: str
    ) -> ExitDecision:
        """Requeue if there is a `requeue_reason`, unless SLURM did, the job was cancelled, a rank failed, or a limit is hit."""
        job = f"job {self.job_id}"
        if job_status.requeued:
            return ExitDecision("requeued", f"{reason}; SLURM has requeued {job}")
        if job_status.cancelled:
            return ExitDecision("interrupted", f"{reason}; {job} was cancelled")
        if cause or requeue_reason is None:
            return ExitDecision("failed" if cause else status, cause or reason)
        if limit := self.reached_limit(self.restarts + 1):
            return replace(limit, reason=f"{requeue_reason}; {limit.reason}")
        return ExitDecision("requeued", f"{requeue_reason}; {job} is requeued", requeue=True)

    def reached_limit(self, restarts: int) -> ExitDecision | None:
        """Return the decision for a job that may not restart for the `restarts`-th time; None if it may."""
        lines, job = self.history(), f"job {self.job_id}"
        last_start = max((line["restarts"] for line in lines if line["event"] == "start"), default=0)
        if self.max_requeues is not None and restarts > self.max_requeues:
            return ExitDecision("interrupted", f"{job} is not requeued: submitit.max_requeues is {self.max_requeues}")
        if max(restarts_without_progress(lines), restarts - 1 - last_start) >= MAX_RESTARTS_WITHOUT_PROGRESS:
            return ExitDecision(
                "failed",
                f"{job} was restarted {MAX_RESTARTS_WITHOUT_PROGRESS} times without progress. Lower "
                "trainer.checkpoint.save_every_steps or raise submitit.timeout_hour, see submitit_logs/ for what ended "
                "the attempts, and run the same command again",
            )
        return None

    def apply_exit(self, decision: ExitDecision, writes_summary: bool) -> None:
        """Record a decision (in the summary with `writes_summary`), then requeue the job or cancel its dependents.

        Record first: SLURM kills this process as soon as it accepts the requeue.
        """
        self._write(decision, writes_summary)
        if decision.requeue and (message := slurm.requeue(self.job_id)):
            decision = ExitDecision("failed", f"{decision.reason}, but SLURM refused: {message}")
            self._write(decision, writes_summary)
        if decision.status not in QUEUED_STATUSES:
            problem = f"job {self.job_id} ({self.run_dir.path}) failed: {decision.reason}"
            finalize_dependents(self.job_id, problem)

    def _write(self, decision: ExitDecision, writes_summary: bool) -> None:
        self.note("end", status=decision.status, reason=decision.reason)
        if writes_summary:
            self.run_dir.write_exit(decision.status, decision.reason)


# ---- jobs that wait for others ------------------------------------------------------------------------------------


def parse_dependencies(dependency: str) -> Iterator[tuple[str, str]]:
    """Yield what a job waits for: a condition, and the id of a job (12, 12_3, or 12_* for a whole array).

    Yields nothing for alternatives (joined by `?`), because the job may start although one of them failed.
    """
    if "?" in dependency:
        return
    for entry in dependency.split(","):
        condition, *ids = re.sub(r"\(.*\)", "", entry).split(":")
        yield from ((condition, job_id.partition("+")[0]) for job_id in ids)


def write_cancelled(run_dir: RunDir, job_id: str, problem: str) -> None:
    """Record that a job never starts because its dependency has a `problem`. SLURM itself removes it from the queue."""
    reason = f"its dependency failed: {problem}"
    JobLog(run_dir, job_id).note("end", status="cancelled", reason=reason)
    run_dir.write_summary(status="cancelled", exit_reason=reason)


def finalize_dependents(job_id: str, problem: str) -> None:
    """Record as cancelled the jobs that wait for this one to succeed, and the jobs that wait for those."""
    names = {job_id, f"{job_id.partition('_')[0]}_*"}
    for other, state in (slurm.squeue_or_none() or {}).items():
        needs_it = any(
            condition == "afterok" and job in names for condition, job in parse_dependencies(state.dependency)
        )
        run_dir = waiting.run_dir if needs_it and (waiting := find_submission(state.command, other)) else None
        if run_dir and run_dir.job_id() == other and run_dir.read_summary().get("status") in QUEUED_STATUSES:
            write_cancelled(run_dir, other, problem)
            finalize_dependents(other, problem)


# ---- the status of a run ------------------------------------------------------------------------------------------


def run_status(run_dir: RunDir, queue: Mapping[str, slurm.QueueEntry] | None) -> tuple[str, str]:
    """Return a run's status and reason, and write them if it ended without recording a reason.

    `queue`: the jobs in SLURM's queue; None without SLURM.
    """
    summary = run_dir.read_summary()
    status, reason = str(summary.get("status", "not begun")), str(summary.get("exit_reason") or "")
    job = summary.get("job") or {}
    if status == "running" and "job_id" not in job and not run_dir.holder_message():
        status = "failed"
        reason = "its process ended without recording a reason: it was killed, or its machine was restarted"
    elif queue is not None and "job_id" in job and status in (*QUEUED_STATUSES, "running"):
        state = queue.get(job["job_id"])
        # Job ids restart when SLURM is reinstalled.
        if state is None or ("logs" in job and Path(state.command).parent != Path(job["logs"])):
            return "lost", f"SLURM no longer knows job {job['job_id']}; it was {status}"
        what = f"job {job['job_id']} is {state.state}"
        if state.never_starts:
            status, reason = "cancelled", f"its dependency failed: {state.dependency or state.reason}"
        elif state.state == "CANCELLED":  # squeue keeps the old pending reason
            status, reason = "cancelled", f"{what} ({state.comment or 'ended from outside'})"
        elif state.is_over:
            status, reason = "failed", f"{what} ({state.comment or state.reason or 'no reason given'})"
        elif state.state == "PENDING":
            reason = f"job {job['job_id']} waits ({state.reason})"
        else:
            reason = reason if status == "running" and reason else what
    if status in ("cancelled", "failed") and status != summary.get("status"):
        with contextlib.suppress(OSError):  # someone else's run
            run_dir.write_summary(status=status, exit_reason=reason)
    return status, reason


# ---- commands of the scripts --------------------------------------------------------------------------------------


def record_batch_exit(file: Path, job_id: str, code: int, why: str = "its processes could not be started") -> bool:
    """Record the exit of a job whose rank 0 could not record it.

    Return True if the run had already finished, so that dependents may start.

    Args:
        file: the list of the job's runs.
        code: the processes' exit code.
        why: the reason, if they did not start.
    """
    submission, restarts = read_submission(file, job_id), slurm_restart_count()
    log = JobLog(submission.run_dir, job_id, restarts, submission.token, submission.max_requeues)
    if ends := [line for line in log.history() if line["event"] == "end" and line["restarts"] == restarts]:
        job_status = JobStatus(job_id, restarts)
        if ends[-1]["status"] == "requeued" and job_status.known and not (job_status.requeued or job_status.cancelled):
            slurm.requeue(job_id, attempts=1)  # rank 0 was killed before it could
        return bool(ends[-1]["status"] == "finished")
    log.apply_exit(log.classify_batch_exit(code, why), writes_summary=True)
    return False


def main(arguments: list[str]) -> None:
    match arguments:
        case ["ended", file, job_id, code, *why]:
            sys.exit(0 if record_batch_exit(Path(file), job_id, int(code), *why) else 1)
        case ["status", folder]:
            print(": ".join(filter(None, run_status(RunDir(folder), slurm.squeue_or_none()))))
        case ["cancelled" | "unsubmitted" as how, folder, reason]:
            Path(folder).mkdir(parents=True, exist_ok=True)
            kept = [
                "finished",
                "running",
                *QUEUED_STATUSES,
                *(["failed", "interrupted"] if how == "unsubmitted" else []),
            ]
            if run_status(RunDir(folder), slurm.squeue_or_none())[0] not in kept:
                RunDir(folder).write_summary(status="cancelled", exit_reason=reason)
            print(f"{folder}: {reason}")
        case _:
            sys.exit(
                "usage: python -m omnivision.launch.slurm_jobs ended RUNS_FILE JOB CODE [WHY] | status FOLDER | "
                "cancelled FOLDER REASON | unsubmitted FOLDER REASON"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
