"""The paper's table: top-1 of each pretraining on each task, fine-tuned and probed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omnivision.tools.report.collect import Run, differing, is_result

WAYS = ("FT", "LP")


@dataclass(frozen=True)
class Table:
    """`columns` are (task, FT or LP), those that a run is in; `rows` are (pretraining, cells); a cell is (text, whether it is
    the best of its column). `left_out` are runs with a top-1 that is no result yet.
    """

    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[tuple[str, bool]]]]
    left_out: list[str]


def table(runs: Sequence[Run]) -> Table | None:
    """The finished runs with a top-1, of the last evaluation; of several with the same start, task and way the mean if only
    their seeds differ, else the best. None for fewer than two runs."""
    found: dict[tuple[str, str, str], list[float]] = {}
    made_by: dict[tuple[str, str, str], list[Run]] = {}
    left_out: list[str] = []
    named: dict[str, str] = {}  # name of a start -> the weights that it stands for
    for run in runs:
        facts = run.summary.get("run") or {}
        top1, trunk, task = run.last.get("val_top1"), facts.get("trunk"), " + ".join(facts.get("sources") or [])
        if not isinstance(top1, (int, float)) or not isinstance(trunk, str):
            continue
        if not is_result(run):
            left_out.append(run.name)
        else:
            way, weights = (
                "FT" if trunk == "trained" else "LP",
                "+".join(str(each.get("sha256")) for each in run.pretrained),
            )
            start = _start(facts.get("pretrained"), trunk)
            if named.setdefault(start, weights) != weights:
                start = f"{start} ({weights[:12]})"
            found.setdefault((start, task, way), []).append(float(top1))
            made_by.setdefault((start, task, way), []).append(run)
    if sum(map(len, found.values())) < 2:
        return None
    seeds = {key for key, made in made_by.items() if set(differing(made)) <= {"trainer.seed_value"}}
    means = {key: sum(values) / len(values) if key in seeds else max(values) for key, values in found.items()}
    tasks = list(dict.fromkeys(task for _, task, _ in found))
    columns = [(task, way) for task in tasks for way in WAYS if any(key[1:] == (task, way) for key in found)]
    best = {(task, way): max(v for (_, t, w), v in means.items() if (t, w) == (task, way)) for _, task, way in means}
    rows = []
    for start in dict.fromkeys(start for start, _, _ in found):
        cells = []
        for task, way in columns:
            value = means.get((start, task, way))
            count = len(found.get((start, task, way), []))
            suffix = f" ({'mean' if (start, task, way) in seeds else 'best'} of {count})" if count > 1 else ""
            text = "" if value is None else f"{value:.1f}{suffix}"
            cells.append((text, value is not None and value == best[task, way]))
        rows.append((start, cells))
    return Table(columns, rows, left_out)


def _start(pretrained: object, trunk: str) -> str:
    """Return the name of the run that a run started from."""
    if not isinstance(pretrained, str) or not pretrained:
        return "nothing"
    name = " + ".join(Path(part.strip()).name for part in pretrained.split(" + "))
    return f"{name} (average)" if "average" in trunk else name
