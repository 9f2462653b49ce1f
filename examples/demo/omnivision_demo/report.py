"""Results of the demo's runs: JSON, a table, and a page.

    python -m omnivision_demo.report DEMO      DEMO: the folder of `make demo`

Writes results.json and report.html into the folder.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import plotly.graph_objects as graph
from markupsafe import Markup

import omnivision
from omnivision.probing.xray import VERDICTS
from omnivision.reporting.images import gif_bytes, moving
from omnivision.reporting.predictions import Predictions
from omnivision.tools.report import figures
from omnivision.tools.report.collect import Run, find_runs
from omnivision.tools.report.page import render
from omnivision.utils.errors import UserError
from omnivision.utils.io import write_atomically, write_json
from omnivision_demo.spec import ACTIONS

# Labels of the runs on the target, in the order of the bars, lowest first; keys are folders of `make demo`.
ON_TARGET = {
    "scratch": "random weights,<br>fine-tuned",
    "finetune_mae": "autoencoder,<br>fine-tuned",
    "average": "average of two<br>aligned, frozen",
    "probe": "aligned, frozen",
    "finetune": "aligned,<br>fine-tuned",
}
EVALUATED = ("align_synthetic", "align_nohuman", *ON_TARGET)
# Of each domain: the run whose predictions are shown, and a heading.
DOMAINS = {
    "synthetic": ("align_synthetic", "Drawn figures: for the autoencoder and the first alignment"),
    "nohuman": ("align_nohuman", "Places without a person: for the autoencoder and the second alignment"),
    "target": ("finetune", "The target: other bodies, places and cameras, and grain"),
}
RECONSTRUCTIONS = 3


class Result(NamedTuple):
    """Top-1 accuracy of one run of the demo, in percent: one value per seed."""

    name: str
    starts_from: str
    trunk: str
    data: str
    videos: int  # number of evaluated videos
    top1: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.top1)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; for one seed, the binomial standard error."""
        if len(self.top1) > 1:
            return statistics.stdev(self.top1)
        share = self.mean / 100
        return 100 * math.sqrt(share * (1 - share) / self.videos)


def collect_results(demos: Sequence[Path]) -> list[Result]:
    """Return the result of each run that evaluates, over demos with different seeds.

    Raises UserError if a run that one has is missing in another.
    """
    by_seed = [{run.name: run for run in find_runs([demo]) if "val_top1" in run.last} for demo in demos]
    results = []
    for name in [name for name in EVALUATED if any(name in runs for runs in by_seed)]:
        if missing := [str(demo) for demo, runs in zip(demos, by_seed, strict=True) if name not in runs]:
            raise UserError(f"{missing[0]} must hold an evaluated run {name}, like the other folders. Run it again.")
        run = by_seed[0][name]
        starts, data = run.metadata["pretrained"] or "nothing", run.metadata["sources"][0]
        top1 = [runs[name].last["val_top1"] for runs in by_seed]
        results.append(Result(name, starts, run.metadata["trunk"], data, int(run.last["val_videos"]), top1))
    return results


def format_table(results: Sequence[Result]) -> str:
    """Return a Markdown table."""
    lines = ["| run | starts from | trunk | evaluated on | top-1 % |", "|---|---|---|---|---|"]
    for result in results:
        each = f" ({', '.join(f'{value:.1f}' for value in result.top1)})" if len(result.top1) > 1 else ""
        cells = [f"`{result.name}`", result.starts_from, result.trunk, result.data]
        lines.append(f"| {' | '.join(cells)} | {result.mean:.1f} ± {result.spread:.1f}{each} |")
    return "\n".join(lines)


def collect_probes(demos: Sequence[Path]) -> list[dict[str, Any]]:
    """Return for each model its top-1 by method, and its effective rank: one value per seed."""
    by_seed = [{row.model["name"]: row for run in find_runs([demo]) for row in run.probes} for demo in demos]
    rows = []
    for name, first in by_seed[0].items():
        found = [{result.method: result.top1 for result in seed[name].results} for seed in by_seed]
        top1 = {result.method: [own[result.method] for own in found] for result in first.results}
        rows.append(
            {"model": name, "top1": top1, "rank": [seed[name].rank for seed in by_seed], "chance": first.chance}
        )
    return rows


def collect_xrays(demos: Sequence[Path]) -> list[dict[str, Any]]:
    """Return for each examined run its top-1 under each change, and the verdict: one value per seed."""
    by_seed = [{run.name: run.xrays for run in find_runs([demo]) if run.xrays} for demo in demos]
    rows = []
    for name, xrays in sorted(by_seed[0].items()):  # runs side by side may start in any order
        for source, first in xrays.items():
            found = [seed[name][source] for seed in by_seed]
            top1 = {change: [own.top1[change][0] for own in found] for change in first.top1}
            rows.append({"run": name, "data": source, "top1": top1, "verdict": [own.verdict for own in found]})
    return rows


