"""Pretrained weights: which entries a stage takes, loading them, and what became of each.

A source is a run directory (its best checkpoint, else its newest), a checkpoint, a bare state dict, or a safetensors file. A
filter (`trainer/checkpoint=...`) keeps, drops, renames or prefixes entries by shell pattern; `load` puts the rest into the
model, reports what was loaded, dropped, missing and resized, and fails if it covers less of the trunk than declared.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from omnivision.checkpoint import state_dict_file
from omnivision.checkpoint.fingerprint import valid_names
from omnivision.checkpoint.state_dict_file import StateDictFile, check_numbers
from omnivision.models.architecture import describe
from omnivision.models.patches import Triple, resized_positions, token_grid
from omnivision.utils.errors import UserError
from omnivision.utils.io import require_weights

SETTING = "pretrained_checkpoint_path"
# Parts of a trunk other than its RGB encoder.
BESIDE_THE_ENCODER = ("trunk.decoder.", "trunk.mask_token", "trunk.depth_patch_embed.")
HEAD = re.compile(r"heads\.(\d+)\.")
POSITIONS = ("trunk.pos_embed", "trunk.decoder.pos_embed")
NO_PLACE = "no place in this model"


@dataclass(frozen=True)
class WeightFilter:
    """Which entries of a state dict a stage takes, by shell patterns over their names.

    Args:
        keep: take only these; None takes all. Each pattern must match something.
        drop: leave these out; each pattern must match something.
        drop_if_present: leave these out, if any.
        rename: {old: new} or {old: [new, new]}; a trailing `*` is the rest of the name on both sides.
        prefix: put before every name, last of all.
        strict: every entry must have a place in the model, and every entry of the model must be loaded.
        trunk_coverage: share of the trunk's encoder tensors that must be loaded.
    """

    keep: Sequence[str] | None = None
    drop: Sequence[str] = ()
    drop_if_present: Sequence[str] = ()
    rename: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    prefix: str = ""
    strict: bool = False
    trunk_coverage: float = 1.0


@dataclass
class LoadReport:
    """What became of each entry: names; {name: reason} of `dropped`, {name: "grid -> grid"} of `resized`."""

    path: str
    sha256: str
    checkpoint: str = ""  # its epoch and metrics
    choice: dict[str, Any] = field(default_factory=dict)  # the WeightFilter
    loaded: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)  # how heads were matched by class names
    resized: dict[str, str] = field(default_factory=dict)

    def note(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the weights of its model, to find the same again."""
        return {"path": str(Path(self.path).absolute()), "sha256": self.sha256, "choice": self.choice}

    def lines(self) -> list[str]:
        """A table to print: a line for each fate, with how many and the first names."""
        rows = [
            ("loaded", self.loaded),
            ("dropped", [f"{name} ({why})" for name, why in self.dropped.items()]),
            ("missing", self.missing),
            ("resized", [f"{name} ({how})" for name, how in self.resized.items()]),
        ]
        checkpoint = f" ({self.checkpoint})" if self.checkpoint else ""
        return [
            f"Weights from {self.path}{checkpoint}",
            *(f"  {fate:8} {len(names):4}  {_preview(names)}" for fate, names in rows),
            *(f"  classes: {line}" for line in self.classes),
        ]


def read(source: str | Path, averaged: bool = True) -> StateDictFile:
    """Read the weights of `pretrained_checkpoint_path`; with `averaged`, the EMA where a run kept one, as it was evaluated.

    Raises UserError when there is nothing to read, or for a file without a state dict.
    """
    require_weights(source)
    with _naming_the_setting():
        found = state_dict_file.read(source)
        return found.averaged() if averaged else found


def read_several(sources: str | Sequence[str]) -> list[StateDictFile]:
    """Read the models to average: a list of sources, or one file with a list under `ensemble_weights`."""
    for source in [sources] if isinstance(sources, str) else sources:
        require_weights(source)
    with _naming_the_setting():
        return state_dict_file.read_several(sources)


def check_values(tensors: Mapping[str, Tensor], path: str) -> None:
    """Raise UserError for weights that are not floating-point numbers, or not finite."""
    with _naming_the_setting(f"{path}: "):
        check_numbers(tensors)


