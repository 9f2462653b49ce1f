"""Submission of runs to SLURM: the checks beforehand, the batch script, and the task that SLURM starts on a node."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnivision.checkpoint.fingerprint import changed_settings, check_same_settings
from omnivision.config.schema import Settings
from omnivision.config.validate import validate_config
from omnivision.launch import slurm
from omnivision.launch.launcher import Job, run_dir_of
from omnivision.launch.slurm_jobs import LOGS, JobLog, find_run_dir, parse_dependencies, write_cancelled
from omnivision.reporting.run_directory import WAITING, RunDir, file_lock, slurm_job_id, slurm_restart_count
from omnivision.utils.errors import UserError, truncate_list
from omnivision.utils.io import LATEST, write_atomically
from omnivision.utils.signals import SIGNALS, StopSignal, seconds_to_leave, signals_ignored

if TYPE_CHECKING:
    from submitit import SlurmExecutor

    from omnivision.distributed.process_group import RankInfo

ENDED_BADLY = ("failed", "interrupted", "cancelled")
UNMEASURED_DELAY = 120  # seconds before the time limit that SLURM signals a run whose speed is unknown
PORTS_PER_JOB = 13  # one for each start, so that a port left open by the start before is no obstacle
SECRET = re.compile(r"key|token|secret|pass|_pwd|dsn|cred|auth|cookie|private|signature|session", re.IGNORECASE)
URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # user:password@
# The files that submitit writes when it submits.
SUBMITIT_FILES = re.compile(
    r"(\.submission_file_\w+\.sh|\w+_submission\.sh|\w+_submitted\.pkl|[0-9a-f]{32}\.pkl)(\.save_tmp)?"
)


# ---- submission ---------------------------------------------------------------------------------------------------


def submit(jobs: Sequence[Job]) -> int:
    """Submit runs to SLURM, several as one array, and return at once. A finished or queued run is left alone.

    Prints a line for each run: `submitted`, `queued` or `finished`, with `job_id=` and `folder=`. Raises UserError for what
    SLURM would not take or could not run, and StopRequested for a signal; nothing is left submitted then.
    """
    unfinished = [job for job in jobs if not is_finished(job)]
    for job in jobs:
        if job not in unfinished:
            print(f"finished folder={run_dir_of(job).path}")
            warn_of_other_settings(job)
    queue = slurm.squeue() if unfinished else {}
    wanted = [job for job in unfinished if not is_queued(job, queue)]
    if not wanted:
        return 0
    check_submission(wanted, queue)
    for job in wanted:
        run_dir_of(job).create(LOGS)
    logs = submit_dir([run_dir_of(job).path for job in wanted])
    logs.mkdir(parents=True, exist_ok=True)
    stop = StopSignal()
    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.handle_signals())
        stop.raise_if_requested()
        # The same command given twice at once: the second one waits here, and then finds the first one's job.
        for locked in sorted({folder.resolve() for folder in (logs, *(run_dir_of(job).path / LOGS for job in wanted))}):
            stack.enter_context(file_lock(locked / ".submission"))
        queue = slurm.squeue()
        wanted = [job for job in wanted if not is_queued(job, queue, locked=True)]
        for file in logs.glob("*_submitted.pkl"):  # of jobs that are over: a new job of the same id would load it
            state = queue.get(file.name.removesuffix("_submitted.pkl"))
            if state is None or state.is_over:
                file.unlink(missing_ok=True)
        if wanted:
            sbatch([dataclasses.replace(job, token=secrets.token_hex(8)) for job in wanted], logs)
    return 0


def submit_dir(folders: Sequence[Path]) -> Path:
    """Return the folder of submitit's files: in the run directory; for an array in the common parent, if that is writable."""
    common = Path(os.path.commonpath([folder.absolute() for folder in folders]))
    return (common if common.parent != common and os.access(common, os.W_OK) else folders[0].absolute()) / LOGS


