"""From an image to a uint8 tensor of the model's size. Normalisation comes later, on the device.

Geometry as torchvision documents it for `RandomResizedCrop`, `Resize` and `CenterCrop`; PIL, numpy and torch do the
work. Randomness comes from the generator that is handed in, never from global state.

Both transforms take a PIL image, or an `EncodedImage`, of which they decode only what they need. How far the result
may be from the plain way (open, convert, crop, resize with PIL), in levels of 0..255, measured on photos:

    transform                      of                     mean difference   largest
    EvalTransform                  anything               0                 0
    EvalTransform(exact=False)     PIL, small JPEG files  0.02              2
    EvalTransform(exact=False)     large JPEG files       0.4 to 0.8        17
    TrainTransform                 PIL, small JPEG files  0.02              2
    TrainTransform                 large JPEG files       0.9 to 1.7        35 (above 16 in 1 of 1,000 values)

A JPEG file is large if it is decoded at a smaller size, which takes a crop at least twice as wide and high as the
result (in evaluation 3.5 times). A `decode_margin` of 1.5 brings 0.9 to 1.7 down to 0.5 to 0.8, and takes some 15 %
more time. For comparison: bicubic in place of bilinear resizing changes values by 1.6 to 2.7 on average.
"""

import math
import random
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from .decoding import DecodedPart, EncodedImage


__all__ = [
    "CropBox",
    "EvalTransform",
    "TrainTransform",
    "central_crop",
    "image_to_tensor",
    "is_elongated",
]

_CROP_TRIES = 10
_WHOLE_UP_TO = 16  # times the crop's pixels: what an image may be resized to as a whole
_SUPPORT = 3  # pixels, of the smaller scale, that the widest filter of PIL looks at on each side


