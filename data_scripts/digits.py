"""The 1,797 handwritten digits that scikit-learn ships (8x8, 17 grey levels): a data set that needs no download.

Source: UCI "Optical Recognition of Handwritten Digits", test part (Alpaydin and Kaynak, 1998).
"""

import hashlib
import io
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from .builder import ClassSplitConfig, ImageDatasetBuilder
from .data_errors import DataError
from .dataset_options import DigitsOptions
from .image_files import ImageFile
from .listing import SplitListing, make_listing


__all__ = ["Digits", "DigitsConfig"]


@dataclass
class DigitsConfig(DigitsOptions, ClassSplitConfig):
    """What `Digits` is configured by."""


class Digits(ImageDatasetBuilder):
    """Handwritten digits as RGB PNGs, classes "0" to "9", split as `class_split.split_classes` says.

    The rows hold the PNG bytes; the path (`0/0012.png`: class, and row in scikit-learn's table) is only a name.

    Raises:
        DataError: `data_dir` is given, `digit_size` is below 8, or the class options are wrong.
    """

    BUILDER_CONFIG_CLASS = DigitsConfig
    DESCRIPTION = "The 1,797 handwritten digits of scikit-learn, enlarged."

    @classmethod
    def _list(cls, config: DigitsConfig) -> SplitListing:
        if config.data_dir is not None:
            raise DataError(f"digits come with scikit-learn and have no data_dir, got {config.data_dir!r}")
        if config.digit_size < 8:
            raise DataError(f"digit_size must be >= 8, got {config.digit_size}")
        scans, labels = _load_scans()
        classes: dict[str, list[ImageFile]] = {str(digit): [] for digit in range(10)}
        for row, label in enumerate(labels):
            classes[str(label)].append(ImageFile(f"{row:04d}.png", 64, 0))
        splits, class_names = config.split_files(classes)
        options = {
            "dataset": "digits",
            "version": str(cls.VERSION),
            "digit_size": config.digit_size,
            "scans": hashlib.sha256(scans.tobytes()).hexdigest(),
            "train_classes": class_names["train"],
            "test_classes": class_names["test"],
        }
        return make_listing({name: ("digits", part) for name, part in splits.items()}, class_names, options)

    def _read_bytes(self, file: str) -> bytes:
        scans, _ = _load_scans()
        scan = scans[int(file.rpartition("/")[2].removesuffix(".png"))]
        image = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8)).convert("RGB")
        size = self.config.digit_size
        if size != 8:
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        image.save(stream, format="PNG")
        return stream.getvalue()


@cache
def _load_scans() -> tuple[np.ndarray, np.ndarray]:
    """`(1797, 8, 8)` float64 in 0..16 and `(1797,)` int64."""
    digits = load_digits()
    return digits.images, digits.target
