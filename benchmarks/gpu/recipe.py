"""The five stages on rendered videos, larger than `make demo`: what the recipe gives in some minutes on a GPU."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.device import DEVICE, ON_GPU, describe, run_command
from benchmarks.gpu.tables import fact_table, notes
from benchmarks.harness import machine
from omnivision.utils.errors import UserError
from omnivision.utils.io import write_json
from omnivision_demo.dataset import write_demo_data
from omnivision_demo.spec import ACTIONS
from tests.runs import read_metrics, read_summary
from tests.stage_runs import start_fork_server

SEEDS, QUICK_SEEDS = (1, 2), (1,)
RENDERING = 0.1  # of the time
VIDEOS_PER_CORE_MINUTE = 2000  # that are rendered
MOST_VIDEOS = 5000  # of an action
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
# Peaks of the learning rate for batches of 64.
RATES = {"mae": 4e-3, "align": 3e-3, "finetune": 2e-3, "probe": 16e-3, "average": 16e-3}
DECODER = ["trainer.model.decoder.width=192", "trainer.model.decoder.depth=4"]  # of ViT-S
MODELS = {"mae": "", "average": "_average_ft"}
MAX_EPOCHS = 200  # of few videos, more only overfit
START = 5.0  # seconds of a run that are not training
REPEATS = 10  # of the target's videos in an epoch: fewer epochs, and fewer checkpoints


class Recipe:
    """The stages of each seed, with epochs that fit the time."""

    def __init__(self, folder: Path, minutes: float, quick: bool) -> None:
        self.folder, self.quick = folder / "recipe", quick
        self.seeds = QUICK_SEEDS if quick else SEEDS
        starts = START * (len(self.seeds) * len(STAGES) + len({stage.experiment for stage in STAGES.values()}))
        self.seconds = max(0.0, 60 * minutes * (1 - RENDERING) - starts)
        self.cores = len(os.sched_getaffinity(0))
        self.rates: dict[str, float] = {}  # clips per second by experiment
        self.rows: list[dict[str, Any]] = []
        videos = int(minutes * RENDERING * self.cores * VIDEOS_PER_CORE_MINUTE)
        synthetic = 2 if quick else min(MOST_VIDEOS, max(4, videos // len(ACTIONS) - 2 * TARGET))
        self.counts = {"synthetic": synthetic, "nohuman": 2 if quick else TARGET, "target": 2 if quick else TARGET}
        mark = self.folder / ".recipe"
        if self.folder.exists():
            if not mark.exists():
                raise UserError(f"{self.folder} was not made by --recipe; move it, or set --out to another folder")
            shutil.rmtree(self.folder)  # an earlier one had other epochs, perhaps other videos
        self.folder.mkdir()
        mark.touch()
        train, self.val = (2, 1) if quick else (TARGET, 20)
        write_demo_data(self.folder / "data", train=train, val=self.val, synthetic=synthetic, workers=self.cores)

    def settings(self, name: str, seed: int, *overrides: str) -> list[str]:
        stage = STAGES[name]
        starts = ",".join(str(self.run_dir(start, seed)) for start in stage.starts) or "null"
        size, batch = ("vitmicro", 8) if self.quick else ("vitsmall", 64)
        return [
            f"+experiments=demo/{stage.experiment}", f"+trainer={stage.recipe}", f"data_root={self.folder / 'data'}",
            f"trainer/model={size}{MODELS.get(stage.experiment, '_ft')}", "trainer.model.trunk.tubelet=[2,6,6]",
            f"pretrained_checkpoint_path={f'[{starts}]' if len(stage.starts) > 1 else starts}", f"trainer.seed_value={seed}",
            f"batch_size={batch}", f"lr={RATES[stage.experiment]}", f"num_workers={self.cores}",
            f"trainer.optim.amp.enabled={str(ON_GPU).lower()}", f"trainer.accelerator={DEVICE.type}",
            *([] if self.quick or name != "mae" else DECODER),
            *([] if name in DOMAINS else [f"++trainer.data.repeats.target={REPEATS}"]), *overrides,
        ]  # fmt: skip

    def run_dir(self, name: str, seed: int) -> Path:
        return self.folder / f"seed_{seed}" / name

    def videos(self, name: str) -> int:
        """Return how many videos a stage trains on."""
        return len(ACTIONS) * sum(self.counts[domain] for domain in DOMAINS.get(name, ("target",)))

    @staticmethod
    def passes(name: str, epochs: int) -> int:
        """Return how often a stage sees each video."""
        return epochs * (1 if name in DOMAINS else REPEATS)

    def epochs(self, name: str, seed: int) -> int:
        """Return the epochs that fit the time of a stage, by the rate of a short run of its experiment."""
        stage = STAGES[name]
        if stage.experiment not in self.rates:
            run = self.folder / f"rate_{stage.experiment}"
            steps = 2 if self.quick else 8 * self.cores  # more than workers prefetch while it starts
            short = ["epochs=1", f"trainer.limit_train_batches={steps}", f"trainer.logging.log_freq={steps // 2}",
                     "trainer.mode=train_only", f"launcher.experiment_log_dir={run}"]  # fmt: skip
            run_command(self.settings(name, seed, *short))
            self.rates[stage.experiment] = read_metrics(run)[-1]["clips_per_second"]
        seconds = self.seconds * stage.share / len(self.seeds)
        clips = self.videos(name) * self.passes(name, epochs=1)
        fits = int(seconds * self.rates[stage.experiment] / clips)
        return 1 if self.quick else max(1, min(MAX_EPOCHS, fits))

    def train(self, name: str, seed: int) -> None:
        """Run a stage."""
        start, run, epochs = time.monotonic(), self.run_dir(name, seed), self.epochs(name, seed)
        run_command(self.settings(name, seed, f"epochs={epochs}", f"launcher.experiment_log_dir={run}"))
        top1 = read_summary(run)["last"].get("val_top1")
        passes, minutes = self.passes(name, epochs), (time.monotonic() - start) / 60
        row = {"run": name, "seed": seed, "epochs": epochs, "passes": passes, "minutes": minutes, "top1": top1}
        self.rows.append(row)
        score = "" if top1 is None else f", top-1 {top1:.1f} %"
        print(f"  seed {seed}, {name}: {passes} passes, {minutes:.1f} min{score}", flush=True)

    def table(self) -> str:
        """Return the table of `make demo`, with the seeds trained so far."""
        chance = 100 / len(ACTIONS)
        lines = [
            f"| run | starts from | videos | passes | top-1 % with seeds {', '.join(map(str, self.seeds))} | mean | chance % |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, stage in STAGES.items():
            rows = [row for row in self.rows if row["run"] == name]
            scores = [row["top1"] for row in rows if row["top1"] is not None]
            if scores:
                cells = [name, " + ".join(stage.starts) or "nothing", self.videos(name), rows[0]["passes"]]
                cells += [
                    ", ".join(f"{score:.1f}" for score in scores),
                    f"{statistics.mean(scores):.1f}",
                    f"{chance:.1f}",
                ]
                lines.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join(lines) + "\n"


def run_recipe(folder: Path, minutes: float, quick: bool) -> None:
    """Run all stages with each seed; write recipe.json and recipe.md after each, then a reconstruction."""
    start = time.monotonic()
    start_fork_server()  # had rendering started it, each data worker of a run would import torch
    for name in ("recipe.json", "recipe.md", "reconstruction.gif"):
        (folder / name).unlink(missing_ok=True)
    recipe = Recipe(folder, minutes, quick)
    print(
        f"{sum(map(recipe.videos, ('mae', 'finetune')))} training videos, {time.monotonic() - start:.0f} s", flush=True
    )
    facts = {"quick": quick, "machine": machine() | describe(), "minutes": minutes}
    facts |= {"rates": recipe.rates, "runs": recipe.rows}
    remarks = [
        *notes({"recipe": facts}),
        *["One epoch: the scores say nothing."] * quick,
        f"Top-1 is that of {len(ACTIONS) * recipe.val} validation videos. passes: how often a run sees each video.",
    ]
    for seed in recipe.seeds:
        for name in STAGES:
            recipe.train(name, seed)
            facts["measured_minutes"] = measured = (time.monotonic() - start) / 60
            write_json(folder / "recipe.json", facts)
            text = "\n".join([*remarks, f"{measured:.1f} minutes so far.", "", recipe.table()])
            machine_table = "\n".join(fact_table("machine", facts["machine"]))
            (folder / "recipe.md").write_text(f"{text}\n{machine_table}\n")
    print(f"\n{text}\nresults in {folder}, runs in {recipe.folder}")
    gif = recipe.run_dir("mae", recipe.seeds[0]) / "pictures/last.gif"
    if gif.is_file():
        shutil.copy(gif, folder / "reconstruction.gif")
    else:
        print(f"There is no reconstruction.gif: the run wrote no {gif}")
