"""A table of images and labels as a torch data set, and how its examples make a batch."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset

from .data_errors import DataError, ImageError, some
from .data_fingerprint import digest, evenly_spaced, image_contents, relative_names
from .decoding import EncodedImage
from .image_formats import MAX_IMAGE_PIXELS, check_pixel_limit
from .images import image_errors, open_header, open_image
from .labels import check_label, check_labels
from .sampler import SampleKey
from .skipped import SkippedImages


if TYPE_CHECKING:
    import datasets
    from PIL import Image


__all__ = [
    "ImageColumns",
    "ImageDataset",
    "ImageTransform",
    "apply_transform",
    "black_image",
    "collate_images",
    "stored_image",
]

_HEADER_THREADS, _HEADER_BATCH = 8, 1000
ImageTransform = Callable[["Image.Image | EncodedImage", random.Random | None], torch.Tensor]


class ImageColumns(NamedTuple):
    """Where a table of `datasets` has its images and labels, and what the labels are called.

    Attributes:
        image: Column of images.
        label: Column of labels.
        class_names: Of the `ClassLabel`; None where labels are plain integers.
    """

    image: str
    label: str
    class_names: list[str] | None

    @classmethod
    def find(cls, features: "datasets.Features", image_column: str, label_column: str) -> "ImageColumns":
        """Check that the columns are there and of the right kind.

        Raises:
            DataError: a column is missing, or its type is not image (or label not integer); the message names both.
        """
        import datasets

        for column in (image_column, label_column):
            if column not in features:
                raise DataError(f"there is no column {column!r}; the columns are {', '.join(features)}")
        if not isinstance(features[image_column], datasets.Image):
            raise DataError(f"column {image_column!r} must hold images (datasets.Image), got {features[image_column]}")
        label_feature = features[label_column]
        if isinstance(label_feature, datasets.ClassLabel):
            return cls(image_column, label_column, list(label_feature.names))
        if not (isinstance(label_feature, datasets.Value) and "int" in label_feature.dtype):
            raise DataError(f"column {label_column!r} must hold integers or ClassLabel, got {label_feature}")
        return cls(image_column, label_column, None)


class ImageDataset(Dataset):
    """Decoded and transformed images of one split.

    `dataset[row]` is for evaluation: the transform gets no random numbers. `dataset[SampleKey]` is for training: it
    gets a generator seeded with the key's `augmentation_seed`, so what comes out depends on the key alone.

    With `skip_corrupt`, images that can't be read end nothing. In training another image of the same class takes the
    place, chosen by the key alone, so batches keep their size and classes. In evaluation nothing can take the place:
    the row comes out black, so that rows and batches keep their positions, and must be left out before scores are
    computed: examples then have an entry `readable` that says which. `skipped` lists them, worker processes included.

    Args:
        hf_dataset: Map-style data set of `datasets`. Its images are read here, whether or not it would decode them.
        transform: Called as `transform(image, rng)`; gives `(3, S, S)` uint8. If it has a true attribute
            `reads_encoded`, it gets an `EncodedImage` and decodes what it needs, otherwise an RGB image of PIL.
        image_column: Column of images.
        label_column: Column of labels, integers 0..C-1.
        skip_corrupt: Skip images that can't be read, and list them.
        max_image_pixels: An image of more can't be read.

    Raises:
        DataError: a column is missing, or its type is not image (or label not integer); the message names both. A row
            has no label, or one that is none of 0..C-1.
        ValueError: max_image_pixels is out of range.
    """

    def __init__(
        self,
        hf_dataset: "datasets.Dataset",
        transform: ImageTransform,
        image_column: str = "image",
        label_column: str = "label",
        skip_corrupt: bool = False,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ):
        import datasets

        self._columns = ImageColumns.find(hf_dataset.features, image_column, label_column)
        hf_dataset = hf_dataset.with_format(None).select_columns([image_column, label_column])
        if hf_dataset.features[image_column].decode:
            hf_dataset = hf_dataset.cast_column(image_column, datasets.Image(decode=False))
        self.hf_dataset = hf_dataset
        self.transform = transform
        self.image_column = image_column
        self.label_column = label_column
        self.max_image_pixels = check_pixel_limit(max_image_pixels)
        table = hf_dataset.with_format("arrow", columns=[label_column])[:]
        names = self._columns.class_names
        self.labels: np.ndarray = check_labels(
            table.column(label_column), None if names is None else len(names), f"column {label_column!r}"
        )
        """`(n,)` int64; reading it decodes no image."""
        self._paths = _paths_only(hf_dataset, image_column)
        self._skipped = SkippedImages() if skip_corrupt else None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """C: of the `ClassLabel`, or the highest label + 1."""
        if self._columns.class_names is not None:
            return len(self._columns.class_names)
        return int(self.labels.max()) + 1 if len(self.labels) else 0

    @property
    def class_names(self) -> list[str]:
        """C names, position = label; the numbers themselves where the labels have no names."""
        names = self._columns.class_names
        return names if names is not None else [str(i) for i in range(self.num_classes)]

    @property
    def skips_corrupt(self) -> bool:
        """Whether images that can't be read are skipped."""
        return self._skipped is not None

    @property
    def skipped(self) -> list[str]:
        """Names of the images skipped so far by this process and its workers, sorted; always empty without
        `skip_corrupt`."""
        return [] if self._skipped is None else self._skipped.names()

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        """One example.

        Args:
            key: Row, or a `SampleKey` of the batch sampler.

        Returns:
            `pixel_values` `(3, S, S)` uint8, `labels` int; with `skip_corrupt`, in evaluation, also `readable` bool.

        Raises:
            ImageError: the image can't be read; the message names the file. With `skip_corrupt`, only in training and
                if the class has no image that can be read.
        """
        training = isinstance(key, SampleKey)
        row, seed = int(key), key.augmentation_seed if training else None
        readable = True
        try:
            pixels = self._read(row, seed)
        except ImageError:
            if self._skipped is None:
                raise
            self._skipped.add(self._stored(row)[1])
            readable = training
            pixels = self._replacement(row, seed) if training else black_image(self.transform)
        example = {"pixel_values": pixels, "labels": int(self.labels[row])}
        return example if training or self._skipped is None else example | {"readable": readable}

    def open_image(self, index: int) -> "Image.Image":
        """The whole image of a row, RGB and upright, not transformed (for pictures and inspection).

        Raises:
            ImageError: it can't be read; the message names the file.
        """
        return open_image(*self._stored(int(index)), self.max_image_pixels)

    def open_images(self, indices: Iterable[int]) -> "dict[int, Image.Image]":
        """`open_image` of several rows, by row."""
        return {int(index): self.open_image(index) for index in indices}

    def check_headers(self) -> None:
        """Open every image, of which only the header is read: what is no image, too large or not there is found
        before anything long begins. Damage further in shows when the image is decoded. Nothing with `skip_corrupt`.

        Raises:
            ImageError: images can't be opened; the message names the first of them, and how many there are.
        """
        if self._skipped is not None:
            return
        found = []
        with ThreadPoolExecutor(_HEADER_THREADS) as threads:
            rows = self.hf_dataset.select_columns([self.image_column]).with_format("arrow")
            batches = rows.iter(_HEADER_BATCH) if len(self) else ()
            for start, batch in zip(range(0, len(self), _HEADER_BATCH), batches, strict=True):
                stored = [image for chunk in batch.column(0).chunks for image in chunk]
                found += filter(None, threads.map(self._header_error, stored, range(start, start + len(stored))))
        if found:
            others = f"; so can't {len(found) - 1} others" if len(found) > 1 else ""
            raise ImageError(f"{found[0]}{others} (skip_corrupt leaves out what can't be read)")

    def _header_error(self, stored: pa.StructScalar, row: int) -> ImageError | None:
        """What is wrong with the header of what a row holds, which is not copied."""
        content, path = stored["bytes"], stored["path"].as_py()
        name = path or f"row {row}"
        try:
            with image_errors(name):
                stream = pa.BufferReader(content.as_buffer()) if content.is_valid else path
                if stream is None:
                    raise ValueError("there is neither a path nor contents")
                open_header(stream, self.max_image_pixels).close()
        except ImageError as error:
            return error
        return None

    def stored_images(self) -> Iterator[str | bytes]:
        """What holds each row's image, path or contents, in order; nothing is decoded."""
        return (self._stored(row)[0] for row in range(len(self)))

    def fingerprint(self) -> dict[str, int | str]:
        """What tells this data set from another, wherever it lies: the number of images, and digests of their labels,
        of their names, and of the contents of some of them."""
        paths = self.hf_dataset.flatten().select_columns([f"{self.image_column}.path"]).with_format("arrow")[:]
        names = relative_names(paths.column(0).to_pylist())
        rows = evenly_spaced(len(self))
        return {
            "images": len(self),
            "labels": digest([self.labels.tobytes()]),
            "names": digest(str(name).encode() for name in names),
            "contents": digest(image_contents(self._stored(row)[0]) for row in rows),
        }

    def evaluation_batches(self, batch_size: int) -> Iterator[list[int]]:
        """Batches of all rows in order, for a `DataLoader`'s `batch_sampler`; the last may be short."""
        for start in range(0, len(self), batch_size):
            yield list(range(start, min(start + batch_size, len(self))))

    def _read(self, row: int, seed: int | None) -> torch.Tensor:
        return apply_transform(self.transform, *self._stored(row), seed, self.max_image_pixels)

    def _replacement(self, row: int, seed: int) -> torch.Tensor:
        """Pixels of another image of the row's class: the first that can be read in an order that the key decides."""
        others = np.flatnonzero(self.labels == self.labels[row])
        others = others[others != row]
        np.random.default_rng([row, seed]).shuffle(others)
        for other in others.tolist():
            try:
                return self._read(other, seed)
            except ImageError:
                self._skipped.add(self._stored(other)[1])
        names = [self._stored(index)[1] for index in (row, *others.tolist())]
        raise ImageError(
            f"class {self.class_names[self.labels[row]]!r} has no image that can be read: {some(names)}; "
            "repair the files, or leave the class out"
        )

    def name_of(self, row: int) -> str:
        """A row's file, or what its table calls the image, or `row 0`, `row 1`, ..."""
        return self._stored(row)[1]

    def _stored(self, row: int) -> tuple[str | bytes, str]:
        """What holds a row's image (path or contents), and its name."""
        if self._paths is not None:
            path = self._paths[row].as_py()
            return path, path
        return stored_image(self.hf_dataset[row][self.image_column], f"row {row}", self.image_column)


