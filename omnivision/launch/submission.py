"""What is found out before a run goes to SLURM: whether it is done or in the queue already, and what SLURM would not take."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omnivision.checkpoint.fingerprint import changed_settings, check_same_settings, truncate_list
from omnivision.config.schema import Settings
from omnivision.launch import slurm
from omnivision.launch.jobs import LOGS, queue_or_none, run_folder_of, waited_for, waits
from omnivision.launch.run import Job, run_folder
from omnivision.reporting.run_directory import WAITING, RunDir
from omnivision.utils.errors import UserError
from omnivision.utils.io import LATEST

LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
ENDED_BADLY = ("failed", "interrupted", "cancelled")
USUALLY_LOCAL = ("/tmp", "/var/tmp", "/scratch/local", "/dev/shm")


def known_jobs() -> dict[str, slurm.JobState]:
    """My jobs, as SLURM knows them. Raises UserError when it does not answer."""
    try:
        return slurm.queue()
    except (OSError, slurm.SubprocessError) as error:
        said = " ".join((getattr(error, "stderr", None) or str(error)).split())
        raise UserError(
            f"SLURM does not answer ({said}). Nothing was submitted; try again, or run here with "
            "submitit.use_cluster=false launcher.num_nodes=1 launcher.gpus_per_node=1."
        ) from None


def is_finished(settings: Settings, folder: RunDir) -> bool:
    """Whether a run has done all the epochs that it is asked for; an evaluation is always done again."""
    summary = folder.read_summary()
    done = summary.get("status") == "finished" and (summary.get("epochs") or 0) >= settings.trainer.max_epochs
    return done and settings.trainer.mode != "val"


def warn_of_other_settings(job: Job) -> None:
    """Say how a finished run's settings differ from those of the command, but for where and how it runs."""
    changes = changed_settings(run_folder(job).path / "config.yaml", job.config_text)
    if changes := [change for change in changes if not change.startswith(("submitit.", "launcher."))]:
        print(
            f"warning: the finished run in {run_folder(job).path} had other settings: {truncate_list(changes)}. For a run with "
            "these, change launcher.experiment_log_dir.",
            file=sys.stderr,
        )


def require_same_experiment(job: Job) -> None:
    """Raises UserError when a run that has a checkpoint would go on as another experiment."""
    folder, trainer = run_folder(job), job.settings.trainer
    if trainer.mode == "val" or trainer.checkpoint.allow_changes or not (folder.checkpoints / LATEST).exists():
        return
    check_same_settings(folder.path / "config.yaml", job.config_text)


def is_queued(job: Job, queue: Mapping[str, slurm.JobState]) -> bool:
    """Whether a job for this run is in the queue; prints a line then. Raises UserError when it has other settings."""
    folder = run_folder(job)
    found = [job_id for job_id, state in queue.items() if _works_in(folder, job_id, state)]
    if not found:
        return False
    job_id = min(found, key=lambda job_id: queue[job_id].state == "COMPLETING")  # its successor may be there already
    state = queue[job_id].state
    if state == "COMPLETING" and folder.read_summary().get("status") not in WAITING:
        return False  # it has ended, and comes back only if it said so
    changes = changed_settings(folder.path / LOGS / f"{job_id}_config.yaml", job.config_text)
    # What it waits for may have ended since, and the command then has nothing to wait for. A folder may have two names.
    same = ("submitit.dependency:", "launcher.experiment_log_dir:")
    if changes := [change for change in changes if not change.startswith(same)]:
        raise UserError(
            f"Job {job_id} is in the queue ({state}) for {folder.path}, with other settings: {truncate_list(changes)}. Give "
            f"the same again, end it with scancel {job_id}, or change launcher.experiment_log_dir."
        )
    print(f"queued job_id={job_id} state={state} folder={folder.path}")
    return True


def _works_in(folder: RunDir, job_id: str, state: slurm.JobState) -> bool:
    """Whether a job is in the queue and was submitted for a run folder. Its number alone does not tell: after SLURM was set up
    anew it may be another one's.
    """
    if state.is_over:
        return False
    found = run_folder_of(Path(state.command).parent, job_id)
    return found is not None and found.path.resolve() == folder.path.resolve()


