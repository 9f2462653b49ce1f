"""`omnivision reconstruct CHECKPOINT VIDEO OUT`: a clip and its reconstruction, as an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from omnivision.tools.arguments import (
    Device,
    Flag,
    FramePattern,
    FrameRate,
    Seconds,
    Share,
    TrustTargets,
    at_least,
    resolve_fps,
)
from omnivision.utils.errors import UserError


def reconstruct(
    checkpoint: str,
    video: str,
    out: Path,
    /,
    *,
    start: Seconds = None,
    mask_ratio: Share = 0.9,
    seed: Annotated[int, at_least(0)] = 0,
    force: Flag = False,
    device: Device = "cpu",
    trust_targets: TrustTargets | None = None,
    fps: FrameRate = None,
    frame_pattern: FramePattern = None,
) -> int:
    """Show how a masked autoencoder reconstructs a video.

    A clip of a video beside its visible patches and the reconstruction: once with the true statistics of each hidden patch,
    as papers show it, and once without.

    Args:
        checkpoint: A run directory of stage 1, or a file.
        video: A video, or a folder of its frames.
        out: A .gif, which moves, or a .png of some frames.
        start: Where the clip begins (default: in the middle).
        mask_ratio: Share of hidden patches.
        seed: Seed of the mask.
        force: Replace OUT if it exists.
    """
    if out.suffix not in (".gif", ".png"):
        raise UserError(f"OUT is {out}; must end in .gif or .png. Change OUT.")
    if out.exists() and out.resolve() == Path(video).resolve():
        raise UserError(f"OUT is {out}, the video that is read. Give another OUT.")
    if out.exists() and not force:
        raise UserError(f"OUT is {out}, which exists. Give another OUT, or --force to replace it.")
    from omnivision.reporting.images import gif_bytes, moving, still
    from omnivision.tools.inference import load
    from omnivision.utils.io import replace_atomically

    images = load(checkpoint, device, trust_targets or []).reconstruct(
        video, start, mask_ratio, seed, resolve_fps(fps, [video]), frame_pattern
    )
    try:
        with replace_atomically(out) as file:
            if out.suffix == ".gif":
                file.write(gif_bytes(moving(images)))
            else:
                still(images).save(file, "PNG")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}. Give another OUT.") from error
    print(f"Wrote {out}")
    return 0