def sbatch(jobs: Sequence[Job], logs: Path) -> None:
    """Submit jobs, several as one array, and print a line for each.

    On any failure, Ctrl-C and signals included, the submission is rolled back and partial jobs are cancelled. Raises UserError
    with SLURM's refusal, or why the job could not be written.
    """
    before, run_dirs = set(logs.iterdir()), [run_dir_of(job) for job in jobs]
    summaries = [run_dir.read_summary() for run_dir in run_dirs]
    texts, tokens = [job.config_text for job in jobs], [job.token for job in jobs]
    submitit_settings = jobs[0].settings.submitit
    try:
        for job, run_dir in zip(jobs, run_dirs, strict=True):  # first, since the job may start at once and write itself
            waiting: dict[str, Any] = {"job": {"logs": str(logs), "dependency": submitit_settings.dependency}}
            if job.settings.trainer.mode != "val":
                waiting |= {"status": "queued", "exit_reason": None}
            run_dir.write_summary(**waiting)
        # submitit repeats on standard error what SLURM says.
        with slurm.scrubbed_sbatch_env(submitit_settings), contextlib.redirect_stderr(io.StringIO()):
            executor = slurm_executor(jobs[0].settings, run_dirs[0], logs)
            if len(jobs) > 1:
                submitted = executor.map_array(run_slurm_task, texts, tokens)
            else:
                submitted = [executor.submit(run_slurm_task, texts[0], tokens[0])]
    except BaseException as error:
        with signals_ignored():
            # Another job of a sweep's folder may have written a log there meanwhile.
            written = {file for file in set(logs.iterdir()) - before if SUBMITIT_FILES.fullmatch(file.name)}
            cancelled = slurm.cancel_jobs_of(written)
            for file in written:
                file.unlink(missing_ok=True)
            for run_dir, summary in zip(run_dirs, summaries, strict=True):
                run_dir.replace_summary(summary)
        if isinstance(error, RuntimeError):  # submitit's, with sbatch's words
            output = " ".join(str(error).split())
            raise UserError(f"SLURM refused the job: {output}. Change the submitit settings.{cancelled}") from None
        if isinstance(error, OSError):
            raise UserError(
                f"{logs} cannot be written: {error}. Change launcher.experiment_log_dir.{cancelled}"
            ) from None
        raise
    try:
        with signals_ignored():  # SLURM has the job: it must be known which
            note_submission(jobs, [job.job_id for job in submitted], logs)
    except OSError as error:
        print(f"warning: the submission could not be noted in {logs}: {error}.", file=sys.stderr)


def note_submission(jobs: Sequence[Job], ids: Sequence[str], logs: Path) -> None:
    """Print and write which job works for each run directory, and with which configuration."""
    run_dirs = [run_dir_of(job) for job in jobs]
    for run_dir, job_id in zip(run_dirs, ids, strict=True):
        print(f"submitted job_id={job_id} folder={run_dir.path}", flush=True)
    if len(jobs) > 1:
        paths = [str(run_dir.path.absolute()) for run_dir in run_dirs]
        write_atomically(logs / f"{ids[0].partition('_')[0]}_folders.json", f"{json.dumps(paths)}\n")
    dependency = jobs[0].settings.submitit.dependency
    # What it waits for may have failed while it was submitted, and could not cancel a job that was not in the queue yet.
    problem = dependency_problem(dependency, slurm.squeue_or_none() or {}) if dependency else None
    for job, run_dir, job_id in zip(jobs, run_dirs, ids, strict=True):
        write_atomically(run_dir.path / LOGS / f"{job_id}_config.yaml", job.config_text)
        settings = {"mode": job.settings.trainer.mode, "max_requeues": job.settings.submitit.max_requeues}
        JobLog(run_dir, job_id, token=job.token).note("submitted", **settings)
        known = run_dir.read_summary().get("job") or {}
        if "job_id" not in known:
            run_dir.write_summary(job=known | {"job_id": job_id})
        if problem:
            write_cancelled(run_dir, job_id, problem)


# ---- checks before a submission -----------------------------------------------------------------------------------


def is_finished(job: Job) -> bool:
    """Return whether a run has done all the epochs that it is asked for; an evaluation is always done again."""
    summary, trainer = run_dir_of(job).read_summary(), job.settings.trainer
    done = summary.get("status") == "finished" and (summary.get("epochs") or 0) >= trainer.max_epochs
    return done and trainer.mode != "val"


def warn_of_other_settings(job: Job) -> None:
    """Warn if the settings of a finished run differ from the command's, but for where and how it runs."""
    changes = changed_settings(run_dir_of(job).path / "config.yaml", job.config_text)
    if changes := [change for change in changes if not change.startswith(("submitit.", "launcher."))]:
        print(
            f"warning: the finished run in {run_dir_of(job).path} had other settings: {truncate_list(changes)}. Set "
            "launcher.experiment_log_dir for a new run.",
            file=sys.stderr,
        )


