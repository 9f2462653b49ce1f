"""A trained model with its preprocessing, for any video; `omnivision.load` returns one.

model = omnivision.load("runs/ft_ucf101")
model.predict("video.mp4")               # [Prediction(name="archery", label=2, probability=0.93), ...]
model.embed("video.mp4")                 # features, float32 (D,)
omnivision.load("runs/mae").reconstruct("video.mp4")
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from omnivision.checkpoint.checkpointer import load_model
from omnivision.checkpoint.inference_config import InferenceConfig
from omnivision.checkpoint.state_dict_file import StateDictFile, read_weights
from omnivision.config.instantiate import is_allowed
from omnivision.data.batch import Batch
from omnivision.data.frames import MAX_TOOL_PIXELS
from omnivision.data.masking import MASKS
from omnivision.data.sampling import clip_window, uniform_clip_starts, window_starts
from omnivision.data.video import FrameFolder, VideoDecodeError, VideoFile, open_video
from omnivision.data.views import EvalView
from omnivision.interop.complete import complete_model
from omnivision.models import architecture
from omnivision.models.mae import MaskedAutoencoder
from omnivision.models.patches import token_grid
from omnivision.models.vit import VisionTransformer
from omnivision.probing.extract import pool_tokens
from omnivision.tasks.base import Visualization
from omnivision.tasks.classify import average_views
from omnivision.tasks.reconstruct import Reconstruct
from omnivision.tools.timeline import Timeline
from omnivision.utils.errors import UserError, is_out_of_memory

WINDOWS = 16  # of a timeline, decoded and classified at a time


@dataclass(frozen=True)
class Prediction:
    """A class and its probability."""

    name: str
    label: int
    probability: float


@dataclass(frozen=True)
class Estimate:
    """A target of a regression and its value."""

    name: str
    label: int
    value: float


class Geometry(NamedTuple):
    """Shape of a clip and of its tokens."""

    num_frames: int
    image_size: int
    tubelet: tuple[int, int, int] = (1, 1, 1)


class Origin(NamedTuple):
    """The file of a model: its hash; for a run's checkpoint, epoch and metrics in words, and as entries."""

    sha256: str = ""
    checkpoint: str = ""
    progress: Mapping[str, Any] = {}

    @classmethod
    def of(cls, file: StateDictFile) -> Origin:
        return cls(file.sha256, file.checkpoint, file.progress)


