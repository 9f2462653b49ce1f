"""Image file -> uint8 RGB. An image among the samples is a clip of one frame."""

import os
import struct
import zlib
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps

from omnivision.data.opening import BadVideo, check_pixels, open_plain, reason
from omnivision.utils.safe import BrokenCheckpoint, is_ordinary, safe_load

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


def read_depth(path: str, max_pixels: int | None = None) -> torch.Tensor:
    """A depth map as float32 (1, 1, H, W), as stored: a 16-bit PNG, a 2-D array of numbers (.npy), or a tensor (.pt).

    Raises BadVideo for anything else. Arrays are never unpickled, and tensors are loaded with weights only.
    """
    try:
        with _open_file(path) as file:
            if path.endswith(".npy"):
                array = np.lib.format.read_array(file, allow_pickle=False)
                if array.dtype.kind not in "biuf":
                    raise BadVideo(f"a depth map of {array.dtype}; expected numbers")
                depth = torch.from_numpy(np.asarray(array, dtype=np.float32))
            elif path.endswith(".pt"):
                depth = safe_load(file)
                if (
                    not isinstance(depth, torch.Tensor)
                    or depth.is_complex()
                    or depth.is_nested
                    or not is_ordinary(depth)
                ):
                    raise BadVideo("no dense tensor of real numbers")
            else:
                with Image.open(file, formats=_FORMATS) as image:
                    check_pixels(image.width, image.height, max_pixels)
                    depth = torch.from_numpy(np.asarray(image, dtype=np.float32))
    except (*_ERRORS, BrokenCheckpoint, RuntimeError) as error:
        raise BadVideo(reason(error)) from error
    depth = depth.detach().squeeze()
    if depth.ndim != 2 or not depth.numel():
        raise BadVideo(f"a depth map of shape {tuple(depth.shape)}; expected height x width")
    check_pixels(depth.shape[1], depth.shape[0], max_pixels)
    depth = depth.float()
    if bool(depth.isnan().any()):
        raise BadVideo("a depth map with values that are no numbers")
    return depth[None, None]


def read_rgb(path: str, max_pixels: int | None, folder: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8, upright as its EXIF orientation says. `folder` is a descriptor that `path` starts at.

    Raises BadVideo.
    """
    try:
        with _open_file(path, folder) as file:
            with Image.open(file, formats=_FORMATS) as image:
                check_pixels(image.width, image.height, max_pixels)
                upright = ImageOps.exif_transpose(image)
                deep = upright.mode.startswith("I;16") or (upright.mode == "I" and image.format == "PPM")
                if deep:  # convert() would clip to 255 instead of scaling
                    return np.stack([(np.asarray(upright) >> 8).astype(np.uint8)] * 3, axis=2)
                if upright.mode in ("I", "F"):
                    raise BadVideo("pixels of 32 bits, of which nobody says what is white")
                return np.array(upright.convert("RGB"))
    except _ERRORS as error:
        raise BadVideo(reason(error)) from error


def _open_file(path: str, folder: int | None = None) -> IO[bytes]:
    descriptor, is_folder = open_plain(path, folder)
    if is_folder:
        os.close(descriptor)
        raise BadVideo("a folder, not an image")
    return open(descriptor, "rb")
