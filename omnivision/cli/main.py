"""The `omnivision` command. Each subcommand is a file beside this one with `add_parser` and `run`."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from omnivision.cli import check_data, demo_data, export, import_weights, prepare, runs, val_split
from omnivision.errors import EXIT_USER, UserError


class Parser(argparse.ArgumentParser):
    """Wrong arguments are a mistake like any other: a paragraph, exit code 1."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER, f"error: {message}. See {self.prog} --help.\n")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="omnivision",
        description="Tools around the training of video models. Training itself: python train_app_submitit.py --help",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (demo_data, prepare, val_split, check_data, runs, import_weights, export):
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
