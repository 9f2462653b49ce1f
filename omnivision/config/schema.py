"""The settings of a run: every key with its type and range.

Defaults stand in `config/experiments/base.yaml`, meanings in the comments there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from omnivision.config.reader import Count, Natural, Positive, Range, Target
from omnivision.config.submitit import SubmititSettings

Seed = Annotated[int, Range(low=0, high=2**32 - 1)]
Workers = Annotated[int, Range(low=0, high=1024)]
Share = Annotated[float, Range(low=0, high=1)]
ScaleFactor = Annotated[
    float,
    Range(above=0, high=1e9),
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
    segments: str | list[str] | None = None
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
    frame_pattern: str | None = None
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
    num_workers: Workers
    prefetch: Annotated[int, Range(low=1, high=1000)]
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
    nominal_batch: Natural | None
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
    also: list[Literal["wandb", "mlflow"]]
    pictures_every_epochs: Natural | None
    peak_tflops: Positive | None


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
    ema_decay: Annotated[float, Range(above=0, below=1)] | None
    max_skipped_steps: Count
    trust_targets: list[str]
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
    mask_ratio: Annotated[float, Range(above=0, below=1)]
    crop_scale: list[float]
    rand_augment_prob: Share
    erasing_prob: Share
    mixing_prob: Share
    batch_size: Natural
    num_workers: Workers
    epochs: Natural
    lr_scale_factor: ScaleFactor
    lr: Positive | None
    mixing_lr_factor: Positive
    video_labels: Natural | None
    pretrained_checkpoint_path: str | list[str] | None
    ensemble_num_models: Annotated[int, Range(low=2)]
    data_root: str
    datasets: dict[str, DatasetSettings]
    trainer: TrainerSettings
    launcher: LauncherSettings
    submitit: SubmititSettings
    stage: Literal["mae", "finetune", "probe", "average"] | None = None

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
