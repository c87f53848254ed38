"""Class-balanced training from a stream: an `IterableDataset` of `datasets`, read once per epoch and never stored.

    images = StreamedImages(stream, TrainTransform(), num_rows=59_551)
    sampler = images.batch_sampler(batch_size=64, images_per_class=2, seed=0)
    loader = DataLoader(images, batch_sampler=sampler, collate_fn=collate_images, num_workers=4)

The sampler runs in the main process. It reads rows without decoding them, collects them by class in a buffer, and
makes batches of B/k classes with k images each. Its keys hold what decoding an image takes, and `StreamedImages`, in
the workers, does nothing else. So the batches can't depend on the number of workers; and since every rank makes the
same global batches and keeps its own part, they don't depend on the number of ranks either.
"""

import random
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import Dataset

from .class_buffer import ClassBuffer, RowGroup, StoredRow, default_buffer_size
from .data_errors import DataError, ImageError, some
from .image_formats import MAX_IMAGE_PIXELS, check_pixel_limit
from .images import open_image
from .labels import check_label
from .sampler import augmentation_seeds, check_batch_sizes
from .skipped import SkippedImages
from .torch_dataset import ImageColumns, ImageTransform, apply_transform, black_image, stored_image


if TYPE_CHECKING:
    import datasets
    from PIL import Image


__all__ = ["StreamBatchSampler", "StreamKey", "StreamedImages"]

OPEN_SHARDS = 16
"""Shards of a stream that are read in turns, so that rows which lie together don't arrive together."""


class StreamKey(NamedTuple):
    """What the sampler asks `StreamedImages` for.

    Attributes:
        row: The image.
        augmentation_seed: Seed of the random crop and flip, as in `SampleKey`; None in evaluation.
        others: Images of the same class, to take its place if it can't be read.
    """

    row: StoredRow
    augmentation_seed: int | None
    others: tuple[StoredRow, ...] = ()


