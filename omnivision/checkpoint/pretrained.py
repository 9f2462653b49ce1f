"""Select, load and report pretrained weights.

A source is a run directory (its best checkpoint, else its newest), a checkpoint, a bare state dict, or a safetensors file. A
filter (`trainer/checkpoint=...`) keeps, drops, renames or prefixes entries by shell pattern; `load_filtered` puts the rest into
the model, reports what was loaded, dropped, missing and resized, and fails if it covers less of the trunk than declared.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from omnivision.checkpoint.inference_config import distinct_names
from omnivision.checkpoint.state_dict_file import StateDictFile, check_numbers
from omnivision.config.schema import WeightFilter
from omnivision.models.architecture import architecture_of
from omnivision.models.patches import Triple, resized_positions, token_grid
from omnivision.utils.errors import UserError, truncate_list

SETTING = "pretrained_checkpoint_path"
# Parts of a trunk other than its RGB encoder.
NON_ENCODER_PREFIXES = ("trunk.decoder.", "trunk.mask_token", "trunk.depth_patch_embed.")
BLOCKS = {"trunk": "trunk.blocks.", "decoder": "trunk.decoder.decoder_blocks."}
# An average has `model.` before the names of its classifier, a grid of probes the number of the probe.
HEAD = re.compile(r"(?:model\.|probes\.\d+\.)?heads\.(\d+)\.0\.")
POSITIONS = ("trunk.pos_embed", "trunk.decoder.pos_embed")
NO_PLACE = "not in this model"
T = TypeVar("T")


@dataclass
class LoadReport:
    """Outcome per entry: names; {name: reason} of `dropped`, {name: "grid -> grid"} of `resized`."""

    path: str
    sha256: str
    checkpoint: str = ""  # its epoch and metrics
    choice: dict[str, Any] = field(default_factory=dict)  # the WeightFilter
    loaded: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)  # how heads were matched by class names
    resized: dict[str, str] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """Return what a resumed average must match."""
        return {"path": str(Path(self.path).absolute()), "sha256": self.sha256, "choice": self.choice}

    def lines(self) -> list[str]:
        """Return a table to print: for each outcome, how many entries had it, and the first names."""
        rows = {
            "loaded": self.loaded,
            "dropped": [f"{name} ({why})" for name, why in self.dropped.items()],
            "missing": self.missing,
            "resized": [f"{name} ({how})" for name, how in self.resized.items()],
        }
        checkpoint = f" ({self.checkpoint})" if self.checkpoint else ""
        return [
            f"Weights from {self.path}{checkpoint}",
            *(f"  {outcome:8} {len(names):4}  {truncate_list(names, 3)}" for outcome, names in rows.items()),
            *(f"  classes: {line}" for line in self.classes),
        ]


@contextlib.contextmanager
def name_setting() -> Iterator[None]:
    """Prefix errors with the setting that names the weights."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{SETTING}: {error}") from None


def filter_state_dict(state: Mapping[str, T], choice: WeightFilter, report: LoadReport) -> dict[str, T]:
    """Apply a filter to the entries of a state dict; `report` gets the filter and what was dropped.

    Raises UserError for a pattern that matches nothing, and for a filter that keeps nothing.
    """

    def match(pattern: str, option: str) -> list[str]:
        if names := fnmatch.filter(entries, pattern):
            return names
        raise UserError(
            f"trainer.checkpoint.{option}: {pattern!r} must match an entry of {report.path} ({truncate_list(entries)}). "
            "Correct or remove it."
        )

    report.choice = choice.model_dump(include=set(WeightFilter.model_fields))
    entries = dict(state)
    if choice.keep is not None:
        kept = {name for pattern in choice.keep for name in match(pattern, "keep")}
        report.dropped |= {name: "not kept" for name in entries if name not in kept}
    for pattern in choice.drop:
        report.dropped |= dict.fromkeys(match(pattern, "drop"), pattern)
    for pattern in choice.drop_if_present:
        report.dropped |= dict.fromkeys(fnmatch.filter(entries, pattern), pattern)
    entries = {name: entry for name, entry in entries.items() if name not in report.dropped}
    for old, new in choice.rename.items():
        for name in match(old, "rename"):
            entry = entries.pop(name)
            rest = name[len(old) - 1 :] if old.endswith("*") else ""
            entries |= {n.removesuffix("*") + rest: entry for n in ([new] if isinstance(new, str) else new)}
    if not entries:
        raise UserError(
            f"trainer.checkpoint keeps none of the {len(state)} entries of {report.path} ({truncate_list(state)}). Set "
            "trainer/checkpoint, or its keep and drop."
        )
    return {choice.prefix + name: entry for name, entry in entries.items()}


