"""How checked runs are started: in this process, as several local processes, under torchrun, or on SLURM through submitit.

torch is imported when a run starts, so that a refusal or a submission does not wait for it.
"""

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
import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnivision.config.schema import Settings
from omnivision.config.validate import check
from omnivision.launch import slurm
from omnivision.launch.job_record import JobRecord
from omnivision.launch.jobs import LOGS, Task, note
from omnivision.launch.run import Job, run_folder, run_process
from omnivision.launch.submission import (
    check_array,
    check_dependency,
    check_folders,
    check_partition,
    check_setup,
    is_command,
    is_finished,
    is_queued,
    known_jobs,
    lost_meanwhile,
    require_free,
    require_one_shape,
    require_same_experiment,
    warn_of_other_settings,
)
from omnivision.reporting.run_directory import RunDir, alone
from omnivision.utils.errors import UserError
from omnivision.utils.io import write_atomically
from omnivision.utils.signals import SIGNALS, seconds_to_leave, signals_ignored

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from submitit import SlurmExecutor

FOLDER_SECONDS = 60  # that a node waits for the run folder to appear on a shared file system that lags
# What submitit makes in a folder of logs when it submits.
SUBMITTED = re.compile(
    r"(\.submission_file_\w+\.sh|\w+_submission\.sh|\w+_submitted\.pkl|[0-9a-f]{32}\.pkl)(\.save_tmp)?"
)
UNMEASURED_DELAY = 120  # seconds before the time limit that SLURM signals a run of which nothing is known


def launch(jobs: Sequence[Job]) -> int:
    """Run jobs, one after another, or submit them together; returns the exit code, the highest of several.

    Raises UserError when they cannot be started as asked.
    """
    # Compute threads that spin while they wait steal the time of data workers on the same cores: on two busy cores a step
    # of a small model took ten times as long. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for_cluster = [job for job in jobs if job.settings.submitit.use_cluster]
    if for_cluster and len(for_cluster) < len(jobs):
        raise UserError(
            "Some runs of this sweep are for the cluster and some are not; expected one or the other. Give "
            "submitit.use_cluster once."
        )
    if for_cluster:
        return submit(for_cluster)
    from omnivision.launch.local import INTERRUPTED

    codes = [0]
    for number, job in enumerate(jobs, start=1):
        if len(jobs) > 1:
            print(f"\n== Run {number} of {len(jobs)}: {job.settings.launcher.experiment_log_dir}", flush=True)
        codes.append(run(job))
        if codes[-1] in INTERRUPTED and number < len(jobs):
            print(f"{len(jobs) - number} runs of the sweep were not started.", file=sys.stderr)
            break
    return max(codes)


def validate_launch_mode(settings: Settings) -> None:
    """Raises UserError when a run cannot be started the way that its settings say."""
    if settings.submitit.use_cluster and not slurm.available():
        raise UserError(
            "submitit.use_cluster is true, but this machine has no SLURM (no sbatch, srun or squeue). To run here, append "
            "submitit.use_cluster=false launcher.num_nodes=1 launcher.gpus_per_node=1 to the command."
        )
    nodes = settings.launcher.num_nodes
    if nodes > 1 and not settings.submitit.use_cluster and not under_torchrun():
        raise UserError(
            f"launcher.num_nodes is {nodes}, but submitit.use_cluster is false: this machine is one node. Set "
            "launcher.num_nodes=1, or submitit.use_cluster=true, or start it with torchrun on every node."
        )


