"""Pretrained weights: where they come from, which of them a stage takes, and what became of each.

A source is a run folder (its best checkpoint, else its newest), a checkpoint, a bare state dict, or a safetensors file. A
*choice* (`trainer/checkpoint=...`) keeps, drops, renames or prefixes entries by shell pattern; what is left goes into the
model. `load` tells what was loaded, dropped, missing and resized, and refuses to cover less of the trunk than declared.
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

from omnivision.checkpoint import weight_files
from omnivision.checkpoint.fingerprint import valid_names
from omnivision.checkpoint.weight_files import StateDictFile, check_numbers
from omnivision.models.architecture import describe
from omnivision.models.patches import Triple, resized_positions, token_grid
from omnivision.utils.errors import UserError
from omnivision.utils.io import require_weights

SETTING = "pretrained_checkpoint_path"
# What hangs on the trunk and is not the encoder of pixels: the decoder of its pretraining, and the embedding of depth.
BESIDE_THE_ENCODER = ("trunk.decoder.", "trunk.mask_token", "trunk.depth_patch_embed.")
HEAD = re.compile(r"heads\.(\d+)\.")
POSITIONS = ("trunk.pos_embed", "trunk.decoder.pos_embed")


@dataclass(frozen=True)
class WeightFilter:
    """Which entries of a state dict a stage takes, by shell patterns over their names.

    Args:
        keep: take only these; None takes all. Each pattern must match something.
        drop: leave these out; each pattern must match something.
        drop_if_present: leave these out if they are there.
        rename: names that become one or several others: {old: new} or {old: [new, new]}. A trailing `*` stands for the rest of
            the name on both sides.
        prefix: put before every name, last of all.
        strict: every entry that is left must have a place in the model, and every entry of the model must be filled.
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
    """What became of each entry: names, and for dropped ones why. `resized` says from which shape to which."""

    path: str
    sha256: str
    checkpoint: str = ""  # its epoch and metrics, for people
    choice: dict[str, Any] = field(default_factory=dict)  # the WeightFilter that was made
    loaded: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)  # what was done about the class names of heads
    resized: dict[str, str] = field(default_factory=dict)

    def note(self) -> dict[str, Any]:
        """What a checkpoint keeps of the weights that its model is made of, to find the very same again."""
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
            *(f"  {fate:8} {len(names):4}  {_some(names)}" for fate, names in rows),
            *(f"  classes: {line}" for line in self.classes),
        ]


def read(source: str | Path, averaged: bool = True) -> StateDictFile:
    """Weights of a run folder, a checkpoint, a bare state dict or a safetensors file, for `pretrained_checkpoint_path`.

    With `averaged`, those of a run that kept a moving average are the averaged ones: it was evaluated, and chosen as the best.

    Raises UserError when there is nothing to read, or for a file that is no state dict, in one paragraph with the way out.
    """
    require_weights(source)
    with _told_of_the_setting():
        found = weight_files.read(source)
        return found.averaged() if averaged else found


def read_several(sources: str | Sequence[str]) -> list[StateDictFile]:
    """The models to average: from a list of sources, or from one file that holds a list under `ensemble_weights`."""
    for source in [sources] if isinstance(sources, str) else sources:
        require_weights(source)
    with _told_of_the_setting():
        return weight_files.read_several(sources)


