"""The five stages on rendered videos, larger than `make demo`: what the recipe gives in some minutes on a GPU."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.device import DEVICE, ON_GPU, describe
from omnivision.utils.io import write_json
from omnivision_demo.dataset import write_demo_data
from omnivision_demo.spec import ACTIONS
from tests import stage_runs
from tests.runs import read_metrics, read_summary

SEEDS = (1, 2)
RENDERING = 0.1  # of the time
VIDEOS_PER_CORE_MINUTE = 2000  # that are rendered
TARGET = 40  # training videos of an action in the target domain: few, as labels of real videos are


class Stage(NamedTuple):
    """A run: its experiment and recipe, the runs that it starts from, and its share of the time."""

    experiment: str
    recipe: str
    starts: tuple[str, ...]
    share: float


STAGES = {
    "mae": Stage("mae", "mae_demo_config", (), 0.3),
    "align_synthetic": Stage("align", "mae_ft_demo_synthetic_config", ("mae",), 0.3),
    "align_nohuman": Stage("align", "mae_ft_demo_nohuman_config", ("mae",), 0.05),
    "scratch": Stage("finetune", "mae_ft_demo_config", (), 0.07),
    "finetune_mae": Stage("finetune", "mae_ft_demo_config", ("mae",), 0.07),
    "finetune": Stage("finetune", "mae_ft_demo_config", ("align_synthetic",), 0.07),
    "probe": Stage("probe", "mae_ft_demo_config", ("align_synthetic",), 0.07),
    "average": Stage("average", "mae_ft_demo_config", ("align_synthetic", "align_nohuman"), 0.07),
}
# What stages train on that do not train on the target.
DOMAINS = {"mae": ("synthetic", "nohuman"), "align_synthetic": ("synthetic",), "align_nohuman": ("nohuman",)}
# For ViT-S and batches of 64, peaks of 8e-4 and 1e-3; heads alone take the recipe's.
RATES = {"mae": "lr=8e-4", "align": "lr_scale_factor=4", "finetune": "lr_scale_factor=4"}
MODELS = {"mae": "", "average": "_average_ft"}
MAX_EPOCHS = 200  # of few videos, more only overfit
START = 5.0  # seconds of a run that are not training
REPEATS = 10  # of the target's videos in an epoch: fewer epochs, and fewer checkpoints


class Recipe:
    """The stages of each seed, with epochs that fit the time."""

    def __init__(self, folder: Path, minutes: float, quick: bool) -> None:
        self.folder, self.quick = folder / "recipe", quick
        starts = START * (len(SEEDS) * len(STAGES) + len({stage.experiment for stage in STAGES.values()}))
        self.seconds = max(0.0, 60 * minutes * (1 - RENDERING) - starts)
        self.cores = len(os.sched_getaffinity(0))
        self.rates: dict[str, float] = {}  # clips per second by experiment
        self.rows: list[dict[str, Any]] = []
        videos = int(minutes * RENDERING * self.cores * VIDEOS_PER_CORE_MINUTE)
        synthetic = 2 if quick else max(4, (videos - 2 * len(ACTIONS) * TARGET) // len(ACTIONS))
        self.counts = {"synthetic": synthetic, "nohuman": 2 if quick else TARGET, "target": 2 if quick else TARGET}
        shutil.rmtree(self.folder, ignore_errors=True)  # an earlier one had other epochs, perhaps other videos
        train, val = (2, 1) if quick else (TARGET, 20)
        write_demo_data(self.folder / "data", train=train, val=val, synthetic=synthetic, workers=self.cores)

    def settings(self, name: str, seed: int, *overrides: str) -> list[str]:
        stage = STAGES[name]
        starts = ",".join(str(self.run_dir(start, seed)) for start in stage.starts) or "null"
        size, batch = ("vitmicro", 8) if self.quick else ("vitsmall", 64)
        return [
            f"+experiments=demo/{stage.experiment}", f"+trainer={stage.recipe}", f"data_root={self.folder / 'data'}",
            f"trainer/model={size}{MODELS.get(stage.experiment, '_ft')}", "trainer.model.trunk.tubelet=[2,8,8]",
            f"pretrained_checkpoint_path={f'[{starts}]' if len(stage.starts) > 1 else starts}", f"trainer.seed_value={seed}",
            f"batch_size={batch}", RATES.get(stage.experiment, "lr_scale_factor=1"), f"num_workers={self.cores}",
            f"trainer.optim.amp.enabled={str(ON_GPU).lower()}", f"trainer.accelerator={DEVICE.type}",
            *([] if name in DOMAINS else [f"++trainer.data.repeats.target={REPEATS}"]), *overrides,
        ]  # fmt: skip

    def run_dir(self, name: str, seed: int) -> Path:
        return self.folder / f"seed_{seed}" / name

    def videos(self, name: str) -> int:
        """Return how many videos a stage trains on."""
        return len(ACTIONS) * sum(self.counts[domain] for domain in DOMAINS.get(name, ("target",)))

    def epochs(self, name: str, seed: int) -> int:
        """Return the epochs that fit the time of a stage, by the rate of a short run of its experiment."""
        stage = STAGES[name]
        if stage.experiment not in self.rates:
            run = self.folder / f"rate_{stage.experiment}"
            steps = 2 if self.quick else 8 * self.cores  # more than workers prefetch while it starts
            short = ["epochs=1", f"trainer.limit_train_batches={steps}", f"trainer.logging.log_freq={steps // 2}",
                     "trainer.mode=train_only", f"launcher.experiment_log_dir={run}"]  # fmt: skip
            self.start(self.settings(name, seed, *short))
            self.rates[stage.experiment] = read_metrics(run)[-1]["clips_per_second"]
        seconds = self.seconds * stage.share / len(SEEDS)
        clips = self.videos(name) * (1 if name in DOMAINS else REPEATS)
        fits = int(seconds * self.rates[stage.experiment] / clips)
        return 1 if self.quick else max(1, min(MAX_EPOCHS, fits))

    @staticmethod
    def start(settings: list[str]) -> None:
        result = stage_runs.run_in_process(settings)
        if result.returncode:
            raise RuntimeError(result.stderr[-2000:])

    def train(self, name: str, seed: int) -> None:
        """Run a stage."""
        start, run, epochs = time.monotonic(), self.run_dir(name, seed), self.epochs(name, seed)
        self.start(self.settings(name, seed, f"epochs={epochs}", f"launcher.experiment_log_dir={run}"))
        top1 = read_summary(run)["last"].get("val_top1")
        row = {"run": name, "seed": seed, "epochs": epochs, "minutes": (time.monotonic() - start) / 60, "top1": top1}
        self.rows.append(row)
        score = "" if top1 is None else f", top-1 {top1:.1f} %"
        print(f"  seed {seed}, {name}: {epochs} epochs, {row['minutes']:.1f} min{score}", flush=True)

    def table(self) -> str:
        """Return the table of `make demo`, with both seeds."""
        chance = 100 / len(ACTIONS)
        lines = [
            f"| run | starts from | videos | epochs | top-1 % with seeds {', '.join(map(str, SEEDS))} | mean | chance % |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, stage in STAGES.items():
            rows = [row for row in self.rows if row["run"] == name]
            scores = [row["top1"] for row in rows if row["top1"] is not None]
            cells = [name, " + ".join(stage.starts) or "nothing", self.videos(name), rows[0]["epochs"]]
            if scores:
                cells += [
                    ", ".join(f"{score:.1f}" for score in scores),
                    f"{statistics.mean(scores):.1f}",
                    f"{chance:.1f}",
                ]
                lines.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join(lines) + "\n"


def run_recipe(folder: Path, minutes: float, quick: bool) -> None:
    """Run all stages with both seeds; write recipe.json, recipe.md and a reconstruction."""
    start = time.monotonic()
    recipe = Recipe(folder, minutes, quick)
    print(
        f"{sum(map(recipe.videos, ('mae', 'finetune')))} training videos, {time.monotonic() - start:.0f} s", flush=True
    )
    facts = {"machine": describe(), "minutes": minutes, "rates": recipe.rates, "runs": recipe.rows}
    for seed in SEEDS:
        for name in STAGES:
            recipe.train(name, seed)
            write_json(folder / "recipe.json", facts)
    table = recipe.table()
    (folder / "recipe.md").write_text(table)
    shutil.copy(recipe.run_dir("mae", SEEDS[0]) / "pictures/last.gif", folder / "reconstruction.gif")
    print(f"\n{table}\n{(time.monotonic() - start) / 60:.1f} min; runs in {recipe.folder}")