def run(job: Job) -> int:
    """Run a job here; returns its exit code."""
    launcher = job.settings.launcher
    if under_torchrun():
        return run_process(job, None)
    if launcher.gpus_per_node == 1:
        from omnivision.distributed.process_group import RankInfo

        return run_process(job, RankInfo())
    from omnivision.launch.local import run_local_processes

    return run_local_processes(job, launcher.gpus_per_node)


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def apply_torchrun_env(config: DictConfig) -> None:
    """Under torchrun, its numbers of nodes and processes replace those of the configuration, and it runs where it is."""
    if under_torchrun():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        config.launcher.gpus_per_node = local
        config.launcher.num_nodes = max(1, int(os.environ["WORLD_SIZE"]) // local)
        config.submitit.use_cluster = False


# ---- SLURM: submission --------------------------------------------------------------------------------------------


def submit(jobs: Sequence[Job]) -> int:
    """Submit runs to SLURM, several as one array, and return at once. What is finished or in the queue already is left alone.

    Prints a line for each run: `submitted`, `queued` or `finished`, with `job_id=` and `folder=`.
    """
    unfinished = []
    for job in jobs:
        if is_finished(job.settings, run_folder(job)):
            print(f"finished folder={run_folder(job).path}")
            warn_of_other_settings(job)
        else:
            unfinished.append(job)
    queue = known_jobs() if unfinished else {}
    wanted = [job for job in unfinished if not is_queued(job, queue)]
    if not wanted:
        return 0
    check_submission(wanted, queue)
    for job in wanted:
        folder = run_folder(job)
        folder.create(LOGS)
        require_free(folder, queue)
    logs = logs_of([run_folder(job).path for job in wanted])
    logs.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as guards:
        # The same command given twice at once: the second waits here, and then finds the first one's job.
        for guarded in sorted(
            {folder.resolve() for folder in (logs, *(run_folder(job).path / LOGS for job in wanted))}
        ):
            guards.enter_context(alone(guarded / ".submission"))
        queue = known_jobs()
        wanted = [job for job in wanted if not is_queued(job, queue)]
        remove_old_pickles(logs, queue)
        if wanted:
            hand_over([dataclasses.replace(job, token=secrets.token_hex(8)) for job in wanted], logs)
    return 0


def check_submission(jobs: Sequence[Job], queue: Mapping[str, slurm.JobState]) -> None:
    """Raise UserError for jobs that SLURM would not take, or that could not run; one array is made of several."""
    for job in jobs:
        require_same_experiment(job)
    first = jobs[0].settings
    require_one_shape([job.settings for job in jobs])
    check_array(len(jobs))
    check_partition(first)
    check_dependency(first.submitit.dependency, queue)
    check_folders([run_folder(job).path for job in jobs])
    check_setup(first.submitit.setup)


def logs_of(folders: Sequence[Path]) -> Path:
    """Where submitit keeps a job's files: in the run folder, for an array in the one that all its run folders are in, or, if
    that may not be written, in the first.
    """
    common = Path(os.path.commonpath([folder.absolute() for folder in folders]))
    return (common if common.parent != common and os.access(common, os.W_OK) else folders[0].absolute()) / LOGS


def remove_old_pickles(logs: Path, queue: Mapping[str, slurm.JobState]) -> None:
    """Remove what submitit left for jobs that are over: a new one of the same number would take it for its own."""
    for file in logs.glob("*_submitted.pkl"):
        state = queue.get(file.name.removesuffix("_submitted.pkl"))
        if state is None or state.is_over:
            file.unlink(missing_ok=True)


def hand_over(jobs: Sequence[Job], logs: Path) -> None:
    """Submit jobs, several as one array, and print a line for each.

    Raises UserError with SLURM's refusal, or why the job could not be written; everything is then as it was before, and so it
    is after Ctrl-C: no job is left of which nobody knows.
    """
    before, folders = set(logs.iterdir()), [run_folder(job) for job in jobs]
    summaries = [folder.read_summary() for folder in folders]
    texts, tokens = [job.config_text for job in jobs], [job.token for job in jobs]
    try:
        for job, folder in zip(
            jobs, folders, strict=True
        ):  # beforehand: the job may begin at once, and then writes itself
            waiting: dict[str, Any] = {"job": {"logs": str(logs), "dependency": job.settings.submitit.dependency}}
            if job.settings.trainer.mode != "val":
                waiting |= {"status": "queued", "exit_reason": None}
            folder.write_summary(**waiting)
        executor = slurm_executor(jobs[0].settings, folders[0], logs)
        # submitit repeats there what SLURM says
        with slurm.settings_first(jobs[0].settings.submitit), contextlib.redirect_stderr(io.StringIO()):
            if len(jobs) > 1:
                submitted = executor.map_array(run_slurm_task, texts, tokens)
            else:
                submitted = [executor.submit(run_slurm_task, texts[0], tokens[0])]
    except BaseException as error:
        # Another job of a sweep's folder may have made a log there meanwhile.
        made = {file for file in set(logs.iterdir()) - before if SUBMITTED.fullmatch(file.name)}
        left = end_what_was_taken(made)
        for file in made:
            file.unlink(missing_ok=True)
        for folder, summary in zip(folders, summaries, strict=True):
            folder.replace_summary(summary)
        if isinstance(error, RuntimeError):  # submitit's, of what sbatch said
            raise UserError(slurm.refusal(str(error), jobs[0].settings.submitit) + left) from None
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"The job could not be written to {logs}: {error}. Make room there, or change launcher.experiment_log_dir.{left}"
        ) from None
    ids = [job.job_id for job in submitted]
    for job_id, folder in zip(ids, folders, strict=True):
        print(f"submitted job_id={job_id} folder={folder.path}", flush=True)
    try:
        with signals_ignored():  # SLURM has the job: what it is must be known
            note_submission(jobs, ids, logs)
            if reason := lost_meanwhile(jobs[0].settings.submitit.dependency):
                for job_id, folder in zip(ids, folders, strict=True):
                    note(folder, "end", token="", job=job_id, status="cancelled", reason=reason)
                    folder.write_summary(status="cancelled", exit_reason=reason)
    except OSError as error:
        print(f"warning: what was submitted could not be noted in {logs}: {error}.", file=sys.stderr)


