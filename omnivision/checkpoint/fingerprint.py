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

from omnivision.config.flat import describe_changes, flatten_yaml, read_flat_file, resolve_reference, used_settings
from omnivision.config.schema import runtime_only_settings
from omnivision.data.catalog import Split
from omnivision.data.sampling import EpochPlan
from omnivision.utils.errors import UserError, truncate_list

# Settings that do not affect results, as shell patterns. Clips per step and array contents are compared separately.
RUNTIME_ONLY_SETTINGS = (*runtime_only_settings(), "trainer.model.*.activation_checkpointing")
SETTINGS_OF_ONE_ATTEMPT = ("trainer.mode", "trainer.checkpoint.allow_changes")
# Settings that older runs lack, with the values that those runs had.
DEFAULTS_OF_OLDER_RUNS = {"crop_scale": [0.08, 1.0], "rand_augment_prob": 0.5, "erasing_prob": 0.25, "mixing_prob": 1.0}
DEFAULTS_OF_OLDER_RUNS["trainer.data.view.scale"] = DEFAULTS_OF_OLDER_RUNS["crop_scale"]
DEFAULTS_OF_OLDER_RUNS |= {"trainer.data.hold_out": 0, "trainer.data.balance": 0, "trainer.online_eval.sources": []}
DEFAULTS_OF_OLDER_RUNS |= {"trainer.online_eval.every_epochs": 5, "trainer.online_eval.limit": 2000}
DEFAULTS_OF_OLDER_RUNS["trainer.online_eval.methods"] = ["knn", "logistic", "rankme"]
# Classes that have been renamed: earlier runs have the old name.
RENAMED_TARGETS = {"omnivision.data.mixing.Mixing": "omnivision.data.mixing.MixupCutmix"}
LIBRARIES = ("torch", "torchvision", "timm", "av", "numpy")
WHOLE_BYTES = 64 << 20  # larger files are hashed in pieces that add up to this
PIECE_BYTES = 1 << 20


def fingerprint(
    config_text: str,
    values: Mapping[str, Any],
    splits: Iterable[Split],
    plan: EpochPlan | None,
    inference: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what identifies an experiment, as JSON values.

    Args:
        config_text: the configuration as YAML, interpolations unresolved.
        values: the flat settings that it resolves to.
        inference: how to prepare videos for the model (`omnivision.load`).
    """
    settings = flatten_yaml(config_text)
    for name, raw in settings.items():
        if "oc.env" in str(raw):  # record a digest of its value, which may be a secret
            settings[name] = f"{raw} (SHA-256 {hashlib.sha256(repr(values.get(name)).encode()).hexdigest()[:12]})"
    return {
        "inference": dict(inference or {}),
        "settings": settings,
        "clips of a step": {}
        if plan is None
        else {name: source.clips_per_step for name, source in plan.sources.items()},
        "data": {
            f"datasets.{split.name}.{split.which}.{array}": file_digest(Path(file))
            for split in splits
            for array, file in split.files().items()
        },
        "versions": collect_versions(),
    }


def classify_setting_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return (changes that affect results, other changes) between two flat configurations.

    Catalog entries the run does not use, and settings that apply to one attempt, are left out.
    """
    saved = {name: value for name, value in DEFAULTS_OF_OLDER_RUNS.items() if name in current} | dict(saved)
    saved, current = (
        {name: RENAMED_TARGETS.get(v, v) if isinstance(v, str) else v for name, v in settings.items()}
        for settings in (saved, current)
    )
    used = used_settings({**saved, **current}).keys() - set(SETTINGS_OF_ONE_ATTEMPT)
    altering: list[str] = []
    others: list[str] = []
    for name, change in describe_changes(saved, current).items():
        # Skip a reference written in another way: the setting it leads to is compared under its own name.
        if name in used and resolve_reference(saved, name) != resolve_reference(current, name):
            harmless = any(fnmatch.fnmatchcase(name, pattern) for pattern in RUNTIME_ONLY_SETTINGS)
            (others if harmless else altering).append(change)
    return altering, others


def classify_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return (changes that affect results, other changes), as "name: saved -> current", between two fingerprints."""
    altering, others = classify_setting_changes(saved["settings"], current["settings"])
    # Skip sources and splits in only one of the two: a setting shows that.
    clips = describe_changes(saved["clips of a step"], current["clips of a step"], group=lambda name: name)
    data = describe_changes(saved["data"], current["data"], group=lambda name: name.rpartition(".")[0])
    altering += [f"clips of a step of {change}" for change in clips.values()]
    altering += map(shorten_hashes, data.values())
    return altering, others + list(describe_changes(saved["versions"], current["versions"]).values())


def shorten_hashes(text: str) -> str:
    """Truncate each SHA-256 in a message to 12 digits."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", text)


def list_changes_since(file: Path, text: str) -> list[str]:
    """Return the changes "name: saved -> current" from the configuration in `file` to `text`."""
    saved = read_flat_file(file)
    return [f"{file} cannot be read"] if saved is None else list(describe_changes(saved, flatten_yaml(text)).values())


def check_same_settings(file: Path, text: str) -> None:
    """Raise UserError for changes that affect results since `file`, the `config.yaml` of a run.

    An unreadable file is ignored; the checkpoint is compared later.
    """
    saved = read_flat_file(file)
    altering, _ = classify_setting_changes(saved, flatten_yaml(text)) if saved is not None else ([], [])
    if altering:
        raise UserError(mismatch_message(str(file.parent), altering))


def mismatch_message(what: str, altering: Sequence[str]) -> str:
    """Return the message about a run that belongs to another experiment."""
    return (
        f"{what} belongs to another experiment: {truncate_list(altering, separator='; ')}. Set these back, start a new run "
        "in another launcher.experiment_log_dir, or set trainer.checkpoint.allow_changes=true to resume anyway."
    )


def file_digest(file: Path) -> str:
    """Return the size and SHA-256 of a file. For a large file, only pieces spread over it are hashed, to bound the time."""
    size = file.stat().st_size
    digest = hashlib.sha256()
    count = WHOLE_BYTES // PIECE_BYTES
    with open(file, "rb") as opened:
        for piece in range(count if size > WHOLE_BYTES else 1):
            opened.seek((size - PIECE_BYTES) * piece // (count - 1) if piece else 0)
            digest.update(opened.read(PIECE_BYTES if size > WHOLE_BYTES else -1))
    return f"{size} bytes, SHA-256 {digest.hexdigest()}"


@functools.cache
def git_commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" if tracked files were changed; None without a checkout or git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # ignore a repository that merely contains the virtual environment
        return None
    command = "git --no-optional-locks describe --always --dirty --abbrev=12 --exclude=*".split()
    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    try:
        result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def collect_versions() -> dict[str, str]:
    """Return the versions of Python, of the numerical libraries, and of this code: a digest of its files, and its commit."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(os.fsencode(file.relative_to(package)) + file.read_bytes())
    installed = {name: importlib.metadata.version(name) for name in LIBRARIES}
    commit = {} if (known := git_commit()) is None else {"git commit": known}
    return {"omnivision": digest.hexdigest()[:12], "python": platform.python_version()} | installed | commit


def parse_fingerprint(text: Any) -> dict[str, Any] | None:
    """Parse the fingerprint in a checkpoint; None if it is missing or invalid."""
    try:
        parsed = json.loads(text)
        complete = all(isinstance(parsed[part], dict) for part in ("settings", "clips of a step", "data", "versions"))
    except (TypeError, ValueError, LookupError, RecursionError):
        return None
    return parsed if complete else None
