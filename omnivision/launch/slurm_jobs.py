"""A run's SLURM jobs: `submitit_logs/history.jsonl`, how a job ends, and whether it comes back.

`python -m omnivision.launch.slurm_jobs ended ...` is the last line of every batch script: it writes down the end of a run whose
processes could not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnivision.launch import slurm
from omnivision.launch.exit import END_FILE_SECONDS, first_failure, lost_peer
from omnivision.launch.watchdog import is_peer_lost
from omnivision.reporting.logs import read_lines
from omnivision.reporting.run_directory import WAITING, RunDir, own_job, own_restarts
from omnivision.utils.errors import PeerLostError, StopRequested, UserError
from omnivision.utils.io import append_line, write_atomically
from omnivision.utils.signals import TIME_LIMIT, StopSignal

if TYPE_CHECKING:
    from omnivision.distributed.process_group import RankInfo

LOGS = "submitit_logs"
PORTS_PER_JOB = 13  # one for each start, so that a port left open by the start before is no obstacle
MAX_FRUITLESS_RESTARTS = 3
DECISION_SECONDS = 60.0  # that other ranks wait for rank 0 to have the job requeued
TIME_LIMIT_MARGIN = 5.0  # seconds before the time limit from which SIGTERM is taken for SLURM's
SECRET = re.compile(r"key|token|secret|pass|_pwd|dsn|cred|auth|cookie|private|signature|session", re.IGNORECASE)
URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # user:password@


@dataclass(frozen=True)
class Task:
    """A task of a SLURM job. `job_id` is 12, or 12_3 for an array element; `number` is SLURM_JOB_ID, which for the last element
    equals the array's id.
    """

    job_id: str
    number: int
    rank: int
    world: int
    local_rank: int
    local_world: int
    restarts: int
    nodes: str

    @classmethod
    def from_environment(cls) -> Task:
        env, job_id = os.environ, own_job()
        assert job_id is not None, "not in a SLURM job"
        world = int(env["SLURM_NTASKS"])
        return cls(
            job_id,
            number=int(env["SLURM_JOB_ID"]),
            rank=int(env["SLURM_PROCID"]),
            world=world,
            local_rank=int(env["SLURM_LOCALID"]),
            local_world=world // int(env["SLURM_JOB_NUM_NODES"]),
            restarts=own_restarts(),
            nodes=env["SLURM_JOB_NODELIST"],
        )

    def place(self, host: str) -> RankInfo:
        """Return its place among the run's processes, which meet at a port of `host`.

        The port belongs to the job: the next 1500 jobs have others, and no system hands out one of those by itself.
        """
        from omnivision.distributed.process_group import RankInfo

        own = (PORTS_PER_JOB * self.number + self.restarts % PORTS_PER_JOB) % (PORTS_PER_JOB * 1500)
        port = int(os.environ.get("MASTER_PORT") or 10_000 + own)
        address = f"tcp://{host}:{port}" if self.world > 1 else None
        return RankInfo(self.rank, self.world, self.local_rank, self.local_world, address)


def public_environment() -> dict[str, str | None]:
    """Return the variables of this process; of those that sound secret, the name alone."""
    return {
        name: None if SECRET.search(name) else URL_CREDENTIALS.sub("...", value)
        for name, value in sorted(os.environ.items())
    }


# ---- history ------------------------------------------------------------------------------------------------------


def note(folder: RunDir, event: str, token: str, **fields: Any) -> None:
    """Append a line to the history of a run's jobs. `token` names the submission, since job ids may be reused."""
    line = {"time": time.time(), "event": event, "token": token, **fields}
    append_line(folder.path / LOGS / "history.jsonl", json.dumps(line))


def history(folder: RunDir, token: str | None = None) -> list[dict[str, Any]]:
    """Return the events of a run's jobs, or of one submission, oldest first."""
    file = folder.path / LOGS / "history.jsonl"
    lines = [line for line in read_lines(file) if isinstance(line.get("event"), str)] if file.is_file() else []
    return [line for line in lines if token is None or line.get("token") == token]


def restarts_without_progress(lines: list[dict[str, Any]]) -> int:
    """Count the starts since one last resumed from a step that no earlier start had reached."""
    best, count = -1, 0
    for line in lines:
        if line["event"] == "start":
            count += 1
        elif line["event"] == "resumed" and line["step"] > best:
            best, count = line["step"], 0
    return count


