"""Submission of runs to SLURM, and the checks before it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omnivision.checkpoint.fingerprint import check_same_settings, list_changes_since
from omnivision.config.flat import describe_changes, flatten_yaml
from omnivision.launch import slurm
from omnivision.launch.batch_script import batch_script
from omnivision.launch.job import Job
from omnivision.launch.slurm_jobs import (
    SUBMISSION_FOLDER,
    JobLog,
    Submission,
    find_submission,
    parse_dependencies,
    runs_file,
    write_cancelled,
)
from omnivision.reporting.run_directory import QUEUED_STATUSES, file_lock
from omnivision.utils.errors import UserError, truncate_list
from omnivision.utils.io import LATEST, write_atomically
from omnivision.utils.signals import StopSignal, signals_ignored
from omnivision.utils.streams import warn

FAILED_STATUSES = ("failed", "interrupted", "cancelled")


# ---- submission ---------------------------------------------------------------------------------------------------


def submit(jobs: Sequence[Job]) -> int:
    """Submit runs to SLURM, several as one array, and return at once. A finished or queued run is left alone.

    Prints a line for each run: `submitted`, `queued` or `finished`, with `job_id=` and `folder=`. Raises UserError for
    runs that SLURM would reject or never start, and StopRequested for a signal; in both cases, nothing stays submitted.
    """
    unfinished = [job for job in jobs if not job.is_finished]
    for job in jobs:
        if job not in unfinished:
            print(f"finished folder={job.run_dir.path}")
            warn_of_other_settings(job)
    if not unfinished:
        return 0
    for job in unfinished:
        job.run_dir.create(SUBMISSION_FOLDER)
    logs = submit_dir([job.run_dir.path for job in unfinished])
    logs.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(StopSignal().raise_signals())
        # If the same command runs twice at once, the second waits here and then finds the first one's job.
        for locked in sorted(
            {folder.resolve() for folder in (logs, *(job.run_dir.path / SUBMISSION_FOLDER for job in unfinished))}
        ):
            stack.enter_context(file_lock(locked / ".submission"))
        queue = slurm.squeue()
        if to_submit := [job for job in unfinished if not is_queued(job, queue)]:
            check_submission(to_submit, queue)
            submit_or_roll_back(to_submit, logs)
    return 0


def submit_dir(folders: Sequence[Path]) -> Path:
    """Return the folder for the batch script: in the run directory or, for an array, in the common parent if writable."""
    common = Path(os.path.commonpath([folder.absolute() for folder in folders]))
    return (
        common if common.parent != common and os.access(common, os.W_OK) else folders[0].absolute()
    ) / SUBMISSION_FOLDER


def submit_or_roll_back(jobs: Sequence[Job], logs: Path) -> None:
    """Submit jobs, several as one array, and print a line for each.

    On any failure, including Ctrl-C and signals, roll the submission back and cancel a job that SLURM accepted. Raises
    UserError if SLURM refuses, or if a file cannot be written.
    """
    settings, run_dirs = jobs[0].settings, [job.run_dir for job in jobs]
    summaries = [run_dir.read_summary() for run_dir in run_dirs]
    token = secrets.token_hex(8)
    script, runs = logs / f"{token}_submission.sh", []
    for job in jobs:
        requeues = job.settings.submitit.max_requeues
        runs.append(asdict(Submission(token, str(job.run_dir.path.absolute()), job.config_text, requeues)))
    try:
        # Write everything first: the job may start at once.
        write_atomically(runs_file(script), json.dumps(runs, indent=1) + "\n")
        write_atomically(script, batch_script(settings, run_dirs[0], script, len(jobs)))
        for job, run_dir in zip(jobs, run_dirs, strict=True):
            waiting: dict[str, Any] = {"job": {"logs": str(logs), "dependency": settings.submitit.dependency}}
            if job.settings.trainer.mode != "val":
                waiting |= {"status": "queued", "exit_reason": None}
            run_dir.write_summary(**waiting)
        job_id = slurm.sbatch(script, settings.submitit)
    except BaseException as error:
        with signals_ignored():
            cancelled = slurm.cancel_jobs_of(script)
            for file in (script, runs_file(script)):
                file.unlink(missing_ok=True)
            for run_dir, summary in zip(run_dirs, summaries, strict=True):
                run_dir.replace_summary(summary)
        if isinstance(error, slurm.SlurmError):
            raise UserError(f"{error}{cancelled}") from None
        if isinstance(error, OSError):
            raise UserError(f"{logs} cannot be written: {error}. Set launcher.experiment_log_dir.{cancelled}") from None
        raise
    try:
        with signals_ignored():  # SLURM has the job; record its id
            note_submission(jobs, job_id, script)
    except OSError as error:
        warn(f"the submission could not be recorded in {logs}: {error}.")


def note_submission(jobs: Sequence[Job], job_id: str, script: Path) -> None:
    """Print and record each run directory's job and configuration."""
    job_ids = [job_id] if len(jobs) == 1 else [f"{job_id}_{element}" for element in range(len(jobs))]
    for job, own_id in zip(jobs, job_ids, strict=True):
        print(f"submitted job_id={own_id} folder={job.run_dir.path}", flush=True)
    script.rename(script.with_name(f"{job_id}_submission.sh"))
    if len(jobs) > 1:
        folders = json.dumps([str(job.run_dir.path.absolute()) for job in jobs])
        write_atomically(script.with_name(f"{job_id}_folders.json"), f"{folders}\n")
    # The dependency may have failed before this job was in the queue.
    dependency = jobs[0].settings.submitit.dependency
    problem = dependency_problem(dependency, slurm.squeue_or_none() or {}) if dependency else None
    for job, own_id in zip(jobs, job_ids, strict=True):
        run_dir = job.run_dir
        write_atomically(run_dir.path / SUBMISSION_FOLDER / f"{own_id}_config.yaml", job.config_text)
        JobLog(run_dir, own_id, token=script.name.partition("_")[0]).note("submitted")
        known = run_dir.read_summary().get("job") or {}
        if "job_id" not in known:
            run_dir.write_summary(job=known | {"job_id": own_id})
        if problem:
            write_cancelled(run_dir, own_id, problem)


