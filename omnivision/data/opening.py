"""The one way in which files named by others are opened: only what is plainly a file or a folder, and never a pipe."""

import os
import stat

from PIL import UnidentifiedImageError


class BadVideo(Exception):
    """This file cannot give the frames asked for. The message is one line: the reason, without the path."""


EIGHT_K = 7680 * 4320  # the largest frames that are shown to people


def check_pixels(width: int, height: int, max_pixels: int | None) -> None:
    """Raises BadVideo when a picture has more than `max_pixels`."""
    if max_pixels is not None and width * height > max_pixels:
        raise BadVideo(f"{width}x{height} is more than max_pixels = {max_pixels}")


def open_plain(path: str, folder: int | None = None) -> tuple[int, bool]:
    """Descriptor of a regular file or (not inside `folder`) a folder, and whether it is a folder. Raises BadVideo.

    Pipes, sockets and devices are refused before they are opened: opening one can block or act.
    """
    descriptor = -1
    try:
        _check_plain(os.stat(path, dir_fd=folder), folder is None)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        return descriptor, _check_plain(os.fstat(descriptor), folder is None)  # the name may mean another file now
    except (OSError, ValueError, BadVideo) as error:  # ValueError: the name holds a null byte or half a surrogate pair
        if descriptor >= 0:
            os.close(descriptor)
        raise BadVideo(reason(error)) from error


def _check_plain(status: os.stat_result, may_be_folder: bool) -> bool:
    """True for a folder, False for a regular file that is not empty, else BadVideo."""
    if may_be_folder and stat.S_ISDIR(status.st_mode):
        return True
    if not stat.S_ISREG(status.st_mode):
        raise BadVideo("not a regular file")
    if status.st_size == 0:
        raise BadVideo("the file is empty")
    return False


def reason(error: BaseException) -> str:
    """One line without the path."""
    text = "not an image" if isinstance(error, UnidentifiedImageError) else getattr(error, "strerror", None)
    return " ".join((text or str(error)).split()) or type(error).__name__