class StreamedImages(Dataset):
    """The images of a stream, for training with `batch_sampler`.

    `images[StreamKey]` gives an example as `ImageDataset` does, from the key alone.

    Args:
        stream: Of `datasets`, with known features. Its images are read here, whether or not it would decode them.
        transform: As for `ImageDataset`.
        num_rows: Rows of the stream; None: as many as the stream says it has, if it says so.
        num_classes: C; only where the labels are integers without names.
        image_column: Column of images.
        label_column: Column of labels, integers 0..C-1.
        skip_corrupt: Let another image of its class take the place of one that can't be read, and list it in
            `skipped`.
        max_image_pixels: An image of more can't be read.

    Raises:
        DataError: a column is missing or of the wrong type, or the features or C are not known.
        ValueError: num_rows is not positive, or max_image_pixels is out of range.
    """

    def __init__(
        self,
        stream: "datasets.IterableDataset",
        transform: ImageTransform,
        num_rows: int | None = None,
        num_classes: int | None = None,
        image_column: str = "image",
        label_column: str = "label",
        skip_corrupt: bool = False,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ):
        import datasets

        if stream.features is None:
            raise DataError("the features of the stream are not known: declare them with stream.cast(features)")
        columns = ImageColumns.find(stream.features, image_column, label_column)
        if columns.class_names is None:
            if num_classes is None:
                raise DataError(f"column {label_column!r} has no class names: num_classes is needed")
            columns = columns._replace(class_names=[str(i) for i in range(num_classes)])
        elif num_classes not in (None, len(columns.class_names)):
            raise DataError(
                f"num_classes is {num_classes}, but column {label_column!r} has {len(columns.class_names)} classes"
            )
        if num_rows is None:
            splits = stream.info.splits or {}
            num_rows = splits[stream.split].num_examples or None if stream.split in splits else None
        if num_rows is not None and num_rows < 1:
            raise ValueError(f"num_rows must be >= 1 or None, got {num_rows}")
        # Without names of classes, which `datasets` would copy again and again for every shard.
        plain = {image_column: datasets.Image(decode=False), label_column: datasets.Value("int64")}
        self.stream = stream.select_columns([image_column, label_column]).cast(datasets.Features(plain))
        self.transform = transform
        self.num_rows = num_rows
        self.max_image_pixels = check_pixel_limit(max_image_pixels)
        self.columns = columns
        self._skipped = SkippedImages() if skip_corrupt else None

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.columns.class_names)

    @property
    def class_names(self) -> list[str]:
        """C names, position = label."""
        return self.columns.class_names

    @property
    def skip_corrupt(self) -> bool:
        """Whether images that can't be read are skipped."""
        return self._skipped is not None

    @property
    def skipped(self) -> list[str]:
        """Names of the images skipped so far, as in `ImageDataset`."""
        return [] if self._skipped is None else self._skipped.names()

    def __len__(self) -> int:
        """Rows of the stream.

        Raises:
            TypeError: their number is not known.
        """
        if self.num_rows is None:
            raise TypeError("the stream has no known length: give num_rows")
        return self.num_rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"stream": None}  # workers decode what keys hold; they don't read the stream

    def __getitem__(self, key: StreamKey) -> dict[str, Any]:
        """One example.

        Returns:
            `pixel_values` `(3, S, S)` uint8, `labels` int; with `skip_corrupt`, in evaluation, also `readable` bool.

        Raises:
            ImageError: the image can't be read; the message names it. With `skip_corrupt`, only in training and if
                none of the images in the key can be.
        """
        rows = [key.row, *key.others] if self._skipped is not None else [key.row]
        marked = self._skipped is not None and key.augmentation_seed is None
        example = {"labels": key.row.label}
        for row in rows:
            try:
                pixels = apply_transform(self.transform, *_source(row), key.augmentation_seed, self.max_image_pixels)
            except ImageError:
                if self._skipped is None:
                    raise
                self._skipped.add(row.name)
            else:
                return {"pixel_values": pixels, **example} | ({"readable": True} if marked else {})
        if marked:  # nothing can take its place in an evaluation
            return {"pixel_values": black_image(self.transform), **example, "readable": False}
        raise ImageError(
            f"class {self.class_names[key.row.label]!r}: of the {len(rows)} images drawn for a batch none can be "
            f"read: {some(row.name for row in rows)}"
        )

    def fingerprint(self) -> dict[str, int | None]:
        """What tells this data set from another, as far as can be said without reading it."""
        return {"images": self.num_rows, "shards": self.stream.num_shards}

    def batch_sampler(self, batch_size: int, images_per_class: int, seed: int, **options: Any) -> "StreamBatchSampler":
        """The batch sampler that reads this stream; see `StreamBatchSampler` for the arguments."""
        return StreamBatchSampler(self, batch_size, images_per_class, seed, **options)

    def evaluation_batches(self, batch_size: int) -> Iterator[list[StreamKey]]:
        """Batches of all rows in the stream's order, for a `DataLoader`'s `batch_sampler`; the last may be short."""
        batch = []
        for place, example in enumerate(self.stream):
            batch.append(StreamKey(self._row(example, place), None))
            if len(batch) == batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def open_images(self, indices: Iterable[int]) -> "dict[int, Image.Image]":
        """Whole images of some rows, RGB and upright, in one pass over the stream.

        Args:
            indices: Places in the order of `evaluation_batches`.

        Raises:
            ImageError: one can't be read; the message names it.
        """
        wanted = {int(index) for index in indices}
        found = {}
        for place, example in enumerate(self.stream):
            if place in wanted:
                found[place] = open_image(*_source(self._row(example, place)), self.max_image_pixels)
                if len(found) == len(wanted):
                    break
        return found

    def stored_images(self) -> Iterator[str | bytes]:
        """What holds each image, path or contents, in the order of `evaluation_batches`: one pass over the stream."""
        return (self._row(example, place).source for place, example in enumerate(self.stream))

    def answered_classes(self, needed: int, gallery: "StreamedImages | None" = None) -> set[int]:
        """Classes whose images find another one: as many as are needed, if there are.

        The first image is decoded. Rows are read until enough is known, nothing of them decoded: a few where there is
        no lack of such classes, all of them else.

        Args:
            needed: Number of classes.
            gallery: What these images are searched in; None for the other images here.

        Raises:
            DataError: a row has no image or no label, or the first image can't be read (without `skip_corrupt`).
        """
        rows = (self._row(example, place) for place, example in enumerate(self.stream))
        first = next(rows, None)
        if first is None:
            return set()
        if not self.skip_corrupt:
            open_image(*_source(first), self.max_image_pixels)
        seen, found = {first.label}, set()
        if gallery is not None:
            seen |= {row.label for row in rows}
            rows = (gallery._row(example, place) for place, example in enumerate(gallery.stream))
        for row in rows:
            if row.label in seen:
                found.add(row.label)
                if len(found) >= needed:
                    break
            elif gallery is None:
                seen.add(row.label)
        return found

    def read_rows(self, rng: random.Random) -> Iterator[StoredRow]:
        """One pass over the stream, nothing decoded: shards in random order, some of them in turns.

        Raises:
            DataError: a row has no image, or a label that is none of 0..C-1.
        """
        shards = range(self.stream.num_shards)
        waiting = [self.stream.shard(len(shards), i) for i in rng.sample(shards, len(shards))]
        reading: list[Iterator] = []
        place = 0
        while waiting or reading:
            while waiting and len(reading) < OPEN_SHARDS:
                reading.append(iter(waiting.pop()))
            turn = rng.randrange(len(reading))
            example = next(reading[turn], None)
            if example is None:
                del reading[turn]
                continue
            yield self._row(example, place)
            place += 1

    def _row(self, example: dict[str, Any], place: int) -> StoredRow:
        name = f"row {place} of the stream"
        label = check_label(example[self.columns.label], self.num_classes, name)
        source, name = stored_image(example[self.columns.image], name, self.columns.image)
        return StoredRow(source, label, name)


