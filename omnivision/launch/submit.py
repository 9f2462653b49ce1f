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

from omnivision.checkpoint.fingerprint import changed_settings, check_same_settings, truncate_list
from omnivision.config.compose import use_yaml12_numbers
from omnivision.config.schema import Settings
from omnivision.config.validate import validate_config
from omnivision.launch import slurm
from omnivision.launch.launcher import Job, run_folder
from omnivision.launch.slurm_jobs import (
    LOGS,
    JobLog,
    Task,
    dependency_message,
    note,
    parse_dependencies,
    run_folder_of,
)
from omnivision.reporting.run_directory import WAITING, RunDir, file_lock
from omnivision.utils.errors import UserError
from omnivision.utils.io import LATEST, write_atomically
from omnivision.utils.signals import SIGNALS, StopSignal, seconds_to_leave, signals_ignored

if TYPE_CHECKING:
    from submitit import SlurmExecutor

LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
USUALLY_LOCAL = ("/tmp", "/var/tmp", "/scratch/local", "/dev/shm")
ENDED_BADLY = ("failed", "interrupted", "cancelled")
FOLDER_SECONDS = 60  # that a node waits for the run folder to appear on a shared file system that lags
UNMEASURED_DELAY = 120  # seconds before the time limit that SLURM signals a run of which nothing is known
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
    unfinished = []
    for job in jobs:
        if is_finished(job.settings, run_folder(job)):
            print(f"finished folder={run_folder(job).path}")
            warn_of_other_settings(job)
        else:
            unfinished.append(job)
    queue = slurm.squeue() if unfinished else {}
    wanted = [job for job in unfinished if not is_queued(job, queue)]
    if not wanted:
        return 0
    check_submission(wanted, queue)
    for job in wanted:
        run_folder(job).create(LOGS)
        require_free(run_folder(job), queue)
    logs = submit_dir([run_folder(job).path for job in wanted])
    logs.mkdir(parents=True, exist_ok=True)
    stop = StopSignal()
    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.handle_signals())
        stop.raise_if_requested()
        # The same command given twice at once: the second one waits here, and then finds the first one's job.
        for locked in sorted({folder.resolve() for folder in (logs, *(run_folder(job).path / LOGS for job in wanted))}):
            stack.enter_context(file_lock(locked / ".submission"))
        queue = slurm.squeue()
        wanted = [job for job in wanted if not is_queued(job, queue, locked=True)]
        remove_old_pickles(logs, queue)
        if wanted:
            sbatch([dataclasses.replace(job, token=secrets.token_hex(8)) for job in wanted], logs)
    return 0


def check_submission(jobs: Sequence[Job], queue: Mapping[str, slurm.JobState]) -> None:
    """Raise UserError for jobs that SLURM would not take, or would never start; several make one array."""
    for job in jobs:
        require_same_experiment(job)
    first = jobs[0].settings
    check_same_resources([job.settings for job in jobs])
    check_partition(first)
    check_dependency(first.submitit.dependency, queue)
    check_folders([run_folder(job).path for job in jobs])
    check_setup(first.submitit.setup)


def submit_dir(folders: Sequence[Path]) -> Path:
    """Return where submitit keeps a job's files: in the run folder, for an array in the common parent of its run folders, or in
    the first one if that parent is not writable.
    """
    common = Path(os.path.commonpath([folder.absolute() for folder in folders]))
    return (common if common.parent != common and os.access(common, os.W_OK) else folders[0].absolute()) / LOGS


def remove_old_pickles(logs: Path, queue: Mapping[str, slurm.JobState]) -> None:
    """Remove submitit's files of jobs that are over: a new job of the same id would load them."""
    for file in logs.glob("*_submitted.pkl"):
        state = queue.get(file.name.removesuffix("_submitted.pkl"))
        if state is None or state.is_over:
            file.unlink(missing_ok=True)


