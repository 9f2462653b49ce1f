"""A run's SLURM jobs: `submitit_logs/history.jsonl`, how a job ends, and whether it is requeued.

`python -m omnivision.launch.slurm_jobs ended ...` is the last line of every batch script: it writes the end of a run whose
processes could not.
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
from omnivision.launch.watchdog import is_peer_lost
from omnivision.reporting.logs import read_lines
from omnivision.reporting.run_directory import WAITING, RunDir, slurm_restart_count
from omnivision.utils.errors import PeerLostError, StopRequested, UserError
from omnivision.utils.io import append_line
from omnivision.utils.signals import TIME_LIMIT

LOGS = "submitit_logs"
MAX_FRUITLESS_RESTARTS = 3
TIME_LIMIT_MARGIN = 5.0  # seconds before the time limit from which SIGTERM is taken for SLURM's


# ---- history ------------------------------------------------------------------------------------------------------


def history(run_dir: RunDir, token: str | None = None) -> list[dict[str, Any]]:
    """Return the events of a run's jobs, or of one submission, oldest first."""
    file = run_dir.path / LOGS / "history.jsonl"
    lines = [line for line in read_lines(file) if "event" in line] if file.is_file() else []
    return [line for line in lines if token is None or line.get("token") == token]


def restarts_without_progress(lines: list[dict[str, Any]]) -> int:
    """Count the starts since one last resumed from a step that no earlier start had reached.

    A start that has not resumed yet counts itself: it is one too many only above the limit.
    """
    best, count = -1, 0
    for line in lines:
        if line["event"] == "start":
            count += 1
        elif line["event"] == "resumed" and line["step"] > best:
            best, count = line["step"], 0
    return count


def find_run_dir(logs: Path, job_id: str) -> RunDir | None:
    """Return the run directory of a job, given the folder of its batch script; None if that is none of ours."""
    if logs.name != LOGS:
        return None
    array, _, element = job_id.partition("_")
    if element:
        try:
            return RunDir(json.loads((logs / f"{array}_folders.json").read_text(encoding="utf-8"))[int(element)])
        except (OSError, ValueError, IndexError):
            return None
    return RunDir(logs.parent)


# ---- how a job ends -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExitDecision:
    """Status and reason of a run, and whether SLURM is asked to start its job again."""

    status: str
    reason: str
    requeue: bool = False


class JobStatus:
    """How SLURM treats a job; all False if it does not answer."""

    def __init__(self, job_id: str, restarts: int) -> None:
        fields = slurm.show_job(job_id)
        started = slurm.parse_time(fields.get("StartTime")) or 1
        self.known = bool(fields)
        self.requeued = int(fields.get("Restarts", "0")) > restarts
        self.preempted = (slurm.parse_time(fields.get("PreemptTime")) or 0) >= started
        self.late = time.time() >= (slurm.planned_end(fields) or float("inf")) - TIME_LIMIT_MARGIN
        ending = fields.get("JobState", "RUNNING") != "RUNNING"  # from outside, as after scancel
        self.cancelled = ending and not self.preempted and not self.late