@contextlib.contextmanager
def _naming_the_setting(where: str = "") -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{SETTING}: {where}{error} Set {SETTING}.") from None


def filter_state_dict(state: Mapping[str, Tensor], choice: WeightFilter, report: LoadReport) -> dict[str, Tensor]:
    """Apply a filter to a state dict; `report` learns the filter and what was dropped.

    Raises UserError for a pattern that matches nothing, and for a filter that keeps nothing.
    """
    report.choice = asdict(choice)
    left = dict(state)
    if choice.keep is not None:
        kept = {name for pattern in choice.keep for name in _matches(left, pattern, "keep", report.path)}
        report.dropped |= {name: "not kept" for name in left if name not in kept}
    for pattern in choice.drop:
        report.dropped |= dict.fromkeys(_matches(left, pattern, "drop", report.path), pattern)
    for pattern in choice.drop_if_present:
        report.dropped |= dict.fromkeys(fnmatch.filter(left, pattern), pattern)
    left = {name: tensor for name, tensor in left.items() if name not in report.dropped}
    for old, new in choice.rename.items():
        for name in _matches(left, old, "rename", report.path):
            tensor = left.pop(name)
            rest = name[len(old) - 1 :] if old.endswith("*") else ""
            left |= {n.removesuffix("*") + rest: tensor for n in ([new] if isinstance(new, str) else new)}
    if not left:
        raise UserError(
            f"trainer.checkpoint keeps none of the {len(state)} entries of {report.path} ({_preview(list(state))}). Set "
            "trainer/checkpoint, or its keep and drop."
        )
    return {choice.prefix + name: tensor for name, tensor in left.items()}


def load(
    model: nn.Module, weights: StateDictFile, choice: WeightFilter, class_names: Sequence[Sequence[str]] = ()
) -> LoadReport:
    """Load filtered `weights` into a model; positional embeddings of another token grid are interpolated.

    `class_names`: of each head of the model, numbers where there are none; heads are matched by them (`match_heads`).

    Raises UserError, with the model unchanged, when a tensor does not fit, when a head has other classes, or when less of the
    trunk is covered than the filter declares.
    """
    report = LoadReport(str(weights.path), weights.sha256, weights.checkpoint)
    chosen = filter_state_dict(weights.state, choice, report)
    wanted = model.state_dict()
    original = {id(tensor): name for name, tensor in weights.state.items()}  # a filter may rename heads
    theirs: dict[int, list[str] | None] = {}
    for name, tensor in chosen.items():
        if HEAD.sub("heads.0.", name) in wanted:
            names = dict(enumerate(weights.class_names)).get(head_of(original[id(tensor)])) or []
            theirs[head_of(name)] = names if tensor.shape[:1] == (len(names),) else None
    chosen, unused = match_heads(chosen, theirs, class_names, report)
    _check_depth(wanted, chosen, report.path)
    report.dropped |= dict.fromkeys([*unused, *(name for name in chosen if name not in wanted)], NO_PLACE)
    chosen = {name: tensor for name, tensor in chosen.items() if name in wanted}
    if not chosen:
        raise UserError(
            f"No entry of {report.path} has a place in this model ({_preview(list(report.dropped))}). Convert names of other "
            f"projects with `omnivision import {report.path} OUT.pt`, or set {SETTING} or trainer/checkpoint."
        )
    for name in POSITIONS:
        if name in chosen and name in wanted:
            chosen[name] = interpolate_pos_embed(name, chosen[name], model, weights, report)
    _check_shapes(wanted, chosen, report.path)
    _check_heads(model, weights, chosen)
    check_values(chosen, report.path)
    report.loaded = sorted(chosen)
    report.missing = sorted(set(wanted) - set(chosen))
    _check_coverage(wanted, report, choice)
    model.load_state_dict(chosen, strict=False)
    return report


def head_of(name: str) -> int:
    """Return the number of the head that an entry belongs to; -1 for other entries."""
    found = HEAD.match(name.removeprefix("model."))  # which an average has before the names of its classifier
    return int(found[1]) if found else -1


