"""SLURM's commands: queries about jobs and partitions, submission, requeueing and cancelling."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from omnivision.utils.errors import UserError
from omnivision.utils.streams import warn

TERMINAL_STATES = tuple("BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY REVOKED TIMEOUT".split())
SEPARATOR, END = "\x1f", "\x1e"  # between fields and between jobs: comments may contain line ends
COMMAND_TIMEOUT = 60.0  # seconds

# Variables of another job or launcher; sbatch and srun would inherit them.
INHERITED_VARIABLES = re.compile(
    "(SLURM|SBATCH|SRUN|SALLOC|SQUEUE|SINFO|SCANCEL|SCONTROL|SUBMITIT|PMI|PMIX|TORCHELASTIC)_"
    "|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)$|ROLE_NAME$|MASTER_(ADDR|PORT)$"
)
KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")  # needed to reach SLURM
# Variables with which a site sets defaults for sbatch, and the setting that overrides each.
SITE_VARIABLES = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraints",
    "SBATCH_RESERVATION": None,
    "SBATCH_EXPORT": None,
}


class SlurmError(UserError):
    """A SLURM command failed, was killed, or did not answer; the message quotes its output."""

    def __init__(self, output: str, was_killed: bool = False) -> None:
        here = "submitit.use_cluster=false launcher.num_nodes=1 launcher.gpus_per_node=1"
        super().__init__(f"SLURM: {output}. Fix the submitit settings, or run here with {here}.")
        self.output, self.was_killed = output, was_killed


@dataclass(frozen=True)
class QueueEntry:
    """A job as squeue shows it. `command` is the path of its batch script."""

    state: str
    reason: str = ""
    comment: str = ""
    command: str = ""
    dependency: str = ""

    @property
    def is_over(self) -> bool:
        return self.state in TERMINAL_STATES or self.never_starts

    @property
    def never_starts(self) -> bool:
        """Whether its dependency has failed. SLURM removes such a job from the queue later."""
        return self.reason == "DependencyNeverSatisfied"


def is_available() -> bool:
    return all(shutil.which(command) for command in ("sbatch", "srun", "squeue"))


def inherited_variables(settings: object = None) -> list[str]:
    """Return the environment variables to remove: inherited ones, and those that `settings` (of submitit) override."""

    def is_kept(name: str) -> bool:
        setting = SITE_VARIABLES.get(name)
        return name in KEPT_VARIABLES or (name in SITE_VARIABLES and not (setting and getattr(settings, setting, None)))

    return sorted(name for name in os.environ if INHERITED_VARIABLES.match(name) and not is_kept(name))


def run_slurm_command(*command: str, settings: object = None, timeout: float | None = COMMAND_TIMEOUT) -> str:
    """Run a SLURM command without inherited variables and return its output. Raises SlurmError if it fails."""
    inherited = inherited_variables(settings)
    env = {name: value for name, value in os.environ.items() if name not in inherited}
    try:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, errors="replace", timeout=timeout, env=env
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        output = " ".join((getattr(error, "stderr", None) or str(error)).split())
        was_killed = isinstance(error, subprocess.CalledProcessError) and error.returncode < 0
        raise SlurmError(f"{command[0]}: {output}", was_killed) from None


# ---- queries ------------------------------------------------------------------------------------------------------


def squeue() -> dict[str, QueueEntry]:
    """Return my jobs by id (array elements separately): pending, running, or ended minutes ago. Raises SlurmError."""
    fields = SEPARATOR.join(("%i", "%T", "%r", "%k", "%o", "%E"))
    jobs = {}
    output = run_slurm_command("squeue", "--me", "--noheader", "--array", "--states=all", f"--format={fields}{END}")
    for entry in output.split(END):
        job_id, *rest = entry.lstrip("\n").split(SEPARATOR)
        if len(rest) == 5:
            jobs[job_id] = QueueEntry(*("" if text in ("(null)", "None") else text for text in rest))
    return jobs


def squeue_or_none() -> dict[str, QueueEntry] | None:
    """Return `squeue()`, or None if SLURM is not installed or does not answer."""
    try:
        return squeue() if is_available() else None
    except SlurmError:
        return None


def show_job(job_id: str) -> dict[str, str]:
    """Return the fields of `scontrol show job`; empty if SLURM does not know the job or does not answer."""
    try:
        output = run_slurm_command("scontrol", "show", "job", "--oneliner", job_id)
    except SlurmError:
        return {}
    # A comment may contain anything, so only the first field with a given name counts.
    return dict(reversed(re.findall(r"(\w+)=(\S*)", output.partition("\n")[0])))


def first_host() -> str:
    """Return the host name of this job's first node."""
    import submitit

    return str(submitit.JobEnvironment().hostnames[0])


