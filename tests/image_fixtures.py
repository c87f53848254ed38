"""Pictures that behave like photos, and their encodings, for tests of decoding and transforms."""

import io

import numpy as np
from PIL import Image


def photo(width, height, seed=0):
    """An image with edges, ramps and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    pixels = np.stack([255 * x, 255 * y, 128 + 100 * np.sin(9 * x + 7 * y)], -1)
    for _ in range(12):
        left, top = rng.integers(0, width), rng.integers(0, height)
        pixels[top : top + height // 5, left : left + width // 6] = rng.integers(0, 256, 3)
    return Image.fromarray((pixels + rng.normal(0, 3, pixels.shape)).clip(0, 255).astype(np.uint8))


def encoded(image, format="JPEG", **options):
    """Bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, format=format, **{"quality": 90, **options} if format == "JPEG" else options)
    return stream.getvalue()


def with_orientation(image, orientation, **options):
    """Bytes of a JPEG file that says how it is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, exif=exif, **options)
