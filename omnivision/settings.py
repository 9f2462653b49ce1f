"""The settings of a run: every key with its type and range, and what must hold between them.

Defaults stand in `config/experiments/base.yaml`, meanings in the comments there. `check` turns a composed configuration
into `Settings`, or raises one UserError that lists all problems; it imports nothing heavy, so that it can run anywhere.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig

from omnivision.errors import UserError
from omnivision.schema import Count, Natural, Positive, Range, Reader, Target, unknown_key
from omnivision.settings_submitit import SubmititSettings

Seed = Annotated[int, Range(low=0, high=2**32 - 1)]
Share = Annotated[float, Range(low=0, high=1)]
ScaleFactor = Annotated[
    float,
    Range(above=0),
    "It is nominal batch / global batch; a shell divides whole numbers and drops the rest: pass e.g. ++lr_scale_factor=0.5.",
]


# Folders of choices, which a command line names beside settings.
GROUPS = ("experiments", "trainer/model", "trainer/checkpoint", "trainer/optim", "trainer/data", "trainer/task")
# What a decoder is made of; the model fills in the rest.
DECODER = ("width", "depth", "heads")


@dataclass
class SplitSettings:
    paths: str | list[str]
    labels: str | list[str] | None = None
    depth: str | list[str] | None = None


@dataclass
class DatasetSettings:
    """An entry of the catalog."""

    kind: Literal["video", "image", "rgbd"] = "video"
    num_classes: Annotated[int, Range(low=1, high=1_000_000)] | None = None
    class_names: str | None = None
    label_set: str | None = None
    prefix: str = ""
    remove_prefix: str = ""
    suffix: str = ""
    remove_suffix: str = ""
    fps: Positive = 25.0
    depth_scale: Positive = 1.0
    depth_max: Positive = 75.0
    train: SplitSettings | None = None
    val: SplitSettings | None = None


@dataclass
class ImageSettings:
    """What differs for sources of images."""

    batch_size: Natural
    accumulation_steps: Natural
    views_per_clip: Natural
    view: Target
    val_view: Target
    mask: Target | None


@dataclass
class DataSettings:
    sources: dict[str, DatasetSettings]
    repeats: dict[str, Annotated[float, Range(above=0, high=1_000_000)]]
    num_frames: Natural
    clip_duration: Positive
    batch_size: Natural
    num_workers: Count
    prefetch: Natural
    timeout_minutes: Annotated[float, Range(above=0, high=100_000)]
    views_per_clip: Natural
    view: Target
    val_view: Target
    val_clips: Annotated[int, Range(low=1, high=10_000)]
    val_spacing: Literal["ends", "published"]
    mask: Target | None
    image: ImageSettings | None
    share_head: bool
    bad_sample_budget: Share
    max_pixels: Natural | None


@dataclass
class RuleSettings:
    scheduler: Target
    param_names: list[str] | None = None
    module_cls_names: list[str] | None = None


@dataclass
class AmpSettings:
    enabled: bool
    amp_dtype: Literal["auto", "bfloat16", "float16"]


@dataclass
class OptimSettings:
    optimizer: Target
    options: dict[str, list[RuleSettings]]
    lr_scale_factor: ScaleFactor
    layer_decay: Annotated[float, Range(above=0, high=1)] | None
    accumulation_steps: Natural
    gradient_clip: Positive | None
    amp: AmpSettings


@dataclass
class DistributedSettings:
    backend: Literal["nccl", "gloo"] | None
    strategy: Literal["ddp", "fsdp"]
    comms_dtype: Literal["auto", "fp16", "bf16"] | None
    timeout_minutes: Annotated[float, Range(above=0, high=100_000)]


@dataclass
class LoggingSettings:
    log_freq: Natural
    pictures_every_epochs: Natural | None


@dataclass
class CheckpointSettings:
    save_dir: str
    save_freq: Natural | None
    save_every_steps: Natural | None
    allow_changes: bool
    keep: list[str] | None
    drop: list[str]
    drop_if_present: list[str]
    rename: dict[str, str | list[str]]
    prefix: str
    strict: bool
    trunk_coverage: Share


@dataclass
class TrainerSettings:
    mode: Literal["train", "train_only", "val", "dry"]
    accelerator: Literal["auto", "cuda", "cpu"]
    seed_value: Seed
    max_epochs: Natural
    val_epoch_freq: Natural | None
    limit_train_batches: Natural | None
    limit_val_batches: Natural | None
    compile: bool
    freeze: list[str]
    ema_decay: Annotated[float, Range(above=0, high=0.9999999)] | None
    max_skipped_steps: Count
    model: Target
    task: Target
    data: DataSettings
    optim: OptimSettings
    distributed: DistributedSettings
    logging: LoggingSettings
    checkpoint: CheckpointSettings


@dataclass
class LauncherSettings:
    gpus_per_node: Natural
    num_nodes: Natural
    experiment_log_dir: str


@dataclass
class Settings:
    num_frames: Annotated[int, Range(low=1, high=4096)]
    image_size: Annotated[int, Range(low=1, high=4096)]
    short_side: Annotated[int, Range(low=1, high=4096)]
    clip_duration: Positive
    mask_ratio: Share
    batch_size: Natural
    num_workers: Count
    epochs: Natural
    lr_scale_factor: ScaleFactor
    mixing_lr_factor: Positive
    video_labels: Natural | None
    pretrained_checkpoint_path: str | list[str] | None
    ensemble_num_models: Annotated[int, Range(low=2)]
    data_root: str
    datasets: dict[str, DatasetSettings]
    trainer: TrainerSettings
    launcher: LauncherSettings
    submitit: SubmititSettings

    @property
    def processes(self) -> int:
        """Training processes of the whole run."""
        return self.launcher.gpus_per_node * self.launcher.num_nodes

    @property
    def clips_per_process(self) -> int:
        return self.trainer.data.batch_size // self.launcher.gpus_per_node

    @property
    def clips_per_step(self) -> int:
        """The effective batch: clips of an optimizer step over all nodes."""
        return self.trainer.data.batch_size * self.launcher.num_nodes

    @property
    def images(self) -> ImageSettings | None:
        """What differs for images, if there are any."""
        kinds = {source.kind for source in self.trainer.data.sources.values()}
        return self.trainer.data.image if kinds & {"image", "rgbd"} else None


def check(config: DictConfig) -> Settings:
    """Settings from a composed configuration. Raises UserError listing every problem, and all that is missing."""
    if "site" in config:
        raise UserError(_site_problem(config.site))
    reader = Reader(config, GROUPS)
    settings: Settings | None = reader.dataclass(Settings, config, "")
    problems = list(dict.fromkeys(reader.problems or reader.echoes))
    if reader.missing:
        problems.append(f"Missing: {', '.join(dict.fromkeys(reader.missing))}.{_advice(reader.missing)}")
    if settings is not None and not problems:
        problems += contradictions(settings)
    if problems:
        raise UserError(
            "\n".join(problems) if len(problems) == 1 else "\n- ".join([f"{len(problems)} problems:", *problems])
        )
    assert settings is not None
    return settings


def _site_problem(site: Any) -> str:
    if isinstance(site, DictConfig):
        return (
            "The file that +site=... chooses does not begin with the line '# @package _global_', so its settings came under "
            "site. Add that line."
        )
    return (
        f"+site={site} chooses the file site/{site}.yaml of a folder of your own, and no folder that holds site/ was given. "
        f"Give it with --config-dir FOLDER, so that the file is FOLDER/site/{site}.yaml."
    )


def contradictions(settings: Settings) -> list[str]:
    """Sentences about settings that are fine alone but do not go together."""
    problems = []
    trainer, data = settings.trainer, settings.trainer.data
    model = trainer.model
    problems += _wrong_kinds(settings)
    folder = Path(settings.launcher.experiment_log_dir)
    if len(os.fsencode(folder)) > 3000 or max((len(os.fsencode(part)) for part in folder.parts), default=0) > 255:
        problems.append(
            f"launcher.experiment_log_dir is {str(folder)[:60]}... ({len(str(folder))} characters); expected a name that file "
            "systems take. Change launcher.experiment_log_dir."
        )
    if not settings.launcher.experiment_log_dir.strip():
        problems.append(
            "launcher.experiment_log_dir is empty; expected the folder of the run. (Was it a shell variable that is not set?)"
        )
    trunk: dict[str, Any] = model.get("trunk", {})
    decoder: dict[str, Any] = model.get("decoder", {})
    known = [*DECODER, "attention", "share"]
    problems += [unknown_key(key, known, "trainer.model.decoder") for key in decoder if key not in known]
    if (attention := decoder.get("attention", "self")) not in ("self", "cross"):
        problems.append(f"trainer.model.decoder.attention is {attention!r}; expected self (the recipe) or cross.")
    share = decoder.get("share", 1)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        problems.append(
            f"trainer.model.decoder.share is {share!r}; expected the share of the masked tokens that a step decodes, more than "
            "0 and at most 1."
        )
    for name, part in (("trunk", trunk), ("decoder", decoder)):
        sizes = {key: part[key] for key in DECODER if key in part}
        wrong = {key: value for key, value in sizes.items() if type(value) is not int or value < 1}
        problems += [
            f"trainer.model.{name}.{key} is {value!r}; expected a whole number of at least 1."
            for key, value in wrong.items()
        ]
        width, heads = sizes.get("width", 1), sizes.get("heads", 1)
        if "width" in sizes and not wrong and width % heads:
            problems.append(
                f"trainer.model.{name}.heads is {heads}, which does not divide trainer.model.{name}.width {width}; every "
                "head needs the same number of channels. Change one of them."
            )
    if trainer.distributed.strategy == "fsdp" and "num_models" in model:
        problems.append(
            "trainer.distributed.strategy is fsdp, which splits what is trained among the processes; of an average that is "
            "next to nothing, and its sources are held whole. Set trainer.distributed.strategy=ddp."
        )
    if "tubelet" in trunk:
        problems += _tubelet_problems(trunk)
    if "decoder" in model and (data.mask is None or (settings.images and settings.images.mask is None)):
        problems.append(
            "trainer.data.mask is null, and a masked autoencoder learns from what a mask hides. Choose one of "
            "omnivision.data.masking, e.g. trainer/data=unlabelled_video."
        )
    problems += _disagreements(settings, trunk)
    problems += _label_problems(settings)
    problems += [
        f"datasets.{name}.kind is rgbd, and trainer.model.trunk.rgbd is not true: the model has no place for depth. Set "
        f"++trainer.model.trunk.rgbd=true, or datasets.{name}.kind=image."
        for name, source in data.sources.items()
        if source.kind == "rgbd" and not trunk.get("rgbd")
    ]
    if trainer.optim.layer_decay is not None and any(
        "trunk" in pattern or pattern == "*" for pattern in trainer.freeze
    ):
        problems.append(
            f"trainer.freeze is {trainer.freeze} and trainer.optim.layer_decay is {trainer.optim.layer_decay:g}, which scales "
            "the learning rates of a trunk that is trained. Set trainer.optim.layer_decay=null, or trainer.freeze=[]."
        )
    if "lr" not in trainer.optim.options and trainer.optim.lr_scale_factor != 1:
        problems.append(
            f"lr_scale_factor is {trainer.optim.lr_scale_factor:g}, but trainer.optim.options has no lr to divide. Give "
            "the learning rate there, or leave lr_scale_factor at 1."
        )
    problems += settings.submitit.contradictions()
    problems += _batch_problems(settings, "", data.batch_size, data.views_per_clip, trainer.optim.accumulation_steps)
    if images := settings.images:
        where = "trainer.data.image."
        problems += _batch_problems(
            settings, where, images.batch_size, images.views_per_clip, images.accumulation_steps
        )
    elif any(source.kind != "video" for source in data.sources.values()):
        problems.append(
            "There are sources of images, and trainer.data.image is not set. Choose a trainer/data that has it."
        )
    return problems


def _batch_problems(settings: Settings, where: str, batch: int, views: int, pieces: int) -> list[str]:
    """A node's batch must come out even for its processes, its views and the pieces it is worked through in."""
    gpus = settings.launcher.gpus_per_node
    unit = gpus * math.lcm(views, pieces)
    even = max(1, batch // unit) * unit
    if batch % gpus:
        return [
            f"{where}batch_size is {batch} for the {gpus} processes of a node (launcher.gpus_per_node); expected a multiple of "
            f"{gpus}. Try {where}batch_size={even}."
        ]
    each, names = batch // gpus, {f"{where or 'trainer.data.'}views_per_clip": views}
    names[f"{where or 'trainer.optim.'}accumulation_steps"] = pieces
    return [
        f"{name} is {parts}, which does not divide the {each} clips of a process ({where}batch_size {batch} / "
        f"launcher.gpus_per_node {gpus}). Change {name}, or try {where}batch_size={even}."
        for name, parts in names.items()
        if each % parts
    ]


def _wrong_kinds(settings: Settings) -> list[str]:
    """Objects that may be built, but not here: a view where a mask is meant."""
    trainer = settings.trainer
    data: dict[str, DataSettings | ImageSettings | None] = {
        "trainer.data": trainer.data,
        "trainer.data.image": settings.images,
    }
    wanted: dict[str, tuple[Any, str]] = {
        "trainer.model": (trainer.model, "omnivision.models"),
        "trainer.task": (trainer.task, "omnivision.tasks"),
    }
    for where, part in data.items():
        if part is not None:
            wanted[f"{where}.view"] = (part.view, "omnivision.data.views")
            wanted[f"{where}.val_view"] = (part.val_view, "omnivision.data.views")
            wanted[f"{where}.mask"] = (part.mask, "omnivision.data.masking")
    return [
        f"{where}._target_ is {target['_target_']}; expected something of {package}."
        for where, (target, package) in wanted.items()
        if target is not None and not target["_target_"].startswith(f"{package}.")
    ]


def _disagreements(settings: Settings, trunk: dict[str, Any]) -> list[str]:
    """Settings that say the same thing twice and must not differ; by default they follow one another."""
    data, task = settings.trainer.data, settings.trainer.task
    pairs = [
        ("trainer.data.num_frames", data.num_frames, "trainer.model.trunk.num_frames", trunk.get("num_frames")),
        ("image_size", settings.image_size, "trainer.model.trunk.image_size", trunk.get("image_size")),
        ("image_size", settings.image_size, "trainer.data.view.size", data.view.get("size")),
        ("image_size", settings.image_size, "trainer.data.val_view.size", data.val_view.get("size")),
        ("trainer.model.trunk.tubelet", trunk.get("tubelet"), "trainer.task.tubelet", task.get("tubelet")),
    ]
    return [
        f"{one} is {first}, {other} is {second}; expected the same. Change one of them (num_frames and image_size are "
        "what the others follow)."
        for one, first, other, second in pairs
        if first is not None and second is not None and first != second
    ]


def _label_problems(settings: Settings) -> list[str]:
    """`video_labels`, the published name for the number of classes, must not contradict the catalog."""
    if settings.video_labels is None:
        return []
    return [
        f"video_labels is {settings.video_labels}, datasets.{name}.num_classes is {source.num_classes}; expected the same. "
        "Leave video_labels out: the catalog knows."
        for name, source in settings.trainer.data.sources.items()
        if source.num_classes not in (None, settings.video_labels)
    ]


def _tubelet_problems(trunk: dict[str, Any]) -> list[str]:
    tubelet, frames, size = trunk["tubelet"], trunk.get("num_frames"), trunk.get("image_size")
    if not (isinstance(tubelet, list) and len(tubelet) == 3 and all(isinstance(n, int) and n > 0 for n in tubelet)):
        return [f"trainer.model.trunk.tubelet is {tubelet!r}; expected three whole numbers: frames, height, width."]
    problems = []
    for setting, value, parts in (("num_frames", frames, tubelet[:1]), ("image_size", size, tubelet[1:])):
        for part in dict.fromkeys(parts):
            if isinstance(value, int) and value % part:
                problems.append(
                    f"{setting} is {value}; expected a multiple of {part}, the tubelet's (trainer.model.trunk.tubelet is "
                    f"{tubelet}). Try {setting}={max(1, value // part) * part}."
                )
    return problems


def _advice(missing: list[str]) -> str:
    advice = []
    if any(name.startswith(("epochs", "trainer.model", "trainer.optim")) for name in missing):
        advice.append("+experiments=omnimae/omnimain_train_video.yaml chooses a stage, its model and optimizer")
    if any(name.startswith(("trainer.data", "trainer.task")) for name in missing):
        advice.append("+trainer=mae_k150_config.yaml chooses data and task")
    if "launcher.experiment_log_dir" in missing:
        advice.append("++launcher.experiment_log_dir=FOLDER says where the run goes")
    return " " + "; ".join(advice) + "." if advice else ""