def sbatch(jobs: Sequence[Job], logs: Path) -> None:
    """Submit jobs, several as one array, and print a line for each.

    On any failure, Ctrl-C and signals included, the submission is rolled back and partial jobs are cancelled. Raises UserError
    with SLURM's refusal, or why the job could not be written.
    """
    before, folders = set(logs.iterdir()), [run_folder(job) for job in jobs]
    summaries = [folder.read_summary() for folder in folders]
    texts, tokens = [job.config_text for job in jobs], [job.token for job in jobs]
    submitit_settings = jobs[0].settings.submitit
    try:
        for job, folder in zip(jobs, folders, strict=True):  # first, since the job may start at once and write itself
            waiting: dict[str, Any] = {"job": {"logs": str(logs), "dependency": submitit_settings.dependency}}
            if job.settings.trainer.mode != "val":
                waiting |= {"status": "queued", "exit_reason": None}
            folder.write_summary(**waiting)
        # submitit repeats on standard error what SLURM says.
        with slurm.scrubbed_sbatch_env(submitit_settings), contextlib.redirect_stderr(io.StringIO()):
            executor = slurm_executor(jobs[0].settings, folders[0], logs)
            if len(jobs) > 1:
                submitted = executor.map_array(run_slurm_task, texts, tokens)
            else:
                submitted = [executor.submit(run_slurm_task, texts[0], tokens[0])]
    except BaseException as error:
        with signals_ignored():
            # Another job of a sweep's folder may have made a log there meanwhile.
            made = {file for file in set(logs.iterdir()) - before if SUBMITIT_FILES.fullmatch(file.name)}
            rest = cancel_partial_submission(made)
            for file in made:
                file.unlink(missing_ok=True)
            for folder, summary in zip(folders, summaries, strict=True):
                folder.replace_summary(summary)
        if isinstance(error, RuntimeError):  # submitit's, with what sbatch said
            raise UserError(slurm.explain_error(str(error), submitit_settings) + rest) from None
        if isinstance(error, OSError):
            raise UserError(f"{logs} cannot be written: {error}. Change launcher.experiment_log_dir.{rest}") from None
        raise
    ids = [job.job_id for job in submitted]
    try:
        with signals_ignored():  # SLURM has the job: it must be known which
            for job_id, folder in zip(ids, folders, strict=True):
                print(f"submitted job_id={job_id} folder={folder.path}", flush=True)
            note_submission(jobs, ids, logs)
            if reason := dependency_failed(submitit_settings.dependency):
                for job_id, folder in zip(ids, folders, strict=True):
                    note(folder, "end", token="", job=job_id, status="cancelled", reason=reason)
                    folder.write_summary(status="cancelled", exit_reason=reason)
    except OSError as error:
        print(f"warning: the submission could not be noted in {logs}: {error}.", file=sys.stderr)


def cancel_partial_submission(made: set[Path]) -> str:
    """Cancel what SLURM may have taken of a failed submission that wrote these files; returns a sentence about it."""
    try:
        cancelled = slurm.cancel_jobs_of(made)
    except slurm.SlurmError:
        return " SLURM may have taken a job all the same: look with squeue, and end it with scancel."
    return f" Job {', '.join(cancelled)}, which SLURM had taken, was cancelled." if cancelled else ""


def note_submission(jobs: Sequence[Job], ids: Sequence[str], logs: Path) -> None:
    """Write down in each run folder which job works for it, and with which configuration."""
    folders = [run_folder(job) for job in jobs]
    if len(jobs) > 1:
        paths = [str(folder.path.absolute()) for folder in folders]
        write_atomically(logs / f"{ids[0].partition('_')[0]}_folders.json", f"{json.dumps(paths)}\n")
    for job, folder, job_id in zip(jobs, folders, ids, strict=True):
        write_atomically(folder.path / LOGS / f"{job_id}_config.yaml", job.config_text)
        settings = {"mode": job.settings.trainer.mode, "max_requeues": job.settings.submitit.max_requeues}
        note(folder, "submitted", job.token, job=job_id, restarts=0, **settings)
        known = folder.read_summary().get("job") or {}
        if "job_id" not in known:
            folder.write_summary(job=known | {"job_id": job_id})


# ---- checks before a submission -----------------------------------------------------------------------------------


def is_finished(settings: Settings, folder: RunDir) -> bool:
    """Return whether a run has done all the epochs that it is asked for; an evaluation is always done again."""
    summary = folder.read_summary()
    done = summary.get("status") == "finished" and (summary.get("epochs") or 0) >= settings.trainer.max_epochs
    return done and settings.trainer.mode != "val"


def warn_of_other_settings(job: Job) -> None:
    """Warn if the settings of a finished run differ from the command's, but for where and how it runs."""
    changes = changed_settings(run_folder(job).path / "config.yaml", job.config_text)
    if changes := [change for change in changes if not change.startswith(("submitit.", "launcher."))]:
        print(
            f"warning: the finished run in {run_folder(job).path} had other settings: {truncate_list(changes)}. Set "
            "launcher.experiment_log_dir for a new run.",
            file=sys.stderr,
        )


