"""What each optimization saves: the same step, or the same sample, with and without it; for docs/performance.md.

Each side has one thing undone, or one thing added that the project leaves out because it did not help.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import videos
from benchmarks.geometry import CAN_COMPILE, FASTEST_DTYPE, Geometry, step
from benchmarks.harness import Report, interleaved, one_thread
from benchmarks.loading import samples
from benchmarks.peers import loaders
from omnivision.data import dataset as dataset_module
from omnivision.data.video import open_video
from omnivision.data.views import PretrainView, random_crop_box, resize, resize_short_side
from omnivision.models.mae import Decoder, MaePrediction, MaskedAutoencoder, patch_statistics, split_tokens
from omnivision.models.patches import pick_tubelets, unnormalize_pixels
from omnivision.models.vit import Attention, PatchEmbed, run_blocks
from omnivision.tasks import reconstruct as reconstruct_module

Side = Callable[[], object]
EMBED = PatchEmbed.forward


# ---- the step -----------------------------------------------------------------------------------------------------


def split_heads(self: Attention, x: Tensor) -> tuple[Tensor, ...]:
    """(B, N, D) -> queries, keys and values, (B, heads, N, D / heads) each."""
    batch, tokens, width = x.shape
    return self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind()


def two_products(self: Attention, x: Tensor) -> Tensor:
    """Attention as two products with a softmax between them."""
    q, k, v = split_heads(self, x)
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return self.proj((weights @ v).transpose(1, 2).reshape(x.shape))


def padded_heads(self: Attention, x: Tensor) -> Tensor:
    """Heads with a width that is a multiple of 32."""
    parts = split_heads(self, x)
    size = parts[0].shape[-1]
    q, k, v = (F.pad(part, (0, -size % 32)) for part in parts)
    attended = F.scaled_dot_product_attention(q, k, v, scale=size**-0.5)[..., :size]
    return self.proj(attended.transpose(1, 2).reshape(x.shape))


def embed_all(self: PatchEmbed, video: Tensor, visible: Tensor | None = None) -> Tensor:
    """Every patch is embedded, the masked ones are dropped."""
    tokens = EMBED(self, video, None)
    return tokens if visible is None else tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[-1]))


def project_all(self: MaskedAutoencoder, video: Tensor, mask: Tensor, num_masked: int | None = None) -> MaePrediction:
    """Visible tokens are projected to pixels, too."""
    visible, masked = split_tokens(mask, num_masked)
    decoder = cast(Decoder, self.trunk.decoder)
    positions = self.trunk.positions_for(video, decoder.pos_embed)[0]
    x = self.encode(video, visible)
    hidden = cast(Tensor, self.trunk.mask_token).to(x.dtype) + positions[masked]
    tokens = decoder.decoder_embed(torch.cat([x + positions[visible], hidden], 1))
    pixels = self.heads[0](decoder.norm(run_blocks(decoder.decoder_blocks, tokens, False)))
    return MaePrediction(pixels[:, visible.shape[1] :], masked)


def embed_mask_once(self: MaskedAutoencoder, video: Tensor, x: Tensor, visible: Tensor, wanted: Tensor) -> Tensor:
    """Mask tokens, which all samples of a batch share, are embedded once."""
    decoder = cast(Decoder, self.trunk.decoder)
    positions = self.trunk.positions_for(video, decoder.pos_embed)[0]
    table = decoder.decoder_embed(cast(Tensor, self.trunk.mask_token)[0] + positions)
    tokens = torch.cat([decoder.decoder_embed(x + positions[visible]), table[wanted]], 1)
    return decoder.norm(run_blocks(decoder.decoder_blocks, tokens, False)[:, visible.shape[1] :])


def last_block_for_masked(self: Decoder, visible: Tensor, masked: Tensor) -> Tensor:
    """The last block works on the masked tokens alone; they still attend to all."""
    kept = visible.shape[1]
    blocks, last = self.decoder_blocks[:-1], cast(Any, self.decoder_blocks[-1])
    x = run_blocks(blocks, self.decoder_embed(torch.cat([visible, masked], 1)), False)
    q, k, v = split_heads(last.attn, last.norm1(x))
    x = x[:, kept:]
    attended = F.scaled_dot_product_attention(q[:, :, kept:], k, v)
    x = x + last.attn.proj(attended.transpose(1, 2).reshape(x.shape))
    return self.norm(x + last.mlp(last.norm2(x)))


def slow_target(video: Tensor, tubelet: Any, masked: Tensor, norm: str) -> Tensor:
    """The target by its formula: mean, variance, difference and quotient, each over all pixels."""
    pixels = unnormalize_pixels(pick_tubelets(video, tubelet, masked), channel_dim=2).flatten(3).transpose(2, 3)
    mean, std = patch_statistics(pixels, cast(Any, norm))
    return ((pixels - mean) / std).flatten(2)


CHANGES: dict[str, tuple[Any, str, Any]] = {
    "without: the target in one pass": (reconstruct_module, "reconstruction_target", slow_target),
    "without: one kernel for attention": (Attention, "forward", two_products),
    "without: only visible patches are embedded": (PatchEmbed, "forward", embed_all),
    "without: only masked tokens are projected": (MaskedAutoencoder, "forward", project_all),
    "with: heads padded to 32": (Attention, "forward", padded_heads),
    "with: mask tokens embedded once a batch": (MaskedAutoencoder, "decode", embed_mask_once),
    "with: the last block for masked tokens": (Decoder, "forward", last_block_for_masked),
}


def changed(run: Side, where: tuple[Any, str, Any]) -> Side:
    def side() -> None:
        with mock.patch.object(*where):
            run()

    return side


def step_sides(quick: bool) -> tuple[dict[str, Side], int]:
    """Return the steps, and the clips of each."""
    shape = Geometry("vittiny", 2, 4, 64) if quick else Geometry("vitbase", 4)
    model = shape.ours()
    loss, run = shape.loss(model), shape.step(model, FASTEST_DTYPE)
    with torch.no_grad():
        expected = loss()
        for name, where in CHANGES.items():
            with mock.patch.object(*where):
                if not torch.allclose(loss(), expected, rtol=1e-5):
                    raise ValueError(f"{name}: another loss")
    sides = {"step as it is": run} | {f"step {name}": changed(run, where) for name, where in CHANGES.items()}
    sides["step with: activation checkpointing"] = shape.step(shape.ours(checkpointing=True), FASTEST_DTYPE)
    slow = shape.ours()
    optimizer = torch.optim.AdamW(slow.parameters(), foreach=False, fused=False)
    sides["step without: fused AdamW"] = step(slow, shape.loss(slow), FASTEST_DTYPE, optimizer)
    if CAN_COMPILE and not quick:
        sides["step with: torch.compile"] = shape.step(model, FASTEST_DTYPE, compiled=True)
    return sides, shape.batch


# ---- the sample ---------------------------------------------------------------------------------------------------


class FloatView(PretrainView):
    """Floating point from the start."""

    def prepare(self, frames: Tensor) -> Tensor:
        return resize_short_side(frames.float(), self.short_side)


class ResizingView(PretrainView):
    """The short side resized again for each view."""

    def prepare(self, frames: Tensor) -> Tensor:
        return frames

    def crop(self, frames: Tensor, rng: Any, number: int = 0) -> Tensor:
        frames = resize_short_side(frames, self.short_side)
        top, left, height, width = random_crop_box(frames.shape[-2], frames.shape[-1], self.scale, self.ratio, rng)
        return resize(frames[..., top : top + height, left : left + width], self.size, self.size)


@contextlib.contextmanager
def all_decoded(path: str, **_: Any) -> Iterator[Any]:
    """A video with every frame up to the last wanted one decoded, and the wanted ones converted."""
    with open_video(path) as video:
        stand_in = mock.Mock(duration=video.duration)
        stand_in.read = lambda start, end, count: loaders.wanted_frames(Path(path), float(start)).permute(0, 3, 1, 2)
        yield stand_in


def sample_sides(folder: Path, quick: bool) -> tuple[dict[str, Side], int]:
    """Return the sides, and the samples of each."""
    count = 4 if quick else 8
    split = videos.split(folder, "v", videos.make(folder, 340, 256, 4 if quick else 10, copies=count))

    def side(view: type[PretrainView] = PretrainView) -> Side:
        return samples(videos.pretraining_samples(split, view), count)

    return {
        "sample as it is": side(),
        "sample without: bytes until the device": side(FloatView),
        "sample without: the short side resized once": side(ResizingView),
        "sample without: packets skipped": changed(side(), (dataset_module, "open_video", all_decoded)),
    }, count


def what_helped(quick: bool) -> Report:
    report = Report("what_helped", "What each optimization saves", "s per clip, or core-seconds per sample")
    sides, per = step_sides(quick)
    report.seconds = interleaved(sides, rounds=2 if quick else 3, per=per)
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        sides, per = sample_sides(Path(folder), quick)
        report.seconds |= interleaved(sides, rounds=2 if quick else 5, per=per, clock=time.process_time)
    for name in report.seconds:
        unchanged = f"{name.partition(' ')[0]} as it is"
        if name != unchanged:
            report.times_as_fast(f"{name}, against as it is: times as slow", unchanged, name)
    return report
