"""Training steps (forward, backward, AdamW): pretraining beside its peers, in other sizes and with other decoders; probing."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.geometry import CAN_COMPILE, DTYPES, FASTEST, FASTEST_DTYPE, SIZES, Geometry, step
from benchmarks.harness import Report, in_processes, interleaved
from benchmarks.peers.published_mae import PublishedMAE, normalised
from omnivision.interop.huggingface import to_hf
from omnivision.models.architecture import architecture_of
from omnivision.models.classifier import VideoClassifier, train_mode
from omnivision.models.vit import VisionTransformer

SHAPES = [(size, frames) for size in ("vittiny", "vitsmall", "vitbase", "vitlarge") for frames in (8, 16, 32)]
QUICK_SHAPES = [("vittiny", 4), ("vitsmall", 4)]
DECODERS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "half of the masked tokens": {"share": 0.5},
    "cross-attention": {"attention": "cross"},
    "cross-attention to half": {"attention": "cross", "share": 0.5},
}


def geometry(quick: bool) -> Geometry:
    return Geometry("vittiny", batch=2, frames=4, image=64) if quick else Geometry("vitbase", batch=8)


def pretraining_step(quick: bool) -> Report:
    """The recipe's step: ViT-B, 16 x 224 x 224, nine tenths masked, decoder 4 x 384 x 16 heads, batch 8, in fp32 and in bf16.

    Ours and Hugging Face's VideoMAE, as shipped and compiled, and the published implementation. Before timing, the published
    implementation must give our loss from the same weights, and Hugging Face's encoder our tokens (its decoder has the same
    size, but adds positions elsewhere). The lower bound is the operations that torch counts in a step, divided by the rate of
    one large matrix product of the same run.
    """
    shape = geometry(quick)
    title = f"A pretraining step, {shape.size}, {shape.frames} x {shape.image}², batch {shape.batch}"
    report = Report("pretraining_step", title, "s per clip")
    peers = ["Hugging Face"] if report.works("Hugging Face", shape.huggingface) else []
    report.facts["differences"] = check_equal(shape, bool(peers))
    ways = ["", ", compiled"] if CAN_COMPILE and not quick else [""]  # compiling takes longer than all else
    names = {side: [f"{side} {name}{how}" for name in DTYPES for how in ways] for side in ("ours", *peers)}
    names["published"] = [f"published {name}, checkpointed" for name in DTYPES]
    with in_processes({kind: (pretraining_sides, sides) for kind, sides in names.items()}, quick) as turns:
        report.seconds = interleaved(turns, rounds=2 if quick else 3, warm_up=int(quick), per=shape.batch)

    operations = shape.count()[0] / shape.batch
    report.facts["GFLOP a clip"] = round(operations / 1e9, 1)
    for name, dtype in DTYPES.items():
        rate = matmul_rate(dtype)
        report.facts[f"matrix product {name}, GFLOP/s"] = round(rate / 1e9)
        report.facts[f"lower bound {name}, s a clip"] = round(operations / rate, 4)

    def compare(mine: str, theirs: str, goal: float | None = None) -> None:
        report.times_as_fast(f"a step: {mine}, against {theirs}", mine, theirs, goal)

    goals = {"fp32": 1.3, FASTEST: 1.5}
    for name in DTYPES:
        peer = f"Hugging Face {name}"
        best = min((f"ours {name}{how}" for how in ways), key=report.median)
        compare(best, peer, goals[name])
        if best != f"ours {name}":
            compare(f"ours {name}", peer)
        if len(ways) > 1:
            compare(f"ours {name}, compiled", f"{peer}, compiled")
        compare(best, f"published {name}, checkpointed")
    compare(min(names["ours"], key=report.median), "published fp32, checkpointed", 5.0)
    return report


def pretraining_sides(kind: str, quick: bool) -> dict[str, Callable[[], None]]:
    """Ours as a run does it, peers as they are shipped."""
    shape = geometry(quick)
    if kind == "published":
        published = PublishedMAE(shape.ours(), checkpointing=True)
        return {f"published {name}, checkpointed": shape.step(published, dtype) for name, dtype in DTYPES.items()}
    model = shape.huggingface() if kind == "Hugging Face" else shape.ours()
    sides = {f"{kind} {name}": shape.step(model, dtype) for name, dtype in DTYPES.items()}
    return sides | {f"{kind} {name}, compiled": shape.step(model, dtype, True) for name, dtype in DTYPES.items()}


@torch.no_grad()
def check_equal(shape: Geometry, huggingface: bool) -> dict[str, float]:
    """Return relative differences of what must be the same function. Raises ValueError if they are more than rounding."""
    ours = shape.ours()
    loss, published = shape.loss(ours)(), shape.loss(PublishedMAE(ours, checkpointing=False))()
    differences = {"published loss": float((published / loss - 1).abs())}
    if huggingface:
        tokens = ours.encode(shape.video, (~shape.mask).nonzero()[:, 1].reshape(shape.batch, -1))
        theirs = shape.huggingface()
        # transformers 5 holds two biases under other names than its files have. Exports have the biases of all versions:
        # those of keys are zero, and softmax cancels them.
        memory = {"attention.q_bias": "attention.query.bias", "attention.v_bias": "attention.value.bias"}
        state = {
            f"videomae.{name}": tensor for name, tensor in to_hf(ours.state_dict(), architecture_of(ours)).state.items()
        }
        for old, new in memory.items():
            state = {name.replace(old, new): tensor for name, tensor in state.items()}
        missing, unexpected = theirs.load_state_dict(state, strict=False)
        if [name for name in missing if name.startswith("videomae.")] + [
            name for name in unexpected if not name.endswith("key.bias")
        ]:
            raise ValueError(f"the weights do not fit: {missing} {unexpected}")
        encoded = theirs.videomae(normalised(shape.video).transpose(1, 2), bool_masked_pos=shape.mask).last_hidden_state
        differences["Hugging Face encoder"] = float((encoded - tokens).abs().max() / tokens.abs().max())
    if max(differences.values()) > 1e-4:
        raise ValueError(f"the sides do not compute the same: {differences}")
    return differences


def matmul_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Return the operations per second of one large matrix product; the best of five."""
    a, b = torch.rand(size, size).to(dtype), torch.rand(size, size).to(dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def step_shapes(quick: bool) -> Report:
    """Our step and Hugging Face's, neither compiled, from tiny to large and from 8 to 32 frames; batch 2 (large: 1)."""
    report = Report("step_shapes", "A pretraining step in other sizes", "s per clip")
    for size, frames in QUICK_SHAPES if quick else SHAPES:
        shape = Geometry(size, 1 if size == "vitlarge" else 2, frames, 64 if quick else 224)
        models: dict[str, nn.Module] = {"ours": shape.ours()}
        if report.works("Hugging Face", shape.huggingface):
            models["Hugging Face"] = shape.huggingface()
        for precision, dtype in DTYPES.items():
            name = f"{size}, {frames} frames, {precision}"
            sides = {f"{side}, {name}": shape.step(model, dtype) for side, model in models.items()}
            report.seconds |= interleaved(sides, rounds=2 if quick else 3, per=shape.batch)
            report.times_as_fast(f"step of {name}, against Hugging Face", f"ours, {name}", f"Hugging Face, {name}", 1.0)
    return report


def decoders(quick: bool) -> Report:
    """The recipe's decoder and the two cheaper ones, alone and together, against Hugging Face's VideoMAE, at batch 8.

    What they cost in quality on the demo: `python -m benchmarks.demo_runs decoders FOLDER`.
    """
    shape = geometry(quick)
    report = Report("decoders", f"A pretraining step with other decoders, {shape.size}, {FASTEST}", "s per clip")
    peer = f"Hugging Face {FASTEST}"
    kinds: dict[str, Any] = {"ours": (decoder_sides, [f"ours, {name}" for name in DECODERS])}
    if report.works("Hugging Face", shape.huggingface):
        kinds = {"Hugging Face": (pretraining_sides, [peer])} | kinds
    with in_processes(kinds, quick) as turns:
        report.seconds = interleaved(turns, rounds=2 if quick else 3, warm_up=int(quick), per=shape.batch)
    goals = {"half of the masked tokens": 1.8, "cross-attention": 3.0}
    for name in DECODERS:
        report.times_as_fast(f"{name}, against Hugging Face", f"ours, {name}", peer, goals.get(name))
    return report


def decoder_sides(kind: str, quick: bool) -> dict[str, Callable[[], None]]:
    shape, sides = geometry(quick), {}
    for name, decoder in DECODERS.items():
        model = shape.ours(**decoder)
        pixels = model(shape.video, shape.mask, shape.num_masked).pixels
        expected = int(shape.num_masked * decoder.get("share", 1))
        if pixels.shape[1] != expected or not pixels.isfinite().all():
            raise ValueError(f"{name} predicts {pixels.shape[1]} tokens; expected {expected}")
        sides[f"ours, {name}"] = shape.step(model, FASTEST_DTYPE)
    return sides


def probe_step(quick: bool) -> Report:
    """A step of linear probing (frozen trunk) and of fine-tuning, with views of 16 x 224 x 224."""
    size, frames, image = ("vittiny", 4, 64) if quick else ("vitsmall", 16, 224)
    report = Report("probe_step", f"A step of linear probing and of fine-tuning, {size}", "s per clip")
    video, label = torch.randint(0, 256, (4, 3, frames, image, image), dtype=torch.uint8), torch.arange(4)
    sides = {}
    for name, frozen in (("probing", True), ("fine-tuning", False)):
        torch.manual_seed(0)
        trunk = VisionTransformer(*SIZES[size][0], num_frames=frames, image_size=image)
        model = VideoClassifier(trunk, [101])
        model.trunk.requires_grad_(not frozen)
        train_mode(model)
        sides[f"ours, {name}"] = step(model, cross_entropy(model, video, label), torch.float32)
    report.seconds = interleaved(sides, rounds=2 if quick else 5, per=len(video))
    report.times_as_fast(f"probing against fine-tuning, {size}", "ours, probing", "ours, fine-tuning", 2.5)
    return report


def cross_entropy(model: nn.Module, video: torch.Tensor, label: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: nn.functional.cross_entropy(model(video, 0), label)
