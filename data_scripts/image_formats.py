"""The kinds of image files that are read, and the endings of their names.

Pillow knows some forty kinds; of most of them nobody has photos, and one of them (PostScript) is a program, which it
hands to an interpreter. So every image is opened by `images.open_header`, as one of the kinds named here.
"""

import contextlib
import math

from PIL import Image, features


__all__ = ["FORMATS", "HEIF_EXTENSIONS", "IMAGE_EXTENSIONS", "MAX_IMAGE_PIXELS", "check_pixel_limit"]

MAX_IMAGE_PIXELS = 89_478_485
"""Pixels of an image that is read, at most, where nobody says otherwise: a quarter of a gigabyte in RGB."""
HEIF_EXTENSIONS = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})
"""Endings of what the extra `heic` reads."""

# The kinds, with the codec that Pillow may have been built without. MPO: several JPEGs in one file.
_KINDS = {
    "AVIF": "avif",
    "BMP": None,
    "GIF": None,
    "HEIF": None,
    "JPEG": "jpg",
    "JPEG2000": "jpg_2000",
    "MPO": "jpg",
    "PNG": "zlib",
    "PPM": None,
    "TIFF": None,
    "WEBP": "webp",
}

with contextlib.suppress(ImportError):  # the extra `heic`
    import pillow_heif

    pillow_heif.register_heif_opener()

Image.init()
_READ = [kind for kind, codec in _KINDS.items() if codec is None or features.check(codec)]
FORMATS = tuple(kind for kind in _READ if kind in Image.OPEN)
"""What `PIL.Image.open` takes as `formats`."""
IMAGE_EXTENSIONS = frozenset(ending for ending, kind in Image.EXTENSION.items() if kind in _READ)
"""The endings, in small letters, of all files that are read."""


def check_pixel_limit(max_image_pixels: int) -> int:
    """The limit itself, if it can be one.

    Raises:
        ValueError: it is not positive, or above what Pillow itself opens (twice `PIL.Image.MAX_IMAGE_PIXELS`).
    """
    pillow = Image.MAX_IMAGE_PIXELS
    most = math.inf if pillow is None else max(2 * pillow, MAX_IMAGE_PIXELS)
    if not 1 <= max_image_pixels <= most:
        raise ValueError(
            f"max_image_pixels must be >= 1 and <= {most}, which is as many as Pillow opens, got {max_image_pixels}"
        )
    return max_image_pixels
