"""Settings of a run: every key with its type and range.

Defaults are in `config/experiments/base.yaml`, meanings in the comments there; catalog entries and weight filters have theirs
here.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_COUNT = 10**12  # sums of larger counts would overflow
MAX_NAME_BYTES = 255  # of a file
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveInt = Annotated[int, Field(ge=1, le=MAX_COUNT)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Minutes = Annotated[float, Field(gt=0, le=100_000)]
Pixels = Annotated[int, Field(ge=1, le=4096)]
Workers = Annotated[int, Field(ge=0, le=1024)]
ScaleFactor = Annotated[float, Field(gt=0, le=1e9)]
Area = Annotated[float, Field(ge=1e-6, le=1)]  # as a fraction of a frame
Width = Annotated[int, Field(ge=1, le=65_536)]  # of a transformer's tokens
Depth = Annotated[int, Field(ge=1, le=1000)]
Heads = Annotated[int, Field(ge=1, le=1024)]
StrOrList = str | list[str]
OnlineMethod = Literal["knn", "logistic", "linear", "rankme"]
Setting = TypeVar("Setting")
# Marks a setting, or a group of them, that does not affect results: a run may resume with another value.
RUNTIME_ONLY = "runtime only"
RuntimeOnly = Annotated[Setting, RUNTIME_ONLY]
SingleLine = Annotated[str, Field(pattern=r"^\P{C}*$")]  # printable, so that it stays one line of a batch script


def require_ascending(value: tuple[float, float]) -> tuple[float, float]:
    """Raise ValueError for a pair of numbers whose first is larger."""
    if value[0] > value[1]:
        raise ValueError("must be two numbers in ascending order")
    return value


def require_file_names(value: str) -> str:
    """Raise ValueError for a path without a name, or with one that is too long for a file system."""
    names = [name for name in value.split("/") if name]
    if not names or any(len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES for name in names):
        raise ValueError(f"must be a path of one or more names, each of at most {MAX_NAME_BYTES} bytes")
    return value


def require_target(value: dict[str, Any], package: str = "omnivision") -> dict[str, Any]:
    """Raise ValueError for a mapping without `_target_`, and for a class of ours outside `package`."""
    if "_target_" not in value:
        raise ValueError("must be an object, a mapping with _target_ (the full name of a class)")
    if (target := str(value["_target_"])).startswith("omnivision.") and not target.startswith(f"{package}."):
        raise ValueError(f"must be an object of {package}, got {target}")
    return value


def from_package(package: str) -> AfterValidator:
    """Return a validator for objects of one of our packages. A user's own class may be anywhere."""
    return AfterValidator(functools.partial(require_target, package=package))


Ascending = AfterValidator(require_ascending)
FolderPath = Annotated[str, AfterValidator(require_file_names)]
# An object to build: `_target_` and its arguments.
InstantiateConfig = Annotated[dict[str, Any], AfterValidator(require_target)]
ModelConfig = Annotated[dict[str, Any], from_package("omnivision.models")]
TaskConfig = Annotated[dict[str, Any], from_package("omnivision.tasks")]
ViewConfig = Annotated[dict[str, Any], from_package("omnivision.data.views")]
MaskConfig = Annotated[dict[str, Any], from_package("omnivision.data.masking")]

# Config groups, which a command line selects besides settings.
GROUPS = ("experiments", "trainer/model", "trainer/checkpoint", "trainer/optim", "trainer/data", "trainer/task")


class SettingsGroup(BaseModel):
    """A group of settings: no unknown keys, and no type conversion except int to float."""

    model_config = ConfigDict(extra="forbid", strict=True)


LabelType = Literal["class", "multi_label", "regression"]


class SplitSettings(SettingsGroup):
    paths: StrOrList
    labels: StrOrList | None = None
    segments: StrOrList | None = None
    depth: StrOrList | None = None


class DatasetSettings(SettingsGroup):
    """An entry of the catalog. For `regression`, num_classes and class_names describe the targets."""

    kind: Literal["video", "image", "rgbd"] = "video"
    label_type: LabelType = "class"
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    class_names: str | None = None
    label_mean: list[float] | None = None
    label_std: list[PositiveFloat] | None = None
    label_set: str | None = None
    prefix: RuntimeOnly[str] = ""
    remove_prefix: RuntimeOnly[str] = ""
    suffix: RuntimeOnly[str] = ""
    remove_suffix: RuntimeOnly[str] = ""
    fps: PositiveFloat = 25.0
    frame_pattern: str | None = None
    depth_scale: PositiveFloat = 1.0
    depth_max: PositiveFloat = 75.0
    train: RuntimeOnly[SplitSettings | None] = None
    val: RuntimeOnly[SplitSettings | None] = None


class ImageSettings(SettingsGroup):
    """Settings that differ for sources of images."""

    batch_size: RuntimeOnly[PositiveInt]
    accumulation_steps: RuntimeOnly[PositiveInt]
    views_per_clip: PositiveInt
    view: ViewConfig
    val_view: ViewConfig
    mask: MaskConfig | None


