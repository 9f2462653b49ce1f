"""The demo with several seeds (docs/demo.md), or with other decoders in stage 1 (docs/performance.md).

    python -m benchmarks.demo_runs seeds FOLDER [SEED ...]         about 7 minutes each on two cores
    python -m benchmarks.demo_runs decoders FOLDER [SEED ...]      about 20 minutes each

All runs see the same videos; initialization, order of samples, crops and masks differ.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.commands import SCRIPT, demo_data
from benchmarks.steps import DECODERS
from omnivision.tools.runs import read_summaries
from tests.runs import ROOT, read_summary


def seeds(folder: Path, numbers: list[int]) -> None:
    """Print the top-1 accuracy of each run of the demo for each seed, and its spread."""
    minutes = []
    for seed in numbers:
        start = time.monotonic()
        subprocess.run(
            ["sh", str(ROOT / "utils" / "run_scripts" / "run_demo.sh"), f"trainer.seed_value={seed}"],
            env=os.environ | {"DEMO": str(folder / f"seed_{seed}"), "DATA": str(folder / "data")},
            check=True,
        )
        minutes.append(f"{(time.monotonic() - start) / 60:.1f}")
    by_seed = [{run["name"]: run for run in read_summaries(folder / f"seed_{seed}")} for seed in numbers]
    print(f"\n| run | starts from | trunk | top-1 % with seed {', '.join(map(str, numbers))} | mean ± s.d. |")
    print("|---|---|---|---|---|")
    for name, run in by_seed[0].items():
        if "val_top1" in run["last"]:
            top1 = [runs[name]["last"]["val_top1"] for runs in by_seed]
            spread = f" ± {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
            cells = [f"`{name}`", run["run"]["pretrained"] or "nothing", run["run"]["trunk"],
                     ", ".join(f"{value:.1f}" for value in top1), f"{statistics.mean(top1):.1f}{spread}"]  # fmt: skip
            print(f"| {' | '.join(cells)} |")
    print(f"\nminutes: {', '.join(minutes)} (the first includes the videos)")


def decoders(folder: Path, numbers: list[int]) -> None:
    """Print losses of stage 1 (over all masked tokens) and accuracies of later stages for each decoder of stage 1."""
    data = folder / "data"
    demo_data(data)

    def stage(run: Path, experiment: str, recipe: str, pretrained: Path | str, *overrides: str) -> dict[str, Any]:
        settings = [f"+experiments=demo/{experiment}", f"+trainer={recipe}", f"data_root={data}"]
        settings += [f"pretrained_checkpoint_path={pretrained}", f"launcher.experiment_log_dir={run}", *overrides]
        subprocess.run([sys.executable, str(SCRIPT), *settings], check=True, stdout=subprocess.DEVNULL)
        return read_summary(run)

    print("| decoder of stage 1 | seed | s of stage 1 | its validation loss | fine-tuned, top-1 % | probed, top-1 % |")
    print("|---|---|---|---|---|---|")
    for seed in numbers:
        for name, options in list(DECODERS.items())[:3]:
            runs, same = folder / f"seed_{seed}" / name.replace(" ", "_"), f"trainer.seed_value={seed}"
            decoder = [f"trainer.model.decoder.{key}={value}" for key, value in options.items()]
            at_end = "trainer.val_epoch_freq=100"
            mae = stage(runs / "mae", "mae", "mae_demo_config", "null", same, at_end, *decoder)
            stage(runs / "align", "align", "mae_ft_demo_synthetic_config", runs / "mae", same)
            top1 = [
                stage(runs / what, what, "mae_ft_demo_config", runs / "align", same)["last"]["val_top1"]
                for what in ("finetune", "probe")
            ]
            cells = [name, str(seed), f"{mae['wall_time']:.0f}", f"{mae['last']['val_loss']:.4f}"]
            print(f"| {' | '.join([*cells, *(f'{value:.1f}' for value in top1)])} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("seeds", "decoders"))
    parser.add_argument("folder", type=Path, help="of the videos and the runs")
    parser.add_argument("seeds", type=int, nargs="*", default=[1, 2, 3], help="%(default)s by default")
    options = parser.parse_args()
    {"seeds": seeds, "decoders": decoders}[options.what](options.folder.absolute(), options.seeds)
