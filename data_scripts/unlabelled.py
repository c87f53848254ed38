"""Photos without labels as a data set whose classes are clusters, found while it trains."""

import copy
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np

from .data_errors import DataError
from .data_fingerprint import digest
from .labels import UNLABELLED
from .sampler import ClassBalancedBatchSampler, SampleKey
from .torch_dataset import ImageDataset, ImageTransform


__all__ = ["ClusterBatchSampler", "ClusteredImages", "group_numbers"]


def group_numbers(rows: datasets.Dataset, column: str | None, where: str) -> np.ndarray | None:
    """What a column says of which rows belong together.

    Args:
        rows: The rows.
        column: Its name; None: nothing is known.
        where: What the rows are, for errors.

    Returns:
        `(n,)` int64: rows of the same value have the same number; -1 where the cell is empty.

    Raises:
        DataError: there is no such column.
    """
    if column is None:
        return None
    others = [name for name in rows.column_names if name not in ("image", "label")]
    if column not in others:
        known = f"its further columns are {', '.join(others)}" if others else "it has no further columns"
        raise DataError(f"group_column: {where} has no column {column!r}; {known}")
    numbers: dict[Any, int] = {}
    values = rows.with_format("arrow", columns=[column])[:].column(column).to_pylist()
    empty = [value is None or (isinstance(value, str) and not value.strip()) for value in values]
    return np.array(
        [-1 if lacks else numbers.setdefault(value, len(numbers)) for lacks, value in zip(empty, values, strict=True)],
        dtype=np.int64,
    )


class ClusteredImages(ImageDataset):
    """Photos whose classes are clusters, found while training goes on; some may have a class that is given.

    `labels` are those of the present round: classes that are given, then the clusters, and -1 for photos that are left
    out of it. Before `assign` was called, they are -1 wherever no class is given.

    Args:
        hf_dataset: As for `ImageDataset`, with a column `label` (`ClassLabel`) whose class `UNLABELLED` is none.
        transform: Of training.
        eval_transform: By which photos are embedded to be clustered.
        groups: `(n,)` int64, photos of a number share a cluster, -1 with none; None: nothing is known.
        options: As for `ImageDataset`.

    Attributes:
        given: `(n,)` int64, the class that is given, -1 for none.
        given_names: Their names, position = class.
        linked: As `groups`, with whatever else was found to belong together.

    Raises:
        DataError: as `ImageDataset`.
    """

    def __init__(
        self,
        hf_dataset: datasets.Dataset,
        transform: ImageTransform,
        eval_transform: ImageTransform,
        groups: np.ndarray | None = None,
        **options: Any,
    ):
        super().__init__(hf_dataset, transform, **options)
        names = super().class_names
        self.given_names = [name for name in names if name != UNLABELLED]
        number = np.array([self.given_names.index(name) if name != UNLABELLED else -1 for name in names])
        self.given = number[self.labels]
        self.groups = self.linked = groups
        self.labels = self.given
        self._eval_transform = eval_transform
        self._capacity = len(self.given_names)

    def assign(self, labels: np.ndarray, capacity: int | None = None) -> None:
        """Set the labels of a round.

        Args:
            labels: `(n,)` int64: classes that are given stay, clusters come after them, without a gap; -1: left out.
            capacity: Classes and clusters of any round, at most; None leaves it as it is.

        Raises:
            ValueError: labels are of another number, beyond the capacity, or change a class that is given.
        """
        labels = np.asarray(labels, dtype=np.int64)
        capacity = self._capacity if capacity is None else capacity
        known = self.given >= 0
        if labels.shape != self.given.shape:
            raise ValueError(f"labels must be {len(self)}, one for each photo, got {labels.shape}")
        if (changed := np.flatnonzero(known & (labels != self.given))).size:
            row = int(changed[0])
            raise ValueError(
                f"labels that are given must stay, but {self.name_of(row)} (class "
                f"{self.given_names[self.given[row]]!r}) gets the label {labels[row]}"
            )
        if labels.max(initial=-1) >= capacity:
            raise ValueError(f"labels must be below {capacity}, got {labels.max()}")
        self.labels, self._capacity = labels, capacity

    @property
    def num_classes(self) -> int:
        """Classes that are given and clusters, as many as a round can have."""
        return self._capacity

    @property
    def num_active(self) -> int:
        """Classes that are given and clusters of this round."""
        return int(self.labels.max(initial=-1)) + 1

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that are given, and `cluster N`."""
        clusters = range(self._capacity - len(self.given_names))
        return [*self.given_names, *(f"cluster {number}" for number in clusters)]

    @property
    def as_given(self) -> ImageDataset:
        """The same rows with the labels of their table, where `UNLABELLED` is a class as any other."""
        return ImageDataset(self.hf_dataset, self.transform, self.image_column, self.label_column)

    @property
    def eval_view(self) -> ImageDataset:
        """The same photos as they are embedded for evaluation, all of label 0."""
        view = copy.copy(self)
        view.transform = self._eval_transform
        view.labels = np.zeros(len(self), dtype=np.int64)
        return view

    @property
    def skip_corrupt(self) -> bool:
        """Whether photos that can't be read are skipped."""
        return self._skipped is not None

    def augmented_view(self, rows: np.ndarray, seed: int) -> "AugmentedView":
        """Some rows as training sees them, cropped and flipped by a seed."""
        return AugmentedView(self, rows, seed)

    def fingerprint(self) -> dict[str, int | str]:
        """As of `ImageDataset`, with the classes and groups that are given instead of labels, which change."""
        groups = b"" if self.groups is None else self.groups.tobytes()
        return super().fingerprint() | {"labels": digest([self.given.tobytes(), groups])}

    def batch_sampler(self, **options: Any) -> "ClusterBatchSampler":
        """The batch sampler that draws from the clusters of the present round."""
        return ClusterBatchSampler(self, **options)


class AugmentedView:
    """Rows of a data set with one random crop and flip each, decided by a seed: `view[i]` is an example."""

    def __init__(self, images: ImageDataset, rows: np.ndarray, seed: int):
        self._images = images
        self._keys = [SampleKey(int(row), seed * 1_000_003 + int(row)) for row in rows]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, place: int) -> Mapping[str, Any]:
        return {**self._images[self._keys[int(place)]], "labels": 0}


class ClusterBatchSampler:
    """[`ClassBalancedBatchSampler`] of the labels that a `ClusteredImages` has when an epoch begins.

    An epoch has `max(n // B, 1)` batches, with n all photos, so that its length is that of any round.

    Args:
        images: The photos.
        options: Of `ClassBalancedBatchSampler`, but for labels and number of batches.

    Raises:
        ValueError: as `ClassBalancedBatchSampler`.
    """

    drop_last = True  # torch-style attribute: no batch is ever short

    def __init__(self, images: ClusteredImages, **options: Any):
        self.images = images
        self.epoch = 0
        self._options = options | {"num_batches": max(len(images) // options["batch_size"], 1)}
        self.batch_size = self._of_now()[1].batch_size

    def _of_now(self) -> tuple[np.ndarray, ClassBalancedBatchSampler]:
        rows = np.flatnonzero(self.images.labels >= 0)
        return rows, ClassBalancedBatchSampler(self.images.labels[rows], **self._options)

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self._options["num_batches"]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next `iter` gives."""
        self.epoch = int(epoch)

    def __iter__(self):
        """This rank's batches of the current epoch."""
        rows, sampler = self._of_now()
        sampler.set_epoch(self.epoch)
        for batch in sampler:
            yield [SampleKey(int(rows[key]), key.augmentation_seed) for key in batch]
