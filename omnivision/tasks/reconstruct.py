"""Masked autoencoding: the loss on masked tubelets, and visualizations of reconstructions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from omnivision.data.batch import Batch
from omnivision.models.mae import (
    MaePrediction,
    MaskedAutoencoder,
    TargetNorm,
    patch_statistics,
    reconstruction_loss,
    reconstruction_target,
)
from omnivision.models.patches import patchify, token_grid, unnormalize_pixels, unpatchify
from omnivision.models.vit import as_video
from omnivision.tasks.base import StepOutput, Task, Visualization

GREY = 0.5


class Reconstruct(Task):
    """Mean squared error over the masked tubelets.

    Args:
        tubelet: the model's tubelet.
        norm: how targets are normalized: per "channel" (the recipe), per "patch", or "none".
    """

    def __init__(self, tubelet: tuple[int, int, int], norm: TargetNorm = "channel") -> None:
        self.tubelet, self.norm = (tubelet[0], tubelet[1], tubelet[2]), norm
        self.loss = self._loss

    def compile(self) -> None:
        self.loss = torch.compile(self._loss)

    def training_step(self, model: nn.Module, batch: Batch) -> StepOutput:
        prediction = model(batch.video, batch.mask, batch.num_masked)
        loss = self.loss(prediction, batch.video)
        return StepOutput(loss, len(batch), {"loss": loss.detach() * len(batch)})

    evaluation_step = training_step

    def _loss(self, prediction: MaePrediction, video: Tensor) -> Tensor:
        target = reconstruction_target(video, self.tubelet, prediction.masked_idx, self.norm)
        return reconstruction_loss(prediction.pixels, target)  # a mean: every sample masks equally many tokens

    @torch.no_grad()
    def visualize(self, model: nn.Module, batch: Batch) -> Visualization:
        """Show the original, the visible tubelets, and the reconstruction of the first clip.

        A model trained on normalized targets predicts patterns, not brightness. One column therefore takes mean and standard
        deviation of each masked tubelet from the original, as its caption says; another takes them from the visible ones.
        """
        assert isinstance(model, MaskedAutoencoder) and batch.mask is not None
        mask = batch.mask[:1]
        prediction = model(batch.video[:1], mask, batch.num_masked)
        video = as_video(batch.video[:1], self.tubelet)  # an image is repeated to fill a tubelet
        grid = token_grid((video.shape[2], video.shape[3], video.shape[4]), self.tubelet)
        original = patchify(unnormalize_pixels(video, channel_dim=1).float(), self.tubelet)  # (1, N, P, 3)
        masked = mask.flatten(1)[0]
        predicted = prediction.pixels.float().reshape(1, -1, *original.shape[2:])
        mean, std = patch_statistics(original[:, masked], self.norm)

        def frames(patches: Tensor) -> np.ndarray:
            pixels = unpatchify(patches, grid, self.tubelet)[0]  # (3, T, H, W) in [0, 1]
            return (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 3, 0).cpu().numpy()

        def with_masked(pixels: Tensor) -> np.ndarray:
            patches = original.clone()
            patches[:, masked] = pixels
            return frames(patches)

        name = "reconstruction" if self.norm == "none" else "reconstruction (true patch statistics)"
        columns = {
            "original": frames(original),
            "visible": with_masked(torch.full_like(predicted, GREY)),
            "mask": frames(masked[None, :, None, None].expand_as(original).float()),
            name: with_masked(predicted * std + mean),
        }
        if self.norm != "none":
            visible_mean, visible_std = (
                statistic.mean(1, keepdim=True) for statistic in patch_statistics(original[:, ~masked], self.norm)
            )
            columns["reconstruction (statistics of visible patches)"] = with_masked(
                predicted * visible_std + visible_mean
            )
        last = video.shape[2] - 1
        return Visualization(columns, sorted({0, (last + 1) // 2, last}))