def run_folder_of(logs: Path, job_id: str) -> RunDir | None:
    """Return the run folder of a job, given the folder of its batch script; None if that is none of ours."""
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


@dataclass(frozen=True)
class JobStatus:
    """What SLURM is doing with a job; all False if it does not answer."""

    requeued: bool
    preempted: bool
    late: bool  # its time limit has come, or nearly
    running: bool
    ending: bool  # from outside, as after scancel

    @classmethod
    def of(cls, job_id: str, restarts: int) -> JobStatus:
        fields = slurm.show_job(job_id)
        return cls(
            requeued=int(fields.get("Restarts", "0")) > restarts,
            preempted=(slurm.parse_time(fields.get("PreemptTime")) or 0)
            >= (slurm.parse_time(fields.get("StartTime")) or 1),
            late=time.time() >= (slurm.planned_end(fields) or float("inf")) - TIME_LIMIT_MARGIN,
            running=fields.get("JobState") == "RUNNING",
            ending=fields.get("JobState", "RUNNING") != "RUNNING",
        )

    @property
    def cancelled(self) -> bool:
        return self.ending and not self.preempted and not self.late


class JobLog:
    """Notes the starts and the end of a job in the history of its run. Rank 0 alone writes and decides."""

    def __init__(self, task: Task, folder: RunDir, token: str, max_requeues: int, watch_the_clock: bool) -> None:
        """With `watch_the_clock` the run leaves by itself before the time limit; else SLURM's signal makes it leave."""
        self.task, self.folder, self.token = task, folder, token
        self.max_requeues, self.watch_the_clock = max_requeues, watch_the_clock

    def note(self, event: str, **fields: Any) -> None:
        note(self.folder, event, self.token, job=self.task.job_id, restarts=self.task.restarts, **fields)

    def history(self) -> list[dict[str, Any]]:
        return history(self.folder, self.token)

    def record_start(self) -> None:
        """Write down where the job runs and in which environment."""
        task, logs = self.task, self.folder.path / LOGS
        logs.mkdir(parents=True, exist_ok=True)
        write_atomically(logs / f"{task.job_id}_environment.json", json.dumps(public_environment(), indent=1) + "\n")
        before = self.history()
        if task.restarts and before and before[-1]["event"] not in ("end", "decided", "submitted"):
            reason = "it ended without a word, perhaps with its node; SLURM started it again"
            note(self.folder, "end", self.token, job=task.job_id, status="requeued", reason=reason)
        self.note("start", nodes=task.nodes)
        fields = {"job_id": task.job_id, "restarts": task.restarts, "processes": task.world, "nodes": task.nodes}
        self.folder.write_summary(job=(self.folder.read_summary().get("job") or {}) | fields)

    def check_requeue_limits(self, stop: StopSignal) -> None:
        """Raise UserError if the job came back too often; else set the deadline of `stop`."""
        if self.task.restarts > self.max_requeues:
            raise UserError(
                f"Job {self.task.job_id} was requeued {self.task.restarts} times; submitit.max_requeues is "
                f"{self.max_requeues}. See submitit_logs/history.jsonl for the reasons. The same command submits it again."
            )
        if restarts_without_progress(self.history()) > MAX_FRUITLESS_RESTARTS:
            raise UserError(no_progress(self.task.job_id, "it did not get as far as its checkpoint"))
        if self.watch_the_clock:
            stop.end_at(slurm.planned_end(slurm.show_job(self.task.job_id)))

    def record_resume(self, step: int) -> None:
        """Note from which step the run continues. Raises UserError after too many restarts without a new step."""
        self.note("resumed", step=step)
        if restarts_without_progress(self.history()) >= MAX_FRUITLESS_RESTARTS:
            raise UserError(no_progress(self.task.job_id, f"it is at step {step} again"))

    def record_end(self, error: BaseException, reason: str, tells: bool) -> None:
        """Decide as rank 0 what becomes of the job, and do it; the summary is written only if it `tells` of this job."""
        apply_exit(self.classify_exit(error, reason), self.task, self.folder, self.token, tells)
        self.note("decided")

    def classify_exit(self, error: BaseException, reason: str) -> ExitDecision:
        """Return what becomes of the job after an error or a request to stop."""
        job, lost = f"job {self.task.job_id}", is_peer_lost(error)
        seconds = END_FILE_SECONDS if lost else 0.0
        cause = first_failure(self.folder, self.task.job_id, self.task.restarts, self.task.rank, seconds)
        now = JobStatus.of(self.task.job_id, self.task.restarts)
        if now.requeued:
            return ExitDecision("requeued", f"{reason}; SLURM has put {job} back into the queue")
        cancelled = ExitDecision("interrupted", f"{reason}; {job} was cancelled")
        if isinstance(error, StopRequested):
            # When a task fails, SLURM ends the others with the same signal as when the job is cancelled.
            if error.cause == "SIGTERM" and cause:
                return ExitDecision("failed", cause)
            if now.cancelled:
                return cancelled
            if now.preempted:
                why = "preempted"
            elif now.late or error.cause == TIME_LIMIT:
                why = "its time is over"
            elif error.cause == "SIGTERM" and not now.running:
                return ExitDecision("interrupted", f"{reason}; SLURM does not say why")
            else:
                why = "signalled by SLURM or by hand, not cancelled"
        elif lost:
            if cause:
                return ExitDecision("failed", cause)
            if now.cancelled:
                return cancelled
            if "EADDRINUSE" in str(error):
                reason, why = "the port that the processes meet at is taken on this node", reason
            elif isinstance(error, PeerLostError):
                why = "perhaps with its node"
            else:
                reason, why = "another process is gone without a word, perhaps with its node", reason
        else:
            return ExitDecision("failed" if isinstance(error, Exception) else "interrupted", reason)
        return decide_requeue(f"{reason} ({why})", self.task, self.max_requeues, self.history())

    def wait_for_decision(self, error: BaseException) -> None:
        """As another rank than 0, wait until rank 0 has decided: SLURM ends all tasks when one has left.

        Nobody waits for a rank 0 that is itself silent, nor after an error of one's own.
        """
        silent = isinstance(error, PeerLostError) and not error.gone
        if silent or not (isinstance(error, StopRequested) or is_peer_lost(error)):
            return
        deadline = time.monotonic() + DECISION_SECONDS
        while time.monotonic() < deadline:
            if any(
                line["event"] == "decided" and line.get("restarts") == self.task.restarts for line in self.history()
            ):
                return
            time.sleep(0.2)

    def owns_summary(self) -> bool:
        """Return whether the summary is about this job and no other process works in the run folder."""
        try:
            self.folder.require_free()
        except UserError:
            return False
        return (self.folder.read_summary().get("job") or {}).get("job_id") == self.task.job_id


