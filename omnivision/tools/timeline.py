"""What a model sees in a long video over time: scores of windows, merged into segments."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from omnivision.config.schema import LabelType

if TYPE_CHECKING:
    from PIL import Image

MAX_DRAWN = 8  # classes in the picture
PRESENT = 0.5  # probability from which one of several classes counts as present


@dataclass(frozen=True)
class Segment:
    """A stretch of a video whose windows have the same likeliest class; for multi-label, in whose windows the class has a
    probability of at least PRESENT.
    """

    start: float  # s
    end: float
    name: str
    label: int
    probability: float  # mean over its windows


@dataclass(frozen=True)
class Timeline:
    """What a model says of the windows of a video, in the order of their starts."""

    times: np.ndarray  # float64 (W, 2): start and end of each window, s
    outputs: np.ndarray  # probabilities or, for regression, values: float32 (W, classes)
    duration: float  # s
    class_names: Sequence[str]
    label_type: LabelType = "class"

    def segments(self) -> list[Segment]:
        """Merge neighbors with the same likeliest class, or in which a class is present; numbers have no segments.

        Segments meet halfway between the middles of their windows.
        """
        if self.label_type == "regression":
            return []
        outputs, middles = self.outputs, self.times.mean(1)
        bounds = [0.0, *((middles[1:] + middles[:-1]) / 2).tolist(), self.duration]
        windows = range(len(outputs))
        if self.label_type == "class":
            best = outputs.argmax(1)
            runs = [(label, list(members)) for label, members in groupby(windows, key=lambda window: int(best[window]))]
        else:
            present = outputs >= PRESENT
            runs = [
                (label, list(members))
                for label in range(outputs.shape[1])
                for is_present, members in groupby(windows, key=lambda window: bool(present[window, label]))
                if is_present
            ]
            runs.sort(key=lambda run: run[1][0])
        return [
            Segment(bounds[m[0]], bounds[m[-1] + 1], self.class_names[label], label, float(outputs[m, label].mean()))
            for label, m in runs
        ]

    def to_csv(self, top: int) -> str:
        """Return a row per window: its times and likeliest classes, or the values of its targets."""
        text, probabilities = io.StringIO(), self.outputs
        rows = csv.writer(text, lineterminator="\n")
        top = min(top, probabilities.shape[1])
        if self.label_type == "regression":
            rows.writerow(["start", "end", *self.class_names])
            for (start, end), own in zip(self.times.tolist(), probabilities.tolist(), strict=True):
                rows.writerow([f"{start:.3f}", f"{end:.3f}", *(f"{value:.6g}" for value in own)])
            return text.getvalue()
        rows.writerow(["start", "end", *(f"{what}_{k + 1}" for k in range(top) for what in ("class", "probability"))])
        for (start, end), own in zip(self.times.tolist(), probabilities, strict=True):
            best = np.argsort(-own, kind="stable")[:top]
            cells = [cell for label in best for cell in (self.class_names[label], f"{own[label]:.4f}")]
            rows.writerow([f"{start:.3f}", f"{end:.3f}", *cells])
        return text.getvalue()

    def to_json(self, top: int) -> dict[str, Any]:
        """Return the duration, the segments, and the likeliest classes of each window, or the values of its targets."""
        windows, is_value = [], self.label_type == "regression"
        for (start, end), own in zip(self.times.tolist(), self.outputs, strict=True):
            best = range(len(own)) if is_value else np.argsort(-own, kind="stable")[:top].tolist()
            what = "value" if is_value else "probability"
            likeliest = [{"name": self.class_names[i], "label": i, what: float(own[i])} for i in best]
            windows.append({"start": start, "end": end, "predictions": likeliest})
        return {"duration": self.duration, "segments": [vars(own) for own in self.segments()], "windows": windows}

    def draw(self, title: str) -> Image.Image:
        """Draw the probabilities of the classes that are likeliest somewhere (at most MAX_DRAWN), above the segments.

        Of numbers, draw the first targets.
        """
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image

        segments, probabilities, middles = self.segments(), self.outputs, self.times.mean(1)
        seconds: dict[int, float] = {}
        for own in segments:
            seconds[own.label] = seconds.get(own.label, 0) + own.end - own.start
        drawn = sorted(seconds, key=lambda label: -seconds[label])[:MAX_DRAWN]
        if not drawn:  # numbers; or no class is present, then those that come nearest
            order = np.argsort(-probabilities.max(0), kind="stable").tolist()
            drawn = (list(range(probabilities.shape[1])) if self.label_type == "regression" else order)[:MAX_DRAWN]
        colors = dict(zip(drawn, colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]
        figure = Figure(figsize=(12, 3.6), dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        curves, bar = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
        plain: dict[str, Any] = {"parse_math": False}  # a $ in a name is not a formula
        for label in drawn:
            curves.plot(middles, probabilities[:, label], color=colors[label], marker="." if len(middles) < 80 else "")
        is_value = self.label_type == "regression"
        curves.set(xlim=(0, self.duration), **({} if is_value else {"ylim": (0, 1.02), "ylabel": "probability"}))
        curves.set_title(title, **plain)
        for own in segments:  # classes that may overlap have a row each
            row = drawn.index(own.label) if self.label_type == "multi_label" and own.label in drawn else 0
            color = colors.get(own.label, "#999999")
            bar.barh(row, own.end - own.start, left=own.start, height=1, color=color, linewidth=0)
        bar.margins(y=0)
        bar.invert_yaxis()
        bar.set_visible(not is_value)
        curves.tick_params(labelbottom=is_value)
        handles = [curves.lines[place] for place in range(len(drawn))]
        legend = curves.legend(
            handles, [self.class_names[label] for label in drawn], loc="upper left", bbox_to_anchor=(1, 1)
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        bar.set(yticks=[], xlabel="s")
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
