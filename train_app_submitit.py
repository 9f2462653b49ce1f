"""Compose a run with Hydra, check it, launch it. Nothing here imports torch; the process that trains does.

    python train_app_submitit.py +experiments=omnimae/omnimain_train_video.yaml +trainer=mae_k150_config.yaml \
        trainer/model=vitbase ++launcher.experiment_log_dir=EXP_DIR submitit.use_cluster=false

Exit codes: 0 done; 1 a mistake of the user's, told in one paragraph; others: faults, with the reason in summary.json.
"""

import contextlib
import io
import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

if TYPE_CHECKING:
    from omnivision.config.schema import Settings
    from omnivision.launch.run import Job

HERE = Path(__file__).resolve().parent
FLAGS_WITH_VALUE = (
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--experimental-rerun",
)
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
CONFIG = HERE / "config" if (HERE / "config" / "config.yaml").is_file() else HERE / "omnivision" / "config" / "yaml"


def main() -> None:
    from omnivision.utils.errors import EXIT_INTERRUPTED, StopRequested, UserError
    from omnivision.utils.streams import announce, ignore_broken_pipe

    ignore_broken_pipe()
    if {"-h", "--help"} & set(sys.argv[1:]):
        from omnivision.config.usage import usage

        print(usage(CONFIG))
        return
    if os.environ.get("RANK", "0") == "0":
        announce("Composing and checking the configuration and the data")
    try:
        code = run(apart(composed()))
    except StopRequested as error:
        print(f"ended by {error.cause} before a run began", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted before a run began", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except UserError as error:
        from omnivision.launch.exit import print_error

        print_error(str(error))
        code = error.exit_code
    except Exception as error:
        from omnivision.launch.exit import exit_code_and_reason, print_error, unwrap_keyboard_interrupt

        code, _ = exit_code_and_reason(unwrap_keyboard_interrupt(error))
        if code != EXIT_INTERRUPTED:
            print_error(error)
    sys.exit(code)


def composed() -> list[DictConfig]:
    """What the command line describes: one configuration, several for a sweep, none for --cfg and the like."""
    from omnivision.config.hydra_guard import check_sweep, keep_hydra_to_composing
    from omnivision.config.yaml_numbers import read_numbers_as_written

    read_numbers_as_written()
    keep_hydra_to_composing()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises to us instead of printing
    found: list[DictConfig] = []
    given = sys.argv[1:]
    check_sweep(given)
    try:
        with tempfile.TemporaryDirectory() as left_by_sweeps:
            sys.argv[1:] = [*flags_first(sys.argv[1:]), f"hydra.sweep.dir={left_by_sweeps}"]
            with contextlib.redirect_stderr(io.StringIO()) as said:
                hydra.main(version_base="1.3", config_path=str(CONFIG), config_name="config")(found.append)()
            sys.stderr.write(said.getvalue())
    except SystemExit as error:
        if not error.code:
            raise
        from omnivision.config.compose_errors import explain_flags
        from omnivision.utils.errors import UserError

        raise UserError(explain_flags(" ".join(said.getvalue().rpartition("error: ")[2].split()), given)) from None
    except RecursionError:
        from omnivision.utils.errors import UserError

        raise UserError(
            "A configuration file includes itself (defaults), or refers to itself. Mend the file."
        ) from None
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        from omnivision.config.compose_errors import explain
        from omnivision.utils.errors import UserError

        raise UserError(explain(error, [*site_folders(given), CONFIG], given)) from error
    return found


def flags_first(arguments: list[str]) -> list[str]:
    """The same command line with Hydra's flags before all settings: it takes them nowhere else, and scripts append them."""
    flags, settings, left = [], [], [*arguments]
    while left:
        word = left.pop(0)
        if word in ("--info", "-i"):  # its value may be left out, and a setting would be taken for it
            flags.append(f"--info={left.pop(0) if left[:1] and left[0] in INFO else 'all'}")
        elif word in FLAGS_WITH_VALUE:
            flags += [word, value_of(word, left.pop(0) if left else "")]
        elif word.startswith("-"):
            flags.append(word)
            if word.endswith("="):
                value_of(word[:-1], "")
        else:
            settings.append(word)
    return [*flags, *settings]


def value_of(flag: str, value: str) -> str:
    """The value of a flag. Raises UserError where there is none: an empty folder would be passed over."""
    if not value:
        from omnivision.utils.errors import UserError

        raise UserError(f"{flag} has no value. Was it a shell variable that is not set?")
    return value


def site_folders(arguments: list[str]) -> list[Path]:
    """The folders of further configuration that a command line names."""
    after = [Path(value) for flag, value in itertools.pairwise(arguments) if flag in ("--config-dir", "-cd")]
    return after + [Path(word.partition("=")[2]) for word in arguments if word.startswith("--config-dir=")]


def apart(configs: list[DictConfig]) -> list[DictConfig]:
    """The configurations of a sweep; runs in one folder would take one another for their own beginning."""
    from omnivision.utils.errors import UserError

    name = "launcher.experiment_log_dir"
    given = [OmegaConf.select(config, name, throw_on_resolution_failure=False) for config in configs]
    if None in given:
        return configs  # the check of the settings says what is wrong
    folders = [os.path.realpath(str(folder)) for folder in given]
    if (different := len(set(folders))) < len(folders):
        raise UserError(
            f"A sweep of {len(folders)} runs in {different} folder{'s' * (different > 1)}; expected a folder for each. Put "
            "what is swept into its name, e.g. 'launcher.experiment_log_dir=runs/lr_${lr_scale_factor}'."
        )
    return configs


def run(configs: list[DictConfig]) -> int:
    """Check configurations, all before the first is launched; returns the exit code."""
    from omnivision.launch.launcher import launch
    from omnivision.utils.errors import UserError

    if not configs and {"-m", "--multirun"} & set(sys.argv[1:]):
        raise UserError("The sweep has no runs: a range or a choice among them is empty. Change it.")
    jobs = [checked(config) for config in configs]
    if any(job.settings.trainer.mode == "dry" for job in jobs):
        from omnivision.launch.dry_run import dry_run
        from omnivision.utils.streams import output_problem

        code = max(dry_run(job) for job in jobs)
        if problem := output_problem():
            raise UserError(problem)
        return code
    return launch(jobs)


def checked(config: DictConfig) -> "Job":
    """A configuration as a job, its settings and data checked; those of trainer.mode=dry are checked by `dry_run`."""
    from omnivision.config.origins import origin_of
    from omnivision.config.stages import stage_warnings, typed_choices
    from omnivision.config.validate import check
    from omnivision.launch.launcher import apply_torchrun_env, validate_launch_mode
    from omnivision.launch.run import Job
    from omnivision.training.preflight import check_run, run_warnings

    trust_by_hand(config)
    apply_torchrun_env(config)
    written = OmegaConf.to_container(config, resolve=False)
    folders = [*site_folders(sys.argv[1:]), CONFIG]
    choices = typed_choices(sys.argv[1:])
    settings = check(config, origin_of(sys.argv[1:], folders, written), choices, folders)
    require_weights_by_hand(settings)
    warnings = stage_warnings(settings, choices)
    if settings.trainer.mode != "dry":
        warnings += run_warnings(settings, *check_run(settings, validate_launch_mode))
    if os.environ.get("RANK", "0") == "0":
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    return Job(settings, OmegaConf.to_yaml(config, resolve=False))


def trust_by_hand(config: DictConfig) -> None:
    """Raise UserError for a file that trusts packages: it may come from others, as what it would have built."""
    from omnivision.utils.errors import UserError

    trusted = OmegaConf.select(config, "trainer.trust_targets", throw_on_resolution_failure=False)
    if trusted and not any(word.lstrip("+").startswith("trainer.trust_targets=") for word in sys.argv[1:]):
        raise UserError(
            f"trainer.trust_targets is {str(trusted)[:200]} in a file; expected it on the command line alone: to build classes "
            "runs their code, and files come from others, too. Take it out, and type '++trainer.trust_targets=[PACKAGE]'."
        )


def require_weights_by_hand(settings: "Settings") -> None:
    """Raise UserError for frozen or averaged weights that come from nowhere, unless null was typed."""
    from omnivision.utils.errors import UserError
    from omnivision.utils.io import LATEST

    frozen = settings.trainer.freeze or "num_models" in settings.trainer.model
    if not frozen or settings.pretrained_checkpoint_path is not None or settings.trainer.mode == "val":
        return
    resumes = Path(settings.trainer.checkpoint.save_dir, LATEST).exists()
    if not resumes and not any(word.lstrip("+").startswith("pretrained_checkpoint_path=") for word in sys.argv[1:]):
        raise UserError(
            "pretrained_checkpoint_path is not set, and the run freezes or averages pretrained weights; expected the run "
            "directory or checkpoint of an earlier stage. Set pretrained_checkpoint_path=RUN, or type "
            "pretrained_checkpoint_path=null for randomly initialized weights."
        )


if __name__ == "__main__":
    main()
