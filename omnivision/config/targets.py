"""Objects named by `_target_`: only from known packages, and with arguments that their signatures have.

Signatures of this project's own classes are read from the source with `ast`, so that nothing heavy is imported on a
login node; those of other packages are checked when the object is built.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Any class inside these of our packages; of other packages only what they hold themselves, because from a module inside
# one a name leads anywhere: torch.nn.modules.module.torch.load would unpickle.
OWN = ("omnivision.data", "omnivision.models", "omnivision.optim", "omnivision.tasks")
OTHERS = ("torch.optim", "torch.nn", "timm.optim", "fvcore.common.param_scheduler")
PACKAGE = Path(__file__).parents[1]
# Arguments that `build` knows from elsewhere in the settings: the label sets of the sources.
SUPPLIED = ("classes", "labels")


@dataclass(frozen=True)
class Parameter:
    annotation: str
    required: bool
    default: str = ""


def target_problems(node: Any, where: str, trusted: Sequence[str] = ()) -> list[str]:
    """Sentences about what is wrong with an object to build and with the objects inside it. `trusted` are further packages
    whose classes may be built.
    """
    if isinstance(node, list):
        return [problem for i, item in enumerate(node) for problem in target_problems(item, f"{where}[{i}]", trusted)]
    if not isinstance(node, dict):
        return []
    problems = [p for key, item in node.items() for p in target_problems(item, f"{where}.{key}", trusted)]
    if "_target_" not in node:
        return problems
    target = node["_target_"]
    if not isinstance(target, str) or not is_allowed(target, trusted):
        return [
            *problems,
            f"{where}._target_ is {target!r}; expected a class of {', '.join((*OWN, *OTHERS, *trusted))}: configurations come "
            "from others too, and may not build just anything. For classes of your own set "
            "'++trainer.trust_targets=[PACKAGE]'; building one runs its code.",
        ]
    own, signature = target.startswith("omnivision."), signature_of(target)
    package = target.partition(".")[0]
    if not own and package not in sys.modules and importlib.util.find_spec(package) is None:
        return [
            *problems,
            f"{where}._target_ is {target!r}, and Python finds no package {package!r}. Put the folder that holds it on "
            "PYTHONPATH, or correct the name.",
        ]
    if signature is None:
        return (
            problems
            if not own
            else [*problems, f"{where}._target_ is {target!r}, which does not exist{_near_target(target)}"]
        )
    given = {key: value for key, value in node.items() if key != "_target_"}
    for key in given:
        if key in SUPPLIED and key in signature:
            problems.append(f"{where}.{key} comes from the catalog (datasets.NAME.num_classes). Remove it.")
        elif key not in signature and ("**" not in signature or key.startswith("_")):
            near = difflib.get_close_matches(key, signature, 1)
            guess = f"; did you mean {near[0]}?" if near else "."
            problems.append(f"{where}.{key} is not an argument of {target}({shown(signature)}){guess}")
        elif key in signature and (sentence := _type_problem(given[key], signature[key].annotation, f"{where}.{key}")):
            problems.append(sentence)
    absent = [n for n, parameter in signature.items() if parameter.required and n not in given and n not in SUPPLIED]
    if own and absent:  # what others lack, a model's parameters say, `build` gives them
        problems.append(f"{where} lacks {', '.join(absent)}, needed by {target}({shown(signature)}).")
    return problems


def shown(signature: Mapping[str, Parameter]) -> str:
    """The parameters of a signature with their types, those that may be left out in brackets."""
    each = [(f"{name}: {parameter.annotation}", parameter.required) for name, parameter in signature.items()]
    return ", ".join(text if required else f"[{text}]" for text, required in each)


def is_allowed(target: str, trusted: Sequence[str] = ()) -> bool:
    known = target.rpartition(".")[0] in OTHERS
    return known or any(target.startswith(f"{package}.") for package in (*OWN, *trusted))


def signature_of(target: str) -> dict[str, Parameter] | None:
    """Parameters of what a name leads to, read off the source without importing it. None if there is no such thing here, or
    if the source of another package does not say.
    """
    return _signature_here(target) if target.startswith("omnivision.") else _signature_elsewhere(target)


@functools.cache
def _signature_here(target: str) -> dict[str, Parameter] | None:
    *modules, name = target.split(".")[1:]
    file = PACKAGE.joinpath(*modules).with_suffix(".py") if modules else PACKAGE / "__init__.py"
    if not file.is_file():
        return None
    definitions = {
        node.name: node for node in ast.parse(file.read_text(encoding="utf-8")).body if hasattr(node, "name")
    }
    found = definitions.get(name)
    if isinstance(found, ast.FunctionDef):
        return _of_function(found, skip=0)
    return _of_class(found, definitions) if isinstance(found, ast.ClassDef) else None


@functools.cache
def _signature_elsewhere(target: str) -> dict[str, Parameter] | None:
    package, *inner, name = target.split(".")
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # __main__, and what else has no spec
        return None
    if spec is None or spec.origin is None:
        return None
    if spec.submodule_search_locations:
        place = Path(spec.submodule_search_locations[0], *inner)
        files = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    else:
        files = [Path(spec.origin)]
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            body = ast.parse(text).body if f"class {name}" in text else []
        except (OSError, ValueError, SyntaxError):  # it says what is wrong when it is imported
            return None
        definitions = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
        found = definitions.get(name)
        if found is None:
            continue
        says = any(isinstance(item, ast.FunctionDef) and item.name == "__init__" for item in found.body)
        if says or not found.bases:  # else what it inherits may say
            return _of_class(found, definitions)
    return None


def _of_class(cls: ast.ClassDef, definitions: dict[str, Any]) -> dict[str, Parameter]:
    for item in cls.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _of_function(item, skip=1)
    fields: dict[str, Parameter] = {}
    for base in cls.bases:
        if isinstance(base, ast.Name) and isinstance(definitions.get(base.id), ast.ClassDef):
            fields |= _of_class(definitions[base.id], definitions)
    for item in cls.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            default = "" if item.value is None else ast.unparse(item.value)
            fields[item.target.id] = Parameter(ast.unparse(item.annotation), item.value is None, default)
    return fields


def _of_function(function: ast.FunctionDef, skip: int) -> dict[str, Parameter]:
    arguments = function.args.args[skip:]
    required = len(arguments) - len(function.args.defaults)
    defaults = [*[None] * required, *function.args.defaults, *function.args.kw_defaults]
    found = {}
    for argument, default in zip([*arguments, *function.args.kwonlyargs], defaults, strict=True):
        annotation = ast.unparse(argument.annotation) if argument.annotation else "Any"
        found[argument.arg] = Parameter(annotation, default is None, ast.unparse(default) if default else "")
    return found | ({"**": Parameter("Any", False)} if function.args.kwarg else {})


def described_arguments(target: str) -> dict[str, str]:
    """What the docstring of a class of ours says of its arguments, by name."""
    *modules, name = target.split(".")[1:]
    file = PACKAGE.joinpath(*modules).with_suffix(".py")
    body = ast.parse(file.read_text(encoding="utf-8")).body if target.startswith("omnivision.") else []
    text = next((ast.get_docstring(node) for node in body if isinstance(node, ast.ClassDef) and node.name == name), "")
    block = (text or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    entries = re.split(r"^    (?=\w)", block, flags=re.MULTILINE)[1:]
    pairs = (" ".join(entry.split()).partition(": ") for entry in entries)
    return {each: meaning for names, _, meaning in pairs for each in names.split(", ")}


def _type_problem(value: Any, annotation: str, where: str) -> str | None:
    kinds: dict[str, tuple[tuple[type, ...], str]] = {
        "int": ((int,), "a whole number"),
        "float": ((int, float), "a number"),
        "str": ((str,), "a text"),
        "bool": ((bool,), "true or false"),
    }
    if re.fullmatch(r"Literal\[[^][]*\]", annotation):
        choices = ast.literal_eval(f"({annotation.removeprefix('Literal[').removesuffix(']')},)")
        texts = list(map(str, choices))
        near = difflib.get_close_matches(str(value), texts, 1)
        guess = f"; did you mean {near[0]}?" if near else ""
        return None if value in choices else f"{where} is {value!r}; expected one of {', '.join(texts)}{guess}."
    if annotation.endswith(" | None"):
        if value is None:
            return None
        annotation = annotation.removesuffix(" | None")
    if not isinstance(value, dict) and (annotation.startswith("dict[") or annotation in own_classes()):
        return f"{where} is {value!r}; expected a group of settings."
    if annotation in own_classes() and "_target_" not in value:
        return f"{where} has no _target_; expected an object: a mapping with _target_, the full name of its class."
    if annotation not in kinds:
        return None
    accepted, expected = kinds[annotation]
    if isinstance(value, accepted) and (annotation == "bool" or not isinstance(value, bool)):
        return None
    return f"{where} is {value!r} ({type(value).__name__}); expected {expected}."


def _near_target(target: str) -> str:
    near = difflib.get_close_matches(target, own_definitions(), 1)
    return f"; did you mean {near[0]}?" if near else "."


def own_classes() -> set[str]:
    return {name.rpartition(".")[2] for name, kind in own_definitions().items() if kind is ast.ClassDef}


@functools.cache
def own_definitions() -> dict[str, type]:
    """Full names of the classes and functions that a configuration may build, with what they are."""
    return {
        ".".join(("omnivision", *file.relative_to(PACKAGE).with_suffix("").parts, node.name)): type(node)
        for package in OWN
        for file in sorted((PACKAGE / package.rpartition(".")[2]).rglob("*.py"))
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
    }
