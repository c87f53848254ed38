"""How an image file becomes an upright RGB picture.

Nothing here imports torch or `datasets`.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .data_errors import ImageError
from .image_formats import FORMATS, MAX_IMAGE_PIXELS


__all__ = ["GreyScale", "check_pixels", "image_errors", "open_header", "open_image", "to_rgb", "upright_rgb"]

# Tags of TIFF files, and the value of the second by which 0 is white.
_BITS, _PHOTOMETRIC, _MIN_IS_WHITE = 258, 262, 0


def open_image(
    source: str | Path | bytes, name: str | None = None, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    """Read an image as RGB, turned upright.

    The EXIF orientation is applied (and ignored where the EXIF block itself is broken). `to_rgb` says what becomes of
    images that are not RGB. Of an animation, the first frame is read.

    Args:
        source: Path of the file, or its contents.
        name: What to call the image in errors; by default the path, or "image of N bytes".
        max_image_pixels: Refuse an image of more, before it is decoded.

    Returns:
        PIL image of mode `RGB`, all of its pixels read.

    Raises:
        ImageError: the file is missing, empty, truncated, corrupt, too large, or of a kind that has no defined RGB
            form.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        if name is None:
            name = f"image of {len(source)} bytes"
        stream = io.BytesIO(source)
    else:
        name = str(source) if name is None else name
        stream = os.fspath(source)
    with image_errors(name), open_header(stream, max_image_pixels) as image:
        return upright_rgb(image)


def open_header(stream: str | BinaryIO, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Open an image, of which only the header is read: the one place where image files are opened.

    Args:
        stream: Path or binary stream.
        max_image_pixels: As for `open_image`.

    Returns:
        PIL image, not decoded, of one of the kinds of `image_formats`.

    Raises:
        Exception: whatever Pillow raises, or a `ValueError` where the header says more pixels.
    """
    image = Image.open(stream, formats=FORMATS)
    try:
        return check_pixels(image, max_image_pixels)
    except ValueError:
        image.close()
        raise


def check_pixels(image: Image.Image, max_image_pixels: int) -> Image.Image:
    """The image itself, if it is not too large.

    Raises:
        ValueError: it has more pixels.
    """
    if image.width * image.height > max_image_pixels:
        raise ValueError(
            f"{image.width} x {image.height} are {image.width * image.height:,} pixels, more than max_image_pixels "
            f"{max_image_pixels:,}"
        )
    return image


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

    Args:
        image: Of any mode. It is decoded, and otherwise stays as it is.

    Returns:
        Another image, or `image` itself where there is nothing to change.

    Raises:
        Exception: whatever the decoder raises.
    """
    scale = _scale(image)  # known to the file that was opened, not to a turned copy
    image.load()
    return to_rgb(_upright(image), scale)


def _is_unidentified(error: Exception) -> bool:
    return type(error).__name__ == "UnidentifiedImageError"


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image  # which would be copied otherwise
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return image


class GreyScale(NamedTuple):
    """What the numbers of a grey image of more than 8 bits mean.

    Attributes:
        white: The value of white; None where the file doesn't say.
        inverted: Whether 0 is white, and `white` black.
    """

    white: int | None = None
    inverted: bool = False


def _scale(image: Image.Image) -> GreyScale:
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    inverted = tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE and image.mode.startswith(("I;", "F"))  # Pillow turns 8 bits
    if image.mode.startswith("I;"):
        return GreyScale((1 << tags.get(_BITS, (16,))[0]) - 1, inverted)
    if image.mode == "I" and image.format in ("PPM", "PNG"):  # 16 bits at most, which Pillow scales to all 16
        return GreyScale(65535)
    return GreyScale(None, inverted)


def to_rgb(image: Image.Image, scale: GreyScale | None = None) -> Image.Image:
    """Convert a decoded image of any mode.

    - 1 bit, grey, palette, CMYK, YCbCr and LAB: as Pillow converts them. An alpha channel or transparent colour is
      dropped, as in the published pipelines: the colours below it show.
    - 16 bits per channel, colour: Pillow reads the upper 8 bits.
    - 16 (or 12) bits, grey: scaled to 0..255 and rounded, not clipped.
    - 32-bit integers: where the file doesn't say what white is, values up to 255 are 8-bit values, values up to 65535
      are 16-bit values.
    - Floating point: 0 is black, 1 is white.

    Args:
        image: Of any mode.
        scale: What its numbers mean, for grey of more than 8 bits; None: what `image` itself says.

    Returns:
        Mode RGB; `image` itself if that is its mode.

    Raises:
        ValueError: values out of range (negative, above 65535, floating-point ones that are not within 0..1), or a
            mode that has no defined RGB form.
    """
    mode = image.mode
    if mode == "RGB":
        return image
    if mode == "F" or mode.startswith("I"):
        grey = _eight_bits(np.asarray(image), _scale(image) if scale is None else scale)
        return Image.fromarray(grey).convert("RGB")
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, scale: GreyScale) -> np.ndarray:
    """Grey values of more than 8 bits -> 0..255 uint8."""
    if values.dtype.kind == "f":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # NaN too
            raise ValueError(f"floating-point pixels {low:g}..{high:g}; expected 0 (black) to 1 (white)")
        grey = np.rint(values * 255.0)
        return (255 - grey if scale.inverted else grey).astype(np.uint8)
    values = values.astype(np.int64)
    low, high = values.min(), values.max()
    white = scale.white or (255 if high <= 255 else 65535)
    if low < 0 or high > white:
        raise ValueError(f"32-bit integer pixels {low}..{high}; expected 8 or 16 bits per channel")
    grey = (values * 255 + white // 2) // white
    return (255 - grey if scale.inverted else grey).astype(np.uint8)
