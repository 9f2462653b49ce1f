"""How a run starts and ends: one rank, several local ones, or a SLURM job."""


def run_slurm_task(config_text: str, token: str) -> None:
    """Run a task of a job that an earlier version submitted: its pickle refers to this function."""
    import signal
    import sys

    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):  # submitit's handlers swallow these
        signal.signal(number, signal.SIG_DFL)
    from omnivision.launch import slurm_task

    if code := slurm_task.run_slurm_task(config_text, token):
        sys.exit(code)
