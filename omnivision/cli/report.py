"""`omnivision report RUN...`: runs as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from omnivision.errors import UserError
from omnivision.jobs import queue_or_none, settled

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
    parser.add_argument("--title", metavar="TEXT", help="heading of the page (default: the names of the runs)")
    parser.set_defaults(run=run)


def is_page(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(15).lower() == b"<!doctype html>"


def run(args: argparse.Namespace) -> int:
    """Write the page; 0."""
    from omnivision.files import write_atomically
    from omnivision.report.collect import find_runs
    from omnivision.report.page import render

    try:
        there = args.out.absolute().parent.is_dir() and not args.out.is_dir()
    except (OSError, ValueError):  # a name too long, or none
        there = False
    if not there:
        raise UserError(f"--out is {str(args.out)[:200]!r}; expected a file in a folder that is there. Change --out.")
    if args.out.exists() and not (args.out.is_file() and is_page(args.out)):
        raise UserError(f"--out is {args.out}, which is there and is no report. Give another file.")
    found, queue = find_runs(args.runs), queue_or_none()
    for each in found:
        each.summary["status"], each.summary["exit_reason"] = settled(each.summary, queue)
    names = ", ".join(run.name for run in found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    page = render(found, args.title or names)
    try:
        write_atomically(args.out, page)
    except OSError as error:
        raise UserError(f"{args.out} cannot be written: {error.strerror}. Change --out.") from error
    print(f"Wrote {args.out} ({args.out.stat().st_size / 1e6:.1f} MB, {len(found)} run{'s' * (len(found) > 1)})")
    return 0
