"""What each way of saving work saves: the same step, or the same sample, with and without it. For docs/performance.md.

    python -m benchmarks.what_helped [--quick]

Each line times the project as it is against the project with one thing undone, or with one thing added that it does not do
because it did not help.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import films
from benchmarks.command import command_line
from benchmarks.harness import Report, interleaved, one_thread
from benchmarks.loading import dataset, samples
from benchmarks.peers import loaders
from benchmarks.pretraining_step import CAN_COMPILE, DTYPES, Geometry, loss_of_ours, step
from omnivision.data import dataset as dataset_module
from omnivision.data.views import PretrainView, random_crop_box, resize, resize_short_side
from omnivision.models.mae import Decoder, MaskedAutoencoder, Prediction, patch_statistics, split_tokens
from omnivision.models.patches import pick_tubelets, unnormalize_pixels
from omnivision.models.vit import Attention, PatchEmbed, run_blocks
from omnivision.tasks import reconstruct as reconstruct_module

Side = Callable[[], object]


# ---- the step -----------------------------------------------------------------------------------------------------


def spelt_out(self: Attention, x: Tensor) -> Tensor:
    """Attention as two products with a softmax between them."""
    batch, tokens, width = x.shape
    q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
    return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


def padded(self: Attention, x: Tensor) -> Tensor:
    """Heads of a width that is a multiple of 32."""
    batch, tokens, width = x.shape
    size = width // self.heads
    q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, size).permute(2, 0, 3, 1, 4)
    q, k, v = (F.pad(part, (0, -size % 32)) for part in (q, k, v))
    made = F.scaled_dot_product_attention(q, k, v, scale=size**-0.5)[..., :size]
    return self.proj(made.transpose(1, 2).reshape(batch, tokens, width))


def embed_all(self: PatchEmbed, video: Tensor, visible: Tensor | None = None) -> Tensor:
    """Every patch is embedded, the hidden ones are dropped."""
    tokens = EMBED(self, video, None)
    return tokens if visible is None else tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[-1]))


def project_all(self: MaskedAutoencoder, video: Tensor, mask: Tensor, num_masked: int | None = None) -> Prediction:
    """Visible tokens are projected to pixels, too."""
    visible, masked = split_tokens(mask, num_masked)
    decoder = cast(Decoder, self.trunk.decoder)
    positions = self.trunk.positions_for(video, decoder.pos_embed)[0]
    x = self.encode(video, visible)
    hidden = cast(Tensor, self.trunk.mask_token).to(x.dtype) + positions[masked]
    tokens = decoder.decoder_embed(torch.cat([x + positions[visible], hidden], 1))
    pixels = self.heads[0](decoder.norm(run_blocks(decoder.decoder_blocks, tokens, False)))
    return Prediction(pixels[:, visible.shape[1] :], masked)


def embed_once(self: MaskedAutoencoder, video: Tensor, x: Tensor, visible: Tensor, wanted: Tensor) -> Tensor:
    """Mask tokens, which all samples of a batch share, are embedded once."""
    decoder = cast(Decoder, self.trunk.decoder)
    positions = self.trunk.positions_for(video, decoder.pos_embed)[0]
    table = decoder.decoder_embed(cast(Tensor, self.trunk.mask_token)[0] + positions)
    tokens = torch.cat([decoder.decoder_embed(x + positions[visible]), table[wanted]], 1)
    return decoder.norm(run_blocks(decoder.decoder_blocks, tokens, False)[:, visible.shape[1] :])


def last_block_for_masked(self: Decoder, visible: Tensor, masked: Tensor) -> Tensor:
    """The last block works on the masked tokens alone; they still look at all."""
    kept = visible.shape[1]
    x = run_blocks(
        cast(nn.ModuleList, self.decoder_blocks[:-1]), self.decoder_embed(torch.cat([visible, masked], 1)), False
    )
    last = cast(Any, self.decoder_blocks[-1])
    (batch, tokens, width), heads = x.shape, last.attn.heads
    q, k, v = last.attn.qkv(last.norm1(x)).view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    made = F.scaled_dot_product_attention(q[:, :, kept:], k, v)
    x = x[:, kept:] + last.attn.proj(made.transpose(1, 2).reshape(batch, tokens - kept, width))
    return self.norm(x + last.mlp(last.norm2(x)))


def slow_target(video: Tensor, tubelet: Any, masked: Tensor, norm: str) -> Tensor:
    """The target by its formula: mean, variance, difference and quotient, each over all pixels."""
    pixels = unnormalize_pixels(pick_tubelets(video, tubelet, masked), channel_dim=2).flatten(3).transpose(2, 3)
    mean, std = patch_statistics(pixels, cast(Any, norm))
    return ((pixels - mean) / std).flatten(2)


EMBED = PatchEmbed.forward
CHANGES: dict[str, tuple[Any, str, Any]] = {
    "without: the target in one pass": (reconstruct_module, "reconstruction_target", slow_target),
    "without: one kernel for attention": (Attention, "forward", spelt_out),
    "without: only visible patches are embedded": (PatchEmbed, "forward", embed_all),
    "without: only masked tokens are projected": (MaskedAutoencoder, "forward", project_all),
    "with: heads padded to 32": (Attention, "forward", padded),
    "with: mask tokens embedded once a batch": (MaskedAutoencoder, "decode", embed_once),
    "with: the last block for masked tokens": (Decoder, "forward", last_block_for_masked),
}


def changed(run: Side, where: tuple[Any, str, Any]) -> Side:
    def side() -> None:
        with mock.patch.object(*where):
            run()

    return side


def steps(report: Report, quick: bool) -> None:
    shape = Geometry("vittiny", 2, 4, 64) if quick else Geometry("vitbase", 4)
    model = shape.ours()
    dtype = list(DTYPES.values())[-1]
    run, loss = step(model, loss_of_ours(model, shape), dtype), loss_of_ours(model, shape)
    with torch.no_grad():
        known = loss()
        for name, where in CHANGES.items():
            with mock.patch.object(*where):
                if not torch.allclose(loss(), known, rtol=1e-5):
                    raise ValueError(f"{name}: another loss")
    sides = {"step as it is": run} | {f"step {name}": changed(run, where) for name, where in CHANGES.items()}
    again = shape.ours(checkpointing=True)
    sides["step with: activations made again"] = step(again, loss_of_ours(again, shape), dtype)
    slow = shape.ours()
    optimizer = torch.optim.AdamW(slow.parameters(), foreach=False, fused=False)
    sides["step without: fused AdamW"] = step(slow, loss_of_ours(slow, shape), dtype, optimizer)
    if CAN_COMPILE and not quick:
        sides["step with: torch.compile"] = step(model, loss_of_ours(model, shape, compiled=True), dtype)
    report.seconds |= interleaved(sides, rounds=2 if quick else 3, per=shape.batch)
    for name in list(sides)[1:]:
        report.times_as_fast(f"{name}, against as it is: times as slow", "step as it is", name)


# ---- the sample ---------------------------------------------------------------------------------------------------


class FloatView(PretrainView):
    """Floating point from the start."""

    def prepare(self, frames: Tensor) -> Tensor:
        return resize_short_side(frames.float(), self.short_side)


class EachByItself(PretrainView):
    """The short side resized anew for each view."""

    def prepare(self, frames: Tensor) -> Tensor:
        return frames

    def crop(self, frames: Tensor, rng: Any, number: int = 0) -> Tensor:
        frames = resize_short_side(frames, self.short_side)
        top, left, height, width = random_crop_box(frames.shape[-2], frames.shape[-1], self.scale, self.ratio, rng)
        return resize(frames[..., top : top + height, left : left + width], self.size, self.size)


@contextlib.contextmanager
def all_decoded(path: str, **_: Any) -> Iterator[Any]:
    """A film of which every frame up to the last wanted one is decoded, and the wanted ones are converted."""
    with dataset_module_open(path) as video:
        film = mock.Mock(duration=video.duration)
        film.read = lambda start, end, count: loaders.wanted_frames_of(Path(path), float(start)).permute(0, 3, 1, 2)
        yield film


dataset_module_open = dataset_module.open_video


def sample_sides(report: Report, quick: bool) -> None:
    count = 4 if quick else 8
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = films.make(folder, 340, 256, 4 if quick else 10, copies=count)
        sides: dict[str, Side] = {"sample as it is": samples(dataset(folder, "films", paths), count)}
        for what, view in (("bytes until the device", FloatView), ("the short side resized once", EachByItself)):
            data = dataset(folder, "films", paths)
            config = data.configs["video"]
            data.configs["video"] = dataclasses.replace(config, view=view(loaders.SIZE, loaders.SHORT_SIDE))
            sides[f"sample without: {what}"] = samples(data, count)
        sides["sample without: packets skipped"] = changed(
            samples(dataset(folder, "films", paths), count),
            (dataset_module, "open_video", all_decoded),  # type: ignore[arg-type]
        )
        report.seconds |= interleaved(sides, rounds=2 if quick else 5, per=count, clock=time.process_time)
    for name in list(sides)[1:]:
        report.times_as_fast(f"{name}, against as it is: times as slow", "sample as it is", name)


def run(quick: bool) -> Report:
    report = Report("what_helped", "What each way of saving work saves", unit="s a clip, or of one core a sample")
    steps(report, quick)
    with one_thread():
        sample_sides(report, quick)
    return report


def draw(report: Report, file: Path) -> None:
    """How many times as slow each change makes a step or a sample."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.3 * len(report.ratios)), layout="constrained")
    for place, ratio in enumerate(report.ratios):
        axes.barh(place, ratio.value - 1, left=1, color="#4477aa" if ratio.value > 1 else "#bbbbbb")
        axes.plot([min(ratio.rounds), max(ratio.rounds)], [place, place], color="black", linewidth=1)
    axes.set_yticks(range(len(report.ratios)), [ratio.what.partition(", against")[0] for ratio in report.ratios])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    figure.supxlabel("times as slow as it is (median; line: from least to most)", fontsize=10)
    figure.suptitle(report.title, fontsize=10)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    command_line(run, __doc__, arguments, draw=draw)


if __name__ == "__main__":
    main()
