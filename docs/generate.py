"""Rewrite what docs/settings.md and docs/commands.md take from the code: python docs/generate.py"""

from __future__ import annotations

import argparse
import html
import re
from pathlib import Path

import yaml

from omnivision.config.reader import described
from omnivision.config.suggestions import setting_hints
from omnivision.config.usage import parts
from omnivision.tools.main import commands, parser

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
    return re.sub(r"([\\`*_\[\]])", r"\\\1", html.escape(comment.replace(" | ", ", "), quote=False))


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
    """What `omnivision` and each of its commands do, and their arguments. (argparse's own help differs between Pythons.)"""
    made = parser()
    found = []
    for name, command in {"": made, **commands(made)}.items():
        found += [f"## omnivision {name}".rstrip(), plain(command.description or "")]
        listed = filter(is_listed, command._actions)
        rows = [f"| `{names(action)}` | {plain(help_of(command, action))} |" for action in listed]
        if rows:
            found.append("\n".join(["| argument | meaning |", "|---|---|", *rows]))
    return "\n\n".join(found)


def is_listed(action: argparse.Action) -> bool:
    return (
        not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)) and action.help != argparse.SUPPRESS
    )


def names(action: argparse.Action) -> str:
    """An argument as it is typed, with the name of its value."""
    value = (
        ""
        if action.nargs == 0
        else str(action.metavar or (action.choices and "|".join(map(str, action.choices))) or "")
    )
    value = (value or action.dest.upper()) if action.nargs != 0 else ""
    return escape(" ".join(filter(None, [", ".join(action.option_strings), value])))


def help_of(command: argparse.ArgumentParser, action: argparse.Action) -> str:
    return command._get_formatter()._expand_help(action) if action.help else ""


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
