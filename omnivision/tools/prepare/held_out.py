"""A held-out part of a training split, by whole groups: all videos of one source are on the same side."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from omnivision.data.sampling import keyed_rng
from omnivision.tools.prepare.index import drop_format_folders
from omnivision.utils.errors import UserError


def _before_last_part(name: str) -> str:
    return name.rpartition("_")[0] or name


def _before_one_letter_part(name: str) -> str:
    """HMDB51: <film>_<action>_<visible body parts, a letter>_... A title may begin with a letter ("A_...")."""
    parts = name.split("_")
    end = next((k for k, part in enumerate(parts) if k > 0 and len(part) == 1 and part.isalpha()), len(parts))
    return "_".join(parts[:end])


def _before_first_underscore(name: str) -> str:
    return name.partition("_")[0]


# From the name of a video, without folders and suffix, to the name of its source.
GROUPINGS: dict[str, Callable[[str], str]] = {
    "ucf101": _before_last_part,
    "hmdb51": _before_one_letter_part,
    "ikea": _before_first_underscore,
    "diving48": _before_first_underscore,
    "uav": lambda name: name[:24],
    "minissv2": lambda name: name,
}


def group_videos(paths: list[str], grouping: Callable[[str], str]) -> list[str]:
    """Return the group of each path."""
    return [grouping(os.path.splitext(os.path.basename(drop_format_folders(path)))[0]) for path in paths]


def pattern_grouping(pattern: str) -> Callable[[str], str]:
    """Return a grouping by what the first parentheses of a regular expression match, anywhere in the name.

    Raises UserError for an invalid expression or one without parentheses; the grouping raises it for a name without a match.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"--group-pattern {pattern!r} must be a regular expression: {error}. Change --group-pattern."
        ) from error
    if compiled.groups < 1:
        raise UserError(
            f"--group-pattern {pattern!r} has no parentheses; expected some around the part of a name that tells the source, "
            r"e.g. '(.*)_c\d+'."
        )

    def grouping(name: str) -> str:
        match = compiled.search(name)
        if match is None or match[1] is None:
            raise UserError(
                f"--group-pattern {pattern!r} does not match {name!r}; expected a match in the name of each video (without "
                "folders and suffix). Change the pattern."
            )
        return match[1]

    return grouping


def hold_out(groups: list[str], labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return bool (N,): the held-out videos, as near to `share` as whole groups allow, the same for the same seed.

    Within that, classes are served evenly, and a class with a single group stays in training if it can.
    Raises UserError when there is one group only.
    """
    names, group, sizes = np.unique(np.array(groups), return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise UserError(
            f"All {len(groups)} videos are of one group ({str(names[0])!r}), which stays on one side. Expected at least two; "
            "group them in another way (--group-pattern)."
        )
    order = _order(group, labels, len(names), seed)
    target = min(max(round(share * len(groups)), 1), len(groups) - 1)
    chosen = order[_nearest_sum(sizes[order], target)]
    return np.isin(group, chosen)


def _order(group: np.ndarray, labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Shuffle the groups so that each class is spread evenly over the order."""
    random = keyed_rng(seed, 0)
    votes: list[Counter[int]] = [Counter() for _ in range(count)]
    for number, label in zip(group.tolist(), labels.tolist(), strict=True):
        votes[number][label] += 1
    main_class = np.array([vote.most_common(1)[0][0] for vote in votes])
    place = np.empty(count)
    for label in np.unique(main_class):
        members = random.permutation(np.flatnonzero(main_class == label))
        place[members] = (np.arange(len(members)) + random.random()) / len(members) if len(members) > 1 else 2
    return np.lexsort((random.random(count), place))


def _nearest_sum(sizes: np.ndarray, target: int) -> np.ndarray:
    """Return indices of sizes whose sum is nearest to `target`, but neither 0 nor the sum of all.

    Dynamic programming over sums: `first[s]` is the first item with which the sum s can be had. Items that come first
    are preferred, because it stops as soon as the target itself can be had.
    """
    limit = int(min(2 * target + int(sizes.min()), sizes.sum()))  # sums beyond are farther than the smallest item alone
    first = np.full(limit + 1, -1)
    first[0] = 0
    for item, size in enumerate(sizes.tolist()):
        if first[target] >= 0:
            break
        if size <= limit:
            fresh = np.flatnonzero((first[:-size] >= 0) & (first[size:] < 0)) + size
            first[fresh] = item
    reachable = np.flatnonzero(first[1 : min(limit, int(sizes.sum()) - 1) + 1] >= 0) + 1
    total = int(reachable[np.argmin(np.abs(reachable - target))])
    chosen = []
    while total > 0:
        chosen.append(int(first[total]))
        total -= int(sizes[chosen[-1]])
    return np.array(chosen)