class VideoModel:
    """A model on a device, in evaluation mode, with the preprocessing of its videos.

    The methods' `frames` are arguments for frame folders: `fps` (default 25) and `frame_pattern`.
    """

    def __init__(
        self,
        model: nn.Module,
        path: Path,
        config: InferenceConfig,
        device: str,
        geometry: Geometry | None = None,
        origin: Origin | None = None,
    ) -> None:
        try:
            self.model = model.eval().to(device)
        except (RuntimeError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
            raise UserError(f"device must be available to torch, got {device!r}: {reason}") from None
        self.path = path
        self.config = config
        self.origin = origin or Origin()
        self.device = torch.device(device)
        shape: Any = geometry or model.trunk
        self.num_frames = shape.num_frames
        self.image_size = shape.image_size
        self.tubelet = shape.tubelet

    @torch.inference_mode()
    def scores(
        self, video: str | Path, clips: int = 2, crops: Literal[1, 3] = 3, head: int = 0, **frames: Any
    ) -> np.ndarray:
        """Return a video's logits, float32 (classes,), averaged over `clips` x `crops` views as in the run's evaluations; for
        regression, the standardized targets.

        Raises UserError for an unreadable video, and for a model without classes.
        """
        self._check_views(clips, crops, head)
        return self._average(self.views(video, clips, crops, **frames), head, clips * crops)[0]

    def _check_views(self, clips: int, crops: int, head: int) -> None:
        heads = len(self.config.class_names)
        if not heads:
            raise UserError(
                f"{self.path} holds {type(self.model).__name__}, which has no classes. Give a model of a later stage "
                "(alignment, fine-tuning, probing), or use reconstruct."
            )
        if clips < 1 or crops not in (1, 3) or not 0 <= head < heads:
            raise UserError(
                f"clips must be at least 1, crops 1 or 3, head 0 to {heads - 1} for {self.path}; got {clips}, {crops}, {head}."
            )

    def _average(self, views: Tensor, head: int, averaged: int) -> np.ndarray:
        """Return logits averaged over each `averaged` adjacent views, float32 (videos or windows, classes)."""
        logits = self.model(views, head).float()
        if not logits.isfinite().all():
            raise UserError(f"{self.path} gives scores that are not finite: its training diverged. Use another model.")
        return average_views(logits, averaged, self.config.average).cpu().numpy()

    @torch.inference_mode()
    def timeline(
        self,
        video: str | Path,
        stride: float,
        window: float | None = None,
        crops: Literal[1, 3] = 1,
        head: int = 0,
        track: Callable[[Iterable[Tensor], int], Iterable[Tensor]] = lambda blocks, total: blocks,
        **frames: Any,
    ) -> Timeline:
        """Return the scores of windows that slide over a video of any length, a few in memory at a time.

        stride: from one window to the next (s); the last one ends with the video. window: its length (s; None: that of the
        run's clips). track: shows the progress of an iterator with a number of items. Raises UserError as `scores` does, and
        for a video shorter than the window.
        """
        self._check_views(1, crops, head)
        seconds, view, rng = (
            window or self.config.clip_duration,
            EvalView(self.image_size, crops),
            np.random.default_rng(0),
        )
        with _opened(video, **frames) as opened:
            duration = float(opened.duration)
            starts = window_starts(duration, seconds, stride)
            blocks = [starts[first : first + WINDOWS] for first in range(0, len(starts), WINDOWS)]

            def read() -> Iterator[Tensor]:
                for block in blocks:
                    clips = [view.prepare(opened.read(*clip_window(s, seconds), self.num_frames)) for s in block]
                    yield torch.stack([view(clip, rng, crop) for clip in clips for crop in range(crops)])

            scores = [
                self._average(views.transpose(1, 2).to(self.device), head, crops)
                for views in track(read(), len(blocks))
            ]
        times = np.array([(start, start + seconds) for start in starts])
        outputs = self.config.convert_scores(np.concatenate(scores), head)
        return Timeline(times, outputs, duration, self.config.class_names[head], self.config.label_type)

    def predict(
        self, video: str | Path, top: int = 5, clips: int = 2, crops: Literal[1, 3] = 3, head: int = 0, **frames: Any
    ) -> list[Prediction] | list[Estimate]:
        """Return the `top` likeliest classes of a video, best first; for regression, all targets in their order.

        Raises UserError as `scores` does.
        """
        outputs = self.config.convert_scores(self.scores(video, clips, crops, head, **frames), head)
        names = self.config.class_names[head]
        if self.config.label_type == "regression":
            return [Estimate(name, label, float(outputs[label])) for label, name in enumerate(names)]
        best = np.argsort(-outputs, kind="stable")[:top]
        return [Prediction(names[label], int(label), float(outputs[label])) for label in best]

    @property
    def trunk(self) -> VisionTransformer:
        """Raises UserError for a class outside this project without a trunk of this project."""
        trunk = getattr(self.model, "trunk", None)
        if not isinstance(trunk, VisionTransformer):
            raise UserError(
                f"{self.path} must hold a model with a trunk of this project (VisionTransformer), got "
                f"{type(self.model).__name__}. Give another model."
            )
        return trunk

    @torch.inference_mode()
    def embed(
        self,
        video: str | Path,
        clips: int = 2,
        crops: Literal[1, 3] = 3,
        layers: int = 1,
        keep_time: bool = False,
        **frames: Any,
    ) -> np.ndarray:
        """Return the features of a video, float32 (D,), averaged over `clips` x `crops` views.

        layers: how many of the last layers; with more than one (layers, D). keep_time: average tokens only over space:
        ([layers,] T', D), where time slot t is the average over the clips' slots t. Raises UserError for an unreadable video.
        """
        views = self.views(video, clips, crops, **frames)
        return pool_tokens(self.trunk, views, None, layers, keep_time).float().mean(0).cpu().numpy()

    @torch.inference_mode()
    def reconstruct(
        self,
        video: str | Path,
        start: float | None = None,
        mask_ratio: float | None = None,
        seed: int = 0,
        **frames: Any,
    ) -> Visualization:
        """Reconstruct a clip that begins at `start` (s; None: in the middle of the video), with the run's mask.

        mask_ratio: fraction of hidden tokens (None: the run's). Returns columns of frames (see `tasks.reconstruct`). Raises
        UserError.
        """
        if not isinstance(self.model, MaskedAutoencoder):
            raise UserError(
                f"{self.path} holds {type(self.model).__name__}, which has no decoder. Give a model of stage 1 (masked "
                "autoencoding)."
            )
        return Reconstruct(self.tubelet, self.config.norm).visualize(
            self.model, self.masked_clip(video, start, mask_ratio, seed, **frames)
        )

    def masked_clip(
        self,
        video: str | Path,
        start: float | None = None,
        mask_ratio: float | None = None,
        seed: int = 0,
        **frames: Any,
    ) -> Batch:
        """Return a clip and a mask, with arguments as for `reconstruct`, as a batch on the device. Raises UserError."""
        ratio = self.config.mask_ratio if mask_ratio is None else mask_ratio
        if not 0 < ratio < 1:
            raise UserError(f"mask_ratio must be above 0 and below 1, got {ratio:g}.")
        clip = self.views(video, clips=1, crops=1, start=start, **frames).cpu()
        grid = token_grid((self.num_frames, self.image_size, self.image_size), self.tubelet)
        mask = torch.from_numpy(MASKS[self.config.mask](ratio)(grid, np.random.default_rng(seed)))[None]
        unused = torch.zeros(1, dtype=torch.int64)
        batch = Batch(clip, unused, unused, "video", [str(video)], mask=mask, num_masked=int(mask.sum()))
        return batch.to(self.device)

    def views(
        self, video: str | Path, clips: int, crops: Literal[1, 3], start: float | None = None, **frames: Any
    ) -> Tensor:
        """Return views of a video in the model's input format: uint8 (clips x crops, 3, T, H, W). Raises UserError."""
        view, seconds = EvalView(self.image_size, crops), self.config.clip_duration
        rng = np.random.default_rng(0)  # unused: evaluation views are not random
        views = []
        with _opened(video, **frames) as opened:
            if start is not None and not 0 <= start < opened.duration:
                raise UserError(
                    f"start must be from 0 to {opened.duration:.2f} s, the end of {video}, got {start:g} s."
                )
            middle = max(0.0, opened.duration - seconds) / 2
            starts = uniform_clip_starts(opened.duration, seconds, clips) if clips > 1 else [middle]
            for begin in starts if start is None else [start]:
                clip = view.prepare(opened.read(*clip_window(begin, seconds), self.num_frames))
                views += [view(clip, rng, crop_index) for crop_index in range(crops)]
        return torch.stack(views).transpose(1, 2).to(self.device)


@contextlib.contextmanager
def _opened(video: str | Path, **frames: Any) -> Iterator[VideoFile | FrameFolder]:
    """Open a video; what goes wrong while it is read becomes a UserError."""
    try:
        with open_video(str(video), max_pixels=MAX_TOOL_PIXELS, **frames) as opened:
            yield opened
    except VideoDecodeError as error:
        raise UserError(f"{video} cannot be read: {error}. Give a video or a folder of its frames.") from None


def load(source: str | Path, device: str = "cpu", trust_targets: Sequence[str] = ()) -> VideoModel:
    """Load a model with its preprocessing from a run directory (its best checkpoint, else its newest) or from a file.

    Nothing in the file is executed; its architecture is read as numbers. If the run kept an EMA, the EMA is loaded, as in its
    evaluations. A learned average is merged into a single model, if its source checkpoints still exist. Raises UserError for
    other files, and for weights without an architecture (`omnivision import` adds one).

    A class outside this project is built from the run's settings, which runs code of the packages in `trust_targets`.
    """
    file = read_weights(source)
    print(f"Model from {file}", file=sys.stderr)  # tells which checkpoint of the run it is
    if file.own_class is not None:
        return _load_own_class(file, file.own_class, trust_targets, device)
    converted, _ = complete_model(file)
    model = architecture.from_architecture(converted.architecture, str(file.path))
    model.load_state_dict(converted.state)
    config = file.inference.numbered(converted.architecture.get("classes", []))
    return VideoModel(model, file.path, config, device, None, Origin.of(file))


def _load_own_class(file: StateDictFile, target: str, trusted: Sequence[str], device: str) -> VideoModel:
    """Build a model of a class outside this project, from the settings beside its checkpoint."""
    from omnivision.config.cross_validate import has_decoder
    from omnivision.config.validate import read_run_config
    from omnivision.training import build  # Hydra comes with it

    config = file.path.parent.parent / "config.yaml"
    if not is_allowed(target, trusted) or not config.is_file():
        raise UserError(
            f"{file.path} holds a model of the class {target}; building it runs its code and needs the settings of its run, "
            f"{config}. Give the run directory, put the folder of the class on PYTHONPATH, and set --trust-targets "
            f"{target.partition('.')[0]} (in Python: trust_targets=[...])."
        )
    settings = read_run_config(config, trusted)
    model = build.build_model(settings)
    load_model(model, file.with_weights().state, file.path)
    tubelet = settings.trainer.model.get("trunk", {}).get("tubelet", (1, 1, 1))
    geometry = Geometry(settings.trainer.data.num_frames, settings.image_size, tuple(tubelet))
    classes = build.build_label_sets(settings).classes if not has_decoder(settings.trainer.model) else []
    return VideoModel(model, file.path, file.inference.numbered(classes), device, geometry, Origin.of(file))
