"""The `omnivision` command: the list of its subcommands, and how a subcommand ends."""

from __future__ import annotations

import difflib
import itertools
import os
import re
import sys

from cyclopts import App, CycloptsError, Parameter

from omnivision.utils.errors import (
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_USER,
    UserError,
    is_out_of_memory,
    out_of_memory,
)
from omnivision.utils.streams import announce, ignore_broken_pipe, output_problem

# The function of each subcommand. Its module is imported when the command is used or explained, and imports torch only when
# the command runs: help is quick.
COMMANDS = {
    "demo-data": "demo_data:demo_data",
    "prepare": "datasets:prepare",
    "val-split": "datasets:val_split",
    "check-data": "datasets:check_data",
    "runs": "runs:runs",
    "report": "report:report",
    "predict": "predict:predict",
    "reconstruct": "reconstruct:reconstruct",
    "import": "weights:import_weights",
    "export": "weights:export",
}
WITHOUT_TORCH = ("demo-data", "runs")

LESS_MEMORY = (
    "Free memory, use a machine or --device that has more, or lower what the command takes at once, where it has such an "
    "option (--clips, --workers)."
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
)
for _name, _target in COMMANDS.items():
    app.command(f"omnivision.tools.{_target}", name=_name)


def call(words: list[str]) -> int:
    """Run the command that `words` spell and return its exit code. Raises UserError, also for wrong arguments."""
    if words[:1] in ([], ["--help"], ["-h"]):
        for name in COMMANDS:
            app[name]  # imported, for its line in the help
    try:
        return int(app(words) or 0)
    except CycloptsError as error:
        error.verbose = False
        message = " ".join(str(error).split())
        command = " ".join(["omnivision", *(error.command_chain or ())])
        message += "" if message.endswith((".", "?")) else "."
        raise UserError(f"{message}{_explain_dash(words)} See {command} --help.") from None


def _explain_dash(words: list[str]) -> str:
    """Explain a file name that reads like an option: `-x.mp4` must be written `./-x.mp4`."""
    known = _options(words[0]) if words and words[0] in COMMANDS else []
    for word in itertools.takewhile(lambda word: word != "--", words[1:]):
        name = word.partition("=")[0]
        is_option = not word.startswith("-") or word == "-" or name in known or re.fullmatch(r"-[\d.e+-]+", word)
        # A word with two dashes is a misspelt option, unless it looks like a file or is one.
        if is_option or (word.startswith("--") and not re.search(r"[./]", name) and not os.path.lexists(word)):
            continue
        near = difflib.get_close_matches(f"--{name.lstrip('-')}", known, 1)
        guess = f" Did you mean {near[0]}?" if near else ""
        return f" {word} begins with a dash.{guess} For a file of that name write ./{word}."
    return ""


def _options(command: str) -> list[str]:
    return [name for argument in app[command].assemble_argument_collection() for name in argument.names]


def main(arguments: list[str] | None = None) -> int:
    """Run the command, print its error in a paragraph, and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    name = words[0] if words and words[0] in COMMANDS else "omnivision"
    if name in COMMANDS and name not in WITHOUT_TORCH and not {"--help", "-h"} & set(words):
        announce(f"{name}: loading")
    ignore_broken_pipe()
    try:
        code = call(words)
        if problem := output_problem():
            raise UserError(problem)
        return code
    except KeyboardInterrupt:
        print(f"{name}: interrupted. Files are complete or absent; run the same command again.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (MemoryError, RuntimeError, OSError) as error:
        return _explain_system_error(error)


def _explain_system_error(error: MemoryError | RuntimeError | OSError) -> int:
    """Print an error that the system raised, and return the exit code; raise it again if it is our bug."""
    if is_out_of_memory(error):
        print(f"error: {out_of_memory(error, LESS_MEMORY)}", file=sys.stderr)
        return EXIT_FAULT
    if not isinstance(error, OSError) or os.environ.get("OMNIVISION_TRACEBACK") == "1":
        raise error
    what = "a file" if error.filename is None else repr(str(error.filename)[:200])
    print(f"error: {what} cannot be used: {error.strerror or error}. Give another path.", file=sys.stderr)
    return EXIT_USER


if __name__ == "__main__":
    sys.exit(main())
