"""The command line: its flags, the configurations that its overrides compose, and what is wrong with them."""

from __future__ import annotations

import argparse
import difflib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from omnivision.config.schema import GROUPS, setting_types
from omnivision.utils.errors import UserError

MAX_RUNS = 10_000  # of a sweep


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
        found = re.match(r"unrecognized arguments: --?([\w-]+)(=\S*)?", message)
        near = suggest(found[1].replace("-", "_")) if found else None
        guess = f" Did you mean {near}{found[2] or '=VALUE'}?" if found and near else ""
        raise UserError(f"{message}. Settings are written KEY=VALUE, without dashes; --help lists them.{guess}")


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


def use_yaml12_numbers() -> None:
    """Make YAML read `010` and `1:30` as texts, not as 8 and 90, so that validation can point at them."""
    decimal = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")
    for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
        yaml.SafeLoader.yaml_implicit_resolvers[key] = [
            (tag, decimal if tag == "tag:yaml.org,2002:int" else pattern) for tag, pattern in resolvers
        ]


def compose_configs(command: CommandLine) -> list[DictConfig]:
    """The configuration of a command, or those of a sweep (-m). Raises UserError for what cannot be composed."""
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
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(explain(error, command)) from error


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each run of a sweep. Raises UserError for none, and for more than MAX_RUNS."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    sweeps = [each for each in parsed if each.is_discrete_sweep()]
    counts = [sum(1 for _ in itertools.islice(each.sweep_iterator(), MAX_RUNS + 1)) for each in sweeps]
    if not 1 <= (count := math.prod(counts)) <= MAX_RUNS:
        inputs = ", ".join(str(each.input_line) for each in sweeps)
        raise UserError(f"A sweep must have 1 to {MAX_RUNS} runs, got {'none' if not count else 'more'}: {inputs}.")
    return BasicSweeper.split_arguments(parsed, None)[0]


def typed_choices(arguments: Sequence[str]) -> dict[str, str]:
    """What a command line chooses, by config group: `+trainer=x.yaml` as {"trainer": "x"}. Those of a sweep have commas."""
    pairs = (argument.partition("=") for argument in arguments)
    return {name.lstrip("+"): value.replace(".yaml", "") for name, _, value in pairs}


def argument_for(key: str, arguments: Sequence[str]) -> str | None:
    """The last argument of a command line that sets a key, or something in its group."""
    for argument in reversed(arguments):
        name = argument.partition("=")[0].lstrip("+~").partition("@")[0].replace("/", ".")
        if name == key.replace("/", ".") or name.startswith(f"{key}."):
            return argument
    return None


def suggest(key: str, config: DictConfig | None = None, schema: Iterable[str] = ()) -> str | None:
    """The known key, or config group, that is nearest to an unknown one; None if nothing is near.

    The last part of the key counts most, then whether the group is the same.
    """
    given = [each for each in _keys(config, "") if each != key and not each.startswith(f"{key}.")]
    above, _, last = key.rpartition(".")

    def likeness(name: str) -> tuple[float, float]:
        group, _, end = name.replace("/", ".").rpartition(".")
        ratio = difflib.SequenceMatcher(None, last.rpartition("/")[2], end).ratio()
        ratio += 0.2 * (group == above) + 0.3 * end.startswith(f"{last}_")
        return ratio, difflib.SequenceMatcher(None, key, name).ratio()

    best = max(dict.fromkeys([*schema, *setting_types(), *given, *GROUPS]), key=likeness)
    return best if likeness(best)[0] > 0.55 else None


def _keys(node: Any, prefix: str) -> Iterator[str]:
    """The full key of every part of a configuration; nothing is resolved."""
    for key in node if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing() else ():
        yield f"{prefix}{key!s}"
        yield from _keys(node._get_node(key, validate_access=False), f"{prefix}{key!s}.")


def explain(error: BaseException, command: CommandLine) -> str:
    """Hydra's own message in one line, with the argument that it is about and the nearest known name."""
    arguments, text = command.overrides, str(error).partition("\nAvailable options")[0]
    noise = ("Config search path", "provider=", "Set the", "See https", "full_key", "object_type", "reference_type")
    lines = [line.strip() for line in text.splitlines()]
    message = " ".join(line for line in lines if line and not line.startswith(noise)).rstrip(".")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        missing = Path(str(error.missing_cfg_file).removesuffix(".yaml"))
        given = next((f" (argument {each})" for each in arguments if missing.name in each), "")
        files = [file for folder in command.config_dirs for file in sorted((folder / missing.parent).glob("*.yaml"))]
        options = sorted((file.stem for file in files), key=len)
        near = difflib.get_close_matches(missing.name.lower(), options, 1) or [o for o in options if missing.name in o]
        hint = f" Did you mean {near[0]}?" if near else f" Expected one of {', '.join(options)}." if options else ""
        return f"{message}{given}.{hint}"
    if override := getattr(error, "override", None):
        return f"The argument {override} cannot be parsed: {message}. A value with one of =,:[]{{}} or spaces needs quotes."
    if found := re.search(r"Could not (?:override|delete from config\.) '([^']*)'", text):
        argument, known = argument_for(found[1], arguments), suggest(found[1])
        sentence = f"{found[1]}{f' (argument {argument})' if argument else ''}: {message.partition(' Key ')[0]}."
        return f"{sentence} Did you mean {known}?" if known not in (None, found[1]) else sentence
    return f"{message}." if message else f"A configuration file cannot be read: {type(error).__name__}."


def check_distinct_run_dirs(configs: Sequence[DictConfig]) -> None:
    """Raise UserError for runs of a sweep in one folder: each would resume the other."""
    key = "launcher.experiment_log_dir"
    given = [OmegaConf.select(config, key, throw_on_resolution_failure=False) for config in configs]
    if None in given:
        return  # validation reports it
    folders = {str(Path(str(folder)).resolve()) for folder in given}
    if len(folders) < len(given):
        raise UserError(
            f"{key} must differ for the {len(given)} runs of a sweep, got {len(folders)} folders. Put what is swept into its "
            "name, e.g. 'launcher.experiment_log_dir=runs/lr_${lr_scale_factor}'."
        )
