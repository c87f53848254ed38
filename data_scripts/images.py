"""Image files: which files count as images, and how one becomes an RGB picture.

Nothing here imports torch or `datasets`.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from .errors import DataError, ImageError


__all__ = [
    "IMAGE_EXTENSIONS",
    "ImageFile",
    "image_errors",
    "is_hidden",
    "is_image_name",
    "list_images",
    "open_image",
    "to_rgb",
    "upright_rgb",
]

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"})


class ImageFile(NamedTuple):
    """One image file, as found by `list_images`.

    Attributes:
        path: Relative to the folder that was listed, with `/` between the parts.
        size: Bytes.
        mtime_ns: Time of the last change, nanoseconds.
    """

    path: str
    size: int
    mtime_ns: int


def is_hidden(name: str) -> bool:
    """Whether a file or folder name is to be passed over: hidden, or litter that macOS leaves (`._*`, `__MACOSX`)."""
    return name.startswith(".") or name == "__MACOSX"


def is_image_name(name: str) -> bool:
    """Whether a file name is that of an image: a known extension in any case, and not hidden."""
    return not is_hidden(name) and PurePath(name).suffix.lower() in IMAGE_EXTENSIONS


def list_images(folder: str | Path) -> list[ImageFile]:
    """List the images in a folder, however deep they lie.

    Links to files and to folders are followed; a link to a folder that contains it is not followed round.

    Args:
        folder: Where to look.

    Returns:
        The images, sorted by relative path (by code point, so `B` comes before `a`).

    Raises:
        DataError: a folder can't be read, an image is a broken link, or a name is not valid Unicode.
    """
    return sorted(_walk_images(os.fspath(folder), "", frozenset()))


def _walk_images(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[ImageFile]:
    try:
        here = Path(folder).stat()
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"can't list the folder {folder}: {error.strerror or error}") from error
    identity = (here.st_dev, here.st_ino)
    if identity in above:
        return
    above |= {identity}
    for entry in entries:
        if is_hidden(entry.name):
            continue
        if entry.is_dir():
            yield from _walk_images(entry.path, f"{prefix}{entry.name}/", above)
        elif is_image_name(entry.name):
            if not entry.is_file():
                if entry.is_symlink():
                    raise DataError(f"{entry.path} is a broken link to {Path(entry.path).readlink()}")
                continue
            status = entry.stat()
            path = prefix + entry.name
            try:
                path.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"the file name {entry.path!r} is not valid UTF-8, and can't be stored in a table: rename it"
                ) from error
            yield ImageFile(path, status.st_size, status.st_mtime_ns)


def open_image(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """Read an image as RGB, turned upright.

    The EXIF orientation is applied (and ignored where the EXIF block itself is broken). Grey, palette and CMYK
    images are converted; 16-bit grey is scaled to 0..255, not clipped. An alpha channel is dropped, as in the
    published pipelines. Of an animation, the first frame is read.

    Args:
        source: Path of the file, or its contents.
        name: What to call the image in errors; by default the path, or "image of N bytes".

    Returns:
        PIL image of mode `RGB`, all of its pixels read.

    Raises:
        ImageError: the file is missing, empty, truncated, corrupt, or of a kind that has no defined RGB form.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        if name is None:
            name = f"image of {len(source)} bytes"
        stream = io.BytesIO(source)
    else:
        name = str(source) if name is None else name
        stream = os.fspath(source)
    with image_errors(name), Image.open(stream) as image:
        return upright_rgb(image)


@contextlib.contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into an error that names the image.

    Args:
        name: What to call the image.

    Raises:
        ImageError: instead of anything but a `MemoryError`.
    """
    try:
        yield
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{name}: there is no such file") from error
    except Exception as error:  # decoders raise nearly anything on bytes that they don't understand
        reason = "not an image in any known format, or an empty file" if _is_unidentified(error) else str(error)
        raise ImageError(f"{name}: can't read this image ({type(error).__name__}: {reason})") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image, turn it upright and convert it to RGB, as `open_image` documents.

    Raises:
        Exception: whatever the decoder raises.
    """
    image.load()
    return to_rgb(_upright(image))


def _is_unidentified(error: Exception) -> bool:
    return type(error).__name__ == "UnidentifiedImageError"


def _upright(image: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return image
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image of any mode, as `open_image` documents."""
    mode = image.mode
    if mode == "RGB":
        return image
    if mode.startswith("I"):  # "I;16", "I;16B" and, for some 16-bit files, "I": convert("RGB") would clip at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"32-bit integer pixels {values.min()}..{values.max()}; expected 8 or 16 bits per channel"
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if mode == "F":
        raise ValueError("floating-point pixels have no defined RGB form; expected 8 or 16 bits per channel")
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
