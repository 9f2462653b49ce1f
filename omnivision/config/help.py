"""What `train_app_submitit.py --help` prints: the choices and the settings, read from the configuration files."""

from __future__ import annotations

from pathlib import Path

HEADER = """\
omnivision: video models by the PPMA recipe.

A run is an experiment (a stage of the recipe), a recipe for a dataset, and settings:

  python train_app_submitit.py +experiments=omnimae/omnimain_train_video.yaml +trainer=mae_k150_config.yaml \\
    trainer/model=vitbase ++batch_size=16 ++launcher.experiment_log_dir=FOLDER submitit.use_cluster=false

  --cfg job           print the composed settings
  trainer.mode=dry    print what the run would be, and what would stop it (exit code 1)
  -m                  a run for each of several values, KEY=A,B
  --config-dir DIR    a folder with site/, experiments/ or trainer/ files of your own; +site=NAME chooses DIR/site/NAME.yaml
  --config-name NAME  another primary file than config.yaml

Running the same command again resumes the run in its folder.
"""
CHOICES = {
    "+experiments=": ("experiments", ("omnimae", "demo")),
    "+trainer=": ("trainer", ("",)),
    "trainer/model=": ("trainer/model", ("",)),
    "trainer/data=": ("trainer/data", ("",)),
    "trainer/task=": ("trainer/task", ("",)),
    "trainer/optim=": ("trainer/optim", ("",)),
    "trainer/checkpoint=": ("trainer/checkpoint", ("",)),
}


def help_text(config_dir: Path) -> str:
    """Header, the choices of each group, and every setting with its default and meaning."""
    lines = [HEADER]
    for option, (group, folders) in CHOICES.items():
        names = [
            file.relative_to(config_dir / group).with_suffix("").as_posix()
            for folder in folders
            for file in sorted((config_dir / group / folder).glob("*.yaml"))
        ]
        lines.append(f"{option}\n  " + "\n  ".join(names))
    settings = (config_dir / "experiments" / "base.yaml").read_text(encoding="utf-8").splitlines()
    lines.append("\nSettings (KEY=VALUE; ++KEY=VALUE also sets what is not there yet)\n")
    lines += [f"  {line}" for line in settings[6:]]
    catalog = (config_dir / "experiments" / "dataset_catalog.yaml").read_text(encoding="utf-8")
    lines.append("\nThe catalog\n")
    lines += [f"  {line}" for line in catalog.partition("\n\n")[0].splitlines()[1:]]
    lines.append("\nArguments of the objects that a run builds (trainer.model, ...): --cfg job, and docs/settings.md")
    return "\n".join(lines)
