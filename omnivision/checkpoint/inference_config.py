"""How to prepare videos for a model: a record in checkpoints and exported files."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from omnivision.checkpoint import fingerprint
from omnivision.config.flat import resolve_reference
from omnivision.config.schema import LabelType
from omnivision.data.masking import MASKS
from omnivision.models.mae import TargetNorm
from omnivision.tasks.metrics import to_probabilities


def _known_mask(name: str) -> str:
    if name not in MASKS:
        raise ValueError(f"must be one of {', '.join(MASKS)}, got {name}")
    return name


MaskName = Annotated[str, AfterValidator(_known_mask)]


class InferenceConfig(BaseModel):
    """Label type, names of the outputs by head, the seconds a clip spans, what is averaged over views, the mask, and how
    reconstructed patches were normalized.

    The defaults are the recipe's. Numbers instead of names ("0", "1", ...) mean that a head has no names. label_mean and
    label_std: for regression, of the targets by head, whose standardized values the model gives.
    """

    class_names: list[list[str]] = []
    label_type: LabelType = "class"
    label_mean: list[list[float]] = []
    label_std: list[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]]] = []
    clip_duration: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.7
    average: Literal["logits", "softmax"] = "logits"
    mask: MaskName = "RandomMask"
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.9
    norm: TargetNorm = "channel"

    @classmethod
    def of_file(cls, metadata: Any) -> InferenceConfig:
        """Read the record in the metadata of a file, or in its fingerprint; an invalid record is ignored."""
        metadata = metadata if isinstance(metadata, Mapping) else {}
        run = fingerprint.parse_fingerprint(metadata.get("experiment")) or {}
        record = metadata.get("inference", run.get("inference"))
        try:
            config = cls.model_validate(record)
        except ValidationError:
            config = cls()
        return config.with_settings(run.get("settings", {}))

    def with_settings(self, settings: Mapping[str, Any]) -> InferenceConfig:
        """Return a copy with the mask and the normalization in a run's settings; a mask not of this project keeps its ratio."""
        target = str(settings.get("trainer.data.mask._target_")).removeprefix("omnivision.data.masking.")
        ratio = resolve_reference(settings, "trainer.data.mask.ratio")
        config = self
        for name, value in {"mask": target, "mask_ratio": ratio, "norm": settings.get("trainer.task.norm")}.items():
            with contextlib.suppress(ValidationError):
                config = self.model_validate(config.model_dump(exclude_unset=True) | {name: value})
        return config

    def numbered(self, classes: Sequence[int]) -> InferenceConfig:
        """Return a copy with one name list per head; a head whose name count differs from `classes` gets numbers."""
        heads = []
        for head, count in enumerate(classes):
            names = self.class_names[head] if head < len(self.class_names) else []
            heads.append(names if len(names) == count else [str(label) for label in range(count)])
        return self.model_copy(update={"class_names": heads})

    def convert_scores(self, logits: np.ndarray, head: int) -> np.ndarray:
        """Return probabilities of the classes, or values of the targets in their units, float32 (..., outputs of a head)."""
        if self.label_type != "regression":
            return to_probabilities(logits, self.label_type)
        scales = list(zip(self.label_mean, self.label_std, strict=False))
        mean, std = scales[head] if head < len(scales) else ([0.0], [1.0])
        return logits * np.asarray(std, dtype=np.float32) + np.asarray(mean, dtype=np.float32)

    def scales(self) -> dict[str, tuple[float, float]]:
        """Return mean and deviation of each target of a regression by its name; empty for other models."""
        heads = zip(self.class_names, self.label_mean, self.label_std, strict=False)
        return {name: (mean, std) for head in heads for name, mean, std in zip(*head, strict=False)}

    def names(self, head: int) -> list[str] | None:
        """Return the class names of a head, all different; None where there are none."""
        return distinct_names(self.class_names[head]) if 0 <= head < len(self.class_names) else None


def distinct_names(names: Sequence[str]) -> list[str] | None:
    """Return class names; None if two are equal, or if they are only numbers."""
    is_numbered = list(names) == [str(label) for label in range(len(names))]
    return None if is_numbered or len(set(names)) < len(names) else list(names)


def describe_class_changes(saved: InferenceConfig, current: InferenceConfig) -> list[str]:
    """Return what changed about outputs: a resumed head would predict wrong classes, or values in another scale."""
    scales = saved.scales(), current.scales()
    changed = [f"label_type: {saved.label_type} -> {current.label_type}"] * (saved.label_type != current.label_type)
    changed += [f"mean and deviation: {scales[0]} -> {scales[1]}"] * (scales[0] != scales[1])
    return changed + [
        f"class {label} of head {head}: {old} -> {new}"
        for head in range(len(saved.class_names))
        for label, (old, new) in enumerate(zip(saved.names(head) or [], current.names(head) or [], strict=False))
        if old != new
    ]
