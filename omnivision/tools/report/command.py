"""`omnivision report RUN...`: one HTML page about runs that works offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from omnivision.tools.arguments import Flag
from omnivision.utils.errors import UserError, truncate_list
from omnivision.utils.streams import plural

HTML_START = b"<!DOCTYPE html>"


def report(
    runs: Annotated[list[Path], Parameter(name="RUN")],
    /,
    *,
    out: Annotated[Path, Parameter(metavar="FILE")] = Path("report.html"),
    no_clips: Flag = False,
    title: Annotated[str | None, Parameter(metavar="TEXT")] = None,
) -> int:
    """Make an HTML page about runs: results, curves, reconstructions, mistakes.

    The page works offline. It has results and settings, and how they differ between runs; curves, reconstructions, accuracy by
    class, confusion matrices, the worst and most confident mistakes as clips; and, for several downstream runs, the paper's
    table.

    Args:
        runs: A run directory, or a folder of them (a sweep).
        out: The file to write.
        no_clips: Leave out clips of mistakes (they are read from the paths in each run's predictions).
        title: Heading of the page (default: the names of the runs).
    """
    from omnivision.tools.report.collect import find_runs
    from omnivision.tools.report.page import render
    from omnivision.utils.io import write_atomically

    is_replaceable = not out.exists() or (out.is_file() and out.read_bytes().startswith(HTML_START))
    if not out.parent.is_dir() or not is_replaceable:
        raise UserError(
            f"--out is {out}; expected a new file in an existing folder, or an earlier report. Change --out."
        )
    found = find_runs(runs)
    names = truncate_list((run.name for run in found), 4)
    if len(runs) == 1:
        names = runs[0].resolve().name
    write_atomically(out, render(found, title or names, clips=not no_clips))
    print(f"Wrote {out} ({out.stat().st_size / 1e6:.1f} MB, {plural(len(found), 'run')})")
    return 0