def format_probes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of `collect_probes`."""
    methods = [method for method in rows[0]["top1"] if not method.endswith("%")]
    lines = [f"| trunk of | {' | '.join(methods)} | rank |", f"|---|{'---|' * len(methods)}---|"]
    for row in sorted(rows, key=lambda row: statistics.mean(row["top1"]["knn"]), reverse=True):
        cells = [_mean(row["top1"][method]) for method in methods]
        name = "random weights" if row["model"] == "random" else f"`{row['model']}`"
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.mean(row['rank']):.0f} |")
    return "\n".join([*lines, f"| chance | {' | '.join([format(rows[0]['chance'], '.1f')] * len(methods))} | |"])


def format_xrays(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of `collect_xrays`."""
    names = [f"`{row['run']}` on {row['data']}" for row in rows]
    lines = [f"| video | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {change} | {' | '.join(_mean(row['top1'][change]) for row in rows)} |" for change in rows[0]["top1"]]
    verdicts = [", ".join(dict.fromkeys(row["verdict"])) for row in rows]
    return "\n".join([*lines, f"| **verdict** | {' | '.join(f'**{verdict}**' for verdict in verdicts)} |"])


def _mean(values: Sequence[float]) -> str:
    """Format the mean of seeds, with their standard deviation if they differ."""
    differ = len(set(values)) > 1
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if differ else "")


def render_page(demo: Path, results: Sequence[Result]) -> str:
    """Return an ordinary report of a demo's runs, with an introduction: what they show, their videos, reconstructions.

    `results` may be of several seeds. Raises UserError if a run has no predictions.
    """
    runs = {run.name: run for run in find_runs([demo])}
    by_name = {result.name: result for result in results}
    expected = dict.fromkeys(EVALUATED, "target") | {run: domain for domain, (run, _) in DOMAINS.items()}
    if missing := [name for name in EVALUATED if name not in runs or expected[name] not in runs[name].predictions]:
        raise UserError(f"{demo} must hold all runs of `make demo`, evaluated; missing: {', '.join(missing)}.")
    environment = jinja2.Environment(loader=jinja2.PackageLoader("omnivision_demo", "."), autoescape=True)
    intro = environment.get_template("report.html.j2").render(
        result=by_name,
        chance=100 / len(ACTIONS),
        seeds=len(results[0].top1),
        chart=draw_chart(by_name),
        looks=[
            (name, domain, VERDICTS[found.verdict], found.top1["middle frame"][0], found.top1["background"][0])
            for name, run in runs.items()
            for domain, found in run.xrays.items()
            if domain == expected.get(name)
        ],
        domains={heading: _clips(runs[run].predictions[domain]) for domain, (run, heading) in DOMAINS.items()},
        reconstructions=_reconstructions(runs) if "mae" in runs else [],
    )
    return render(list(runs.values()), "The recipe in miniature", intro=Markup(intro))


def draw_chart(results: Mapping[str, Result]) -> Markup:
    """Draw the accuracies on the target, with their spread and chance."""
    shown = [results[name] for name in ON_TARGET]
    bars = graph.Bar(
        x=[result.mean for result in shown], y=list(ON_TARGET.values()), orientation="h",
        error_x={"array": [result.spread for result in shown], "color": "#999999"}, marker={"color": figures.COLORS[0]},
        text=[f" {result.mean:.1f} % " for result in shown], textposition="inside", insidetextanchor="start",
        hovertemplate="%{y}: %{x:.1f} %<extra></extra>",
    )  # fmt: skip
    figure = graph.Figure(bars)
    line = {"dash": "dot", "color": "#999999"}
    figure.add_vline(100 / len(ACTIONS), line=line, annotation_text="chance", annotation_position="top")
    figure.update_layout(xaxis_title="top-1 on the target, %", height=320, showlegend=False)
    figure.update_xaxes(range=[0, 100])
    figure.update_yaxes(showgrid=False, ticksuffix=" ")
    return figures.to_html(figure)


def _clips(predictions: Predictions) -> list[tuple[str, str]]:
    """Return an animated clip per action, with its caption."""
    predicted = predictions.scores.argmax(1)
    clips = []
    for label, action in enumerate(ACTIONS):
        video = int(np.argmax(predictions.label == label))
        outcome = "recognized" if predicted[video] == label else f"taken for {ACTIONS[predicted[video]]}"
        clips.append((figures.animate(predictions.paths[video], 25), f"{action}: {outcome}"))
    return clips


def _reconstructions(runs: Mapping[str, Run]) -> list[str]:
    """Return animated reconstructions of drawn figures from the validation split, as data URLs."""
    model = omnivision.load(runs["mae"].folder.path)
    paths = runs["align_synthetic"].predictions["synthetic"].paths[:RECONSTRUCTIONS]
    return [figures.data_url(gif_bytes(moving(model.reconstruct(path))), "image/gif") for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser("python -m omnivision_demo.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("demo", type=Path, metavar="DEMO")
    demo = parser.parse_args().demo
    try:
        results = collect_results([demo])
        page = render_page(demo, results)
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    write_json(demo / "results.json", [result._asdict() for result in results])
    write_atomically(demo / "report.html", page)


if __name__ == "__main__":
    main()
