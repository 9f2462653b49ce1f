"""Looks after a run on behalf of its SLURM job: what it is allowed, what becomes of it, and that it comes back.

`python -m omnivision.launch.job_record ended ...` is the last line of every batch script: it writes down the end of a run
that could not do so itself.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnivision.launch import slurm
from omnivision.launch.jobs import (
    LOGS,
    Task,
    cancel_dependents,
    environment,
    fruitless_starts,
    history,
    last_words,
    note,
    queue_or_none,
    run_folder_of,
    settled,
    waited_for,
)
from omnivision.launch.watchdog import is_peer_lost
from omnivision.reporting.run_directory import WAITING, RunDir, own_restarts
from omnivision.utils.errors import PeerLostError, StopRequested, UserError
from omnivision.utils.io import write_atomically
from omnivision.utils.signals import TIME_LIMIT, StopSignal

NO_PROGRESS = 3  # restarts without a new step that end a job
LAST_WORDS_SECONDS = 2.0  # for a process that fails to say so before process 0 decides
DECISION_SECONDS = 60.0  # that the others wait for process 0 to have its job requeued
TOLD_TO_LEAVE = "told to leave, by SLURM before the time limit or by hand"
NEAR_THE_END_SECONDS = 5.0  # of a job's time: SIGTERM is then SLURM's, because the time is over


@dataclass(frozen=True)
class Verdict:
    """How a run is left, why, and whether to ask SLURM to start its job again."""

    status: str
    reason: str
    requeue: bool = False


@dataclass(frozen=True)
class Standing:
    """What SLURM has in mind with a job."""

    requeued: bool  # it has put the job back into the queue since
    preempted: bool
    late: bool  # the time is over, or nearly
    ended: bool  # from outside, as by a cancellation

    @classmethod
    def of(cls, job_id: str, restarts: int) -> Standing:
        """Of a job that was restarted so often; nothing at all when SLURM does not answer."""
        facts = slurm.job_facts(job_id)
        return cls(
            requeued=int(facts.get("Restarts", "0")) > restarts,
            preempted=(slurm.moment(facts.get("PreemptTime")) or 0) >= (slurm.moment(facts.get("StartTime")) or 1),
            late=time.time() >= (slurm.planned_end(facts) or float("inf")) - NEAR_THE_END_SECONDS,
            ended=facts.get("JobState", "RUNNING") != "RUNNING",
        )

    @property
    def cancelled(self) -> bool:
        return self.ended and not self.preempted and not self.late


class JobRecord:
    """What each process of a job has; process 0's alone decides and writes, but for `fault`."""

    def __init__(self, task: Task, folder: RunDir, token: str, max_requeues: int, watch_the_clock: bool) -> None:
        """With `watch_the_clock` the run leaves by itself before the time limit; else SLURM's signal tells it to."""
        self.task, self.folder, self.token = task, folder, token
        self.max_requeues, self.watch_the_clock = max_requeues, watch_the_clock

    def note(self, event: str, **facts: Any) -> None:
        """Add a line to the history of the run folder's jobs."""
        note(self.folder, event, self.token, job=self.task.job_id, restarts=self.task.restarts, **facts)

    def start(self) -> None:
        """Write down where the job runs and in which environment."""
        logs = self.folder.path / LOGS
        logs.mkdir(parents=True, exist_ok=True)
        write_atomically(logs / f"{self.task.job_id}_environment.json", json.dumps(environment(), indent=1) + "\n")
        before = history(self.folder, self.token)
        if self.task.restarts and before and before[-1]["event"] not in ("end", "decided", "submitted"):
            reason = "it ended without a word, with its node perhaps; SLURM started it again"
            note(self.folder, "end", self.token, job=self.task.job_id, status="requeued", reason=reason)
        self.note("start", nodes=self.task.nodes)
        told = {"restarts": self.task.restarts, "processes": self.task.world, "nodes": self.task.nodes}
        known = self.folder.read_summary().get("job") or {}
        self.folder.write_summary(job=known | {"job_id": self.task.job_id} | told)

    def allow(self, stop: StopSignal) -> None:
        """Raises UserError when the job came back too often; else tells `stop` when its time is over."""
        if self.task.restarts > self.max_requeues:
            raise UserError(
                f"Job {self.task.job_id} was requeued {self.task.restarts} times; expected at most {self.max_requeues} "
                "(submitit.max_requeues). Look in submitit_logs/history.jsonl why. The same command submits it again."
            )
        if fruitless_starts(history(self.folder, self.token)) > NO_PROGRESS:
            raise UserError(no_progress(self.task.job_id, "did not get as far as its checkpoint"))
        if self.watch_the_clock:
            stop.end_at(slurm.planned_end(slurm.job_facts(self.task.job_id)))

    def resumed(self, step: int) -> None:
        """The run goes on from `step`. Raises UserError when three restarts have brought nothing."""
        self.note("resumed", step=step)
        if fruitless_starts(history(self.folder, self.token)) >= NO_PROGRESS:
            raise UserError(no_progress(self.task.job_id, f"stands at step {step} again"))

    def end(self, error: BaseException, reason: str, tells: bool) -> None:
        """Write down how the run ended, in its summary if that `tells` of it, and put the job back into the queue if it is to
        come back. Jobs that wait for one that does not are told why they will not start.
        """
        verdict = self.verdict(error, reason)
        carry_out(verdict, self.task, self.folder if tells else None, self.folder, self.token)
        self.note("decided")

    def verdict(self, error: BaseException, reason: str) -> Verdict:
        """What becomes of a job after an error or a request to stop."""
        job, lost = f"job {self.task.job_id}", is_peer_lost(error)
        if lost:
            time.sleep(LAST_WORDS_SECONDS)
        now = Standing.of(self.task.job_id, self.task.restarts)
        if now.requeued:
            return Verdict("requeued", f"{reason}; SLURM has put {job} back into the queue")
        cancelled = Verdict("interrupted", f"{reason}; {job} was cancelled")
        if isinstance(error, StopRequested):
            # When a process fails, SLURM ends the others, with the same signal as when the job is cancelled.
            if error.cause == "SIGTERM" and (told := last_words(history(self.folder, self.token), self.task.restarts)):
                return Verdict("failed", told)
            if now.cancelled or (error.cause == "SIGTERM" and not now.preempted and not now.late):
                return cancelled
            over = now.late or error.cause == TIME_LIMIT
            why = "preempted" if now.preempted else "its time is over" if over else TOLD_TO_LEAVE
        elif lost:
            if told := last_words(history(self.folder, self.token), self.task.restarts):
                return Verdict("failed", told)
            if now.cancelled:
                return cancelled
            if "EADDRINUSE" in str(error):
                reason, why = "the port that the processes meet at is taken on this node", reason
            elif isinstance(error, PeerLostError):
                why = "with its node perhaps"
            else:
                reason, why = "another process is gone without a word, with its node perhaps", reason
        else:
            return Verdict("failed" if isinstance(error, Exception) else "interrupted", reason)
        return coming_back(f"{reason} ({why})", self.task, self.max_requeues, history(self.folder, self.token))

    def fault(self, error: BaseException, reason: str) -> None:
        """Say in the history, as another process than 0, what failed here: process 0 only sees that it is gone. After a
        request to stop, or when others are gone, wait until process 0 has decided: SLURM ends all when one has left. When it is
        process 0 that is silent, nobody is left to wait for.
        """
        if isinstance(error, PeerLostError) and not error.gone:  # SLURM tells what killed one that is gone
            self.note("lost", rank=self.task.rank, reason=reason)
        elif isinstance(error, StopRequested) or is_peer_lost(error):
            deadline = time.monotonic() + DECISION_SECONDS
            while not self._decided() and time.monotonic() < deadline:
                time.sleep(0.2)
        elif not isinstance(error, (KeyboardInterrupt, UserError)):
            self.note("fault", rank=self.task.rank, reason=reason)

    def tells(self) -> bool:
        """Whether the summary is about this job, and no other process is at work in the run folder."""
        try:
            self.folder.require_free()
        except UserError:
            return False
        return (self.folder.read_summary().get("job") or {}).get("job_id") == self.task.job_id

    def _decided(self) -> bool:
        lines = history(self.folder, self.token)
        return any(line["event"] == "decided" and line.get("restarts") == self.task.restarts for line in lines)


