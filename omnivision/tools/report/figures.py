"""The figures of a report: plotly charts as HTML fragments that share one script, and mistakes as small animations.

plotly interprets some tags in names, including links, so names are escaped first.
"""

from __future__ import annotations

import base64
import functools
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as graph
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from omnivision.data.catalog import resolve_prefix
from omnivision.data.frames import MAX_TOOL_PIXELS, read_image
from omnivision.data.sampling import Segment, clip_window, sample_duration, uniform_clip_starts
from omnivision.data.video import VideoDecodeError, open_video
from omnivision.data.views import resize_short_side
from omnivision.reporting.predictions import Predictions
from omnivision.tasks.metrics import PREDICTION_METRICS, average_precisions, regression_errors
from omnivision.tools.report.collect import Run

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999")  # color-blind safe
SHADES = [[0, "rgba(68, 119, 170, 0)"], [1, "rgba(68, 119, 170, 1)"]]  # works on light and dark pages
DASHES = ("solid", "dash", "dot", "dashdot")
MAX_COUNTS = 20  # a matrix with more classes has no numbers in its cells
SHORT_SIDE, FRAMES, SECONDS, MILLISECONDS = 96, 12, 2.7, 180


def curves(runs: Sequence[Run], curve: tuple[str, str, str], label: str, all_runs: Sequence[Run]) -> Markup:
    """Draw a metric (event, phase, name) over the steps, one line per run; "" if no run has two points.

    A run has the same color in every figure, by its position in `all_runs`.
    """
    figure = graph.Figure()
    for run in runs:
        if points := run.curve(*curve):
            place = all_runs.index(run)
            line = {"color": COLORS[place % len(COLORS)], "dash": DASHES[place // len(COLORS) % len(DASHES)]}
            x, y = zip(*points, strict=True)
            mode = "lines+markers" if len(points) < 60 else "lines"
            figure.add_scatter(x=x, y=y, name=html.escape(run.name), mode=mode, line=line, marker={"size": 5})
    if all(len(line.x) < 2 for line in figure.data):
        return Markup()
    figure.update_layout(xaxis_title="step", yaxis_title=label, showlegend=len(runs) > 1, height=340)
    return to_html(figure)


def confusion(predictions: Predictions) -> Markup:
    """Draw the confusion matrix, as shares of each label."""
    counts = predictions.confusion()
    names = [html.escape(name) for name in predictions.class_names]
    figure = graph.Figure(
        graph.Heatmap(
            z=counts / np.maximum(counts.sum(1, keepdims=True), 1), x=names, y=names, text=counts, zmin=0, zmax=1,
            texttemplate="%{text}" if len(names) <= MAX_COUNTS else None, colorbar={"title": "fraction of the label"},
            xgap=1, ygap=1, colorscale=SHADES,
            hovertemplate="%{y}, taken for %{x}: %{text} (%{z:.0%})<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(xaxis_title="predicted", yaxis_title="label", height=min(900, 260 + 14 * len(names)))
    figure.update_xaxes(type="category", showgrid=False)  # even if names are numbers
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed", ticksuffix=" ")
    return to_html(figure)


def class_accuracy(predictions: Predictions) -> Markup:
    """Draw the accuracy of each class that has videos, worst first."""
    matrix = predictions.confusion()
    counts, right = matrix.sum(1), matrix.diagonal()
    texts = [f"{own} of {count}" for own, count in zip(right, counts, strict=True)]
    accuracy = np.where(counts > 0, 100 * right / np.maximum(counts, 1), np.nan)
    return _class_bars(accuracy, texts, predictions.class_names, "accuracy, %")


def class_precision(predictions: Predictions) -> Markup:
    """Draw the average precision of each class that has videos, worst first."""
    texts = [f"{count} videos" for count in (predictions.label > 0).sum(0)]
    found = 100 * average_precisions(predictions.label, predictions.scores)
    return _class_bars(found, texts, predictions.class_names, "average precision, %")


def _class_bars(percent: np.ndarray, texts: Sequence[str], names: Sequence[str], title: str) -> Markup:
    """Draw a bar for each class with a value, the lowest first."""
    order = [label for label in np.argsort(percent, kind="stable") if np.isfinite(percent[label])]
    figure = graph.Figure(
        graph.Bar(
            x=percent[order], y=[html.escape(names[label]) for label in order], orientation="h",
            text=[texts[label] for label in order], textposition="outside",
            marker={"color": COLORS[0]}, hovertemplate="%{y}: %{x:.1f} % (%{text})<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(xaxis_title=title, height=120 + 18 * len(order))
    figure.update_xaxes(range=[0, 108], tickvals=list(range(0, 101, 20)))
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed", ticksuffix=" ")
    return to_html(figure)


def values(predictions: Predictions) -> Markup:
    """Draw predicted over labelled values, each target in its own color; targets are shown and hidden in the legend."""
    figure = graph.Figure()
    for k, name in enumerate(map(html.escape, predictions.class_names)):
        label, value = predictions.label[:, k], predictions.scores[:, k]
        figure.add_scatter(
            x=label, y=value, mode="markers", name=name, marker={"color": COLORS[k % len(COLORS)], "size": 6, "opacity": 0.7},
            visible=True if k == 0 else "legendonly", text=[html.escape(path) for path in predictions.paths],
            hovertemplate="%{text}: %{x:.4g}, predicted %{y:.4g}<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_layout(xaxis_title="label", yaxis_title="predicted", showlegend=True, height=460)
    return to_html(figure)


def errors(predictions: Predictions) -> Markup:
    """Return a table of each target's errors and correlation."""
    found = regression_errors(predictions.label, predictions.scores)
    head = "".join(f'<th class="number">{PREDICTION_METRICS["regression"][name]}</th>' for name in found)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f'<td class="number">{own[k]:.4g}</td>' for own in found.values())
        + "</tr>"
        for k, name in enumerate(predictions.class_names)
    )
    return Markup(f'<div class="wide"><table><tr><th>target</th>{head}</tr>{rows}</table></div>')


def scatter(places: np.ndarray, labels: Sequence[str], names: Sequence[str]) -> Markup:
    """Draw a point (N, 2) for each video, colored by label, with its name; labels and names are escaped."""
    figure = graph.Figure()
    for number, label in enumerate(sorted(set(labels))):
        members = [place for place, own in enumerate(labels) if own == label]
        figure.add_scatter(
            x=places[members, 0], y=places[members, 1], mode="markers", name=label,
            marker={"color": COLORS[number % len(COLORS)], "size": 7, "symbol": number // len(COLORS) % 40},
            text=[names[place] for place in members], hovertemplate="%{text}<extra>" + label + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.update_layout(height=720)
    return to_html(figure)


def to_html(figure: graph.Figure) -> Markup:
    """Return the figure without background and text colors, which the page sets for light and dark mode."""
    figure.update_layout(
        margin={"l": 60, "r": 16, "t": 16, "b": 50}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 12}, legend={"orientation": "h", "y": 1.12},
    )  # fmt: skip
    figure.update_yaxes(exponentformat="power")
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=config))


class Mistake(NamedTuple):
    """A video, what is wrong about it, and its clip as a data URL ("" if unreadable)."""

    path: str
    caption: Markup
    clip: str


Captions = dict[str, list[tuple[int, Markup]]]  # heading -> videos and their captions


def mistakes(predictions: Predictions, count: int, entry: Mapping[str, Any]) -> dict[str, list[Mistake]]:
    """Return the worst mistakes by heading.

    `entry` is the catalog entry: `fps` and `frame_pattern` of frame folders, and the `prefix` to remove from paths.
    """
    prefix = resolve_prefix(entry.get("prefix") or "")
    fps = entry["fps"] if isinstance(entry.get("fps"), (int, float)) else 25.0  # it may be a reference to a setting

    def describe(video: int, caption: Markup) -> Mistake:
        path, times = predictions.paths[video], ""
        segment = None if predictions.segments is None else tuple(predictions.segments[video].tolist())
        if segment is not None:
            times = f" ({segment[0]:g} to {segment[1]:g} s)"
        clip = animate(path, fps, entry.get("frame_pattern"), segment)
        return Mistake(path.removeprefix(prefix) + times, caption, clip)

    find = {"class": _wrong_classes, "multi_label": _wrong_labels, "regression": _wrong_values}[predictions.label_type]
    lists = find(predictions, count)
    return {heading: [describe(*mistake) for mistake in videos] for heading, videos in lists.items() if videos}


def _wrong_classes(predictions: Predictions, count: int) -> Captions:
    """Return the most confident mistakes and the worst; one list if both have the same videos."""
    probs, label, names = predictions.probabilities, predictions.label, predictions.class_names
    predicted, confidence = probs.argmax(1), probs.max(1)
    of_label = np.take_along_axis(probs, np.maximum(label, 0)[:, None], 1)[:, 0]
    wrong = np.flatnonzero((label >= 0) & (predicted != label))
    most_confident = wrong[np.argsort(-confidence[wrong], kind="stable")][:count]
    worst = wrong[np.argsort(of_label[wrong], kind="stable")][:count]
    lists = {
        "The most confident mistakes": most_confident,
        "The worst mistakes (lowest probability for the true class)": worst,
    }
    if set(most_confident) == set(worst):
        lists = {"The mistakes, the most confident first": most_confident}
    text = Markup("<b>{}</b>, {:.0f} %, taken for <b>{}</b>, {:.0f} %")

    def caption(video: int) -> Markup:
        return text.format(names[label[video]], 100 * of_label[video], names[predicted[video]], 100 * confidence[video])

    return {heading: [(int(video), caption(video)) for video in videos] for heading, videos in lists.items()}


def _wrong_labels(predictions: Predictions, count: int) -> Captions:
    """Return the true classes with the lowest probability, and the false ones with the highest."""
    probs, names = predictions.probabilities, predictions.class_names

    def lowest(order: np.ndarray) -> list[tuple[int, Markup]]:
        chosen = [place for place in np.argsort(order.ravel(), kind="stable") if np.isfinite(order.ravel()[place])]
        places = [divmod(int(place), len(names)) for place in chosen[:count]]
        return [(video, Markup("<b>{}</b>, {:.0f} %").format(names[k], 100 * probs[video, k])) for video, k in places]

    return {
        "True classes with the lowest probability": lowest(np.where(predictions.label == 1, probs, np.nan)),
        "False classes with the highest probability": lowest(np.where(predictions.label == 0, -probs, np.nan)),
    }


def _wrong_values(predictions: Predictions, count: int) -> Captions:
    """Return the videos with the largest errors, in standard deviations of the labels."""
    label, values, names = predictions.label, predictions.scores, predictions.class_names
    known = np.isfinite(label)
    deviations = [float(own[ok].std()) if ok.any() else 0.0 for own, ok in zip(label.T, known.T, strict=True)]
    errors = np.where(known, np.abs(values - label) / np.maximum(deviations, 1e-12), -1)
    text, captions = Markup("{} <b>{:.4g}</b>, predicted {:.4g}"), []
    for video in np.argsort(-errors.max(1), kind="stable")[:count].tolist():
        k = int(errors[video].argmax())
        if known[video, k]:
            captions.append((video, text.format(names[k], label[video, k], values[video, k])))
    return {"The largest errors": captions}


def read_middle(path: str, fps: float, pattern: str | None = None, segment: Segment | None = None) -> Tensor | None:
    """Return frames from the middle of a video (or segment), or an image: uint8 (T, 3, H, W); None if it cannot be read."""
    try:
        with open_video(path, fps=fps, max_pixels=MAX_TOOL_PIXELS, frame_pattern=pattern) as video:
            start = uniform_clip_starts(sample_duration(video.duration, segment), SECONDS, 3)[1]
            return video.read(*clip_window(start, SECONDS, segment), FRAMES)
    except VideoDecodeError:
        try:
            return read_image(path, MAX_TOOL_PIXELS)
        except VideoDecodeError:
            return None


@functools.cache
def animate(path: str, fps: float, pattern: str | None = None, segment: Segment | None = None) -> str:
    """Return the middle of a video (or segment), or an image, as a WebP data URL; "" if it cannot be read."""
    frames = read_middle(path, fps, pattern, segment)
    if frames is None:
        return ""
    frames = resize_short_side(frames, SHORT_SIDE)
    first, *rest = [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).contiguous().numpy()]
    data = io.BytesIO()
    first.save(data, "WEBP", save_all=True, append_images=rest, duration=MILLISECONDS, loop=0, quality=60)
    return data_url(data.getvalue(), "image/webp")


def data_url(data: bytes, kind: str) -> str:
    """Return a file as a data URL; `kind` is its MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
