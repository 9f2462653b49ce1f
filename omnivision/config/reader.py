"""Compare a composed configuration with dataclasses: unknown keys, wrong types, values out of range, what is missing.

`Reader` collects every problem before anybody gives up, each as one sentence that names the key. The dataclasses
themselves are in `settings.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from omnivision.config.targets import target_problems


@dataclass(frozen=True)
class Range:
    """Bounds of a number, for `Annotated` fields: at least, at most, greater than, below. A text beside it is advice."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.above is not None:
            parts.append(f"greater than {self.above:.10g}")
        if self.low is not None:
            parts.append(f"at least {self.low:.10g}")
        if self.high is not None:
            parts.append(f"at most {self.high:.10g}")
        if self.below is not None:
            parts.append(f"below {self.below:.10g}")
        return " and ".join(parts)

    def holds(self, value: float) -> bool:
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.above is None or value > self.above)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
        )


Count = Annotated[int, Range(low=0, high=10**12)]  # beyond that sums would overflow
Natural = Annotated[int, Range(low=1, high=10**12)]
Positive = Annotated[float, Range(above=0)]


class Target(dict[str, Any]):
    """An object to build: `_target_` and its arguments. Not a type to instantiate; it marks fields of a schema."""


NAMES: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_ABSENT = object()
MEANT = {"gpu": "cuda"}  # what letters do not tell


