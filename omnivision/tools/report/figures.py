"""The figures of a report: plotly as HTML fragments that share one copy of its script.

plotly takes some tags in names for markup, links among them: names are escaped before it gets them.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as graph
from plotly.offline import get_plotlyjs

from omnivision.tools.report.collect import Predicted, Run, is_result, result

COLOURS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#999999",
)  # also distinct for the colour-blind
SHADES = [[0, "rgba(68, 119, 170, 0)"], [1, "rgba(68, 119, 170, 1)"]]  # on a light page and on a dark one
MAX_COUNTS = 20  # classes of a matrix with numbers in its cells
MAX_ROWS = 400  # of classes, in bars
DASHES = ("solid", "dash", "dot", "dashdot")
MAX_POINTS = 2000  # of a curve
WIDE = 30  # ratio of values from which on they are shown on a logarithmic axis


def script() -> str:
    """Return plotly's code, for one `<script>` of the page."""
    return str(get_plotlyjs())


def curves(
    runs: Sequence[Run], what: str, label: str, lines: Callable[[Run], list[dict[str, Any]]], among: Sequence[Run]
) -> str:
    """Draw a metric over the steps, one line per run; "" if no run has two points.

    `among` are all runs of the page: each has the colour of its place there, in every figure.
    """
    figure = graph.Figure()
    for number, run in ((number, run) for number, run in enumerate(among) if run in runs):
        points = [(line["step"], line[what]) for line in lines(run) if isinstance(line.get(what), (int, float))]
        points = points[:: -(-len(points) // MAX_POINTS) or 1] + points[-1:]  # the last as the table has it
        if points:
            x, y = zip(*points, strict=True)
            line = {"color": COLOURS[number % len(COLOURS)], "dash": DASHES[number // len(COLOURS) % len(DASHES)]}
            mode = "lines+markers" if len(points) < 60 else "lines"
            figure.add_scatter(x=x, y=y, name=html.escape(run.name), mode=mode, line=line, marker={"size": 5})
    if all(len(line.x) < 2 for line in figure.data):
        return ""
    figure.update_layout(xaxis_title="step", yaxis_title=label, showlegend=len(runs) > 1, height=340)
    return _html(figure)


def confusion(predicted: Predicted) -> str:
    """Draw the confusion matrix, as shares of each label."""
    counts = predicted.confusion()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [html.escape(name) for name in predicted.names]
    figure = graph.Figure(
        graph.Heatmap(
            z=shares, x=names, y=names, text=counts, zmin=0, zmax=1, xgap=1, ygap=1, colorscale=SHADES,
            texttemplate="%{text}" if len(names) <= MAX_COUNTS else None, colorbar={"title": "share of the label"},
            hovertemplate="%{y}, taken for %{x}: %{text} (%{z:.0%})<extra></extra>",
        )
    )  # fmt: skip
    side = min(900, 260 + 14 * len(predicted.names))
    figure.update_layout(xaxis_title="predicted", yaxis_title="label", height=side)
    figure.update_xaxes(type="category", showgrid=False)  # names that are numbers, too
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed", ticksuffix=" ")
    return _html(figure)


def by_class(predicted: Predicted) -> str:
    """Draw the accuracy of each class, worst first."""
    rows = predicted.by_class()
    if len(rows) > MAX_ROWS:  # the worst and the best
        rows = rows[: MAX_ROWS // 2] + rows[-MAX_ROWS // 2 :]
    names, counts, values = zip(*rows, strict=True)
    figure = graph.Figure(
        graph.Bar(
            x=values, y=[html.escape(name) for name in names], customdata=counts, orientation="h", marker={"color": COLOURS[0]},
            text=[f"{round(v * n / 100)} of {n}" for v, n in zip(values, counts, strict=True)], textposition="outside",
            hovertemplate="%{y}: %{x:.1f} % of %{customdata} videos<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(xaxis_title="accuracy, %", height=120 + 18 * len(rows))
    figure.update_xaxes(range=[0, 108], tickvals=list(range(0, 101, 20)))
    figure.update_yaxes(type="category", autorange="reversed", ticksuffix=" ")
    return _html(figure)


def mixing(run: Run) -> str:
    """Draw the weight of each source of an average over the epochs; "" for other runs."""
    lines = run.epochs("train")
    names = [name for name in (lines[-1] if lines else {}) if name.startswith("mixing_") and name[7:].isdecimal()]
    figure = graph.Figure()
    for name, colour in zip(names, itertools.cycle(COLOURS), strict=False):
        figure.add_scatter(
            x=[line["step"] for line in lines], y=[line.get(name) for line in lines], name=f"source {name[7:]}",
            line={"color": colour},
        )  # fmt: skip
    if not figure.data:
        return ""
    figure.update_layout(xaxis_title="step", yaxis_title="share of the average", height=300)
    return _html(figure)


def against(runs: Sequence[Run], values: Sequence[str]) -> str:
    """Draw the metric of runs over a setting; "" unless the setting is a number in at least three runs with the same metric.

    values: the setting as text, one per run.
    """
    points = []
    for run, value in zip(runs, values, strict=True):
        if (found := result(run)) is not None and re.fullmatch(
            r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", value, re.IGNORECASE
        ):
            name = html.escape(run.name) + ("" if is_result(run) else " (not finished)")
            points.append((float(value), *found[::-1], name))
    if len(points) < 3 or len({label for _, _, label, _ in points}) > 1:
        return ""
    x, y, labels, names = zip(*sorted(points), strict=True)
    figure = graph.Figure(
        graph.Scatter(
            x=x, y=y, text=names, mode="markers", marker={"size": 9, "color": COLOURS[0]},
            hovertemplate="%{text}: %{y:.4g} at %{x}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(yaxis_title=labels[0], height=300)
    if min(x) > 0 and max(x) / min(x) >= WIDE:
        figure.update_xaxes(type="log")
    return _html(figure)


def _html(figure: graph.Figure) -> str:
    """Return the figure without background and text colours: the page sets them for light and dark."""
    figure.update_layout(
        margin={"l": 60, "r": 16, "t": 16, "b": 50}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 12}, legend={"orientation": "h", "y": 1.12},
    )  # fmt: skip
    figure.update_yaxes(exponentformat="power")
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=config))
