"""Visualization for people: labelled grids of frames as PNG, and the same clips moving, as GIF."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from omnivision.tasks.base import Visualization

GAP, CAPTION, MIN_SIDE = 6, 22, 160
BACKGROUND, INK = (255, 255, 255), (40, 40, 40)


def still(pictures: Visualization) -> Image.Image:
    """Columns side by side, one row a frame, captions above; small frames are enlarged without smoothing."""
    scale = _scale(pictures)
    rows = [[_frame(frames[i], scale) for frames in pictures.columns.values()] for i in pictures.frames]
    return _grid(rows, list(pictures.columns), [f"frame {i}" for i in pictures.frames])


def moving(pictures: Visualization) -> list[Image.Image]:
    """The columns side by side, one image for each frame of the clip."""
    scale = _scale(pictures)
    length = len(next(iter(pictures.columns.values())))
    return [
        _grid([[_frame(frames[i], scale) for frames in pictures.columns.values()]], list(pictures.columns), [""])
        for i in range(length)
    ]


def gif_bytes(images: list[Image.Image], milliseconds: int = 150) -> bytes:
    buffer = io.BytesIO()
    first, *rest = [image.convert("P", palette=Image.Palette.ADAPTIVE) for image in images]
    first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return buffer.getvalue()


def save(pictures: Visualization, folder: Path, name: str) -> None:
    """Write `<name>.png` and `<name>.gif`."""
    folder.mkdir(parents=True, exist_ok=True)
    still(pictures).save(folder / f"{name}.png")
    (folder / f"{name}.gif").write_bytes(gif_bytes(moving(pictures)))


def _scale(pictures: Visualization) -> int:
    height = next(iter(pictures.columns.values())).shape[1]
    return max(1, round(MIN_SIDE / height))


def _frame(pixels: np.ndarray, scale: int) -> Image.Image:
    image = Image.fromarray(pixels)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _grid(rows: list[list[Image.Image]], captions: list[str], row_names: list[str]) -> Image.Image:
    width, height = rows[0][0].size
    font = ImageFont.load_default(size=13)
    left = 62 if any(row_names) else GAP
    lines = [_wrap(caption, width, font) for caption in captions]
    top = GAP + (CAPTION - 4) * max(map(len, lines)) + 4
    sheet = Image.new("RGB", (left + len(captions) * (width + GAP), top + len(rows) * (height + GAP)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, caption_lines in enumerate(lines):
        for number, text in enumerate(caption_lines):
            draw.text((left + column * (width + GAP), GAP + number * (CAPTION - 4)), text, fill=INK, font=font)
    for row, images in enumerate(rows):
        draw.text((GAP, top + row * (height + GAP) + height // 2 - 8), row_names[row], fill=INK, font=font)
        for column, image in enumerate(images):
            sheet.paste(image, (left + column * (width + GAP), top + row * (height + GAP)))
    return sheet


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break a caption into lines no wider than its column."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
