"""The training command: compose, validate, launch.

    python train_app_submitit.py +experiments=omnimae/omnimain_train_video.yaml +trainer=mae_k150_config.yaml \
        trainer/model=vitbase ++launcher.experiment_log_dir=EXP_DIR submitit.use_cluster=false

Exit codes: 0 done; 1 invalid input, explained in one paragraph; 130 Ctrl-C; 129, 140, 143 stopped by a signal (SIGHUP, SIGUSR2,
SIGTERM); 71 non-finite numbers; others are failures. The reason is in summary.json; the constants are in `utils/errors.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from omnivision.config.compose import (
    CommandLine,
    check_distinct_run_dirs,
    compose_configs,
    expand_sweep,
    find_config_dir,
    help_text,
    parse_command_line,
)
from omnivision.utils.errors import EXIT_SIGINT, StopRequested, UserError, collect_problems, truncate_list
from omnivision.utils.signals import StopSignal
from omnivision.utils.streams import announce, ignore_broken_pipe, output_problem, warn

if TYPE_CHECKING:
    from omnivision.config.schema import Settings
    from omnivision.launch.job import Job


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit. Errors are printed, never raised."""
    ignore_broken_pipe()
    # Compute threads that spin while they wait take time from data workers on the same cores: on two busy cores, a step of a
    # small model took ten times as long. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with exit_on_error(), contextlib.ExitStack() as stack:
        stack.enter_context(StopSignal().raise_signals())
        config_dir = find_config_dir()
        command = parse_command_line(sys.argv[1:] if arguments is None else arguments, config_dir)
        if command.help:
            print(help_text(config_dir))
            sys.exit(0)
        configs = compose_configs(command)
        if command.print_config:
            print("\n".join(OmegaConf.to_yaml(config, resolve=False) for config in configs), end="")
            sys.exit(0)
        check_distinct_run_dirs(configs)
        jobs = make_jobs(configs, command)
        if any(job.settings.trainer.mode == "dry" for job in jobs):
            sys.exit(max(map(print_dry_run, jobs)))
        from omnivision.launch.launcher import launch

        stack.close()  # from here on, a run or a submission handles signals
        sys.exit(launch(jobs))


def make_jobs(configs: Sequence[DictConfig], command: CommandLine) -> list[Job]:
    """Validate the configurations of a command. Raises UserError with the problems of all runs of a sweep."""
    if not command.multirun:
        return [make_job(config, command) for config in configs]
    runs = [" ".join(each for each in run if each not in command.overrides) for run in expand_sweep(command.overrides)]
    jobs: list[Job] = []
    found: dict[str, list[str]] = {}  # the runs that have a problem
    for run, config in zip(runs, configs, strict=True):
        problems: list[str] = []
        if job := collect_problems(problems, make_job, config, command):
            jobs.append(job)
        for problem in problems:
            found.setdefault(problem, []).append(run)
    if found:
        raise UserError.from_problems([f"{problem} (Run {truncate_list(having)})" for problem, having in found.items()])
    return jobs


def make_job(config: DictConfig, command: CommandLine) -> Job:
    """Validate a configuration: its settings and, except for a dry run, its files. Raises UserError."""
    from omnivision.config.cross_validate import override_warnings
    from omnivision.config.validate import validate_config
    from omnivision.launch.job import Job
    from omnivision.launch.launcher import apply_torchrun_env, validate_launch_mode
    from omnivision.training.preflight import check_run

    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        announce("Checking the configuration and the data")
    apply_torchrun_env(config)
    settings = validate_config(config, command.overrides)
    is_dry = settings.trainer.mode == "dry"
    problems, warnings = ([], []) if is_dry else check_run(settings, validate_launch_mode)[:2]
    if problems:
        raise UserError.from_problems(problems)
    config_text = OmegaConf.to_yaml(config, resolve=False)
    for warning in [*override_warnings(settings, config_text, command.overrides), *warnings] if is_main else ():
        warn(warning)
    return Job(settings, config_text)


def print_dry_run(job: Job) -> int:
    """Print what a run would do, and its batch script; return 1 if it could not start."""
    from omnivision.launch import slurm
    from omnivision.launch.batch_script import batch_script
    from omnivision.launch.launcher import validate_launch_mode
    from omnivision.launch.submit import check_submission
    from omnivision.training.dry_run import dry_run

    def check_cluster(settings: Settings) -> None:
        if settings.submitit.use_cluster and slurm.is_available():
            check_submission([dataclasses.replace(job, settings=settings)], slurm.squeue())

    code = dry_run(job.settings, job.config_text, validate_launch_mode, check_cluster)
    if job.settings.submitit.use_cluster:
        print(f"\nThe batch script:\n\n{batch_script(job.settings, job.run_dir)}")
    if problem := output_problem():
        raise UserError(problem)
    return code


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Print an error raised in this block and exit with its code."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted before a run began", file=sys.stderr)
        sys.exit(EXIT_SIGINT)
    except StopRequested as error:
        print(f"ended by {error.cause} before a run began", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        from omnivision.launch.exit import exit_code_and_reason, print_error, unwrap_keyboard_interrupt

        code, reason = exit_code_and_reason(unwrap_keyboard_interrupt(error))
        if code != EXIT_SIGINT:
            print_error(reason if isinstance(error, UserError) else error)
        sys.exit(code)