def require_same_experiment(job: Job) -> None:
    """Raise UserError if a run that has a checkpoint would resume as another experiment."""
    folder, trainer = run_folder(job), job.settings.trainer
    if trainer.mode == "val" or trainer.checkpoint.allow_changes or not (folder.checkpoints / LATEST).exists():
        return
    check_same_settings(folder.path / "config.yaml", job.config_text)


def is_queued(job: Job, queue: Mapping[str, slurm.JobState], locked: bool = False) -> bool:
    """Return whether a job for this run is in the queue, and print a line then. Raises UserError if it has other settings.

    A job that was not written down is being submitted by another command or, if that command is `locked` out, was submitted by
    one that was killed. It is cancelled then, since it may lack the file that it would load.
    """
    folder = run_folder(job)
    found = [job_id for job_id, state in queue.items() if _works_in(folder, job_id, state)]
    if not found:
        return False
    job_id = min(found, key=lambda job_id: queue[job_id].state == "COMPLETING")  # its successor may be there already
    state, summary = queue[job_id].state, folder.read_summary()
    if state == "COMPLETING" and summary.get("status") not in WAITING:
        return False  # it has ended, and comes back only if it said so
    config = folder.path / LOGS / f"{job_id}_config.yaml"
    if not config.exists() and (summary.get("job") or {}).get("job_id") != job_id:
        if locked:
            slurm.run("scancel", job_id)
            print(f"warning: cancelled job {job_id}, whose submission was killed.", file=sys.stderr)
        return False
    # The dependency may have ended since, so that the command has none. A folder may have two names.
    same = ("submitit.dependency:", "launcher.experiment_log_dir:")
    changes = changed_settings(config, job.config_text)
    if changes := [change for change in changes if not change.startswith(same)]:
        raise UserError(
            f"Job {job_id} is in the queue ({state}) for {folder.path}, with other settings: {truncate_list(changes)}. Give "
            f"the same settings, end it with scancel {job_id}, or change launcher.experiment_log_dir."
        )
    print(f"queued job_id={job_id} state={state} folder={folder.path}")
    return True


def _works_in(folder: RunDir, job_id: str, state: slurm.JobState) -> bool:
    """Return whether a job was submitted for a run folder and is not over; ids may be reused after SLURM was set up anew."""
    found = None if state.is_over else run_folder_of(Path(state.command).parent, job_id)
    return found is not None and found.path.resolve() == folder.path.resolve()


def require_free(folder: RunDir, queue: Mapping[str, slurm.JobState]) -> None:
    """Raise UserError while a live process holds a run folder; the lock of a job that is over does not count."""
    holder = str((folder.holder() or {}).get("job"))
    if holder == "None" or (holder in queue and not queue[holder].is_over):
        folder.require_free()


def check_same_resources(points: Sequence[Settings]) -> None:
    """Raise UserError unless all runs of a sweep ask SLURM for the same: an array has one batch script."""

    def resources(settings: Settings) -> dict[str, Any]:
        parts = {"launcher": vars(settings.launcher), "submitit": vars(settings.submitit)}
        found = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}
        del found["launcher.experiment_log_dir"]
        return found | {"trainer.accelerator": settings.trainer.accelerator}

    first = resources(points[0])
    for point in points[1:]:
        for name, value in resources(point).items():
            if value != first[name]:
                raise UserError(
                    f"{name} must be the same in all runs of a sweep, which is one array; got {first[name]} and {value}. Sweep "
                    "over other settings, or submit twice."
                )


def check_partition(settings: Settings) -> None:
    """Raise UserError for more nodes or time than the partition has: SLURM would accept the job and never start it."""
    wanted, nodes = settings.submitit, settings.launcher.num_nodes
    most_nodes, most_minutes = slurm.partition_limits(wanted.partition)
    name = wanted.partition or "the default partition"
    if most_nodes is not None and nodes > most_nodes:
        raise UserError(
            f"launcher.num_nodes is {nodes}, and {name} has {most_nodes} nodes. Change it, or submitit.partition."
        )
    if most_minutes is not None and wanted.timeout_hour * 60 > most_minutes:
        raise UserError(
            f"submitit.timeout_hour is {wanted.timeout_hour:g}, and a job of {name} may take {most_minutes / 60:g} h. Change "
            "it, or submitit.partition. (A run saves and is requeued at its time limit.)"
        )


