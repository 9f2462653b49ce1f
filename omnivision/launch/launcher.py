"""Launch of validated runs: in this process, in local processes, under torchrun, or on SLURM."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omnivision.config.schema import Settings
from omnivision.launch import slurm
from omnivision.reporting.run_directory import RunDir
from omnivision.utils.errors import UserError
from omnivision.utils.streams import announce

if TYPE_CHECKING:
    from omegaconf import DictConfig

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Job:
    """What every rank of a run is given."""

    settings: Settings
    config_text: str  # config.yaml as composed, interpolations unresolved
    token: str = ""  # of its submission to a cluster: job ids may be reused


def run_folder(job: Job) -> RunDir:
    return RunDir(job.settings.launcher.experiment_log_dir, job.settings.trainer.checkpoint.save_dir)


def launch(jobs: Sequence[Job]) -> int:
    """Run jobs one after another, or submit them together; returns the exit code, the highest of several.

    Raises UserError if they cannot be started.
    """
    # Compute threads that spin while they wait steal the time of data workers on the same cores: on two busy cores a step
    # of a small model took ten times as long. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for_cluster = [job for job in jobs if job.settings.submitit.use_cluster]
    if for_cluster and len(for_cluster) < len(jobs):
        raise UserError("submitit.use_cluster must be the same in all runs of a sweep. Set it once.")
    if for_cluster:
        from omnivision.launch.submit import submit

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


def run(job: Job) -> int:
    """Run a job here; returns its exit code."""
    count = job.settings.launcher.gpus_per_node
    if count > 1 and not under_torchrun():
        from omnivision.launch.local import run_local_processes

        return run_local_processes(job, count)
    if os.environ.get("RANK", "0") == "0":
        announce("Loading torch, then building the model")
    from omnivision.distributed.process_group import RankInfo
    from omnivision.launch.run import run_rank

    return run_rank(job, None if under_torchrun() else RankInfo())


def validate_launch_mode(settings: Settings) -> None:
    """Raise UserError if a run cannot be started the way that its settings say."""
    nodes, use_cluster = settings.launcher.num_nodes, settings.submitit.use_cluster
    if use_cluster and not slurm.is_available():
        raise UserError(
            "submitit.use_cluster is true, but this machine has no SLURM (sbatch, srun, squeue). Set "
            "submitit.use_cluster=false launcher.num_nodes=1 launcher.gpus_per_node=1 to run here."
        )
    if nodes > 1 and not use_cluster and not under_torchrun():
        raise UserError(
            f"launcher.num_nodes is {nodes}, but submitit.use_cluster is false: this machine is one node. Set "
            "launcher.num_nodes=1 or submitit.use_cluster=true, or start it with torchrun on every node."
        )


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def apply_torchrun_env(config: DictConfig) -> None:
    """Replace the numbers of nodes and processes by torchrun's, if it started this process, and run where it is.

    Raises UserError for variables that another launcher has left behind.
    """
    given = [name for name in TORCHRUN_VARIABLES if name in os.environ]
    if not {"RANK", "WORLD_SIZE"} & set(given):
        return
    from_torchrun = len(given) == len(TORCHRUN_VARIABLES)
    if not from_torchrun or (config.submitit.use_cluster and "TORCHELASTIC_RUN_ID" not in os.environ):
        raise UserError(
            f"{' and '.join(given)} are set in the environment, as by another launcher, "
            + (
                "and submitit.use_cluster is true. "
                if from_torchrun
                else f"but not all of {', '.join(TORCHRUN_VARIABLES)}. "
            )
            + f"Unset them (unset {' '.join(given)}), or start the command with torchrun."
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    config.launcher.gpus_per_node = local
    config.launcher.num_nodes = max(1, int(os.environ["WORLD_SIZE"]) // local)
    config.submitit.use_cluster = False
