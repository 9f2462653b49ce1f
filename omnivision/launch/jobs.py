"""What a run folder knows of its SLURM jobs: `submitit_logs/`, their history, and what became of them.

`submitit_logs/history.jsonl` has a line for each submission, start and end.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnivision.launch import slurm
from omnivision.reporting.metrics_log import read_lines
from omnivision.reporting.run_directory import WAITING, RunDir, own_job, own_restarts
from omnivision.utils.io import append_line

if TYPE_CHECKING:
    from omnivision.distributed.process_group import RankInfo

LOGS = "submitit_logs"
PORTS_OF_A_JOB = 13  # a start after another does not find the port taken by what is left of the one before
SECRET = re.compile(r"key|token|secret|pass|_pwd|dsn|cred|auth|cookie|private|signature|session", re.IGNORECASE)
IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # user:password@


@dataclass(frozen=True)
class Task:
    """A task of a SLURM job, as SLURM's variables describe it. `job_id` is 12, or 12_3 for an element of an array."""

    job_id: str
    number: (
        int  # its own; the last element of an array has that of the array, which SLURM's commands take for all of it
    )
    rank: int
    world: int
    local_rank: int
    local_world: int
    restarts: int
    nodes: str

    @classmethod
    def from_environment(cls) -> Task:
        env = os.environ
        job_id = own_job()
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
        """Its place among the processes of the run; process 0 is on `host`, and listens on a port that is the job's own: the
        next 1500 jobs have others, whichever start they are at, and systems hand out none of those by themselves.
        """
        from omnivision.distributed.process_group import RankInfo

        own = (PORTS_OF_A_JOB * self.number + self.restarts % PORTS_OF_A_JOB) % (PORTS_OF_A_JOB * 1500)
        port = int(os.environ.get("MASTER_PORT") or 10_000 + own)
        meeting = f"tcp://{host}:{port}" if self.world > 1 else None
        return RankInfo(self.rank, self.world, self.local_rank, self.local_world, meeting)


def environment() -> dict[str, str | None]:
    """The variables of this process; of those that sound secret, the name alone."""
    return {
        name: None if SECRET.search(name) else IN_ADDRESS.sub("...", value)
        for name, value in sorted(os.environ.items())
    }


# ---- history ------------------------------------------------------------------------------------------------------


def note(folder: RunDir, event: str, token: str, **facts: Any) -> None:
    """Add a line to the history of a run folder's jobs. `token` is of the submission: numbers of jobs may come again."""
    line = {"time": time.time(), "event": event, "token": token, **facts}
    append_line(folder.path / LOGS / "history.jsonl", json.dumps(line))


def history(folder: RunDir, token: str | None = None) -> list[dict[str, Any]]:
    """What happened to the jobs of a run folder, or to those of one submission, oldest first."""
    file = folder.path / LOGS / "history.jsonl"
    lines = [line for line in read_lines(file) if isinstance(line.get("event"), str)] if file.is_file() else []
    return [line for line in lines if token is None or line.get("token") == token]


def fruitless_starts(lines: list[dict[str, Any]]) -> int:
    """How often a job was started since a start last found a step that none had found before."""
    best, count = -1, 0
    for line in lines:
        if line["event"] == "start":
            count += 1
        elif line["event"] == "resumed" and line["step"] > best:
            best, count = line["step"], 0
    return count


def last_words(lines: list[dict[str, Any]], restarts: int) -> str | None:
    """What a process other than 0 said before it failed in this start of a job."""
    for line in lines:
        if line["event"] == "fault" and line.get("restarts") == restarts:
            return f"process {line['rank']} failed: {line['reason']}"
    return None


# ---- what became of a job -----------------------------------------------------------------------------------------


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
    logs = (summary.get("job") or {}).get("logs")
    if state is not None and logs is not None and Path(state.command).parent != Path(logs):
        state = None  # SLURM was set up anew, and the number is another job's
    if state is None:
        return "lost", f"SLURM does not know job {job_id} any more; it was {status}"
    if state.never_starts:
        failed = [prior for prior in re.findall(r"(\d+)(?:_\S+?)?\(failed\)", state.dependency) if prior in queue]
        folders = ", ".join(f"job {prior} of {Path(queue[prior].command).parents[1]}" for prior in failed)
        return "cancelled", f"it waited for what did not end well: {folders or state.dependency or state.reason}"
    if state.is_over:
        # A cancelled job keeps the reason for which it waited.
        unsaid = "ended from outside" if state.state == "CANCELLED" else state.reason or "no reason given"
        told = state.comment or unsaid
        return ("cancelled" if state.state == "CANCELLED" else "failed"), f"job {job_id} is {state.state} ({told})"
    if state.state == "PENDING":
        return status, f"job {job_id} waits ({state.reason})"
    if status in WAITING and state.state == "RUNNING":
        return status, f"job {job_id} is starting"
    return status, reason or f"job {job_id} is {state.state}"


# ---- jobs that wait for others ------------------------------------------------------------------------------------


def waits(dependency: str) -> Iterator[tuple[str, str]]:
    """What a job waits for, as pairs of a condition and the id of a job (12, 12_3, or 12_* for a whole array).

    Nothing for "any of these" (with question marks): one that failed is not the end of such a job.
    """
    if "?" in dependency:
        return
    for entry in dependency.split(","):
        condition, *ids = re.sub(r"\(.*\)", "", entry).split(":")
        yield from ((condition, job_id.partition("+")[0]) for job_id in ids)


def waited_for(job_id: str, folder: RunDir, reason: str) -> str:
    return f"it waited for job {job_id} ({folder.path}), which did not end well: {reason}"


def cancel_dependents(job_id: str, reason: str) -> None:
    """Write into the summaries of the jobs that wait for this one to end well, and of those that wait for them, that they are
    cancelled and why; SLURM itself takes them out of the queue.
    """
    names = {job_id, f"{job_id.partition('_')[0]}_*"}
    for other, state in (queue_or_none() or {}).items():
        if any(condition == "afterok" and job in names for condition, job in waits(state.dependency)):
            folder = run_folder_of(Path(state.command).parent, other)
            summary = {} if folder is None else folder.read_summary()
            waiting = summary.get("status") in WAITING and (summary.get("job") or {}).get("job_id") == other
            if folder is not None and waiting:
                note(folder, "end", token="", job=other, status="cancelled", reason=reason)
                folder.write_summary(status="cancelled", exit_reason=reason)
                cancel_dependents(other, reason)


def run_folder_of(logs: Path, job_id: str) -> RunDir | None:
    """The run folder of a job, by the folder of its batch script; None when that is not one of ours."""
    if logs.name != LOGS:
        return None
    array, _, element = job_id.partition("_")
    if element:
        try:
            return RunDir(json.loads((logs / f"{array}_folders.json").read_text(encoding="utf-8"))[int(element)])
        except (OSError, ValueError, IndexError):
            return None
    return RunDir(logs.parent)