def partition_limits(name: str | None) -> tuple[int | None, float | None]:
    """Return a partition's limits (nodes, minutes); None if unlimited or unknown.

    `name` may list several, separated by commas; None: the default one. SLURM accepts jobs beyond the limits but never
    starts them.
    """
    name = name or os.environ.get("SBATCH_PARTITION")
    of_partition = [f"--partition={name}"] if name else []
    try:
        output = run_slurm_command("sinfo", "--noheader", "--format=%P %D %l", *of_partition)
    except SlurmError:
        return None, None
    partitions = [line.split() for line in output.splitlines()]
    limits = [(int(nodes), parse_limit(limit)) for title, nodes, limit in partitions if name or title.endswith("*")]
    minutes = [math.inf if limit is None else limit for _, limit in limits]
    longest = max(minutes, default=math.inf)
    return max((nodes for nodes, _ in limits), default=None), None if longest == math.inf else longest


def parse_time(text: str | None) -> float | None:
    """Parse a time as SLURM prints it to seconds since the epoch; None if it is unset."""
    try:
        return datetime.fromisoformat(text or "").timestamp()
    except ValueError:
        return None


def parse_limit(text: str) -> float | None:
    """Parse a time limit ("30", "1:30", "2:00:00", "3-12:00:00") to minutes; None if there is none."""
    days, _, clock = text.rpartition("-")
    try:
        parts, whole_days = [int(part) for part in clock.split(":")], int(days or 0)
    except ValueError:
        return None
    if not days and len(parts) < 3:  # minutes come first
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return whole_days * 1440 + hours * 60 + minutes + seconds / 60


def planned_end(fields: dict[str, str]) -> float | None:
    """Return when a job reaches its time limit, in seconds since the epoch. (`scancel` changes `EndTime`.)"""
    start, limit = parse_time(fields.get("StartTime")), parse_limit(fields.get("TimeLimit", ""))
    return None if start is None or limit is None else start + 60 * limit


# ---- changes ------------------------------------------------------------------------------------------------------


def sbatch_script(command: str, logs: Path, count: int, parameters: dict[str, Any]) -> str:
    """Return the batch script of a job, or of an array of `count` jobs; `parameters` are submitit's."""
    os.environ.pop("SUBMITIT_PREEMPT_SIGNAL", None)  # submitit reads it on import; our runs expect SIGUSR2
    from submitit.slurm.slurm import _make_sbatch_string

    return str(_make_sbatch_string(command, logs, map_count=count if count > 1 else None, **parameters))


def sbatch(script: Path, settings: object) -> str:
    """Submit a batch script, using only `settings` and the site's defaults; return the job's id. Raises SlurmError."""
    if options := [name for name in inherited_variables(settings) if name.startswith("SBATCH_")]:
        warn(f"environment variables are ignored: {', '.join(options)}. The submitit settings are used.")
    output = run_slurm_command("sbatch", "--parsable", str(script), settings=settings, timeout=None)
    if (found := re.search(r"^\d+", output, re.MULTILINE)) is None:
        raise SlurmError(f"sbatch: {output!r}")
    return found[0]


def requeue(job_id: str, attempts: int = 3) -> str | None:
    """Put a job back into the queue; return SLURM's message if it refuses.

    SLURM kills the job's processes, `scontrol` among them, as soon as it accepts: a killed `scontrol` has succeeded.
    """
    message = None
    for attempt in range(attempts):
        time.sleep(attempt)
        try:
            run_slurm_command("scontrol", "requeue", job_id)
            return None
        except SlurmError as error:
            if error.was_killed:
                return None
            message = error.output
    return message


def cancel_jobs_of(script: Path) -> str:
    """Cancel my jobs that were submitted with a batch script; return a sentence for the error message."""
    try:
        mine = [job for job, state in squeue().items() if not state.is_over and Path(state.command) == script]
        if job_ids := sorted({job.partition("_")[0] for job in mine}):
            run_slurm_command("scancel", *job_ids)
    except SlurmError:
        return " SLURM may still have accepted a job: check with squeue, and cancel it with scancel."
    return f" Job {', '.join(job_ids)}, which SLURM had accepted, was cancelled." if job_ids else ""
