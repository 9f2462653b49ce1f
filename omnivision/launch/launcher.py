"""Launch of validated runs: in this process, in several local ones, under torchrun, or on SLURM."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from omnivision.config.schema import Settings
from omnivision.distributed.process_group import RankInfo
from omnivision.launch import slurm
from omnivision.launch.exit import exit_code_and_reason, first_failure
from omnivision.launch.job import Job
from omnivision.launch.run import run_rank
from omnivision.launch.submit import submit
from omnivision.utils.errors import (
    EXIT_FAULT,
    EXIT_SIGHUP,
    EXIT_SIGINT,
    EXIT_SIGTERM,
    EXIT_SIGUSR2,
    EXIT_USER,
    StopRequested,
    UserError,
)
from omnivision.utils.signals import STOP_SIGNALS, exit_with_parent
from omnivision.utils.streams import announce

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from omegaconf import DictConfig

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NUMERIC_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
STOP_EXIT_CODES = (EXIT_SIGINT, EXIT_SIGTERM, EXIT_SIGUSR2, EXIT_SIGHUP)  # the run was stopped
RANK_EXIT_SECONDS = 15.0  # how long other ranks may take to exit after one has failed


def launch(jobs: Sequence[Job]) -> int:
    """Run jobs one after another, or submit them together; return the highest exit code.

    Raises UserError if they cannot be started.
    """
    if len({job.settings.submitit.use_cluster for job in jobs}) > 1:
        raise UserError("submitit.use_cluster must be the same in all runs of a sweep. Set it once.")
    if jobs[0].settings.submitit.use_cluster:
        return submit(jobs)
    if os.environ.get("RANK", "0") == "0":
        announce("Building the model")
    codes = [0]
    for number, job in enumerate(jobs, start=1):
        if len(jobs) > 1:
            print(f"\n== Run {number} of {len(jobs)}: {job.settings.launcher.experiment_log_dir}", flush=True)
        if under_torchrun():
            codes.append(run_rank(job, RankInfo.from_torchrun()))
        elif (count := job.settings.launcher.gpus_per_node) > 1:
            codes.append(run_local_processes(job, count))
        else:
            codes.append(run_rank(job, RankInfo()))
        if codes[-1] in STOP_EXIT_CODES and number < len(jobs):
            print(f"{len(jobs) - number} runs of the sweep were not started.", file=sys.stderr)
            break
    return max(codes)


def validate_launch_mode(settings: Settings) -> None:
    """Raise UserError if a run cannot be started as its settings request."""
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


# ---- torchrun -----------------------------------------------------------------------------------------------------


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def apply_torchrun_env(config: DictConfig) -> None:
    """Set node and rank counts from torchrun, if it started this process, and disable submission.

    Raises UserError for variables that another launcher left behind, and for those that must be numbers and are not.
    """
    given = [name for name in TORCHRUN_VARIABLES if name in os.environ]
    if not {"RANK", "WORLD_SIZE"} & set(given):
        return
    use_cluster = config.submitit.use_cluster and "TORCHELASTIC_RUN_ID" not in os.environ
    if use_cluster or len(given) < len(TORCHRUN_VARIABLES):
        raise UserError(
            f"{', '.join(given)} of another launcher are in the environment, "
            f"{'and submitit.use_cluster is true' if use_cluster else f'but not all of {TORCHRUN_VARIABLES}'}. "
            f"Unset them (unset {' '.join(given)}), or start the command with torchrun."
        )
    for name in NUMERIC_VARIABLES:
        if not re.fullmatch("[0-9]{1,9}", value := os.environ.get(name, "0")):
            raise UserError(f"{name} must be a number, got {value!r}. Start the command with torchrun, which sets it.")
    local = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    config.launcher.gpus_per_node = local
    config.launcher.num_nodes = max(1, int(os.environ["WORLD_SIZE"]) // local)
    config.submitit.use_cluster = False


# ---- local processes ----------------------------------------------------------------------------------------------


def run_local_processes(job: Job, count: int) -> int:
    """Start `count` ranks here and wait; return the exit code. When one fails, stop the others.

    Signals are forwarded to the ranks. If a rank was killed before it could report, the reason is written to `summary.json`.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [RankInfo(rank, count, rank, count, f"file://{folder}/rendezvous") for rank in range(count)]
        processes = [context.Process(target=_local_process, args=(job, rank)) for rank in ranks]
        for process in processes:
            process.start()
        try:
            with forward_signals(processes) as received:
                code, reason = wait_for_processes(processes)
            killed = any((process.exitcode or 0) < 0 for process in processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
    if received and (code in STOP_EXIT_CODES or any(process.exitcode == -received[0] for process in processes)):
        is_ctrl_c = received[0] == signal.SIGINT
        error = KeyboardInterrupt() if is_ctrl_c else StopRequested(signal.Signals(received[0]).name)
        killed, (code, reason) = False, exit_code_and_reason(error)
    if code not in (0, EXIT_USER):
        pids = [process.pid for process in processes if process.pid is not None]
        if failure := first_failure(job.run_dir, pids=pids):
            killed, reason = False, failure
        job.run_dir.record_unreported_exit(reason, interrupted=code in STOP_EXIT_CODES, killed=killed)
    return code


@contextlib.contextmanager
def forward_signals(processes: list[SpawnProcess]) -> Iterator[list[int]]:
    """Forward Ctrl-C and stop signals to `processes` inside this block; yield the list of signals received."""
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        for process in processes:
            if process.pid is not None and process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, *STOP_SIGNALS)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_for_processes(processes: list[SpawnProcess]) -> tuple[int, str]:
    """Wait for all ranks; after a failure, at most RANK_EXIT_SECONDS. Return exit code and reason.

    The reason, used if the run could not write one itself, names the killed ranks or the exit code.
    """
    failed, deadline = 0, float("inf")
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        for process in processes:
            process.join(timeout=0.1)
            if process.exitcode and not failed:
                failed, deadline = process.exitcode, time.monotonic() + RANK_EXIT_SECONDS
    failed = failed or next((process.exitcode for process in processes if process.exitcode), 0)
    killed = [
        f"rank {rank} was killed by {signal.Signals(-process.exitcode).name}"
        for rank, process in enumerate(processes)
        if process.exitcode is not None and process.exitcode < 0
    ]
    reason = ", ".join(killed) or f"a rank ended with exit code {failed}"
    return failed if failed >= 0 else EXIT_FAULT, reason


def _local_process(job: Job, rank_info: RankInfo) -> None:
    exit_with_parent(os.getppid())
    code = run_rank(job, rank_info)
    for number in (signal.SIGINT, *STOP_SIGNALS):  # Ctrl-C reaches a rank twice: by the terminal and forwarded
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