def is_queued(job: Job, queue: Mapping[str, slurm.JobState], locked: bool = False) -> bool:
    """Return whether a job for this run is in the queue, and print a line then. Raises UserError if it has other settings.

    A job that was not noted is being submitted by another command or, if that command is `locked` out, was submitted by one
    that was killed. It is cancelled then, since it may lack the file that it would load.
    """
    run_dir, ours = run_dir_of(job), []
    for job_id, state in queue.items():
        other = None if state.is_over else find_run_dir(Path(state.command).parent, job_id)
        if other is not None and other.path.resolve() == run_dir.path.resolve():
            ours.append(job_id)
    if not ours:
        return False
    job_id = min(ours, key=lambda job_id: queue[job_id].state == "COMPLETING")  # its successor may be there already
    name = queue[job_id].state
    if name == "COMPLETING" and run_dir.read_summary().get("status") not in WAITING:
        return False  # it has ended and is not requeued
    config = run_dir.path / LOGS / f"{job_id}_config.yaml"
    if not config.exists() and run_dir.job_id() != job_id:
        if locked:
            slurm.run_slurm_command("scancel", job_id)
            print(f"warning: cancelled job {job_id}, whose submission was killed.", file=sys.stderr)
        return False
    # The dependency may have ended since, so that the command has none. A folder may have two names.
    same = ("submitit.dependency:", "launcher.experiment_log_dir:")
    changes = changed_settings(config, job.config_text)
    if changes := [change for change in changes if not change.startswith(same)]:
        raise UserError(
            f"Job {job_id} is in the queue ({name}) for {run_dir.path}, with other settings: {truncate_list(changes)}. Give "
            f"the same settings, end it with scancel {job_id}, or change launcher.experiment_log_dir."
        )
    print(f"queued job_id={job_id} state={name} folder={run_dir.path}")
    return True


def check_submission(jobs: Sequence[Job], queue: Mapping[str, slurm.JobState]) -> None:
    """Raise UserError for jobs that SLURM would not take, or would never start; several make one array."""
    settings, run_dir = jobs[0].settings, run_dir_of(jobs[0])
    check_same_resources([job.settings for job in jobs])
    for job in jobs:
        check_run_dir(job, queue)
    if problem := dependency_problem(settings.submitit.dependency, queue):
        raise UserError(
            f"submitit.dependency is {settings.submitit.dependency}, and {problem}. Submit that job again first, or set "
            "submitit.dependency=null."
        )
    limits = slurm.partition_limits(settings.submitit.partition)
    for key, wanted, most, unit in (
        ("launcher.num_nodes", settings.launcher.num_nodes, limits[0], "nodes"),
        ("submitit.timeout_hour", settings.submitit.timeout_hour, None if limits[1] is None else limits[1] / 60, "h"),
    ):
        if most is not None and wanted > most:  # SLURM would accept the job and never start it
            partition = settings.submitit.partition or "the default partition"
            raise UserError(f"{key} is {wanted:g}; {partition} has {most:g} {unit}. Change it, or submitit.partition.")
    if shutil.which("bash"):  # compute nodes may have it all the same
        parsed = subprocess.run(["bash", "-n"], input=batch_script(settings, run_dir), capture_output=True, text=True)
        if parsed.returncode:
            raise UserError(f"submitit.setup must be complete shell commands; bash: {' '.join(parsed.stderr.split())}.")


def check_run_dir(job: Job, queue: Mapping[str, slurm.JobState]) -> None:
    """Raise UserError for a run directory that SLURM cannot name, that is in use, or whose checkpoint is of other settings."""
    run_dir, trainer = run_dir_of(job), job.settings.trainer
    if wrong := [sign for sign in "%\\\n\r" if sign in str(run_dir.path)]:
        raise UserError(
            f"launcher.experiment_log_dir is {str(run_dir.path)!r}; for SLURM it must not contain {wrong[0]!r}. Change it."
        )
    holder = str((run_dir.holder() or {}).get("job"))
    # The lock of a job that is over does not count.
    if holder == "None" or (holder in queue and not queue[holder].is_over):
        run_dir.require_free()
    resumes = trainer.mode != "val" and (run_dir.checkpoints / LATEST).exists()
    if resumes and not trainer.checkpoint.allow_changes:
        check_same_settings(run_dir.path / "config.yaml", job.config_text)


def check_same_resources(points: Sequence[Settings]) -> None:
    """Raise UserError unless all runs of a sweep ask SLURM for the same: an array has one batch script."""
    resources = [
        {f"launcher.{key}": value for key, value in settings.launcher if key != "experiment_log_dir"}
        | {f"submitit.{key}": value for key, value in settings.submitit}
        | {"trainer.accelerator": settings.trainer.accelerator}
        for settings in points
    ]
    for name, value in resources[0].items():
        if other := [each[name] for each in resources if each[name] != value]:
            raise UserError(
                f"{name} must be the same in all runs of a sweep, which is one array; got {value} and {other[0]}. Sweep over "
                "other settings, or submit twice."
            )


