"""Why the demo learns what it learns (docs/demo.md): the demo's model, one setting changed at a time.

    python -m benchmarks.demo_study FOLDER [GROUP ...] [--quick]      about 40 minutes on two cores

Videos are rendered into memory once and not compressed, and runs last a number of clips, so that results depend neither on the
speed of the machine nor on the loader. A finished run is not repeated. Writes FOLDER/runs/*.json and FOLDER/*.png.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two runs at a time are faster than one with two threads

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from omnivision.data.masking import RandomMask
from omnivision.models.classifier import VideoClassifier
from omnivision.models.mae import MaskedAutoencoder, TargetNorm, reconstruction_loss, reconstruction_target
from omnivision.models.patches import IMAGENET_MEAN, IMAGENET_STD
from omnivision.models.vit import VisionTransformer
from omnivision.optim.muon import Muon
from omnivision.optim.schedules import WarmupCosine
from omnivision.utils.io import safe_load, write_json
from omnivision_demo.person import JOINTS, Body, joints
from omnivision_demo.render import render
from omnivision_demo.spec import ACTIONS, PLACE_TYPES, VideoSpec, video_spec

FPS, SIDE = 12, 72  # of the videos in memory
VIDEOS = {  # of each action
    ("synthetic", "train"): 500,
    ("synthetic", "val"): 50,
    ("nohuman", "train"): 40,
    ("target", "train"): 40,
    ("target", "val"): 50,
}


@dataclass(frozen=True)
class Setup:
    """A run. The defaults are the demo's alignment, from random weights and shorter."""

    stage: Literal["mae", "label"] = "label"
    domains: tuple[str, ...] = ("synthetic",)
    clips: int = 12_000  # that the run sees
    start: str | None = None  # the run whose trunk it starts from
    frozen: bool = False  # train the head alone
    model: Literal["transformer", "convolution"] = "transformer"
    width: int = 96
    depth: int = 2
    frames: int = 8
    size: int = 48
    tubelet: tuple[int, int, int] = (4, 6, 6)
    seconds: float = 1.6
    positions: Literal["raster", "axes"] = "raster"
    videos: int | None = None  # of the training split; all if None
    smallest_crop: float = 0.7  # of the area
    flip: bool = True
    color: float = 0.0  # strength of color jitter
    motion: float = 1.0  # factor of the changes within a tubelet
    batch: int = 16
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: float = 3e-3
    mask: float = 0.5
    norm: TargetNorm = "channel"
    decoder: tuple[int, int] = (48, 1)  # width, depth
    seed: int = 0