class CropBox(NamedTuple):
    """Part of an image in whole pixels: `left <= x < right`, `top <= y < bottom`."""

    left: int
    top: int
    right: int
    bottom: int


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image of width W and height H to a uint8 tensor `(3, H, W)`.

    Raises:
        ValueError: the mode is not RGB.
    """
    _require_rgb(image)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def _require_rgb(image: Image.Image) -> None:
    if image.mode != "RGB":
        raise ValueError(f"expected an image of mode RGB (see open_image), got {image.mode}")


class TrainTransform:
    """Random resized crop and horizontal flip, fast.

    Up to ten times a crop is drawn: its share of the image's area uniform in `scale`, its width / height log-uniform
    in `ratio`, its place uniform. The first that fits is taken; if none does, the largest central crop whose ratio is
    in range. It is cut out and resized to a square, bilinear with antialiasing.

    Where each side of the crop, made 2, 4 or 8 times smaller, still has `decode_margin` times as many pixels as the
    result, a JPEG is decoded at that smaller size. So that this changes no geometry, the edges of such a crop are
    moved to the nearest multiples of 2, 4 or 8 (of any image, so that the crop doesn't depend on the file's format).

    Args:
        size: Side S of the result.
        scale: Smallest and largest share of the area, 0 < min <= max <= 1.
        ratio: Smallest and largest width / height, 0 < min <= max.
        horizontal_flip: Probability of mirroring, 0..1.
        decode_margin: How many times larger than needed a crop is decoded at least, >= 1; `math.inf` for always at
            full size.

    Raises:
        ValueError: an argument is out of range.
    """

    reads_encoded = True

    def __init__(
        self,
        size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: float = 0.5,
        decode_margin: float = 1.0,
    ):
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be 0 < min <= max <= 1, got {tuple(scale)}")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be 0 < min <= max, got {tuple(ratio)}")
        if not 0 <= horizontal_flip <= 1:
            raise ValueError(f"horizontal_flip must be a probability in [0, 1], got {horizontal_flip}")
        if not decode_margin >= 1:
            raise ValueError(f"decode_margin must be >= 1, got {decode_margin}")
        self.size = size
        self.scale = tuple(scale)
        self.ratio = tuple(ratio)
        self.horizontal_flip = horizontal_flip
        self.decode_margin = decode_margin

    def sample_crop(self, width: int, height: int, rng: random.Random) -> CropBox:
        """Draw a crop for an image of this size; no pixels are needed."""
        log_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(_CROP_TRIES):
            area = width * height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(*log_ratio))
            crop_width = round(math.sqrt(area * ratio))
            crop_height = round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = rng.randint(0, height - crop_height)
                left = rng.randint(0, width - crop_width)
                return CropBox(left, top, left + crop_width, top + crop_height)
        return self._central_crop(width, height)

    def choose_crop(self, width: int, height: int, rng: random.Random) -> tuple[CropBox, int]:
        """The crop that is cut out of an image of this size.

        Returns:
            A crop as `sample_crop` draws it, with its edges on multiples of a number, and this number: how many times
            smaller the image may be decoded, 1, 2, 4 or 8.
        """
        box = self.sample_crop(width, height, rng)
        shrink = _shrink(box, (self.size, self.size), self.decode_margin)
        limits = (width, height, width, height)
        box = CropBox(*(_to_multiple(edge, shrink, limit) for edge, limit in zip(box, limits, strict=True)))
        return box, shrink

    def _central_crop(self, width: int, height: int) -> CropBox:
        crop_width, crop_height = width, height
        if width / height < self.ratio[0]:
            crop_height = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            crop_width = round(height * self.ratio[1])
        crop_width, crop_height = max(crop_width, 1), max(crop_height, 1)
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        return CropBox(left, top, left + crop_width, top + crop_height)

    def __call__(self, image: Image.Image | EncodedImage, rng: random.Random) -> torch.Tensor:
        """Cut, resize and perhaps mirror an image.

        Args:
            image: A PIL image of mode RGB, or one still encoded; any size.
            rng: All random numbers come from here, the flip's always after the crop's.

        Returns:
            `(3, S, S)` uint8.

        Raises:
            ImageError: an encoded image can't be decoded.
        """
        box, shrink = self.choose_crop(*image.size, rng)
        flip = rng.random() < self.horizontal_flip
        pixels = _resize(_part(image, box, shrink), (self.size, self.size))
        return pixels.flip(-1) if flip else pixels

    def __repr__(self) -> str:
        margin = "" if self.decode_margin == 1 else f", decode_margin={self.decode_margin}"
        return (
            f"{type(self).__name__}(size={self.size}, scale={self.scale}, ratio={self.ratio}, "
            f"horizontal_flip={self.horizontal_flip}{margin})"
        )


class EvalTransform:
    """Resize the short side, then crop the centre.

    The long side becomes `int(resize * long / short)`; the crop starts at `(side - size) // 2`. Both are what the
    image processor does that is saved beside a retriever, so scores of a run are those of what it ships. (torchvision
    starts some crops one pixel later.)

    Args:
        resize: Short side after resizing, >= `size`.
        size: Side S of the result.
        exact: Whether pixels must equal those of the image processor bit for bit. Otherwise the resizing is torch's,
            and large JPEG files are decoded at a smaller size: two thirds of the time for small photos, less than
            half for large ones.

    Raises:
        ValueError: an argument is out of range.
    """

    reads_encoded = True
    _DECODE_MARGIN = 1.75

    def __init__(self, resize: int = 256, size: int = 224, exact: bool = True):
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        if resize < size:
            raise ValueError(f"resize must be >= size {size}, got {resize}")
        self.resize = resize
        self.size = size
        self.exact = exact

    def __call__(self, image: Image.Image | EncodedImage, rng: random.Random | None = None) -> torch.Tensor:
        """Resize and crop an image.

        Args:
            image: A PIL image of mode RGB, or one still encoded; any size.
            rng: Not used; there so that both transforms are called alike.

        Returns:
            `(3, S, S)` uint8.

        Raises:
            ImageError: an encoded image can't be decoded.
        """
        width, height = image.size
        if self.exact or is_elongated(width, height, self.resize, self.size):
            image = image.load() if isinstance(image, EncodedImage) else image
            _require_rgb(image)  # resizing other modes would give something else
            return image_to_tensor(central_crop(image, self.resize, self.size))
        resized, crop = _central_box(width, height, self.resize, self.size)
        whole = CropBox(0, 0, width, height)
        pixels = _resize(_part(image, whole, _shrink(whole, resized, self._DECODE_MARGIN)), resized)
        return pixels[:, crop.top : crop.bottom, crop.left : crop.right].contiguous()

    def __repr__(self) -> str:
        exact = "" if self.exact else ", exact=False"
        return f"{type(self).__name__}(resize={self.resize}, size={self.size}{exact})"


def _central_box(width: int, height: int, resize: int, size: int) -> tuple[tuple[int, int], CropBox]:
    """Width and height of an image whose short side is made `resize`, and the central square in it."""
    short, long = sorted((width, height))
    long = int(resize * long / short)
    resized = (resize, long) if width <= height else (long, resize)
    left, top = (resized[0] - size) // 2, (resized[1] - size) // 2
    return resized, CropBox(left, top, left + size, top + size)


def is_elongated(width: int, height: int, resize: int, size: int) -> bool:
    """Whether an image, resized as a whole, would be many times its central crop: a line of pixels, say."""
    (wide, high), _ = _central_box(width, height, resize, size)
    return wide * high > _WHOLE_UP_TO * size**2


def central_crop(
    image: Image.Image, resize: int, size: int, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """Resize the short side, then crop the centre, as `EvalTransform` does.

    Of an elongated image only what the crop needs is resized, so that memory doesn't depend on its proportions; PIL
    takes places of such a crop in single precision, which changes some of the values by 1. Others are resized as a
    whole.

    Args:
        image: Mode RGB.
        resize: Short side after resizing, >= `size`.
        size: Side of the result.
        resample: How to resize.

    Returns:
        Mode RGB, `size` pixels wide and high.
    """
    resized, crop = _central_box(*image.size, resize, size)
    if not is_elongated(*image.size, resize, size):
        return (image.resize(resized, resample) if resized != image.size else image).crop(crop)
    scale = (image.width / resized[0], image.height / resized[1])
    box = [edge * scale[i % 2] for i, edge in enumerate(crop)]
    margins = [math.ceil(_SUPPORT * max(step, 1)) + 1 for step in scale]
    left, top = (max(math.floor(box[i]) - margins[i], 0) for i in (0, 1))
    right, bottom = (min(math.ceil(box[i + 2]) + margins[i], image.size[i]) for i in (0, 1))
    near = image.crop((left, top, right, bottom))  # so that places are small numbers
    return near.resize((size, size), resample, (box[0] - left, box[1] - top, box[2] - left, box[3] - top))


def _shrink(box: CropBox, size: tuple[int, int], margin: float) -> int:
    """How many times smaller (8, 4, 2 or 1) a part may be decoded that is to become an image of this size."""
    room = min((box.right - box.left) / size[0], (box.bottom - box.top) / size[1]) / margin
    return next((shrink for shrink in (8, 4, 2) if room >= shrink), 1)


def _to_multiple(edge: int, step: int, limit: int) -> int:
    return min((edge + step // 2) // step * step, limit // step * step)


def _part(image: Image.Image | EncodedImage, box: CropBox, shrink: int) -> DecodedPart:
    return DecodedPart(image, box) if isinstance(image, Image.Image) else image.decode_part(box, shrink)


def _resize(part: DecodedPart, size: tuple[int, int]) -> torch.Tensor:
    """Cut the part out, resize it to this width and height (once upright), turn it: `(3, H, W)` uint8."""
    left, top, right, bottom = part.box
    # A copy: the pixels belong to PIL, and torch wants those of a crop side by side.
    crop = torch.from_numpy(_pixels(part.image)[top:bottom, left:right].copy())
    stored_size = size if part.turn.swap else size[::-1]  # height, width
    pixels = torch.nn.functional.interpolate(
        crop.permute(2, 0, 1)[None], stored_size, mode="bilinear", antialias=True, align_corners=False
    )[0, :3]
    mirrored = [dim for dim, mirror in ((-1, part.turn.mirror_x), (-2, part.turn.mirror_y)) if mirror]
    if mirrored:
        pixels = pixels.flip(mirrored)
    return pixels.transpose(-1, -2).contiguous() if part.turn.swap else pixels


def _pixels(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB image, `(H, W, 3 or 4)` uint8, read-only; if it can be had, a view of PIL's memory.

    PIL keeps four bytes per pixel and lends them out in the Arrow format. torch resizes that as fast as three bytes.
    """
    _require_rgb(image)
    try:
        values = pa.array(image).flatten()
    except (AttributeError, TypeError, ValueError, NotImplementedError, pa.ArrowInvalid):
        return np.asarray(image)  # Pillow before 11.2, or an image in several blocks of memory (over 4 megapixels)
    return np.asarray(values).reshape(image.height, image.width, 4)
