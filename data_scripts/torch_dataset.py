"""A table of images and labels as a torch data set, and how its examples make a batch."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .errors import DataError
from .images import open_image
from .sampler import SampleKey


if TYPE_CHECKING:
    import datasets
    from PIL import Image


__all__ = ["ImageDataset", "collate_images"]


class ImageDataset(Dataset):
    """Decoded and transformed images of one split.

    `dataset[row]` is for evaluation: the transform gets no random numbers. `dataset[SampleKey]` is for training: it
    gets a generator seeded with the key's `augmentation_seed`, so what comes out depends on the key alone.

    Args:
        hf_dataset: Map-style data set of `datasets`. Its images are read here, whether or not it would decode them.
        transform: Called as `transform(image, rng)` with an RGB image; gives `(3, S, S)` uint8.
        image_column: Column of images.
        label_column: Column of labels, integers.

    Raises:
        DataError: a column is missing, or its type is not image (or label not integer); the message names both.
    """

    def __init__(
        self,
        hf_dataset: "datasets.Dataset",
        transform: Callable[["Image.Image", random.Random | None], torch.Tensor],
        image_column: str = "image",
        label_column: str = "label",
    ):
        import datasets

        features = hf_dataset.features
        for column in (image_column, label_column):
            if column not in features:
                raise DataError(f"there is no column {column!r}; the columns are {', '.join(features)}")
        if not isinstance(features[image_column], datasets.Image):
            raise DataError(f"column {image_column!r} must hold images (datasets.Image), got {features[image_column]}")
        label_feature = features[label_column]
        self._class_names = None
        if isinstance(label_feature, datasets.ClassLabel):
            self._class_names = list(label_feature.names)
        elif not (isinstance(label_feature, datasets.Value) and "int" in label_feature.dtype):
            raise DataError(f"column {label_column!r} must hold integers or ClassLabel, got {label_feature}")
        columns = [image_column, label_column]
        hf_dataset = hf_dataset.with_format(None).select_columns(columns)
        if features[image_column].decode:
            hf_dataset = hf_dataset.cast_column(image_column, datasets.Image(decode=False))
        self.hf_dataset = hf_dataset
        self.transform = transform
        self.image_column = image_column
        self.label_column = label_column
        table = hf_dataset.with_format("arrow", columns=[label_column])[:]
        self.labels: np.ndarray = table.column(label_column).to_numpy().astype(np.int64)
        """`(n,)` int64; reading it decodes no image."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """C: of the `ClassLabel`, or the highest label + 1."""
        if self._class_names is not None:
            return len(self._class_names)
        return int(self.labels.max()) + 1 if len(self.labels) else 0

    @property
    def class_names(self) -> list[str]:
        """C names, position = label; the numbers themselves where the labels have no names."""
        return self._class_names if self._class_names is not None else [str(i) for i in range(self.num_classes)]

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        """One example.

        Args:
            key: Row, or a `SampleKey` of the batch sampler.

        Returns:
            `pixel_values` `(3, S, S)` uint8, `labels` int.

        Raises:
            ImageError: the image can't be read; the message names the file.
        """
        if isinstance(key, SampleKey):
            index, rng = key.index, random.Random(key.augmentation_seed)
        else:
            index, rng = int(key), None
        image = self.open_image(index)
        return {"pixel_values": self.transform(image, rng), "labels": int(self.labels[index])}

    def open_image(self, index: int) -> "Image.Image":
        """The whole image of a row, RGB and upright, not transformed (for pictures and inspection).

        Raises:
            ImageError: it can't be read; the message names the file.
        """
        stored = self.hf_dataset[int(index)][self.image_column]
        if stored is None:
            raise DataError(f"row {index} has no image in column {self.image_column!r}")
        if stored["bytes"] is not None:
            name = stored["path"] or f"row {index}"
            return open_image(stored["bytes"], name=name)
        return open_image(stored["path"])


def collate_images(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Put examples into a batch.

    Args:
        examples: B results of `ImageDataset`.

    Returns:
        `pixel_values` `(B, 3, S, S)` uint8 and `labels` `(B,)` int64.

    Raises:
        ValueError: there are none.
    """
    if not examples:
        raise ValueError("expected at least one example, got none")
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples], dtype=torch.int64),
    }