def no_progress(job_id: str, what: str) -> str:
    return (
        f"Job {job_id} was restarted {MAX_FRUITLESS_RESTARTS} times without progress: {what}. Lower "
        "trainer.checkpoint.save_every_steps or raise submitit.timeout_hour, see submitit_logs/ for what ended the starts, and "
        "give the same command again."
    )


def decide_requeue(reason: str, task: Task, limit: int | None, lines: list[dict[str, Any]]) -> ExitDecision:
    """Requeue a job unless it reached `limit` or makes no progress; `lines` are its history."""
    job = f"job {task.job_id}"
    if limit is not None and task.restarts >= limit:
        return ExitDecision("interrupted", f"{reason}; {job} does not come back: submitit.max_requeues is {limit}")
    last_start = max((line["restarts"] for line in lines if line["event"] == "start"), default=0)
    stuck = restarts_without_progress(lines) > MAX_FRUITLESS_RESTARTS
    if stuck or task.restarts - last_start >= MAX_FRUITLESS_RESTARTS:
        return ExitDecision(
            "failed", f"{reason}; {no_progress(task.job_id, 'it does not get as far as its checkpoint')}"
        )
    return ExitDecision("requeued", f"{reason}; {job} goes back into the queue", requeue=True)


def apply_exit(decision: ExitDecision, task: Task, folder: RunDir, token: str, tells: bool) -> None:
    """Write a decision down (in the summary only if it `tells` of this job), then requeue the job or finalize its dependents.

    It is written first: SLURM kills this process as soon as it has agreed to requeue.
    """

    def write(decision: ExitDecision) -> None:
        fields = {"status": decision.status, "reason": decision.reason}
        note(folder, "end", token, job=task.job_id, restarts=task.restarts, **fields)
        if tells:
            folder.write_end(decision.status, decision.reason)

    write(decision)
    if decision.requeue and (message := slurm.requeue(task.job_id)):
        decision = ExitDecision("failed", f"{decision.reason}, but SLURM refused: {message}")
        write(decision)
    if decision.status not in WAITING:
        finalize_dependents(task.job_id, dependency_message(task.job_id, folder, decision.reason))


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