class DataSettings(SettingsGroup):
    sources: dict[str, DatasetSettings]
    repeats: dict[str, Annotated[float, Field(gt=0, le=1_000_000)]]
    num_frames: PositiveInt
    clip_duration: PositiveFloat
    batch_size: RuntimeOnly[PositiveInt]
    num_workers: RuntimeOnly[Workers]
    prefetch: RuntimeOnly[Annotated[int, Field(ge=1, le=1000)]]
    timeout_minutes: RuntimeOnly[Minutes]
    views_per_clip: PositiveInt
    view: ViewConfig
    val_view: ViewConfig
    val_clips: Annotated[int, Field(ge=1, le=10_000)]
    val_spacing: Literal["ends", "published"]
    mask: MaskConfig | None
    image: ImageSettings | None
    share_head: bool
    hold_out: Annotated[float, Field(ge=0, lt=1)]
    hold_out_pattern: str | None
    balance: Fraction
    bad_sample_budget: RuntimeOnly[Fraction]
    max_pixels: PositiveInt | None


class RuleSettings(SettingsGroup):
    scheduler: InstantiateConfig
    param_names: list[str] | None = None
    module_cls_names: list[str] | None = None


class AmpSettings(SettingsGroup):
    enabled: bool
    amp_dtype: Literal["auto", "bfloat16", "float16"]


class OptimSettings(SettingsGroup):
    optimizer: InstantiateConfig
    options: dict[str, list[RuleSettings]]
    lr_scale_factor: ScaleFactor
    nominal_batch: RuntimeOnly[PositiveInt | None]
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None
    accumulation_steps: RuntimeOnly[PositiveInt]
    gradient_clip: PositiveFloat | None
    amp: AmpSettings


class DistributedSettings(SettingsGroup):
    backend: Literal["nccl", "gloo"] | None
    strategy: Literal["ddp", "fsdp"]
    comms_dtype: Literal["auto", "fp16", "bf16"] | None
    timeout_minutes: Minutes


class LoggingSettings(SettingsGroup):
    log_freq: PositiveInt
    also: list[Literal["wandb", "mlflow"]]
    pictures_every_epochs: PositiveInt | None
    peak_tflops: PositiveFloat | None


class WeightFilter(SettingsGroup):
    """Which entries of a state dict a stage loads, by shell patterns over their names."""

    keep: list[str] | None = None  # only these; each pattern must match something
    drop: list[str] = []  # not these; each pattern must match something
    drop_if_present: list[str] = []
    rename: dict[str, StrOrList] = {}  # a trailing `*` stands for the rest of the name on both sides
    prefix: str = ""  # put before every name, after renaming
    strict: bool = False  # file and model must have the same entries
    trunk_coverage: Fraction = 1.0  # fraction of the trunk's encoder tensors that must be loaded


class CheckpointSettings(WeightFilter):
    save_dir: RuntimeOnly[str]
    save_freq: RuntimeOnly[PositiveInt | None]
    save_every_steps: RuntimeOnly[PositiveInt | None]
    allow_changes: RuntimeOnly[bool]


class OnlineEvalSettings(SettingsGroup):
    """Probes of frozen features while the run trains."""

    sources: list[str]
    every_epochs: PositiveInt
    limit: PositiveInt
    methods: Annotated[list[OnlineMethod], Field(min_length=1)]


class TrainerSettings(SettingsGroup):
    mode: RuntimeOnly[Literal["train", "train_only", "val", "dry"]]
    accelerator: RuntimeOnly[Literal["auto", "cuda", "cpu"]]
    seed_value: Annotated[int, Field(ge=0, le=2**32 - 1)]
    max_epochs: PositiveInt
    val_epoch_freq: RuntimeOnly[PositiveInt | None]
    limit_train_batches: PositiveInt | None
    limit_val_batches: PositiveInt | None
    compile: RuntimeOnly[bool]
    freeze: list[str]
    ema_decay: OpenFraction | None
    max_skipped_steps: RuntimeOnly[NonNegativeInt]
    trust_targets: list[str]
    model: ModelConfig
    task: TaskConfig
    data: DataSettings
    optim: OptimSettings
    distributed: RuntimeOnly[DistributedSettings]
    online_eval: RuntimeOnly[OnlineEvalSettings]
    logging: RuntimeOnly[LoggingSettings]
    checkpoint: CheckpointSettings


class LauncherSettings(SettingsGroup):
    gpus_per_node: PositiveInt
    num_nodes: PositiveInt
    experiment_log_dir: FolderPath


# One dependency, or several joined by `,` (all) or `?` (any).
_ONE = r"((after|afterany|afterburstbuffer|aftercorr|afternotok|afterok)(:\d+(_(\d+|\*))?(\+\d+)?)+|singleton)"
Dependency = Annotated[str, Field(pattern=rf"^({_ONE}(,{_ONE})*|{_ONE}(\?{_ONE})+)$")]
# Options of sbatch that other settings set, or that would break a submission.
SBATCH_RESERVED = (
    "job-name partition account qos time nodes ntasks ntasks-per-node gpus-per-node cpus-per-task mem constraint comment "
    "exclude nodelist dependency array output error open-mode requeue no-requeue kill-on-invalid-dep wait parsable test-only "
    "wrap export chdir"
).split()


