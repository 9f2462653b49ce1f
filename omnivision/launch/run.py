"""One process of a run, from start to end: it builds, resumes, trains, and writes down how it ended."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnivision.config.schema import Settings
from omnivision.launch.exit import ExitHandler, remove_end_files, unwrap_keyboard_interrupt
from omnivision.launch.watchdog import GRACE_SECONDS, PeerMonitor
from omnivision.reporting.run_directory import STALE_SECONDS, RunDir
from omnivision.utils.errors import StopRequested, UserError
from omnivision.utils.signals import StopSignal, end_workers, signals_ignored
from omnivision.utils.streams import announce, ignore_broken_pipe

if TYPE_CHECKING:
    from omnivision.checkpoint.pretrained import LoadReport
    from omnivision.data.catalog import Split
    from omnivision.distributed.process_group import Dist, RankInfo
    from omnivision.launch.slurm_jobs import JobLog
    from omnivision.reporting.reporter import Reporter
    from omnivision.training.trainer import Trainer

LOG = logging.getLogger("omnivision")
LOG.addHandler(logging.NullHandler())  # until there is a file, nothing goes to the console by itself


@dataclass(frozen=True)
class Job:
    """What every process of a run is given."""

    settings: Settings
    config_text: str  # config.yaml as composed, interpolations unresolved
    token: str = ""  # of its submission to a cluster; numbers of jobs may come again


def run_folder(job: Job) -> RunDir:
    return RunDir(job.settings.launcher.experiment_log_dir, job.settings.trainer.checkpoint.save_dir)


def run_process(job: Job, place: RankInfo | None, record: JobLog | None = None) -> int:
    """One process of a run, from start to end; `place` is None under torchrun. Returns the exit code.

    A mistake of the user's is told in one paragraph; why a run ended, however it did, is in `summary.json`. `record` is what
    a cluster's job is looked after by; process 0 alone calls it. With one, requests to stop are ignored afterwards.
    """
    ignore_broken_pipe()
    faulthandler.enable(sys.__stderr__ or 2)  # a signal that no Python code sees (SIGSEGV, SIGBUS) still says where
    stop, folder = StopSignal(), run_folder(job)
    validating = job.settings.trainer.mode == "val"
    rank = place.rank if place is not None else int(os.environ.get("RANK", "0"))
    ending = ExitHandler(folder, rank, validating, record)
    grace = max(GRACE_SECONDS, job.settings.submitit.signal_delay_s or 0)
    with stop.handle_signals(ignore_after=record is not None), ending.watched(stop, grace):
        try:
            stop.raise_if_requested()
            if rank == 0:
                announce("Loading torch, then building the model")
            from omnivision.checkpoint import checkpointer as checkpoint
            from omnivision.checkpoint.fingerprint import flat_text
            from omnivision.distributed.process_group import RankInfo
            from omnivision.reporting.reporter import Reporter
            from omnivision.training import build
            from omnivision.training.run_messages import end_lines, start_lines, validation_lines
            from omnivision.utils.io import remove_leftovers, write_atomically

            place = place or RankInfo.from_torchrun()
            dist = build.process_group(job.settings, place)
            dist.run_on_all(folder.create, only_main=True)
            # What a dead node has left behind looks alive for a while; a job of a cluster can wait.
            patience = STALE_SECONDS + 10 if record is not None else 0.0
            taken_over = dist.run_on_all(lambda: folder.lock(patience), only_main=True)
            ending.locked = dist.is_main
            dist.run_on_all(folder.claim_checkpoint_dir, only_main=True)
            if ending.locked:
                remove_end_files(folder)
                for written in (folder.path, folder.logs, folder.checkpoints):
                    remove_leftovers(written)
            log_to_file(folder.logs / f"rank_{place.rank}.log")
            timeout = 60 * job.settings.trainer.distributed.timeout_minutes
            ending.peers = PeerMonitor(folder.logs, place.rank, place.world_size, stop, timeout, ending.leave)
            if record is not None:
                dist.run_on_all(lambda: record.check_requeue_limits(stop), only_main=True)
                stop.end_at(dist.gather(stop.deadline)[0])
            newest = dist.gather(checkpoint.stat_latest(folder.checkpoints))[0]
            checkpoint.wait_until_visible(newest, folder.checkpoints)
            told = flat_text(job.config_text)  # unresolved: nothing of the environment
            reporter = Reporter(folder, dist.is_main, extra_loggers=job.settings.trainer.logging.also, settings=told)
            if taken_over:
                reporter.info(taken_over)
            ready = dist.run_on_all(lambda: build_and_restore(job, dist, folder, reporter, stop))
            assert ready is not None
            trainer, reports = ready
            if reports and dist.is_main:
                loaded = [asdict(report) for report in reports]
                write_atomically(folder.logs / "pretrained.json", json.dumps(loaded, indent=1) + "\n")
            dist.run_on_all(lambda: reporter.connect(trainer.global_step), only_main=True)
            trainer.wrap_model()
            ending.peers.start()
            ending.begun = dist.is_main
            if record is not None:
                dist.run_on_all(lambda: record.record_resume(trainer.global_step), only_main=True)
            if ending.begun:
                write_run_metadata(job, folder, trainer, reporter, on_cluster=record is not None)
            if dist.is_main and (validating or not trainer.is_done):
                reporter.info("\n".join(start_lines(job.settings, trainer, reports)))
            stop.defer()
            with reporter:
                trainer.validate_only() if validating else trainer.fit()
            if last_lines := validation_lines(trainer) if validating else end_lines(trainer):
                reporter.info("\n".join(last_lines))
            ending.peers.end()
            dist.close()
            if ending.begun:
                with signals_ignored():
                    LOG.info("ended well")
                    folder.write_summary(last_lines=folder.last_lines())
                    if record is not None:
                        record.note("end", status="finished", reason="all is done")
            return 0
        except (Exception, KeyboardInterrupt, StopRequested) as error:
            with signals_ignored():
                cause = unwrap_keyboard_interrupt(error)
                if isinstance(cause, KeyboardInterrupt):
                    cause.add_note(stop.describe_saved())
                return ending.told(cause)
        finally:
            with signals_ignored():
                end_workers()
                ending.unlock()


def write_run_metadata(job: Job, folder: RunDir, trainer: Trainer, reporter: Reporter, on_cluster: bool) -> None:
    """Write the configuration and the facts of a run that is about to train; what a finished one has stays as it is."""
    from omnivision.checkpoint.fingerprint import git_commit
    from omnivision.training import build
    from omnivision.utils.io import write_atomically

    config = folder.path / "config.yaml"
    if (job.settings.trainer.mode == "val" or trainer.is_done) and config.exists():
        return
    write_atomically(config, job.config_text)
    summary = folder.read_summary()
    before = summary.get("run", {})
    commits = before.get("commits") or []  # of the code, the newest last
    if (commit := git_commit()) is not None and commits[-1:] != [commit]:
        commits = [*commits, commit]
    history = {"started": before.get("started", time.time()), "commits": commits}
    facts: dict[str, Any] = {"run": build.run_metadata(job.settings, trainer.raw_model) | history}
    if not on_cluster:
        facts["job"] = None
    folder.write_summary(**facts)


def build_and_restore(
    job: Job,
    dist: Dist,
    folder: RunDir,
    reporter: Reporter,
    stop: StopSignal,
    splits: tuple[list[Split], list[Split]] | None = None,
) -> tuple[Trainer, list[LoadReport]]:
    """Build the trainer and resume it if the run directory has a checkpoint, else load pretrained weights.

    Returns the trainer, and a report for each file of pretrained weights. On the meta device (`trainer.mode=dry`) names and
    shapes are checked and nothing is computed. `splits` are the train and val splits, if they are open already.
    """
    from omnivision.checkpoint.fingerprint import fingerprint, flat
    from omnivision.training import build

    trainer = build.trainer(job.settings, dist, folder, reporter, stop, splits)
    if dist.is_main:
        used = [data for data in (trainer.train, trainer.val) if data is not None]
        used_splits = [split for data in used for split in data.dataset.splits]
        plan = None if trainer.train is None else trainer.train.plan
        values = flat(job.settings.model_dump())
        trainer.run.fingerprint = fingerprint(
            job.config_text, values, used_splits, plan, build.inference_config(job.settings)
        )
    for source in trainer.run.sources:
        reporter.info(f"Averages {source.path} (SHA-256 {source.sha256[:12]}...)")
    if trainer.load_checkpoint(build.class_names(job.settings)):
        return trainer, []
    validating = job.settings.trainer.mode == "val"
    if validating and trainer.run.sources:
        raise UserError(
            f"There is no checkpoint in {folder.checkpoints} to validate (trainer.mode=val), and the checkpoints that an "
            "average is made of have no head of its own. Change launcher.experiment_log_dir to that of the average, or "
            "evaluate it as one model: trainer/model=vit*_ft trainer/checkpoint=load_all and as pretrained_checkpoint_path "
            "the folder of the average's run."
        )
    if validating and job.settings.pretrained_checkpoint_path is None:
        raise UserError(
            f"There is no checkpoint in {folder.checkpoints} to validate (trainer.mode=val). Expected that of a run with the "
            "same model. Change launcher.experiment_log_dir, give pretrained_checkpoint_path, or train first."
        )
    reports = trainer.run.sources or build.pretrained(job.settings, trainer.raw_model)
    for line in [line for report in reports for line in report.lines()]:
        reporter.info(line)
    if not validating and any(name.startswith("heads.") for report in reports for name in report.loaded):
        reporter.info("The heads of the checkpoint are loaded, too; trainer/checkpoint=no_heads leaves them out.")
    if trainer.ema is not None:
        trainer.ema.start()
    return trainer, reports


def log_to_file(path: Path) -> None:
    """Send this process's log to a file of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)  # process 0 has made it, but another machine may not see it yet
    logging.basicConfig(
        filename=path,
        encoding="utf-8",
        errors="backslashreplace",
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
