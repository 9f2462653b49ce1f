"""How a run starts and ends: one rank, several local ones, or a SLURM job."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "run_slurm_task":  # named so by jobs that were submitted when this package was a module
        from omnivision.launch.launcher import run_slurm_task

        return run_slurm_task
    raise AttributeError(name)