class SubmititSettings(SettingsGroup):
    """What a run requests from SLURM."""

    use_cluster: bool
    name: SingleLine
    partition: SingleLine | None
    account: SingleLine | None
    qos: SingleLine | None
    timeout_hour: Annotated[float, Field(gt=0, le=100_000)]
    cpus_per_task: PositiveInt
    mem: Annotated[str, Field(pattern=r"^(?i:\d+[KMGT]?B?)$")] | None
    mem_gb: PositiveFloat | None
    constraints: SingleLine | None
    comment: SingleLine | None
    exclude: SingleLine | None
    nodelist: SingleLine | None
    dependency: Dependency | None
    array_parallelism: PositiveInt | None
    max_requeues: NonNegativeInt
    signal_delay_s: Annotated[int, Field(ge=1, le=65_535)] | None
    setup: list[str]
    additional_parameters: dict[str, Any]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mem is not None and self.mem_gb is not None:
            raise ValueError(f"must have mem={self.mem} or mem_gb={self.mem_gb:g}, and null for the other")
        if self.signal_delay_s is not None and self.signal_delay_s >= self.timeout_hour * 3600:
            raise ValueError(f"must have signal_delay_s < timeout_hour * 3600, got {self.signal_delay_s}")
        for name in self.additional_parameters:
            # sbatch also takes the first letters of an option.
            if any(option.startswith(name.replace("_", "-")) for option in SBATCH_RESERVED):
                raise ValueError(
                    f"must not have additional_parameters.{name}, which other settings or the submission set"
                )
        return self


class Settings(SettingsGroup):
    num_frames: Pixels
    image_size: Pixels
    short_side: Pixels
    clip_duration: PositiveFloat
    mask_ratio: OpenFraction
    crop_scale: Annotated[list[float], Field(min_length=2, max_length=2)]
    rand_augment_prob: Fraction
    erasing_prob: Fraction
    mixing_prob: Fraction
    batch_size: RuntimeOnly[PositiveInt]
    num_workers: RuntimeOnly[Workers]
    epochs: PositiveInt
    lr_scale_factor: ScaleFactor
    lr: PositiveFloat | None
    mixing_lr_factor: PositiveFloat
    video_labels: PositiveInt | None
    pretrained_checkpoint_path: StrOrList | None
    ensemble_num_models: Annotated[int, Field(ge=2)]
    data_root: RuntimeOnly[str]
    datasets: dict[str, DatasetSettings]
    trainer: TrainerSettings
    launcher: RuntimeOnly[LauncherSettings]
    submitit: RuntimeOnly[SubmititSettings]
    stage: RuntimeOnly[Literal["mae", "finetune", "probe", "average", "attentive"] | None] = None

    def with_trainer(self, **changes: Any) -> Settings:
        """Return a copy with some settings of the trainer changed."""
        return self.model_copy(update={"trainer": self.trainer.model_copy(update=changes)})

    @property
    def world_size(self) -> int:
        """Ranks over all nodes."""
        return self.launcher.gpus_per_node * self.launcher.num_nodes

    @property
    def clips_per_rank(self) -> int:
        return self.trainer.data.batch_size // self.launcher.gpus_per_node

    @property
    def clips_per_step(self) -> int:
        """Clips of an optimizer step over all nodes (the effective batch)."""
        return self.trainer.data.batch_size * self.launcher.num_nodes

    @property
    def images(self) -> ImageSettings | None:
        """Settings that differ for images; None for a run without images."""
        kinds = {source.kind for source in self.trainer.data.sources.values()}
        return self.trainer.data.image if kinds & {"image", "rgbd"} else None


@functools.cache
def setting_hints(cls: type[BaseModel] = Settings, prefix: str = "") -> Mapping[str, Any]:
    """Return the type annotation of every setting, by full key; NAME stands for any key of a mapping."""
    hints: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if name in cls.model_fields:
            hints[f"{prefix}{name}"] = hint
            if RUNTIME_ONLY in typing.get_args(hint):
                hint = typing.get_args(hint)[0]
            is_mapping = typing.get_origin(hint) is dict
            for kind in (hint, *typing.get_args(hint)):
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    hints |= setting_hints(kind, f"{prefix}{name}.{'NAME.' * is_mapping}")
    return types.MappingProxyType(hints)


def runtime_only_settings() -> list[str]:
    """Return shell patterns for the settings marked as RuntimeOnly, alone or through their group."""
    hints = setting_hints()
    marked = [name for name, hint in hints.items() if RUNTIME_ONLY in typing.get_args(hint)]
    groups = {name.rpartition(".")[0] for name in hints}
    return [f"{name}.*".replace("NAME", "*") if name in groups else name.replace("NAME", "*") for name in marked]
