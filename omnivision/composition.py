"""What went wrong while Hydra composed a configuration, told as one paragraph with the nearest right name."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omnivision.schema import Target
from omnivision.settings import GROUPS, Settings


def explain(error: BaseException, *folders: Path) -> str:
    """A paragraph about an error of Hydra or OmegaConf: unknown keys and choices get the nearest known ones.

    `folders` are those that the choices are files of: the project's, and a site's own.
    """
    text = _first_sentences(error)
    chain = list(_causes(error))
    if override := getattr(error, "override", None):
        if "missing EQUAL" in text:
            return f"{override!r} is no setting of a value; expected KEY=VALUE."
        return f"{override!r} cannot be read. Quote values that hold =, commas, brackets or spaces: 'KEY=\"a=b\"'."
    if found := re.match(r"Additional config directory '(.*)' not found", text):
        return f"--config-dir is {found[1]}, and there is no such folder. Expected one that holds site/. Change --config-dir."
    if text.startswith("Multiple values for"):
        group = text.split()[3].rstrip(".")
        return f"{group} is chosen twice; expected one choice. Keep one of the {group}=... of the command line."
    if text.startswith("force-add of config groups"):
        choice = text.split("'")[1].lstrip("+")
        return f"++ is for settings, and {choice} is a choice among files. Write {choice}, or +{choice} where none was made."
    if text.startswith("Config group override must be"):
        return "A choice among files was given nothing, a number or a mapping; expected its name, e.g. trainer/model=vitbase."
    if "No match in the defaults list" in text:
        group = text.split("'")[1]
        return (
            f"{group}=... changes a choice that nothing has made yet. Choose a stage first, e.g. "
            "+experiments=omnimae/omnimain_train_video.yaml, which brings a model and an optimizer."
        )
    for cause in chain:
        key = getattr(cause, "full_key", None) or getattr(cause, "key", None)
        if isinstance(key, str) and "Could not override" in text:
            return _unknown_setting(key, getattr(cause, "parent_node", None) or {})
        if isinstance(key, str) and "Error merging override" in text:
            reason = _first_sentences(cause).partition(" full_key")[0]
            return f"{text.removeprefix('Error merging override ')} does not fit: {reason}."
    for cause in chain:
        if missing := getattr(cause, "missing_cfg_file", None):
            return _unknown_choice(str(missing), folders)
    return text.replace("\\'", "'")


def setting_names() -> list[str]:
    """The full name of every setting that the schema has."""
    return [name for name, _ in _hints(Settings, "")]


def _unknown_choice(missing: str, folders: Iterable[Path]) -> str:
    files = [(path, folder) for folder in folders for path in sorted(folder.rglob("*.yaml"))]
    known = [path.relative_to(folder).with_suffix("").as_posix() for path, folder in files]
    folder = missing.rpartition("/")[0]
    beside = [name for name in known if name.rpartition("/")[0] == folder]
    near = difflib.get_close_matches(missing.removesuffix(".yaml"), beside or known, 1, cutoff=0.4)
    guess = f" Did you mean {near[0].rpartition('/')[2]}?" if near else ""
    if not beside:
        return (
            f"There is no configuration {missing}, and no folder {folder}.{f' Did you mean {near[0]}?' if near else ''}"
        )
    choices = ", ".join(name.rpartition("/")[2] for name in beside)
    return f"There is no configuration {missing}.{guess} {folder} has: {choices}."


def _unknown_setting(key: str, beside: Iterable[Any]) -> str:
    """`beside` are the keys that stand where `key` was looked for."""
    folder = key.rpartition(".")[0]
    names = setting_names()
    known = [*GROUPS] if "/" in key else [*names, *(f"{folder}.{name}" for name in beside if folder)]
    near = difflib.get_close_matches(key, known, 1) or [
        name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    # Names below these are the user's own, or arguments of the object that is described there.
    free = [name for name, hint in _hints(Settings, "") if typing.get_origin(hint) is dict or Target in _flat(hint)]
    if key in names or (not near and any(key.startswith(f"{name}.") for name in free)):
        return f"{key} is not set by the files of this run. If it is meant, add it with ++{key}=VALUE."
    return f"{key} is not a setting; {f'did you mean {near[0]}?' if near else '--help lists them.'}"


def _hints(cls: type, where: str) -> Iterator[tuple[str, Any]]:
    for name, hint in typing.get_type_hints(cls).items():
        yield f"{where}{name}", hint
        if dataclasses.is_dataclass(hint) and hint is not Target:
            yield from _hints(typing.cast(type, hint), f"{where}{name}.")


def _flat(hint: Any) -> tuple[Any, ...]:
    return (hint, *typing.get_args(hint))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_sentences(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(
        line for line in lines if line and not line.startswith(("Config search path", "provider=", "Set the"))
    )
