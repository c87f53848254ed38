"""JPEG decoding that does no more than a crop needs.

A crop that is shrunk a lot does not need the full resolution. `EncodedImage` reads the header, says how large the
upright image is, and then decodes a given part:

- at 1/2, 1/4 or 1/8 of the size, which the JPEG library does by leaving out high frequencies of each block
  (`PIL.Image.Image.draft`);
- without turning the whole picture: the part is given as stored, with what is left to turn.

Everything that is not a plain grey or RGB JPEG file is decoded in full. Nothing here imports torch or `datasets`.
"""

import io
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image

from .image_formats import MAX_IMAGE_PIXELS
from .images import image_errors, open_header, to_rgb, upright_rgb


__all__ = ["DecodedPart", "EncodedImage", "Turn"]


class Turn(NamedTuple):
    """What turns a stored picture upright: first mirror, then swap rows and columns.

    Attributes:
        swap: Whether rows become columns.
        mirror_x: Whether to mirror left and right.
        mirror_y: Whether to mirror top and bottom.
    """

    swap: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @classmethod
    def from_exif(cls, orientation: int) -> "Turn":
        """Of an EXIF orientation 1..8; anything else counts as upright."""
        if orientation not in range(2, 9):
            return cls()
        return cls(orientation >= 5, orientation in (2, 3, 7, 8), orientation in (3, 4, 6, 7))

    def to_stored(self, box: tuple[int, int, int, int], width: int, height: int) -> tuple[int, int, int, int]:
        """A box of the upright picture (left, top, right, bottom) in the stored one, whose size is given."""
        left, top, right, bottom = box
        if self.swap:
            left, top, right, bottom = top, left, bottom, right
        if self.mirror_x:
            left, right = width - right, width - left
        if self.mirror_y:
            top, bottom = height - bottom, height - top
        return left, top, right, bottom


class DecodedPart(NamedTuple):
    """Pixels that hold the part asked for.

    Attributes:
        image: Mode RGB, as stored (not turned); `shrink` times smaller than the file says.
        box: Where in `image` the part is: left, top, right, bottom in whole pixels.
        shrink: 1, 2, 4 or 8.
        turn: What is left to do to the part to have it upright.
    """

    image: Image.Image
    box: tuple[int, int, int, int]
    shrink: int = 1
    turn: Turn = Turn()


class EncodedImage:
    """An image of which only the header has been read (of anything but a plain JPEG: an image read in full).

    Args:
        source: Path of the file, or its contents.
        name: What to call the image in errors; by default the path, or "image of N bytes".
        max_image_pixels: As for `open_image`.

    Attributes:
        size: Width and height, upright.
        turn: What turns the stored picture upright.

    Raises:
        ImageError: as `open_image`; from the constructor, or (pixels that can't be decoded) from the methods.
    """

    def __init__(self, source: str | Path | bytes, name: str | None = None, max_image_pixels: int = MAX_IMAGE_PIXELS):
        is_bytes = isinstance(source, (bytes, bytearray, memoryview))
        if name is None:
            name = f"image of {len(source)} bytes" if is_bytes else str(source)
        self.name = name
        self._max_image_pixels = max_image_pixels
        self.turn = Turn()
        self._pixels = None
        with image_errors(name):
            self._data = bytes(source) if is_bytes else Path(source).read_bytes()
            self._opened = open_header(io.BytesIO(self._data), max_image_pixels)
            self._lazy = self._opened.format == "JPEG" and self._opened.mode in ("RGB", "L")
            if self._lazy:
                self.turn = Turn.from_exif(_orientation(self._opened))
                self._stored_size = self._opened.size
                self.size = self._stored_size[::-1] if self.turn.swap else self._stored_size
            else:  # some formats say only after decoding how the picture is to be turned
                self.size = self.load().size

    def load(self) -> Image.Image:
        """The whole image, RGB and upright: what `open_image` gives."""
        if self._pixels is None:
            with image_errors(self.name):
                self._pixels = upright_rgb(self._header())
        return self._pixels

    def decode_part(self, box: tuple[int, int, int, int], shrink: int = 1) -> DecodedPart:
        """Decode what a part of the upright image needs.

        Args:
            box: The part: left, top, right, bottom in whole pixels of the upright image.
            shrink: 1, 2, 4 or 8: how much smaller the part may come; only a plain JPEG makes use of it.

        Returns:
            The part. If it is smaller, its edges were moved to the nearest whole pixel, by at most `shrink / 2` pixels
            of the upright image.
        """
        if not self._lazy or self._pixels is not None:
            return DecodedPart(self.load(), box)
        with image_errors(self.name):
            left, top, right, bottom = self.turn.to_stored(box, *self._stored_size)
            image = self._header()
            if shrink > 1:
                image.draft(None, (image.width // shrink, image.height // shrink))
            image.load()
            image = to_rgb(image)
        left, top = _nearest(left, shrink, image.width - 1), _nearest(top, shrink, image.height - 1)
        right = max(_nearest(right, shrink, image.width), left + 1)
        bottom = max(_nearest(bottom, shrink, image.height), top + 1)
        return DecodedPart(image, (left, top, right, bottom), shrink, self.turn)

    def _header(self) -> Image.Image:
        """The image with its header read; a new one each time, since decoding uses it up."""
        image, self._opened = self._opened, None
        return open_header(io.BytesIO(self._data), self._max_image_pixels) if image is None else image


def _nearest(position: int, shrink: int, limit: int) -> int:
    return min((position + shrink // 2) // shrink, limit)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1
