"""A trained model with its preprocessing, for videos outside any dataset: `omnivision.load` returns one.

model = omnivision.load("runs/ft_ucf101")
model.predict("film.mp4")                # [Prediction(name="archery", label=2, probability=0.93), ...]
omnivision.load("runs/mae").reconstruct("film.mp4")
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omnivision.checkpoint.checkpointer import load_model
from omnivision.checkpoint.fingerprint import valid_names
from omnivision.checkpoint.state_dict_file import StateDictFile, read
from omnivision.config.instantiate import is_allowed
from omnivision.data.batch import Batch
from omnivision.data.frames import EIGHT_K
from omnivision.data.masking import RandomMask
from omnivision.data.sampling import clip_window, uniform_clip_starts
from omnivision.data.video import VideoDecodeError, open_video
from omnivision.data.views import EvalView
from omnivision.interop.formats import from_ours
from omnivision.interop.merge import merge, read_sources
from omnivision.models import architecture
from omnivision.models.classifier import VideoClassifier
from omnivision.models.mae import MaskedAutoencoder
from omnivision.models.patches import token_grid
from omnivision.tasks.base import Visualization
from omnivision.tasks.reconstruct import Reconstruct
from omnivision.utils.errors import UserError, is_out_of_memory

CLIP_SECONDS = 2.7  # of the recipe, if a file does not give it
MASK_RATIO = 0.9


@dataclass(frozen=True)
class Prediction:
    """A class and its probability."""

    name: str
    label: int
    probability: float


@dataclass(frozen=True)
class InferenceConfig:
    """How to prepare videos for a model: class names of each head, seconds of a clip, and what is averaged over views."""

    names: list[list[str]]
    clip_duration: float = CLIP_SECONDS
    average: str = "logits"

    @classmethod
    def of(cls, described: Mapping[str, Any], said: Mapping[str, Any]) -> InferenceConfig:
        """From an architecture and the record in a file (`experiment.inference`), each value checked."""
        seconds, told = said.get("clip_duration"), said.get("class_names")
        if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 < seconds < 3600:
            seconds = CLIP_SECONDS
        heads = told if isinstance(told, list) else []
        names = []
        for number, count in enumerate(described.get("classes", [])):
            given = heads[number] if number < len(heads) and isinstance(heads[number], list) else []
            given = given if len(given) == count else range(count)  # numbers where there are no names
            names.append([str(name) for name in given])
        average = "softmax" if said.get("average") == "softmax" else "logits"
        return cls(names, float(seconds), average)

    def to_json(self) -> dict[str, Any]:
        """Return the record for a file, which `of` reads."""
        return {"class_names": self.names, "clip_duration": self.clip_duration, "average": self.average}

    def named(self, head: int) -> list[str] | None:
        """The class names of a head, all different; None if there are none."""
        return valid_names(self.names[head] if head < len(self.names) else [])


class VideoModel:
    """A model on a device, in evaluation mode, with the preprocessing of its videos."""

    def __init__(self, model: nn.Module, path: Path, shown: InferenceConfig, device: str, trunk: Any = None) -> None:
        """`trunk` has `num_frames`, `image_size` and `tubelet`; default: the model's own."""
        try:
            self.model = model.eval().to(device)
        except (RuntimeError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
            raise UserError(f"device must be one that torch has here, got {device!r}: {reason}") from None
        self.path, self.shown, self.device = path, shown, torch.device(device)
        trunk = trunk or model.trunk
        self.num_frames, self.image_size, self.tubelet = trunk.num_frames, trunk.image_size, trunk.tubelet

    @torch.inference_mode()
    def scores(
        self,
        film: str | Path,
        clips: int = 2,
        crops: int = 3,
        head: int = 0,
        fps: float = 25.0,
        frame_pattern: str | None = None,
    ) -> np.ndarray:
        """Logits of a video, float32 (classes,), averaged over `clips` x `crops` views as in evaluations of its run.

        Raises UserError for a video that cannot be read, and for a model without classes.
        """
        if not self.shown.names:
            raise UserError(
                f"{self.path} holds {self._kind}, which has no classes. Give a model of a later stage (alignment, "
                "fine-tuning, probing), or use reconstruct."
            )
        if clips < 1:
            raise UserError(f"clips must be at least 1, got {clips}.")
        if crops not in (1, 3):
            raise UserError(f"crops must be 1 or 3, got {crops}.")
        if not 0 <= head < len(self.shown.names):
            raise UserError(f"head must be 0 to {len(self.shown.names) - 1} for {self.path}, got {head}.")
        scores = self.model(self.views(film, clips, crops, fps=fps, frame_pattern=frame_pattern), head).float()
        if not scores.isfinite().all():
            raise UserError(f"{self.path} gives scores that are not finite: its training diverged. Use another.")
        if self.shown.average == "softmax":
            return (scores.log_softmax(-1).logsumexp(0) - math.log(len(scores))).cpu().numpy()
        return scores.mean(0).cpu().numpy()

    def predict(
        self,
        film: str | Path,
        top: int = 5,
        clips: int = 2,
        crops: int = 3,
        head: int = 0,
        fps: float = 25.0,
        frame_pattern: str | None = None,
    ) -> list[Prediction]:
        """The `top` likeliest classes of a video, best first; `fps` and `frame_pattern` are for folders of frames.

        Raises UserError, as `scores`.
        """
        if top < 1:
            raise UserError(f"top must be at least 1, got {top}.")
        shares = torch.from_numpy(self.scores(film, clips, crops, head, fps, frame_pattern)).softmax(0).numpy()
        best = np.argsort(-shares, kind="stable")[:top]
        return [Prediction(self.shown.names[head][label], int(label), float(shares[label])) for label in best]

    @torch.inference_mode()
    def reconstruct(
        self,
        film: str | Path,
        start: float | None = None,
        mask_ratio: float = MASK_RATIO,
        seed: int = 0,
        fps: float = 25.0,
        frame_pattern: str | None = None,
    ) -> Visualization:
        """Reconstruct a clip that begins at `start` (s; None: in the middle of the video) from 1 - `mask_ratio` of its tokens.

        Returns columns of frames, see `tasks.reconstruct`. Raises UserError.
        """
        if not isinstance(self.model, MaskedAutoencoder):
            raise UserError(
                f"{self.path} holds {self._kind}, which has no decoder. Give a model of stage 1 (masked autoencoding)."
            )
        if not 0 < mask_ratio < 1:
            raise UserError(f"mask_ratio must be above 0 and below 1, got {mask_ratio:g}.")
        video = self.views(film, clips=1, crops=1, start=start, fps=fps, frame_pattern=frame_pattern)
        grid = token_grid((self.num_frames, self.image_size, self.image_size), self.tubelet)
        mask = torch.from_numpy(RandomMask(mask_ratio)(grid, np.random.default_rng(seed)))[None]
        nothing = torch.zeros(1, dtype=torch.int64)
        batch = Batch(video.cpu(), nothing, nothing, "film", [str(film)], mask=mask, num_masked=int(mask.sum()))
        return Reconstruct(self.tubelet).visualize(self.model, batch.to(self.device))

    @property
    def _kind(self) -> str:
        kinds = {MaskedAutoencoder: "a masked autoencoder", VideoClassifier: "a classifier"}
        return kinds.get(type(self.model), f"a {type(self.model).__name__}")

    def views(
        self,
        film: str | Path,
        clips: int,
        crops: int,
        start: float | None = None,
        fps: float = 25.0,
        frame_pattern: str | None = None,
    ) -> Tensor:
        """Views of a video as the model takes them: uint8 (clips x crops, 3, T, H, W). Raises UserError."""
        view = EvalView(self.image_size, crops)
        rng = np.random.default_rng(0)  # no view of an evaluation is random
        found = []
        try:
            with open_video(str(film), fps=fps, max_pixels=EIGHT_K, frame_pattern=frame_pattern) as video:
                for begin in self._starts(video.duration, clips, start, film):
                    frames = view.prepare(video.read(*clip_window(begin, self.shown.clip_duration), self.num_frames))
                    found += [view(frames, rng, number) for number in range(crops)]
        except VideoDecodeError as error:
            raise UserError(f"{film} cannot be read: {error}. Give a video or a folder of its frames.") from None
        return torch.stack(found).transpose(1, 2).to(self.device)

    def _starts(self, duration: float, clips: int, start: float | None, film: str | Path) -> list[float]:
        if start is None:
            last = max(0.0, duration - self.shown.clip_duration)
            return uniform_clip_starts(duration, self.shown.clip_duration, clips) if clips > 1 else [last / 2]
        if not 0 <= start < duration:
            raise UserError(f"start must be from 0 to {duration:.2f} s, the end of {film}, got {start:g} s.")
        return [start]


def load(source: str | Path, device: str = "cpu", trust_targets: Sequence[str] = ()) -> VideoModel:
    """The model of a run folder (its best checkpoint, else its newest) or of a file, with its preprocessing.

    Nothing in the file is executed; its architecture is read as numbers. The EMA is loaded if the run kept one, as in its
    evaluations. A learned average is merged into a single model, if its source checkpoints still exist. Raises UserError for
    other files, and for weights without an architecture (`omnivision import` adds one).

    A model class outside this project is built from the run's settings, which runs code of the packages in `trust_targets`.
    """
    found = read(source)
    print(f"Model from {found}", file=sys.stderr)  # which checkpoint of the run it is
    if found.own_class is not None:
        return _load_own_class(found, found.own_class, trust_targets, device)
    if not found.architecture:
        raise UserError(
            f"{found.path} has no architecture, so it is not from a run of this project. Convert it first: "
            f"omnivision import {source} OUT.pt"
        )
    state, described = found.weights(), dict(found.architecture)
    try:
        if described.get("kind") == "average":
            merged = merge(state, described, read_sources(found.sources, None))
            state, described = merged.state, dict(merged.architecture)
        whole = from_ours(state, described)  # before anything is built as large as a description says
    except UserError as error:
        raise UserError(f"{found.path}: {error}") from None
    model = architecture.build(dict(whole.architecture), str(found.path))
    model.load_state_dict(whole.state)
    return VideoModel(model, found.path, InferenceConfig.of(whole.architecture, found.inference), device)


def _load_own_class(found: StateDictFile, target: str, trusted: Sequence[str], device: str) -> VideoModel:
    """A model of a class outside this project, from the settings beside its checkpoint."""
    from omnivision.config.validate import read_run_config
    from omnivision.training import build  # Hydra comes with it

    config = found.path.parent.parent / "config.yaml"
    if not is_allowed(target, trusted):
        raise UserError(
            f"{found.path} holds a model of the class {target}; building it runs its code. Put its folder on PYTHONPATH and "
            f"set --trust-targets {target.partition('.')[0]} (in Python: trust_targets=[...])."
        )
    if not config.is_file():
        raise UserError(
            f"{found.path} holds a model of the class {target}, whose settings must be at {config}. Give the run directory."
        )
    settings = read_run_config(config, trusted)
    model = build.model(settings)
    load_model(model, found.weights(), found.path)
    trunk = SimpleNamespace(num_frames=settings.trainer.data.num_frames, image_size=settings.image_size)
    trunk.tubelet = tuple(settings.trainer.model.get("trunk", {}).get("tubelet", (1, 1, 1)))
    classes = build.labels(settings).classes if "decoder" not in settings.trainer.model else []
    return VideoModel(model, found.path, InferenceConfig.of({"classes": classes}, found.inference), device, trunk)