ADAMW = Setup(optimizer="adamw", lr=1e-3)
MAE = Setup(stage="mae", domains=("synthetic", "nohuman"), clips=24_000, lr=4e-3)
TARGET = Setup(domains=("target",), clips=2400, lr=2e-3)
GROUPS: dict[str, dict[str, Setup]] = {
    "optimizer": {
        "Muon": Setup(),
        "Muon, rate 1e-3": Setup(lr=1e-3),
        "Muon, batch 64": Setup(batch=64),
        "AdamW, rate 1e-3": ADAMW,
        "AdamW, rate 3e-3": replace(ADAMW, lr=3e-3),
        "AdamW, changes x 4": replace(ADAMW, motion=4.0),
    },
    "model": {
        "2 blocks of 96": Setup(),
        "4 blocks": Setup(depth=4),
        "width 48": Setup(width=48),
        "width 192": Setup(width=192),
        "3-D convolution": replace(ADAMW, model="convolution"),
    },
    "tubelet": {
        "4 x 6 x 6": Setup(),
        "2 x 6 x 6": Setup(tubelet=(2, 6, 6)),
        "8 x 6 x 6": Setup(tubelet=(8, 6, 6)),
        "4 x 12 x 12": Setup(tubelet=(4, 12, 12)),
    },
    "resolution": {
        "48, patches of 6": Setup(),
        "32, patches of 4": Setup(size=32, tubelet=(4, 4, 4)),
        "64, patches of 8": Setup(size=64, tubelet=(4, 8, 8)),
    },
    "clip": {
        "8 frames in 1.6 s": Setup(),
        "in 0.8 s": Setup(seconds=0.8),
        "in 1.2 s": Setup(seconds=1.2),
        "16 frames in 1.6 s": Setup(frames=16),
    },
    "augmentation": {
        "crop and flip": Setup(),
        "none": Setup(smallest_crop=1.0, flip=False),
        "smaller crops": Setup(smallest_crop=0.4),
        "and color": Setup(color=0.4),
    },
    "videos": {
        "3000": Setup(),
        "1000": Setup(videos=1000),
        "300": Setup(videos=300),
        "3000, 48,000 clips": Setup(clips=48_000),
        "1000, 48,000 clips": Setup(videos=1000, clips=48_000),
    },
    "positions": {"of the published code": Setup(), "one code per axis": Setup(positions="axes")},
    "stage 1": {
        "masked 0.5": MAE,
        "masked 0.75": replace(MAE, mask=0.75),
        "masked 0.9": replace(MAE, mask=0.9),
        "plain pixels": replace(MAE, norm="none"),
        "decoder like the trunk": replace(MAE, decoder=(96, 2)),
        "AdamW in stage 1": replace(MAE, optimizer="adamw", lr=1.6e-3),
        "96,000 clips": replace(MAE, clips=96_000),
    },
    "after stage 1": {
        "random weights": Setup(),
        "masked 0.5": Setup(start="masked 0.5"),
        "masked 0.75": Setup(start="masked 0.75"),
        "masked 0.9": Setup(start="masked 0.9"),
        "plain pixels": Setup(start="plain pixels"),
        "decoder like the trunk": Setup(start="decoder like the trunk"),
        "AdamW in stage 1": Setup(start="AdamW in stage 1"),
        "96,000 clips": Setup(start="96,000 clips"),
    },
    "target": {
        "random weights": TARGET,
        "stage 1": replace(TARGET, start="masked 0.5"),
        "stage 1, 96,000 clips": replace(TARGET, start="96,000 clips"),
        "aligned": replace(TARGET, start="3000, 48,000 clips"),
        "aligned, frozen": replace(TARGET, start="3000, 48,000 clips", frozen=True, optimizer="adamw", lr=8e-3),
        "3-D convolution": replace(TARGET, model="convolution", optimizer="adamw", lr=1e-3),
    },
}
POINTS = 10  # of a curve
PROBED = 1000  # videos, at most, from which a linear map of frozen features is learned


# ---- videos -------------------------------------------------------------------------------------------------------


class Videos:
    """The videos of some domains: frames in memory-mapped files, and what is known about each video."""

    def __init__(self, folder: Path, domains: Sequence[str], split: str) -> None:
        specs: list[VideoSpec] = []
        self.places: list[tuple[NDArray[np.uint8], int, int]] = []  # of each video: file, first frame, number of frames
        for domain in domains:
            frames, of_domain = frames_of(folder, domain, split)
            counts = [num_frames(spec) for spec in of_domain]
            firsts = np.cumsum(counts) - counts
            self.places += [(frames, int(first), count) for first, count in zip(firsts, counts, strict=True)]
            specs += of_domain
        self.labels = torch.tensor([spec.label for spec in specs])
        self.specs = specs

    def __len__(self) -> int:
        return len(self.specs)

    def clip(self, number: int, setup: Setup, at: float) -> NDArray[np.uint8]:
        """Return a clip, uint8 (T, SIDE, SIDE, 3), that starts at the fraction `at` of what the video leaves."""
        frames, first, count = self.places[number]
        span = min(setup.seconds * FPS, count - 1)
        rows = np.rint(at * (count - 1 - span) + np.linspace(0, span, setup.frames)).astype(int)
        return frames[first + rows]

    @functools.cached_property
    def properties(self) -> dict[str, NDArray[np.float64]]:
        """Return what a linear map of frozen features is asked for: (videos, values), one-hot for classes."""
        persons = [joints(Body(spec.seed, spec.domain, spec.body), spec) for spec in self.specs[:PROBED]]
        pelvis, head = JOINTS.index("pelvis"), JOINTS.index("head")
        return {
            "action": np.eye(len(ACTIONS))[[spec.label for spec in self.specs[:PROBED]]],
            "type of place": np.eye(len(PLACE_TYPES))[
                [PLACE_TYPES.index(spec.place_type) for spec in self.specs[:PROBED]]
            ],
            "position": np.array([[person[:, pelvis, 0].mean()] for person in persons]),
            "posture": np.array([[person[:, head, 1].mean()] for person in persons]),
        }


def num_frames(spec: VideoSpec) -> int:
    return int(spec.frames * FPS / spec.fps)


