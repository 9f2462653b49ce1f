"""How a checked run is started: in this process, as several local processes, under torchrun, or on SLURM.

torch is imported when a run starts, so that a refusal or a submission does not wait for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnivision.errors import EXIT_FAULT, EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_USER, Terminated, UserError
from omnivision.reporting.run_folder import RunFolder
from omnivision.settings import Settings

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from omegaconf import DictConfig

    from omnivision.distributed import Place, Processes
    from omnivision.reporting.reporter import Reporter
    from omnivision.trainer import Trainer

LOG = logging.getLogger("omnivision")
LOG.addHandler(logging.NullHandler())  # until there is a file, nothing goes to the console by itself

INTERRUPTED = (EXIT_INTERRUPTED, EXIT_TERMINATED)  # exit codes of runs that somebody ended
GRACE_SECONDS = 15.0  # that the other processes have to leave after one has failed


@dataclass(frozen=True)
class Job:
    """What every process of a run is given."""

    settings: Settings
    config_text: str  # config.yaml as composed, interpolations unresolved


def launch(job: Job) -> int:
    """Run a job and return its exit code. Raises UserError when it cannot be started as asked."""
    launcher = job.settings.launcher
    # Compute threads that spin while they wait steal the time of data workers on the same cores: on two busy cores a step
    # of a small model took ten times as long. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if job.settings.submitit.use_cluster:
        return submit(job)
    if under_torchrun():
        return run_process(job, None)
    if launcher.num_nodes > 1:
        raise UserError(
            f"launcher.num_nodes is {launcher.num_nodes}, but submitit.use_cluster is false: this machine is one node. Set "
            "launcher.num_nodes=1, or submitit.use_cluster=true, or start it with torchrun on every node."
        )
    if launcher.gpus_per_node == 1:
        from omnivision.distributed import Place

        return run_process(job, Place())
    return run_local_processes(job, launcher.gpus_per_node)


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def adopt_torchrun(config: DictConfig) -> None:
    """Under torchrun, its numbers of nodes and processes replace those of the configuration, and it runs where it is."""
    if under_torchrun():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        config.launcher.gpus_per_node = local
        config.launcher.num_nodes = max(1, int(os.environ["WORLD_SIZE"]) // local)
        config.submitit.use_cluster = False


def submit(job: Job) -> int:
    """Submit to SLURM, one task for each process, and return at once."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "submitit.use_cluster is true, but this machine has no SLURM (sbatch is not found). To run here, append "
            "submitit.use_cluster=false launcher.num_nodes=1 launcher.gpus_per_node=1 to the command."
        )
    import submitit

    settings, wanted = job.settings, job.settings.submitit
    executor = submitit.SlurmExecutor(folder=f"{settings.launcher.experiment_log_dir}/submitit_logs")
    memory = {} if wanted.mem_gb is None else {"mem": f"{wanted.mem_gb:g}GB"}
    executor.update_parameters(
        job_name=wanted.name,
        partition=wanted.partition,
        time=max(1, round(wanted.timeout_hour * 60)),  # in minutes; SLURM takes 0 for no limit
        nodes=settings.launcher.num_nodes,
        ntasks_per_node=settings.launcher.gpus_per_node,
        cpus_per_task=wanted.cpus_per_task,
        **memory,
        **({} if settings.trainer.accelerator == "cpu" else {"gpus_per_node": settings.launcher.gpus_per_node}),
    )
    submitted = executor.submit(run_slurm_task, job)
    print(f"submitted job_id={submitted.job_id} folder={settings.launcher.experiment_log_dir}")
    return 0


def run_slurm_task(job: Job) -> None:
    """What SLURM starts as each task: the environment of torchrun is filled from SLURM's, then the job runs."""
    import submitit

    # Each process chooses its GPU by its local rank, so all of the node stay visible.
    submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if code := run_process(job, None):
        raise SystemExit(code)


def run_local_processes(job: Job, count: int) -> int:
    """Start `count` processes here and wait. When one fails, the others leave too; its exit code is returned.

    What killed a process is told by `summary.json` too, when that process could not say so itself.
    """
    from omnivision.distributed import Place

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="omnivision-rendezvous-") as meeting:
        places = [Place(rank, count, rank, count, f"file://{meeting}/store") for rank in range(count)]
        processes = [context.Process(target=_local_process, args=(job, place)) for place in places]
        for process in processes:
            process.start()
        try:
            with ending_on_sigterm():
                code, reason = first_failure(processes)
        except (Terminated, KeyboardInterrupt) as error:
            number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
            with undisturbed():
                for process in processes:
                    if process.is_alive() and process.pid is not None:
                        os.kill(process.pid, number)
                first_failure(processes)
            code, reason = _how_it_ended(error)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
    if code not in (0, EXIT_USER):
        run_folder(job).note_silent_end(reason, interrupted=code in INTERRUPTED)
    return code


def first_failure(processes: list[SpawnProcess]) -> tuple[int, str]:
    """Wait for processes to end; when one fails, the others have a while to leave. Its exit code counts.

    The second value says what happened, for a run that could not say it: which process was killed, or ended how.
    """
    failed: int | None = None
    deadline = float("inf")
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        for process in processes:
            process.join(timeout=0.1)
            if process.exitcode and failed is None:
                failed, deadline = process.exitcode, time.monotonic() + GRACE_SECONDS
    if failed is None:  # the last one may have ended between two looks
        failed = next((process.exitcode for process in processes if process.exitcode), 0)
    killed = [
        f"process {rank} was killed by {signal.Signals(-process.exitcode).name}"
        for rank, process in enumerate(processes)
        if process.exitcode is not None and process.exitcode < 0
    ]
    reason = ", ".join(killed) or f"a process ended with exit code {failed}"
    return failed if failed >= 0 else EXIT_FAULT, reason