@dataclass(frozen=True)
class JobLog:
    """One start of a job: notes it in the history of its run, and decides what becomes of it.

    `job_id` is 12, or 12_3 for an array element. `token` names the submission, since job ids may be reused. Without
    `max_requeues` it is requeued without a limit.
    """

    run_dir: RunDir
    job_id: str
    restarts: int = 0
    token: str = ""
    max_requeues: int | None = None
    rank: int = 0

    def note(self, event: str, **fields: Any) -> None:
        """Append a line to the history."""
        line = {"time": time.time(), "event": event, "token": self.token, "job": self.job_id, "restarts": self.restarts}
        append_line(self.run_dir.path / LOGS / "history.jsonl", json.dumps(line | fields))

    def history(self) -> list[dict[str, Any]]:
        return history(self.run_dir, self.token)

    def record_start(self, nodes: str, processes: int) -> None:
        """Note a start, and the end of the start before if that could not."""
        before = self.history()
        if self.restarts and before and before[-1]["event"] not in ("end", "decided", "submitted"):
            reason = "it ended without recording a reason, perhaps with its node; SLURM started it again"
            replace(self, restarts=self.restarts - 1).note("end", status="requeued", reason=reason)
        self.note("start", nodes=nodes)
        fields = {"job_id": self.job_id, "restarts": self.restarts, "processes": processes, "nodes": nodes}
        self.run_dir.write_summary(job=(self.run_dir.read_summary().get("job") or {}) | fields)

    def check_requeue_limits(self) -> None:
        """Raise UserError if the job came back too often; SLURM requeues jobs, too."""
        if self.max_requeues is not None and self.restarts > self.max_requeues:
            raise UserError(
                f"Job {self.job_id} was requeued {self.restarts} times; submitit.max_requeues is {self.max_requeues}. See "
                "submitit_logs/history.jsonl for the reasons. The same command submits it again."
            )
        if restarts_without_progress(self.history()) > MAX_FRUITLESS_RESTARTS:
            raise UserError(self._no_progress("it did not get as far as its checkpoint"))

    def record_resume(self, step: int) -> None:
        """Note from which step the run continues. Raises UserError after too many restarts without a new step."""
        self.note("resumed", step=step)
        if restarts_without_progress(self.history()) >= MAX_FRUITLESS_RESTARTS:
            raise UserError(self._no_progress(f"it is at step {step} again"))

    def planned_end(self) -> float | None:
        """Return when the job reaches its time limit, in seconds since the epoch."""
        return slurm.planned_end(slurm.show_job(self.job_id))

    def owns_summary(self) -> bool:
        """Return whether the summary is about this job and no other process works in the run directory."""
        return self.run_dir.job_id() == self.job_id and not self.run_dir.in_use()

    def classify_exit(self, error: BaseException, reason: str) -> ExitDecision:
        """Return what becomes of the job after an error or a request to stop."""
        lost, stop = is_peer_lost(error), error.cause if isinstance(error, StopRequested) else None
        cause = None
        # When a task fails, SLURM ends the others with the same signal as when the job is cancelled.
        if lost or stop == "SIGTERM":
            seconds = END_FILE_SECONDS if lost else 0.0
            cause = first_failure(self.run_dir, self.rank, seconds)
        now = JobStatus(self.job_id, self.restarts)
        if not (lost or stop or now.requeued):
            return ExitDecision("failed" if isinstance(error, Exception) else "interrupted", reason)
        if stop == "SIGTERM" and not now.known and not cause:
            return ExitDecision("interrupted", f"{reason}; SLURM does not say why")
        if lost and "EADDRINUSE" in str(error):
            why = f"the port that the processes meet at is taken on this node ({reason})"
        elif isinstance(error, PeerLostError):
            why = f"{reason} (perhaps with its node)"
        elif lost:
            why = f"another process is gone without recording a reason, perhaps with its node ({reason})"
        elif now.preempted:
            why = f"{reason} (preempted)"
        else:
            late = now.late or stop == TIME_LIMIT
            why = f"{reason} ({'time limit reached' if late else 'signalled by SLURM or by hand, not cancelled'})"
        return self._decide(now, reason, cause, why)

    def classify_batch_exit(self, code: int, why: str) -> ExitDecision:
        """Return what becomes of a job whose rank 0 could not decide.

        It is requeued if its processes ran in an earlier start and could not be started now (a dead node that SLURM does not
        know of), if a library aborted them (NCCL, when another process is gone), if a rank stopped sending heartbeats, and if
        they had to exit before they handled signals.
        """
        starts = [line["restarts"] for line in self.history() if line["event"] == "start"]
        now, never_ran = JobStatus(self.job_id, self.restarts), self.restarts not in starts
        number = code - 128 if code - 128 in set(signal.Signals) else 0
        name = f", {signal.Signals(number).name}" if number else ""
        why = why if never_ran else "its processes ended"
        reason = f"job {self.job_id}: {why} (exit code {code}{name}); see {LOGS}/"
        ends = read_end_files(self.run_dir)
        silent = [f"{end['reason']} (perhaps with its node)" for end in ends if end["kind"] == "peer silent"]
        had_to_exit = number in (signal.SIGABRT, signal.SIGUSR2) or now.preempted or now.late
        comes_back = silent or had_to_exit or (never_ran and starts)
        cause = first_failure(self.run_dir) or (None if comes_back else reason)
        return self._decide(now, reason, cause, silent[0] if silent else reason)

    def _decide(self, now: JobStatus, reason: str, cause: str | None, why: str) -> ExitDecision:
        """Requeue a job because of `why`, unless SLURM did, it was cancelled, a rank failed (`cause`), or a limit is met."""
        job = f"job {self.job_id}"
        if now.requeued:
            return ExitDecision("requeued", f"{reason}; SLURM has put {job} back into the queue")
        if now.cancelled:
            return ExitDecision("interrupted", f"{reason}; {job} was cancelled")
        if cause:
            return ExitDecision("failed", cause)
        if self.max_requeues is not None and self.restarts >= self.max_requeues:
            limit = f"submitit.max_requeues is {self.max_requeues}"
            return ExitDecision("interrupted", f"{why}; {job} is not requeued: {limit}")
        lines = self.history()
        last_start = max((line["restarts"] for line in lines if line["event"] == "start"), default=0)
        stuck = restarts_without_progress(lines) > MAX_FRUITLESS_RESTARTS
        if stuck or self.restarts - last_start >= MAX_FRUITLESS_RESTARTS:
            return ExitDecision("failed", f"{why}; {self._no_progress('it does not get as far as its checkpoint')}")
        return ExitDecision("requeued", f"{why}; {job} goes back into the queue", requeue=True)

    def _no_progress(self, what: str) -> str:
        return (
            f"Job {self.job_id} was restarted {MAX_FRUITLESS_RESTARTS} times without progress: {what}. Lower "
            "trainer.checkpoint.save_every_steps or raise submitit.timeout_hour, see submitit_logs/ for what ended the starts, "
            "and give the same command again."
        )

    def apply_exit(self, decision: ExitDecision, writes_summary: bool) -> None:
        """Write a decision (to the summary with `writes_summary`), then requeue the job, or cancel those that wait for it.

        It is written first: SLURM kills this process as soon as it has agreed to requeue.
        """

        def write(decision: ExitDecision) -> None:
            self.note("end", status=decision.status, reason=decision.reason)
            if writes_summary:
                self.run_dir.write_end(decision.status, decision.reason)

        write(decision)
        if decision.requeue and (message := slurm.requeue(self.job_id)):
            decision = ExitDecision("failed", f"{decision.reason}, but SLURM refused: {message}")
            write(decision)
        if decision.status not in WAITING:
            problem = f"job {self.job_id} ({self.run_dir.path}) did not end well: {decision.reason}"
            finalize_dependents(self.job_id, problem)


