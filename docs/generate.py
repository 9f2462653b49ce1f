"""Rewrite the generated parts of pages, from the code and docs/demo_results.json: python docs/generate.py"""

from __future__ import annotations

import functools
import html
import inspect
import json
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Required, Union, get_args, get_origin, get_type_hints

import yaml
from typing_extensions import is_typeddict

from omnivision.config.instantiate import INJECTED_ARGS, load_target, signature_of
from omnivision.config.schema import setting_hints
from omnivision.tools.main import app
from omnivision_demo import report

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "config" / "experiments" / "base.yaml"
PARTS = ("trainer/model", "trainer/data", "trainer/task", "trainer/optim")
# Arguments that are no settings: other settings give them.
GIVEN = (*INJECTED_ARGS, "params", "lr", "weight_decay")
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
MARK = "<!-- Everything below is written by docs/generate.py -->\n"
RESULTS = r"(<!-- docs/generate.py: results of {} -->\n).*?(<!-- end -->)"


@dataclass(frozen=True)
class Part:
    """An object that config files describe; `settings` are rows of name, type, value and meaning."""

    name: str
    target: str
    choice: str
    settings: list[tuple[str, str, str, str]]


def pages() -> dict[Path, str]:
    """Return the text of each page, with its generated part."""
    written = {"settings.md": f"{settings_table()}\n\n{parts_tables()}", "commands.md": commands()}
    texts = {ROOT / "docs" / name: text for name, text in written.items()}
    generated = {
        file: f"{file.read_text(encoding='utf-8').partition(MARK)[0]}{MARK}\n{text}\n" for file, text in texts.items()
    }
    results = json.loads((ROOT / "docs" / "demo_results.json").read_text(encoding="utf-8"))
    names = "demo", "hour", "mocap", "stage1"
    tables = {name: report.format_table([report.Result(**row) for row in results[name]]) for name in names}
    tables |= {"probes": report.format_probes(results["probes"]), "xrays": report.format_xrays(results["xrays"])}
    for file in (ROOT / "README.md", ROOT / "docs" / "demo.md", ROOT / "docs" / "representations.md"):
        text = file.read_text(encoding="utf-8")
        for name, rows in tables.items():
            text = re.sub(RESULTS.format(name), rf"\1{rows}\n\2", text, flags=re.DOTALL)
        generated[file] = text
    return generated


def commands() -> str:
    """Describe `omnivision` and each of its commands."""
    start, _, rest = app.generate_docs(heading_level=2).strip().partition("## Table of Contents\n")
    return f"{start}**Commands**{rest.partition('**Commands**')[2]}"  # the list of commands has the same links


def settings_table() -> str:
    """Return a row for each setting: its name, type, default and meaning, as base.yaml has them."""
    text = BASE.read_text(encoding="utf-8")
    lines, hints = text.splitlines(), setting_hints()
    rows = ["| setting | takes | default | meaning |", "|---|---|---|---|"]
    for name, node in leaves(yaml.compose(text, Loader=yaml.SafeLoader), ""):
        line = lines[node.end_mark.line] if node.start_mark.line == node.end_mark.line else lines[node.start_mark.line]
        comment = re.search(r"(?<=\s)# (.*)$", line)
        default = escape(text[node.start_mark.index : node.end_mark.index])
        takes = escape(describe_type(hints[name]) if name in hints else "")
        rows.append(f"| `{name}` | {takes} | `{default}` | {plain(comment[1]) if comment else ''} |")
    return "\n".join(rows)


def describe_type(hint: Any) -> str:
    """Put a type annotation into words, e.g. "int >= 1 or null"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Required:
        return describe_type(arguments[0])
    if origin is Annotated and arguments[0] == dict[str, Any]:
        return "an object (_target_ and its arguments)"
    if origin is Annotated:
        limits = [f"{sign} {value:.10g}" for note in arguments[1:] for bound in getattr(note, "metadata", ())
                  for name, sign in BOUNDS.items() if (value := getattr(bound, name, 1e9)) < 1e9]  # fmt: skip
        return " ".join([describe_type(arguments[0]), " and ".join(limits)]).strip()
    if origin in (Union, types.UnionType):
        return " or ".join("null" if each is type(None) else describe_type(each) for each in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return f"{len(arguments)} x {describe_type(arguments[0])}"
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    names = {int: "int", float: "float", str: "text", bool: "true or false"}
    return names.get(hint) or {list: "list", tuple: "list", Sequence: "list", dict: "mapping"}.get(
        origin or hint, "group of settings"
    )


def escape(cell: str) -> str:
    """Escape the bars of a table's cell."""
    return cell.replace("|", "\\|")


