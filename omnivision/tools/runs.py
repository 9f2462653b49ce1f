"""`omnivision runs DIR`: the runs below a folder, with status and accuracy."""

from __future__ import annotations

import re
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from omnivision.launch.slurm import squeue_or_none
from omnivision.launch.slurm_jobs import settle_status
from omnivision.reporting.run_directory import RunDir
from omnivision.tools.arguments import Flag
from omnivision.utils.errors import UserError
from omnivision.utils.streams import fit

MAX_WIDTH = 10_000
# Columns that a narrow window goes without, the first ones first.
SPARE = ("age", "model", "chance %", "trunk", "minutes", "loss", "data", "starts from", "best %")


def runs(folder: Annotated[Path, Parameter(name="DIR")], /, *, top1: Flag = False) -> int:
    """List runs with their status, accuracy and age.

    List the run directories below DIR (those with a summary.json), oldest first. The loss is that of validation, or of
    training where nothing is validated.

    Args:
        folder: A run directory, or a folder of them.
        top1: Only accuracies, by data, best last.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected one that holds run directories. Change DIR.")
    found = summaries(folder)
    queue = squeue_or_none()
    for summary in found:
        summary["status"], summary["exit_reason"] = settle_status(RunDir(summary["path"]), queue)
    if not found:
        raise UserError(f"There is no run below {folder}: no summary.json was found. Change DIR.")
    if top1:
        validated = (summary for summary in found if isinstance(summary["last"].get("val_top1"), (int, float)))
        found = sorted(validated, key=lambda s: (s["run"].get("sources") or [], s["last"]["val_top1"]))
    console = Console(width=MAX_WIDTH)  # rich would break numbers and names in narrower ones
    left_out: list[str] = []
    made = table(found, headings := headings_of(top1))
    if console.is_terminal:
        columns = shutil.get_terminal_size().columns
        spare = [heading for heading in SPARE if heading in headings]
        while spare and console.measure(made).maximum > columns:
            left_out.append(spare.pop(0))
            made = table(found, [heading for heading in headings if heading not in left_out])
    console.print(made)
    if left_out:
        print(fit(f"No room for: {', '.join(left_out)}. A wider window or a pipe (| cat) shows them.", sys.stdout))
    for summary in found:
        if summary["status"] not in ("finished", "running") and summary["exit_reason"]:
            print(fit(plain(f"{summary['name']}: {summary['status']}: {summary['exit_reason']}"), sys.stdout))
    return 0


def summaries(folder: Path) -> list[dict[str, Any]]:
    """Return the summary of each run below a folder, oldest first, with its relative `name`; warn of damaged ones."""
    found = []
    for file in sorted(each for each in folder.rglob("summary.json") if each.is_file()):
        if not (summary := RunDir(file.parent).read_summary()):
            print(f"warning: {file} is no summary of a run. It is left out.", file=sys.stderr)
            continue
        name = file.parent.relative_to(folder).as_posix() if file.parent != folder else folder.resolve().name
        there = {key: value for key, value in summary.items() if value is not None}
        found.append(
            {"last": {}, "run": {}} | there | {"name": name, "path": file.parent, "changed": file.stat().st_mtime}
        )
    return sorted(found, key=lambda summary: summary["run"].get("started") or summary["changed"])


def headings_of(short: bool) -> list[str]:
    """Return the columns; a `short` table has accuracies only."""
    headings = ["run", "trunk", "starts from", "data", "epochs", "minutes", "top-1 %", "chance %"]
    return headings if short else [*headings, "best %", "loss", "model", "status", "age"]


def table(found: list[dict[str, Any]], headings: list[str]) -> Table:
    """Return a row per run. Chance is the accuracy of one guess for all videos, on classes of equal size."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    texts = ("run", "trunk", "starts from", "data", "model", "status", "age")
    for heading in headings:
        made.add_column(heading, justify="left" if heading in texts else "right", no_wrap=True)
    for summary in found:
        facts, last = summary["run"], summary["last"]
        classes, status = facts.get("classes") or [], str(summary.get("status", "?"))
        cells = {
            "run": summary["name"] + (f" ({status})" if "status" not in headings and status != "finished" else ""),
            "trunk": facts.get("trunk") or "?",
            "starts from": (facts.get("pretrained") or "nothing") if facts else "?",
            "data": ", ".join(facts.get("sources") or []),
            "epochs": str(summary.get("epochs", "")),
            "minutes": f"{(summary.get('wall_time') or 0) / 60:.1f}",
            "top-1 %": _number(last.get("val_top1"), 1),
            "chance %": _number(100 / max(classes), 1) if max(classes, default=0) > 0 else "",
            "best %": _number(summary.get("best"), 1) if "val_top1" in last else "",
            "loss": _number(last.get("val_loss", last.get("loss")), 3),
            "model": facts.get("model") or "?",
            "status": status,
            "age": _age(time.time() - summary["changed"]),
        }
        made.add_row(*(Text(plain(cells[heading])) for heading in headings))  # no markup in what others have named
    return made


def plain(text: str) -> str:
    """Return foreign text without control characters, cut to a readable length."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text)[:2000]


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else ""


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
