"""Groups of videos of one source, and which to hold out for validation: whole groups, near a share, classes evenly."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from omnivision.data.sampling import keyed_rng
from omnivision.utils.errors import UserError

VIDEO_SUFFIXES = tuple(
    ".mp4 .avi .webm .mkv .mov .m4v .mpg .mpeg .wmv .flv .ogv .ts .m2ts .mts .3gp .asf .vob .y4m".split()
)
# Words in names that describe a video's format, not its identity: "a/frames/1", "a/1/rgb", "a/1_frames", "a/rgb_1".
_FORMAT = r"(?:frames?|images?|imgs?|extracted|jpe?g|png|rgb|flow|videos?)"
_FORMAT_WORDS = re.compile(rf"(?i)(?<![^/]){_FORMAT}(?:/|$|[_.-](?=[^/]+$))|(?<=[^/])[_.-]{_FORMAT}$")


def _before_one_letter_part(name: str) -> str:
    """Match HMDB51: <film>_<action>_<visible body parts, one letter>_... A title may begin with a single letter ("A_...")."""
    parts = name.split("_")
    end = next((k for k, part in enumerate(parts) if k > 0 and len(part) == 1 and part.isalpha()), len(parts))
    return "_".join(parts[:end])


# Functions from the name of a video, without folders and suffix, to the name of its source.
GROUPINGS: dict[str, Callable[[str], str]] = {
    "ucf101": lambda name: name.rpartition("_")[0] or name,
    "hmdb51": _before_one_letter_part,
    "ikea": lambda name: name.partition("_")[0],
    "diving48": lambda name: name.partition("_")[0],
    "uav": lambda name: name[:24],
    "minissv2": lambda name: name,
}


def video_key(path: str) -> str:
    """Return a path without its suffix and words such as frames/: the same key for a video and its frame folder."""
    return drop_suffix(_FORMAT_WORDS.sub("", path).rstrip("/"))  # also the suffix in "001.mp4.frames"


def drop_suffix(path: str) -> str:
    """Return a path without a video suffix."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in VIDEO_SUFFIXES else path


def group_videos(paths: Sequence[str], grouping: Callable[[str], str]) -> list[str]:
    """Return the group of each path."""
    return [grouping(os.path.basename(video_key(path))) for path in paths]


def group_paths(name: str, paths: Sequence[str], grouping: Callable[[str], str] | None = None) -> list[str]:
    """Return the group of each video: by `grouping`, by the names of a known dataset `name`, else each its own."""
    known = grouping or GROUPINGS.get(name)
    return list(paths) if known is None else group_videos(paths, known)


def pattern_grouping(pattern: str, setting: str = "--group-pattern") -> Callable[[str], str]:
    """Return a grouping by what the first parentheses of a regular expression match, anywhere in the name.

    Raises UserError for an expression that is invalid or has no parentheses; the grouping raises it for a name without a match.
    """
    try:
        compiled = re.compile(pattern)
        if compiled.groups < 1:
            raise re.error(r"it needs parentheses around the part of a name that identifies the source, e.g. (.*)_c\d+")
    except re.error as error:
        raise UserError(f"{setting} {pattern!r} must be a regular expression: {error}.") from error

    def grouping(name: str) -> str:
        match = compiled.search(name)
        if match is None or match[1] is None:
            raise UserError(
                f"{setting} {pattern!r} must match the name of each video (without folders and suffix), and does not "
                f"match {name!r}."
            )
        return match[1]

    return grouping


def stratify(labels: np.ndarray) -> np.ndarray:
    """Return the class by which each sample is spread over the sides of a split, int64 (N,).

    `labels`: classes (N,), or rows (N, K) of 0, 1 and -1, whose rarest class counts, or of numbers, which are all alike.
    """
    if labels.ndim == 1:
        return labels.astype(np.int64)
    if labels.dtype.kind == "f":
        return np.zeros(len(labels), dtype=np.int64)
    present = labels > 0
    rarest = np.where(present, present.sum(0), len(labels) + 1).argmin(1)
    return np.where(present.any(1), rarest, -1)


def hold_out(
    groups: Sequence[str], labels: np.ndarray, share: float, seed: int, setting: str = "--group-pattern"
) -> np.ndarray:
    """Return the held-out videos, bool (N,), as near to `share` as whole groups allow, the same for the same seed.

    labels: as in the arrays of a split. Classes are represented evenly within the share, and a class with a single group stays
    in training if possible. Raises UserError if there is only one group; it names the `setting` of the groups.
    """
    names, group, sizes = np.unique(np.array(groups), return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise UserError(
            f"All {len(groups)} videos are of one group ({str(names[0])!r}), which stays on one side. Expected at least two; "
            f"set {setting}."
        )
    order = _order(group, stratify(labels), len(names), seed)
    target = min(max(round(share * len(groups)), 1), len(groups) - 1)
    return np.isin(group, order[_nearest_sum(sizes[order], target)])


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

    Dynamic programming over sums: `first[s]` is the first item with which the sum s is reached. It prefers early items, because
    it stops as soon as the target itself is reached.
    """
    limit = int(min(2 * target + int(sizes.min()), sizes.sum()))  # larger sums are farther than the smallest item alone
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
