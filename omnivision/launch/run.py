"""One rank of a run, from start to end."""

from __future__ import annotations

import faulthandler
import json
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omnivision.checkpoint import checkpointer
from omnivision.checkpoint.fingerprint import git_commit
from omnivision.config.flat import flatten_yaml
from omnivision.distributed.process_group import Dist, RankInfo
from omnivision.launch import slurm
from omnivision.launch.exit import ExitHandler
from omnivision.launch.job import Job
from omnivision.launch.slurm_jobs import JobLog
from omnivision.launch.watchdog import HEARTBEAT_TIMEOUT, PeerMonitor
from omnivision.reporting.reporter import Reporter
from omnivision.reporting.run_directory import STALE_SECONDS, RunDir
from omnivision.training import build
from omnivision.training.initial_weights import load_initial_weights
from omnivision.training.preflight import check_device
from omnivision.training.run_messages import end_lines, run_metadata, start_lines, validation_lines
from omnivision.training.trainer import Trainer
from omnivision.utils.io import remove_stale_tmp, write_atomically
from omnivision.utils.signals import signals_ignored
from omnivision.utils.streams import ignore_broken_pipe

LOG = logging.getLogger("omnivision")


def run_rank(job: Job, rank_info: RankInfo, job_log: JobLog | None = None) -> int:
    """Run one rank from start to end; return its exit code.

    A user error prints one paragraph; `summary.json` always records why the run ended. In a SLURM job, `job_log` records the
    end and requeues the job if necessary; signals are ignored once the run ends.
    """
    ignore_broken_pipe()
    faulthandler.enable(sys.__stderr__ or 2)  # also print the stacks on SIGSEGV and SIGBUS
    handler = ExitHandler(job.run_dir, rank_info.rank, job.settings, job_log, rank_info.world_size)
    with handler.supervise():
        dist = build.build_process_group(job.settings, rank_info)
        reporter = lock_run_dir(job, dist, handler)
        dist.run_on_all(lambda: check_device(job.settings, dist.device, dist.local_rank))
        trainer = dist.run_on_all(
            lambda: build.build_trainer(job.settings, job.config_text, dist, handler.run_dir, reporter, handler.stop)
        )
        load_weights(job, dist, trainer, reporter, handler)
        with reporter:
            trainer.validate_only() if handler.validating else trainer.fit()
        finish_run(trainer, reporter, dist, handler)
    return handler.exit_code


def lock_run_dir(job: Job, dist: Dist, handler: ExitHandler) -> Reporter:
    """Lock the run directory, and start the log, heartbeat and deadline. Raises UserError if it is in use."""
    run_dir = handler.run_dir
    job_log = handler.job_log
    stop = handler.stop
    dist.run_on_main(run_dir.create)
    # A dead node's lock looks live until it goes stale; a cluster job waits for that.
    lock_timeout = STALE_SECONDS + 10 if job_log is not None else 0.0
    taken_over = dist.run_on_main(lambda: run_dir.lock(lock_timeout))
    handler.locked = dist.is_main
    dist.run_on_main(run_dir.claim_checkpoint_dir)
    if dist.is_main:
        for end_file in run_dir.logs.glob("rank_*_end.json"):  # left by an earlier attempt
            end_file.unlink(missing_ok=True)
        for written in (run_dir.path, run_dir.logs, run_dir.checkpoints):
            remove_stale_tmp(written)
    log_to_file(run_dir.logs / f"rank_{dist.rank}.log")
    # Half the collective timeout, so that a silent rank is named before collectives time out.
    timeout = min(HEARTBEAT_TIMEOUT, 60 * job.settings.trainer.distributed.timeout_minutes / 2)
    handler.peers = PeerMonitor(run_dir.logs, dist.rank, dist.world_size, stop, timeout, handler.abort)
    # If signal_delay_s is set, SLURM's signal triggers the exit instead.
    if job_log is not None and job.settings.submitit.signal_delay_s is None:
        planned_end = slurm.planned_end(slurm.show_job(job_log.job_id)) if dist.is_main else None
        stop.set_deadline(dist.all_gather_object(planned_end)[0])
    settings = flatten_yaml(job.config_text)  # unresolved, so it contains no environment variables
    reporter = Reporter(run_dir, dist.is_main, extra_loggers=job.settings.trainer.logging.also, settings=settings)
    if taken_over:
        reporter.info(taken_over)
    return reporter


def load_weights(job: Job, dist: Dist, trainer: Trainer, reporter: Reporter, handler: ExitHandler) -> None:
    """Resume from the run's checkpoint or load pretrained weights, and record what the run starts from."""
    run_dir = handler.run_dir
    job_log = handler.job_log
    validating = handler.validating
    newest = dist.all_gather_object(checkpointer.stat_latest(run_dir.checkpoints))[0]
    checkpointer.wait_until_visible(newest, run_dir.checkpoints)
    reports = dist.run_on_all(lambda: load_initial_weights(job.settings, trainer))
    if reports and dist.is_main:
        loaded = [asdict(report) for report in reports]
        write_atomically(run_dir.logs / "pretrained.json", json.dumps(loaded, indent=1) + "\n")
    dist.run_on_main(lambda: reporter.connect(trainer.global_step))
    trainer.wrap_model()
    handler.owns_summary = dist.is_main
    handler.start_peers()
    if job_log is not None:
        dist.run_on_main(lambda: job_log.record_resume(trainer.global_step))
    if dist.is_main:
        write_run_metadata(job, run_dir, trainer, on_cluster=job_log is not None)
        if validating or not trainer.is_done:
            reporter.info("\n".join(start_lines(job.settings, trainer, reports)))
    handler.stop.record_only()


def write_run_metadata(job: Job, run_dir: RunDir, trainer: Trainer, on_cluster: bool) -> None:
    """Write the configuration and metadata of a run that is about to train; a finished run keeps its own."""
    config = run_dir.path / "config.yaml"
    if (job.settings.trainer.mode == "val" or trainer.is_done) and config.exists():
        return
    write_atomically(config, job.config_text)
    summary = run_dir.read_summary()
    before = summary.get("run") or {}
    commits = before.get("commits") or []  # git commits of the code, newest last
    if (commit := git_commit()) is not None and commits[-1:] != [commit]:
        commits = [*commits, commit]
    history = {"started": before.get("started", time.time()), "commits": commits}
    metadata: dict[str, Any] = {"run": run_metadata(job.settings, trainer.raw_model) | history}
    if not on_cluster:
        metadata["job"] = None
    run_dir.write_summary(**metadata)


def finish_run(trainer: Trainer, reporter: Reporter, dist: Dist, handler: ExitHandler) -> None:
    """Report that the run has finished, and leave the process group."""
    if lines := validation_lines(trainer) if handler.validating else end_lines(trainer):
        reporter.info("\n".join(lines))
    if dist.is_main and handler.job_log is not None:  # before teardown, which may fail
        handler.job_log.note("end", status="finished", reason="all epochs done")
    if handler.peers is not None:
        handler.peers.end()
    dist.close()
    if dist.is_main:
        with signals_ignored():
            LOG.info("run finished")
            handler.run_dir.write_summary(last_lines=handler.run_dir.last_lines())


def log_to_file(path: Path) -> None:
    """Log this process to its own file."""
    path.parent.mkdir(parents=True, exist_ok=True)  # rank 0 created it, but another machine may not see it yet
    logging.basicConfig(
        filename=path,
        encoding="utf-8",
        errors="backslashreplace",
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
