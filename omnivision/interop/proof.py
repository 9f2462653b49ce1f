"""Proofs that what was written computes what it was made from: the same random clip through both models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from omnivision.interop.geometry import position_tables
from omnivision.interop.huggingface import EPSILON
from omnivision.models.architecture import Architecture, build
from omnivision.models.classifier import VideoClassifier
from omnivision.models.mae import MaskedAutoencoder
from omnivision.utils.errors import UserError

# In double precision what is the same differs by 1e-13; a wrong tensor by far more than this.
SAME = 1e-5
# What the other epsilon of the last norm usually makes of scores. More is possible where features hardly vary.
USUAL = 5e-5


class Difference(NamedTuple):
    """Largest differences of outputs: of the tensors as they are, and once the norms have one epsilon."""

    as_is: float
    same_epsilon: float


def random_clip(architecture: Architecture) -> Tensor:
    """Normalised noise of the model's own clip size, (1, 3, T, S, S), always the same."""
    trunk = architecture["trunk"]
    size = (1, 3, trunk["num_frames"], trunk["image_size"], trunk["image_size"])
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def check_finite(*outputs: Tensor) -> None:
    """Raise UserError for a model that does not compute numbers, which is no fault of what it is compared with."""
    if not all(output.isfinite().all() for output in outputs):
        raise UserError(
            "The model computes infinite values or NaN for a random clip: its training diverged, or its weights are damaged. "
            "Nothing was written. Give an earlier checkpoint."
        )


@torch.no_grad()
def against_transformers(
    folder: Path, state: Mapping[str, Tensor], architecture: Architecture, head: int
) -> Difference | None:
    """Compare a folder, as `transformers` loads it, with the model that it was made from; None without `transformers`.

    Both run in double precision, so that rounding does not hide a wrong tensor, and with the fixed position table as it is
    (in `state` it may be rounded to 16 bits). Raises UserError when they differ by more than SAME once the epsilon of the last
    norm, which that model does not let a configuration set, is ours.
    """
    try:
        from transformers import VideoMAEForVideoClassification, VideoMAEModel
        from transformers.utils import logging
    except ImportError:
        return None
    logging.disable_progress_bar()  # of reading a file that was just written
    logging.set_verbosity_error()  # it reports the names that other versions read
    model, clip = build(architecture, "The model"), random_clip(architecture).double()
    model.load_state_dict({**state, **position_tables(architecture)})
    assert isinstance(model, (VideoClassifier, MaskedAutoencoder))
    model.double().eval()
    pixels = clip.transpose(1, 2)  # (B, T, C, H, W)
    if architecture.get("classes"):
        assert isinstance(model, VideoClassifier)
        ours = model(clip, head)
        check_finite(ours)
        theirs = VideoMAEForVideoClassification.from_pretrained(folder, local_files_only=True).double().eval()
        as_is = float((theirs(pixels).logits - ours).abs().max())
        theirs.fc_norm.eps = EPSILON
        same_epsilon = float((theirs(pixels).logits - ours).abs().max())
    else:
        ours = model.trunk.norm(model.trunk(clip))
        check_finite(ours)
        theirs = VideoMAEModel.from_pretrained(folder, local_files_only=True).double().eval()
        as_is = same_epsilon = float((theirs(pixels).last_hidden_state - ours).abs().max())
    if not same_epsilon <= SAME:
        raise UserError(
            f"transformers computes something else from the exported files: outputs differ by up to {same_epsilon:.3g}, "
            f"expected at most {SAME:g}. Nothing was written. This version of transformers may read names in another way: "
            "report it with the output of `pip show transformers`, or export with --to pt."
        )
    return Difference(as_is, same_epsilon)