def load_filtered(
    model: nn.Module, weights: StateDictFile, choice: WeightFilter, class_names: Sequence[Sequence[str]] = ()
) -> LoadReport:
    """Load filtered `weights` into a model; positional embeddings for another token grid are interpolated.

    `class_names`: one list per head, numbers if unnamed; heads are matched by them (`match_heads`).

    Raises UserError, with the model unchanged, when a tensor does not fit, when a head has other classes, or when less of the
    trunk is covered than the filter declares.
    """
    report = LoadReport(str(weights.path), weights.sha256, weights.checkpoint)
    entries = filter_state_dict({name: name for name in weights.state}, choice, report)  # {new name: name in the file}
    chosen, model_state = {new: weights.state[old] for new, old in entries.items()}, model.state_dict()
    file_classes: dict[int, list[str] | None] = {}
    inference = weights.inference
    for new, old in entries.items():
        if (head := head_of(new)) >= 0:
            names = inference.names(head_of(old))  # a filter may rename heads
            file_classes[head] = names if names and chosen[new].shape[:1] == (len(names),) else None
    chosen, unused = match_heads(chosen, file_classes, class_names, report)
    _check_blocks(model, weights, chosen)
    report.dropped |= dict.fromkeys([*unused, *(name for name in chosen if name not in model_state)], NO_PLACE)
    chosen = {name: tensor for name, tensor in chosen.items() if name in model_state}
    for name in POSITIONS:
        if name in chosen:
            chosen[name] = interpolate_pos_embed(name, chosen[name], model, weights, report)
    if wrong := [name for name, tensor in chosen.items() if tensor.shape != model_state[name].shape]:
        shapes = (f"{name} {tuple(model_state[name].shape)}, got {tuple(chosen[name].shape)}" for name in wrong)
        raise UserError(
            f"Shapes in {report.path} must match this model's: {truncate_list(shapes, separator='; ')}. Set "
            f"trainer/model or {SETTING}, or trainer/checkpoint=no_heads (new heads) or no_heads_no_decoder (a new "
            "decoder, too)."
        )
    check_numbers(chosen, f"{SETTING}: {report.path}: ")
    report.loaded = sorted(chosen)
    report.missing = sorted(set(model_state) - set(chosen))
    _check_coverage(model_state, report, choice)
    model.load_state_dict(chosen, strict=False)
    return report


def head_of(name: str) -> int:
    """Return the number of the class head that an entry belongs to; -1 for other entries."""
    match = HEAD.match(name)
    return int(match[1]) if match else -1


def match_heads(
    state: Mapping[str, Tensor],
    file_classes: Mapping[int, list[str] | None],
    model_classes: Sequence[Sequence[str]],
    report: LoadReport,
) -> tuple[dict[str, Tensor], list[str]]:
    """Match heads by class names and reorder their rows.

    Args:
        file_classes: class names by head of `state`, None where unknown.
        model_classes: class names by head of the model. Where one side has no names, heads are matched by number.

    Returns the state without unused heads, and the names of their entries. Raises UserError for a head with as many classes but
    other names.
    """
    if not model_classes:
        return dict(state), []
    heads = {head: {name: t for name, t in state.items() if head_of(name) == head} for head in file_classes}
    matched = {name: tensor for name, tensor in state.items() if head_of(name) not in heads}
    unused = set(heads)
    for head, names in enumerate(model_classes):
        model_names = distinct_names(names)
        same = [k for k in (head, *heads) if model_names and set(file_classes.get(k) or []) == set(model_names)]
        source = same[0] if same else head
        if source not in heads:
            continue
        unused.discard(source)
        given, rows = file_classes[source], None
        if model_names is None or given is None:
            side = "this run" if given else "the file"
            report.classes.append(f"{side} has no class names of head {head}; their order is not checked")
        elif same:
            rows = [given.index(name) for name in model_names]
            if source != head or given != model_names:
                report.classes.append(
                    f"head {head} takes the rows of head {source} of {report.path} by their class names"
                )
        elif len(model_names) == len(given):
            raise UserError(
                f"Head {head} of {report.path} must have the classes of this run, got "
                f"{truncate_list(sorted(set(given) - set(model_names)))} instead of "
                f"{truncate_list(sorted(set(model_names) - set(given)))}. Set datasets.NAME.class_names, or "
                "trainer/checkpoint=no_heads for a new head."
            )
        for name, tensor in heads[source].items():
            matched[name.replace(f"heads.{source}.", f"heads.{head}.", 1)] = tensor if rows is None else tensor[rows]
    return matched, [name for head in heads if head in unused for name in heads[head]]