def plain(comment: str) -> str:
    """Escape markup in a table's cell."""
    return re.sub(r"([\\`*_\[\]])", r"\\\1", html.escape(" ".join(comment.split()).replace(" | ", ", "), quote=False))


def leaves(node: yaml.Node, name: str) -> list[tuple[str, yaml.Node]]:
    """Return the settings below a node that are not groups, with their full names."""
    if not isinstance(node, yaml.MappingNode) or not node.value:
        return [(name, node)]
    return [
        leaf
        for key, value in node.value
        if (full := f"{name}.{key.value}" if name else key.value) != "defaults"
        for leaf in leaves(value, full)
    ]


def parts_tables() -> str:
    """Return a table for each object that config files describe."""
    found = [
        "## Objects",
        "Objects are built from their `_target_`. Values are those of the choice in brackets; `--cfg job` prints a run's own.",
    ]
    for part in parts(ROOT / "config"):
        rows = [
            f"| `{name}` | {escape(kind)} | `{escape(value)}` | {plain(meaning)} |"
            for name, kind, value, meaning in part.settings
        ]
        found.append(f"### {part.name}: `{part.target}` (`{part.choice}`)")
        found.append("\n".join(["| setting | takes | value | meaning |", "|---|---|---|---|", *rows]))
    return "\n\n".join(found)


def parts(config: Path) -> list[Part]:
    """Return every object of the config files, each class once in each place, with all its arguments."""
    found: dict[tuple[str, str], Part] = {}
    for group in PARTS:
        for file in sorted(
            (config / group).glob("*.yaml"), key=lambda file: ("demo" in file.stem, "base" not in file.stem, file.name)
        ):
            for name, node in _objects(_load(file), group.replace("/", ".")):
                key = name, node["_target_"]
                if key not in found:
                    found[key] = Part(*key, f"{group}={file.stem}", _settings(name, node))
    return sorted(found.values(), key=lambda part: part.name)


def _settings(name: str, node: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    target = node["_target_"]
    own = target.startswith("omnivision.")  # other signatures differ between versions of their packages
    signature, meanings = signature_of(target) if own else {}, argument_meanings(target) if own else {}
    made_by = load_target(target)
    hints = (
        get_type_hints(made_by.__init__ if inspect.isclass(made_by) else made_by, include_extras=True) if own else {}
    )
    rows = []
    for key in [each for each in {**signature, **node} if each not in (*GIVEN, "_target_")]:
        value = node[key] if key in node else None
        if isinstance(value, dict) and "_target_" not in value:
            inner = get_type_hints(hints[key], include_extras=True) if is_typeddict(hints.get(key)) else {}
            rows += [
                (f"{name}.{key}.{k}", describe_type(inner.get(k, type(v))), _as_yaml(str(v)), "")
                for k, v in value.items()
            ]
        elif not isinstance(value, dict):
            kind = describe_type(hints.get(key, type(value)))
            text = _as_yaml(str(value if key in node else signature[key].default))
            rows.append((f"{name}.{key}", kind, text, meanings.get(key, "").removesuffix(".")))
    return rows


def _as_yaml(text: str) -> str:
    """Write a Python value as configurations do."""
    known = {"None": "null", "True": "true", "False": "false"}
    return f"[{text[1:-1]}]" if text.startswith("(") else known.get(text, text)


def _objects(node: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every mapping with `_target_` in a configuration, with its full name."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield name, node
        for key, value in node.items():
            yield from _objects(value, f"{name}.{key}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _objects(value, f"{name}.{number}")


@functools.cache
def _load(file: Path) -> dict[str, Any]:
    """Read a config file, on top of the files of its own group that its defaults name."""
    own = yaml.safe_load(file.read_text(encoding="utf-8"))
    merged: dict[str, Any] = {}
    for entry in own.pop("defaults", []):
        if entry != "_self_":
            merged = _merge(merged, _load(file.parent / f"{entry.partition('@')[0]}.yaml"))
    return _merge(merged, own)


def _merge(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _merge(below.get(key), value) for key, value in above.items()}


def argument_meanings(target: str) -> dict[str, str]:
    """Read the meanings of the arguments in the docstring of one of our classes, by name."""
    block = (inspect.getdoc(load_target(target)) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    entries = re.split(r"^    (?=\w)", block, flags=re.MULTILINE)[1:]
    pairs = (" ".join(entry.split()).partition(": ") for entry in entries)
    return {each: meaning for names, _, meaning in pairs for each in names.split(", ")}


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
