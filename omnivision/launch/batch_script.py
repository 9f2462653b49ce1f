"""The batch script of a run."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omnivision.config.schema import Settings
from omnivision.launch import slurm
from omnivision.launch.slurm_jobs import SUBMISSION_FOLDER, runs_file
from omnivision.reporting.run_directory import RunDir
from omnivision.utils.signals import seconds_to_exit

UNMEASURED_DELAY = 120  # seconds before the time limit at which SLURM signals a run whose speed is unknown


def batch_script(settings: Settings, run_dir: RunDir, script: Path | None = None, count: int = 1) -> str:
    """Return the batch script of a run or of an array of `count` runs; SLURM need not be installed.

    `script` is its path; the job's logs go into the same folder.
    """
    script = script or run_dir.path.absolute() / SUBMISSION_FOLDER / "TOKEN_submission.sh"
    command = f"{shlex.quote(sys.executable)} -u -m omnivision.launch.slurm_task {shlex.quote(str(runs_file(script)))}"
    return slurm.sbatch_script(command, script.parent, count, sbatch_parameters(settings, run_dir, runs_file(script)))


def sbatch_parameters(settings: Settings, run_dir: RunDir, runs: Path) -> dict[str, Any]:
    """Return the job's parameters from the settings, by submitit's names."""
    submitit, launcher = settings.submitit, settings.launcher
    options: dict[str, Any] = {
        "requeue": True,  # when a node dies or a job is preempted; sites may disable it by default
        "output": "/dev/null",  # a job whose log cannot be opened would fail without a message; see `batch_prologue.sh`
        "error": "/dev/null",
    }
    if submitit.dependency is not None:
        options["kill-on-invalid-dep"] = "yes"  # otherwise a job with a failed dependency stays pending
    same_name = ("partition", "account", "qos", "comment", "exclude", "nodelist", "dependency", "array_parallelism")
    parameters = {name: getattr(submitit, name) for name in same_name} | {
        "job_name": submitit.name,
        "time": max(1, math.ceil(submitit.timeout_hour * 60 - 1e-6)),  # minutes; 0 would mean no limit
        "nodes": launcher.num_nodes,
        "ntasks_per_node": launcher.gpus_per_node,
        "gpus_per_node": None if settings.trainer.accelerator == "cpu" else launcher.gpus_per_node,
        "cpus_per_task": submitit.cpus_per_task,
        "mem": submitit.mem if submitit.mem_gb is None else f"{math.ceil(submitit.mem_gb * 1024)}M",
        "constraint": submitit.constraints,
        "signal_delay_s": signal_delay(settings, run_dir),
        "setup": batch_script_prologue(runs, submitit.setup),
        # Since SLURM 22.05 srun does not inherit --cpus-per-task. --kill-on-bad-exit: one failed task ends all. --wait: so does
        # a task that exits early because it finds the run finished. --export: use the script's environment, despite
        # SBATCH_EXPORT.
        "srun_args": [
            f"--cpus-per-task={submitit.cpus_per_task}",
            "--kill-on-bad-exit=1",
            "--wait=300",
            "--export=ALL",
        ],
        "additional_parameters": options | submitit.additional_parameters,
    }
    return {name: value for name, value in parameters.items() if value is not None}


def batch_script_prologue(runs: Path, setup: Sequence[str]) -> list[str]:
    """Return the shell lines before the tasks: `batch_prologue.sh`, then `setup`, each line recorded before it runs."""
    values = {"runs": runs, "python": sys.executable, "checkout": Path(__file__).parents[2]}
    lines = [f"readonly omnivision_{name}={shlex.quote(str(value))}" for name, value in values.items()]
    lines += Path(__file__).with_name("batch_prologue.sh").read_text(encoding="utf-8").splitlines()
    for command in setup:
        if command.strip() and not command.lstrip().startswith("#"):
            reached = shlex.quote(f"submitit.setup ended the job, and nothing was trained: {command}")
            lines.append(f'echo {reached} >"$omnivision_reached"\n{{ {command}\n}} || exit')
    return [*lines, ': >"$omnivision_reached"', 'cd "$omnivision_from" || exit', "omnivision_code"]


def signal_delay(settings: Settings, run_dir: RunDir) -> int:
    """Return how many seconds before the time limit SLURM signals the run.

    It is the setting or, if that is not set, depends on measured step and save times.
    """
    if settings.submitit.signal_delay_s is not None:
        return settings.submitit.signal_delay_s
    summary, limit = run_dir.read_summary(), settings.submitit.timeout_hour * 3600
    step = summary.get("step_seconds")
    delay = UNMEASURED_DELAY if step is None else math.ceil(seconds_to_exit(step, summary.get("save_seconds")))
    return max(1, min(delay, int(limit / 2)))