def _local_process(job: Job, place: Place) -> None:
    from omnivision.distributed import leave_with

    leave_with(os.getppid())
    sys.exit(run_process(job, place))


def run_process(job: Job, place: Place | None) -> int:
    """One process of a run, from start to end; `place` is None under torchrun. Returns the exit code.

    A mistake of the user's is told in one paragraph; why a run ended, however it did, is in `summary.json`.
    """
    from omnivision import build
    from omnivision.distributed import Place
    from omnivision.files import remove_leftovers, write_atomically
    from omnivision.reporting.reporter import Reporter

    place = place or Place.from_torchrun()
    folder = run_folder(job)
    locked = begun = False
    validating = job.settings.trainer.mode == "val"
    try:
        processes = build.processes(job.settings, place)
        processes.together(folder.create, only_main=True)
        taken_over = processes.together(folder.lock, only_main=True)
        locked = processes.is_main
        processes.together(folder.own_checkpoints, only_main=True)
        if locked:
            for written in (folder.path, folder.logs, folder.checkpoints):
                remove_leftovers(written)
        log_to_file(folder.logs / f"rank_{place.rank}.log")
        reporter = Reporter(folder, enabled=processes.is_main)
        if taken_over:
            reporter.say(taken_over)
        trainer = processes.together(lambda: ready_trainer(job, processes, folder, reporter))
        assert trainer is not None
        trainer.join_processes()
        begun = processes.is_main
        kept = (validating or trainer.is_done) and (folder.path / "config.yaml").exists()
        if begun and not kept:
            if trainer.global_step and (changes := changed_settings(folder.path / "config.yaml", job.config_text)):
                reporter.say(f"The run goes on with other settings than it had: {'; '.join(changes)}")
            write_atomically(folder.path / "config.yaml", job.config_text)
            started = folder.read_summary().get("run", {}).get("started", time.time())
            folder.write_summary(run=build.facts(job.settings, trainer.bare) | {"started": started})
        with ending_on_sigterm(), contextlib.closing(reporter):
            trainer.validate_only() if validating else trainer.fit()
        processes.close()
        return 0
    except (Exception, KeyboardInterrupt, Terminated) as error:
        # A refusal before anything has begun leaves what an earlier run wrote as it is, and so does an evaluation.
        tells = (begun and not validating) or (locked and "status" not in folder.read_summary())
        with undisturbed():
            return explain(error, folder if tells else None, place.rank)
    finally:
        if locked:
            folder.unlock()


def run_folder(job: Job) -> RunFolder:
    return RunFolder(job.settings.launcher.experiment_log_dir, job.settings.trainer.checkpoint.save_dir)


def ready_trainer(job: Job, processes: Processes, folder: RunFolder, reporter: Reporter) -> Trainer:
    """The trainer with everything built and, if the run folder has a checkpoint, resumed; else with pretrained weights."""
    from omnivision import build
    from omnivision.files import write_atomically
    from omnivision.resuming import take_up

    trainer = build.trainer(job.settings, processes, folder, reporter)
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


def changed_settings(file: Path, text: str) -> list[str]:
    """How a configuration differs from the one that a run had before: "name: then -> now" for each setting."""
    import yaml

    def flat(value: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {name: value}
        return {key: v for k, part in value.items() for key, v in flat(part, f"{name}.{k}" if name else str(k)).items()}

    try:
        then = flat(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return ["what it had cannot be read from its config.yaml"]
    now = flat(yaml.safe_load(text))
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return [f"{name}: {then.get(name)} -> {now.get(name)}" for name in names]


def explain(error: BaseException, folder: RunFolder | None, rank: int) -> int:
    """Tell why a process ends, on the console, in its log and in `summary.json`; returns the exit code."""
    code, reason = _how_it_ended(error)
    # What all processes know is told by one; a fault is told by each that has one.
    tell = rank == 0 or code == EXIT_FAULT or (isinstance(error, UserError) and not error.everywhere)
    LOG.error(reason, exc_info=error if code == EXIT_FAULT else None)
    if tell:
        print_error(error if code == EXIT_FAULT else reason)
    if folder is not None:
        try:
            folder.write_summary(status="interrupted" if code in INTERRUPTED else "failed", exit_reason=reason)
        except OSError as failure:  # a full disk must not change the exit code
            print(f"error: the reason could not be written to {folder.path}: {failure}", file=sys.stderr)
    return code


def _how_it_ended(error: BaseException) -> tuple[int, str]:
    """Exit code and reason."""
    match error:
        case UserError():
            return error.exit_code, str(error)
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED, "interrupted from the keyboard"
        case Terminated():
            return EXIT_TERMINATED, "ended by SIGTERM"
    return EXIT_FAULT, f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Inside this block neither Ctrl-C nor SIGTERM interrupts: a run that is ending already writes down why.

    Ctrl-C reaches all processes of a terminal, and SLURM's SIGTERM all of a job; the launcher then sends one more.
    """
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Inside this block SIGTERM raises Terminated, so that the reason is written down and nothing is left running."""

    def end(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
    logging.basicConfig(
        filename=path, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
