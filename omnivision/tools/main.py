"""The `omnivision` command: the list of its subcommands, and how a subcommand ends."""

from __future__ import annotations

import os
import sys

from cyclopts import App, CycloptsError, Parameter

from omnivision.utils.errors import (
    EXIT_FAULT,
    EXIT_SIGINT,
    EXIT_USER,
    UserError,
    is_out_of_memory,
    oom_message,
)
from omnivision.utils.streams import announce, ignore_broken_pipe, output_problem

# The function of each subcommand. Its module is imported only for the command or its help, and does not import torch.
COMMANDS = {
    "demo-data": "demo_data:demo_data",
    "prepare": "prepare.command:prepare",
    "val-split": "val_split:val_split",
    "check-data": "check_data:check_data",
    "runs": "runs:runs",
    "report": "report.command:report",
    "predict": "predict:predict",
    "reconstruct": "predict:reconstruct",
    "features": "features:features",
    "probe": "probe:probe",
    "attention": "pictures:attention",
    "map": "pictures:map_features",
    "neighbors": "pictures:neighbors",
    "pca": "pictures:pca",
    "verify": "verify:verify",
    "watch": "watch:watch",
    "xray": "xray:xray",
    "import": "import_weights:import_weights",
    "export": "export:export",
}
SLOW_START = {*COMMANDS} - {"demo-data", "prepare", "val-split", "check-data", "runs"}  # they import torch
OOM_ADVICE = (
    "Free memory, use a machine or --device that has more, or reduce what the command does at once, if it has such an option "
    "(--clips, --workers)."
)

app = App(
    name="omnivision",
    help="Tools around the training of video models. Training itself: python train_app_submitit.py --help",
    help_format="plaintext",
    version_flags=(),
    default_parameter=Parameter(negative=(), allow_repeating=True),
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)
for _name, _target in COMMANDS.items():
    app.command(f"omnivision.tools.{_target}", name=_name)


def call(words: list[str]) -> int:
    """Run the command line `words` and return its exit code. Raises UserError, including for wrong arguments."""
    if words[:1] in ([], ["--help"], ["-h"]):
        for name in COMMANDS:
            app[name]  # imported, for its line in the help
    try:
        return int(app(words) or 0)
    except CycloptsError as error:
        error.verbose = False
        command = " ".join(["omnivision", *(error.command_chain or ())])
        raise UserError(f"{' '.join(str(error).split())} See {command} --help.") from None


def main(arguments: list[str] | None = None) -> int:
    """Run the command, print an error as one paragraph, and return the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    name = words[0] if words and words[0] in COMMANDS else "omnivision"
    if name in SLOW_START and not {"--help", "-h"} & set(words):
        announce(f"{name}: loading")
    ignore_broken_pipe()
    try:
        code = call(words)
        if problem := output_problem():
            raise UserError(problem)
        return code
    except KeyboardInterrupt:
        print(f"{name}: interrupted. Files are complete or absent; run the same command again.", file=sys.stderr)
        return EXIT_SIGINT
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            print(f"error: {oom_message(error, OOM_ADVICE)}", file=sys.stderr)
            return EXIT_FAULT
        if not isinstance(error, OSError) or os.environ.get("OMNIVISION_TRACEBACK") == "1":
            raise
        path = "a file" if error.filename is None else repr(str(error.filename)[:200])
        print(f"error: {path} cannot be used: {error.strerror or error}. Give another path.", file=sys.stderr)
        return EXIT_USER


if __name__ == "__main__":
    sys.exit(main())