def dependency_message(job_id: str, folder: RunDir, reason: str) -> str:
    return f"it waited for job {job_id} ({folder.path}), which did not end well: {reason}"


def finalize_dependents(job_id: str, reason: str) -> None:
    """Write "cancelled" and the reason into the summaries of jobs that need this one to end well, and of those that need them.

    SLURM itself removes them from the queue.
    """
    names = {job_id, f"{job_id.partition('_')[0]}_*"}
    for other, state in (slurm.squeue_or_none() or {}).items():
        if any(condition == "afterok" and job in names for condition, job in parse_dependencies(state.dependency)):
            folder = run_folder_of(Path(state.command).parent, other)
            summary = {} if folder is None else folder.read_summary()
            waiting = summary.get("status") in WAITING and (summary.get("job") or {}).get("job_id") == other
            if folder is not None and waiting:
                note(folder, "end", token="", job=other, status="cancelled", reason=reason)
                folder.write_summary(status="cancelled", exit_reason=reason)
                finalize_dependents(other, reason)


# ---- the status of a run ------------------------------------------------------------------------------------------


def resolve_status(summary: Mapping[str, Any], queue: Mapping[str, slurm.JobState] | None) -> tuple[str, str]:
    """Return a run's status and reason, from its summary and from `queue`: its job may have ended without a word."""
    status, reason = str(summary.get("status", "not begun")), str(summary.get("exit_reason") or "")
    job = summary.get("job") or {}
    job_id, logs = job.get("job_id"), job.get("logs")
    if queue is None or job_id is None or status not in (*WAITING, "running"):
        return status, reason
    state = queue.get(job_id)
    # After SLURM was set up anew the number may be another job's.
    if state is None or (logs is not None and Path(state.command).parent != Path(logs)):
        return "lost", f"SLURM does not know job {job_id} any more; it was {status}"
    if state.never_starts:
        failed = [prior for prior in re.findall(r"(\d+)(?:_\S+?)?\(failed\)", state.dependency) if prior in queue]
        folders = ", ".join(f"job {prior} of {Path(queue[prior].command).parents[1]}" for prior in failed)
        return "cancelled", f"it waited for what did not end well: {folders or state.dependency or state.reason}"
    if state.is_over:
        cancelled = state.state == "CANCELLED"  # such a job keeps the reason for which it waited
        why = state.comment or ("ended from outside" if cancelled else state.reason) or "no reason given"
        return "cancelled" if cancelled else "failed", f"job {job_id} is {state.state} ({why})"
    if state.state == "PENDING":
        return status, f"job {job_id} waits ({state.reason})"
    if status in WAITING and state.state == "RUNNING":
        return status, f"job {job_id} is starting"
    return status, reason or f"job {job_id} is {state.state}"


def settle_status(folder: RunDir, queue: Mapping[str, slurm.JobState] | None) -> tuple[str, str]:
    """Return a run's status and reason as `resolve_status` does, and write them down if the run ended without a word."""
    summary = folder.read_summary()
    status, reason = resolve_status(summary, queue)
    on_cluster = (summary.get("job") or {}).get("job_id") is not None
    if status == "running" and not on_cluster and folder.in_use() is None:
        status, reason = "failed", "its process ended without a word: it was killed, or its machine was restarted"
    if status in ("cancelled", "failed") and status != summary.get("status"):
        with contextlib.suppress(OSError):  # another one's run
            folder.write_summary(status=status, exit_reason=reason)
    return status, reason


# ---- the end of a batch script ------------------------------------------------------------------------------------

SIGNAL_HINTS = {
    signal.SIGKILL: ", as when memory runs out",
    signal.SIGBUS: ", as when a .npy file of a split is overwritten in place or /dev/shm is full",
}


