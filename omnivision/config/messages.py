"""Invalid settings in one sentence each, and the known name that is nearest to an unknown one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from pydantic import ValidationError

from omnivision.config.schema import BOUNDS, GROUPS, setting_hints

MUST_BE_SET = "must be set."
EXPECTED = {  # by pydantic's type of the error; other errors have bounds, or words of pydantic's own
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
PACKAGE_HINT = (
    ". A file that +site=NAME or +experiments=NAME chooses is in the folder of --config-dir, and begins with the line "
    "'# @package _global_'."
)


def suggest(key: str, known: Iterable[str] | None = None) -> str:
    """Return the end of a sentence about an unknown key: the known key (by default any setting or config group) nearest to it.

    The last part of the key counts most, then whether the group is the same.
    """
    group, _, last = key.replace("/", ".").rpartition(".")

    def likeness(name: str) -> tuple[float, float]:
        above, _, end = name.replace("/", ".").rpartition(".")
        ratio = difflib.SequenceMatcher(None, last.lower(), end).ratio() + 0.2 * (above == group)
        return ratio, difflib.SequenceMatcher(None, key, name).ratio()

    best = max((setting_hints().keys() | GROUPS) if known is None else known, key=likeness, default="")
    return f"; did you mean {best}?" if best and best != key and likeness(best)[0] > 0.55 else "."


def key_of(location: Sequence[int | str]) -> str:
    """Return the key of a setting from pydantic's location, without the names of a union's members."""
    parts = [part for part in location if part not in ("str", "list[str]", "[key]")]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def format_errors(error: ValidationError, prefix: str = "", known: Iterable[str] | None = None) -> dict[str, str]:
    """For each invalid setting, by key: what it must be and what it is; for an unknown one the nearest `known`."""
    problems: dict[str, str] = {}
    for each in error.errors(include_url=False):
        key, context, kind = f"{prefix}{key_of(each['loc'])}", each.get("ctx", {}), each["type"]
        bounds = [f"{BOUNDS[name]} {bound:.10g}" for name, bound in context.items() if name in BOUNDS]
        wanted = EXPECTED.get(kind) or " and ".join(bounds) or re.sub("^.*?(should|must) ", "", each["msg"])
        value = "null" if each["input"] is None else repr(each["input"])
        text = f"must {'' if wanted.startswith(('be ', 'match ', 'have ', 'not ')) else 'be '}{wanted}"
        if kind == "extra_forbidden":
            text = f"is not a setting{PACKAGE_HINT if key in ('site', 'experiments') else suggest(key, known)}"
        elif kind == "missing":
            text = MUST_BE_SET
        elif kind == "literal_error":
            names = re.findall(r"'([^']*)'", context["expected"])
            text += f", got {value}{suggest(str(each['input']), names)}"
        elif not isinstance(each["input"], dict) or not isinstance(context.get("error"), ValueError):
            text += f", got {value if len(value) <= 200 else f'{value[:200]}...'}."
        problems.setdefault(key, text)
    return problems