# ---- checks before a submission -----------------------------------------------------------------------------------


def warn_of_other_settings(job: Job) -> None:
    """Warn if a finished run's settings differ from the command's, except for where and how it runs."""
    changes = list_changes_since(job.run_dir.path / "config.yaml", job.config_text)
    if changes := [change for change in changes if not change.startswith(("submitit.", "launcher."))]:
        warn(
            f"the finished run in {job.run_dir.path} had other settings: {truncate_list(changes, separator='; ')}. Set "
            "launcher.experiment_log_dir for a new run."
        )


def is_queued(job: Job, queue: Mapping[str, slurm.QueueEntry]) -> bool:
    """Return whether a job for this run is in the queue; if so, print a line. Raises UserError if it has other settings."""
    run_dir, ours = job.run_dir, {}
    for job_id, state in queue.items():
        other = None if state.is_over else find_submission(state.command, job_id)
        if other is not None and other.run_dir.path.resolve() == run_dir.path.resolve():
            ours[job_id] = other
    if not ours:
        return False
    # Prefer a waiting job to a completing one.
    job_id = min(ours, key=lambda job_id: queue[job_id].state == "COMPLETING")
    name = queue[job_id].state
    if name == "COMPLETING" and run_dir.read_summary().get("status") not in QUEUED_STATUSES:
        return False  # it has ended and is not requeued
    # Ignore a dependency that has ended, and another path to the same folder.
    same = ("submitit.dependency:", "launcher.experiment_log_dir:")
    every = describe_changes(flatten_yaml(ours[job_id].config_text), flatten_yaml(job.config_text)).values()
    if changes := [change for change in every if not change.startswith(same)]:
        raise UserError(
            f"Job {job_id} is in the queue ({name}) for {run_dir.path}, with other settings: "
            f"{truncate_list(changes, separator='; ')}. Give the same settings, cancel it with "
            f"scancel {job_id}, or change launcher.experiment_log_dir."
        )
    print(f"queued job_id={job_id} state={name} folder={run_dir.path}")
    return True