def interpolate_pos_embed(
    name: str, table: Tensor, model: nn.Module, weights: StateDictFile, report: LoadReport
) -> Tensor:
    """Return a positional embedding (1, N, D) for the model's token grid, interpolated from the file's.

    A table of another width is returned unchanged.
    """
    trunk: Any = model.trunk
    if table.ndim != 3 or table.shape[-1] != model.state_dict()[name].shape[-1]:
        return table
    old = _grid_of(weights, table.shape[1], trunk.grid)
    if old == trunk.grid:
        return table
    report.resized[name] = f"{'x'.join(map(str, old))} -> {'x'.join(map(str, trunk.grid))}"
    return resized_positions(table.float(), old, trunk.grid)


def _grid_of(weights: StateDictFile, tokens: int, grid: Triple) -> Triple:
    """Return the token grid (T', H', W') in the file, else the grid nearest to `grid` with that many tokens."""
    slots, height, width = grid
    side = round((tokens / slots) ** 0.5)
    # The same grid; the same number of frames, square; the same size, another number of frames.
    candidates = [grid, (slots, side, side), (tokens // (height * width), height, width)]
    if trunk := weights.architecture.get("trunk"):
        try:
            size = trunk["image_size"]
            candidates = [token_grid((trunk["num_frames"], size, size), tuple(trunk["tubelet"]))]
        except (KeyError, TypeError, ValueError):  # UserError is one
            candidates = []
    for candidate in candidates:
        if math.prod(candidate) == tokens > 0:
            return candidate
    wanted = f"{slots} time slots or for {height} x {width} tokens per slot"
    raise UserError(
        f"{weights.path} must have positions for {'the clip in its architecture' if trunk else wanted}, got {tokens}. "
        f"Set num_frames or image_size, or another {SETTING}."
    )


def _check_blocks(model: nn.Module, weights: StateDictFile, chosen: Mapping[str, Tensor]) -> None:
    """Raise UserError if the depth or attention heads differ, which shapes do not show.

    A trunk may be deeper than the file; `_check_coverage` reports its missing blocks.
    """
    model_state, architecture = model.state_dict(), architecture_of(model)
    for part, prefix in BLOCKS.items():
        model_blocks, file_blocks = (
            {n.split(".")[prefix.count(".")] for n in names if n.startswith(prefix)} for names in (model_state, chosen)
        )
        in_file = weights.architecture.get(part)
        heads = in_file.get("heads") if isinstance(in_file, Mapping) else None
        settings = []
        if model_blocks and (
            file_blocks - model_blocks or (part == "decoder" and file_blocks and model_blocks - file_blocks)
        ):
            settings.append(f"depth={len(file_blocks)}")
        if file_blocks and part in architecture and heads not in (None, architecture[part]["heads"]):
            settings.append(f"heads={heads}")
        if settings:
            raise UserError(
                f"The {part} of this model must have the depth and attention heads of {weights.path}. Set "
                f"{' '.join(f'trainer.model.{part}.{setting}' for setting in settings)}, {SETTING}, or "
                "trainer/checkpoint=no_heads_no_decoder for only the trunk."
            )


def _check_coverage(model_state: Mapping[str, Tensor], report: LoadReport, choice: WeightFilter) -> None:
    """Raise UserError if less of the trunk's encoder is covered than declared, or if a strict filter leaves differences."""
    trunk = [name for name in model_state if name.startswith("trunk.") and not name.startswith(NON_ENCODER_PREFIXES)]
    trunk = [name for name in trunk if name not in POSITIONS]
    absent = [name for name in trunk if name in report.missing]
    unplaced = [name for name, why in report.dropped.items() if why == NO_PLACE]
    problem = ""
    if not report.loaded or len(trunk) - len(absent) < choice.trunk_coverage * len(trunk):
        problem = (
            f"has {len(trunk) - len(absent)} of the {len(trunk)} tensors of the trunk; trainer.checkpoint.trunk_coverage is "
            f"{choice.trunk_coverage:g}"
        )
    elif choice.strict and (report.missing or unplaced):
        problem = "must have exactly the entries of this model (trainer.checkpoint.strict is true)"
    if problem:
        raise UserError(
            f"{report.path} {problem}. Missing: {truncate_list(absent or report.missing) or 'none'}; {NO_PLACE}: "
            f"{truncate_list(unplaced) or 'none'}. Convert names of other projects with `omnivision import {report.path} "
            f"OUT.pt`, or set {SETTING}, trainer/model or trainer/checkpoint."
        )
