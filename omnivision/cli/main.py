"""The `omnivision` command. Each subcommand is a file beside this one with `add_parser` and `run`."""

from __future__ import annotations

import argparse
import sys

from omnivision.cli import check_data, demo_data, export, import_weights, prepare, runs, val_split
from omnivision.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
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