def check_submission(jobs: Sequence[Job], queue: Mapping[str, slurm.QueueEntry]) -> None:
    """Raise UserError for jobs that SLURM would reject or never start; several jobs form one array."""
    settings, run_dir = jobs[0].settings, jobs[0].run_dir
    dependency = settings.submitit.dependency
    for job in jobs:
        check_run_dir(job, queue)
    if problem := dependency_problem(dependency, queue):
        raise UserError(
            f"submitit.dependency is {dependency}, and {problem}. Submit that job again first, or set "
            "submitit.dependency=null."
        )
    nodes, minutes = slurm.partition_limits(settings.submitit.partition)
    for key, wanted, most in (
        ("launcher.num_nodes", settings.launcher.num_nodes, nodes),
        ("submitit.timeout_hour", settings.submitit.timeout_hour, None if minutes is None else minutes / 60),
    ):
        if most is not None and wanted > most:
            partition = settings.submitit.partition or "the default partition"
            raise UserError(
                f"{key} must be <= {most:g}, the limit of {partition}, got {wanted:g}. Change it, or submitit.partition."
            )
    script, *others = [batch_script(job.settings, run_dir) for job in jobs]
    for other in others:
        if lines := [line for line in other.splitlines() if line not in script.splitlines()]:
            raise UserError(
                "All runs of a sweep form one array and must have the same launcher and submitit settings; got also "
                f"{', '.join(lines)}. Sweep over other settings, or submit twice."
            )
    if shutil.which("bash"):  # it may exist only on the compute nodes
        parsed = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        if parsed.returncode:
            raise UserError(f"submitit.setup must be complete shell commands; bash: {' '.join(parsed.stderr.split())}.")


def check_run_dir(job: Job, queue: Mapping[str, slurm.QueueEntry]) -> None:
    """Raise UserError if SLURM cannot write the run directory's name, it is in use, or its checkpoint has other settings."""
    run_dir, trainer = job.run_dir, job.settings.trainer
    if wrong := [sign for sign in "%\\\n\r" if sign in str(run_dir.path)]:
        raise UserError(
            f"launcher.experiment_log_dir is {str(run_dir.path)!r}; for SLURM it must not contain {wrong[0]!r}. Change it."
        )
    holder = run_dir.holder().get("job")
    # The lock of a job that is over does not count.
    if holder is None or (holder in queue and not queue[holder].is_over):
        run_dir.require_free()
    resumes = trainer.mode != "val" and (run_dir.checkpoints / LATEST).exists()
    if resumes and not trainer.checkpoint.allow_changes:
        check_same_settings(run_dir.path / "config.yaml", job.config_text)


def dependency_problem(dependency: str | None, queue: Mapping[str, slurm.QueueEntry]) -> str | None:
    """Return why a job with this dependency would never start, or would start at the wrong time; None if it may wait.

    SLURM treats an unknown dependency as succeeded.
    """
    for condition, wanted in parse_dependencies(dependency or ""):
        array = f"{wanted.removesuffix('_*')}_"
        states = {job: state for job, state in queue.items() if job == wanted or job.startswith(array)}
        if not states and not slurm.show_job(wanted):
            return f"SLURM does not know job {wanted} (it forgets jobs some minutes after their end), or did not answer"
        for job_id, state in states.items():
            submission = find_submission(state.command, job_id)
            summary = {} if submission is None else submission.run_dir.read_summary()
            about_it = (summary.get("job") or {}).get("job_id") == job_id
            is_failing = (
                about_it and summary.get("status") in FAILED_STATUSES and state.state in ("RUNNING", "COMPLETING")
            )
            succeeded = state.state == "COMPLETED"
            failed = (state.is_over and not succeeded) or is_failing
            if (condition in ("afterok", "aftercorr") and failed) or (condition == "afternotok" and succeeded):
                run = f" ({submission.folder})" if submission is not None else ""
                reason = summary.get("exit_reason") or state.state
                return f"job {job_id}{run} {'succeeded' if succeeded else 'failed'}: {reason}"
    return None
