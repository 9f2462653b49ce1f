"""What a classifier sees in a long video over time: scores of windows, merged into segments."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL import Image

MAX_DRAWN = 8  # classes in the picture


@dataclass(frozen=True)
class Segment:
    """A stretch of a video whose windows have the same likeliest class."""

    start: float  # s
    end: float
    name: str
    label: int
    probability: float  # mean over its windows


@dataclass(frozen=True)
class Timeline:
    """Scores of the windows of a video, in the order of their starts."""

    times: np.ndarray  # float64 (W, 2): start and end of each window, s
    scores: np.ndarray  # logits, float32 (W, classes)
    duration: float  # s
    class_names: Sequence[str]

    @property
    def probabilities(self) -> np.ndarray:
        """float32 (W, classes)."""
        return torch.from_numpy(self.scores).softmax(1).numpy()

    def segments(self) -> list[Segment]:
        """Merge neighbors with the same likeliest class. Segments meet halfway between the middles of their windows."""
        best, probabilities = self.scores.argmax(1), self.probabilities
        middles = self.times.mean(1)
        bounds = [0.0, *((middles[1:] + middles[:-1]) / 2).tolist(), self.duration]
        found = []
        for label, members in groupby(range(len(best)), key=lambda window: int(best[window])):
            windows = list(members)
            probability = float(probabilities[windows, label].mean())
            found.append(
                Segment(bounds[windows[0]], bounds[windows[-1] + 1], self.class_names[label], label, probability)
            )
        return found

    def to_csv(self, top: int) -> str:
        """Return a row per window: its times and likeliest classes."""
        text, probabilities = io.StringIO(), self.probabilities
        rows = csv.writer(text, lineterminator="\n")
        top = min(top, probabilities.shape[1])
        rows.writerow(["start", "end", *(f"{what}_{k + 1}" for k in range(top) for what in ("class", "probability"))])
        for (start, end), own in zip(self.times.tolist(), probabilities, strict=True):
            best = np.argsort(-own, kind="stable")[:top]
            cells = [cell for label in best for cell in (self.class_names[label], f"{own[label]:.4f}")]
            rows.writerow([f"{start:.3f}", f"{end:.3f}", *cells])
        return text.getvalue()

    def to_json(self, top: int) -> dict[str, Any]:
        """Return the duration, the segments, and the likeliest classes of each window."""
        windows = []
        for (start, end), own in zip(self.times.tolist(), self.probabilities, strict=True):
            best = np.argsort(-own, kind="stable")[:top].tolist()
            likeliest = [{"name": self.class_names[i], "label": i, "probability": float(own[i])} for i in best]
            windows.append({"start": start, "end": end, "predictions": likeliest})
        return {"duration": self.duration, "segments": [vars(own) for own in self.segments()], "windows": windows}

    def draw(self, title: str) -> Image.Image:
        """Draw the probabilities of the classes that are likeliest somewhere (at most MAX_DRAWN), above the segments."""
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image

        segments, probabilities, middles = self.segments(), self.probabilities, self.times.mean(1)
        seconds: dict[int, float] = {}
        for own in segments:
            seconds[own.label] = seconds.get(own.label, 0) + own.end - own.start
        drawn = sorted(seconds, key=lambda label: -seconds[label])[:MAX_DRAWN]
        colors = dict(zip(drawn, colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]
        figure = Figure(figsize=(12, 3.6), dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        curves, bar = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
        plain: dict[str, Any] = {"parse_math": False}  # a $ in a name is not a formula
        for label in drawn:
            curves.plot(middles, probabilities[:, label], color=colors[label], marker="." if len(middles) < 80 else "")
        curves.set(ylim=(0, 1.02), ylabel="probability", xlim=(0, self.duration))
        curves.set_title(title, **plain)
        for own in segments:
            bar.axvspan(own.start, own.end, color=colors.get(own.label, "#999999"))
        handles = [curves.lines[place] for place in range(len(drawn))]
        legend = curves.legend(
            handles, [self.class_names[label] for label in drawn], loc="upper left", bbox_to_anchor=(1, 1)
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        bar.set(yticks=[], xlabel="s")
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
