"""Entries of a file on their way to our names, and the account of what became of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omnivision.checkpoint.weight_files import check_numbers
from omnivision.interop.geometry import Given, architecture_of, position_tables
from omnivision.models.architecture import Architecture
from omnivision.utils.errors import UserError


@dataclass(frozen=True)
class Imported:
    """A state dict in our names, whole and with position tables, its architecture, and what became of each entry.

    `taken` have kept their names, `renamed` are {ours: theirs}; `zeros`, `made` and `dropped` say why, by name; `assumed` are
    numbers that nobody said.
    """

    state: dict[str, Tensor]
    architecture: Architecture
    taken: Sequence[str]
    renamed: Mapping[str, str]
    zeros: Mapping[str, str]
    made: Mapping[str, str]
    dropped: Mapping[str, str]
    assumed: Sequence[str]

    def summary(self) -> str:
        """The model in a few words."""
        trunk, classes = self.architecture["trunk"], self.architecture.get("classes")
        return (
            f"{'encoder' if classes == [] else self.architecture['kind']} of width {trunk['width']}, depth {trunk['depth']}, "
            f"{trunk['heads']} heads, {trunk['num_frames']} frames of {trunk['image_size']} x {trunk['image_size']}"
            + "".join(f", {count} classes" for count in classes or [])
        )

    def lines(self) -> list[str]:
        """A table to print: a line for each fate and reason, with how many and the first names."""
        rows = [("taken", "", self.taken), ("renamed", "", [f"{old} -> {new}" for new, old in self.renamed.items()])]
        for fate, reasons in (("zeros", self.zeros), ("made", self.made), ("dropped", self.dropped)):
            rows += [(fate, f" ({why})", names) for why, names in by_reason(reasons).items()]
        rows.append(("assumed", "", self.assumed))
        return [f"  {fate:8} {len(names):4}  {some(names)}{why}" for fate, why, names in rows if names]


@dataclass
class Intake:
    """The entries that are `left` to be placed. Every converter places or drops each of them, and then calls `done`."""

    left: dict[str, Tensor]
    state: dict[str, Tensor] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    zeros: dict[str, str] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def numbers(self, prefix: str) -> list[str]:
        """The numbers of blocks, as they are written after `prefix`."""
        found = (name.removeprefix(prefix).partition(".")[0] for name in self.left if name.startswith(prefix))
        return list(dict.fromkeys(found))

    def keep(self) -> None:
        """What is left has our names already."""
        self.taken += self.left
        self.state |= self.left
        self.left = {}

    def rename(self, old: str, new: str) -> None:
        """Rename an entry, or all that begin with `old` when both end in a dot; none may be there."""
        for name in [name for name in self.left if name == old or (old.endswith(".") and name.startswith(old))]:
            target = new + name[len(old) :]
            self.state[target] = self.left.pop(name)
            self.renamed[target] = name

    def join(self, olds: Sequence[str], new: str, zeros_where_missing: bool = False) -> None:
        """Put entries of one shape below each other, as the rows of q, k and v; missing ones are zeros, or left to `done`."""
        parts = {old: self.left.pop(old) for old in olds if old in self.left}
        shapes = {tuple(tensor.shape) for tensor in parts.values()}
        if len(shapes) > 1 or () in shapes:
            raise UserError(
                f"{', '.join(parts)} have the shapes {', '.join(map(str, sorted(shapes)))}; expected one shape for all, "
                "because they become one tensor. The weights are not of one model."
            )
        if not parts or (len(parts) < len(olds) and not zeros_where_missing):
            self.left |= parts
            return
        like = next(iter(parts.values()))
        self.state[new] = torch.cat([parts[old] if old in parts else torch.zeros_like(like) for old in olds])
        self.renamed[new] = " + ".join(parts)
        for number, old in enumerate(olds):
            if old not in parts:
                self.zeros[f"{new}[{'qkv'[number]}]"] = "not in the file"

    def fill(self, new: str, value: float, like: Tensor, why: str) -> None:
        """A tensor of one value, of the length of `like`."""
        self.state[new] = like.new_full((len(like),), value)
        (self.made if value else self.zeros)[new] = why

    def drop(self, prefix: str, why: str) -> None:
        """Leave out all that begin so; none may be there."""
        for name in [name for name in self.left if name.startswith(prefix)]:
            del self.left[name]
            self.dropped[name] = why

    def done(self, said: Mapping[str, Any], given: Given) -> Imported:
        """Check that the tensors make one whole model, and add its position tables.

        Raises UserError for an entry that was not placed or is no finite numbers, and as `architecture_of`.
        """
        if self.left:
            raise UserError(
                f"{len(self.left)} entries have no place beside the others: {some(list(self.left))}. The weights are not of "
                "one model, or not all of one."
            )
        check_numbers(self.state)
        architecture, assumed = architecture_of(self.state, said, given)
        for name, table in position_tables(architecture).items():
            if name not in self.state:
                self.state[name] = table
                self.made[name] = "the fixed table"
        # Copies of their own: parts of a larger tensor would be saved with the whole of it.
        state = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in self.state.items()
        }
        return Imported(state, architecture, self.taken, self.renamed, self.zeros, self.made, self.dropped, assumed)


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """{name: reason} the other way round."""
    found: dict[str, list[str]] = {}
    for name, why in reasons.items():
        found.setdefault(why, []).append(name)
    return found


def some(names: Sequence[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