@contextlib.contextmanager
def _told_of_the_setting(path: str = "") -> Iterator[None]:
    """A refusal of what a file holds names the setting that gave the file."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{SETTING}: {path and f'{path}: '}{str(error).removesuffix(' Change the path.')} Change {SETTING}."
        ) from None


def filter_state_dict(state: Mapping[str, Tensor], choice: WeightFilter, report: LoadReport) -> dict[str, Tensor]:
    """What a choice leaves of a state dict, under the names that it gives; `report` learns what was dropped.

    Raises UserError for a pattern that matches nothing and for a choice that keeps nothing.
    """
    report.choice = asdict(choice)
    left = dict(state)
    if choice.keep is not None:
        kept = {name for pattern in choice.keep for name in _matches(left, pattern, "keep", report.path)}
        report.dropped |= {name: "not kept" for name in left if name not in kept}
        left = {name: tensor for name, tensor in left.items() if name in kept}
    for pattern in [*choice.drop, *choice.drop_if_present]:
        optional = pattern in choice.drop_if_present
        for name in _matches(left, pattern, "drop", report.path, optional):
            report.dropped[name] = pattern
    left = {name: tensor for name, tensor in left.items() if name not in report.dropped}
    for old, new in choice.rename.items():
        for name in _matches(left, old, "rename", report.path):
            tensor = left.pop(name)
            rest = name[len(old) - 1 :] if old.endswith("*") else ""
            for target in [new] if isinstance(new, str) else new:
                left[target.removesuffix("*") + rest] = tensor
    if not left:
        raise UserError(
            f"The choice trainer.checkpoint keeps nothing of the {len(state)} entries of {report.path} ({_some(list(state))}). "
            "Change trainer/checkpoint, or keep and drop in it."
        )
    return {choice.prefix + name: tensor for name, tensor in left.items()}


def load(
    model: nn.Module, weights: StateDictFile, choice: WeightFilter, class_names: Sequence[Sequence[str]] = ()
) -> LoadReport:
    """Put what a choice takes of `weights` into a model; position tables of another token grid are interpolated.

    `class_names`: of each head of the model, numbers where there are none; heads are matched to them (`match_heads`).

    Raises UserError, with the model as it was, when a tensor does not fit, when a head is of other classes, or when less of the
    trunk is covered than the choice declares.
    """
    report = LoadReport(str(weights.path), weights.sha256, weights.checkpoint)
    chosen = filter_state_dict(weights.state, choice, report)
    wanted = model.state_dict()
    names_before = {id(tensor): name for name, tensor in weights.state.items()}  # a choice may have renamed heads
    theirs: dict[int, list[str] | None] = {}
    for name, tensor in chosen.items():
        if HEAD.sub("heads.0.", name) in wanted:
            known = dict(enumerate(weights.class_names)).get(head_of(names_before[id(tensor)])) or []
            theirs[head_of(name)] = known if tensor.shape[:1] == (len(known),) else None
    chosen, unused = match_heads(chosen, theirs, class_names, report)
    report.dropped |= dict.fromkeys(unused, "no place in this model")
    _check_depth(wanted, chosen, report.path)
    for name in [name for name in chosen if name not in wanted]:
        report.dropped[name] = "no place in this model"
        del chosen[name]
    if not chosen:
        raise UserError(
            f"None of the {len(report.dropped)} entries of {report.path} has a place in this model "
            f"({_some(list(report.dropped))}), so nothing would be loaded. Names of other projects are brought into "
            f"ours by omnivision import {report.path} OUT.pt. Change {SETTING} or trainer/checkpoint (keep, rename, prefix)."
        )
    for name in POSITIONS:
        if name in chosen and name in wanted:
            chosen[name] = interpolate_pos_embed(name, chosen[name], model, weights, report)
    wrong = [
        f"{name} {tuple(chosen[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in chosen
        if chosen[name].shape != wanted[name].shape
    ]
    if wrong:
        raise UserError(
            f"{weights.path} does not fit this model: {_some(wrong)}{_heads_advice(wrong)}. Expected the same width, depth and "
            f"tubelet. Change trainer/model, or {SETTING}."
        )
    _check_heads(model, weights, chosen)
    check_values(chosen, report.path)
    report.loaded = sorted(chosen)
    report.missing = sorted(set(wanted) - set(chosen))
    _check_coverage(wanted, report, choice)
    model.load_state_dict(chosen, strict=False)
    return report


def head_of(name: str) -> int:
    """The number of the head that an entry belongs to; -1 for one of no head."""
    found = HEAD.match(name.removeprefix("model."))  # which an average has before the names of its classifier
    return int(found[1]) if found else -1


def match_heads(
    state: Mapping[str, Tensor],
    theirs: Mapping[int, list[str] | None],
    ours: Sequence[Sequence[str]],
    report: LoadReport,
) -> tuple[dict[str, Tensor], list[str]]:
    """Give each head of the model the head that was trained on the same class names, with its rows in the model's order.

    Args:
        state: entries of heads (`heads.0.0.weight`, or `model.heads.…` of an average) and others, which stay as they are.
        theirs: class names by head of the state, None where they are unknown. Other heads stay as they are.
        ours: class names by head of the model. Where one side has no names, the head is taken by its number.

    Returns the state without heads that the model does not take, and the names of their entries. Raises UserError for a head of
    as many classes with other names.
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
            report.classes.append(
                f"{'this run' if given else 'the file'} does not name the classes of head {head}; their order is not checked"
            )
        elif len(wanted) == len(given):
            raise UserError(
                f"{report.path} was trained on other classes than this run has: head {head} knows "
                f"{_some([name for name in given if name not in wanted])}; here it would have "
                f"{_some([name for name in wanted if name not in given])}. Expected the same names, in any order. Change "
                "datasets.NAME.class_names, or train a new head: trainer/checkpoint=no_heads."
            )
        for name, tensor in heads[source].items():
            target = name.replace(f"heads.{source}.", f"heads.{head}.", 1)
            matched[target] = tensor if order is None else tensor[order]
    return matched, [name for head in heads if head not in used for name in heads[head]]


