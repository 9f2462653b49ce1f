"""Stages of the recipe: which experiments, recipes and models go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omnivision.config.schema import Settings

# The experiment of each stage; those of the demo have the names of the stages.
EXPERIMENTS = {
    "mae": "omnimae/omnimain_train_video",
    "finetune": "omnimae/omnimain_train_video_ft",
    "probe": "omnimae/omnimain_train_video_lp",
    "average": "omnimae/omnimain_train_video_ensemble_ft",
}
# What the stages train, and how the names of such models end.
MODELS = {"mae": "autoencoder", "finetune": "classifier", "probe": "classifier", "average": "average"}
ENDINGS = {"average": "_average_ft", "classifier": "_ft", "autoencoder": ""}
EXAMPLE_RECIPES = {"mae": "mae_k150_config"} | dict.fromkeys(("finetune", "probe", "average"), "mae_ft_ucf101_config")


def model_kind(model: Mapping[str, Any]) -> str | None:
    """Tell an autoencoder, an average and a classifier apart by the arguments of trainer.model; None for a user's own class."""
    if not str(model.get("_target_", "")).startswith("omnivision."):
        return None
    return "autoencoder" if "decoder" in model else "average" if "num_models" in model else "classifier"


def reconstructs(target: str) -> bool | None:
    """Whether a task reconstructs masked videos or learns from labels; None for a user's own task."""
    return {"Reconstruct": True, "Classify": False}.get(target.rpartition(".")[2])


def guess_stage(choices: Mapping[str, str], task: str | None = None) -> str:
    """The stage that choices look like where no experiment says it: by optimizer, model, and the `_target_` of the task."""
    if (optimizer := choices.get("trainer/optim", "")) in EXPERIMENTS:
        return optimizer
    model = choices.get("trainer/model", "")
    if model.endswith(ENDINGS["average"]):
        return "average"
    labels = reconstructs(task) is False if task else "mae_ft_" in choices.get("trainer", "")
    return "finetune" if labels or model.endswith(ENDINGS["classifier"]) else "mae"


def stage_problems(settings: Settings, choices: Mapping[str, str], folders: Sequence[Path]) -> list[str]:
    """Find an experiment, a recipe and a model of different stages; returns a sentence with the choices that go together.

    `choices` are `typed_choices`, `folders` hold the config files.
    """
    trainer = settings.trainer
    model, masked = model_kind(trainer.model), reconstructs(trainer.task["_target_"])
    stages = sorted(EXPERIMENTS, key=lambda stage: stage != settings.stage)  # the experiment's own first
    fitting = [stage for stage in stages if model in (None, MODELS[stage]) and masked in (None, stage == "mae")]
    if fitting and settings.stage in (None, *fitting):
        return []
    options = [option for stage in stages if (option := _changes(settings, stage, choices, folders))]
    fewest = min((count for count, _ in options), default=0)
    advice = ", or ".join([changes for count, changes in options if count == fewest][:2])
    task = {True: "reconstructs masked videos", False: "learns from labels", None: "is your own"}[masked]
    given = [name for group, name in choices.items() if group in ("experiments", "trainer", "trainer/model")]
    return [
        f"Stages are mixed ({', '.join(given)}): the experiment is of stage {settings.stage}, the task {task}, the model is of "
        f"the kind {model or 'your own'}. Choose {advice or 'an experiment and a recipe of one stage'}."
    ]


def stage_warnings(settings: Settings, choices: Mapping[str, str]) -> list[str]:
    """Warn about typed choices (`typed_choices`) of another stage than the experiment's, which the model allows."""
    stage, warnings = settings.stage, []
    if "stage" in choices:
        warnings.append(
            "stage is set by the experiment, and typing it changes nothing else. Choose +experiments=... instead."
        )
    optimizer = choices.get("trainer/optim")
    if "stage" not in choices and optimizer in EXPERIMENTS and stage in EXPERIMENTS and optimizer != stage:
        warnings.append(f"trainer/optim={optimizer} is for another stage than {stage}. Set trainer/optim={stage}.")
    weights = choices.get("trainer/checkpoint", "default")
    if weights.endswith("_ensemble") != ("num_models" in settings.trainer.model) and "trainer/checkpoint" in choices:
        kind = "an average of checkpoints" if weights.endswith("_ensemble") else "a single model"
        warnings.append(f"trainer/checkpoint={weights} is for {kind}, which trainer.model is not. Choose another.")
    return warnings


def _changes(
    settings: Settings, stage: str, choices: Mapping[str, str], folders: Sequence[Path]
) -> tuple[int, str] | None:
    """How many typed choices a user has to change for a stage, and all choices to make; None where no recipe is for it."""
    changes, source = {}, settings.pretrained_checkpoint_path
    if settings.stage not in (None, stage):
        demo = choices.get("experiments", "").startswith("demo/")
        changes["+experiments"] = f"demo/{stage}" if demo else EXPERIMENTS[stage]
    if reconstructs(settings.trainer.task["_target_"]) is (stage != "mae"):
        recipe = _other_recipe(choices.get("trainer", ""), stage, folders)
        if recipe is None:
            return None
        changes["+trainer"] = recipe
    kind = model_kind(settings.trainer.model)
    if kind not in (None, MODELS[stage]) and ("trainer/model" in choices or "+experiments" not in changes):
        names = choices.get("trainer/model", f"NAME{ENDINGS[kind]}").split(",")
        changes["trainer/model"] = ",".join(f"{n.removesuffix(ENDINGS[kind])}{ENDINGS[MODELS[stage]]}" for n in names)
    count = len(changes)
    if stage == "average" and not isinstance(source, list):
        changes["pretrained_checkpoint_path"] = "[RUN,RUN]"
    elif stage != "average" and (
        isinstance(source, list) or (stage != "mae" and settings.stage == "mae" and not source)
    ):
        changes["pretrained_checkpoint_path"] = "RUN"
    return count, " ".join(f"{name}={value}" for name, value in changes.items())


def _other_recipe(names: str, stage: str, folders: Sequence[Path]) -> str | None:
    """The recipe for the same data and another task; an example where a user's own recipe has none beside it."""
    found = []
    for name in names.split(","):
        other = name.replace("mae_ft_", "mae_", 1) if stage == "mae" else name.replace("mae_", "mae_ft_", 1)
        if not name.startswith("mae_"):
            other = EXAMPLE_RECIPES[stage]
        elif not any((folder / "trainer" / f"{other}.yaml").is_file() for folder in folders):
            return None
        found.append(other)
    return ",".join(dict.fromkeys(found))