def end_what_was_taken(made: Collection[Path]) -> str:
    """Cancel what SLURM may have taken of a submission that broke off, which left these files; a sentence about it."""
    try:
        cancelled = slurm.cancel_jobs_of(made)
    except (OSError, slurm.SubprocessError):
        return " Whether SLURM has a job of it all the same cannot be found out now: look with squeue, and end it with scancel."
    return f" It had taken job {', '.join(cancelled)} all the same, which was cancelled." if cancelled else ""


def note_submission(jobs: Sequence[Job], ids: Sequence[str], logs: Path) -> None:
    """Write down in each run folder which job works for it, and with which configuration."""
    folders = [run_folder(job) for job in jobs]
    if len(jobs) > 1:
        paths = [str(folder.path.absolute()) for folder in folders]
        write_atomically(logs / f"{ids[0].partition('_')[0]}_folders.json", f"{json.dumps(paths)}\n")
    for job, folder, job_id in zip(jobs, folders, ids, strict=True):
        write_atomically(folder.path / LOGS / f"{job_id}_config.yaml", job.config_text)
        told = {"mode": job.settings.trainer.mode, "max_requeues": job.settings.submitit.max_requeues}
        note(folder, "submitted", job.token, job=job_id, restarts=0, **told)
        known = folder.read_summary().get("job") or {}
        if "job_id" not in known:
            folder.write_summary(job=known | {"job_id": job_id})


# ---- SLURM: the batch script --------------------------------------------------------------------------------------


def slurm_executor(settings: Settings, folder: RunDir, logs: Path) -> SlurmExecutor:
    """Return submitit's executor for a run. Its batch script is that of `batch_script`."""
    parameters = sbatch_parameters(settings, folder, logs)  # before the import, which reads the environment
    import submitit

    executor = submitit.SlurmExecutor(folder=logs)
    executor.update_parameters(**parameters)
    return executor


def batch_script(settings: Settings, folder: RunDir) -> str:
    """Return the script that SLURM would get for a run, also where SLURM is not installed."""
    logs = folder.path.absolute() / LOGS
    parameters = sbatch_parameters(settings, folder, logs)  # before the import, which reads the environment
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(logs))}"
    return str(_make_sbatch_string(command=command, folder=logs, **parameters))


def sbatch_parameters(settings: Settings, folder: RunDir, logs: Path) -> dict[str, Any]:
    """Return what the settings say about the job, by submitit's names."""
    os.environ.pop("SUBMITIT_PREEMPT_SIGNAL", None)  # of other users of submitit; ours listen to SIGUSR2
    wanted, launcher = settings.submitit, settings.launcher
    memory = wanted.mem if wanted.mem_gb is None else f"{math.ceil(wanted.mem_gb * 1024)}M"
    options: dict[str, Any] = {
        "requeue": True,  # when a node dies or a job is preempted; sites may have it off
        "output": "/dev/null",  # a job whose log cannot be opened would fail without a word; see `setup_lines`
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
        "signal_delay_s": signal_delay(settings, folder),
        "setup": setup_lines(logs, wanted.setup),
        # SLURM 22.05 and later do not hand the number of CPUs on to srun. One failed task ends the others; so does one that
        # left well long ago (it saw on a file system that lags that the run is finished, and they did not).
        # Tasks get the script's environment, whatever SBATCH_EXPORT says.
        "srun_args": [f"--cpus-per-task={wanted.cpus_per_task}", "--kill-on-bad-exit=1", "--wait=300", "--export=ALL"],
        "additional_parameters": options | wanted.additional_parameters,
    }
    return {name: value for name, value in parameters.items() if value is not None}


def setup_lines(logs: Path, setup: Sequence[str]) -> list[str]:
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
        f'  [ "$code" = 0 ] || ! {python} -m omnivision.launch.job_record ended "$@" || code=0',
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


# ---- SLURM: on a node ---------------------------------------------------------------------------------------------


def run_slurm_task(config_text: str, token: str) -> None:
    """What SLURM starts as each task of a job: rank, world and address are SLURM's. The configuration comes unresolved, so
    that what it takes from the environment is in no file.
    """
    # submitit's handlers would swallow them, in whichever thread they come. Until `run_process` listens they end this process,
    # and the batch script writes that down.
    for number in (*SIGNALS, signal.SIGCONT):
        signal.signal(number, signal.SIG_DFL)
    import submitit
    from omegaconf import DictConfig, OmegaConf

    from omnivision.config.yaml_numbers import read_numbers_as_written

    read_numbers_as_written()
    config = OmegaConf.create(config_text)
    assert isinstance(config, DictConfig)
    job = Job(check(config), config_text, token)
    folder, wanted, task = run_folder(job), job.settings.submitit, Task.from_environment()
    if is_finished(job.settings, folder):
        print(f"finished folder={folder.path}")
        return
    record = JobRecord(task, folder, token, wanted.max_requeues, watch_the_clock=wanted.signal_delay_s is None)
    if task.rank == 0:
        record.start()
    host = submitit.JobEnvironment().hostnames[0]
    if code := run_process(job, task.place(host), record):
        sys.exit(code)
