"""What `train_app_submitit.py --help` prints, read off the configuration folder. (Hydra's own help takes seconds.)"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from omnivision.config.targets import SUPPLIED, described_arguments, signature_of

HEADER = """\
omnivision: video models by the PPMA recipe.

A run is an experiment (a stage of the recipe), a recipe for a dataset, and settings:

  python train_app_submitit.py +experiments=omnimae/omnimain_train_video.yaml +trainer=mae_k150_config.yaml \\
    trainer/model=vitbase ++batch_size=16 ++launcher.experiment_log_dir=FOLDER submitit.use_cluster=false

  --cfg job           print the composed settings
  trainer.mode=dry    say what would stop the run (exit code 1), and what it would be
  --hydra-help        Hydra's own flags (-m for sweeps, --config-dir for settings of a site, ...)

Running the same command again resumes the run in its folder.
"""

GROUPS = {
    "+experiments=": ("experiments", ("omnimae", "demo")),
    "+trainer=": ("trainer", ("",)),
    "trainer/model=": ("trainer/model", ("",)),
    "trainer/data=": ("trainer/data", ("",)),
    "trainer/task=": ("trainer/task", ("",)),
    "trainer/optim=": ("trainer/optim", ("",)),
    "trainer/checkpoint=": ("trainer/checkpoint", ("",)),
}
PARTS = ("trainer/model", "trainer/data", "trainer/task", "trainer/optim")
# Arguments that are no settings: other settings give them.
GIVEN = (*SUPPLIED, "params", "**", "lr", "weight_decay")


@dataclass(frozen=True)
class Part:
    """An object that config files describe; `settings` are rows of name, type, value and meaning."""

    name: str
    target: str
    choice: str
    settings: list[tuple[str, str, str, str]]


def usage(config: Path) -> str:
    """Header, the choices of each group, and every setting with its default and meaning."""
    lines = [HEADER]
    for option, (group, folders) in GROUPS.items():
        names = [
            file.relative_to(config / group).with_suffix("").as_posix()
            for folder in folders
            for file in sorted((config / group / folder).glob("*.yaml"))
        ]
        lines.append(f"{option}\n  " + "\n  ".join(names))
    settings = (config / "experiments" / "base.yaml").read_text(encoding="utf-8").splitlines()
    lines.append("\nSettings (KEY=VALUE; ++KEY=VALUE also sets what is not there yet)\n")
    lines += [f"  {line}" for line in settings[6:]]
    catalog = (config / "experiments" / "dataset_catalog.yaml").read_text(encoding="utf-8")
    lines.append("\nThe catalog\n")
    lines += [f"  {line}" for line in catalog.partition("\n\n")[0].splitlines()[1:]]
    lines.append(
        "\nSettings of the objects that a run builds, as the choice in brackets has them (a run's own: --cfg job)\n"
    )
    for part in parts(config):
        lines.append(f"  {part.name}: {part.target} ({part.choice})")
        lines += [
            f"    {name}: {value} # {kind}{meaning and f'; {meaning}'}" for name, kind, value, meaning in part.settings
        ]
    return "\n".join(lines)


def parts(config: Path) -> list[Part]:
    """Every object of the config files, each class once in each place, with all arguments that it takes."""
    found: dict[tuple[str, str], Part] = {}
    for group in PARTS:
        for file in sorted(
            (config / group).glob("*.yaml"), key=lambda file: ("demo" in file.stem, "base" not in file.stem, file.name)
        ):
            for name, node in _objects(_load(file), group.replace("/", ".")):
                key = name, node["_target_"]
                if key not in found:
                    found[key] = Part(*key, f"{group}={file.stem}", _settings(name, node))
    return sorted(found.values(), key=lambda part: part.name)


def _settings(name: str, node: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    target = node["_target_"]
    own = target.startswith("omnivision.")  # other signatures differ between versions of their packages
    signature, meanings = (signature_of(target) if own else None) or {}, described_arguments(target)
    rows = []
    for key in [each for each in {**signature, **node} if each not in (*GIVEN, "_target_")]:
        value = node[key] if key in node else None
        if isinstance(value, dict) and "_target_" not in value:
            rows += [(f"{name}.{key}.{k}", type(v).__name__, _as_yaml(str(v)), "") for k, v in value.items()]
        elif not isinstance(value, dict):
            kind = signature[key].annotation if key in signature else type(value).__name__
            text = _as_yaml(str(value) if key in node else signature[key].default)
            rows.append((f"{name}.{key}", kind, text, meanings.get(key, "").removesuffix(".")))
    return rows


def _as_yaml(text: str) -> str:
    """A Python value as configurations have it."""
    known = {"None": "null", "True": "true", "False": "false"}
    return f"[{text[1:-1]}]" if text.startswith("(") else known.get(text, text)


def _objects(node: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping with `_target_` in a configuration, with its full name."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield name, node
        for key, value in node.items():
            yield from _objects(value, f"{name}.{key}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _objects(value, f"{name}.{number}")


@functools.cache
def _load(file: Path) -> dict[str, Any]:
    """A config file on top of the files of its own group that its defaults name."""
    own = yaml.safe_load(file.read_text(encoding="utf-8"))
    merged: dict[str, Any] = {}
    for entry in own.pop("defaults", []):
        if entry != "_self_":
            merged = _merge(merged, _load(file.parent / f"{entry.partition('@')[0]}.yaml"))
    return _merge(merged, own)


def _merge(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _merge(below.get(key), value) for key, value in above.items()}
