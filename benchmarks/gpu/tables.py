"""The results as Markdown and as charts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VERDICTS = {True: "ok", False: "**failed**", None: "not here"}


def write_table(results: dict[str, Any], folder: Path) -> str:
    """Write table.md: the machine, what was checked, steps, and goals; return its text."""
    lines: list[str] = []
    machine = results.get("speed", results.get("checks", {})).get("machine", {})
    lines += [", ".join(f"{name} {value}" for name, value in machine.items() if not isinstance(value, dict)), ""]
    if checks := results.get("checks"):
        lines += ["| checked | found | expected | |", "|---|---|---|---|"]
        lines += [
            f"| {row['what']} | {row['found']} | {row['expected']} | {VERDICTS[row['passed']]} |"
            for row in checks["rows"]
        ]
        lines.append("")
    if speed := results.get("speed"):
        columns = ["seconds", "clips per second", "% of the matmul rate", "memory beyond weights, GB"]
        lines += [f"| step | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for row in speed["steps"]:
            cells = [f"{row[name]:.4g}" if name in row else "" for name in columns]
            lines.append(f"| {row['step']} | {' | '.join(cells)} |")
        lines += ["", "| what | measured: median (least to most) | goal | |", "|---|---|---|---|"]
        lines += [ratio["row"] for ratio in speed["ratios"]]
        lines += ["", *(f"- {name}: {as_text(value)}" for name, value in speed["facts"].items())]
        for name, table in speed["profiles"].items():
            lines += ["", f"Kernels of {name}, by time:", "", "```", table.rstrip(), "```"]
    text = "\n".join(lines) + "\n"
    (folder / "table.md").write_text(text)
    return text


def write_charts(results: dict[str, Any], folder: Path) -> None:
    """Write steps.png: clips per second of each step and its share of the matmul rate."""
    steps = results.get("speed", {}).get("steps", [])
    if not steps:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.35 * len(steps) + 1.4), layout="constrained")
    axes = figure.subplots()
    names = [row["step"] for row in steps]
    bars = axes.barh(names, [row["clips per second"] for row in steps])
    labels = [f"{row['clips per second']:.0f}{share_of_rate(row)}" for row in steps]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    for bar, name in zip(bars, names, strict=True):
        bar.set_color("tab:blue" if not name.startswith("Hugging") else "tab:grey")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("clips per second (share of the matmul rate)")
    axes.set_title(f"Training steps, {results['speed']['machine'].get('device', '')}, bf16", fontsize=11)
    figure.savefig(folder / "steps.png", dpi=110)


def share_of_rate(row: dict[str, Any]) -> str:
    return f" ({row['% of the matmul rate']:.0f} %)" if "% of the matmul rate" in row else ""


def as_text(value: Any) -> str:
    """Return a fact, which may be a dictionary of facts, in words."""
    if not isinstance(value, dict):
        return str(value)
    parts = ", ".join(f"{name} {as_text(part)}" for name, part in value.items())
    return f"({parts})"
