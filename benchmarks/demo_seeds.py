"""The demo with several seeds: how good each way of starting is on the target, and how far that varies (docs/demo.md).

    python -m benchmarks.demo_seeds FOLDER [SEED ...]       about 6 minutes each on two cores

The films are the same; first weights, the order of samples, crops and masks differ.
"""

import os
import statistics
import subprocess
import time
from pathlib import Path

from benchmarks.command import folder_and_seeds
from omnivision.tools.runs import read_summaries

SCRIPT = Path(__file__).resolve().parent.parent / "utils" / "run_scripts" / "run_demo.sh"


def main(folder: Path, seeds: list[int]) -> None:
    minutes = []
    for seed in seeds:
        began = time.monotonic()
        subprocess.run(
            ["sh", str(SCRIPT), f"trainer.seed_value={seed}"],
            env=os.environ | {"DEMO": str(folder.absolute() / f"seed_{seed}"), "DATA": str(folder.absolute() / "data")},
            check=True,
        )
        minutes.append((time.monotonic() - began) / 60)
    by_seed = [{run["name"]: run for run in read_summaries(folder / f"seed_{seed}")} for seed in seeds]
    print(f"\n| run | starts from | trunk | top-1 % with seed {', '.join(map(str, seeds))} | mean ± s.d. |")
    print("|---|---|---|---|---|")
    for name, run in by_seed[0].items():
        if "val_top1" in run["last"]:
            found = [runs[name]["last"]["val_top1"] for runs in by_seed]
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            print(
                f"| `{name}` | {run['run']['pretrained'] or 'nothing'} | {run['run']['trunk']} | "
                f"{', '.join(f'{value:.1f}' for value in found)} | {statistics.mean(found):.1f}{spread} |"
            )
    print(f"\nminutes: {', '.join(f'{each:.1f}' for each in minutes)} (the films are made in the first)")


if __name__ == "__main__":
    main(*folder_and_seeds(__doc__, [1, 2, 3]))