def check_values(tensors: Mapping[str, Tensor], path: str) -> None:
    """Raise UserError for weights that are no floating-point numbers, or not finite: training would fail at the first step."""
    with _told_of_the_setting(path):
        check_numbers(tensors)


def _check_coverage(wanted: Mapping[str, Tensor], report: LoadReport, choice: WeightFilter) -> None:
    trunk = [name for name in wanted if is_encoder(name) and name not in POSITIONS]
    covered = [name for name in trunk if name in report.loaded]
    if len(covered) < choice.trunk_coverage * len(trunk):
        absent = [name for name in trunk if name not in report.loaded]
        raise UserError(
            f"{report.path} fills {len(covered)} of the {len(trunk)} tensors of the trunk, less than the declared share "
            f"{choice.trunk_coverage:g} (trainer.checkpoint.trunk_coverage). Missing: {_some(absent)}; dropped or without a "
            f"place: {_some(list(report.dropped))}. Names of other projects are brought into ours by `omnivision import`. "
            f"Change {SETTING} or trainer/checkpoint."
        )
    if choice.strict and (report.missing or "no place in this model" in report.dropped.values()):
        unplaced = [name for name, why in report.dropped.items() if why == "no place in this model"]
        raise UserError(
            f"{report.path} is not of this model: missing {_some(report.missing) or 'nothing'}; without a place "
            f"{_some(unplaced) or 'nothing'}. The choice is strict (trainer.checkpoint.strict). Change trainer/model or "
            "trainer/checkpoint."
        )


def _check_depth(wanted: Mapping[str, Tensor], chosen: Mapping[str, Tensor], path: str) -> None:
    """Raise UserError where blocks of a deeper trunk or decoder would be left out, and where some of a decoder's would stay
    random: the rest was not trained for that. A trunk's missing blocks are told by its coverage.
    """
    for part, blocks in (("trunk", "trunk.blocks."), ("decoder", "trunk.decoder.decoder_blocks.")):
        ours, theirs = (
            {name.removeprefix(blocks).partition(".")[0] for name in names if name.startswith(blocks)}
            for names in (wanted, chosen)
        )
        if ours and (theirs - ours or (part == "decoder" and theirs and ours - theirs)):
            leave_out = (
                ", or leave the decoder out with trainer/checkpoint=no_heads_no_decoder" if part == "decoder" else ""
            )
            raise UserError(
                f"The {part} of {path} has {len(theirs)} blocks, and that of this model {len(ours)}; expected as many. Set "
                f"trainer.model.{part}.depth={len(theirs)}{leave_out}."
            )