def record_batch_exit(logs: Path, job_id: str, code: int, why: str = "its processes could not be started") -> bool:
    """Write down the end of a job whose processes left with `code`, if rank 0 could not; `why` they never ran.

    Returns whether the run had finished before: then the job has ended well, and jobs that wait for it may start. The job is
    requeued if its processes ran in an earlier start and could not be started now (a dead node that SLURM does not know of), if
    a library aborted them (NCCL, when another process is gone), and if they had to leave before they handled signals.
    """
    folder, restarts = run_folder_of(logs, job_id), own_restarts()
    if folder is None:
        return False
    token = next((line["token"] for line in reversed(history(folder)) if line.get("job") == job_id), "")
    lines = history(folder, token)
    if ends := [line for line in lines if line["event"] == "end" and line.get("restarts") == restarts]:
        return bool(ends[-1].get("status") == "finished")
    submitted = next((line for line in lines if line["event"] == "submitted"), {})
    summary = folder.read_summary()
    is_ours = (summary.get("job") or {}).get("job_id") == job_id
    if is_ours and summary.get("status") == "finished" and submitted.get("mode") in ("train", "train_only"):
        return True  # all epochs were done, whatever became of the processes afterwards
    decision = classify_batch_exit(folder, job_id, restarts, lines, code, why, f"{logs}/{job_id}_batch.log")
    apply_exit(decision, Task(job_id, 0, 0, 0, 0, 0, restarts, ""), folder, token, tells=True)
    return False


def classify_batch_exit(
    folder: RunDir, job_id: str, restarts: int, lines: list[dict[str, Any]], code: int, why: str, log: str
) -> ExitDecision:
    """Return what becomes of a job whose rank 0 could not say it; `lines` are its history, `log` the batch script's output."""
    starts = [line["restarts"] for line in lines if line["event"] == "start"]
    now, never_ran = JobStatus.of(job_id, restarts), restarts not in starts
    number = code - 128 if code - 128 in set(signal.Signals) else 0
    name = f", {signal.Signals(number).name}{SIGNAL_HINTS.get(number, '')}" if number else ""  # type: ignore[call-overload]
    what = why if never_ran else "its processes ended"
    reason = f"job {job_id}: {what} (exit code {code}{name}); see {log} and its tasks' logs beside it"
    if now.requeued:
        return ExitDecision("requeued", f"{reason}; SLURM has put it back into the queue")
    if now.cancelled:
        return ExitDecision("interrupted", f"job {job_id} was cancelled before its processes could save anything more")
    if cause := first_failure(folder, job_id, restarts):
        return ExitDecision("failed", cause)
    had_to_leave = number in (signal.SIGABRT, signal.SIGUSR2) or now.preempted or now.late or (never_ran and starts)
    if lost := lost_peer(folder, job_id, restarts):
        reason = f"{lost} (perhaps with its node)"
    elif not had_to_leave:
        return ExitDecision("failed", reason)
    limit = next((line.get("max_requeues") for line in lines if line["event"] == "submitted"), None)
    return decide_requeue(reason, Task(job_id, 0, 0, 0, 0, 0, restarts, ""), limit, lines)


def main(arguments: list[str]) -> None:
    match arguments:
        case ["ended", logs, job_id, code, *why]:
            sys.exit(0 if record_batch_exit(Path(logs), job_id, int(code), *why) else 1)
        case ["status", folder]:
            print(": ".join(filter(None, settle_status(RunDir(folder), slurm.squeue_or_none()))))
        case ["cancelled" | "unsubmitted" as how, folder, reason]:
            Path(folder).mkdir(parents=True, exist_ok=True)
            status, _ = resolve_status(RunDir(folder).read_summary(), slurm.squeue_or_none())
            kept = ("failed", "interrupted") if how == "unsubmitted" else ()
            if status not in ("finished", "running", *kept, *WAITING):
                RunDir(folder).write_summary(status="cancelled", exit_reason=reason)
            print(f"{folder}: {reason}")
        case _:
            sys.exit(
                "usage: python -m omnivision.launch.slurm_jobs ended LOGS JOB CODE [WHY] | status FOLDER | "
                "cancelled FOLDER REASON | unsubmitted FOLDER REASON"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
