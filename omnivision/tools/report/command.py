"""`omnivision report RUN...`: runs as one HTML page."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omnivision.launch.jobs import queue_or_none, settled
from omnivision.utils.errors import UserError
from omnivision.utils.streams import fit

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add `report` to the command's parser; its namespace carries `run`, the function to call."""
    parser = subparsers.add_parser(
        "report",
        help="make an HTML page of runs: curves, settings, reconstructions, mistakes",
        description="One page that needs no network: settings and what differs between runs, curves, reconstructions, "
        "accuracy by class, confusion matrices, the worst and most confident mistakes as clips, what started from what, and of "
        "several downstream runs the table of the paper.",
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run folder, or a folder of them (a sweep)")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    text = "no clips of what a model was most wrong about (they are read from where each run says that its films lie)"
    parser.add_argument("--no-clips", action="store_true", help=text)
    parser.add_argument("--title", metavar="TEXT", help="heading of the page (default: the names of the runs)")
    parser.set_defaults(run=run)


def is_page(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(15).lower() == b"<!doctype html>"


def folder_of(paths: list[str]) -> str:
    """The folder that all of some files are in."""
    try:
        return os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # none, or some relative
        return "several places"


def run(args: argparse.Namespace) -> int:
    """Write the page; 0."""
    from omnivision.tools.report.collect import find_runs
    from omnivision.tools.report.page import render
    from omnivision.utils.io import write_atomically

    try:
        there = args.out.absolute().parent.is_dir() and not args.out.is_dir()
    except (OSError, ValueError):  # a name too long, or none
        there = False
    if not there:
        raise UserError(f"--out is {str(args.out)[:200]!r}; expected a file in a folder that is there. Change --out.")
    if args.out.exists() and not (args.out.is_file() and is_page(args.out)):
        raise UserError(f"--out is {args.out}, which is there and is no report. Give another file.")
    found, queue, clips = find_runs(args.runs), queue_or_none(), not args.no_clips
    for each in found:
        each.summary["status"], each.summary["exit_reason"] = settled(each.summary, queue)
    names = ", ".join(run.name for run in found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    if len(args.runs) == 1 and len(found) > 1:
        names = args.runs[0].resolve().name
    page = render(found, args.title or names, clips)
    try:
        write_atomically(args.out, page)
    except OSError as error:
        raise UserError(f"{args.out} cannot be written: {error.strerror}. Change --out.") from error
    if clips and (folders := sorted({folder_of(each.paths) for run in found for each in run.predicted.values()})):
        told = ", ".join(folders[:3]) + (f" and {len(folders) - 3} more" if len(folders) > 3 else "")
        print(fit(f"Clips of mistakes are from films in {told}; --no-clips leaves them out.", sys.stdout))
    print(f"Wrote {args.out} ({args.out.stat().st_size / 1e6:.1f} MB, {len(found)} run{'s' * (len(found) > 1)})")
    return 0