def check_dependency(dependency: str | None, queue: Mapping[str, slurm.JobState]) -> None:
    """Raise UserError for a dependency on a job that SLURM does not know, which it would take for one that ended well, or on
    one that can no longer end well.
    """
    for condition, job_id in parse_dependencies(dependency or ""):
        array = f"{job_id.removesuffix('_*')}_"
        states = [state for job, state in queue.items() if job == job_id or job.startswith(array)]
        if not states and not slurm.show_job(job_id):
            raise UserError(
                f"submitit.dependency is {dependency}, and SLURM does not know job {job_id} (it forgets jobs some minutes "
                "after their end). Change submitit.dependency, or set it to null."
            )
        for state in states:
            ended_well = state.state == "COMPLETED"
            ended_badly = state.is_over and not ended_well
            if (condition in ("afterok", "aftercorr") and ended_badly) or (condition == "afternotok" and ended_well):
                folder = run_folder_of(Path(state.command).parent, job_id)
                summary = {} if folder is None else folder.read_summary()
                run = "" if folder is None else f" ({folder.path}: {summary.get('exit_reason')})"
                advice = "Submit that one again first, or change submitit.dependency."
                if summary.get("status") == "finished":
                    advice = "Its run has finished since: set submitit.dependency=null."
                raise UserError(
                    f"submitit.dependency is {dependency}, and job {job_id} is {state.state}{run}. {advice}"
                )


def dependency_failed(dependency: str | None) -> str | None:
    """Return why a job that was just submitted will never start: its dependency ended badly while it was submitted, and could
    not tell a job that was not in the queue yet. None if it may start.
    """
    needed = [job_id for condition, job_id in parse_dependencies(dependency or "") if condition == "afterok"]
    queue = (slurm.squeue_or_none() if needed else None) or {}
    for job_id in needed:
        state = queue.get(job_id)
        folder = None if state is None else run_folder_of(Path(state.command).parent, job_id)
        if state is None or folder is None:
            continue
        summary = folder.read_summary()
        said = (summary.get("job") or {}).get("job_id") == job_id and summary.get("status") in ENDED_BADLY
        if said or (state.is_over and state.state != "COMPLETED"):
            return dependency_message(job_id, folder, str(summary.get("exit_reason")))
    return None


def check_folders(folders: Sequence[Path]) -> None:
    """Raise UserError for a run folder in this machine's memory; warn of one on what is usually a local disk."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return
    local = None
    for folder in folders:
        if wrong := [sign for sign in "%\\\n\r" if sign in str(folder)]:
            raise UserError(
                f"launcher.experiment_log_dir is {str(folder)!r}; for SLURM it must not contain {wrong[0]!r}. Change it."
            )
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()).resolve()
        mounted = [(len(where), kind) for _, where, kind, *_ in mounts if there.is_relative_to(where)]
        kind = max(mounted, default=(0, ""))[1]
        if kind in LOCAL_FILE_SYSTEMS:
            raise UserError(
                f"launcher.experiment_log_dir is {folder}, in this machine's memory ({kind}); it must be on a file system that "
                "compute nodes share. Change it."
            )
        local = local or next((place for place in USUALLY_LOCAL if there.is_relative_to(place)), None)
    if local is not None:
        print(
            f"warning: launcher.experiment_log_dir is {folders[0]}; {local} is usually a disk of each node. A job whose node "
            "does not see its folder says so in its comment (omnivision runs, squeue -o %k).",
            file=sys.stderr,
        )


def is_command(line: str) -> bool:
    """Return whether a line of shell does anything."""
    return bool(line.strip()) and not line.lstrip().startswith("#")


def check_setup(lines: Sequence[str]) -> None:
    """Raise UserError for shell commands that bash cannot parse: the job would end before its first line."""
    if (bash := shutil.which("bash")) is None:
        return  # compute nodes may have it all the same
    for number, line in enumerate(lines):
        if not is_command(line):
            continue
        if re.match(r"\s*exec\s+[^\s\d<>&{]", line):
            raise UserError(f"submitit.setup[{number}] is {line!r}; exec would end the batch script. Leave exec out.")
        for text in (line, f"{{ {line}\n}}"):  # as it is in the batch script, but the braces are not the user's
            parsed = subprocess.run([bash, "-n"], input=text, capture_output=True, text=True)
            if parsed.returncode:
                message = (
                    parsed.stderr.strip().splitlines()[0].partition(": line ")[2].partition(": ")[2] or parsed.stderr
                )
                raise UserError(
                    f"submitit.setup[{number}] is {line!r}; it must be a complete shell command. bash: {message}. Change "
                    "submitit.setup."
                )


# ---- the batch script ---------------------------------------------------------------------------------------------


def slurm_executor(settings: Settings, folder: RunDir, logs: Path) -> SlurmExecutor:
    """Return submitit's executor for a run. Its batch script is that of `batch_script`."""
    os.environ.pop("SUBMITIT_PREEMPT_SIGNAL", None)  # read at import; ours listen to SIGUSR2
    import submitit

    executor = submitit.SlurmExecutor(folder=logs)
    executor.update_parameters(**sbatch_parameters(settings, folder, logs))
    return executor


