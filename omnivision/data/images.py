"""Image file -> uint8 RGB. An image among the samples is a clip of one frame."""

import os
import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps

from omnivision.data.opening import BadVideo, check_pixels, open_plain, reason

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif")
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")  # none that runs another program, as EPS does
_ERRORS = (  # what PIL raises on damaged files
    *(OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, MemoryError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


def read_image(path: str, max_pixels: int | None = None) -> torch.Tensor:
    """An image file as a clip of one frame: uint8 (1, 3, H, W), the first picture of an animation.

    Raises BadVideo when there is no readable image at `path`, or when it has more than `max_pixels`.
    """
    return torch.from_numpy(read_rgb(path, max_pixels)).permute(2, 0, 1)[None]


def read_rgb(path: str, max_pixels: int | None, folder: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8, upright as its EXIF orientation says. `folder` is a descriptor that `path` starts at.

    Raises BadVideo.
    """
    try:
        descriptor, is_folder = open_plain(path, folder)
        if is_folder:
            os.close(descriptor)
            raise BadVideo("a folder, not an image")
        with open(descriptor, "rb") as file:
            with Image.open(file, formats=_FORMATS) as image:
                check_pixels(image.width, image.height, max_pixels)
                upright = ImageOps.exif_transpose(image)
                if upright.mode.startswith("I;16"):  # convert() would clip to 255 instead of scaling
                    return np.stack([(np.asarray(upright) >> 8).astype(np.uint8)] * 3, axis=2)
                return np.array(upright.convert("RGB"))
    except _ERRORS as error:
        raise BadVideo(reason(error)) from error
