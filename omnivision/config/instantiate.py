"""Objects named by `_target_`: only classes of known packages, with arguments that their signatures have."""

from __future__ import annotations

import collections.abc
import functools
import importlib
import inspect
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from typing_extensions import is_typeddict

from omnivision.config.messages import format_errors, suggest
from omnivision.config.schema import InstantiateConfig

# Own packages: any class. Other packages: only names directly in the listed modules, since submodules expose unsafe names
# (torch.nn.modules.module.torch.load would unpickle).
OWN_PACKAGES = ("omnivision.data", "omnivision.models", "omnivision.optim", "omnivision.tasks")
ALLOWED_MODULES = ("torch.optim", "torch.nn", "timm.optim", "fvcore.common.param_scheduler")
INJECTED_ARGS = ("classes", "labels", "label_counts")  # filled in from the catalog


class TargetError(Exception):
    """A `_target_` that is not allowed, does not exist or cannot be imported."""


def is_allowed(target: str, trusted: Sequence[str] = ()) -> bool:
    """Return whether configurations may build a class; `trusted` are further packages."""
    known = target.rpartition(".")[0] in ALLOWED_MODULES
    return known or any(target.startswith(f"{package}.") for package in (*OWN_PACKAGES, *trusted))


@functools.cache
def load_target(target: str) -> Any:
    """Return the class or function of an allowed `_target_`. Importing it runs its code. Raises TargetError."""
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises
        raise TargetError(
            f"cannot be imported: {type(error).__name__}: {error}. Is its folder on PYTHONPATH?"
        ) from error
    found = getattr(module, name, None)
    is_function = inspect.isfunction(found) and module_name not in ALLOWED_MODULES
    is_foreign = target.startswith("omnivision.") and not str(getattr(found, "__module__", "")).startswith(OWN_PACKAGES)
    if not (inspect.isclass(found) or is_function) or is_foreign:
        classes = [f"{module_name}.{member}" for member, value in vars(module).items() if inspect.isclass(value)]
        raise TargetError(f"is not a class{suggest(target, classes)}")
    return found


def signature_of(target: str) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of an allowed `_target_`, by name; empty if Python cannot inspect them. Raises TargetError."""
    try:
        return inspect.signature(load_target(target)).parameters
    except ValueError:
        return {}


def target_problems(node: Any, key: str, trusted: Sequence[str] = ()) -> dict[str, str]:
    """Return the problems of an object to build and of the objects inside it, by key."""
    if isinstance(node, list):
        node = {f"[{number}]": item for number, item in enumerate(node)}
    if not isinstance(node, dict):
        return {}
    problems: dict[str, str] = {}
    for name, item in node.items():
        problems |= target_problems(item, f"{key}{'' if name.startswith('[') else '.'}{name}", trusted)
    if "_target_" not in node:
        return problems
    target = node["_target_"]
    if not isinstance(target, str) or not is_allowed(target, trusted):
        problems[f"{key}._target_"] = (
            f"must be a class of {', '.join((*OWN_PACKAGES, *ALLOWED_MODULES, *trusted))}, got {target!r}. For a class "
            "of your own set '++trainer.trust_targets=[PACKAGE]', which lets configurations run that package's code."
        )
        return problems
    try:
        arguments = arguments_of(target)
        given = {name: value for name, value in node.items() if name != "_target_"}
        # JSON mode accepts a list for a tuple.
        arguments.model_validate_json(json.dumps(given, default=str))
    except TargetError as error:
        problems[f"{key}._target_"] = f"is {target!r}, which {error}"
    except ValidationError as error:
        fields = {f"{key}.{field.alias}": field.annotation for field in arguments.model_fields.values()}
        known = [
            *fields,
            *(f"{name}.{item}" for name, hint in fields.items() if is_typeddict(hint) for item in hint.__annotations__),
        ]
        problems |= format_errors(error, f"{key}.", known)
    return problems


@functools.cache
def arguments_of(target: str) -> type[BaseModel]:
    """Return a pydantic model of the arguments that a configuration may pass to an allowed `_target_`. Raises TargetError."""
    found, signature = load_target(target), signature_of(target)
    try:
        hints = typing.get_type_hints(found.__init__ if inspect.isclass(found) else found, include_extras=True)
    except Exception:  # a user's annotations may not evaluate
        hints = {}
    fields: dict[str, Any] = {}
    for name, parameter in signature.items():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in INJECTED_ARGS:
            # `instantiate_target` gives optimizers their parameters, and classes of other packages what they lack.
            required = parameter.default is parameter.empty and target.startswith("omnivision.") and name != "params"
            field = Field(... if required else None, alias=name)
            fields[f"argument_{name}"] = (_to_config_type(hints.get(name)), field)
    any_name = not signature or any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values())
    config = ConfigDict(extra="allow" if any_name else "forbid", strict=True)
    return create_model(target.rpartition(".")[2], __config__=config, **fields)


def _to_config_type(hint: Any) -> Any:
    """Translate a type annotation for configurations: our classes become objects to build, unclear types become Any."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        members = [_to_config_type(member) for member in arguments if member is not types.NoneType]
        return members[0] | None if len(members) == 1 and members[0] is not Any else Any
    if hint in (int, float, str, bool) or origin in (Literal, Annotated) or is_typeddict(hint):
        return hint
    if origin in (tuple, list, dict) and Ellipsis not in arguments:
        return origin[tuple(_to_config_type(argument) for argument in arguments)]
    if origin is collections.abc.Sequence:
        return list[_to_config_type(arguments[0])]  # type: ignore[misc]
    return InstantiateConfig if inspect.isclass(hint) and hint.__module__.startswith(OWN_PACKAGES) else Any
