"""Fingerprint of an experiment: its settings, data and code. Checkpoints hold it, and a resumed run must match it."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from omnivision.data.catalog import Split
from omnivision.data.sampling import EpochPlan
from omnivision.utils.errors import UserError

# Settings that do not affect results, by shell patterns. The clips of a step and the contents of arrays follow from some of
# them, and are compared themselves.
RUNTIME_ONLY_SETTINGS = (
    "stage",
    "launcher.*",
    "submitit.*",
    "data_root",
    "datasets.*.prefix",
    "datasets.*.remove_prefix",
    "datasets.*.suffix",
    "datasets.*.remove_suffix",
    "datasets.*.train.*",
    "datasets.*.val.*",
    "batch_size",
    "num_workers",
    "trainer.mode",
    "trainer.accelerator",
    "trainer.compile",
    "trainer.model.*.activation_checkpointing",
    "trainer.val_epoch_freq",
    "trainer.max_skipped_steps",
    "trainer.optim.nominal_batch",
    "trainer.data.batch_size",
    "trainer.data.image.batch_size",
    "trainer.data.num_workers",
    "trainer.data.prefetch",
    "trainer.data.timeout_minutes",
    "trainer.data.bad_sample_budget",
    "trainer.optim.accumulation_steps",
    "trainer.data.image.accumulation_steps",
    "trainer.distributed.*",
    "trainer.logging.*",
    "trainer.checkpoint.save_*",
    "trainer.checkpoint.allow_changes",
)
SETTINGS_OF_ONE_START = ("trainer.mode", "trainer.checkpoint.allow_changes")
# Settings that older runs lack, with the values that those runs had.
ADDED = {
    "crop_scale": [0.08, 1.0],
    "rand_augment_prob": 0.5,
    "erasing_prob": 0.25,
    "mixing_prob": 1.0,
    "trainer.data.view.scale": [0.08, 1.0],
}
# Classes that were renamed since runs were made with them.
RENAMED_TARGETS = {"omnivision.data.mixing.Mixing": "omnivision.data.mixing.MixupCutmix"}
REFERENCE = re.compile(r"\$\{([\w.]+)\}")
LIBRARIES = ("torch", "torchvision", "timm", "av", "numpy")
MAX_LISTED_CHANGES = 6
WHOLE_BYTES = 64 << 20  # read of a file; of a larger one, in pieces spread over it
PIECE_BYTES = 1 << 20


def fingerprint(
    config_text: str,
    values: Mapping[str, Any],
    splits: Iterable[Split],
    plan: EpochPlan | None,
    inference: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What identifies an experiment, of values that JSON has. `config_text` is the configuration, interpolations unresolved;
    `values` are the settings that it gave, flat. `inference` is for those who show its model other films (`omnivision.load`).
    """
    return {
        "inference": dict(inference or {}),
        "settings": {name: _written_setting(raw, values.get(name)) for name, raw in flat_text(config_text).items()},
        "clips of a step": {} if plan is None else {name: source.clips for name, source in plan.sources.items()},
        "data": {
            f"datasets.{split.name}.{split.which}.{what}": file_digest(Path(file))
            for split in splits
            for what, file in split.files().items()
        },
        "versions": versions(),
    }


def _written_setting(raw: Any, value: Any) -> Any:
    """A setting as written; one from the environment with a digest of its value, which may be a secret."""
    if "oc.env" in str(raw):
        return f"{raw} (SHA-256 {hashlib.sha256(repr(value).encode()).hexdigest()[:12]})"
    return raw