def match_heads(
    state: Mapping[str, Tensor],
    theirs: Mapping[int, list[str] | None],
    ours: Sequence[Sequence[str]],
    report: LoadReport,
) -> tuple[dict[str, Tensor], list[str]]:
    """Give each head of the model the head of the same class names, with its rows in the model's order.

    Args:
        state: entries of heads (`heads.0.0.weight`, or `model.heads.…` of an average) and others, which stay as they are.
        theirs: class names by head of the state, None where unknown. Other heads stay as they are.
        ours: class names by head of the model. Where one side has no names, heads are matched by number.

    Returns the state without unused heads, and the names of their entries. Raises UserError for a head of as many classes with
    other names.
    """
    heads = {head: {n: t for n, t in state.items() if head_of(n) == head} for head in theirs if head >= 0}
    if not ours:
        return dict(state), []
    matched = {name: tensor for name, tensor in state.items() if head_of(name) not in heads}
    used = set()
    for head, names in enumerate(ours):
        wanted, given = valid_names(list(names)), theirs.get(head)
        same = [k for k in (head, *heads) if wanted and set(theirs.get(k) or []) == set(wanted)]
        source = same[0] if same else head
        if source not in heads:
            continue
        used.add(source)
        order = None
        if same:
            found = theirs[source]
            assert wanted is not None and found is not None
            if source != head:
                report.classes.append(f"head {head} takes head {source} of {report.path}, which has the same classes")
            if found != wanted:
                order = [found.index(name) for name in wanted]
                report.classes.append(f"the rows of head {head} are sorted by the class names of this run")
        elif wanted is None or given is None:
            side = "this run" if given else "the file"
            report.classes.append(f"{side} has no class names of head {head}; their order is not checked")
        elif len(wanted) == len(given):
            raise UserError(
                f"Head {head} of {report.path} must have the classes of this run, got "
                f"{_preview([name for name in given if name not in wanted])} instead of "
                f"{_preview([name for name in wanted if name not in given])}. Set datasets.NAME.class_names, or "
                "trainer/checkpoint=no_heads for a new head."
            )
        for name, tensor in heads[source].items():
            target = name.replace(f"heads.{source}.", f"heads.{head}.", 1)
            matched[target] = tensor if order is None else tensor[order]
    return matched, [name for head in heads if head not in used for name in heads[head]]


def is_encoder(name: str) -> bool:
    """Whether an entry belongs to the trunk's RGB encoder."""
    return name.startswith("trunk.") and not name.startswith(BESIDE_THE_ENCODER)


def interpolate_pos_embed(
    name: str, table: Tensor, model: nn.Module, weights: StateDictFile, report: LoadReport
) -> Tensor:
    """Return a positional embedding (1, N, D) for the token grid of the model, interpolated from that of the file."""
    trunk: Any = model.trunk
    if table.ndim != 3 or table.shape[-1] != model.state_dict()[name].shape[-1]:
        return table  # `_check_shapes` refuses it
    old = _grid_of(weights, table.shape[1], trunk.grid)
    if old == trunk.grid:
        return table
    report.resized[name] = f"{'x'.join(map(str, old))} -> {'x'.join(map(str, trunk.grid))}"
    return resized_positions(table.float(), old, trunk.grid)


def _grid_of(weights: StateDictFile, tokens: int, grid: Triple) -> Triple:
    """The token grid (T', H', W') in the file, else the one of that many tokens that is nearest to `grid`."""
    if said := weights.architecture.get("trunk"):
        try:
            side = said["image_size"]
            found = token_grid((said["num_frames"], side, side), tuple(said["tubelet"]))
        except (KeyError, TypeError, ValueError):  # UserError is one
            found = (0, 0, 0)
        if found[0] * found[1] * found[2] != tokens:
            raise UserError(
                f"num_frames, image_size and tubelet in {weights.path} must give its {tokens} positions, got {said!r:.300}. "
                f"The file is damaged. Set {SETTING}."
            )
        return found
    if tokens == grid[0] * grid[1] * grid[2]:
        return grid
    side = round((tokens / grid[0]) ** 0.5)
    if grid[0] * side * side == tokens > 0:  # the same number of frames, square
        return grid[0], side, side
    if tokens > 0 and tokens % (grid[1] * grid[2]) == 0:  # the same size, another number of frames
        return tokens // (grid[1] * grid[2]), grid[1], grid[2]
    raise UserError(
        f"{weights.path} must have positions for {grid[0]} time slots or for {grid[1]} x {grid[2]} tokens a slot, got {tokens} "
        "positions. Set num_frames or image_size."
    )


