"""The command line: flags, help, and the configurations that overrides compose."""

from __future__ import annotations

import argparse
import difflib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from omnivision.config.messages import suggest
from omnivision.config.schema import GROUPS
from omnivision.utils.errors import UserError

MAX_RUNS = 10_000  # of a sweep
HELP = """\
omnivision: video models by the PPMA recipe.

A run is an experiment (a stage of the recipe), a recipe for a dataset, and settings:

  python train_app_submitit.py +experiments=omnimae/omnimain_train_video.yaml +trainer=mae_k150_config.yaml \\
    trainer/model=vitbase ++batch_size=16 ++launcher.experiment_log_dir=FOLDER submitit.use_cluster=false

  --cfg job           print the composed settings
  trainer.mode=dry    print what the run would be, and what would stop it (exit code 1)
  -m                  a run for each of several values, KEY=A,B
  --config-dir DIR    a folder with site/, experiments/ or trainer/ files of your own; +site=NAME chooses DIR/site/NAME.yaml
  --config-name NAME  another primary file than config.yaml

Running the same command again resumes the run in its folder.
"""


@dataclass(frozen=True)
class CommandLine:
    overrides: list[str]
    config_dirs: list[Path]  # further folders of configuration, the project's own last
    config_name: str = "config"
    multirun: bool = False
    print_config: bool = False
    help: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. Settings are written KEY=VALUE, without dashes; --help lists them.")


def parse_command_line(arguments: Sequence[str], config_dir: Path) -> CommandLine:
    """Separate flags, which may stand anywhere, from overrides. Raises UserError for unknown flags."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument("--config-dir", "-cd", type=Path)
    parser.add_argument("--config-name", "-cn", default="config")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args(arguments)
    if given.config_dir is not None and not (given.config_dir.is_dir() and str(given.config_dir) != "."):
        raise UserError(
            f"--config-dir must be a folder that holds site/, experiments/ or trainer/, got {given.config_dir}."
        )
    if (wrong := next((each for each in given.overrides if not each.partition("=")[0].strip()), None)) is not None:
        raise UserError(f"Arguments must be KEY=VALUE, got {wrong!r} (an unset shell variable?).")
    folders = [] if given.config_dir is None else [given.config_dir]
    return CommandLine(
        given.overrides, [*folders, config_dir], given.config_name, given.multirun, given.cfg == "job", given.help
    )


def help_text(config_dir: Path) -> str:
    """Header, the choices of each group, and every setting with its default and meaning."""
    lines = [HELP]
    for group in ("trainer", *GROUPS):
        files = sorted(file.relative_to(config_dir / group) for file in (config_dir / group).rglob("*.yaml"))
        names = [file.with_suffix("").as_posix() for file in files if len(file.parts) == 1 + (group == "experiments")]
        lines.append("\n  ".join([f"{group if '/' in group else f'+{group}'}=", *names]))
    settings = (config_dir / "experiments" / "base.yaml").read_text(encoding="utf-8").partition("\n\n")[2]
    catalog = (config_dir / "experiments" / "dataset_catalog.yaml").read_text(encoding="utf-8").partition("\n\n")[0]
    lines += [
        "\nSettings (KEY=VALUE; ++KEY=VALUE also sets what is not there yet)\n",
        settings,
        "The catalog\n",
        catalog,
    ]
    lines.append("\nArguments of the objects that a run builds (trainer.model, ...): --cfg job, and docs/settings.md")
    return "\n".join(lines)


def use_yaml12_numbers() -> None:
    """Make YAML read `010` and `1:30` as texts, not as 8 and 90, so that validation can point at them."""
    decimal = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")
    for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
        yaml.SafeLoader.yaml_implicit_resolvers[key] = [
            (tag, decimal if tag == "tag:yaml.org,2002:int" else pattern) for tag, pattern in resolvers
        ]


def compose_configs(command: CommandLine) -> list[DictConfig]:
    """Return the configuration of a command, or those of a sweep (-m). Raises UserError for what cannot be composed."""
    use_yaml12_numbers()
    *more, config_dir = command.config_dirs
    overrides = [*command.overrides]
    if more:
        overrides.append(f"hydra.searchpath=[{', '.join(f'file://{folder.absolute()}' for folder in more)}]")
    try:
        with initialize_config_dir(str(config_dir.absolute()), version_base="1.3"):
            runs = expand_sweep(overrides) if command.multirun else [overrides]
            return [compose(command.config_name, run) for run in runs]
    except RecursionError:
        raise UserError(
            "A configuration file includes itself (defaults), or refers to itself. Correct the file."
        ) from None
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(explain(error, command)) from error


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each run of a sweep. Raises UserError for none, and for more than MAX_RUNS."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    sweeps = [each for each in parsed if each.is_discrete_sweep()]
    counts = [sum(1 for _ in itertools.islice(each.sweep_iterator(), MAX_RUNS + 1)) for each in sweeps]
    if not 1 <= (count := math.prod(counts)) <= MAX_RUNS:
        inputs = ", ".join(str(each.input_line) for each in sweeps)
        raise UserError(f"A sweep must have 1 to {MAX_RUNS} runs, got {'none' if not count else 'more'}: {inputs}.")
    return BasicSweeper.split_arguments(parsed, None)[0]


def is_typed(key: str, overrides: Sequence[str]) -> bool:
    """Return whether a command line sets a key, or something in its group."""
    names = (override.partition("=")[0].lstrip("+~") for override in overrides)
    return any(name == key or name.startswith(f"{key}.") for name in names)


def explain(error: BaseException, command: CommandLine) -> str:
    """Hydra's own message in one line, with the nearest known name."""
    text = str(error).partition("\nAvailable options")[0].partition("\nConfig search path")[0]
    noise = ("Set the", "See https", "full_key", "object_type", "reference_type")
    lines = [line.strip() for line in text.splitlines()]
    message = " ".join(line for line in lines if line and not line.startswith(noise)).rstrip(".")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        missing = Path(str(error.missing_cfg_file).removesuffix(".yaml"))
        files = [file.stem for folder in command.config_dirs for file in (folder / missing.parent).glob("*.yaml")]
        near = difflib.get_close_matches(missing.name.lower(), files, 1) or [f for f in files if missing.name in f]
        options = (
            f"; expected one of {', '.join(sorted(files))}."
            if files
            else f"{suggest(missing.parent.as_posix())} See --config-dir."
        )
        return message + (f"; did you mean {min(near, key=len)}?" if near else options)
    if override := getattr(error, "override", None):
        return f"The argument {override} cannot be parsed: {message}. A value with one of =,:[]{{}} or spaces needs quotes."
    if unknown := re.search(r"Could not (?:override|delete from config\.) '([^']*)'", text):
        return message.partition(" Key ")[0] + suggest(unknown[1])
    return f"{message or f'A configuration file cannot be read: {type(error).__name__}'}."


def check_distinct_run_dirs(configs: Sequence[DictConfig]) -> None:
    """Raise UserError for runs of a sweep in one folder: each would resume the other."""
    key = "launcher.experiment_log_dir"
    given = [OmegaConf.select(config, key, throw_on_resolution_failure=False) for config in configs]
    folders = {str(Path(str(folder)).resolve()) for folder in given}
    if None not in given and len(folders) < len(given):  # validation reports a missing one
        raise UserError(
            f"{key} must differ for the {len(given)} runs of a sweep, got {len(folders)} folders. Put what is swept into its "
            "name, e.g. 'launcher.experiment_log_dir=runs/lr_${lr_scale_factor}'."
        )