def render_videos(folder: Path, per_action: dict[tuple[str, str], int]) -> None:
    """Render the videos that the folder lacks."""
    for (domain, split), count in per_action.items():
        file = folder / f"{domain}_{split}.npy"
        if not file.exists():
            specs = [video_spec(0, domain, split, index) for index in range(len(ACTIONS) * count)]
            with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
                np.save(file, np.concatenate(list(pool.map(square_video, specs, chunksize=20))))


def frames_of(folder: Path, domain: str, split: str) -> tuple[NDArray[np.uint8], list[VideoSpec]]:
    """Return the frames of all videos of a split, uint8 (frames, SIDE, SIDE, 3), and the videos."""
    frames, specs, total = np.load(folder / f"{domain}_{split}.npy", mmap_mode="r"), [], 0
    while total < len(frames):
        specs.append(video_spec(0, domain, split, len(specs)))
        total += num_frames(specs[-1])
    return frames, specs


def square_video(spec: VideoSpec) -> NDArray[np.uint8]:
    """Render a video; return its middle square at SIDE and FPS, uint8 (T, SIDE, SIDE, 3)."""
    video = render(spec)
    rows = np.minimum(np.rint(np.arange(num_frames(spec)) * spec.fps / FPS).astype(int), len(video) - 1)
    height, width = video.shape[1:3]
    side, left, top = min(height, width), max(width - height, 0) // 2, max(height - width, 0) // 2
    square = video[rows, top : top + side, left : left + side]
    return np.stack([np.asarray(Image.fromarray(frame).resize((SIDE, SIDE))) for frame in square])


