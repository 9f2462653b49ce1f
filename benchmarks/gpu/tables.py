"""The results as Markdown and as charts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEPS = ["seconds", "clips per second", "% of the matmul rate", "memory beyond weights, GB"]


def as_markdown(results: dict[str, Any]) -> str:
    """Return the tables of a run: the machine, what was checked, steps, goals and facts."""
    lines: list[str] = []
    for result in list(results.values())[:1]:
        lines += [*notes(results), "", *fact_table("machine", result["machine"])]
    if checks := results.get("checks"):
        lines += ["", "| checked | found | expected | |", "|---|---|---|---|"]
        for row in checks["rows"]:
            verdict = row["verdict"].replace("failed", "**failed**")
            lines.append(f"| {row['what']} | {row['found']} | {row['expected']} | {verdict} |")
        lines += [
            "",
            "Bounds are of the largest relative difference. rehearsed: passed on a CPU. reported: has no bound.",
        ]
        lines.append("not here: needs a GPU or a C++ compiler.")
    if speed := results.get("speed"):
        lines += ["", f"| step | {' | '.join(STEPS)} |", "|---" * (len(STEPS) + 1) + "|"]
        for row in speed["steps"]:
            cells = [f"{row[name]:.4g}" if name in row else "" for name in STEPS]
            lines.append(f"| {row['step']} | {' | '.join(cells)} |")
        lines += ["", "| what | measured: median (least to most) | goal | |", "|---|---|---|---|"]
        lines += [ratio["row"] for ratio in speed["ratios"]]
        lines += ["", *fact_table("fact", speed["facts"])]
        for name, table in speed["profiles"].items():
            lines += ["", f"Kernels of {name}, by time:", "", "```", table.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def notes(results: dict[str, Any]) -> list[str]:
    """Return what a reader of a rehearsal must know."""
    result: dict[str, Any] = next(iter(results.values()), {})
    found = ["Small sizes: the ratios say nothing."] if result.get("quick") else []
    if result.get("machine", {}).get("device") == "CPU":
        found.append("A rehearsal on the CPU: nothing was checked on a GPU.")
    return found


def fact_table(title: str, facts: dict[str, Any]) -> list[str]:
    """Return a table of facts; those of a dictionary have a row each."""
    return [f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in flat(facts))]


def flat(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}, ")
        else:
            yield f"{prefix}{name}", f"{value:.4g}" if isinstance(value, float) else str(value)


def write_charts(results: dict[str, Any], folder: Path) -> None:
    """Write steps.png: clips per second of each training step and its share of the matmul rate."""
    speed = results.get("speed", {})
    steps = [row for row in speed.get("steps", []) if not row["step"].startswith("evaluation")]
    if not steps:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("steps.png is left out: matplotlib is not installed")
        return
    figure = Figure(figsize=(9, 0.35 * len(steps) + 1.8), layout="constrained")
    axes = figure.subplots()
    colors = ["tab:grey" if row["step"].startswith("Hugging Face") else "tab:blue" for row in steps]
    bars = axes.barh([row["step"] for row in steps], [row["clips per second"] for row in steps], color=colors)
    labels = [f"{row['clips per second']:.0f}{share_of_rate(row)}" for row in steps]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    sides = {color: bar for color, bar in zip(colors, bars, strict=True)}
    names = ["Hugging Face" if color == "tab:grey" else "omnivision" for color in sides]
    axes.legend(sides.values(), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("clips per second (share of the rate of a large matrix product)")
    title = f"Training steps, {speed['machine'].get('device', '')}, bf16"
    axes.set_title("\n".join([title, *notes({"speed": speed})]), fontsize=11)
    figure.savefig(folder / "steps.png", dpi=110)


def share_of_rate(row: dict[str, Any]) -> str:
    return f" ({row['% of the matmul rate']:.0f} %)" if "% of the matmul rate" in row else ""
