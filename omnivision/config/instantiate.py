"""Objects named by `_target_`: classes of known packages alone, with arguments that their signatures have."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

# Packages of ours of which any class may be built. Of other packages only what they hold themselves: from a module inside
# one a name leads anywhere (torch.nn.modules.module.torch.load would unpickle).
OWN = ("omnivision.data", "omnivision.models", "omnivision.optim", "omnivision.tasks")
OTHERS = ("torch.optim", "torch.nn", "timm.optim", "fvcore.common.param_scheduler")
PACKAGE = Path(__file__).parents[1]
# Arguments that `build` takes from other settings: the label sets of the sources.
INJECTED_ARGS = ("classes", "labels")
SCALARS = (int, float, str, bool)


class TargetError(Exception):
    """A `_target_` that is not allowed, does not exist or cannot be imported."""


def is_allowed(target: str, trusted: Sequence[str] = ()) -> bool:
    """Whether configurations may build a class; `trusted` are further packages."""
    known = target.rpartition(".")[0] in OTHERS
    return known or any(target.startswith(f"{package}.") for package in (*OWN, *trusted))


@functools.cache
def load_target(target: str) -> Any:
    """The class or function of an allowed `_target_`. Importing it runs its code.

    Raises TargetError.
    """
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, name)
    except (AttributeError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and not f"{module_name}.".startswith(f"{error.name}."):
            raise TargetError(f"cannot be imported: {type(error).__name__}: {error}") from error
        near = difflib.get_close_matches(target, _names_near(module_name), 1)
        hint = f"did you mean {near[0]}?" if near else "is its folder on PYTHONPATH?"
        raise TargetError(f"does not exist; {hint}") from None
    except Exception as error:
        raise TargetError(f"cannot be imported: {type(error).__name__}: {error}") from error
    own = target.startswith("omnivision.")
    if not inspect.isclass(found) and not (inspect.isfunction(found) and module_name not in OTHERS):
        raise TargetError("is not a class")
    if own and not found.__module__.startswith(OWN):
        raise TargetError("does not exist")
    return found


def _names_near(module_name: str) -> list[str]:
    """Full names of classes that may have been meant: those of our packages, or of the one other package."""
    modules = [importlib.import_module(module_name)] if module_name in OTHERS else []
    if module_name.startswith("omnivision."):
        roots = [importlib.import_module(package) for package in OWN]
        names = [found.name for root in roots for found in pkgutil.walk_packages(root.__path__, f"{root.__name__}.")]
        modules = [importlib.import_module(name) for name in names]
    return [f"{m.__name__}.{name}" for m in modules for name, value in vars(m).items() if inspect.isclass(value)]


def signature_of(target: str) -> Mapping[str, inspect.Parameter]:
    """The parameters of an allowed `_target_`, by name; empty where Python cannot tell. Raises TargetError."""
    try:
        return inspect.signature(load_target(target)).parameters
    except ValueError:
        return {}


def target_problems(node: Any, key: str, trusted: Sequence[str] = ()) -> list[str]:
    """Say what is wrong with an object to build and with the objects inside it, a sentence each."""
    if isinstance(node, list):
        return [problem for i, item in enumerate(node) for problem in target_problems(item, f"{key}[{i}]", trusted)]
    if not isinstance(node, dict):
        return []
    problems = [problem for name, item in node.items() for problem in target_problems(item, f"{key}.{name}", trusted)]
    if "_target_" not in node:
        return problems
    target = node["_target_"]
    if not isinstance(target, str) or not is_allowed(target, trusted):
        return [
            *problems,
            f"{key}._target_ must be a class of {', '.join((*OWN, *OTHERS, *trusted))}, got {target!r}. For a class of "
            "your own set '++trainer.trust_targets=[PACKAGE]', which lets configurations run that package's code.",
        ]
    try:
        signature = signature_of(target)
    except TargetError as error:
        return [*problems, f"{key}._target_ is {target!r}, which {error}"]
    return problems + _argument_problems(node, key, target, signature)


def _argument_problems(
    node: dict[str, Any], key: str, target: str, signature: Mapping[str, inspect.Parameter]
) -> list[str]:
    kinds = {parameter.kind for parameter in signature.values()}
    hints, problems = _hints(load_target(target)), []
    given = {name: value for name, value in node.items() if name != "_target_"}
    for name, value in given.items():
        if name in INJECTED_ARGS and name in signature:
            problems.append(f"{key}.{name} comes from the catalog (datasets.NAME.num_classes). Remove it.")
        elif name not in signature:
            if not signature or (inspect.Parameter.VAR_KEYWORD in kinds and not name.startswith("_")):
                continue
            near = difflib.get_close_matches(name, signature, 1)
            names = ", ".join(signature)
            problems.append(
                f"{key}.{name} is not an argument of {target}({names})"
                + (f"; did you mean {near[0]}?" if near else ".")
            )
        elif name in hints and (expected := _mismatch(value, hints[name])):
            problems.append(f"{key}.{name} must be {expected}, got {value!r}.")
    required = [name for name, parameter in signature.items() if parameter.default is parameter.empty
                and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)]  # fmt: skip
    absent = [name for name in required if name not in given and name not in INJECTED_ARGS]
    if absent and target.startswith("omnivision."):  # `build` gives others what they lack, e.g. the parameters
        problems.append(f"{key} lacks {', '.join(absent)}, required by {target}.")
    return problems


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # annotations of a user's own that cannot be evaluated
        return {}


def _mismatch(value: Any, hint: Any) -> str | None:
    """What an argument of a plain type must be; None if it is, or if the type says too little."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        if value is None or len(members) != 1:
            return None
        hint, origin = members[0], typing.get_origin(members[0])
    if hint in SCALARS or origin is Literal:
        try:
            TypeAdapter(hint).validate_python(value, strict=True)
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Input should be ")
            near = difflib.get_close_matches(str(value), [str(each) for each in typing.get_args(hint)], 1)
            return f"{message} (did you mean {near[0]}?)" if near else message
        return None
    if origin is dict and not isinstance(value, dict):
        return "a group of settings"
    is_ours = inspect.isclass(hint) and hint.__module__.startswith(OWN)
    if is_ours and not (isinstance(value, dict) and "_target_" in value):
        return "an object, a mapping with _target_ (the full name of a class)"
    return None
