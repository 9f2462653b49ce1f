"""The training command: compose, validate, launch.

    python train_app_submitit.py +experiments=omnimae/omnimain_train_video.yaml +trainer=mae_k150_config.yaml \
        trainer/model=vitbase ++launcher.experiment_log_dir=EXP_DIR submitit.use_cluster=false

Exit codes: 0 done; 1 invalid input, explained in one paragraph; others: faults, with the reason in summary.json.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from omnivision.config.compose import (
    CommandLine,
    check_distinct_run_dirs,
    compose_configs,
    parse_command_line,
    typed_choices,
)
from omnivision.config.help import help_text
from omnivision.utils.errors import EXIT_INTERRUPTED, StopRequested, UserError
from omnivision.utils.streams import announce, ignore_broken_pipe, output_problem

if TYPE_CHECKING:
    from omnivision.launch.launcher import Job


def train(arguments: Sequence[str], config_dir: Path) -> int:
    """Run what a command line describes; returns the exit code."""
    command = parse_command_line(arguments, config_dir)
    if command.help:
        print(help_text(config_dir))
        return 0
    configs = compose_configs(command)
    if command.print_config:
        print("\n".join(OmegaConf.to_yaml(config, resolve=False) for config in configs), end="")
        return 0
    check_distinct_run_dirs(configs)
    jobs = [make_job(config, command) for config in configs]
    if any(job.settings.trainer.mode == "dry" for job in jobs):
        return print_dry_run(jobs)
    from omnivision.launch.launcher import launch  # imports torch

    return launch(jobs)


def make_job(config: DictConfig, command: CommandLine) -> Job:
    """Validate a configuration: its settings and, unless it is for a dry run, its files. Raises UserError."""
    from omnivision.config.stages import stage_warnings
    from omnivision.config.validate import validate_config
    from omnivision.launch.launcher import Job, apply_torchrun_env, validate_launch_mode
    from omnivision.training.preflight import check_run, run_warnings

    if os.environ.get("RANK", "0") == "0":
        announce("Checking the configuration and the data")
    apply_torchrun_env(config)
    settings = validate_config(config, command.overrides, command.config_dirs)
    warnings = stage_warnings(settings, typed_choices(command.overrides))
    if settings.trainer.mode != "dry":
        warnings += run_warnings(settings, *check_run(settings, validate_launch_mode))
    if os.environ.get("RANK", "0") == "0":
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    return Job(settings, OmegaConf.to_yaml(config, resolve=False))


def print_dry_run(jobs: Sequence[Job]) -> int:
    """Print what each run would be; returns 1 if one could not start."""
    from omnivision.launch.dry_run import dry_run

    code = max(dry_run(job) for job in jobs)
    if problem := output_problem():
        raise UserError(problem)
    return code


def find_config_dir(beside: Path | None = None) -> Path:
    """The folder of the configuration files: `config/` of a checkout, or the installed copy."""
    package = Path(__file__).resolve().parent
    checkouts = [package.parent / "config"] if beside is None else [beside / "config", package.parent / "config"]
    return next((each for each in checkouts if (each / "config.yaml").is_file()), package / "config" / "yaml")


def main(arguments: Sequence[str] | None = None, beside: Path | None = None) -> None:
    """Run the command and exit; `beside` is the folder of the script. Errors are printed, never raised."""
    ignore_broken_pipe()
    try:
        code = train(sys.argv[1:] if arguments is None else arguments, find_config_dir(beside))
    except KeyboardInterrupt:
        print("interrupted before a run began", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except StopRequested as error:
        print(f"ended by {error.cause} before a run began", file=sys.stderr)
        code = error.exit_code
    except Exception as error:
        from omnivision.launch.exit import exit_code_and_reason, print_error, unwrap_keyboard_interrupt

        code, reason = exit_code_and_reason(unwrap_keyboard_interrupt(error))
        if code != EXIT_INTERRUPTED:
            print_error(reason if isinstance(error, UserError) else error)
    sys.exit(code)
