"""`omnivision report RUN...`: runs on one HTML page."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from omnivision.launch.slurm import squeue_or_none
from omnivision.launch.slurm_jobs import resolve_status
from omnivision.tools.arguments import Flag
from omnivision.utils.errors import UserError
from omnivision.utils.streams import fit


def is_page(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(15).lower() == b"<!doctype html>"


def folder_of(paths: list[str]) -> str:
    """Return the folder that holds all of the files."""
    try:
        return os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # none, or some relative
        return "several places"


def report(
    runs: Annotated[list[Path], Parameter(name="RUN")],
    /,
    *,
    out: Annotated[Path, Parameter(metavar="FILE")] = Path("report.html"),
    no_clips: Flag = False,
    title: Annotated[str | None, Parameter(metavar="TEXT")] = None,
) -> int:
    """Make an HTML page of runs: curves, settings, reconstructions, mistakes.

    One page that needs no network: settings and their differences between runs, curves, reconstructions, accuracy by class,
    confusion matrices, the worst and most confident mistakes as clips, what started from what, and of several downstream
    runs the table of the paper.

    Args:
        runs: A run directory, or a folder of them (a sweep).
        out: The page.
        no_clips: No clips of a model's mistakes (they are read from where each run says that its videos are).
        title: Heading of the page (default: the names of the runs).
    """
    from omnivision.tools.report.collect import find_runs
    from omnivision.tools.report.page import render
    from omnivision.utils.io import write_atomically

    try:
        there = out.absolute().parent.is_dir() and not out.is_dir()
    except (OSError, ValueError):  # a name too long, or none
        there = False
    if not there:
        raise UserError(f"--out is {str(out)[:200]!r}; expected a file in a folder that is there. Change --out.")
    if out.exists() and not (out.is_file() and is_page(out)):
        raise UserError(f"--out is {out}, which is there and is no report. Give another file.")
    found, queue, clips = find_runs(runs), squeue_or_none(), not no_clips
    for each in found:
        each.summary["status"], each.summary["exit_reason"] = resolve_status(each.summary, queue)
    names = ", ".join(run.name for run in found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    if len(runs) == 1 and len(found) > 1:
        names = runs[0].resolve().name
    page = render(found, title or names, clips)
    try:
        write_atomically(out, page)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}. Change --out.") from error
    if clips and (folders := sorted({folder_of(each.paths) for run in found for each in run.predicted.values()})):
        places = ", ".join(folders[:3]) + (f" and {len(folders) - 3} more" if len(folders) > 3 else "")
        print(fit(f"Clips of mistakes are from videos in {places}; --no-clips leaves them out.", sys.stdout))
    print(f"Wrote {out} ({out.stat().st_size / 1e6:.1f} MB, {len(found)} run{'s' * (len(found) > 1)})")
    return 0