class StreamBatchSampler:
    """Batch sampler of B/k classes with k images each, class-major, every batch of equal size, from a stream.

    Rows are read into a buffer until it is full; then each batch takes B/k classes out of it, drawn at random by how
    many groups of k images they have, and k images of each; and rows are read again. At the end of the stream the
    buffer is emptied, classes with the most images first. Then

    - a class that has fewer than k images in all gives them all, and fills its k places by repeating them;
    - of other classes, fewer than k images sit out;
    - so does everything once fewer than B/k classes are left.

    An epoch has `max(num_rows // B, 1)` batches if the number of rows is known. Where one pass gives fewer, for the
    reasons above, another one is begun, shuffled anew. If it is not known, an epoch is one pass. An image occurs at
    most once per pass, unless its class repeats.

    A class may hold `buffer_size / (B/k)` places of the buffer; beyond this, a random choice of its rows stays and the
    others are passed over until the next pass. So neither a frequent class nor a stream sorted by class can take up
    the whole buffer. Memory: `buffer_size` encoded images on each rank, or only their paths where rows have no
    contents.

    Everything depends on (seed, epoch) alone. Every rank reads the whole stream, and keeps its part of each batch.

    Args:
        images: What to read.
        batch_size: B, images in the global batch.
        images_per_class: k.
        seed: Seed of the whole run, >= 0.
        buffer_size: Rows in the buffer, >= B; None for what C classes need, `max(C (k - 1) + 4 B, 4096)`.
        rank: This process, 0 <= rank < world_size.
        world_size: Number of processes.

    Attributes:
        global_batch_size: B.
        batch_size: Images in a batch of this rank, `B / world_size`.

    Raises:
        ValueError: B is not divisible by k; B/k is more than C, or not divisible by world_size; another argument is
            out of range.
    """

    drop_last = True  # torch-style attribute: no batch is ever short

    def __init__(
        self,
        images: StreamedImages,
        batch_size: int,
        images_per_class: int,
        seed: int,
        buffer_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        check_batch_sizes(batch_size, images_per_class, images.num_classes, rank, world_size)
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        if buffer_size is None:
            buffer_size = default_buffer_size(images.num_classes, batch_size // images_per_class, images_per_class)
        if buffer_size < batch_size:
            raise ValueError(f"buffer_size must be >= batch_size {batch_size}, got {buffer_size}")
        self.images = images
        self.global_batch_size = batch_size
        self.batch_size = batch_size // world_size
        self.images_per_class = images_per_class
        self.num_classes = images.num_classes
        self.seed = seed
        self.buffer_size = buffer_size
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.rows_passed_over = 0
        """Rows of the current epoch that found no place in the buffer because their class had its share."""
        self._given = 0  # batches of this epoch that have been handed out
        self._skip = 0  # batches to leave out at the next iter

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank.

        Raises:
            TypeError: the number of rows is not known.
        """
        return max(len(self.images) // self.global_batch_size, 1)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next `iter` gives.

        Raises:
            ValueError: epoch is negative.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be >= 0, got {epoch}")
        if epoch != self.epoch:
            self.epoch, self._given, self._skip = int(epoch), 0, 0

    def state_dict(self) -> dict[str, int]:
        """Where the sampler stands: JSON values.

        A loader with workers asks for batches ahead of time; then this is ahead of what has been trained on, and
        `batches` must be replaced by the number of batches used.
        """
        return {**self._settings(), "epoch": self.epoch, "batches": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state: the next `iter` gives the rest of its epoch, the same batches as without a break.

        The rows before are read again, without decoding them; nothing of the buffer is stored.

        Raises:
            ValueError: the state is of other settings, with which batches would be others; the message names them.
        """
        for name, value in self._settings().items():
            if state[name] != value:
                raise ValueError(f"{name} is {value}, but the state was saved with {state[name]}")
        self.set_epoch(state["epoch"])
        self._given = self._skip = state["batches"]

    def _settings(self) -> dict[str, int | None]:
        names = ("seed", "global_batch_size", "images_per_class", "buffer_size", "num_classes")
        return {**{name: getattr(self, name) for name in names}, "num_rows": self.images.num_rows}

    def __iter__(self) -> Iterator[list[StreamKey]]:
        """This rank's batches of the current epoch.

        Raises:
            DataError: the stream is empty or has fewer than B/k classes, or the buffer is full of classes with fewer
                than k images.
        """
        skip, self._skip = self._skip, 0
        self._given = skip
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for position, groups in enumerate(self._epoch_batches(self.epoch)):
            if position < skip:
                continue
            start = position * self.global_batch_size
            seeds = augmentation_seeds(self.seed, self.epoch, self.global_batch_size, start).tolist()
            keys = [(row, group) for group in groups for row in group.rows][mine]
            self._given = position + 1
            yield [
                StreamKey(row, seed, self._others(row, group))
                for (row, group), seed in zip(keys, seeds[mine], strict=True)
            ]

    def _others(self, row: StoredRow, group: RowGroup) -> tuple[StoredRow, ...]:
        """What may take a row's place; nothing if it may not, since workers would be sent it for nothing."""
        if not self.images.skip_corrupt:
            return ()
        return tuple(other for other in (*group.spare, *group.rows) if other is not row)

    def _epoch_batches(self, epoch: int) -> Iterator[list[RowGroup]]:
        """All global batches of an epoch, each B/k groups of rows."""
        rng = random.Random(f"{self.seed} {epoch}")
        self.rows_passed_over = 0
        known_length = self.images.num_rows is not None
        left = len(self) if known_length else None
        small: dict[int, int] = {}  # classes with fewer than k images, known after the first pass
        while left is None or left > 0:
            buffer = ClassBuffer(
                self.global_batch_size // self.images_per_class,
                self.images_per_class,
                self.buffer_size,
                rng,
                small,
                self.num_classes,
            )
            for batch in buffer.batches(self.images.read_rows(rng)):
                yield batch
                if left is not None:
                    left -= 1
                    if left == 0:
                        break
            self.rows_passed_over += buffer.passed_over
            small = buffer.small_classes
            if left is None:
                return


def _source(row: StoredRow) -> tuple[str | bytes, str]:
    """What holds a row's image, and its name; what lies elsewhere is fetched now."""
    source = row.source
    if isinstance(source, str) and "://" in source:
        import fsspec

        try:
            with fsspec.open(source, "rb") as file:
                source = file.read()
        except FileNotFoundError as error:
            raise ImageError(f"{row.name}: there is no such file") from error
    return source, row.name
