"""What went wrong while Hydra composed a configuration, told as one paragraph with the nearest right name."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from omnivision.config.origins import origin_of
from omnivision.config.reader import Target, described, near_group
from omnivision.config.schema import GROUPS
from omnivision.config.stages import EXPERIMENTS, guess_stage, typed_choices
from omnivision.config.suggestions import CALLED, ELSEWHERE, setting_hints, setting_names, suggestion
from omnivision.config.targets import shown, signature_of
from omnivision.utils.errors import causes


def explain(error: BaseException, folders: Sequence[Path], arguments: Sequence[str] = ()) -> str:
    """A paragraph about an error of Hydra or OmegaConf: unknown keys and choices get the nearest known ones.

    `folders` are those that the choices are files of, the project's and a site's own; `arguments` the command line.
    """
    text = _first_sentences(error)
    return (
        _of_command_line(error, text, arguments)
        or _of_what_is_not_there(error, text, folders, arguments)
        or _of_files(error, text, folders, arguments)
        or text.replace("\\'", "'")
    )


def _of_command_line(error: BaseException, text: str, arguments: Sequence[str]) -> str | None:
    """About what cannot be read, or does not go together, of what was typed."""
    if any(not each.strip() for each in arguments):
        return "An argument is empty. Was it a shell variable that is not set?"
    if nameless := next((each for each in arguments if each.startswith("=") and len(each) > 1), None):
        return (
            f"{nameless!r} has no name of a setting before =; expected KEY=VALUE without spaces around the equals sign."
        )
    if override := getattr(error, "override", None):
        return _unreadable(str(override), "missing EQUAL" in text, arguments)
    if found := re.match(r"Sweep parameters '(.*)' requires --multirun", text):
        return f"{found[1]} means several values. For a run with each of them append -m; else give one."
    if found := re.match(r"Ambiguous value for argument '([^=]*)=(.*?)' 1\. ", text):
        name, value = found.groups()
        return (
            f"{name}={value} holds a comma, which means several values. For a run with each of them append -m; for a list "
            f"write '{name}=[{value}]'; for a text that holds a comma '{name}=\"{value}\"'."
            + (f" A fraction has a point: {name}={value.replace(',', '.')}." if re.fullmatch(r"\d+,\d+", value) else "")
        )
    if found := re.match(r"Additional config directory '(.*)' not found", text):
        return f"--config-dir is {found[1]}, and there is no such folder. Expected one that holds site/. Change --config-dir."
    if text.startswith("force-add of config groups"):
        choice = text.split("'")[1].lstrip("+")
        return f"++ is for settings, and {choice} is a choice among files. Write {choice}, or +{choice} where none was made."
    if no_choice := next(filter(_no_choice, arguments), None):
        return f"{no_choice} is a choice among files; expected the name of one, e.g. trainer/model=vitbase."
    if found := re.match(r"Multiple values for (\S+)\. |(\S+) appears more than once in the final defaults list", text):
        group, names = found[1] or found[2], [each.partition("=")[0] for each in arguments]
        twice = ", ".join(each for each, name in zip(arguments, names, strict=True) if names.count(name) > 1)
        added = next((each for each in arguments if each.startswith(f"+{group}=")), None)
        advice = f"Keep one of {twice}." if twice else f"In a file's defaults write 'override /{group}: NAME'."
        advice = f"Write {added[1:]}, without +." if added and not twice else advice
        return f"{group} is chosen twice; expected one choice. {advice}"
    if text.startswith("Primary config directory not found"):
        return (
            "--config-path takes the place of the project's files. For your own, beside them, give --config-dir FOLDER."
        )
    return None


def _of_what_is_not_there(
    error: BaseException, text: str, folders: Sequence[Path], arguments: Sequence[str]
) -> str | None:
    """About settings, groups and choices that there are none of, or that take no such value."""
    if found := re.match(r"Could not delete from config\. '(.*?)' does not exist", text):
        return f"~{found[1]} removes what is not there.{_nearest_sentence(found[1])} Leave it out."
    if (found := re.search(r"Could not override '([^']*)'", text)) and "No match in the defaults list" in text:
        file = re.match(r"In '([^']*)'", text)
        return _choice_of_nothing(found[1], arguments, f"{file[1]}.yaml" if file else "")
    for cause in causes(error):
        if missing := getattr(cause, "missing_cfg_file", None):
            return _unknown_choice(str(missing), folders, arguments)
        key = getattr(cause, "full_key", None) or getattr(cause, "key", None)
        if isinstance(key, str) and "Could not override" in text:
            return _unknown_setting(key, getattr(cause, "parent_node", None), arguments)
        if isinstance(key, str) and "Error merging override" in text:
            given = text.removeprefix("Error merging override ")
            reason = _first_sentences(cause).partition(" full_key")[0]
            if reason.startswith("Cannot merge"):
                hint = setting_hints().get(given.partition("=")[0].lstrip("+"))
                return f"{given} does not fit; expected {described(hint) if hint else 'what the files have there'}."
            return f"{given} does not fit: {reason}."
    return None


def _of_files(error: BaseException, text: str, folders: Sequence[Path], arguments: Sequence[str]) -> str | None:
    """About files of settings that cannot be read."""
    if found := re.match(
        r"In '(.*?)': \w+ raised while composing config: Cannot merge .*? full_key: ?(\S*) *object", text
    ):
        what = f"{found[2]} ({found[1]}.yaml)" if found[2] else f"{found[1]}.yaml"
        return f"{what} is a list where names with values are expected, or the other way round. Mend the file."
    if isinstance(error, UnicodeDecodeError):
        files = (path for folder in folders for path in sorted(folder.rglob("*.yaml")) if path.is_file())
        wrong = next((path for path in files if not _is_text(path)), "A configuration file")
        return f"{wrong} is no text in UTF-8: {error}. Write it anew, or take it out."
    if mark := getattr(error, "problem_mark", None):  # of YAML
        problem = getattr(error, "problem", None) or "what stands there cannot be read"
        advice = " YAML indents with spaces." if "\\t" in problem else ""
        return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: {problem}.{advice} Mend the file."
    if isinstance(error, OSError) and error.filename:
        where = next((f" (argument {each})" for each in arguments if each.endswith(f"={error.filename}")), "")
        return f"{error.filename}{where} cannot be used: {error.strerror}. Choose another."
    if not text:
        *_, first = causes(error)
        said = " ".join(str(first).split()) or "no more is known"
        return f"A configuration cannot be read ({type(first).__name__}: {said}). Mend it."
    return None


def _is_text(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return True


def _unreadable(override: str, lacks_equals: bool, arguments: Sequence[str]) -> str:
    """About an argument that Hydra cannot read."""
    name, equals, value = override.partition("=")
    if equals and not re.fullmatch(r"[+~]{0,2}[A-Za-z_$][\w$/@:-]*(\.[\w$/@:-]+)*", name, re.ASCII):
        return f"{override!r} has no name of a setting before =; expected letters, digits, _ and dots between them."
    if lacks_equals or not equals:
        if {"=", ""} & set(arguments) or any(each.startswith("=") or each.endswith("=") for each in arguments):
            return f"{override!r} stands alone; expected KEY=VALUE without spaces around the equals sign."
        if ":" in override:
            name, _, value = (part.strip() for part in override.partition(":"))
            return f"{override!r} is written as in a file; expected KEY=VALUE: {name}={value}."
        return f"{override!r} is no setting of a value; expected KEY=VALUE."
    if (opening := sum(map(value.count, "[{("))) != (closing := sum(map(value.count, "]})"))):
        return f"{override!r} opens {opening} bracket{'s' * (opening != 1)} and closes {closing}; expected as many."
    if value.count('"') % 2 or value.count("'") % 2:
        return f"{override!r} opens a quotation mark that it does not close. A shell takes one kind away: '{name}=\"a b\"'."
    return (
        f"{override!r} cannot be read: a value that holds =, commas, brackets, colons or spaces stands in quotes, and those in "
        f"others that the shell takes away. Write '{name}=\"{value}\"'."
    )


def _no_choice(argument: str) -> bool:
    """Whether an argument gives a group of choices nothing, a number or a mapping."""
    name, equals, value = argument.partition("=")
    nameless = re.fullmatch(r"|null|true|false|[\d.]+|\{.*\}", value)
    return bool(equals and nameless) and ("/" in name or name.lstrip("+") in GROUPS)


def _choice_of_nothing(group: str, arguments: Sequence[str], file: str) -> str:
    """About `group=choice`, of the command line or a file's defaults, where no file has made that choice yet."""
    given = next((each for each in arguments if each.startswith(f"{group}=")), f"override /{group} in {file}")
    if group in ("experiments", "trainer", "site"):
        return f"{given} would change a choice that nothing has made yet. Write +{given} to make it."
    if group not in GROUPS:
        return f"{group} is not a group of choices ({given}){near_group(group, GROUPS)}"
    if any(each.lstrip("+").startswith("experiments=") for each in arguments):
        return f"{given} changes a choice that this stage does not make. Write +{given} to make it."
    return (
        f"{given} changes a choice that nothing has made yet. Choose a stage first, e.g. "
        f"+experiments={EXPERIMENTS[guess_stage(typed_choices(arguments))]}, which brings a model and an optimizer."
    )