def batch_script(settings: Settings, folder: RunDir) -> str:
    """Return the script that SLURM would get for a run, also where SLURM is not installed."""
    logs = folder.path.absolute() / LOGS
    os.environ.pop("SUBMITIT_PREEMPT_SIGNAL", None)  # read at import; ours listen to SIGUSR2
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(logs))}"
    return str(_make_sbatch_string(command=command, folder=logs, **sbatch_parameters(settings, folder, logs)))


def sbatch_parameters(settings: Settings, folder: RunDir, logs: Path) -> dict[str, Any]:
    """Return what the settings say about the job, by submitit's names."""
    wanted, launcher = settings.submitit, settings.launcher
    memory = wanted.mem if wanted.mem_gb is None else f"{math.ceil(wanted.mem_gb * 1024)}M"
    options: dict[str, Any] = {
        "requeue": True,  # when a node dies or a job is preempted; sites may have it off
        "output": "/dev/null",  # a job whose log cannot be opened would fail without a word; see `batch_script_prologue`
        "error": "/dev/null",
    }
    if wanted.dependency is not None:
        options["kill-on-invalid-dep"] = "yes"  # else it waits for ever when what it waits for has failed
    parameters = {
        "job_name": wanted.name,
        "partition": wanted.partition,
        "account": wanted.account,
        "qos": wanted.qos,
        "time": max(1, math.ceil(wanted.timeout_hour * 60 - 1e-6)),  # in minutes; SLURM takes 0 for no limit
        "nodes": launcher.num_nodes,
        "ntasks_per_node": launcher.gpus_per_node,
        "gpus_per_node": None if settings.trainer.accelerator == "cpu" else launcher.gpus_per_node,
        "cpus_per_task": wanted.cpus_per_task,
        "mem": memory,
        "constraint": wanted.constraints,
        "comment": wanted.comment,
        "exclude": wanted.exclude,
        "nodelist": wanted.nodelist,
        "dependency": wanted.dependency,
        "array_parallelism": wanted.array_parallelism,
        "signal_delay_s": signal_delay(settings, folder),
        "setup": batch_script_prologue(logs, wanted.setup),
        # SLURM 22.05 and later do not hand the number of CPUs on to srun. One failed task ends the others; so does one that
        # left well long ago (it saw on a file system that lags that the run is finished, and they did not).
        # Tasks get the script's environment, whatever SBATCH_EXPORT says.
        "srun_args": [f"--cpus-per-task={wanted.cpus_per_task}", "--kill-on-bad-exit=1", "--wait=300", "--export=ALL"],
        "additional_parameters": options | wanted.additional_parameters,
    }
    return {name: value for name, value in parameters.items() if value is not None}