def make_batch(videos: Videos, numbers: Sequence[int], setup: Setup, rng: np.random.Generator | None) -> Tensor:
    """Return normalized clips (B, 3, T, H, W), cropped and flipped at random, or the middle for rng=None."""
    starts = rng.random(len(numbers)) if rng else np.full(len(numbers), 0.5)
    clips = [videos.clip(number, setup, at) for number, at in zip(numbers, starts, strict=True)]
    video = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)
    side = round(SIDE * (math.sqrt(rng.uniform(setup.smallest_crop, 1)) if rng else 0.9))
    top, left = rng.integers(0, SIDE - side + 1, 2) if rng else ((SIDE - side) // 2,) * 2
    video = video[..., top : top + side, left : left + side].float() / 255
    if rng and setup.flip and rng.random() < 0.5:
        video = video.flip(-1)
    if rng and setup.color:
        gain, shift = (torch.from_numpy(rng.uniform(-1, 1, (len(video), 3, 1, 1, 1))).float() for _ in range(2))
        video = ((video - 0.5) * (1 + setup.color * gain) + 0.5 + setup.color / 2 * shift).clamp(0, 1)
    size = (setup.size, setup.size)
    video = F.interpolate(video.flatten(1, 2), size, mode="bilinear").view(len(video), 3, setup.frames, *size)
    if setup.motion != 1:
        slots = video.unflatten(2, (-1, setup.tubelet[0]))
        still = slots.mean(3, keepdim=True)
        video = (still + setup.motion * (slots - still)).flatten(2, 3)
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (video - mean) / std


# ---- models -------------------------------------------------------------------------------------------------------


class Convolution(nn.Module):
    """Four 3-D convolutions with batch norm: what a plain network without attention learns from the same clips."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        channels = [3, width, 2 * width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for number, stride in enumerate([(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]):
            layer = nn.Conv3d(channels[number], channels[number + 1], 3, stride=stride, padding=1, bias=False)
            layers += [layer, nn.BatchNorm3d(channels[number + 1]), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1], len(ACTIONS))

    def features(self, video: Tensor) -> Tensor:
        return cast(Tensor, self.layers(video).mean((2, 3, 4)))

    def forward(self, video: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.features(video)))


def axis_positions(grid: tuple[int, int, int], width: int) -> Tensor:
    """Return a sinusoid code of each axis side by side, (1, N, width), instead of one over the raster index."""
    rate = torch.exp(-math.log(100) * torch.arange(width // 6) / (width // 6))
    codes = []
    for axis, length in enumerate(grid):
        angle = torch.arange(length)[:, None] * rate
        shape = [length if other == axis else 1 for other in range(3)]
        codes.append(torch.cat([angle.sin(), angle.cos()], 1).view(*shape, -1).expand(*grid, -1))
    return torch.cat(codes, -1).reshape(1, -1, width)


def build_model(setup: Setup, folder: Path) -> nn.Module:
    if setup.model == "convolution":
        return Convolution()
    trunk = VisionTransformer(
        setup.width, setup.depth, setup.width // 32 or 1, 4, setup.frames, setup.size, setup.tubelet
    )
    if setup.stage == "mae":
        model: nn.Module = MaskedAutoencoder(
            trunk, {"width": setup.decoder[0], "depth": setup.decoder[1], "heads": 3, "share": 0.5}
        )
    else:
        model = VideoClassifier(trunk, [len(ACTIONS)])
    if setup.positions == "axes":
        for module in model.modules():
            if hasattr(module, "pos_embed"):
                cast(Tensor, module.pos_embed).copy_(axis_positions(trunk.grid, setup.width))
    if setup.start is not None:
        weights, names = safe_load(folder / "runs" / f"{slug(setup.start)}.pt"), model.state_dict().keys()
        model.load_state_dict({name: weights[name] for name in names if name.startswith("trunk.")}, strict=False)
    if setup.frozen:
        trunk.requires_grad_(False)
    return model


# ---- training -----------------------------------------------------------------------------------------------------


def train(name: str, setup: Setup, folder: Path) -> None:
    """Train a run, unless it is finished; write its curve and weights."""
    file = folder / "runs" / f"{slug(name)}.json"
    if file.is_file() and json.loads(file.read_text())["setup"] == json.loads(json.dumps(asdict(setup))):
        return
    torch.set_num_threads(1)
    torch.manual_seed(setup.seed)
    rng = np.random.default_rng(setup.seed)
    videos, val = Videos(folder, setup.domains, "train"), Videos(folder, setup.domains[:1], "val")
    model = build_model(setup, folder)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer
    if setup.optimizer == "muon":
        optimizer = Muon(groups, setup.lr)
    else:
        betas = (0.9, 0.95) if setup.stage == "mae" else (0.9, 0.999)  # as in the recipe
        optimizer = torch.optim.AdamW(groups, setup.lr, betas, fused=True)
    schedule = WarmupCosine(1e-6, setup.lr, 1e-6, 0.05)
    order = sample_order(min(len(videos), setup.videos or len(videos)), rng)
    steps, losses, curve = setup.clips // setup.batch, [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step / steps)
        numbers = [next(order) for _ in range(setup.batch)]
        video = make_batch(videos, numbers, setup, rng)
        if setup.stage == "mae":
            loss = mae_loss(cast(MaskedAutoencoder, model), video, setup, rng)
        else:
            loss = F.cross_entropy(model(video), videos.labels[numbers])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % max(1, steps // POINTS) == 0:
            recent = float(np.mean(losses[-steps // POINTS :]))
            curve.append({"clips": (step + 1) * setup.batch, "loss": recent, **scores(model, videos, val, setup)})
    torch.save(model.state_dict(), file.with_suffix(".pt"))
    write_json(file, {"name": name, "setup": asdict(setup), "curve": curve})


def sample_order(count: int, rng: np.random.Generator) -> Iterator[int]:
    """Yield the numbers of videos in a new random order for each pass."""
    while True:
        yield from rng.permutation(count).tolist()


def mae_loss(model: MaskedAutoencoder, video: Tensor, setup: Setup, rng: np.random.Generator) -> Tensor:
    """Return the reconstruction error of a random mask, relative to that of each batch's mean target."""
    mask = RandomMask(setup.mask)
    masks = torch.from_numpy(np.stack([mask(model.trunk.grid, rng) for _ in video]))
    prediction = model(video, masks)
    target = reconstruction_target(video, model.trunk.tubelet, prediction.masked_idx, setup.norm)
    return reconstruction_loss(prediction.pixels, target) / target.var()


@torch.no_grad()
def scores(model: nn.Module, videos: Videos, val: Videos, setup: Setup) -> dict[str, float]:
    """Return the top-1 accuracy of a classifier, and what a linear map of its frozen features finds, each in percent."""
    model.eval()
    known = {part: encode(model, part, setup) for part in (videos, val)}
    found: dict[str, float] = {}
    if setup.stage == "label":
        head = model.head if isinstance(model, Convolution) else cast(VideoClassifier, model).heads[0]
        logits = cast(Tensor, head(known[val]))
        found["top-1"] = 100 * float((logits.argmax(1) == val.labels[:PROBED]).float().mean())
    for name, wanted in videos.properties.items():
        guess = ridge(known[videos].double().numpy(), wanted, known[val].double().numpy())
        truth = val.properties[name]
        if truth.shape[1] > 1:
            found[name] = 100 * float((guess.argmax(1) == truth.argmax(1)).mean())
        else:
            found[name] = 100 * max(0.0, float(1 - ((guess - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()))
    model.train()
    return found


def encode(model: nn.Module, videos: Videos, setup: Setup) -> Tensor:
    """Return the features of the first PROBED videos' middle clips, (videos, D)."""
    parts = []
    for first in range(0, min(PROBED, len(videos)), 50):
        batch = make_batch(videos, range(first, min(first + 50, PROBED, len(videos))), setup, None)
        if isinstance(model, MaskedAutoencoder):
            parts.append(model.trunk.norm(model.trunk(batch).mean(1)))
        else:
            parts.append(cast(VideoClassifier, model).features(batch))
    return torch.cat(parts)


def ridge(
    features: NDArray[np.float64], wanted: NDArray[np.float64], others: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Fit a linear map by ridge regression; return what it says about other features."""
    mean, std, center = features.mean(0), features.std(0) + 1e-6, wanted.mean(0)
    x = (features - mean) / std
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ (wanted - center))
    return (others - mean) / std @ weights + center


# ---- results ------------------------------------------------------------------------------------------------------


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def run_name(group: str, label: str) -> str:
    """Return the name of a run; runs that start other runs, and the base, have the same in every group."""
    setup = GROUPS[group][label]
    return "base" if setup == Setup() else label if group in ("stage 1", "videos") else f"{group}, {label}"


def plot(folder: Path) -> None:
    """Draw the curves of each group, and what stage 1 and alignment learn first."""
    from matplotlib.figure import Figure

    def curve(group: str, label: str) -> list[dict[str, float]] | None:
        file = folder / "runs" / f"{slug(run_name(group, label))}.json"
        return json.loads(file.read_text())["curve"] if file.is_file() else None

    figure = Figure(figsize=(13, 3.1 * math.ceil(len(GROUPS) / 3)), layout="constrained")
    for axes, (group, runs) in zip(figure.subplots(math.ceil(len(GROUPS) / 3), 3).flat, GROUPS.items(), strict=False):
        metric = "loss" if group == "stage 1" else "top-1"
        for label in runs:
            if points := curve(group, label):
                axes.plot([p["clips"] / 1000 for p in points], [p[metric] for p in points], marker=".", label=label)
        axes.set_title(group, fontsize=11)
        axes.set_xlabel("clips seen, thousands")
        axes.set_ylabel("error, fraction of variance" if metric == "loss" else "top-1 % on new videos")
        if axes.lines:
            axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(GROUPS) :]:
        axes.remove()
    figure.savefig(folder / "demo_curves.png", dpi=80)

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    sides = {"stage 1 (no labels)": ("stage 1", "96,000 clips"), "alignment": ("videos", "3000, 48,000 clips")}
    for axes, (title, run) in zip(figure.subplots(1, 2, sharey=True), sides.items(), strict=True):
        if points := curve(*run):
            for name in ("type of place", "position", "posture", "action"):
                axes.plot([p["clips"] / 1000 for p in points], [p[name] for p in points], marker=".", label=name)
            axes.legend(fontsize=8)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("clips seen, thousands")
        axes.set_ylabel("% (classes: accuracy; else R²)")
        axes.grid(alpha=0.3)
    figure.savefig(folder / "demo_known.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.demo_study", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of videos, runs and plots")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"some of {', '.join(GROUPS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="few clips: a test that everything works")
    options = parser.parse_intermixed_args()
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"GROUP must be one of {', '.join(GROUPS)}; got {', '.join(sorted(unknown))}")
    (options.folder / "runs").mkdir(parents=True, exist_ok=True)
    wanted = {
        run_name(group, label): setup for group in options.groups or GROUPS for label, setup in GROUPS[group].items()
    }
    if options.quick:
        wanted = {name: replace(setup, clips=320) for name, setup in wanted.items()}
    render_videos(options.folder, dict.fromkeys(VIDEOS, 4) if options.quick else VIDEOS)
    starts = {setup.start for setup in wanted.values()}
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for batch in ([name for name in wanted if name in starts], [name for name in wanted if name not in starts]):
            for name, run in [(name, pool.submit(train, name, wanted[name], options.folder)) for name in batch]:
                run.result()
                print(f"{name}: done", flush=True)
    plot(options.folder)
    print(f"plots in {options.folder}")


if __name__ == "__main__":
    main()