def stored_image(stored: Mapping[str, Any] | None, place: str, column: str) -> tuple[str | bytes, str]:
    """What a row of `datasets.Image(decode=False)` holds: the path or the contents, and a name for it.

    Raises:
        DataError: neither; the message has `place` and `column`.
    """
    if stored is None or (stored["bytes"] is None and stored["path"] is None):
        raise DataError(f"{place} has no image in column {column!r}")
    if stored["bytes"] is not None:
        return stored["bytes"], stored["path"] or place
    return stored["path"], stored["path"]


def apply_transform(
    transform: ImageTransform,
    source: str | bytes,
    name: str,
    seed: int | None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> torch.Tensor:
    """Read an image and transform it.

    Args:
        transform: See `ImageDataset`.
        source: Path or contents.
        name: For errors.
        seed: Of the random numbers that the transform gets; None for none.
        max_image_pixels: An image of more can't be read.

    Raises:
        ImageError: the image can't be read; the message has the name.
    """
    encoded = EncodedImage(source, name, max_image_pixels)
    image = encoded if getattr(transform, "reads_encoded", False) else encoded.load()
    return transform(image, None if seed is None else random.Random(seed))


def black_image(transform: ImageTransform) -> torch.Tensor:
    """What stands in an evaluation for an image that can't be read, `(3, S, S)` uint8."""
    from PIL import Image

    return transform(Image.new("RGB", (64, 64)), None)


def _paths_only(hf_dataset: "datasets.Dataset", column: str) -> pa.Array | None:
    """All paths, if every row has a path and no row has contents: reading them one by one takes ten times longer."""
    if len(hf_dataset) == 0:
        return None
    stored = hf_dataset.data.column(column)  # before any selection of rows; no contents are read
    if any(chunk.null_count or chunk.field("bytes").null_count < len(chunk) for chunk in stored.chunks):
        return None
    rows = hf_dataset.with_format("arrow", columns=[column])[:].column(column)
    paths = pa.concat_arrays([chunk.field("path") for chunk in rows.chunks])
    return None if paths.null_count else paths


def collate_images(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Put examples into a batch.

    Args:
        examples: B results of `ImageDataset`.

    Returns:
        `pixel_values` `(B, 3, S, S)` uint8, `labels` `(B,)` int64, and `readable` `(B,)` bool if the examples have it.

    Raises:
        ValueError: there are none, or one has a label that is not an integer >= 0.
    """
    if not examples:
        raise ValueError("expected at least one example, got none")
    labels = [check_label(example["labels"], None, f"example {i}") for i, example in enumerate(examples)]
    batch = {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }
    if "readable" in examples[0]:
        batch["readable"] = torch.tensor([example["readable"] for example in examples])
    return batch