def batch_script_prologue(logs: Path, setup: Sequence[str]) -> list[str]:
    """Shell lines before the tasks: the nodes must see the run folder, where the script then logs; the user's own lines; the
    code is this code. The script runs itself in a second shell, which the user's lines may leave as they like: the first one
    writes down an end that the tasks could not write down.
    """
    wait = f'for _ in $(seq {FOLDER_SECONDS}); do [ -d "$1" ] && exit; sleep 1; done; hostname'
    look = f'{shlex.quote(wait)} - "$omnivision_logs")'
    python, here = shlex.quote(sys.executable), shlex.quote(str(Path(__file__).parents[2]))
    return [
        "readonly omnivision_job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
        f"readonly omnivision_logs={shlex.quote(str(logs))}",
        f'for _ in $(seq {FOLDER_SECONDS}); do [ -d "$omnivision_logs" ] && break; sleep 1; done',
        'if ! [ -d "$omnivision_logs" ]; then',
        '  scontrol update JobId="$omnivision_job" Comment="$(hostname) does not see the folder of the run: $omnivision_logs"',
        "  exit 1",
        "fi",
        'exec >>"$omnivision_logs/${omnivision_job}_batch.log" 2>&1',
        f"omnivision_code() {{ export PYTHONPATH={here}${{PYTHONPATH:+:$PYTHONPATH}}; }}",
        'readonly omnivision_reached="$omnivision_logs/${omnivision_job}_setup"  # the line of submitit.setup that is run',
        "trap : TERM USR2  # a job that is ended, too, comes to its last lines",
        "readonly omnivision_from=$PWD  # what a relative name of a run folder starts from",
        'if [ -z "$omnivision_within" ]; then',
        '  : >"$omnivision_reached"',
        '  omnivision_within=1 "$BASH" "$0"',
        "  code=$?",
        "  trap '' TERM USR2  # what writes the end down is not to be ended",
        '  why=$(cat "$omnivision_reached"; rm -f "$omnivision_reached")',
        '  [ -z "$why" ] || echo "$why"',
        '  [ "$code" != 0 ] || [ -z "$why" ] || code=1  # nothing was trained',
        "  omnivision_code",
        '  set -- "$omnivision_logs" "$omnivision_job" "$code" ${why:+"$why"}',
        f'  [ "$code" = 0 ] || ! {python} -m omnivision.launch.slurm_jobs ended "$@" || code=0',
        '  exit "$code"',
        "fi",
        "unset omnivision_within",
        'if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then',
        '  omnivision_blind=$(srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c ' + look,
        '  if [ -n "$omnivision_blind" ]; then',
        '    echo $omnivision_blind: the folder of the run is not to be seen there: "$omnivision_logs" >"$omnivision_reached"',
        '    scontrol update JobId="$omnivision_job" Comment="$(cat "$omnivision_reached")"',
        "    exit 1",
        "  fi",
        "fi",
        *(
            f'echo {shlex.quote(f"submitit.setup ended the job, and nothing was trained: {line}")} >"$omnivision_reached"\n'
            f"{{ {line}\n}} || exit"
            for line in setup
            if is_command(line)
        ),
        ': >"$omnivision_reached"',
        'cd "$omnivision_from" || exit',
        "omnivision_code",
    ]


def signal_delay(settings: Settings, folder: RunDir) -> int:
    """Seconds before the time limit that SLURM is to signal the run: as set, else by what its steps and its saving took.

    The run watches the clock, too, with what it measures by then.
    """
    if settings.submitit.signal_delay_s is not None:
        return settings.submitit.signal_delay_s
    summary, limit = folder.read_summary(), settings.submitit.timeout_hour * 3600
    step = summary.get("step_seconds")
    delay = UNMEASURED_DELAY if step is None else math.ceil(seconds_to_leave(step, summary.get("save_seconds")))
    return max(1, min(delay, int(limit / 2)))


# ---- on a node ----------------------------------------------------------------------------------------------------


def run_slurm_task(config_text: str, token: str) -> None:
    """Run a task of a job; SLURM starts one for each rank. `config_text` is unresolved, so that no file holds the environment.

    Leaves with the run's exit code, by SystemExit, if it is not 0.
    """
    # submitit's handlers swallow these signals. Until `run_rank` handles them they end this process, and the batch script
    # writes that down.
    for number in (*SIGNALS, signal.SIGCONT):
        signal.signal(number, signal.SIG_DFL)
    import submitit
    from omegaconf import DictConfig, OmegaConf

    from omnivision.launch.run import run_rank

    use_yaml12_numbers()
    config = OmegaConf.create(config_text)
    assert isinstance(config, DictConfig)
    job = Job(validate_config(config), config_text, token)
    folder, wanted, task = run_folder(job), job.settings.submitit, Task.from_environment()
    if is_finished(job.settings, folder):
        print(f"finished folder={folder.path}")
        return
    log = JobLog(task, folder, token, wanted.max_requeues, watch_the_clock=wanted.signal_delay_s is None)
    if task.rank == 0:
        log.record_start()
    if code := run_rank(job, task.place(submitit.JobEnvironment().hostnames[0]), log):
        sys.exit(code)