def diff_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between two flat configurations: what makes another experiment, and the rest.

    Catalog entries that the run does not use are left out, and what is asked of this start alone.
    """
    used = {name: value for name, value in used_settings({**then, **now}).items() if name not in SETTINGS_OF_ONE_START}
    altering: list[str] = []
    others: list[str] = []
    then = {name: value for name, value in ADDED.items() if name in now} | dict(then)
    then, now = (
        {name: RENAMED_TARGETS.get(v, v) if isinstance(v, str) else v for name, v in settings.items()}
        for settings in (then, now)
    )
    for change, name in changes(then, now):
        # What is only written in another way: what a reference leads to is compared under its own name.
        if name in used and _referred(then, name) != _referred(now, name):
            harmless = any(fnmatch.fnmatchcase(name, pattern) for pattern in RUNTIME_ONLY_SETTINGS)
            (others if harmless else altering).append(change)
    return altering, others


def used_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings without the catalog entries of datasets that are no source of the run."""
    sources = {name.split(".")[3] for name in settings if name.startswith("trainer.data.sources.")}
    return {
        name: value
        for name, value in settings.items()
        if not name.startswith("datasets.") or name.split(".")[1] in sources
    }


def _referred(settings: Mapping[str, Any], name: str) -> Any:
    """The value of a setting; of one that is a plain reference (`${epochs}`), that of the setting it leads to."""
    value, seen = settings.get(name), {name}
    while isinstance(value, str) and (reference := REFERENCE.fullmatch(value)) and reference[1] not in seen:
        if reference[1] not in settings:  # a whole section, or one that does not exist
            return value
        seen.add(reference[1])
        value = settings[reference[1]]
    return value


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Sentences of the kind "name: then -> now": what makes another experiment, and what else has changed.

    `then` and `now` are `fingerprint`.
    """
    altering, others = diff_settings(then["settings"], now["settings"])
    for part, prefix in (("clips of a step", "clips of a step of "), ("data", "")):
        # What only one of them has goes with a setting: a source, or whether the run validates. Of a split that both have,
        # all arrays count: one may have got segments.
        both = then[part].keys() & now[part].keys()
        splits = {name.rpartition(".")[0] for name in both if part == "data"}
        both |= {name for name in then[part].keys() | now[part].keys() if name.rpartition(".")[0] in splits}
        found = changes(*({name: facts[part].get(name) for name in sorted(both)} for facts in (then, now)))
        altering += [f"{prefix}{change}" for change, _ in found]
    others += [change for change, _ in changes(then["versions"], now["versions"])]
    return altering, others


def class_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Sentences about classes whose names differ, of `fingerprint`; a resumed head would predict the wrong ones."""
    names = [_names(facts) for facts in (then, now)]
    both = names[0].keys() & names[1].keys()
    return [change for change, _ in changes(*({name: of[name] for name in sorted(both)} for of in names))]


def _names(facts: Mapping[str, Any]) -> dict[str, str]:
    """The class names of an experiment, by head and label; of heads without names, nothing."""
    said = facts.get("inference")
    heads = class_names(said) if isinstance(said, Mapping) else []
    return {
        f"class {label} of head {head}": name
        for head, names in enumerate(heads)
        for label, name in enumerate(names or [])
    }


def changed_settings(file: Path, text: str) -> list[str]:
    """How a configuration differs from the one in `file`: "name: then -> now" for each setting."""
    then = flat_file(file)
    if then is None:
        return ["what it had cannot be read from its config.yaml"]
    return [change for change, _ in changes(then, flat_text(text))]


def check_same_settings(file: Path, text: str) -> None:
    """Raises UserError when a configuration differs in its results from the one in `file`, the `config.yaml` of a run.

    An unreadable file is ignored; the checkpoint is compared later.
    """
    then = flat_file(file)
    altering, _ = diff_settings(then, flat_text(text)) if then is not None else ([], [])
    if altering:
        raise UserError(mismatch_message(str(file.parent), altering))


def mismatch_message(what: str, altering: Sequence[str]) -> str:
    """Message about a run that belongs to another experiment."""
    return (
        f"{what} belongs to another experiment: {truncate_list(altering)}. Set these back, start a new run in another "
        "launcher.experiment_log_dir, or set trainer.checkpoint.allow_changes=true to resume anyway."
    )


