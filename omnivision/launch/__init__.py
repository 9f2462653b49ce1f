"""How a run starts and ends: one rank, several local ones, or a SLURM job."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "run_slurm_task":  # the name that jobs of earlier versions, which may still be queued, look up
        from omnivision.launch.submit import run_slurm_task

        return run_slurm_task
    raise AttributeError(name)
