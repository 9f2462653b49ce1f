"""Visualizations as images: labelled grids of frames as PNG, and the same clips animated as GIF."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from omnivision.tasks.base import Visualization
from omnivision.utils.io import replace_atomically

GAP, LINE, MIN_SIDE = 6, 18, 160
ROW_NAME_WIDTH, CHARACTER_WIDTH = 62, 7.5  # pixels, for a font of size 13
BACKGROUND, INK = (255, 255, 255), (40, 40, 40)


def still(visualization: Visualization) -> Image.Image:
    """Draw columns side by side, one row per frame, captions above; small frames are enlarged without smoothing."""
    return _grid(visualization, visualization.frames, named_rows=True)


def moving(visualization: Visualization) -> list[Image.Image]:
    """Draw the columns side by side, one image per frame of the clip."""
    length = len(next(iter(visualization.columns.values())))
    return [_grid(visualization, [number], named_rows=False) for number in range(length)]


def gif_bytes(images: list[Image.Image], milliseconds: int = 150) -> bytes:
    """Encode images as an animation."""
    buffer = io.BytesIO()
    first, *rest = [image.convert("P", palette=Image.Palette.ADAPTIVE) for image in images]
    first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return buffer.getvalue()


def save(visualization: Visualization, folder: Path, name: str) -> None:
    """Write `<name>.png` and `<name>.gif`."""
    folder.mkdir(parents=True, exist_ok=True)
    still(visualization).save(folder / f"{name}.png")
    (folder / f"{name}.gif").write_bytes(gif_bytes(moving(visualization)))


def write(visualization: Visualization, file: Path) -> None:
    """Replace one image file atomically: animated if its name ends in .gif, else a PNG with some frames."""
    with replace_atomically(file) as opened:
        if file.suffix == ".gif":
            opened.write(gif_bytes(moving(visualization)))
        else:
            still(visualization).save(opened, "PNG")


def _grid(visualization: Visualization, frames: list[int], named_rows: bool) -> Image.Image:
    columns = {caption: _enlarge(clip[frames]) for caption, clip in visualization.columns.items()}
    _, height, width, _ = next(iter(columns.values())).shape
    font = ImageFont.load_default(size=13)
    captions = [textwrap.fill(caption, max(1, int(width / CHARACTER_WIDTH))) for caption in columns]
    left = ROW_NAME_WIDTH if named_rows else GAP
    top = GAP + LINE * max(caption.count("\n") + 1 for caption in captions) + 4
    sheet = Image.new("RGB", (left + len(columns) * (width + GAP), top + len(frames) * (height + GAP)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, (caption, clip) in enumerate(zip(captions, columns.values(), strict=True)):
        x = left + column * (width + GAP)
        draw.text((x, GAP), caption, fill=INK, font=font)
        for row, pixels in enumerate(clip):
            sheet.paste(Image.fromarray(pixels), (x, top + row * (height + GAP)))
    for row, number in enumerate(frames if named_rows else []):
        draw.text((GAP, top + row * (height + GAP) + height // 2 - 8), f"frame {number}", fill=INK, font=font)
    return sheet


def _enlarge(clip: np.ndarray) -> np.ndarray:
    """Repeat the pixels of frames (T, H, W, 3) until their height is about MIN_SIDE."""
    scale = max(1, round(MIN_SIDE / clip.shape[1]))
    return clip.repeat(scale, 1).repeat(scale, 2)
