"""One process of a run, from start to end: it builds, resumes, trains, and writes down how it ended."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnivision.errors import EXIT_FAULT, EXIT_INTERRUPTED, Terminated, UserError
from omnivision.reporting.run_folder import STALE_SECONDS, WAITING, RunFolder
from omnivision.settings import Settings
from omnivision.stopping import Stop, undisturbed

if TYPE_CHECKING:
    from omnivision.distributed import Place, Processes
    from omnivision.job_record import JobRecord
    from omnivision.reporting.reporter import Reporter
    from omnivision.trainer import Trainer

LOG = logging.getLogger("omnivision")
LOG.addHandler(logging.NullHandler())  # until there is a file, nothing goes to the console by itself


@dataclass(frozen=True)
class Job:
    """What every process of a run is given."""

    settings: Settings
    config_text: str  # config.yaml as composed, interpolations unresolved
    token: str = ""  # of its submission to a cluster; numbers of jobs may come again


def run_folder(job: Job) -> RunFolder:
    return RunFolder(job.settings.launcher.experiment_log_dir, job.settings.trainer.checkpoint.save_dir)


def run_process(job: Job, place: Place | None, record: JobRecord | None = None) -> int:
    """One process of a run, from start to end; `place` is None under torchrun. Returns the exit code.

    A mistake of the user's is told in one paragraph; why a run ended, however it did, is in `summary.json`. `record` is what
    a cluster's job is looked after by; process 0 alone calls it. With one, requests to stop are ignored afterwards.
    """
    faulthandler.enable(sys.__stderr__ or 2)  # a signal that no Python code sees (SIGSEGV, SIGBUS) still says where
    stop, folder = Stop(), run_folder(job)
    locked = begun = False
    validating = job.settings.trainer.mode == "val"
    processes: Processes | None = None
    with stop.listening(deaf_afterwards=record is not None):
        try:
            stop.hear()
            from omnivision import build, checkpoint
            from omnivision.distributed import Place
            from omnivision.files import remove_leftovers
            from omnivision.reporting.reporter import Reporter

            place = place or Place.from_torchrun()
            processes = build.processes(job.settings, place)
            processes.together(folder.create, only_main=True)
            # What a dead node has left behind looks alive for a while; a job of a cluster can wait.
            patience = STALE_SECONDS + 10 if record is not None else 0.0
            taken_over = processes.together(lambda: folder.lock(patience), only_main=True)
            locked = processes.is_main
            processes.together(folder.own_checkpoints, only_main=True)
            if locked:
                for written in (folder.path, folder.logs, folder.checkpoints):
                    remove_leftovers(written)
            log_to_file(folder.logs / f"rank_{place.rank}.log")
            if record is not None:
                processes.together(lambda: record.allow(stop), only_main=True)
                stop.end_at(processes.gather(stop.deadline)[0])
            newest = processes.gather(checkpoint.seen(folder.checkpoints))[0]
            checkpoint.wait_to_see(newest, folder.checkpoints)
            reporter = Reporter(folder, enabled=processes.is_main)
            if taken_over:
                reporter.say(taken_over)
            trainer = processes.together(lambda: ready_trainer(job, processes, folder, reporter, stop))
            assert trainer is not None
            trainer.join_processes()
            begun = processes.is_main
            if record is not None:
                processes.together(lambda: record.resumed(trainer.global_step), only_main=True)
            if begun:
                note_beginning(job, folder, trainer, reporter, on_cluster=record is not None)
            stop.patience()
            with contextlib.closing(reporter):
                trainer.validate_only() if validating else trainer.fit()
            processes.close()
            if begun:
                with undisturbed():
                    LOG.info("ended well")
                    folder.write_summary(last_lines=folder.last_lines())
                    if record is not None:
                        record.note("end", status="finished", reason="all is done")
            return 0
        except (Exception, KeyboardInterrupt, Terminated) as error:
            with undisturbed():
                # A refusal before anything has begun leaves what an earlier run wrote as it is; an evaluation always does.
                untouched = locked and folder.read_summary().get("status") in (None, *WAITING)
                tells = untouched or (begun and not validating)
                rank = place.rank if place is not None else int(os.environ.get("RANK", "0"))
                if record is not None and rank == 0 and not validating:
                    tells = tells or locked or record.tells()
                return explain(error, folder, tells, rank, record)
        finally:
            with undisturbed():
                if locked:
                    folder.unlock()


def note_beginning(job: Job, folder: RunFolder, trainer: Trainer, reporter: Reporter, on_cluster: bool) -> None:
    """Write the configuration and the facts of a run that is about to train; what a finished one has stays as it is."""
    from omnivision import build
    from omnivision.files import write_atomically

    config = folder.path / "config.yaml"
    if (job.settings.trainer.mode == "val" or trainer.is_done) and config.exists():
        return
    write_atomically(config, job.config_text)
    summary = folder.read_summary()
    started = summary.get("run", {}).get("started", time.time())
    facts: dict[str, Any] = {"run": build.facts(job.settings, trainer.bare) | {"started": started}}
    if not on_cluster:
        facts["job"] = None
    folder.write_summary(**facts)


def ready_trainer(job: Job, processes: Processes, folder: RunFolder, reporter: Reporter, stop: Stop) -> Trainer:
    """The trainer with everything built and, if the run folder has a checkpoint, resumed; else with pretrained weights."""
    from omnivision import build
    from omnivision.experiment import facts
    from omnivision.files import write_atomically
    from omnivision.resuming import take_up

    trainer = build.trainer(job.settings, processes, folder, reporter, stop)
    if processes.is_main:
        used = [data for data in (trainer.train, trainer.val) if data is not None]
        splits = [split for data in used for split in data.dataset.splits]
        trainer.experiment = facts(job.config_text, splits, None if trainer.train is None else trainer.train.plan)
    for source in trainer.sources:
        reporter.say(f"Averages {source.path} (SHA-256 {source.sha256[:12]}...)")
    if take_up(trainer):
        return trainer
    validating = job.settings.trainer.mode == "val"
    if validating and trainer.sources:
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
    reports = trainer.sources or build.pretrained(job.settings, trainer.bare)
    for line in [line for report in reports for line in report.lines()]:
        reporter.say(line)
    if reports and processes.is_main:
        told = [asdict(report) for report in reports]
        write_atomically(folder.logs / "pretrained.json", json.dumps(told, indent=1) + "\n")
    if trainer.ema is not None:
        trainer.ema.start()
    return trainer


def explain(error: BaseException, folder: RunFolder, tells: bool, rank: int, record: JobRecord | None = None) -> int:
    """Say why a process ends, on the console, in its log and, if it `tells` of this run, in `summary.json`; returns the exit
    code.
    """
    code, reason = how_it_ended(error)
    # What all processes know is told by one; a fault is told by each that has one.
    tell = rank == 0 or code == EXIT_FAULT or (isinstance(error, UserError) and not error.everywhere)
    as_asked = isinstance(error, (KeyboardInterrupt, Terminated))
    LOG.log(logging.WARNING if as_asked else logging.ERROR, reason, exc_info=error if code == EXIT_FAULT else None)
    if tell:
        print_error(error if code == EXIT_FAULT else reason)
    try:
        if record is not None and rank == 0:
            record.end(error, reason, tells)
        elif record is not None:
            record.fault(error, reason)
        elif tells:
            folder.write_end("failed" if isinstance(error, Exception) else "interrupted", reason)
    except OSError as failure:  # a full disk must not change the exit code
        print(f"error: the reason could not be written to the run folder: {failure}", file=sys.stderr)
    return code


def how_it_ended(error: BaseException) -> tuple[int, str]:
    """Exit code and reason."""
    match error:
        case UserError():
            return error.exit_code, str(error)
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED, "interrupted from the keyboard"
        case Terminated():
            saved = "" if error.saved_step is None else f"; step {error.saved_step} is saved"
            return error.exit_code, f"ended by {error.cause}{saved}"
    return EXIT_FAULT, f"{type(error).__name__}: {error}"


def print_error(problem: BaseException | str) -> None:
    """A paragraph for a user's mistake, a traceback for a fault (or for everything, with OMNIVISION_TRACEBACK=1)."""
    if isinstance(problem, str):
        print(f"error: {problem}", file=sys.stderr, flush=True)
        if os.environ.get("OMNIVISION_TRACEBACK") == "1":
            traceback.print_exc()
    else:
        traceback.print_exception(problem)


def log_to_file(path: Path) -> None:
    """Send this process's log to a file of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)  # process 0 has made it, but another machine may not see it yet
    logging.basicConfig(
        filename=path, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
