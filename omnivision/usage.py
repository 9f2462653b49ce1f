"""What `train_app_submitit.py --help` prints, read off the configuration folder. (Hydra's own help takes seconds.)"""

from __future__ import annotations

from pathlib import Path

HEADER = """\
omnivision: video models by the PPMA recipe.

A run is an experiment (a stage of the recipe), a recipe for a dataset, and settings:

  python train_app_submitit.py +experiments=omnimae/omnimain_train_video.yaml +trainer=mae_k150_config.yaml \\
    trainer/model=vitbase ++batch_size=16 ++launcher.experiment_log_dir=FOLDER submitit.use_cluster=false

  --cfg job           print the composed settings
  trainer.mode=dry    check them and tell what the run would be
  --hydra-help        Hydra's own flags (-m for sweeps, --config-dir for settings of a site, ...)

Running the same command again resumes the run in its folder.
"""

GROUPS = {
    "+experiments=": ("experiments", ("omnimae", "demo")),
    "+trainer=": ("trainer", ("",)),
    "trainer/model=": ("trainer/model", ("",)),
}


def usage(config: Path) -> str:
    """Header, the choices of each group, and every setting with its default and meaning."""
    lines = [HEADER]
    for option, (group, folders) in GROUPS.items():
        names = [
            file.relative_to(config / group).with_suffix("").as_posix()
            for folder in folders
            for file in sorted((config / group / folder).glob("*.yaml"))
        ]
        lines.append(f"{option}\n  " + "\n  ".join(names))
    settings = (config / "experiments" / "base.yaml").read_text(encoding="utf-8").splitlines()
    lines.append("\nSettings (KEY=VALUE; ++KEY=VALUE also sets what is not there yet)\n")
    lines += [f"  {line}" for line in settings[6:]]
    return "\n".join(lines)
