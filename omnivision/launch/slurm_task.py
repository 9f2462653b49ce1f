"""A task of a SLURM job: one rank of a run. The batch script starts `python -m omnivision.launch.slurm_task RUNS_FILE`."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from omnivision.config.validate import validate_config
from omnivision.distributed.process_group import RankInfo
from omnivision.launch import slurm
from omnivision.launch.job import Job
from omnivision.launch.run import run_rank
from omnivision.launch.slurm_jobs import SUBMISSION_FOLDER, JobLog, read_submission
from omnivision.utils.host import slurm_job_id, slurm_restart_count
from omnivision.utils.io import write_atomically

PORTS_PER_JOB = 13  # one per attempt, so a port still held by the previous attempt does not block this one
SECRET = re.compile(r"key|token|secret|pass|_pwd|dsn|cred|auth|cookie|private|signature|session", re.IGNORECASE)
URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # user:password@


def run_slurm_task(config_text: str, token: str) -> int:
    """Run a task of a job (SLURM starts one per rank); return the exit code.

    `config_text` is unresolved, so that no file contains environment variables.
    """
    config = OmegaConf.create(config_text)
    assert isinstance(config, DictConfig)
    job = Job(validate_config(config), config_text)
    run_dir = job.run_dir
    rank_info = slurm_rank(slurm.first_host())
    job_id = slurm_job_id() or ""
    if job.is_finished:
        print(f"finished folder={run_dir.path}")
        return 0
    job_log = JobLog(run_dir, job_id, slurm_restart_count(), token, job.settings.submitit.max_requeues)
    if rank_info.rank == 0:
        logs = run_dir.path / SUBMISSION_FOLDER
        logs.mkdir(parents=True, exist_ok=True)
        write_atomically(logs / f"{job_id}_environment.json", json.dumps(public_environment(), indent=1) + "\n")
        job_log.record_start(os.environ["SLURM_JOB_NODELIST"], rank_info.world_size)
    return run_rank(job, rank_info, job_log)


def slurm_rank(host: str) -> RankInfo:
    """Return this task's rank, from SLURM's variables. The ranks meet at a port of `host`, the first node.

    Ports repeat after 1500 jobs and lie below the ephemeral range.
    """
    env, world = os.environ, int(os.environ["SLURM_NTASKS"])
    # Each array element has its own SLURM_JOB_ID; the last one's is the array's.
    number = PORTS_PER_JOB * int(env["SLURM_JOB_ID"]) + slurm_restart_count() % PORTS_PER_JOB
    port = int(env.get("MASTER_PORT") or 10_000 + number % (PORTS_PER_JOB * 1500))
    rank, local_rank = int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"])
    address = f"tcp://{host}:{port}" if world > 1 else None
    return RankInfo(rank, world, local_rank, world // int(env["SLURM_JOB_NUM_NODES"]), address)


def public_environment() -> dict[str, str | None]:
    """Return the environment variables of this process, without the values of those whose names suggest a secret."""
    return {
        name: None if SECRET.search(name) else URL_CREDENTIALS.sub("...", value)
        for name, value in sorted(os.environ.items())
    }


if __name__ == "__main__":
    # Signals end the process until `run_rank` handles them; the batch script records that.
    submission = read_submission(Path(sys.argv[1]), slurm_job_id() or "")
    sys.exit(run_slurm_task(submission.config_text, submission.token))
