"""The share of the demo's training time that is spent waiting for data.

    python -m benchmarks.data_wait [--quick]

The demo's stage 1 with its own settings, on two cores: one data worker beside the process that trains. The same again with a
model large enough to hide the decoding: then nothing is left to wait for.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.command import command_line, run_quietly
from benchmarks.harness import Ratio, Report
from benchmarks.start import DEMO, SCRIPT, demo_data

RUNS = {"the demo's model": [], "a model that hides it": ["trainer/model=vitsmall", "num_frames=8"]}


def shares(folder: Path, data: Path, overrides: list[str], steps: int) -> list[float]:
    """Percent of the time of each step but the first ten."""
    run = folder / f"run_{len(list(folder.iterdir()))}"
    command = [sys.executable, str(SCRIPT), *DEMO, f"data_root={data}", f"launcher.experiment_log_dir={run}",
               f"trainer.limit_train_batches={steps}", "epochs=1", "trainer.logging.pictures_every_epochs=null"]  # fmt: skip
    run_quietly([*command, *overrides])
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [100 * line["data_wait"] for line in lines if line["event"] == "step"][min(10, steps // 2) :]


def run(quick: bool) -> Report:
    report = Report("data_wait", "Waiting for data, by step of the demo", unit="% of a step")
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), Path(name) / "data"
        counts = ("--train", "4", "--val", "1") if quick else ("--train", "40", "--val", "1", "--synthetic", "40")
        demo_data(data, *counts)
        for what, overrides in RUNS.items():
            report.seconds[what] = shares(folder, data, overrides, 4 if quick else 60)
    report.ratios += [
        Ratio("waiting for data, the demo", [statistics.mean(report.seconds["the demo's model"])], None, "%"),
        Ratio(
            "waiting for data, decoding hidden",
            [statistics.mean(report.seconds["a model that hides it"])],
            5,
            "%",
            True,
        ),
    ]
    return report


def main(arguments: list[str] | None = None) -> None:
    command_line(run, __doc__, arguments)


if __name__ == "__main__":
    main()
