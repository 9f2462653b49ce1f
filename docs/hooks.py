"""What of the documentation is read off the code: the table of settings, and the help of every command."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import yaml

from omnivision.cli.main import commands, parser
from omnivision.schema import described
from omnivision.suggestions import setting_hints

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "config" / "experiments" / "base.yaml"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for each page."""
    if "<!-- settings -->" in markdown:
        markdown = markdown.replace("<!-- settings -->", settings_table())
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", command_help())
    return markdown


def settings_table() -> str:
    """A row a setting: its name, what it takes, its default and its meaning, as base.yaml has them."""
    text = BASE.read_text(encoding="utf-8")
    lines, hints = text.splitlines(), setting_hints()
    rows = ["| setting | takes | default | meaning |", "|---|---|---|---|"]
    for name, node in leaves(yaml.compose(text, Loader=yaml.SafeLoader), ""):
        line = lines[node.end_mark.line] if node.start_mark.line == node.end_mark.line else lines[node.start_mark.line]
        comment = re.search(r"(?<=\s)# (.*)$", line)
        default = text[node.start_mark.index : node.end_mark.index].replace("|", "\\|")
        takes = described(hints[name]).replace("|", "\\|") if name in hints else ""
        rows.append(f"| `{name}` | {takes} | `{default}` | {plain(comment[1]) if comment else ''} |")
    return "\n".join(rows)


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


def command_help() -> str:
    """The help of `omnivision` and of each of its commands."""
    made = parser()
    found = [f"## omnivision\n\n```text\n{made.format_help()}```\n"]
    for name, command in commands(made).items():
        found.append(f"## omnivision {name}\n\n```text\n{command.format_help()}```\n")
    return "\n".join(found)