class Reader:
    """Reads a configuration into dataclasses, gathering `problems` and what is `missing`."""

    def __init__(
        self,
        root: DictConfig,
        groups: tuple[str, ...] = (),
        suggestion: Callable[[str, DictConfig], str | None] = lambda key, root: None,
    ) -> None:
        """`groups` are names that are no settings, but may have been meant by an unknown key at the top; `suggestion` gives the
        end of a sentence about an unknown key that nothing beside it is like.
        """
        self.root, self.groups, self.suggestion = root, groups, suggestion
        trusted = OmegaConf.select(root, "trainer.trust_targets", throw_on_resolution_failure=False)
        given = list(trusted) if isinstance(trusted, ListConfig) else []
        self.trusted = [package for package in given if isinstance(package, str) and package]
        self.problems: list[str] = []
        self.missing: list[str] = []
        # What is wrong with a setting that only repeats another one (`${...}`), which is reported itself.
        self.echoes: list[str] = []

    def dataclass(self, cls: type, node: Any, where: str) -> Any:
        """An instance of `cls` from a mapping; None if anything in it was wrong."""
        if not isinstance(node, DictConfig):
            return self._wrong(where, node, "a group of settings")
        hints = get_type_hints(cls, include_extras=True)
        before = len(self.problems) + len(self.missing)
        for key in node:
            if key not in hints:
                self.problems.append(self._unknown(str(key), hints, where, node))
        values = {}
        for field in dataclasses.fields(cls):
            value = self._field(hints[field.name], node, field, f"{where}.{field.name}" if where else field.name)
            if value is not _ABSENT:
                values[field.name] = value
        return cls(**values) if len(self.problems) + len(self.missing) == before else None

    def _unknown(self, key: str, hints: Mapping[str, Any], where: str, node: DictConfig) -> str:
        full = f"{where}.{key}" if where else key
        if not where and "." in key:
            above, _, last = key.rpartition(".")
            return f"'{key}' has a dot, and levels of a file are indented. Write {above}: {{{last}: ...}}."
        beside = difflib.get_close_matches(key, hints, 1)
        if "/" not in key and not beside and (rest := self.suggestion(full, self.root)):
            return f"{full} is not a setting{rest}"
        return unknown_key(key, hints, where, node, () if where else self.groups)

    def _field(self, hint: Any, node: DictConfig, field: dataclasses.Field, where: str) -> Any:
        if field.name not in node:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                self.missing.append(where)
            return _ABSENT
        return self._item(hint, node, field.name, where)

    def _item(self, hint: Any, node: DictConfig | ListConfig, key: Any, where: str) -> Any:
        """One value of a container: resolved, then checked against its type."""
        if OmegaConf.is_missing(node, key):
            self.missing.append(where)
            return None
        try:
            value = node[key]
        except InterpolationToMissingValueError:
            return None  # what it points to is reported as missing itself
        except OmegaConfBaseException as error:
            # A value where `${...}` leads through a group is wrong itself, and told as that.
            echo = "is not a container" in str(error) or self._repeats_a_setting(node, key)
            problems = self.echoes if echo else self.problems
            said = str(error).splitlines()[0]
            problems.append(f"{where} cannot be resolved: {said}.{self._near_interpolation(said)}")
            return None
        before = len(self.problems)
        checked = self.value(hint, value, where)
        if OmegaConf.is_interpolation(node, key):
            self.echoes += self.problems[before:]
            del self.problems[before:]
        return checked

    def _near_interpolation(self, said: str) -> str:
        """The nearest name to that of an interpolation that leads nowhere, as a sentence with a space before."""
        name = re.search(r"Interpolation key '([\w.]+)' not found", said)
        node: Any = self.root
        *above, last = name[1].split(".") if name else [""]
        for part in above:
            node = node._get_node(part, validate_access=False) if isinstance(node, DictConfig) else None
        near = difflib.get_close_matches(last, map(str, node), 1) if isinstance(node, DictConfig) else []
        return f" Did you mean ${{{'.'.join([*above, *near])}}}?" if near else ""

    def _repeats_a_setting(self, node: DictConfig | ListConfig, key: Any) -> bool:
        """Whether an item is made of settings, `${name}`, that are all there, and reported themselves."""
        raw = OmegaConf.to_container(node, resolve=False)[key]  # type: ignore[index]
        names = re.findall(r"\$\{([\w.]+)\}", raw) if isinstance(raw, str) else []
        return bool(names) and all(self._is_there(name) for name in names)

    def _is_there(self, name: str) -> bool:
        there: Any = self.root
        for part in name.split("."):
            there = there._get_node(part, validate_access=False) if isinstance(there, DictConfig) else None
        return there is not None

    def value(self, hint: Any, value: Any, where: str) -> Any:
        """A value checked against a type: a plain Python object; None after a problem."""
        origin, arguments = get_origin(hint), get_args(hint)
        if origin is Annotated:
            return self._annotated(arguments, value, where)
        if origin in (Union, types.UnionType):
            return self._union(arguments, value, where)
        if origin is Literal:
            if value in arguments and not isinstance(value, bool):
                return value
            names: list[str] = [str(argument) for argument in arguments]
            near = (
                [MEANT[str(value)]]
                if MEANT.get(str(value)) in names
                else difflib.get_close_matches(str(value).lower(), names, 1)
            )
            hint_text = f"; did you mean {near[0]}?" if near else ""
            return self._wrong(where, value, f"one of {', '.join(names)}{hint_text}")
        if hint is Any:
            return value
        if hint is Target:
            return self._target(value, where)
        if dataclasses.is_dataclass(hint):
            return self.dataclass(typing.cast(type, hint), value, where)
        if origin in (list, tuple):
            return self._list(arguments, value, where, fixed=origin is tuple)
        if origin is dict:
            if not isinstance(value, DictConfig):
                return self._wrong(where, value, "a mapping of names to values")
            return {str(key): self._item(arguments[1], value, key, f"{where}.{key!s}") for key in value}
        return self._scalar(hint, value, where)

    def _scalar(self, hint: type, value: Any, where: str) -> Any:
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                return self._wrong(where, value, "a number that a computer holds")
        if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
            return value
        advice = ""
        if hint in (int, float) and isinstance(value, str) and re.fullmatch(r"0|[1-9][0-9]*", value):
            advice = " (in quotes it is a text; leave them out)"
        elif hint in (int, float) and isinstance(value, str) and looks_like_yaml_number(value):
            advice = " (YAML reads such a number in base 8 or 60; write it in plain decimal)"
        elif hint is int and isinstance(value, float) and value.is_integer() and abs(value) < 1e12:
            advice = f" (write {value:.0f})"
        if hint is str and isinstance(value, (bool, int, float)):
            advice = " (in quotes it is one; on the command line in two kinds of them, the outer ones for the shell)"
        return self._wrong(where, value, NAMES[hint] + advice)

    def _annotated(self, arguments: tuple, value: Any, where: str) -> Any:
        hint, *notes = arguments
        known = len(self.problems)
        value = self.value(hint, value, where)
        for note in notes:
            if isinstance(note, Range) and len(self.problems) == known and value is not None and not note.holds(value):
                advice = " ".join(text for text in notes if isinstance(text, str))
                finite = "a number" if isinstance(value, int) or math.isfinite(value) else "a finite number"
                return self._wrong(where, value, f"{finite} {note}", advice)
        return value

    def _union(self, arguments: tuple, value: Any, where: str) -> Any:
        if value is None and type(None) in arguments:
            return None
        choices = [argument for argument in arguments if argument is not type(None)]
        if len(choices) > 1:  # a text or a list of texts
            wants_list = isinstance(value, ListConfig)
            choices = [c for c in choices if (get_origin(c) is list) == wants_list] or choices
        return self.value(choices[0], value, where)

    def _list(self, arguments: tuple, value: Any, where: str, fixed: bool) -> Any:
        if not isinstance(value, ListConfig):
            return self._wrong(where, value, "a list, as in [a, b]")
        if fixed and len(value) != len(arguments):
            return self._wrong(where, list(value), f"a list of {len(arguments)}")
        hints = arguments if fixed else arguments * len(value)
        items = [self._item(hint, value, i, f"{where}[{i}]") for i, hint in enumerate(hints)]
        return tuple(items) if fixed else items

    def _target(self, value: Any, where: str) -> Any:
        before = len(self.problems) + len(self.missing)
        plain = self._plain(value, where)
        if len(self.problems) + len(self.missing) > before:
            return None  # its arguments are not all known
        if isinstance(plain, dict) and not isinstance(target := plain.get("_target_", ""), str):
            return self._wrong(f"{where}._target_", target, "a text, the full name of a class")
        if not isinstance(plain, dict) or "_target_" not in plain:
            group = where.replace(".", "/")
            advice = f"A file of choices is named with a slash: {group}=NAME." if group in self.groups else ""
            return self._wrong(where, plain, "an object: a mapping with _target_, the full name of its class", advice)
        for problem in target_problems(plain, where, self.trusted):
            # An argument that repeats a setting is not wrong itself.
            (self.echoes if self._is_repeated(problem.partition(" ")[0]) else self.problems).append(problem)
        return plain

    def _is_repeated(self, name: str) -> bool:
        above, _, last = name.rpartition(".")
        node = OmegaConf.select(self.root, above, throw_on_resolution_failure=False) if above else None
        return isinstance(node, DictConfig) and last in node and OmegaConf.is_interpolation(node, last)

    def _plain(self, value: Any, where: str) -> Any:
        """An open part of the configuration as plain Python, every interpolation resolved."""
        if isinstance(value, DictConfig):
            return {str(k): self._plain(self._item(Any, value, k, f"{where}.{k!s}"), f"{where}.{k!s}") for k in value}
        if isinstance(value, ListConfig):
            return [self._plain(self._item(Any, value, i, f"{where}[{i}]"), f"{where}[{i}]") for i in range(len(value))]
        return value

    def _wrong(self, where: str, value: Any, expected: str, advice: str = "") -> None:
        if isinstance(value, (DictConfig, ListConfig)):
            value = OmegaConf.to_container(value)
        sentence = expected if expected.endswith("?") else f"{expected}."
        shown = repr(value) if len(repr(value)) <= 200 else f"{repr(value)[:200]}..."
        shown = "null" if value is None else f"{shown} ({type(value).__name__})"
        self.problems.append(f"{where} is {shown}; expected {sentence} {advice}".rstrip())
        return None


