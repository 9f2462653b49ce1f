"""Keeps Hydra to composing: files come from others, and composing them must run and write nothing."""

from __future__ import annotations

import re
import sys
from typing import Any

from hydra._internal.callbacks import Callbacks
from omegaconf import DictConfig, OmegaConf

from omnivision.utils.errors import UserError

# What Hydra does beside composing, and what files may not change of it.
OF_HYDRA = {
    "run.dir": ".",
    "output_subdir": None,
    "sweep.subdir": "${hydra.job.num}",
    "job.chdir": False,
    "job.env_set": {},
    "launcher": {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"},
    "sweeper._target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
}
MOST_RUNS = 10_000  # of a sweep


def keep_hydra_to_composing() -> None:
    """Take from Hydra what runs or writes what a file says: callbacks, handlers of logs, pickled runs, folders, environment."""
    Callbacks.__init__ = no_callbacks  # type: ignore[method-assign, assignment]
    sys.modules["hydra.main"]._get_rerun_conf = no_rerun  # type: ignore[attr-defined]
    for module in ("hydra.core.utils", "hydra._internal.hydra"):
        sys.modules[module].configure_log = _nothing  # type: ignore[attr-defined]


def _nothing(*_: object) -> None: ...


def no_callbacks(callbacks: Callbacks, config: DictConfig | None = None) -> None:
    """In place of Hydra's: it would build what a configuration names under hydra.callbacks, and that may come from others.

    Raises UserError for that, and for what Hydra would do before a run that no command line asked for.
    """
    callbacks.callbacks = []
    if config is None:
        return
    if OmegaConf.select(config, "hydra.callbacks"):
        raise UserError("hydra.callbacks would run what a configuration names, whoever wrote it. Take it out.")
    said: Any = OmegaConf.to_container(config.hydra, resolve=False)
    typed = [argument.lstrip("+") for argument in said["overrides"]["hydra"]]
    for name, expected in OF_HYDRA.items():
        value = said
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value != expected and not any(each.startswith(f"hydra.{name.partition('.')[0]}") for each in typed):
            raise UserError(
                f"hydra.{name} is {str(value)[:100]!r} in a file; expected {expected!r}: the folder of a run is "
                "launcher.experiment_log_dir, and files make no others. Take it out."
            )


def no_rerun(*_: object) -> None:
    """In place of Hydra's --experimental-rerun, which unpickles a file, and so runs what the file says."""
    raise UserError("--experimental-rerun would run what a pickled file says. Give the command of that run again.")


def check_sweep(arguments: list[str]) -> None:
    """Raise UserError for a range that stands for more runs than anybody means: Hydra writes them all out first."""
    for word in arguments:
        if (runs := _length_of_range(word)) > MOST_RUNS:
            raise UserError(f"{word} means {runs:.0f} runs; expected at most {MOST_RUNS}. Change it.")


def _length_of_range(word: str) -> float:
    """How many values KEY=range(START,STOP,STEP) stands for; 0 for what Hydra will refuse, and for other words."""
    found = re.search(r"=range\(([^()]*)\)", word)
    try:
        numbers = [float(each) for each in found[1].split(",")] if found else [0.0]
    except ValueError:
        return 0
    if len(numbers) == 1:
        return numbers[0]
    return (numbers[1] - numbers[0]) / ((numbers[2] if len(numbers) > 2 else 0) or 1)
