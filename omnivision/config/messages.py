"""What pydantic finds wrong with settings, in one sentence each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from omegaconf import DictConfig
from pydantic import BaseModel, ValidationError

from omnivision.config.compose import suggest
from omnivision.config.schema import setting_types

# What pydantic's types of errors expect, and its bounds.
EXPECTED = {
    "int_type": "an int",
    "int_from_float": "an int",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list, as in [a, b]",
    "dict_type": "a group of settings",
    "model_type": "a group of settings",
}
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def key_of(location: Sequence[int | str]) -> str:
    """The key of a setting from pydantic's location, without the names of a union's members."""
    parts = [part for part in location if part not in ("str", "list[str]", "[key]")]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def format_errors(
    error: ValidationError, schema: type[BaseModel], prefix: str = "", config: DictConfig | None = None
) -> list[str]:
    """One sentence for each invalid setting: key, what it must be, what it is, the nearest known."""
    sentences: dict[str, str] = {}
    for each in error.errors(include_url=False):
        key, context, value = f"{prefix}{key_of(each['loc'])}", each.get("ctx", {}), each["input"]
        if key in sentences or each["type"] == "missing":
            continue
        if each["type"] == "extra_forbidden":
            sentences[key] = _unknown(key, config, setting_types(schema, prefix))
            continue
        signs = [f"{BOUNDS[name]} {bound:.10g}" for name, bound in context.items() if name in BOUNDS]
        wanted = EXPECTED.get(each["type"]) or " and ".join(signs) or re.sub("^.*?(should|must) be ", "", each["msg"])
        guess = ""
        if each["type"] == "literal_error":
            known = re.findall(r"'([^']*)'", context["expected"])
            near = difflib.get_close_matches(str(value).lower(), known, 1)
            guess = f" Did you mean {near[0]}?" if near else ""
        sentences[key] = f"{key} must be {wanted}, got {shorten(value)}.{guess}"
    return list(sentences.values())


def shorten(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _unknown(key: str, config: DictConfig | None, known: Iterable[str]) -> str:
    if re.fullmatch(r"site|experiments|_.+_", key):
        return (
            f"{key} is not a setting. A file of settings that +site=NAME or +experiments=NAME chooses must begin with the line "
            "'# @package _global_', and the folder that holds site/ is given with --config-dir."
        )
    above = key.rpartition(".")[0]
    near = suggest(key, config, known)
    beside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == above]
    rest = f"; did you mean {near}?" if near else f"; {above or 'the top level'} has {', '.join(sorted(beside))}."
    return f"{key} is not a setting{rest}"