def require_free(folder: RunDir, queue: Mapping[str, slurm.JobState]) -> None:
    """Raises UserError while a live process holds a run folder; one of a job that is over is none, whatever it left."""
    holder = str((folder.holder() or {}).get("job"))
    if holder == "None" or (holder in queue and not queue[holder].is_over):
        folder.require_free()


def require_one_shape(points: Sequence[Settings]) -> None:
    """Raises UserError unless all runs of a sweep ask SLURM for the same: an array has one batch script."""

    def asked(settings: Settings) -> dict[str, Any]:
        both = {"launcher": vars(settings.launcher), "submitit": vars(settings.submitit)}
        found = {f"{name}.{key}": value for name, part in both.items() for key, value in part.items()}
        del found["launcher.experiment_log_dir"]
        return found | {"trainer.accelerator": settings.trainer.accelerator}

    first = asked(points[0])
    for point in points[1:]:
        for name, value in asked(point).items():
            if value != first[name]:
                raise UserError(
                    f"{name} is {first[name]} in one run of this sweep and {value} in another; a sweep is submitted as one "
                    "array, whose elements ask SLURM for the same. Sweep over other settings, or submit twice."
                )


def check_array(runs: int) -> None:
    """Raises UserError for a sweep of more runs than an array of this SLURM may have elements."""
    limit = slurm.longest_array()
    if runs > 1 and limit is not None and runs > limit:
        raise UserError(
            f"This sweep has {runs} runs, and an array of this SLURM at most {limit} elements (MaxArraySize). Sweep over fewer "
            "at a time; what is finished or queued is left out."
        )


def is_command(line: str) -> bool:
    """Whether a line of shell does anything."""
    return bool(line.strip()) and not line.lstrip().startswith("#")


def check_setup(lines: Sequence[str]) -> None:
    """Raises UserError for shell commands that bash cannot read: the job would end before its first line was done."""
    if (bash := shutil.which("bash")) is None:
        return  # compute nodes may have it all the same
    for number, line in enumerate(lines):
        if not is_command(line):
            continue
        if re.match(r"\s*exec\s+[^\s\d<>&{]", line):
            raise UserError(
                f"submitit.setup[{number}] is {line!r}: exec ends the batch script, and nothing is trained. Give the command "
                "without exec. Change submitit.setup."
            )
        for text in (line, f"{{ {line}\n}}"):  # as it is in the batch script, but the braces are not the user's
            made = subprocess.run([bash, "-n"], input=text, capture_output=True, text=True)
            if made.returncode:
                break
        if made.returncode:
            said = made.stderr.splitlines()[0].partition(": line ")[2].partition(": ")[2] or made.stderr.strip()
            raise UserError(
                f"submitit.setup[{number}] is {line!r}, and bash says: {said}. Expected a shell command that is "
                "complete in one entry. Change submitit.setup."
            )


def check_partition(settings: Settings) -> None:
    """Raises UserError when the partition has no nodes that are large enough, which SLURM may only say by never starting a
    job. Silent when SLURM does not tell about its nodes.
    """
    wanted, launcher = settings.submitit, settings.launcher
    kinds = slurm.partition(wanted.partition)
    name = wanted.partition or "the default partition"
    gpus = 0 if settings.trainer.accelerator == "cpu" else launcher.gpus_per_node
    cpus = wanted.cpus_per_task * launcher.gpus_per_node
    memory, minutes = wanted.memory_gb or 0.0, wanted.timeout_hour * 60
    needs: list[tuple[str, float, str, Any]] = [
        ("launcher.gpus_per_node", gpus, "GPUs (trainer.accelerator=cpu asks for none)", lambda kind: kind.gpus),
        ("submitit.cpus_per_task x launcher.gpus_per_node", cpus, "CPUs", lambda kind: kind.cpus),
        ("submitit.mem" if wanted.mem else "submitit.mem_gb", memory, "GB of memory", lambda kind: kind.memory_gb),
    ]
    for setting, number, what, has in needs:
        if kinds and (most := max(has(kind) for kind in kinds)) < number:
            raise UserError(
                f"{setting} is {number:g}, and the nodes of {name} have at most {most:g} {what}. Change "
                f"{setting.split()[0]}, or submitit.partition."
            )
        kinds = [kind for kind in kinds if has(kind) >= number]
    if kinds and (count := sum(kind.count for kind in kinds)) < launcher.num_nodes:
        raise UserError(
            f"launcher.num_nodes is {launcher.num_nodes}, and {name} has {count} nodes that are large enough. Change "
            "launcher.num_nodes, or submitit.partition."
        )
    limits = [kind.minutes for kind in kinds]
    if kinds and all(limit is not None and limit < minutes for limit in limits):
        longest = max(limit for limit in limits if limit is not None)
        raise UserError(
            f"submitit.timeout_hour is {wanted.timeout_hour:g}, and a job of {name} may take {longest / 60:g} h. Change "
            "submitit.timeout_hour, or submitit.partition. (A run that reaches its limit saves and goes back into the queue.)"
        )


