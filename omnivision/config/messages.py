"""Messages about invalid settings, one sentence each, and the known name nearest to an unknown one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from pydantic import ValidationError

from omnivision.config.schema import GROUPS, setting_hints

MUST_BE_SET = "must be set."
UNKNOWN = "is not a setting"
PACKAGE_HINT = (
    ". Files that +site=NAME or +experiments=NAME selects begin with '# @package _global_' and are in --config-dir."
)


def suggest(key: str, known: Iterable[str] | None = None) -> str:
    """Return the end of a sentence about an unknown key, with the nearest known one (default: any setting or config group)."""
    names = list(setting_hints().keys() | GROUPS) if known is None else list(known)
    last_parts = {
        name: re.split("[./]", name)[-1].lower() for name in names
    }  # whole names are alike if only their groups are
    last = difflib.get_close_matches(re.split("[./]", key)[-1].lower(), set(last_parts.values()), 1)
    near = difflib.get_close_matches(key.lower(), [name for name in names if last_parts[name] in last], 1, cutoff=0)
    return f"; did you mean {near[0]}?" if near and key not in names else "."


def prefix_settings(sources: Iterable[str]) -> str:
    """Return the settings of the folders of some datasets, for a message."""
    return " and ".join(f"datasets.{source}.prefix" for source in sorted({*sources}))


def key_of(location: Sequence[int | str]) -> str:
    """Return the key of a setting from pydantic's location, without the names of a union's members."""
    parts = [part for part in location if part not in ("str", "list[str]", "[key]")]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def format_errors(error: ValidationError, prefix: str = "", known: Iterable[str] | None = None) -> dict[str, str]:
    """Return what each invalid setting must be and what it is, in pydantic's words; for an unknown one, the nearest `known`."""
    problems: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        key = f"{prefix}{key_of(detail['loc'])}"
        kind = detail["type"]
        value = detail["input"]
        wanted = re.sub("^.*?(should|must) | after validation.*| or instance of.*", "", detail["msg"])
        text = f"must {wanted}" + ("." if isinstance(value, dict) else f", got {value!r:.200}.")
        if kind == "extra_forbidden":
            text = f"{UNKNOWN}{PACKAGE_HINT if key in ('site', 'experiments') else suggest(key, known)}"
        elif kind == "missing":
            text = MUST_BE_SET
        problems.setdefault(key, text)
    return problems
