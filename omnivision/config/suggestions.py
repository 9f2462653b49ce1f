"""What somebody meant by the name of a setting that there is none of."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from omnivision.config.reader import all_hints, told
from omnivision.config.schema import Settings

# What other trainers have a setting for and this one says in another way; by the last part of a name.
ELSEWHERE = {
    "warmup": "warm-up is the first part of the schedule trainer.optim.options.lr",
    "warmup_epochs": "warm-up is the first part of the schedule trainer.optim.options.lr",
    "weight_decay": "weight decay is a schedule, trainer.optim.options.weight_decay",
    "wd": "weight decay is a schedule, trainer.optim.options.weight_decay",
    "fp16": "precision is trainer.optim.amp.amp_dtype, one of auto, bfloat16, float16",
    "bf16": "precision is trainer.optim.amp.amp_dtype, one of auto, bfloat16, float16",
    "fp32": "full precision is trainer.optim.amp.enabled=false",
    "resume": "a run resumes when the same command is given again",
    "resume_from": "a run resumes when the same command is given again",
    "mask": "masks are mask_ratio and trainer.data.mask",
    "num_classes": "the number of classes is that of the catalog, datasets.NAME.num_classes",
    "nb_classes": "the number of classes is that of the catalog, datasets.NAME.num_classes",
    "mixup": "mixup and CutMix are trainer.task.mixing of stages that learn from labels",
    "cutmix": "mixup and CutMix are trainer.task.mixing of stages that learn from labels",
    "dry": "trainer.mode=dry says what a run would be",
    "dry_run": "trainer.mode=dry says what a run would be",
    "eval": "trainer.mode=val evaluates",
}
# The same where this one has such a setting, under another name.
CALLED = {
    "bs": "batch_size",
    "learning_rate": "lr",
    "lr": "lr",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "workers": "num_workers",
    "frames": "num_frames",
    "clip_len": "num_frames",
    "crop_size": "image_size",
    "input_size": "image_size",
    "img_size": "image_size",
    "device": "trainer.accelerator",
    "seed": "trainer.seed_value",
    "precision": "trainer.optim.amp.amp_dtype",
    "clip_grad": "trainer.optim.gradient_clip",
    "grad_clip": "trainer.optim.gradient_clip",
    "accum_iter": "trainer.optim.accumulation_steps",
    "gradient_accumulation_steps": "trainer.optim.accumulation_steps",
    "log_interval": "trainer.logging.log_freq",
    "nodes": "launcher.num_nodes",
    "num_nodes": "launcher.num_nodes",
    "gpus": "launcher.gpus_per_node",
    "num_gpus": "launcher.gpus_per_node",
    "devices": "launcher.gpus_per_node",
    "nproc_per_node": "launcher.gpus_per_node",
    "log_dir": "launcher.experiment_log_dir",
    "work_dir": "launcher.experiment_log_dir",
    "output_dir": "launcher.experiment_log_dir",
    "pretrained": "pretrained_checkpoint_path",
    "load_from": "pretrained_checkpoint_path",
    "finetune": "pretrained_checkpoint_path",
    "partition": "submitit.partition",
    "account": "submitit.account",
    "qos": "submitit.qos",
}


def setting_names() -> list[str]:
    """The full name of every setting that the schema has."""
    return list(setting_hints())


def setting_hints() -> dict[str, Any]:
    """The type of every setting of the schema, by its full name."""
    return dict(all_hints(Settings))


def suggestion(key: str, root: DictConfig | None) -> str | None:
    """How a sentence about a key that is no setting goes on: what was meant, with its type and value; None if nothing is near.

    `root` is the configuration as far as it was composed.
    """
    last = key.rpartition(".")[2].lower()
    if last in ELSEWHERE:
        return f"; {ELSEWHERE[last]}."
    hints = setting_hints()
    name = CALLED.get(last)
    if name is None or name == key:
        known = list(dict.fromkeys([*hints, *_names_in(root, "")]))
        other = [each for each in known if each != key and not key.startswith(f"{each}.")]
        same = [each for each in other if each.rpartition(".")[2].lower() == last]
        alike = [each for each in other if difflib.get_close_matches(last, [each.rpartition(".")[2].lower()])]
        near = [each for each in same if each.endswith(f".{key}")] or difflib.get_close_matches(key, same, 1, cutoff=0)
        near = near or difflib.get_close_matches(key, alike, 1)
        if not near:
            return None
        name = near[0]
    above, _, part = name.rpartition(".")
    node = OmegaConf.select(root, above, throw_on_resolution_failure=False) if root is not None and above else root
    return f"; did you mean {name}{told(hints.get(name), node, part)}?"


def _names_in(node: Any, where: str) -> Iterator[str]:
    """The full name of every part of a configuration; nothing is resolved."""
    for key in node if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing() else ():
        yield f"{where}{key!s}"
        yield from _names_in(node._get_node(key, validate_access=False), f"{where}{key!s}.")
