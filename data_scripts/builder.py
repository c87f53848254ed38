"""The base of the data set builders: a `SplitListing` becomes rows of image and label.

Builders are imported as classes (`datasets` has no loading scripts any more):

    builder = ImageFolders("train", data_dir="flowers")
    builder.download_and_prepare()
    train = builder.as_dataset("train")

Training and test classes are disjoint, and each have their own `ClassLabel` with labels from 0, but a builder of
`datasets` has one set of features. So a builder is made for one *group* of splits: `train`, or `test` (which is the
split test, or the splits query and gallery). `load_splits` makes both and puts them together.

`datasets` replaces `open`, `os.path` and `Path` in the modules of its builders. Code that walks folders therefore
lives elsewhere (`images.py`, `class_folders.py`).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import datasets

from .class_split import split_classes
from .errors import DataError
from .listing import GROUP_SPLITS, SplitListing


__all__ = ["ClassSplitConfig", "ImageDatasetBuilder", "ImageDatasetConfig", "quiet_progress"]

SHARD_SIZE = 1024
"""Rows per shard: what workers and ranks share out between them."""
SHOW_PROGRESS_FROM = 50_000
"""Rows from which preparing a split shows a progress bar (some 25,000 rows are written per second)."""


@dataclass
class ImageDatasetConfig(datasets.BuilderConfig):
    """What every builder is configured by; its `name` is the group, `train` or `test`.

    Attributes:
        fingerprint: Set by the builder from its listing.
    """

    fingerprint: str = ""

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The options that a user gives, in the order of the fields."""
        internal = {field.name for field in fields(ImageDatasetConfig)}
        return tuple(field.name for field in fields(cls) if field.name not in internal)


@dataclass
class ClassSplitConfig(ImageDatasetConfig):
    """Options of data sets whose classes are split here; see `class_split.split_classes`."""

    train_classes: str | list[str] | None = None
    test_classes: str | list[str] | None = None
    test_share: float = 0.5
    class_split: str = "first"
    split_seed: int = 0

    def split(self, class_names: list[str]) -> dict[str, list[str]]:
        """Training and test classes, by group."""
        train, test = split_classes(
            class_names, self.train_classes, self.test_classes, self.test_share, self.class_split, self.split_seed
        )
        return {"train": train, "test": test}


@contextlib.contextmanager
def quiet_progress(quiet: bool) -> Iterator[None]:
    """Switch the progress bars of `datasets` off for a while, and back to what they were."""
    if not quiet or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


class ImageDatasetBuilder(datasets.GeneratorBasedBuilder):
    """Base class: subclasses say where the images are, by `list_splits`.

    Rows are `image` (`datasets.Image(decode=False)`: the path, or the bytes where there is no file) and `label`
    (`ClassLabel` of the group's classes). Rows of files on disk hold the absolute path only, so nothing is copied.

    Args:
        group: `train` or `test`.
        data_dir: Folder of the data set.
        cache_dir: Where prepared tables go; by default where `datasets` keeps them.
        listing: The result of `list_splits`, if it was called before (both groups come from one listing).
        options: Fields of the subclass's `BUILDER_CONFIG_CLASS`.

    Raises:
        DataError: unknown group, or whatever is wrong with the data or the options. It is raised here, before
            anything is prepared.
    """

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = ImageDatasetConfig
    DESCRIPTION: ClassVar[str] = ""

    def __init__(
        self,
        group: str = "train",
        data_dir: str | None = None,
        cache_dir: str | None = None,
        listing: SplitListing | None = None,
        **options: Any,
    ):
        if group not in GROUP_SPLITS:
            raise DataError(f"group must be one of {', '.join(GROUP_SPLITS)}, got {group!r}")
        self.listing = self.list_splits(data_dir, **options) if listing is None else listing
        super().__init__(
            cache_dir=cache_dir,
            dataset_name=f"vptsp_{type(self).__module__.rpartition('.')[2]}",
            config_name=group,
            config_id=f"{group}-{self.listing.fingerprint}",
            data_dir=None if data_dir is None else str(data_dir),
            fingerprint=self.listing.fingerprint,
            **options,
        )

    @classmethod
    def list_splits(cls, data_dir: str | None, **options: Any) -> SplitListing:
        """List every split and check it.

        Args:
            data_dir: Folder of the data set.
            options: Fields of `BUILDER_CONFIG_CLASS`.

        Returns:
            The listing, from which the builders of both groups can be made.

        Raises:
            DataError: see the subclass.
        """
        return cls._list(cls.BUILDER_CONFIG_CLASS(data_dir=data_dir, **options))

    @classmethod
    def _list(cls, config: ImageDatasetConfig) -> SplitListing:
        raise NotImplementedError(f"{cls.__name__} must implement _list")

    def _info(self) -> datasets.DatasetInfo:
        names = self.listing.class_names[self.config.name]
        return datasets.DatasetInfo(
            description=self.DESCRIPTION,
            features=datasets.Features(
                {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=list(names))}
            ),
        )

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        generators = []
        for split, rows in self.listing.group_splits(self.config.name).items():
            starts = range(0, len(rows.files), SHARD_SIZE)
            shards = {
                "files": [rows.files[start : start + SHARD_SIZE] for start in starts],
                "labels": [rows.labels[start : start + SHARD_SIZE] for start in starts],
            }
            generators.append(datasets.SplitGenerator(name=split, gen_kwargs=shards))
        return generators

    def _generate_examples(self, files: list[list[str]], labels: list[list[int]]):
        for shard_files, shard_labels in zip(files, labels, strict=True):
            for file, label in zip(shard_files, shard_labels, strict=True):
                yield file, {"image": {"path": file, "bytes": self._read_bytes(file)}, "label": label}

    def _read_bytes(self, file: str) -> bytes | None:
        """The contents to store in the row; None (the default) stores the path alone."""
        return None

    def download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        """Write the Arrow tables, unless they are there already; quiet for small data sets."""
        num_rows = sum(len(rows.files) for rows in self.listing.group_splits(self.config.name).values())
        with quiet_progress(num_rows < SHOW_PROGRESS_FROM):
            super().download_and_prepare(*args, **kwargs)
