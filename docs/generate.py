"""Rewrite what docs/settings.md and docs/commands.md take from the code: python docs/generate.py"""

from __future__ import annotations

import html
import inspect
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import yaml
from cyclopts import App
from cyclopts.argument import Argument

from omnivision.config.reader import described
from omnivision.config.suggestions import setting_hints
from omnivision.config.usage import parts
from omnivision.tools.main import COMMANDS, app

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "config" / "experiments" / "base.yaml"
MARK = "<!-- Everything below is written by docs/generate.py -->\n"


def pages() -> dict[Path, str]:
    """The pages with what the code says now."""
    written = {"settings.md": f"{settings_table()}\n\n{parts_tables()}", "commands.md": command_tables()}
    texts = {ROOT / "docs" / name: text for name, text in written.items()}
    return {
        file: f"{file.read_text(encoding='utf-8').partition(MARK)[0]}{MARK}\n{text}\n" for file, text in texts.items()
    }


def settings_table() -> str:
    """A row a setting: its name, what it takes, its default and its meaning, as base.yaml has them."""
    text = BASE.read_text(encoding="utf-8")
    lines, hints = text.splitlines(), setting_hints()
    rows = ["| setting | takes | default | meaning |", "|---|---|---|---|"]
    for name, node in leaves(yaml.compose(text, Loader=yaml.SafeLoader), ""):
        line = lines[node.end_mark.line] if node.start_mark.line == node.end_mark.line else lines[node.start_mark.line]
        comment = re.search(r"(?<=\s)# (.*)$", line)
        default = escape(text[node.start_mark.index : node.end_mark.index])
        takes = escape(described(hints[name])) if name in hints else ""
        rows.append(f"| `{name}` | {takes} | `{default}` | {plain(comment[1]) if comment else ''} |")
    return "\n".join(rows)


def escape(cell: str) -> str:
    """Escape the bars of a table's cell."""
    return cell.replace("|", "\\|")


def plain(comment: str) -> str:
    """Text that is no markup, in a cell of a table."""
    return re.sub(r"([\\`*_\[\]])", r"\\\1", html.escape(" ".join(comment.split()).replace(" | ", ", "), quote=False))


def leaves(node: yaml.Node, name: str) -> list[tuple[str, yaml.Node]]:
    """Settings that are no groups, with their full names."""
    if not isinstance(node, yaml.MappingNode) or not node.value:
        return [(name, node)]
    return [
        leaf
        for key, value in node.value
        if (full := f"{name}.{key.value}" if name else key.value) != "defaults"
        for leaf in leaves(value, full)
    ]


def parts_tables() -> str:
    """A table for each object that config files describe."""
    found = [
        "## Objects",
        "Objects are built from their `_target_`. Values are those of the choice in brackets; `--cfg job` prints a run's own.",
    ]
    for part in parts(ROOT / "config"):
        rows = [
            f"| `{name}` | `{escape(kind.replace(' | None', ' or null'))}` | `{escape(value)}` | {plain(meaning)} |"
            for name, kind, value, meaning in part.settings
        ]
        found.append(f"### {part.name}: `{part.target}` (`{part.choice}`)")
        found.append("\n".join(["| setting | type | value | meaning |", "|---|---|---|---|", *rows]))
    return "\n\n".join(found)


def command_tables() -> str:
    """What `omnivision` and each of its commands do, and their arguments."""
    found = ["## omnivision", plain(app.help)]
    for name in COMMANDS:
        command = app[name]
        found += [f"## omnivision {name}", plain(described_command(command))]
        rows = [f"| `{escape(names(each))}` | {plain(meaning(each))} |" for each in arguments(command)]
        found.append("\n".join(["| argument | meaning |", "|---|---|", *rows]))
    return "\n\n".join(found)


def arguments(command: App) -> list[Argument]:
    return [each for each in command.assemble_argument_collection(parse_docstring=True) if each.names != ("*",)]


def described_command(command: App) -> str:
    """The description of a command: the docstring of its function without its arguments."""
    text = inspect.getdoc(command.default_command) or ""
    return " ".join(text.partition("\nArgs:")[0].split())


def names(argument: Argument) -> str:
    """An argument as it is typed, with the name of its value."""
    options = [name for name in argument.names if name.startswith("-")]
    if not options:
        several = "..." if get_origin(argument.hint) is list else ""
        return argument.names[0].upper().replace(".NPY", ".npy").replace(".PT", ".pt") + several
    choices = [
        str(each)
        for hint in (argument.hint, *get_args(argument.hint))
        if get_origin(hint) is Literal
        for each in get_args(hint)
    ]
    flag = argument.hint is bool
    value = "" if flag else argument.parameter.metavar or "|".join(choices) or options[0].lstrip("-").upper()
    return f"{options[0]} {value}".strip()


def meaning(argument: Argument) -> str:
    """The help of an argument, and its default."""
    default = argument.field_info.default
    shown = "" if default in (None, "", inspect.Parameter.empty) or default is False else f" (default {default})"
    return (argument.parameter.help or "").removesuffix(".") + shown + ("." if argument.parameter.help else "")


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
