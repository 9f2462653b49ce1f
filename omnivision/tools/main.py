"""The `omnivision` command. Each subcommand is a file beside this one with `add_parser` and `run`."""

from __future__ import annotations

import argparse
import difflib
import importlib
import itertools
import os
import re
import sys
from typing import Any, NoReturn

from omnivision.utils.errors import (
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_USER,
    UserError,
    is_out_of_memory,
    out_of_memory,
)
from omnivision.utils.streams import announce, ignore_broken_pipe, output_problem

# The subcommands and their modules, which are imported when they are needed: most of them import torch.
MODULES = {
    "demo-data": "demo_data",
    "prepare": "prepare.command",
    "val-split": "val_split",
    "check-data": "check_data",
    "runs": "runs",
    "report": "report.command",
    "predict": "predict",
    "reconstruct": "reconstruct",
    "import": "import_weights",
    "export": "export",
}
WITHOUT_TORCH = ("demo-data", "runs")

LESS_MEMORY = (
    "Free memory, use a machine or --device that has more, or lower what the command takes at once, where it has such an "
    "option (--clips, --workers)."
)


class Parser(argparse.ArgumentParser):
    """Wrong arguments are a mistake like any other: a paragraph, exit code 1."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith("?") else "."
        self.exit(EXIT_USER, f"error: {message}{end} See {self.prog} --help.\n")


def parser(only: str | None = None) -> Parser:
    """The command with all its subcommands, or with one of them."""
    made = Parser(
        prog="omnivision",
        description="Tools around the training of video models. Training itself: python train_app_submitit.py --help",
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in MODULES if only is None else [only]:
        importlib.import_module(f"omnivision.tools.{MODULES[name]}").add_parser(commands)
    return made


def commands(made: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each subcommand."""
    return next(action.choices for action in made._actions if isinstance(action, argparse._SubParsersAction))


def refuse_leading_dashes(made: argparse.ArgumentParser, words: list[str]) -> None:
    """Explain a file name that would be read as an option: `-x.mp4` is to be `./-x.mp4`."""
    command = commands(made).get(words[0]) if words else None
    if command is None:
        return
    known = [option for action in command._actions for option in action.option_strings]
    for word in itertools.takewhile(lambda word: word != "--", words[1:]):
        name = word.partition("=")[0]
        if not word.startswith("-") or word == "-" or name in known or re.fullmatch(r"-[\d.e+-]+", word):
            continue
        # An option that does not exist looks like one: two dashes, and no file has that name.
        if not word.startswith("--") or re.search(r"[./]", name) or os.path.lexists(word):
            near = difflib.get_close_matches(f"--{name.lstrip('-')}", known, 1)
            guess = f"; did you mean {near[0]}?" if near else "."
            command.error(f"{word!r} begins with a dash and is no option{guess} For a file of that name write ./{word}")


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return run_command(words)
    except KeyboardInterrupt:
        command = words[0] if words else "omnivision"
        print(f"{command}: interrupted. Files are complete or not there; run the same command again.", file=sys.stderr)
        return EXIT_INTERRUPTED


def run_command(arguments: list[str]) -> int:
    name = arguments[0] if arguments and arguments[0] in MODULES else None
    if name is not None and name not in WITHOUT_TORCH and "--help" not in arguments:
        announce(f"{name}: loading")
    made = parser(name)
    refuse_leading_dashes(made, arguments)
    options, extra = made.parse_known_args(arguments)
    if extra:
        command = commands(made)[options.command]
        known = [option for action in command._actions for option in action.option_strings]
        near = difflib.get_close_matches(extra[0].partition("=")[0], known, 1)
        command.error(f"unrecognized arguments: {' '.join(extra)}" + (f". Did you mean {near[0]}?" if near else ""))
    ignore_broken_pipe()
    try:
        code = int(options.run(options))
        if problem := output_problem():
            raise UserError(problem)
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            print(f"error: {out_of_memory(error, LESS_MEMORY)}", file=sys.stderr)
            return EXIT_FAULT
        if not isinstance(error, OSError):
            raise
        if os.environ.get("OMNIVISION_TRACEBACK") == "1":
            raise
        what = "a file" if error.filename is None else repr(str(error.filename)[:200])
        print(f"error: {what} cannot be used: {error.strerror or error}. Give another path.", file=sys.stderr)
        return EXIT_USER


if __name__ == "__main__":
    sys.exit(main())