def explain_flags(said: str, arguments: Sequence[str]) -> str:
    """A paragraph about what argparse said of the flags of a command line: settings are often meant."""
    if found := re.match(r"unrecognized arguments: (-\S+)", said):
        name, equals, value = found[1].lstrip("-").replace("-", "_").partition("=")
        if name in ELSEWHERE:
            return f"{found[1]} is no option; {ELSEWHERE[name]}. Settings are written NAME=VALUE, without dashes."
        if near := [CALLED[name]] if name in CALLED else difflib.get_close_matches(name, setting_names(), 1):
            follows = [after for flag, after in itertools.pairwise(arguments) if flag == found[1]]
            value = value if equals else next((each for each in follows if "=" not in each), "VALUE")
            return f"{found[1]} is no option; settings are written without dashes: did you mean {near[0]}={value}?"
    return f"{said}. Settings are written NAME=VALUE, and --help lists them; --hydra-help lists the options."


def _unknown_choice(missing: str, folders: Iterable[Path], arguments: Sequence[str]) -> str:
    files = [(path, folder) for folder in folders for path in sorted(folder.rglob("*.yaml")) if path.is_file()]
    known = [path.relative_to(folder).with_suffix("").as_posix() for path, folder in files]
    folder, _, name = missing.rpartition("/")
    if folder.partition("/")[0] == "hydra":
        return f"There is no {missing}. How runs are launched is said by launcher.* and submitit.*; -m sweeps. Leave it out."
    for place in (each / f"{missing}{ending}" for each in folders for ending in ("", ".yml", ".yaml")):
        if place.is_dir() and place.suffix == ".yaml":
            return f"{place} is a folder; expected a file of settings."
        if place.is_file() and place.suffix == ".yml":
            return f"{place} ends in .yml, and only files that end in .yaml are read. Rename it."
    given = next((each for each in arguments if each.rpartition("=")[2].removesuffix(".yaml").endswith(name)), None)
    naming = re.compile(rf"\b{re.escape(name)}\b")
    read = ((path, path.read_text(encoding="utf-8", errors="replace")) for path, _ in files)
    told = f" (argument {given})" if given else next((f" ({path})" for path, text in read if naming.search(text)), "")
    beside = [each for each in known if each.rpartition("/")[0] == folder]
    choices = [each.rpartition("/")[2] for each in beside]
    last = name.removesuffix(".yaml").removesuffix(".yml")
    # The nearest, or the shortest of those that hold all that was typed: base, ucf101.
    near = difflib.get_close_matches(last.lower(), choices, 1) or sorted(
        filter(lambda each: last in each, choices), key=len
    )
    guess = f" Did you mean {near[0]}?" if near else ""
    if not beside:
        near = difflib.get_close_matches(missing.removesuffix(".yaml"), known, 1)
        nearest = f" Did you mean {near[0]}?" if near else ""
        return f"There is no configuration {missing}{told}, and no folder {folder}.{nearest}"
    return f"There is no configuration {missing}{told}.{guess} {folder or 'Its folder'} has: {', '.join(choices)}."


