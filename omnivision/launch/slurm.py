"""Questions to SLURM, through its own commands, and what its refusals mean. Submitting is `launch`'s."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from subprocess import SubprocessError

# Ends of a job; any other state is of one that is, or may yet be, at work.
OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT")
SEPARATOR, END = "\x1f", "\x1e"  # of fields, and of jobs: comments may hold line ends
ANSWER_SECONDS = 60.0

# What SLURM says, and the settings to look at. The first that matches counts.
REFUSALS = {
    "--mem": "submitit.mem",
    "--comment": "submitit.comment",
    "qos": "submitit.qos",
    "account": "submitit.account",
    "partition": "submitit.partition",
    "gres": "launcher.gpus_per_node (trainer.accelerator=cpu asks for no GPU)",
    "feature": "submitit.constraints",
    "node name": "submitit.nodelist or submitit.exclude",
    "dependency": "submitit.dependency",
    "time limit": "submitit.timeout_hour",
    "memory": "submitit.mem or submitit.mem_gb",
    "cpu count": "submitit.cpus_per_task or launcher.gpus_per_node",
    "node count": "launcher.num_nodes",
    "processors": "submitit.cpus_per_task or launcher.num_nodes",
    "node configuration": (
        "launcher.gpus_per_node, submitit.cpus_per_task, submitit.mem or submitit.mem_gb, submitit.nodelist or submitit.exclude"
    ),
    "reservation": "submitit.additional_parameters",
    "option": "submitit.additional_parameters",
    "license": "submitit.additional_parameters",
}
# What it says where no setting is to blame.
PASSING = {
    "submit limit": "Give the same command again when jobs of yours have ended, or change submitit.qos.",
    "submitjob": "Give the same command again when jobs of yours have ended, or change submitit.qos.",
    "contact": "Try again when it answers.",
    "timed out": "Try again when it answers.",
}
# Variables that sbatch would take before what a batch script says, and the settings that leave them a say while they are unset.
OF_A_SITE = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraints",
    "SBATCH_RESERVATION": "",
    "SBATCH_EXPORT": "",
}


@dataclass(frozen=True)
class JobState:
    """A job as SLURM knows it. `command` is the path of its batch script when it was submitted."""

    state: str
    reason: str = ""
    comment: str = ""
    command: str = ""
    dependency: str = ""

    @property
    def is_over(self) -> bool:
        return self.state in OVER or self.never_starts

    @property
    def never_starts(self) -> bool:
        """What it waits for has failed; SLURM takes such a job out of the queue by and by."""
        return self.reason == "DependencyNeverSatisfied"


@dataclass(frozen=True)
class NodeKind:
    """Nodes of a partition that are alike: how many, and what each has; None where SLURM sets no bound."""

    count: int
    cpus: int
    memory_gb: float
    gpus: int
    minutes: float | None


def available() -> bool:
    return all(shutil.which(command) for command in ("sbatch", "srun", "squeue"))


def heard(settings: object) -> list[str]:
    """Variables of the environment that count for sbatch, because `settings` (those of submitit) say nothing instead."""
    return [name for name, field in OF_A_SITE.items() if name in os.environ and not getattr(settings, field, None)]


@contextlib.contextmanager
def settings_first(settings: object) -> Iterator[None]:
    """Within, no variable of the environment changes what `settings` (those of submitit) ask sbatch for; those that would are
    named in a warning.
    """
    before = dict(os.environ)
    unheard = sorted({name for name in before if name.startswith("SBATCH_")} - set(heard(settings)))
    if unheard:
        print(
            f"warning: not heeded in the environment: {', '.join(unheard)}. Jobs ask for what the submitit settings say.",
            file=sys.stderr,
        )
    for name in unheard:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update({name: before[name] for name in unheard})


def ask(*command: str) -> str:
    """What one of SLURM's commands answers. Raises OSError, SubprocessError."""
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=ANSWER_SECONDS, check=True
    ).stdout


def queue() -> dict[str, JobState]:
    """My jobs, waiting, at work, or ended within the time that SLURM remembers them (minutes), by id; arrays by element.

    Raises OSError, SubprocessError when SLURM does not answer.
    """
    fields = SEPARATOR.join(("%i", "%T", "%r", "%k", "%o", "%E"))
    found = {}
    for entry in ask("squeue", "--me", "--noheader", "--array", "--states=all", f"--format={fields}{END}").split(END):
        job_id, *rest = entry.lstrip("\n").split(SEPARATOR)
        if len(rest) == 5:
            found[job_id] = JobState(*("" if text in ("(null)", "None") else text for text in rest))
    return found