def looks_like_yaml_number(text: str) -> bool:
    """`010` and `1:30`: numbers to YAML 1.1, but not those that people mean."""
    return bool(text) and text.strip("+-").replace(":", "").replace("_", "").replace(".", "").isdigit()


def unknown_key(key: str, hints: Mapping[str, Any], where: str, node: Any = None, groups: tuple[str, ...] = ()) -> str:
    """One sentence about a key that the schema does not have, with the nearest that it has, or the nearest group.

    `hints` are the keys that stand there, with their types; `node` holds their values.
    """
    if "/" in key:
        return f"{key} is not a group of choices{near_group(key, groups)}"
    near = difflib.get_close_matches(key, [*hints, *groups], 1, cutoff=0.6)
    before = f"{where}." if where else ""
    if not near:
        return f"{before}{key} is not a setting; {where or 'the top level'} has {', '.join(sorted(hints))}."
    return f"{before}{key} is not a setting; did you mean {before}{near[0]}{told(hints.get(near[0]), node, near[0])}?"


def near_group(group: str, groups: Sequence[str]) -> str:
    """The end of a sentence about a group of choices that there is none of: the nearest of those there are, or all."""
    if group in groups:
        return f" here; in a file it belongs into defaults: [/{group}: NAME]."
    above, _, last = group.rpartition("/")
    beside = {each.rpartition("/")[2]: each for each in groups if each.rpartition("/")[0] == above}
    near = [beside[name] for name in difflib.get_close_matches(last, beside, 1)]
    if not near and not (above and beside):
        near = difflib.get_close_matches(group, groups, 1)
    return f"; did you mean {near[0]}?" if near else f"; the groups are {', '.join(groups)}."


def told(hint: Any, node: Any, key: str) -> str:
    """A setting's type and present value, to follow its name: ", a whole number at least 1 (200 here)"."""
    if hint is None:
        return ""
    try:
        value = node[key] if isinstance(node, DictConfig) and key in node else None
    except OmegaConfBaseException:  # it cannot be resolved, or is missing
        value = None
    here = f" ({value} here)" if isinstance(value, (bool, int, float, str)) and value != "" else ""
    return f", {described(hint)}{here}"


def all_hints(cls: type, where: str = "") -> Iterator[tuple[str, Any]]:
    """Name and type of every field of a dataclass and of those inside it."""
    for name, hint in get_type_hints(cls, include_extras=True).items():
        yield f"{where}{name}", hint
        if dataclasses.is_dataclass(hint):
            yield from all_hints(typing.cast(type, hint), f"{where}{name}.")


def described(hint: Any) -> str:
    """What values of a type are, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        notes = [note for note in arguments[1:] if isinstance(note, Range)]
        # Bounds that only keep sums from overflowing are told when they are passed.
        notes = [dataclasses.replace(note, high=None if (note.high or 0) >= 1e9 else note.high) for note in notes]
        return " ".join([described(arguments[0]), *map(str, notes)]).strip()
    if origin in (Union, types.UnionType):
        return " or ".join("null" if each is type(None) else described(each) for each in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (list, tuple):
        return "a list"
    if hint is Target:
        return "an object (_target_ and its arguments)"
    return NAMES.get(hint, "a group of settings")