def truncate_list(changes: Sequence[str]) -> str:
    """Join the first changes, each truncated."""
    shown = [change if len(change) <= 200 else f"{change[:200]}..." for change in changes[:MAX_LISTED_CHANGES]]
    more = len(changes) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def flat_text(text: str) -> dict[str, Any]:
    """Parse YAML to a flat configuration, interpolations unresolved."""
    return flat(yaml.safe_load(text))


def flat_file(file: Path) -> dict[str, Any] | None:
    """The flat configuration in a file, which may come from anywhere; None if it cannot be read."""
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if "*" in text and any(
            isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)
        ):
            return None  # no run writes such, and a few of them can stand for billions
        return {
            name: value if _is_shown(value) else "a number beyond all bounds" for name, value in flat_text(text).items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError, RecursionError):
        return None


def _is_shown(value: Any) -> bool:
    return not isinstance(value, int) or abs(value) < 10**100  # Python refuses to write down longer ones


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Sentences about entries that differ, each with its name."""
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return [(f"{name}: {then.get(name)} -> {now.get(name)}", name) for name in names]


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings as one, with names like trainer.optim.gradient_clip."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: v for k, part in value.items() for key, v in flat(part, f"{name}.{k}" if name else str(k)).items()}


def file_digest(file: Path) -> str:
    """Size and SHA-256 of a file; of a large one, of pieces spread over it, so that ten million paths cost no more."""
    size, digest = file.stat().st_size, hashlib.sha256()
    count = WHOLE_BYTES // PIECE_BYTES
    with open(file, "rb") as opened:
        if size <= WHOLE_BYTES:
            digest.update(opened.read())
        else:
            for piece in range(count):
                opened.seek((size - PIECE_BYTES) * piece // (count - 1))
                digest.update(opened.read(PIECE_BYTES))
    return f"{size} bytes, SHA-256 {digest.hexdigest()}"


@functools.cache
def git_commit() -> str | None:
    """The commit of this checkout, with "-dirty" where tracked files were changed; None outside a checkout and without git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # not that of a repository whose virtual environment this is installed in
        return None
    command = "git --no-optional-locks describe --always --dirty --abbrev=12 --exclude=*".split()
    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    try:
        found = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions of Python, of the libraries that compute, and of this code: a digest of its files, and its commit."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(os.fsencode(file.relative_to(package)) + file.read_bytes())
    installed = {name: importlib.metadata.version(name) for name in LIBRARIES}
    commit = {} if (known := git_commit()) is None else {"git commit": known}
    return {"omnivision": digest.hexdigest()[:12], "python": platform.python_version()} | installed | commit


def to_json(experiment: Mapping[str, Any]) -> str:
    """Serialize a fingerprint for a checkpoint."""
    return json.dumps(experiment, default=str)


def inference(said: Any) -> Mapping[str, Any]:
    """What a file of weights says of how films are shown to its model; nothing else is believed of it than plain values."""
    if not isinstance(said, Mapping):
        return {}
    found = said.get("inference", (read(said.get("experiment")) or {}).get("inference"))
    return found if isinstance(found, Mapping) else {}


def class_names(inference: Mapping[str, Any]) -> list[list[str] | None]:
    """The class names of each head in what a file says of its model (`inference`), see `valid_names`."""
    heads = inference.get("class_names")
    return [valid_names(names) for names in heads] if isinstance(heads, list) else []


def valid_names(names: Any) -> list[str] | None:
    """Names of classes, all different; None for anything else, and for the numbers that stand in for names."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return None if len(set(names)) < len(names) or names == [str(label) for label in range(len(names))] else names


def read(text: Any) -> dict[str, Any] | None:
    """`fingerprint` from the text in a checkpoint, which may come from anywhere; None when it is none."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    parts = ("settings", "clips of a step", "data", "versions")
    whole = isinstance(found, dict) and all(isinstance(found.get(part), dict) for part in parts)
    return found if whole else None
