"""The demo with several seeds, its trunks on other videos (docs/demo.md), or other decoders in stage 1 (docs/performance.md).

    python -m benchmarks.demo_runs seeds FOLDER [SEED ...]         about 6 minutes each on two cores
    python -m benchmarks.demo_runs stage1 FOLDER [SEED ...]        after `seeds`, with more videos in stage 1: 12 minutes
    python -m benchmarks.demo_runs mocap FOLDER [SEED ...]         after `seeds`, on videos of mocap_videos: 6 minutes each
    python -m benchmarks.demo_runs decoders FOLDER [SEED ...]      about 20 minutes each

All runs see the same videos; initialization, order of samples, crops and masks differ. The first three write
docs/demo_results.json, from which `python docs/generate.py` makes tables.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.checkouts import KEEP_FREED_MEMORY
from benchmarks.commands import SCRIPT, demo_data
from benchmarks.gpu.recipe import DOMAINS, STAGES
from benchmarks.steps import DECODERS
from omnivision.utils.io import write_atomically, write_json
from omnivision_demo import report
from omnivision_demo.spec import ACTIONS
from tests.runs import ROOT, read_summary

RESULTS = ROOT / "docs" / "demo_results.json"


def seeds(folder: Path, numbers: list[int]) -> None:
    """Run the demo with each seed; print and save the accuracies, and write a page about all."""
    minutes = []
    for seed in numbers:
        start = time.monotonic()
        subprocess.run(
            ["sh", str(ROOT / "utils" / "run_scripts" / "run_demo.sh"), f"trainer.seed_value={seed}"],
            env=os.environ | {"DEMO": str(folder / f"seed_{seed}"), "DATA": str(folder / "data")},
            check=True,
        )
        minutes.append(f"{(time.monotonic() - start) / 60:.1f}")
    demos = [folder / f"seed_{seed}" for seed in numbers]
    results = report.collect_results(demos)
    write_atomically(folder / "report.html", report.render_page(demos[0], results))
    save_results("demo", results)
    save_tables({"probes": report.collect_probes(demos), "xrays": report.collect_xrays(demos)})
    print(f"\nminutes: {', '.join(minutes)} (the first includes the videos)")


def mocap(folder: Path, numbers: list[int]) -> None:
    """Fine-tune and probe the trunks of `seeds` on the videos of benchmarks.mocap_videos in FOLDER/mocap."""
    data = folder / "mocap"
    classes = len((data / "class_names.txt").read_text().split())
    for seed in numbers:
        sources, runs = folder / f"seed_{seed}", folder / "mocap_runs" / f"seed_{seed}"
        same = f"trainer.seed_value={seed}", f"datasets.target.num_classes={classes}"
        for name, stage in STAGES.items():
            if name not in DOMAINS:  # so it trains on the target
                starts = ",".join(str(sources / start) for start in stage.starts) or "null"
                pretrained = f"[{starts}]" if len(stage.starts) > 1 else starts
                run_stage(data, runs / name, stage.experiment, stage.recipe, pretrained, *same)
    save_results("mocap", report.collect_results([folder / "mocap_runs" / f"seed_{seed}" for seed in numbers]))


def stage1(folder: Path, numbers: list[int]) -> None:
    """Pretrain on as many videos as `make demo MINUTES=...` has, one seed each; fine-tune with each seed on the target.

    The starter weights are the autoencoder of 60 minutes.
    """
    saved = json.loads(RESULTS.read_text(encoding="utf-8"))["demo"]
    random, first = (next(row for row in saved if row["name"] == name) for name in ("scratch", "finetune_mae"))
    results = [report.Result(**random), report.Result(**first | {"starts_from": "mae, 3,000 videos"})]
    for minutes in (15, 60):
        each = 125 * (minutes - 2)  # as in run_demo.sh
        runs = folder / f"minutes_{minutes}"
        if minutes < 60:
            data, trunk = runs / "data", runs / "mae"
            demo_data(data, "--synthetic", str(each))
            run_stage(data, trunk, "mae", "mae_demo_config", "null")
        else:
            trunk = ROOT / "examples" / "starter" / "autoencoder.safetensors"
        top1 = []
        for seed in numbers:
            run, same = runs / f"finetune_{seed}", f"trainer.seed_value={seed}"
            summary = run_stage(data, run, "finetune", "mae_ft_demo_config", trunk, same)
            top1.append(summary["last"]["val_top1"])
        count = each * len(ACTIONS)
        results.append(results[-1]._replace(starts_from=f"mae, {count:,} videos", top1=top1))
        save_results("stage1", results)


def save_results(name: str, results: list[report.Result]) -> None:
    """Print a table and write the results to docs/demo_results.json."""
    print(f"\n{report.format_table(results)}")
    save_tables({name: [result._asdict() for result in results]})


def save_tables(tables: Mapping[str, Any]) -> None:
    """Add or replace tables in docs/demo_results.json."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    write_json(RESULTS, known | tables)


def run_stage(
    data: Path, run: Path, experiment: str, recipe: str, pretrained: Path | str, *overrides: str
) -> dict[str, Any]:
    """Run a stage of the demo as its script does; return the summary."""
    settings = [f"+experiments=demo/{experiment}", f"+trainer={recipe}", f"data_root={data}"]
    settings += [f"pretrained_checkpoint_path={pretrained}", f"launcher.experiment_log_dir={run}", *overrides]
    environment = os.environ | KEEP_FREED_MEMORY | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(SCRIPT), *settings], check=True, stdout=subprocess.DEVNULL, env=environment)
    return read_summary(run)


def decoders(folder: Path, numbers: list[int]) -> None:
    """Print losses of stage 1 (over all masked tokens) and accuracies of later stages for each decoder of stage 1."""
    data = folder / "data"
    demo_data(data)
    print("| decoder of stage 1 | seed | s of stage 1 | its validation loss | fine-tuned, top-1 % | probed, top-1 % |")
    print("|---|---|---|---|---|---|")
    for seed in numbers:
        for name, options in list(DECODERS.items())[:3]:
            runs, same = folder / f"seed_{seed}" / name.replace(" ", "_"), f"trainer.seed_value={seed}"
            decoder = [f"trainer.model.decoder.{key}={value}" for key, value in options.items()]
            at_end = "trainer.val_epoch_freq=100"
            mae = run_stage(data, runs / "mae", "mae", "mae_demo_config", "null", same, at_end, *decoder)
            run_stage(data, runs / "align", "align", "mae_ft_demo_synthetic_config", runs / "mae", same)
            top1 = [
                run_stage(data, runs / what, what, "mae_ft_demo_config", runs / "align", same)["last"]["val_top1"]
                for what in ("finetune", "probe")
            ]
            cells = [name, str(seed), f"{mae['wall_time']:.0f}", f"{mae['last']['val_loss']:.4f}"]
            print(f"| {' | '.join([*cells, *(f'{value:.1f}' for value in top1)])} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("seeds", "stage1", "mocap", "decoders"))
    parser.add_argument("folder", type=Path, help="of the videos and the runs")
    parser.add_argument("seeds", type=int, nargs="*", default=[1, 2, 3], help="%(default)s by default")
    options = parser.parse_args()
    {"seeds": seeds, "stage1": stage1, "mocap": mocap, "decoders": decoders}[options.what](
        options.folder.absolute(), options.seeds
    )
