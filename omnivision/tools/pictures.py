"""Pictures of features: `omnivision pca`, `neighbors` and `map`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from omnivision.tools.arguments import Flag, FramePattern, FrameRate, at_least, resolve_fps
from omnivision.tools.predict import Device, TrustTargets, check_out
from omnivision.utils.errors import UserError
from omnivision.utils.streams import warn

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from omnivision.probing.store import FeatureSplit

MAX_MAPPED = 5000  # videos of a map
LOW, HIGH = 2, 98  # percentiles of the components that become black and white
Out = Annotated[Path, Parameter(metavar="FILE")]
Data = Annotated[str | None, Parameter(metavar="NAME", help="The dataset (default: the only one in the folder).")]
SplitName = Annotated[Literal["train", "val"], Parameter(help="The split.")]


def pca(
    checkpoint: str,
    video: str,
    out: Path,
    /,
    *,
    start: Annotated[float | None, Parameter(metavar="SECONDS")] = None,
    components: Annotated[int, at_least(0)] = 0,
    force: Flag = False,
    device: Device = "cpu",
    trust_targets: TrustTargets = None,
    fps: FrameRate = None,
    frame_pattern: FramePattern = None,
) -> int:
    """Show what a trunk tells apart in a video: principal components of its tokens as colors.

    Equal colors mean similar tokens. The components are those of the tokens of this clip.

    Args:
        checkpoint: A run directory (its best checkpoint) or a file.
        video: A video, or a folder of its frames.
        out: A .gif (animated) or a .png.
        start: Where the clip begins (default: in the middle).
        components: Leave out this many of the strongest components, which are often only positions.
        force: Replace OUT if it exists.
    """
    check_out(out, (".gif", ".png"), force, video)
    import torch

    from omnivision.models.patches import unnormalize_pixels
    from omnivision.tools.video_model import load

    model = load(checkpoint, device, trust_targets or [])
    rate = resolve_fps(fps, [video])
    views = model.views(video, 1, 1, start=start, fps=rate, frame_pattern=frame_pattern)
    with torch.inference_mode():
        tokens = model.trunk.norm(model.trunk(views))[0].float().cpu()  # (N, D)
    colors = component_colors(tokens, components).unflatten(0, model.trunk.grid)  # (T', H', W', 3)
    for axis, size in enumerate(model.tubelet):
        colors = colors.repeat_interleave(size, axis)
    frames = unnormalize_pixels(views, channel_dim=1)[0].float().clamp(0, 1).permute(1, 2, 3, 0).cpu()
    save_columns({"video": frames, "principal components": colors}, out)
    return 0


def attention(
    checkpoint: str,
    video: str,
    out: Path,
    /,
    *,
    start: Annotated[float | None, Parameter(metavar="SECONDS")] = None,
    force: Flag = False,
    device: Device = "cpu",
    fps: FrameRate = None,
    frame_pattern: FramePattern = None,
) -> int:
    """Show where an attentive probe looks: what it attends to stays bright.

    Brightness is the attention of the query to each token, the mean over heads, relative to the strongest.

    Args:
        checkpoint: A run directory of attentive probes (its best checkpoint) or a file.
        video: A video, or a folder of its frames.
        out: A .gif (animated) or a .png.
        start: Where the clip begins (default: in the middle).
        force: Replace OUT if it exists.
    """
    check_out(out, (".gif", ".png"), force, video)
    import torch

    from omnivision.models.attentive import AttentiveClassifier
    from omnivision.models.patches import unnormalize_pixels
    from omnivision.tools.video_model import load

    model = load(checkpoint, device)
    if not isinstance(model.model, AttentiveClassifier):
        raise UserError(
            f"{model.path} must hold attentive probes, got {type(model.model).__name__}. Give a run with "
            "trainer/model=vit*_attentive."
        )
    rate = resolve_fps(fps, [video])
    views = model.views(video, 1, 1, start=start, fps=rate, frame_pattern=frame_pattern)
    with torch.inference_mode():
        weights = model.model.probes[0].attention(model.trunk.norm(model.trunk(views)))[0].float().cpu()  # type: ignore[operator]
    shown = (weights / weights.max()).unflatten(0, model.trunk.grid)[..., None]
    for axis, size in enumerate(model.tubelet):
        shown = shown.repeat_interleave(size, axis)
    frames = unnormalize_pixels(views, channel_dim=1)[0].float().clamp(0, 1).permute(1, 2, 3, 0).cpu()
    save_columns({"video": frames, "attended": frames * (0.15 + 0.85 * shown)}, out)
    return 0


def save_columns(columns: dict[str, Any], out: Path) -> None:
    """Write columns of frames in [0, 1], each (T, H, W, 3), side by side as a GIF or PNG."""
    from omnivision.reporting import images
    from omnivision.tasks.base import Visualization

    arrays = {name: (frames * 255).round().byte().numpy() for name, frames in columns.items()}
    last = len(next(iter(arrays.values()))) - 1
    images.write(Visualization(arrays, sorted({0, last // 2, last})), out)
    print(f"Wrote {out}")


def component_colors(tokens: Any, skipped: int) -> Any:
    """Return three principal components of tokens (N, D), after the first `skipped`, as colors in [0, 1]: (N, 3)."""
    import torch

    centered = tokens - tokens.mean(0)
    _, _, directions = torch.linalg.svd(centered, full_matrices=False)
    projected = centered @ directions[skipped : skipped + 3].T
    if projected.shape[1] < 3:
        raise UserError(f"--components must leave three of {len(directions)}, got {skipped}.")
    low, high = (torch.quantile(projected, percentile / 100, 0) for percentile in (LOW, HIGH))
    return ((projected - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)


def neighbors(
    features: Annotated[Path, Parameter(name="FEATURES")],
    query: Annotated[int, at_least(0), Parameter(name="INDEX")],
    out: Path,
    /,
    *,
    data: Data = None,
    query_split: Annotated[Literal["train", "val"], Parameter(help="The split of the video.")] = "val",
    among: Annotated[Literal["train", "val"], Parameter(help="The split of the neighbors.")] = "train",
    count: Annotated[int, at_least(1, 50)] = 5,
    force: Flag = False,
) -> int:
    """Show a video beside its nearest neighbors by cosine similarity, moving.

    Args:
        features: A folder of `omnivision features`.
        query: The row of the video in its split.
        out: A .gif (animated) or a .png.
        count: How many neighbors.
        force: Replace OUT if it exists.
    """
    check_out(out, (".gif", ".png"), force)
    import numpy as np

    from omnivision.probing.board import flat_features
    from omnivision.probing.store import blocks

    own, others = (open_features(features, data, which) for which in (query_split, among))
    if query >= len(own):
        raise UserError(f"INDEX must be below {len(own)}, the rows of {own.name}/{own.which}, got {query}.")
    vector = flat_features(own, slice(query, query + 1))[0]
    similarity = np.empty(len(others), np.float32)
    for rows in blocks(len(others)):
        part = flat_features(others, rows)
        norms = np.linalg.norm(part, axis=1) * np.linalg.norm(vector)
        similarity[rows] = part @ vector / np.maximum(norms, 1e-12)
    order = np.argsort(-similarity, kind="stable")
    if own.which == others.which:
        order = order[order != query]
    best = order[:count].tolist()
    columns = {f"video {query}: {class_name(own, query)}": read_frames(own, query)}
    for rank, row in enumerate(best, start=1):
        columns[f"{rank}. {class_name(others, row)}, {similarity[row]:.2f}"] = read_frames(others, row)
    save_columns(columns, out)
    return 0


def map_features(
    features: Annotated[Path, Parameter(name="FEATURES")],
    out: Path,
    /,
    *,
    data: Data = None,
    split: SplitName = "val",
    perplexity: Annotated[int, at_least(2, 500)] = 30,
    force: Flag = False,
) -> int:
    """Draw a split's features in two dimensions, by class: an HTML page that shows each video's path.

    t-SNE (van der Maaten & Hinton 2008) of the standardized features. Distances between clusters mean little.

    Args:
        features: A folder of `omnivision features`.
        out: A .html file.
        perplexity: Roughly how many neighbors each video has.
        force: Replace OUT if it exists.
    """
    check_out(out, (".html",), force)
    import numpy as np
    from sklearn.manifold import TSNE

    from omnivision.probing.board import flat_features
    from omnivision.utils.io import write_atomically

    opened = open_features(features, data, split)
    rows = np.linspace(0, len(opened) - 1, min(len(opened), MAX_MAPPED)).astype(int)
    points = flat_features(opened, rows)
    points = (points - points.mean(0)) / np.maximum(points.std(0), 1e-8)
    if len(points) <= perplexity:
        raise UserError(f"--perplexity must be below {len(points)}, the number of videos, got {perplexity}.")
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points)
    labels = [class_name(opened, row) for row in rows.tolist()]
    paths = [str(opened.paths[row]) for row in rows.tolist()]
    title = f"{opened.name}/{opened.which}: {len(rows)} of {len(opened)} videos"
    write_atomically(out, draw_map(places, labels, paths, title))
    print(f"Wrote {out}")
    return 0


def draw_map(places: np.ndarray, labels: list[str], paths: list[str], title: str) -> str:
    """Return a page with a point (x, y) for each video, colored by its label."""
    import html

    from omnivision.tools.report.figures import scatter
    from omnivision.tools.report.page import standalone

    return standalone(title, scatter(places, list(map(html.escape, labels)), list(map(html.escape, paths))))


def open_features(folder: Path, data: str | None, which: str) -> FeatureSplit:
    """Open a split. Raises UserError if the dataset is not named and there are several."""
    from omnivision.probing.store import open_split, read_header

    names = sorted({key.rpartition("/")[0] for key in read_header(folder).splits})
    if data is None and len(names) != 1:
        raise UserError(f"--data must name one of {', '.join(names)}. Set --data NAME.")
    return open_split(folder, data or names[0], which)


def class_name(split: FeatureSplit, row: int) -> str:
    """Return the name of a row's class, or of its classes; "?" without one, and for regression."""
    if split.labels.ndim > 1:
        if split.record.data.get("label_type") != "multi_label":
            return "?"
        names = split.class_names or [str(label) for label in range(split.labels.shape[1])]
        return " + ".join(names[k] for k in np.flatnonzero(split.labels[row] == 1).tolist()) or "?"
    label = int(split.labels[row])
    if label < 0:
        return "?"
    return split.class_names[label] if split.class_names else str(label)


def read_frames(split: FeatureSplit, row: int) -> Tensor:
    """Return frames of a row's video, in [0, 1]: (T, 96, 96, 3); black if it cannot be read."""
    import numpy as np
    import torch

    from omnivision.data.views import EvalView
    from omnivision.tools.report.figures import read_middle

    times = None if split.times is None else tuple(split.times[row].tolist())
    path, fps = str(split.paths[row]), float(split.record.data.get("fps", 25))
    frames = read_middle(path, fps, split.record.data.get("frame_pattern"), times)
    if frames is None:
        warn(f"{path} cannot be read. It is shown black.")
        return torch.zeros(12, 96, 96, 3)
    view = EvalView(96)
    return view.crop(view.prepare(frames), np.random.default_rng(0)).permute(0, 2, 3, 1) / 255