def no_progress(job_id: str, what: str) -> str:
    return (
        f"Job {job_id} was restarted {NO_PROGRESS} times without progress: it {what}. Each start must get as far as a new "
        "checkpoint: lower trainer.checkpoint.save_every_steps or raise submitit.timeout_hour, look into submitit_logs/ for "
        "what ended the starts, and give the same command again."
    )


def coming_back(reason: str, task: Task, limit: int | None, lines: list[dict[str, Any]]) -> Verdict:
    """A job is to start again, unless it did so as often as it may, or for nothing; `lines` are its history."""
    if limit is not None and task.restarts >= limit:
        told = f"job {task.job_id} does not come back: submitit.max_requeues is {limit}"
        return Verdict("interrupted", f"{reason}; {told}")
    last_start = max((line["restarts"] for line in lines if line["event"] == "start"), default=0)
    if fruitless_starts(lines) > NO_PROGRESS or task.restarts - last_start >= NO_PROGRESS:
        return Verdict("failed", f"{reason}; {no_progress(task.job_id, 'does not get as far as its checkpoint')}")
    return Verdict("requeued", f"{reason}; job {task.job_id} goes back into the queue", requeue=True)


def carry_out(verdict: Verdict, task: Task, tells: RunDir | None, folder: RunDir, token: str) -> None:
    """Write a verdict down, in the summary of `tells` too, and requeue the job or tell those that wait for it.

    It is written before SLURM is asked, which ends this process as soon as it agrees.
    """

    def write(verdict: Verdict) -> None:
        facts = {"status": verdict.status, "reason": verdict.reason}
        note(folder, "end", token, job=task.job_id, restarts=task.restarts, **facts)
        if tells is not None:
            tells.write_end(verdict.status, verdict.reason)

    write(verdict)
    if verdict.requeue and (refused := slurm.requeue(task.job_id)):
        verdict = Verdict("failed", f"{verdict.reason}, but SLURM refused: {refused}")
        write(verdict)
    if verdict.status not in WAITING:
        cancel_dependents(task.job_id, waited_for(task.job_id, folder, verdict.reason))