def cancel_jobs_of(scripts: Collection[Path]) -> list[str]:
    """Cancel my jobs that were submitted with one of these batch scripts; their ids.

    Raises OSError, SubprocessError when SLURM does not answer.
    """
    mine = [job for job, state in queue().items() if not state.is_over and Path(state.command) in scripts]
    if found := sorted({job.partition("_")[0] for job in mine}):
        ask("scancel", *found)
    return found


def job_facts(job_id: str) -> dict[str, str]:
    """What `scontrol show job` tells of a job, by name; empty when SLURM does not know it or does not answer."""
    try:
        answer = ask("scontrol", "show", "job", "--oneliner", job_id)
    except (OSError, SubprocessError):
        return {}
    # A comment may hold anything: what comes first counts.
    return dict(reversed(re.findall(r"(\w+)=(\S*)", answer.partition("\n")[0])))


def moment(text: str | None) -> float | None:
    """A time as SLURM writes it, in seconds since the epoch; None for one that is not set."""
    try:
        return datetime.fromisoformat(text or "").timestamp()
    except ValueError:
        return None


def planned_end(facts: dict[str, str]) -> float | None:
    """When the time limit of a job ends it, in seconds since the epoch. (`EndTime` is also the moment of a `scancel`.)"""
    start, limit = moment(facts.get("StartTime")), minutes(facts.get("TimeLimit", ""))
    return None if start is None or limit is None else start + 60 * limit


def requeue(job_id: str, attempts: int = 3) -> str | None:
    """Put a job back into the queue; what SLURM said if it would not.

    SLURM ends the job's processes as soon as it has agreed, `scontrol` among them: a killed one has done its work.
    """
    said = ""
    for attempt in range(attempts):
        time.sleep(attempt)
        try:
            result = subprocess.run(
                ["scontrol", "requeue", job_id],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=ANSWER_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
            continue
        if result.returncode <= 0:
            return None
        said = result.stderr.strip()
    return said


def longest_array() -> int | None:
    """How many elements an array may have; None when SLURM does not tell."""
    try:
        found = re.search(r"MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"))
    except (OSError, SubprocessError):
        return None
    return int(found[1]) if found else None


def partition(name: str | None) -> list[NodeKind]:
    """The nodes of a partition (None: the default one); empty when SLURM does not tell."""
    name = name or os.environ.get("SBATCH_PARTITION") or None
    fields = SEPARATOR.join(("%P", "%D", "%c", "%m", "%G", "%l"))
    try:
        answer = ask("sinfo", "--noheader", "--exact", f"--format={fields}", *(["--partition", name] if name else []))
    except (OSError, SubprocessError):
        return []
    kinds = []
    for line in answer.splitlines():
        if line.count(SEPARATOR) != 5:
            continue
        label, count, cpus, memory, gres, limit = line.split(SEPARATOR)
        if name is None and not label.endswith("*"):
            continue
        gpus = sum(int(number) for number in re.findall(r"\bgpu(?::[^:,(]+)?:(\d+)", gres))
        sizes = [number.rstrip("+") for number in (count, cpus, memory)]
        if all(number.isdecimal() for number in sizes):
            nodes, each, megabytes = map(int, sizes)
            kinds.append(NodeKind(nodes, each, megabytes / 1024, gpus, minutes(limit)))
    return kinds


def minutes(limit: str) -> float | None:
    """A time limit ("30", "1:30", "2:00:00", "3-12:00:00") in minutes; None for "infinite" and what is none."""
    days, _, clock = limit.rpartition("-")
    try:
        parts, whole_days = [int(part) for part in clock.split(":")], int(days or 0)
    except ValueError:
        return None
    if days or len(parts) == 3:  # hours first
        hours, first, seconds = (*parts, 0, 0)[:3]
    else:
        hours, first, seconds = (0, *parts, 0)[:3]
    return whole_days * 1440 + hours * 60 + first + seconds / 60


def refusal(said: str, settings: object = None) -> str:
    """SLURM's refusal of a job as one sentence of its own and the setting to change; `settings` are those of submitit."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in said.splitlines()]
    told = [line.removeprefix("Batch job submission failed: ").rstrip(".") for line in lines if line.strip()]
    text = "; ".join(dict.fromkeys(told)) or "nothing"
    if advice := next((advice for word, advice in PASSING.items() if word in text.lower()), None):
        return f"SLURM did not take the job and said: {text}. {advice}"
    setting = next((setting for word, setting in REFUSALS.items() if word in text.lower()), "the submitit settings")
    named = ", ".join(heard(settings))
    also = f" (Of the environment counts, too: {named}.)" if named else ""
    return f"SLURM refused the job and said: {text}. Change {setting}.{also}"
