"""The command line: flags, help, and the configurations that overrides compose."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from omnivision.config.messages import UNKNOWN, suggest
from omnivision.config.schema import GROUPS, setting_hints
from omnivision.utils.errors import UserError, truncate_list
from omnivision.utils.streams import plural

MAX_RUNS = 10_000  # in a sweep
EMPTY_MAPPING = re.compile(r"\+{0,2}([\w.]+)=\{\s*\}")
HELP = """\
omnivision: video models by the PPMA recipe.

A run is an experiment (a stage of the recipe), a recipe for a dataset, and settings:

  python train_app_submitit.py +experiments=omnimae/omnimain_train_video.yaml +trainer=mae_k150_config.yaml \\
    trainer/model=vitbase ++batch_size=16 ++launcher.experiment_log_dir=FOLDER submitit.use_cluster=false

  --cfg job           print the composed settings
  trainer.mode=dry    print what the run would be, and what would stop it (exit code 1)
  -m                  start one run for each of several values, KEY=A,B
  --config-dir DIR    a folder with your own site/, experiments/ or trainer/ files; +site=NAME selects DIR/site/NAME.yaml
  --config-name NAME  use another primary file than config.yaml

Running the same command again resumes the run in its folder.
"""


@dataclass(frozen=True)
class CommandLine:
    overrides: list[str]
    config_dirs: list[Path]  # searched in this order; the project's own is last
    config_name: str = "config"
    multirun: bool = False
    print_config: bool = False
    help: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. Settings are written KEY=VALUE, without dashes; --help lists them.")


def find_config_dir() -> Path:
    """Return the folder of the configuration files: `config/` of a checkout, or the installed copy."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "config"
    return checkout if (checkout / "config.yaml").is_file() else package / "config" / "yaml"


def parse_command_line(arguments: Sequence[str], config_dir: Path) -> CommandLine:
    """Separate flags, which may be anywhere, from overrides. Raises UserError for unknown flags."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument("--config-dir", "-cd", type=Path)
    parser.add_argument("--config-name", "-cn", default="config")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args(arguments)
    if given.config_dir is not None and not given.config_dir.is_dir():
        raise UserError(f"--config-dir must be a folder of site/, experiments/ or trainer/, got {given.config_dir}.")
    folders = [config_dir] if given.config_dir is None else [given.config_dir, config_dir]
    return CommandLine(given.overrides, folders, given.config_name, given.multirun, given.cfg == "job", given.help)


def help_text(config_dir: Path) -> str:
    """Return a header, the choices of each group, and every setting with its default and meaning."""
    lines = [HELP]
    for group in ("trainer", *GROUPS):
        depth = 1 if group == "experiments" else 0
        names = [name for name in group_choices(group, [config_dir]) if name.count("/") == depth]
        lines.append("\n  ".join([f"{group if '/' in group else f'+{group}'}=", *names]))
    base, catalog = (config_dir / f"experiments/{name}.yaml" for name in ("base", "dataset_catalog"))
    lines += [
        "\nSettings (KEY=VALUE; ++KEY=VALUE also adds a setting that is not defined yet)\n",
        base.read_text(encoding="utf-8").partition("\n\n")[2],
        "The catalog\n",
        catalog.read_text(encoding="utf-8").partition("\n\n")[0],
        "\nArguments of the objects that a run builds (trainer.model, ...): --cfg job, and docs/settings.md",
    ]
    return "\n".join(lines)


def group_choices(group: str, config_dirs: Sequence[Path]) -> list[str]:
    """Return the choices of a config group as a command line names them, e.g. `demo/mae`."""
    files = [(file, folder / group) for folder in config_dirs for file in (folder / group).rglob("*.yaml")]
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file, folder in files)


@contextlib.contextmanager
def yaml12_numbers() -> Iterator[None]:
    """Read `010` and `1:30` in configuration files as strings, not as 8 and 90, so that validation rejects them."""
    tag, decimal = "tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")
    original = yaml.SafeLoader.yaml_implicit_resolvers
    yaml.SafeLoader.yaml_implicit_resolvers = {
        first: [(tag, decimal) if name == tag else (name, pattern) for name, pattern in resolvers]
        for first, resolvers in original.items()
    }
    try:
        yield
    finally:
        yaml.SafeLoader.yaml_implicit_resolvers = original


def compose_configs(command: CommandLine) -> list[DictConfig]:
    """Return the configuration of a command, or all of a sweep's (-m). Raises UserError if they cannot be composed."""
    *more, config_dir = command.config_dirs
    overrides = [*command.overrides]
    if more:
        overrides.append(f"hydra.searchpath=[{', '.join(f'file://{folder.absolute()}' for folder in more)}]")
    try:
        with (
            initialize_config_dir(str(config_dir.absolute()), version_base="1.3"),
            yaml12_numbers(),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("error", message=".*path=.* is not available")  # a folder of hydra.searchpath
            runs = expand_sweep(overrides) if command.multirun else [overrides]
            configs = [compose(command.config_name, run) for run in runs]
    except RecursionError:
        raise UserError("A configuration file includes or refers to itself. Correct the file.") from None
    except UnicodeDecodeError as error:
        files = [str(file) for folder in command.config_dirs for file in folder.rglob("*.yaml") if not _is_utf8(file)]
        raise UserError(
            f"Configuration files must be UTF-8 text, got other bytes in {truncate_list(files)}."
        ) from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError, UserWarning) as error:
        raise UserError(explain(error, command)) from error
    if not configs:
        raise UserError(f"A sweep must have at least one run, got none: {' '.join(command.overrides)}.")
    for run, config in zip(runs, configs, strict=True):
        check_empty_mappings(run, config)
    return configs