def dependency_problem(dependency: str | None, queue: Mapping[str, slurm.JobState]) -> str | None:
    """Return why a job with this dependency would never start, or at the wrong time; None if it may wait.

    SLURM takes a job that it does not know for one that ended well.
    """
    for condition, wanted in parse_dependencies(dependency or ""):
        array = f"{wanted.removesuffix('_*')}_"
        states = {job: state for job, state in queue.items() if job == wanted or job.startswith(array)}
        if not states and not slurm.show_job(wanted):
            return f"SLURM does not know job {wanted} (it forgets jobs some minutes after their end)"
        for job_id, state in states.items():
            run_dir = find_run_dir(Path(state.command).parent, job_id)
            summary = {} if run_dir is None else run_dir.read_summary()
            ends_badly = run_dir is not None and run_dir.job_id() == job_id and summary.get("status") in ENDED_BADLY
            ended_well = state.state == "COMPLETED"
            ended_badly = (state.is_over and not ended_well) or (
                ends_badly and state.state in ("RUNNING", "COMPLETING")
            )
            if (condition in ("afterok", "aftercorr") and ended_badly) or (condition == "afternotok" and ended_well):
                run = f" ({run_dir.path})" if run_dir is not None else ""
                reason = summary.get("exit_reason") or state.state
                return f"job {job_id}{run} {'ended' if ended_well else 'did not end'} well: {reason}"
    return None


# ---- the batch script ---------------------------------------------------------------------------------------------


def slurm_executor(settings: Settings, run_dir: RunDir, logs: Path) -> SlurmExecutor:
    """Return submitit's executor for a run. Its batch script is that of `batch_script`."""
    import submitit

    executor = submitit.SlurmExecutor(folder=logs)
    executor.update_parameters(**sbatch_parameters(settings, run_dir, logs))
    return executor


def batch_script(settings: Settings, run_dir: RunDir) -> str:
    """Return the script that SLURM would get for a run, also where SLURM is not installed."""
    os.environ.pop("SUBMITIT_PREEMPT_SIGNAL", None)  # read at import; ours listen to SIGUSR2
    from submitit.slurm.slurm import _make_sbatch_string

    logs = run_dir.path.absolute() / LOGS
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(logs))}"
    return str(_make_sbatch_string(command=command, folder=logs, **sbatch_parameters(settings, run_dir, logs)))


def sbatch_parameters(settings: Settings, run_dir: RunDir, logs: Path) -> dict[str, Any]:
    """Return what the settings say about the job, by submitit's names."""
    wanted, launcher = settings.submitit, settings.launcher
    options: dict[str, Any] = {
        "requeue": True,  # when a node dies or a job is preempted; sites may have it off
        "output": "/dev/null",  # a job whose log cannot be opened would fail without a message; see `batch_prologue.sh`
        "error": "/dev/null",
    }
    if wanted.dependency is not None:
        options["kill-on-invalid-dep"] = "yes"  # else it waits for ever when what it waits for has failed
    same_name = ("partition", "account", "qos", "comment", "exclude", "nodelist", "dependency", "array_parallelism")
    parameters = {name: getattr(wanted, name) for name in same_name} | {
        "job_name": wanted.name,
        "time": max(1, math.ceil(wanted.timeout_hour * 60 - 1e-6)),  # in minutes; SLURM takes 0 for no limit
        "nodes": launcher.num_nodes,
        "ntasks_per_node": launcher.gpus_per_node,
        "gpus_per_node": None if settings.trainer.accelerator == "cpu" else launcher.gpus_per_node,
        "cpus_per_task": wanted.cpus_per_task,
        "mem": wanted.mem if wanted.mem_gb is None else f"{math.ceil(wanted.mem_gb * 1024)}M",
        "constraint": wanted.constraints,
        "signal_delay_s": signal_delay(settings, run_dir),
        "setup": batch_script_prologue(logs, wanted.setup),
        # SLURM 22.05 and later do not hand the number of CPUs on to srun. One failed task ends the others; so does one that
        # left well long ago (it saw on a file system that lags that the run is finished, and they did not).
        # Tasks get the script's environment, whatever SBATCH_EXPORT says.
        "srun_args": [f"--cpus-per-task={wanted.cpus_per_task}", "--kill-on-bad-exit=1", "--wait=300", "--export=ALL"],
        "additional_parameters": options | wanted.additional_parameters,
    }
    return {name: value for name, value in parameters.items() if value is not None}