# ---- jobs that wait for others ------------------------------------------------------------------------------------


def parse_dependencies(dependency: str) -> Iterator[tuple[str, str]]:
    """Yield what a job waits for: a condition, and the id of a job (12, 12_3, or 12_* for a whole array).

    Nothing for alternatives (with question marks): one that failed does not end such a job.
    """
    if "?" in dependency:
        return
    for entry in dependency.split(","):
        condition, *ids = re.sub(r"\(.*\)", "", entry).split(":")
        yield from ((condition, job_id.partition("+")[0]) for job_id in ids)


def write_cancelled(run_dir: RunDir, job_id: str, problem: str) -> None:
    """Write that a job never starts because of a `problem` of its dependency. SLURM itself removes it from the queue."""
    reason = f"its dependency failed: {problem}"
    JobLog(run_dir, job_id).note("end", status="cancelled", reason=reason)
    run_dir.write_summary(status="cancelled", exit_reason=reason)


def finalize_dependents(job_id: str, problem: str) -> None:
    """Write that waiting jobs that need this one to end well are cancelled, and those that need them."""
    names = {job_id, f"{job_id.partition('_')[0]}_*"}
    for other, state in (slurm.squeue_or_none() or {}).items():
        run_dir = find_run_dir(Path(state.command).parent, other)
        needs_it = any(each == "afterok" and job in names for each, job in parse_dependencies(state.dependency))
        if run_dir is None or not needs_it or run_dir.job_id() != other:
            continue
        if run_dir.read_summary().get("status") in WAITING:
            write_cancelled(run_dir, other, problem)
            finalize_dependents(other, problem)


# ---- the status of a run ------------------------------------------------------------------------------------------