def _check_shapes(wanted: Mapping[str, Tensor], chosen: Mapping[str, Tensor], path: str) -> None:
    wrong = {n: t for n, t in chosen.items() if t.shape != wanted[n].shape}
    if not wrong:
        return
    shown = _preview([f"{n} {tuple(wanted[n].shape)}, got {tuple(t.shape)}" for n, t in wrong.items()])
    advice = ""
    if any(name.startswith("trunk.decoder.") for name in wrong):
        advice = ", or trainer/checkpoint=no_heads_no_decoder for a new decoder"
    elif any(name.startswith("heads.") for name in wrong):
        advice = ", or trainer/checkpoint=no_heads for new heads"
    raise UserError(f"Shapes in {path} must be those of this model: {shown}. Set trainer/model or {SETTING}{advice}.")


def _check_depth(wanted: Mapping[str, Tensor], chosen: Mapping[str, Tensor], path: str) -> None:
    """Raise UserError where blocks of a deeper trunk or decoder would be left out, and where some of a decoder's would stay
    random: the others were not trained for that. `_check_coverage` reports missing blocks of a trunk.
    """
    for part, blocks in (("trunk", "trunk.blocks."), ("decoder", "trunk.decoder.decoder_blocks.")):
        ours, theirs = (
            {name.removeprefix(blocks).partition(".")[0] for name in names if name.startswith(blocks)}
            for names in (wanted, chosen)
        )
        if ours and (theirs - ours or (part == "decoder" and theirs and ours - theirs)):
            leave_out = ", or trainer/checkpoint=no_heads_no_decoder" if part == "decoder" else ""
            raise UserError(
                f"The {part} of this model must have as many blocks as that of {path}, {len(theirs)}, got {len(ours)}. Set "
                f"trainer.model.{part}.depth={len(theirs)}{leave_out}."
            )


def _check_heads(model: nn.Module, weights: StateDictFile, chosen: Mapping[str, Tensor]) -> None:
    """Raise UserError for another number of attention heads than in the file, which shapes do not show."""
    ours = describe(model)
    for part, blocks in (("trunk", "trunk.blocks."), ("decoder", "trunk.decoder.")):
        said = weights.architecture.get(part)
        theirs = said.get("heads") if isinstance(said, Mapping) else None
        loaded = part in ours and any(name.startswith(blocks) for name in chosen)
        if loaded and theirs is not None and theirs != ours[part]["heads"]:
            raise UserError(
                f"The {part} of this model must have the attention heads of {weights.path}, {theirs}, got "
                f"{ours[part]['heads']}. Set trainer.model.{part}.heads={theirs}, or {SETTING}."
            )


def _check_coverage(wanted: Mapping[str, Tensor], report: LoadReport, choice: WeightFilter) -> None:
    trunk = [name for name in wanted if is_encoder(name) and name not in POSITIONS]
    absent = [name for name in trunk if name in report.missing]
    if len(trunk) - len(absent) < choice.trunk_coverage * len(trunk):
        raise UserError(
            f"{report.path} has {len(trunk) - len(absent)} of the {len(trunk)} tensors of the trunk; "
            f"trainer.checkpoint.trunk_coverage is {choice.trunk_coverage:g}. Missing: {_preview(absent)}; dropped: "
            f"{_preview(list(report.dropped)) or 'none'}. Convert names of other projects with `omnivision import`, or set "
            f"{SETTING} or trainer/checkpoint."
        )
    unplaced = [name for name, why in report.dropped.items() if why == NO_PLACE]
    if choice.strict and (report.missing or unplaced):
        raise UserError(
            f"trainer.checkpoint.strict is true, and {report.path} differs from this model: missing "
            f"{_preview(report.missing) or 'none'}; without a place {_preview(unplaced) or 'none'}. Set trainer/model or "
            "trainer/checkpoint."
        )


def _matches(state: Mapping[str, Any], pattern: str, what: str, path: str) -> list[str]:
    found = fnmatch.filter(state, pattern)
    if not found:
        raise UserError(
            f"trainer.checkpoint.{what}: {pattern!r} must match an entry of {path} ({_preview(list(state))}). Correct or "
            "remove it."
        )
    return found


def _preview(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
