"""What went wrong while Hydra composed a configuration, told as one paragraph with the nearest right name."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator
from pathlib import Path

from omnivision.schema import Target
from omnivision.settings import Settings


def explain(error: BaseException, config: Path) -> str:
    """A paragraph about an error of Hydra or OmegaConf: unknown keys and choices get the nearest known ones.

    `config` is the folder that the choices are files of.
    """
    text = _first_sentences(error)
    chain = list(_causes(error))
    if "No match in the defaults list" in text:
        group = text.split("'")[1]
        return (
            f"{group}=... changes a choice that nothing has made yet. Choose a stage first, e.g. "
            "+experiments=omnimae/omnimain_train_video.yaml, which brings a model and an optimizer."
        )
    for cause in chain:
        key = getattr(cause, "full_key", None) or getattr(cause, "key", None)
        if isinstance(key, str) and "Could not override" in text:
            return _unknown_setting(key)
        if isinstance(key, str) and "Error merging override" in text:
            reason = _first_sentences(cause).partition(" full_key")[0]
            return f"{text.removeprefix('Error merging override ')} does not fit: {reason}."
    for cause in chain:
        if missing := getattr(cause, "missing_cfg_file", None):
            return _unknown_choice(str(missing), config)
    if type(error).__name__ == "OverrideParseException" or "mismatched input" in text:
        return f"{text} Quote values that hold =, commas or spaces, for instance 'key=\"a=b\"'."
    return text


def setting_names() -> list[str]:
    """The full name of every setting that the schema has."""
    return list(_names(Settings, ""))


def _unknown_choice(missing: str, config: Path) -> str:
    known = [path.relative_to(config).with_suffix("").as_posix() for path in sorted(config.rglob("*.yaml"))]
    folder = missing.rpartition("/")[0]
    beside = [name for name in known if name.rpartition("/")[0] == folder]
    near = difflib.get_close_matches(missing.removesuffix(".yaml"), beside or known, 1, cutoff=0.4)
    guess = f" Did you mean {near[0].rpartition('/')[2]}?" if near else ""
    choices = ", ".join(name.rpartition("/")[2] for name in beside) or "(there is no such group)"
    return f"There is no configuration {missing}.{guess} {folder} has: {choices}."


def _unknown_setting(key: str) -> str:
    names = setting_names()
    near = difflib.get_close_matches(key, names, 1) or [
        n for n in names if n.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    if key in names or not near:
        return f"{key} is not set by the files of this run. If it is meant, add it with ++{key}=VALUE."
    return f"{key} is not a setting; did you mean {near[0]}?"


def _names(cls: type, where: str) -> Iterator[str]:
    for name, hint in typing.get_type_hints(cls).items():
        yield f"{where}{name}"
        if dataclasses.is_dataclass(hint) and hint is not Target:
            yield from _names(typing.cast(type, hint), f"{where}{name}.")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_sentences(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(
        line for line in lines if line and not line.startswith(("Config search path", "provider=", "Set the"))
    )
