"""What does a classifier look at? Its accuracy on videos that lack something: order, motion, color, the person, the place.

Each change is applied to the views of a video that the model would see, so that only the change differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from omnivision.data.batch import Batch
from omnivision.data.sampling import keyed_rng
from omnivision.tasks.base import Visualization
from omnivision.tasks.classify import average_views
from omnivision.utils.errors import UserError

INTACT = "intact"
GREY_LEVEL = 128
LUMA = (0.299, 0.587, 0.114)
BLUR = 1 / 20  # standard deviation of the blur, as a fraction of the frame's height
SIGNIFICANT = 2.0  # standard errors
SUBSTANTIAL = 0.5  # of what the intact videos give above chance
SEED = 0

# A change takes clips, uint8 (B, C, T, H, W), and an order of the frames drawn for their video, int64 (T,).
Change = Callable[[Tensor, Tensor], Tensor]


def shuffle(video: Tensor, order: Tensor) -> Tensor:
    return video[:, :, order]


def reverse(video: Tensor, order: Tensor) -> Tensor:
    return video.flip(2)


def freeze_first(video: Tensor, order: Tensor) -> Tensor:
    return video[:, :, :1].expand_as(video)


def freeze_middle(video: Tensor, order: Tensor) -> Tensor:
    middle = video.shape[2] // 2
    return video[:, :, middle : middle + 1].expand_as(video)


def halve_rate(video: Tensor, order: Tensor) -> Tensor:
    """Show every second frame twice."""
    return video[:, :, torch.arange(video.shape[2]) // 2 * 2]


def remove_color(video: Tensor, order: Tensor) -> Tensor:
    weights = torch.tensor(LUMA, device=video.device)[:, None, None, None]
    return (video.float() * weights).sum(1, keepdim=True).round().to(video.dtype).expand_as(video)


def blur(video: Tensor, order: Tensor) -> Tensor:
    sigma = BLUR * video.shape[-2]
    frames = video.transpose(1, 2).flatten(0, 1)
    size = 2 * math.ceil(3 * sigma) + 1
    return transforms.gaussian_blur(frames, [size, size], [sigma, sigma]).unflatten(0, (len(video), -1)).transpose(1, 2)


def keep_background(video: Tensor, order: Tensor) -> Tensor:
    """Show the median of the frames all the time: without what moves, if the camera stands still."""
    return video.median(2, keepdim=True).values.expand_as(video)


def remove_background(video: Tensor, order: Tensor) -> Tensor:
    """Show the difference from the median of the frames, on grey."""
    difference = video.short() - video.median(2, keepdim=True).values.short()
    return (difference + GREY_LEVEL).clamp(0, 255).to(video.dtype)


CHANGES: dict[str, Change] = {
    INTACT: lambda video, order: video,
    "shuffled": shuffle,
    "reversed": reverse,
    "first frame": freeze_first,
    "middle frame": freeze_middle,
    "half rate": halve_rate,
    "grey": remove_color,
    "blurred": blur,
    "background": keep_background,
    "no background": remove_background,
}


@dataclass(frozen=True)
class Xray:
    """Predicted classes of V videos under each change, with their labels."""

    labels: np.ndarray  # int64 (V,)
    predicted: Mapping[str, np.ndarray]  # by change, int64 (V,)
    class_names: list[str]
    unreadable: int = 0  # videos without a prediction

    def hits(self, change: str) -> np.ndarray:
        """Return 1 for each video that is recognized, else 0: float64 (V,)."""
        return (self.predicted[change] == self.labels).astype(np.float64)

    def accuracy(self, change: str) -> Measured:
        """Return the top-1 accuracy, with its standard error."""
        return Measured.of_mean(self.hits(change))

    def loss(self, change: str) -> Measured:
        """Return the accuracy lost by a change; its standard error is that of the differences, video by video."""
        return Measured.of_mean(self.hits(INTACT) - self.hits(change))

    def informedness(self, change: str, label: int) -> Measured:
        """Return how well a class is distinguished: hits minus false alarms, each as a fraction (Youden's J).

        It is 0 for guesses of any frequency, unlike the fraction of hits.
        """
        member, guessed = self.labels == label, self.predicted[change] == label
        hits, alarms = Measured.of_mean(guessed[member].astype(float)), Measured.of_mean(guessed[~member].astype(float))
        return Measured(hits.value - alarms.value, math.hypot(hits.error, alarms.error))

    @property
    def chance(self) -> float:
        """The accuracy of always guessing the most frequent class."""
        return float(np.bincount(self.labels).max() / len(self.labels))


@dataclass(frozen=True)
class Measured:
    """A value and its standard error."""

    value: float
    error: float

    @classmethod
    def of_mean(cls, values: np.ndarray) -> Measured:
        """Return the mean; with n values that are all equal, the error is that of one that is not."""
        count = len(values)
        spread = float(values.std(ddof=1)) if count > 1 else 1.0
        return cls(float(values.mean()), max(spread / math.sqrt(count), 1 / count))

    def exceeds(self, bound: float) -> bool:
        return self.value - bound > SIGNIFICANT * self.error


@torch.inference_mode()
def xray(
    model: nn.Module,
    batches: Iterable[Batch],
    head: int,
    average: str,
    class_names: list[str],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Xray:
    """Classify each labelled video of `batches` intact and under each change. `average`: as in `average_views`.

    Raises UserError if they are not of at least two classes.
    """
    labels: list[np.ndarray] = []
    unreadable = 0
    predicted: dict[str, list[np.ndarray]] = {name: [] for name in CHANGES}
    for batch in batches:
        unreadable += len(batch.bad)
        if not len(batch):
            continue
        index, label = batch.index[:: batch.views].tolist(), batch.label[:: batch.views].numpy()
        video = batch.video.to(device)
        orders = [torch.from_numpy(keyed_rng(SEED, i).permutation(video.shape[2])).to(device) for i in index]
        for name, change in CHANGES.items():
            changed = torch.cat(
                [change(own, order) for own, order in zip(video.split(batch.views), orders, strict=True)]
            )
            with autocast():
                logits = model(changed, head)
            scores = average_views(logits.float(), batch.views, average)
            predicted[name].append(scores.argmax(1).cpu().numpy()[label >= 0])
        labels.append(label[label >= 0])
    found = np.concatenate(labels) if labels else np.empty(0, np.int64)
    if len(np.unique(found)) < 2:
        raise UserError(
            f"The videos must be of at least two classes, got {len(np.unique(found))}, and {unreadable} unreadable videos. Use "
            "more videos, or check that they can be read."
        )
    joined = {name: np.concatenate(parts) for name, parts in predicted.items()}
    return Xray(found, joined, class_names, unreadable)


def verdict(intact: Measured, frozen: Measured, background: Measured, lost: Measured, chance: float) -> str:
    """Return what recognition relies on: one of VERDICTS.

    Args:
        frozen, background: what the middle frame alone, and the background alone, give.
        lost: what freezing costs.
        chance: what guessing gives.
    """
    if not intact.exceeds(chance):
        return "nothing"
    above = intact.value - chance
    motion = lost.exceeds(0) and lost.value >= SUBSTANTIAL * above
    place = background.exceeds(chance) and background.value - chance >= SUBSTANTIAL * above
    if motion and place:
        return "mixed"
    if motion or place:
        return "motion" if motion else "place"
    return "appearance" if frozen.exceeds(chance) else "mixed"


def overall_verdict(result: Xray) -> str:
    """Return what the accuracy over all videos relies on."""
    accuracy = result.accuracy
    return verdict(
        accuracy(INTACT), accuracy("middle frame"), accuracy("background"), result.loss("middle frame"), result.chance
    )


def class_verdict(result: Xray, label: int) -> str:
    """Return what the recognition of one class relies on, by its hits minus false alarms."""
    intact, frozen, background = (
        result.informedness(change, label) for change in (INTACT, "middle frame", "background")
    )
    lost = Measured(intact.value - frozen.value, math.hypot(intact.error, frozen.error))
    return verdict(intact, frozen, background, lost, 0.0)


VERDICTS = {
    "motion": "it relies on motion: frozen videos are not recognized",
    "place": "it relies on places: the background alone is recognized",
    "appearance": "it relies on what a single frame shows, more than on the background",
    "mixed": "it relies on several of these",
    "nothing": "it is not above chance",
}


def summarize(result: Xray) -> dict[str, Any]:
    """Return an x-ray as JSON values: [value, standard error] in percent; classes without videos are left out."""

    def percent(measured: Measured) -> list[float]:
        return [100 * measured.value, 100 * measured.error]

    classes = {
        result.class_names[label]: {
            "videos": int((result.labels == label).sum()),
            "verdict": class_verdict(result, label),
            "informedness": {change: percent(result.informedness(change, label)) for change in result.predicted},
        }
        for label in np.unique(result.labels).tolist()
    }
    return {
        "videos": len(result.labels),
        "unreadable": result.unreadable,
        "chance": 100 * result.chance,
        "verdict": overall_verdict(result),
        "top1": {change: percent(result.accuracy(change)) for change in result.predicted},
        "loss": {change: percent(result.loss(change)) for change in result.predicted if change != INTACT},
        "classes": classes,
    }


def show_changes(video: Tensor) -> Visualization:
    """Return a view, uint8 (1, C, T, H, W), under each change."""
    order = torch.from_numpy(keyed_rng(SEED, 0).permutation(video.shape[2]))
    changed = {name: change(video, order)[0].permute(1, 2, 3, 0) for name, change in CHANGES.items()}
    return Visualization({name: np.ascontiguousarray(frames.numpy()) for name, frames in changed.items()}, [0])
