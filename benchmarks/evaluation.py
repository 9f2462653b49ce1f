"""A split evaluated with six views per video (2 clips, 3 crops): ours, and the published loop of one view at a time.

The published loop decodes and converts every frame of each clip, makes each crop in floating point, and runs the model, without
fused attention, on one view after another. The scores of every video must agree. ViT-Ti shows the cost of the loop and its
loading; ViT-B is bound by its matrix products.
"""

import functools
import tempfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import videos
from benchmarks.geometry import HAS_BF16, SIZES
from benchmarks.harness import Report, interleaved
from benchmarks.peers import loaders
from benchmarks.peers.published_mae import normalised, published_block
from omnivision.data.catalog import LabelSets
from omnivision.data.dataset import ClipConfig, ClipDataset
from omnivision.data.frames import subsample_indices
from omnivision.data.loader import LoaderConfig, ValData
from omnivision.data.sampling import uniform_clip_starts
from omnivision.data.video import open_video
from omnivision.data.views import EvalView, crop_offsets, resize_short_side
from omnivision.distributed.process_group import Dist, RankInfo
from omnivision.models.classifier import VideoClassifier
from omnivision.models.vit import VisionTransformer
from omnivision.tasks.classify import Classify
from omnivision.training.evaluate import evaluate_model

CLASSES, CLIPS, CROPS = 101, 2, 3


@torch.no_grad()
def published_scores(model: VideoClassifier, paths: list[Path], size: int) -> Tensor:
    """Return (videos, classes): the mean over six views of each, one view at a time."""
    means = []
    for path in paths:
        with open_video(str(path)) as video:
            duration = video.duration
        scores = []
        for start in uniform_clip_starts(duration, loaders.SECONDS, CLIPS):
            frames = loaders.all_frames(path, start)
            wanted = torch.from_numpy(np.stack([frames[i] for i in subsample_indices(len(frames), loaders.FRAMES)]))
            clip = resize_short_side(normalised(wanted.permute(3, 0, 1, 2)[None])[0], size)  # (C, T, H, W), float
            for top, left in crop_offsets(clip.shape[-2], clip.shape[-1], size, CROPS):
                view = clip[None, ..., top : top + size, left : left + size]
                x = model.trunk.patch_embed(view) + model.trunk.pos_embed
                for block in model.trunk.blocks:
                    x = published_block(block, x)
                scores.append(model.heads[0](model.trunk.norm(x.mean(1)))[0])
        means.append(torch.stack(scores).mean(0))
    return torch.stack(means)


def our_scores(model: nn.Module, data: ClipDataset, dtype: torch.dtype | None) -> Tensor:
    """Return the same by `omnivision.training.evaluate`."""
    dist = Dist(RankInfo(), "cpu", None, timedelta(minutes=1))
    task = Classify(LabelSets([CLASSES], {"videos": 0}))
    batches = ValData(data, LoaderConfig(), videos_per_batch=2).batches()
    autocast = functools.partial(torch.autocast, "cpu", dtype, enabled=dtype is not None)
    result = evaluate_model(task.evaluation_step, model, batches, dist, autocast)
    assert result is not None
    return torch.from_numpy(result.predictions["videos"].scores)


def evaluation(quick: bool) -> Report:
    report = Report("evaluation", "Evaluation with six views per video", "s a video")
    sizes, image, count = (["vittiny"], 64, 2) if quick else (["vittiny", "vitbase"], 224, 2)
    dtype, precision = (torch.bfloat16, "bf16") if HAS_BF16 else (None, "fp32")  # the published loop has no autocast
    with tempfile.TemporaryDirectory() as name:
        paths = videos.make(Path(name), 340, 256, seconds=4 if quick else 10, copies=count)
        split = videos.split(Path(name), "videos", paths, "val", CLASSES)
        config = ClipConfig(EvalView(image, CROPS), CROPS, loaders.FRAMES, (8, image // 16, image // 16), clips=CLIPS)
        data = ClipDataset([split], {"video": config}, loaders.SECONDS, seed=0, training=False)
        for size in sizes:
            torch.manual_seed(0)
            model = VideoClassifier(VisionTransformer(*SIZES[size][0], image_size=image), [CLASSES]).eval()
            nn.init.normal_(model.heads[0][0].weight, std=0.5)  # type: ignore[index] # scores that tell videos apart
            theirs, mine = published_scores(model, paths, image), our_scores(model, data, None)
            # Theirs are made of pixels that were never rounded after they were resized.
            difference = float((theirs - mine).abs().max() / theirs.std())
            report.facts[f"{size}: largest difference of scores, in deviations"] = round(difference, 5)
            if difference > 0.1 or not torch.equal(theirs.argmax(1), mine.argmax(1)):
                raise ValueError(f"{size}: the scores differ by {difference} deviations")
            ours, peer = f"ours, {size}", f"the published loop, {size}"
            sides = {
                ours: functools.partial(our_scores, model, data, dtype),
                peer: functools.partial(published_scores, model, paths, image),
            }
            report.seconds |= interleaved(sides, rounds=2 if quick else 5, per=count)
            what = f"six-view evaluation, {size}, {precision}, against the published loop in fp32"
            report.times_as_fast(what, ours, peer, 3.0)
    return report