def check_empty_mappings(overrides: Sequence[str], config: DictConfig) -> None:
    """Raise UserError for KEY={} if KEY has entries all the same: Hydra merges mappings."""
    for key in (match[1] for match in map(EMPTY_MAPPING.fullmatch, overrides) if match):
        if names := list(OmegaConf.select(config, key, throw_on_resolution_failure=False) or ()):
            removals = " ".join(f"'~{key}.{name}'" for name in names)
            raise UserError(
                f"{key}={{}} removes nothing, because mappings are merged. To remove entries, set {removals}."
            )


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    except OSError:  # a folder or an unreadable file, which Hydra has not read either
        pass
    return True


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each run of a sweep, one run per combination of values. Raises UserError for too many."""
    choices = [
        [f"{override.get_key_element()}={value}" for value in islice(override.sweep_string_iterator(), MAX_RUNS + 1)]
        if override.is_discrete_sweep()
        else [str(override.input_line)]
        for override in OverridesParser.create().parse_overrides(list(overrides))
    ]
    if math.prod(map(len, choices)) > MAX_RUNS:
        raise UserError(f"A sweep must have at most {MAX_RUNS} runs, got more: {' '.join(overrides)}.")
    return [list(run) for run in product(*choices)]


def is_overridden(key: str, overrides: Sequence[str]) -> bool:
    """Return whether a command line sets a key, or something in its group."""
    names = (override.partition("=")[0].lstrip("+~") for override in overrides)
    return any(name == key or name.startswith(f"{key}.") for name in names)


def explain(error: BaseException, command: CommandLine) -> str:
    """Return Hydra's own message in one line, with the nearest known name."""
    text = str(error).partition("\nAvailable options")[0].partition("\nConfig search path")[0]
    noise = ("Set the", "See https", "full_key", "object_type", "reference_type")
    lines = [line.strip() for line in text.splitlines()]
    message = " ".join(line for line in lines if line and not line.startswith(noise)).rstrip(".")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        file = str(error.missing_cfg_file).removesuffix(".yaml")
        group = next((prefix for prefix in GROUPS if file.startswith(f"{prefix}/")), file.partition("/")[0])
        name, choices = file.removeprefix(f"{group}/"), group_choices(group, command.config_dirs)
        near = difflib.get_close_matches(name.lower(), choices, 1) or [choice for choice in choices if name in choice]
        return f"{message}; " + (f"did you mean {min(near, key=len)}?" if near else f"expected one of {choices}.")
    if override := getattr(error, "override", None):
        return f"The argument {override} cannot be parsed: {message}. A value with one of =,:[]{{}} or spaces needs quotes."
    if several := re.match(r"Multiple values for (\S+)\.", text):
        return f"{several[1]} must be chosen once, got several. Keep one +{several[1]}=NAME."
    if isinstance(error, UserWarning):
        return f"hydra.searchpath must name existing folders: {message}."
    message = message.replace(
        "Cannot merge DictConfig with ListConfig", "a list cannot replace a mapping (lines KEY: VALUE)"
    )
    unknown = re.search(r"Could not (?:override|delete from config\.) '([^']*)'(?!\. No match)", text)
    if unknown and not takes_any_key(unknown[1]):  # Hydra's advice (+KEY=VALUE) is right only for free-form groups
        if unknown[1] in setting_hints():  # a mapping with new entries
            entry = re.search(r"Key '([^']*)'", str(error.__cause__))
            name = f"{unknown[1]}.{entry[1] if entry else 'NAME'}"
            return (
                f"{unknown[1]} is a mapping, to which entries are added one by one. Set '+{name}=VALUE' for each new one, and "
                f"'~{unknown[1]}.NAME' to remove one."
            )
        return f"{unknown[1]} {UNKNOWN}{suggest(unknown[1])}"
    return f"{message or f'A configuration file cannot be read: {type(error).__name__}'}."


def takes_any_key(key: str) -> bool:
    """Return whether a key's group takes any key: arguments of an object, or entries of a mapping."""
    group, names = key.replace("/", ".").rpartition(".")[0], setting_hints()
    return group.partition(".")[0] in names and not any(name.startswith(f"{group}.") for name in names)


def check_distinct_run_dirs(configs: Sequence[DictConfig]) -> None:
    """Raise UserError if runs of a sweep share a folder: each would resume the other."""
    key = "launcher.experiment_log_dir"
    given = [OmegaConf.select(config, key, throw_on_resolution_failure=False) for config in configs]
    folders = {str(Path(str(folder)).resolve()) for folder in given}
    if None not in given and len(folders) < len(given):  # validation reports a missing one
        raise UserError(
            f"{key} must differ for the {len(given)} runs of a sweep, got {plural(len(folders), 'folder')}. Put what is swept "
            "into its name, e.g. 'launcher.experiment_log_dir=runs/lr_${lr_scale_factor}'."
        )