def run_status(run_dir: RunDir, queue: Mapping[str, slurm.JobState] | None) -> tuple[str, str]:
    """Return a run's status and reason, and write them if it ended without recording a reason.

    `queue` is that of SLURM, None without one.
    """
    summary = run_dir.read_summary()
    status, reason = str(summary.get("status", "not begun")), str(summary.get("exit_reason") or "")
    job = summary.get("job") or {}
    if status == "running" and "job_id" not in job and not run_dir.in_use():
        status, reason = (
            "failed",
            "its process ended without recording a reason: it was killed, or its machine was restarted",
        )
    elif queue is not None and "job_id" in job and status in (*WAITING, "running"):
        state = queue.get(job["job_id"])
        # After SLURM was set up anew the number may be another job's.
        if state is None or ("logs" in job and Path(state.command).parent != Path(job["logs"])):
            return "lost", f"SLURM does not know job {job['job_id']} any more; it was {status}"
        what = f"job {job['job_id']} is {state.state}"
        if state.never_starts:
            status, reason = "cancelled", f"its dependency failed: {state.dependency or state.reason}"
        elif state.state == "CANCELLED":  # such a job keeps the reason for which it waited
            status, reason = "cancelled", f"{what} ({state.comment or 'ended from outside'})"
        elif state.is_over:
            status, reason = "failed", f"{what} ({state.comment or state.reason or 'no reason given'})"
        elif state.state == "PENDING":
            reason = f"job {job['job_id']} waits ({state.reason})"
        else:
            reason = reason if status == "running" and reason else what
    if status in ("cancelled", "failed") and status != summary.get("status"):
        with contextlib.suppress(OSError):  # another one's run
            run_dir.write_summary(status=status, exit_reason=reason)
    return status, reason


# ---- commands of the scripts --------------------------------------------------------------------------------------


def record_batch_exit(logs: Path, job_id: str, code: int, why: str = "its processes could not be started") -> bool:
    """Write the end of a job whose processes exited with `code`, if rank 0 could not; `why` is a reason if they never ran.

    Returns whether the run had finished before: then the job has ended well, and jobs that wait for it may start.
    """
    run_dir, restarts = find_run_dir(logs, job_id), slurm_restart_count()
    if run_dir is None:
        return False
    token = next((line["token"] for line in reversed(history(run_dir)) if line.get("job") == job_id), "")
    lines = history(run_dir, token)
    if ends := [line for line in lines if line["event"] == "end" and line.get("restarts") == restarts]:
        now = JobStatus(job_id, restarts)
        if ends[-1]["status"] == "requeued" and now.known and not (now.requeued or now.cancelled):
            slurm.requeue(job_id, attempts=1)  # rank 0 was killed before it could
        return bool(ends[-1]["status"] == "finished")
    submitted = next((line for line in lines if line["event"] == "submitted"), {})
    finished = run_dir.job_id() == job_id and run_dir.read_summary().get("status") == "finished"
    if finished and submitted.get("mode") in ("train", "train_only"):
        return True  # all epochs were done, whatever became of the processes afterwards
    log = JobLog(run_dir, job_id, restarts, token, submitted.get("max_requeues"))
    log.apply_exit(log.classify_batch_exit(code, why), writes_summary=True)
    return False


def main(arguments: list[str]) -> None:
    match arguments:
        case ["ended", logs, job_id, code, *why]:
            sys.exit(0 if record_batch_exit(Path(logs), job_id, int(code), *why) else 1)
        case ["status", folder]:
            print(": ".join(filter(None, run_status(RunDir(folder), slurm.squeue_or_none()))))
        case ["cancelled" | "unsubmitted" as how, folder, reason]:
            Path(folder).mkdir(parents=True, exist_ok=True)
            kept = ["finished", "running", *WAITING, *(["failed", "interrupted"] if how == "unsubmitted" else [])]
            if run_status(RunDir(folder), slurm.squeue_or_none())[0] not in kept:
                RunDir(folder).write_summary(status="cancelled", exit_reason=reason)
            print(f"{folder}: {reason}")
        case _:
            sys.exit(
                "usage: python -m omnivision.launch.slurm_jobs ended LOGS JOB CODE [WHY] | status FOLDER | "
                "cancelled FOLDER REASON | unsubmitted FOLDER REASON"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
