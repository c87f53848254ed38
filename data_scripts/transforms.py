"""From a PIL image to a uint8 tensor of the model's size. Normalisation comes later, on the device.

Geometry as torchvision documents it for `RandomResizedCrop`, `Resize` and `CenterCrop`; PIL, numpy and torch do the
work. Randomness comes from the generator that is handed in, never from global state.
"""

import math
import random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image


if TYPE_CHECKING:
    from .arguments import DataArguments


__all__ = ["CropBox", "EvalTransform", "TrainTransform", "image_to_tensor", "make_transforms"]

_CROP_TRIES = 10


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
    if image.mode != "RGB":
        raise ValueError(f"expected an image of mode RGB (see open_image), got {image.mode}")
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


class TrainTransform:
    """Random resized crop and horizontal flip.

    Up to ten times a crop is drawn: its share of the image's area uniform in `scale`, its width / height log-uniform
    in `ratio`, its place uniform. The first that fits is taken; if none does, the largest central crop whose ratio is
    in range. It is resized to a square, bilinear with antialiasing. (The filter sees the real pixels around the crop,
    which cropping first would hide from it: the outermost pixels differ slightly.)

    Args:
        size: Side S of the result.
        scale: Smallest and largest share of the area, 0 < min <= max <= 1.
        ratio: Smallest and largest width / height, 0 < min <= max.
        horizontal_flip: Probability of mirroring, 0..1.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: float = 0.5,
    ):
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be 0 < min <= max <= 1, got {tuple(scale)}")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be 0 < min <= max, got {tuple(ratio)}")
        if not 0 <= horizontal_flip <= 1:
            raise ValueError(f"horizontal_flip must be a probability in [0, 1], got {horizontal_flip}")
        self.size = size
        self.scale = tuple(scale)
        self.ratio = tuple(ratio)
        self.horizontal_flip = horizontal_flip

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

    def _central_crop(self, width: int, height: int) -> CropBox:
        crop_width, crop_height = width, height
        if width / height < self.ratio[0]:
            crop_height = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            crop_width = round(height * self.ratio[1])
        crop_width, crop_height = max(crop_width, 1), max(crop_height, 1)
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        return CropBox(left, top, left + crop_width, top + crop_height)

    def __call__(self, image: Image.Image, rng: random.Random) -> torch.Tensor:
        """Cut, resize and perhaps mirror an image.

        Args:
            image: Mode RGB, any size.
            rng: All random numbers come from here, the flip's always after the crop's.

        Returns:
            `(3, S, S)` uint8.
        """
        box = self.sample_crop(*image.size, rng)
        flip = rng.random() < self.horizontal_flip
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image_to_tensor(image)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(size={self.size}, scale={self.scale}, ratio={self.ratio}, "
            f"horizontal_flip={self.horizontal_flip})"
        )


class EvalTransform:
    """Resize the short side, then crop the centre.

    The long side becomes `int(resize * long / short)`; the crop starts at `(side - size) // 2`. Both are what the image
    processor does that is saved beside a retriever, so scores of a run are those of what it ships. (torchvision starts
    some crops one pixel later.)

    Args:
        resize: Short side after resizing, >= `size`.
        size: Side S of the result.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, resize: int = 256, size: int = 224):
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        if resize < size:
            raise ValueError(f"resize must be >= size {size}, got {resize}")
        self.resize = resize
        self.size = size

    def __call__(self, image: Image.Image, rng: random.Random | None = None) -> torch.Tensor:
        """Resize and crop an image.

        Args:
            image: Mode RGB, any size.
            rng: Not used; there so that both transforms are called alike.

        Returns:
            `(3, S, S)` uint8.
        """
        width, height = image.size
        short, long = sorted((width, height))
        long = int(self.resize * long / short)
        resized = (self.resize, long) if width <= height else (long, self.resize)
        if resized != image.size:
            image = image.resize(resized, Image.Resampling.BILINEAR)
        left, top = (resized[0] - self.size) // 2, (resized[1] - self.size) // 2
        return image_to_tensor(image.crop((left, top, left + self.size, top + self.size)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(resize={self.resize}, size={self.size})"


def make_transforms(args: "DataArguments") -> tuple[TrainTransform, EvalTransform]:
    """The training and the evaluation transform that the arguments ask for."""
    train = TrainTransform(
        args.image_size, scale=(args.crop_scale_min, 1.0), horizontal_flip=0.5 if args.horizontal_flip else 0.0
    )
    return train, EvalTransform(args.resize_size, args.image_size)
