"""What a run folder knows of its SLURM jobs: `submitit_logs/`, how often a job came back, and what becomes of it.

`submitit_logs/history.jsonl` has a line for each submission, start and end. `python -m omnivision.jobs ended ...` is the last
line of every batch script: it writes down the end of a run that could not do so itself.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnivision import slurm
from omnivision.errors import Terminated, UserError
from omnivision.files import write_atomically
from omnivision.reporting.metrics_log import read_lines
from omnivision.reporting.run_folder import WAITING, RunFolder
from omnivision.stopping import TIME_LIMIT, Stop

if TYPE_CHECKING:
    from omnivision.distributed import Place

LOGS = "submitit_logs"
NO_PROGRESS = 3  # restarts without a new step that end a job
LAST_WORDS_SECONDS = 2.0  # for a process that fails to say so before process 0 decides
SECRET = re.compile(
    r"key|token|secret|passw|passphrase|credential|auth|cookie|private|signature|session", re.IGNORECASE
)
IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # user:password@


@dataclass(frozen=True)
class Task:
    """A task of a SLURM job, as SLURM's variables describe it. `job_id` is 12, or 12_3 for an element of an array."""

    job_id: str
    raw_id: str  # which `scontrol requeue` takes, of an element too
    rank: int
    world: int
    local_rank: int
    local_world: int
    restarts: int
    nodes: str

    @classmethod
    def from_environment(cls) -> Task:
        env = os.environ
        job_id, raw_id = env["SLURM_JOB_ID"], env["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in env:
            job_id = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
        world = int(env["SLURM_NTASKS"])
        return cls(
            job_id,
            raw_id,
            rank=int(env["SLURM_PROCID"]),
            world=world,
            local_rank=int(env["SLURM_LOCALID"]),
            local_world=world // int(env["SLURM_JOB_NUM_NODES"]),
            restarts=int(env.get("SLURM_RESTART_COUNT", "0")),
            nodes=env["SLURM_JOB_NODELIST"],
        )

    def place(self, host: str) -> Place:
        """Its place among the processes of the run; process 0 is on `host`, and listens on a port that is the job's own, below
        those that systems hand out by themselves.
        """
        from omnivision.distributed import Place

        port = int(os.environ.get("MASTER_PORT") or 10_000 + int(self.raw_id) % 20_000)
        meeting = f"tcp://{host}:{port}" if self.world > 1 else None
        return Place(self.rank, self.world, self.local_rank, self.local_world, meeting)


class JobRecord:
    """Looks after a run on behalf of its SLURM job. Process 0 alone has one that is asked anything."""

    def __init__(self, task: Task, folder: RunFolder, token: str, max_requeues: int, watch_the_clock: bool) -> None:
        """With `watch_the_clock` the run leaves by itself before the time limit; else SLURM's signal tells it to."""
        self.task, self.folder, self.token = task, folder, token
        self.max_requeues, self.watch_the_clock = max_requeues, watch_the_clock

    def note(self, event: str, **facts: Any) -> None:
        """Add a line to the history of the run folder's jobs."""
        note(self.folder, event, self.token, job=self.task.job_id, restarts=self.task.restarts, **facts)

    def begin(self, stop: Stop) -> None:
        """Write down where the job runs and in which environment. Raises UserError when it came back too often."""
        logs = self.folder.path / LOGS
        logs.mkdir(exist_ok=True)
        write_atomically(logs / f"{self.task.job_id}_environment.json", json.dumps(environment(), indent=1) + "\n")
        self.note("start", nodes=self.task.nodes)
        told = {"restarts": self.task.restarts, "processes": self.task.world, "nodes": self.task.nodes}
        known = self.folder.read_summary().get("job") or {}
        self.folder.write_summary(job=known | {"job_id": self.task.job_id} | told)
        if self.task.restarts > self.max_requeues:
            raise UserError(
                f"Job {self.task.job_id} was requeued {self.task.restarts} times; expected at most {self.max_requeues} "
                "(submitit.max_requeues). Look in submitit_logs/history.jsonl why. The same command submits it again."
            )
        if self.watch_the_clock:
            stop.end_at(slurm.moment(slurm.job_facts(self.task.raw_id).get("EndTime")))

    def resumed(self, step: int) -> None:
        """The run goes on from `step`. Raises UserError when it stood there three restarts ago."""
        self.note("resumed", step=step)
        reached = [line for line in history(self.folder) if line.get("token") == self.token and "step" in line]
        here = min(line["restarts"] for line in reached if line["step"] == step)
        if self.task.restarts - here >= NO_PROGRESS:
            raise UserError(
                f"Job {self.task.job_id} was restarted {self.task.restarts - here} times without progress: it stands at step "
                f"{step} again. Each start must get as far as a checkpoint: lower trainer.checkpoint.save_every_steps or raise "
                "submitit.timeout_hour, look at submitit_logs/ for what ended the starts, and give the same command again."
            )

    def end(self, error: BaseException, reason: str, folder: RunFolder | None) -> None:
        """Write down how the run ended, in `folder` if its summary is to tell, and put the job back into the queue if it is to
        come back. Jobs that wait for one that does not are told why they will not start.
        """
        verdict = self.verdict(error, reason)
        self._write(verdict.status, verdict.reason, folder)
        if verdict.requeue and (refused := slurm.requeue(self.task.raw_id)):
            verdict = Verdict("interrupted", f"{verdict.reason}, but SLURM refused: {refused}")
            self._write(verdict.status, verdict.reason, folder)
        if verdict.status not in WAITING:
            cancel_dependents(self.task.raw_id, waited_for(self.task.job_id, self.folder, verdict.reason))

    def verdict(self, error: BaseException, reason: str) -> Verdict:
        """What becomes of a job after an error or a request to stop."""
        job = f"job {self.task.job_id}"
        facts = slurm.job_facts(self.task.raw_id)
        if int(facts.get("Restarts", "0")) > self.task.restarts:
            return Verdict("requeued", f"{reason}; SLURM has put {job} back into the queue")
        if isinstance(error, Terminated):
            preempted = (slurm.moment(facts.get("PreemptTime")) or 0) >= (slurm.moment(facts.get("StartTime")) or 1)
            if error.cause == "SIGTERM" and not preempted:
                return Verdict("interrupted", f"{reason}; {job} was cancelled")
            why = "preempted" if preempted else "its time is over" if error.cause == TIME_LIMIT else "told to leave"
        elif isinstance(error, KeyboardInterrupt):
            return Verdict("interrupted", reason)
        elif lost_contact(error):
            time.sleep(LAST_WORDS_SECONDS)
            if told := self._last_words():
                return Verdict("failed", told)
            why = "another process is gone without a word, with its node perhaps"
        else:
            return Verdict("failed", reason)
        if self.task.restarts >= self.max_requeues:
            limit = f"submitit.max_requeues is {self.max_requeues}"
            return Verdict("interrupted", f"{reason} ({why}); {job} does not come back: {limit}")
        return Verdict("requeued", f"{reason} ({why}); {job} goes back into the queue", requeue=True)

    def fault(self, error: BaseException, reason: str) -> None:
        """Say in the history, as another process than 0, what failed here: process 0 only sees that it is gone."""
        if not isinstance(error, (Terminated, KeyboardInterrupt, UserError)) and not lost_contact(error):
            self.note("fault", rank=self.task.rank, reason=reason)

    def _last_words(self) -> str | None:
        for line in history(self.folder):
            if (line.get("token"), line.get("restarts"), line["event"]) == (self.token, self.task.restarts, "fault"):
                return f"process {line['rank']} failed: {line['reason']}"
        return None

    def _write(self, status: str, reason: str, folder: RunFolder | None) -> None:
        self.note("end", status=status, reason=reason)
        if folder is not None:
            folder.write_end(status, reason)


@dataclass(frozen=True)
class Verdict:
    """How a run is left, why, and whether to ask SLURM to start its job again."""

    status: str
    reason: str
    requeue: bool = False


def lost_contact(error: BaseException) -> bool:
    """Whether an error says that another process is gone, and nothing about this one."""
    import torch.distributed as dist

    texts = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def environment() -> dict[str, str | None]:
    """The variables of this process; of those that sound secret, the name alone."""
    return {
        name: None if SECRET.search(name) else IN_ADDRESS.sub("...", value)
        for name, value in sorted(os.environ.items())
    }


# ---- history ------------------------------------------------------------------------------------------------------


def note(folder: RunFolder, event: str, token: str, **facts: Any) -> None:
    line = {"time": time.time(), "event": event, "token": token, **facts}
    with open(folder.path / LOGS / "history.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def history(folder: RunFolder) -> list[dict[str, Any]]:
    """What happened to the jobs of a run folder, oldest first."""
    file = folder.path / LOGS / "history.jsonl"
    return [line for line in read_lines(file) if "event" in line] if file.exists() else []


def queue_or_none() -> dict[str, slurm.JobState] | None:
    """My jobs as SLURM knows them; None where there is no SLURM, or no answer."""
    try:
        return slurm.queue() if slurm.available() else None
    except (OSError, slurm.SubprocessError):
        return None


def settled(summary: Mapping[str, Any], queue: Mapping[str, slurm.JobState] | None) -> tuple[str, str]:
    """Status of a run and its reason, from its summary and from what SLURM knows of its job, which may have ended unseen."""
    status, reason = str(summary.get("status", "not begun")), str(summary.get("exit_reason") or "")
    job_id = (summary.get("job") or {}).get("job_id")
    if queue is None or job_id is None or status not in (*WAITING, "running"):
        return status, reason
    state = queue.get(job_id)
    if state is None:
        return "lost", f"SLURM does not know job {job_id} any more; it was {status}"
    if state.never_starts:
        return "cancelled", f"job {job_id} waited for one that did not end well ({state.dependency or state.reason})"
    if state.is_over:
        told = state.comment or state.reason or "no reason given"
        return ("cancelled" if state.state == "CANCELLED" else "failed"), f"job {job_id} is {state.state} ({told})"
    if state.state == "PENDING":
        return status, f"job {job_id} waits ({state.reason})"
    return status, reason or f"job {job_id} is {state.state}"


# ---- jobs that wait for others ------------------------------------------------------------------------------------


def waited_for(job_id: str, folder: RunFolder, reason: str) -> str:
    return f"cancelled, because it waited for job {job_id} ({folder.path}), which did not end well: {reason}"


def cancel_dependents(raw_id: str, reason: str) -> None:
    """Write into the summaries of the jobs that wait for this one to end well, and of those that wait for them, that they are
    cancelled and why; SLURM itself takes them out of the queue.
    """
    for job_id, state in (queue_or_none() or {}).items():
        if re.search(rf"\bafterok:(\S*[:,])?{raw_id}\b", state.dependency):
            folder = run_folder_of(Path(state.command).parent, job_id)
            summary = {} if folder is None else folder.read_summary()
            if folder is not None and summary.get("status") in WAITING and summary["job"]["job_id"] == job_id:
                note(folder, "end", token="", job=job_id, status="cancelled", reason=reason)
                folder.write_summary(status="cancelled", exit_reason=reason)
                cancel_dependents(job_id, waited_for(job_id, folder, reason))


def run_folder_of(logs: Path, job_id: str) -> RunFolder | None:
    """The run folder of a job, by the folder of its batch script; None when that is not one of ours."""
    if logs.name != LOGS:
        return None
    array, _, element = job_id.partition("_")
    if element:
        try:
            return RunFolder(json.loads((logs / f"{array}_folders.json").read_text(encoding="utf-8"))[int(element)])
        except (OSError, ValueError, IndexError):
            return None
    return RunFolder(logs.parent)


# ---- the end of a batch script ------------------------------------------------------------------------------------


def ended(logs: Path, job_id: str, code: int) -> None:
    """Write down the end of a job whose processes left with `code`, if process 0 could not; start it again if they never ran,
    or if the library under them ended them (SIGABRT: NCCL does so when another process is gone).
    """
    folder = run_folder_of(logs, job_id)
    if folder is None:
        return
    lines = history(folder)
    token = next((line["token"] for line in reversed(lines) if line.get("job") == job_id and line.get("token")), "")
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    mine = [line for line in lines if line.get("token") == token]
    events = [line["event"] for line in mine if line.get("restarts") == restarts]
    if "end" in events:
        return
    started = max((line["restarts"] for line in mine if line["event"] == "start"), default=0)
    never_ran, aborted = "start" not in events, code == 128 + 6
    reason = (
        f"its processes could not be started (exit code {code})" if never_ran else f"they ended with exit code {code}"
    )
    reason += {137: ", SIGKILL: out of memory, perhaps", 134: ", SIGABRT", 139: ", SIGSEGV"}.get(code, "")
    reason = f"job {job_id}: {reason}; see {logs}/{job_id}_batch.log and the logs of its tasks beside it"
    raw_id = os.environ["SLURM_JOB_ID"]
    if (aborted or never_ran) and restarts - started < NO_PROGRESS and slurm.requeue(raw_id) is None:
        status, reason = "requeued", f"{reason}; it goes back into the queue"
    else:
        status = "failed"
        cancel_dependents(raw_id, waited_for(job_id, folder, reason))
    note(folder, "end", token, job=job_id, restarts=restarts, status=status, reason=reason)
    folder.write_end(status, reason)


def main(arguments: list[str]) -> None:
    match arguments:
        case ["ended", logs, job_id, code]:
            ended(Path(logs), job_id, int(code))
        case ["status", folder]:
            print(": ".join(filter(None, settled(RunFolder(folder).read_summary(), queue_or_none()))))
        case ["cancelled", folder, reason]:
            Path(folder).mkdir(parents=True, exist_ok=True)
            RunFolder(folder).write_summary(status="cancelled", exit_reason=reason)
            print(f"{folder}: {reason}")
        case _:
            sys.exit("usage: python -m omnivision.jobs ended LOGS JOB CODE | status FOLDER | cancelled FOLDER REASON")


if __name__ == "__main__":
    main(sys.argv[1:])