def check_dependency(dependency: str | None, queue: Mapping[str, slurm.JobState]) -> None:
    """Raises UserError for a job to wait for that SLURM does not know, which it would take for one that ended well; and for one
    that can no longer end well.
    """
    for condition, job_id in waits(dependency or ""):
        states = [
            state for job, state in queue.items() if job == job_id or job.startswith(f"{job_id.removesuffix('_*')}_")
        ]
        for state in states:
            well = state.state == "COMPLETED"
            if (condition in ("afterok", "aftercorr") and state.is_over and not well) or (
                condition == "afternotok" and well
            ):
                folder = run_folder_of(Path(state.command).parent, job_id)
                summary = {} if folder is None else folder.read_summary()
                told = "" if folder is None else f" ({folder.path}: {summary.get('exit_reason')})"
                advice = "Submit that one again first, or change submitit.dependency."
                if summary.get("status") == "finished":
                    advice = (
                        "Its run is finished by now, and nothing needs to wait for it: leave submitit.dependency out."
                    )
                raise UserError(
                    f"submitit.dependency is {dependency}, and job {job_id} is {state.state}{told}. Expected one that can "
                    f"still end well. {advice}"
                )
        if not states and not slurm.job_facts(job_id):
            raise UserError(
                f"submitit.dependency is {dependency}, and SLURM does not know job {job_id} (it forgets jobs some minutes "
                "after their end). Expected the id of a job in the queue. Change submitit.dependency, or set it to null."
            )


def lost_meanwhile(dependency: str | None) -> str | None:
    """Why a job that has just been submitted will never start: what it waits for has not ended well, and its end may have told
    the jobs in the queue before this one was there. None while it may.
    """
    needed = [job_id for condition, job_id in waits(dependency or "") if condition == "afterok"]
    queue = queue_or_none() if needed else None
    for job_id in needed:
        state = (queue or {}).get(job_id)
        folder = None if state is None else run_folder_of(Path(state.command).parent, job_id)
        if state is None or folder is None:
            continue
        summary = folder.read_summary()
        told = (summary.get("job") or {}).get("job_id") == job_id and summary.get("status") in ENDED_BADLY
        if told or (state.is_over and state.state != "COMPLETED"):
            return waited_for(job_id, folder, str(summary.get("exit_reason")))
    return None


def check_folders(folders: Sequence[Path]) -> None:
    """Raises UserError for a run folder in the memory of this machine; warns of one on what is usually a disk of its own."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return
    local = None
    for folder in folders:
        if wrong := [sign for sign in "%\\\n\r" if sign in str(folder)]:
            raise UserError(
                f"launcher.experiment_log_dir is {str(folder)!r}, and SLURM cannot have {wrong[0]!r} in the names of files. "
                "Expected a folder without it. Change launcher.experiment_log_dir."
            )
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()).resolve()
        kind = max(
            ((len(where), kind) for _, where, kind, *_ in mounts if there.is_relative_to(where)), default=(0, "")
        )[1]
        if kind in LOCAL_FILE_SYSTEMS:
            raise UserError(
                f"launcher.experiment_log_dir is {folder}, which lies in this machine's memory ({kind}): compute nodes do not "
                "see it. Expected a folder on a file system that they share. Change launcher.experiment_log_dir."
            )
        local = local or next((place for place in USUALLY_LOCAL if there.is_relative_to(place)), None)
    if local is not None:
        print(
            f"warning: launcher.experiment_log_dir is {folders[0]}, under {local}, usually another disk on each node. A job "
            "whose node does not see its folder says so in its comment (omnivision runs, squeue -o %k).",
            file=sys.stderr,
        )
