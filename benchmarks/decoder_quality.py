"""What the cheaper decoders cost in quality, on the demo: stage 1 with each, then alignment, fine-tuning and probing.

    python -m benchmarks.decoder_quality FOLDER [SEED ...]       some twenty minutes each on two cores

All see the same films and the same masks; only the decoder of stage 1 differs. Its validation loss is over all masked tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.command import folder_and_seeds
from benchmarks.start import SCRIPT, demo_data

KINDS = {
    "the recipe": [],
    "half of the masked tokens": ["trainer.model.decoder.share=0.5"],
    "cross-attention": ["trainer.model.decoder.attention=cross"],
}
STAGES = [("align", "align", "mae_ft_demo_synthetic_config", "mae"), ("finetune", "finetune", "mae_ft_demo_config", "align"),
          ("probe", "probe", "mae_ft_demo_config", "align")]  # fmt: skip


def stage(
    folder: Path, data: Path, experiment: str, recipe: str, start: Path | None, *overrides: str
) -> dict[str, Any]:
    """Run one stage of the demo; what its summary says."""
    command = [sys.executable, str(SCRIPT), f"+experiments=demo/{experiment}", f"+trainer={recipe}", f"data_root={data}",
               f"pretrained_checkpoint_path={start or 'null'}", f"launcher.experiment_log_dir={folder}",
               *overrides]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return dict(json.loads((folder / "summary.json").read_text()))


def main(folder: Path, seeds: list[int]) -> None:
    data = folder / "data"
    demo_data(data)
    print("| decoder of stage 1 | seed | s of stage 1 | its validation loss | fine-tuned, top-1 % | probed, top-1 % |")
    print("|---|---|---|---|---|---|")
    for seed in seeds:
        for name, overrides in KINDS.items():
            runs = folder / f"seed_{seed}" / name.replace(" ", "_")
            common = f"trainer.seed_value={seed}"
            validated = ["trainer.val_epoch_freq=100", *overrides]  # at the end alone
            mae = stage(runs / "mae", data, "mae", "mae_demo_config", None, common, *validated)
            found = {what: stage(runs / what, data, experiment, recipe, runs / start, common)
                     for what, experiment, recipe, start in STAGES}  # fmt: skip
            cells = [name, str(seed), f"{mae['wall_time']:.0f}", f"{mae['last']['val_loss']:.4f}",
                     *(f"{found[what]['last']['val_top1']:.1f}" for what in ("finetune", "probe"))]  # fmt: skip
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(*folder_and_seeds(__doc__, [1]))