def batch_script_prologue(logs: Path, setup: Sequence[str]) -> list[str]:
    """Return the shell lines before the tasks: `batch_prologue.sh`, and the user's `setup`, each line noted before it runs."""
    values = {"logs": logs, "python": sys.executable, "checkout": Path(__file__).parents[2]}
    lines = [f"readonly omnivision_{name}={shlex.quote(str(value))}" for name, value in values.items()]
    lines += Path(__file__).with_name("batch_prologue.sh").read_text(encoding="utf-8").splitlines()
    for command in setup:
        if command.strip() and not command.lstrip().startswith("#"):
            reached = shlex.quote(f"submitit.setup ended the job, and nothing was trained: {command}")
            lines.append(f'echo {reached} >"$omnivision_reached"\n{{ {command}\n}} || exit')
    return [*lines, ': >"$omnivision_reached"', 'cd "$omnivision_from" || exit', "omnivision_code"]


def signal_delay(settings: Settings, run_dir: RunDir) -> int:
    """Return the seconds before the time limit when SLURM signals the run: as set, else by measured steps and saving."""
    if settings.submitit.signal_delay_s is not None:
        return settings.submitit.signal_delay_s
    summary, limit = run_dir.read_summary(), settings.submitit.timeout_hour * 3600
    step = summary.get("step_seconds")
    delay = UNMEASURED_DELAY if step is None else math.ceil(seconds_to_leave(step, summary.get("save_seconds")))
    return max(1, min(delay, int(limit / 2)))


# ---- on a node ----------------------------------------------------------------------------------------------------


def run_slurm_task(config_text: str, token: str) -> None:
    """Run a task of a job; SLURM starts one for each rank. `config_text` is unresolved, so that no file holds the environment.

    Exits with the run's exit code, by SystemExit, if it is not 0.
    """
    # submitit's handlers swallow these signals. Until `run_rank` handles them they end this process, and the batch script
    # writes that.
    for number in (*SIGNALS, signal.SIGCONT):
        signal.signal(number, signal.SIG_DFL)
    import submitit
    from omegaconf import DictConfig, OmegaConf

    from omnivision.launch.run import run_rank

    config = OmegaConf.create(config_text)
    assert isinstance(config, DictConfig)
    job = Job(validate_config(config), config_text, token)
    run_dir, rank_info, job_id = (
        run_dir_of(job),
        slurm_rank(submitit.JobEnvironment().hostnames[0]),
        slurm_job_id() or "",
    )
    if is_finished(job):
        print(f"finished folder={run_dir.path}")
        return
    job_log = JobLog(run_dir, job_id, slurm_restart_count(), token, job.settings.submitit.max_requeues, rank_info.rank)
    if rank_info.rank == 0:
        logs = run_dir.path / LOGS
        logs.mkdir(parents=True, exist_ok=True)
        write_atomically(logs / f"{job_id}_environment.json", json.dumps(public_environment(), indent=1) + "\n")
        job_log.record_start(os.environ["SLURM_JOB_NODELIST"], rank_info.world_size)
    if code := run_rank(job, rank_info, job_log):
        sys.exit(code)


def slurm_rank(host: str) -> RankInfo:
    """Return this task's rank, from SLURM's variables. The ranks meet at a port of `host`, the first node.

    The port belongs to the job: the next 1500 jobs have others, and no system hands out one of those by itself.
    """
    from omnivision.distributed.process_group import RankInfo

    env, world = os.environ, int(os.environ["SLURM_NTASKS"])
    # Each element of an array has another SLURM_JOB_ID, except the last.
    number = PORTS_PER_JOB * int(env["SLURM_JOB_ID"]) + slurm_restart_count() % PORTS_PER_JOB
    port = int(env.get("MASTER_PORT") or 10_000 + number % (PORTS_PER_JOB * 1500))
    rank, local_rank = int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"])
    address = f"tcp://{host}:{port}" if world > 1 else None
    return RankInfo(rank, world, local_rank, world // int(env["SLURM_JOB_NUM_NODES"]), address)


def public_environment() -> dict[str, str | None]:
    """Return the variables of this process; of those that sound secret, the name alone."""
    return {
        name: None if SECRET.search(name) else URL_CREDENTIALS.sub("...", value)
        for name, value in sorted(os.environ.items())
    }
