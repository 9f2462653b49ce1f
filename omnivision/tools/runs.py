"""`omnivision runs DIR`: the runs below a folder, with status and accuracy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from omnivision.launch.slurm import squeue_or_none
from omnivision.launch.slurm_jobs import run_status
from omnivision.reporting.run_directory import RunDir
from omnivision.tools.arguments import Flag
from omnivision.utils.errors import UserError, truncate_list
from omnivision.utils.streams import print_text, warn, wide_console

TOP1_COLUMNS = ("run", "trunk", "starts from", "data", "epochs", "minutes", "top-1 %", "chance %")
COLUMNS = (*TOP1_COLUMNS, "mAP %", "MAE", "best %", "loss", "model", "status", "age")
RARE = ("mAP %", "MAE")  # columns that are left out if they are empty
TEXTS = ("run", "trunk", "starts from", "data", "model", "status", "age")
# Columns that are dropped if the window is narrow, in this order.
SPARE = ("age", "model", "chance %", "trunk", "minutes", "loss", "data", "starts from", "best %")


def runs(folder: Annotated[Path, Parameter(name="DIR")], /, *, top1: Flag = False) -> int:
    """List runs with their status, accuracy and age.

    List the run directories below DIR (folders with a summary.json), oldest first. The loss is the validation loss, or the
    training loss if the run does not validate.

    Args:
        folder: A run directory, or a folder of them.
        top1: List only runs with an accuracy, sorted by data, best last.
    """
    summaries = read_summaries(folder)
    if top1:
        summaries = [summary for summary in summaries if summary["last"].get("val_top1") is not None]
        summaries.sort(key=lambda summary: (summary["run"].get("sources") or [], summary["last"]["val_top1"]))
    console, width = wide_console()
    columns = list(TOP1_COLUMNS if top1 else select_columns([describe_run(summary) for summary in summaries]))
    spare = [column for column in SPARE if column in columns]
    left_out = []
    while console.measure(table := make_table(summaries, columns)).maximum > width and spare:
        left_out.append(spare.pop(0))
        columns.remove(left_out[-1])
    console.print(table)
    if left_out:
        print_text(f"No room for: {', '.join(left_out)}. A wider window or a pipe (| cat) shows them.")
    for summary in summaries:
        if reason := end_reason(summary):
            print_text(f"{summary['name']}: {summary['status']}: {reason}")
    return 0


def read_summaries(folder: Path) -> list[dict[str, Any]]:
    """Return the summary of each run below a folder, oldest first, with its `name`, `path` and current `status`.

    Warns about damaged summaries. Raises UserError if there is no run.
    """
    files = sorted(file for file in folder.rglob("summary.json") if file.is_file())
    if not files:
        raise UserError(f"{folder} must be a run directory, or a folder of them; it contains no summary.json.")
    queue, found, damaged = squeue_or_none(), [], []
    for file in files:
        run = RunDir(file.parent)
        status, reason = run_status(run, queue)
        if not (summary := run.read_summary()):
            damaged.append(file)
            continue
        name = file.parent.relative_to(folder).as_posix() if file.parent != folder else folder.resolve().name
        of_file = {"name": name, "path": file.parent, "changed": file.stat().st_mtime}
        defaults = {"run": summary.get("run") or {}, "last": summary.get("last") or {}}
        found.append(summary | defaults | of_file | {"status": status, "exit_reason": reason})
    if not found:
        raise UserError(
            f"{folder} holds no run: {truncate_list(damaged)} is not the summary of one. Give another folder."
        )
    for file in damaged:
        warn(f"{file} is not the summary of a run. It is left out.")
    return sorted(found, key=lambda summary: summary["run"].get("started") or summary["changed"])


def end_reason(summary: dict[str, Any]) -> str:
    """Return why a run ended, as one line; "" if it finished or is running."""
    ended = summary["status"] not in ("finished", "running")
    return " ".join((summary["exit_reason"] or "").split())[:2000] if ended else ""


def make_table(summaries: list[dict[str, Any]], columns: list[str]) -> Table:
    """Return a row per run."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in TEXTS else "right", no_wrap=True)
    for summary in summaries:
        cells = describe_run(summary)
        if "status" not in columns and summary["status"] != "finished":
            cells["run"] += f" ({summary['status']})"
        table.add_row(*(Text(cells[column]) for column in columns))  # Text: names are not markup
    return table


def select_columns(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return COLUMNS, without rare ones that are empty in all rows."""
    return [column for column in COLUMNS if column not in RARE or any(row[column] for row in rows)]


def describe_run(summary: dict[str, Any]) -> dict[str, str]:
    """Return a cell for each of COLUMNS. Chance is the accuracy of a constant guess if all classes have the same size."""
    metadata, last = summary["run"], summary["last"]
    classes = max(metadata.get("classes") or [0])
    is_class = metadata.get("label_type", "class") == "class"  # older summaries lack it
    return {
        "run": summary["name"],
        "trunk": metadata.get("trunk") or "?",
        "starts from": (metadata.get("pretrained") or "nothing") if metadata else "?",
        "data": ", ".join(metadata.get("sources") or []),
        "epochs": format_number(summary.get("epochs"), 0),
        "minutes": format_number((summary.get("wall_time") or 0) / 60, 1),
        "top-1 %": format_number(last.get("val_top1"), 1),
        "mAP %": format_number(last.get("val_map"), 1),
        "MAE": "" if last.get("val_mae") is None else f"{last['val_mae']:.4g}",
        "chance %": format_number(100 / classes if classes and is_class else None, 1),
        "best %": format_number(summary.get("best"), 1) if {"val_top1", "val_map"} & {*last} else "",
        "loss": format_number(last.get("val_loss", last.get("loss")), 3),
        "model": metadata.get("model") or "?",
        "status": summary["status"],
        "age": _format_age(time.time() - summary["changed"]),
    }


def format_number(value: float | None, digits: int) -> str:
    """Format a number; "" for None."""
    return "" if value is None else f"{value:.{digits}f}"


def _format_age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