# ---- the end of a batch script ------------------------------------------------------------------------------------


def ended(logs: Path, job_id: str, code: int, why: str = "its processes could not be started") -> bool:
    """Write down the end of a job whose processes left with `code`, if process 0 could not; `why` they never ran. Returns
    whether the run was finished before (a process that is killed while it leaves, a library that fails then): the job has then
    ended well, and those that wait for it may start.

    It starts again if they ran before and could not be started this time (a node that SLURM does not know to be dead), if the
    library under them ended them (SIGABRT: NCCL does so when another process is gone), and if they were told to leave before
    they could listen.
    """
    folder = run_folder_of(logs, job_id)
    if folder is None:
        return False
    restarts = own_restarts()
    task = Task(job_id, number=0, rank=0, world=0, local_rank=0, local_world=0, restarts=restarts, nodes="")
    token = next((line["token"] for line in reversed(history(folder)) if line.get("job") == job_id), "")
    lines = history(folder, token)
    ends = [line for line in lines if line["event"] == "end" and line.get("restarts") == restarts]
    if ends:
        return bool(ends[-1].get("status") == "finished")
    asked = next((line for line in lines if line["event"] == "submitted"), {})
    summary = folder.read_summary()
    of_this_job = (summary.get("job") or {}).get("job_id") == job_id
    if of_this_job and summary.get("status") == "finished" and asked.get("mode") in ("train", "train_only"):
        return True  # all was done, whatever became of its processes then
    starts = [line["restarts"] for line in lines if line["event"] == "start"]
    now = Standing.of(job_id, restarts)
    never_ran = restarts not in starts
    told_to_leave = code in (128 + signal.SIGABRT, 128 + signal.SIGUSR2) or now.preempted or now.late
    what = why if never_ran else "its processes ended"
    killed = {
        137: ", SIGKILL: out of memory, perhaps",
        135: ", SIGBUS: a .npy file of a split was written anew in place, or /dev/shm is full, perhaps",
        134: ", SIGABRT",
        139: ", SIGSEGV",
    }.get(code, "")
    reason = (
        f"job {job_id}: {what} (exit code {code}{killed}); see {logs}/{job_id}_batch.log and its tasks' logs beside it"
    )
    if now.requeued:
        verdict = Verdict("requeued", f"{reason}; SLURM has put it back into the queue")
    elif now.cancelled:
        verdict = Verdict("interrupted", f"job {job_id} was cancelled before its processes could save anything more")
    elif told := last_words(lines, restarts):
        verdict = Verdict("failed", told)
    elif silent := [line["reason"] for line in lines if line["event"] == "lost" and line.get("restarts") == restarts]:
        verdict = coming_back(f"{silent[0]} (with its node perhaps)", task, asked.get("max_requeues"), lines)
    elif not (told_to_leave or (never_ran and starts)):
        verdict = Verdict("failed", reason)
    else:
        verdict = coming_back(reason, task, asked.get("max_requeues"), lines)
    carry_out(verdict, task, folder, folder, token)
    return False


def main(arguments: list[str]) -> None:
    match arguments:
        case ["ended", logs, job_id, code, *why]:
            sys.exit(0 if ended(Path(logs), job_id, int(code), *why) else 1)
        case ["status", folder]:
            print(": ".join(filter(None, settled(RunDir(folder).read_summary(), queue_or_none()))))
        case ["cancelled" | "unsubmitted" as how, folder, reason]:
            Path(folder).mkdir(parents=True, exist_ok=True)
            status, _ = settled(RunDir(folder).read_summary(), queue_or_none())
            worth_more = ("failed", "interrupted") if how == "unsubmitted" else ()
            if status not in ("finished", "running", *worth_more, *WAITING):
                RunDir(folder).write_summary(status="cancelled", exit_reason=reason)
            print(f"{folder}: {reason}")
        case _:
            sys.exit(
                "usage: python -m omnivision.launch.job_record ended LOGS JOB CODE [WHY] | status FOLDER | "
                "cancelled FOLDER REASON | unsubmitted FOLDER REASON"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