def _check_heads(model: nn.Module, weights: StateDictFile, chosen: Mapping[str, Tensor]) -> None:
    """Raise UserError for another number of attention heads than the file says: shapes are the same, and numbers are not."""
    ours = describe(model)
    for part, blocks in (("trunk", "trunk.blocks."), ("decoder", "trunk.decoder.")):
        said = weights.architecture.get(part)
        theirs = said.get("heads") if isinstance(said, Mapping) else None
        loaded = part in ours and any(name.startswith(blocks) for name in chosen)
        if loaded and theirs is not None and theirs != ours[part]["heads"]:
            raise UserError(
                f"The {part} of {weights.path} has {theirs} attention heads, and that of this model {ours[part]['heads']}. "
                f"Set trainer.model.{part}.heads={theirs}, or change {SETTING}."
            )


def is_encoder(name: str) -> bool:
    """Whether an entry belongs to the trunk proper, not to what hangs on it."""
    return name.startswith("trunk.") and not name.startswith(BESIDE_THE_ENCODER)


def interpolate_pos_embed(
    name: str, table: Tensor, model: nn.Module, weights: StateDictFile, report: LoadReport
) -> Tensor:
    """A position table for the grid of the model, interpolated if it is of another."""
    trunk: Any = model.trunk
    width = table.shape[-1] if table.ndim == 3 else 0
    if table.ndim != 3 or width != model.state_dict()[name].shape[-1]:
        return table  # told as a tensor of the wrong shape
    old = _grid_of(weights, table.shape[1], trunk.grid)
    if old == trunk.grid:
        return table
    report.resized[name] = f"{'x'.join(map(str, old))} -> {'x'.join(map(str, trunk.grid))}"
    return resized_positions(table.float(), old, trunk.grid)


def _grid_of(weights: StateDictFile, tokens: int, grid: Triple) -> Triple:
    """The token grid (T', H', W') of a file: as it says itself, else the one of that many tokens that is most like `grid`."""
    if said := weights.architecture.get("trunk"):
        told = _told_grid(said)
        if told is None or told[0] * told[1] * told[2] != tokens:
            raise UserError(
                f"{weights.path} has positions for {tokens} tokens, and its trunk would be {said!r:.300}. Expected num_frames, "
                f"image_size and tubelet that make so many. The file is damaged; change {SETTING}."
            )
        return told
    if tokens == grid[0] * grid[1] * grid[2]:
        return grid
    side = round((tokens / grid[0]) ** 0.5)
    if grid[0] * side * side == tokens > 0:  # the same number of frames, square
        return grid[0], side, side
    if tokens > 0 and tokens % (grid[1] * grid[2]) == 0:  # the same size, another number of frames
        return tokens // (grid[1] * grid[2]), grid[1], grid[2]
    raise UserError(
        f"{weights.path} has positions for {tokens} tokens, which fit neither {grid[0]} time slots nor {grid[1]} x {grid[2]} "
        "tokens a slot; expected the same number of frames or the same size as the model. Change num_frames or image_size."
    )


def _told_grid(trunk: Any) -> Triple | None:
    """The token grid that a file says its trunk has; None when it says nonsense."""
    try:
        side = trunk["image_size"]
        return token_grid((trunk["num_frames"], side, side), tuple(trunk["tubelet"]))
    except (KeyError, TypeError, ValueError):  # UserError is one
        return None


def _matches(state: Mapping[str, Any], pattern: str, what: str, path: str, optional: bool = False) -> list[str]:
    found = fnmatch.filter(state, pattern)
    if not found and not optional:
        raise UserError(
            f"trainer.checkpoint.{what}: the pattern {pattern!r} matches none of the {len(state)} entries of {path} "
            f"({_some(list(state))}). Correct it, or remove it."
        )
    return found


def _heads_advice(wrong: Sequence[str]) -> str:
    if "trunk.decoder." in " ".join(wrong):
        return " (a decoder of another shape is left out by trainer/checkpoint=no_heads_no_decoder)"
    return (
        " (heads of other classes are left out by trainer/checkpoint=no_heads)" if "heads." in " ".join(wrong) else ""
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