def _unknown_setting(key: str, parent: Any, arguments: Sequence[str]) -> str:
    """`parent` is what was composed so far where the key was looked for, which is a part of what was typed."""
    folder, _, last = key.rpartition(".")
    where = origin_of(arguments, ())(key)
    typed = [each.partition("=")[0].lstrip("+~") for each in reversed(arguments)]
    whole = next((name for name in typed if name.startswith(f"{key}.")), key)
    hints = setting_hints()
    if isinstance(parent, DictConfig) and isinstance(target := parent.get("_target_"), str):
        signature = signature_of(target)
        if key.startswith("trainer.optim.optimizer.") and last in ELSEWHERE:
            return f"{key}{where} is not set here; {ELSEWHERE[last]}."
        if key == "trainer.optim.optimizer.lr":
            return f"{key}{where} would be replaced by the schedule; did you mean lr?"
        if signature and last in signature:
            return f"{key}{where} is not set by this run's files, but is an argument of {target}. Add it with ++{key}=VALUE."
        if not signature:
            return f"{key}{where} is not set by this run's files. If {target} takes it, add it with ++{key}=VALUE."
        near = difflib.get_close_matches(last, signature, 1)
        guess = f"; did you mean {near[0]}?" if near else "."
        return f"{key}{where} is not an argument of {target}({shown(signature)}){guess}"
    if "/" in key:
        return f"{key}{where} is not a group of choices{near_group(key, GROUPS)}"
    if not parent and dataclasses.is_dataclass(hints.get(folder)):
        return f"{folder} is empty, or no group of settings, in a file of this run: {key}{where} has no place. Mend that file."
    # Names below these are the user's own, or arguments of the object that is described there.
    free = [name for name, hint in hints.items() if typing.get_origin(hint) is dict or Target in _flat(hint)]
    if key in hints or any(key.startswith(f"{name}.") for name in free):
        near = difflib.get_close_matches(last, map(str, parent), 1) if isinstance(parent, DictConfig) else []
        guess = f"; did you mean {whole.replace(key, f'{folder}.{near[0]}', 1)}?" if near else "."
        return f"{key}{where} is not set by the files of this run{guess} A new one is added with ++{whole}=VALUE."
    root = parent._get_root() if isinstance(parent, DictConfig) else None
    assert root is None or isinstance(root, DictConfig)
    return f"{key}{where} is not a setting{suggestion(whole, root) or suggestion(key, root) or '; --help lists them.'}"


def _nearest_sentence(key: str) -> str:
    near = difflib.get_close_matches(key, setting_names(), 1)
    return f" Did you mean ~{near[0]}?" if near else ""


def _flat(hint: Any) -> tuple[Any, ...]:
    return (hint, *typing.get_args(hint))


def _first_sentences(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(
        line for line in lines if line and not line.startswith(("Config search path", "provider=", "Set the"))
    )
