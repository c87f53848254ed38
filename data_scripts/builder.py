"""The base of the data set builders: a `SplitListing` becomes rows of image and label.

Builders are imported as classes (`datasets` has no loading scripts any more):

    builder = ImageFolders("train", data_dir="flowers")
    builder.download_and_prepare()
    train = builder.as_dataset("train")

Training and test classes are disjoint, and each have their own `ClassLabel` with labels from 0, but a builder of
`datasets` has one set of features. So a builder is made for one *group* of splits: `train`, or `test` (which is the
split test, or the splits query and gallery). `load_splits` makes both and puts them together.

`datasets` replaces `open`, `os.path` and `Path` in the modules of its builders. Code that walks folders or opens
files therefore lives elsewhere (`images.py`, `class_folders.py`, `archives.py`, `sources.py`).
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import datasets

from .archives import free_bytes, read_members
from .class_split import asked_images, check_class_split, split_classes
from .data_errors import DataError
from .dataset_options import BenchmarkOptions, ClassSplitOptions, option_names
from .listing import GROUP_SPLITS, SplitListing, SplitRows
from .prepared_tables import prepared_tables


__all__ = ["BenchmarkConfig", "ClassSplitConfig", "ImageDatasetBuilder", "ImageDatasetConfig", "quiet_progress"]

SHARD_SIZE = 1024
"""Rows per shard: what workers and ranks share out between them."""
SHOW_PROGRESS_FROM = 50_000
"""Rows from which preparing a split shows a progress bar (some 25,000 rows are written per second)."""


@dataclass
class ImageDatasetConfig(datasets.BuilderConfig):
    """What every builder is configured by; its `name` is the group, `train` or `test`.

    Attributes:
        fingerprint: Set by the builder from its listing.
        index_dir: Where the lists of archives' members are kept; set by the builder.
    """

    fingerprint: str = ""
    index_dir: str | None = None

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The options that a user gives, in the order of the fields."""
        return tuple(name for name in option_names(cls) if name not in option_names(ImageDatasetConfig))


@dataclass
class BenchmarkConfig(BenchmarkOptions, ImageDatasetConfig):
    """What a data set with a published split is configured by."""


@dataclass
class ClassSplitConfig(ClassSplitOptions, ImageDatasetConfig):
    """What a data set whose classes are split here is configured by."""

    def split(self, class_names: list[str], keep_order: bool = False) -> dict[str, list[str]]:
        """Training and test classes, by group."""
        values = (getattr(self, name) for name in option_names(ClassSplitOptions))
        train, test = split_classes(class_names, *values, keep_order)
        return {"train": train, "test": test}

    @property
    def seen(self) -> bool:
        """Whether classes that train are asked for again, with other images."""
        return self.class_split == "seen" and self.test_share > 0

    def split_files(
        self, classes: Mapping[str, Sequence[Any]]
    ) -> tuple[dict[str, dict[str, list]], dict[str, list[str]]]:
        """Split what one set of classes holds.

        Args:
            classes: Per class its images.

        Returns:
            Per split (train and test; train alone without a test; with `class_split` `seen` train, query and gallery,
            which has the images of train) the images by class, and the class names by group.
        """
        check_class_split(self.train_classes, self.test_classes, self.test_share, self.class_split, self.split_seed)
        if not self.seen:
            names = self.split(list(classes)) if self.test_share else {"train": sorted(classes), "test": []}
            return {group: {name: classes[name] for name in names[group]} for group in names if names[group]}, names
        parts: dict[str, dict[str, list]] = {"train": {}, "query": {}}
        for name, images in classes.items():
            asked = set(asked_images(len(images), name, self.test_share, self.split_seed))
            parts["train"][name] = [image for place, image in enumerate(images) if place not in asked]
            parts["query"][name] = [image for place, image in enumerate(images) if place in asked]
        if not any(parts["query"].values()):
            raise DataError(
                f"class_split 'seen' asks for a class by another image of it, but each of the {len(classes)} classes "
                "has one only; test_share 0 trains without a test"
            )
        return parts | {"gallery": parts["train"]}, dict.fromkeys(GROUP_SPLITS, sorted(classes))

    def refuse_split(self, why: str) -> None:
        """A `DataError` if an option says how to split where there is nothing to; `why` goes on after "splits"."""
        for item in fields(ClassSplitOptions):
            if getattr(self, item.name) != item.default and not (item.name == "class_split" and self.seen):
                raise DataError(f"{item.name} splits {why}")


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
    Rows from an archive hold the image's bytes, and `<name of the archive>/<member>` as the path; those of a zip file
    are in the listing's order, those of a tar file in the order of the archive.

    Args:
        group: `train` or `test`.
        data_dir: Folder of the data set, or its archive.
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
        self.listing = self.list_splits(data_dir, cache_dir, **options) if listing is None else listing
        self._show_progress = False
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
    def list_splits(cls, data_dir: str | None, cache_dir: str | None = None, **options: Any) -> SplitListing:
        """List every split and check it.

        Args:
            data_dir: Folder of the data set, or its archive.
            cache_dir: Where the list of a tar file's members is kept; by default where `datasets` keeps its tables.
            options: Fields of `BUILDER_CONFIG_CLASS`.

        Returns:
            The listing, from which the builders of both groups can be made.

        Raises:
            DataError: see the subclass.
        """
        index_dir = str(cache_dir or datasets.config.HF_DATASETS_CACHE)
        return cls._list(cls.BUILDER_CONFIG_CLASS(data_dir=data_dir, index_dir=index_dir, **options))

    @classmethod
    def load_splits(
        cls, data_dir: str | None = None, cache_dir: str | None = None, streaming: bool = False, **options: Any
    ) -> datasets.DatasetDict | datasets.IterableDatasetDict:
        """All splits; see `dataset_registry.load_splits`, which calls this."""
        listing = cls.list_splits(data_dir, cache_dir, **options)
        splits = datasets.IterableDatasetDict() if streaming else datasets.DatasetDict()
        for group in GROUP_SPLITS:
            if not listing.group_splits(group):  # all classes train
                continue
            make = functools.partial(cls, group, data_dir, cache_dir=cache_dir, listing=listing, **options)
            if streaming:
                streams = make().as_streaming_dataset()
                for name, stream in streams.items():  # so that who reads it knows how long it is
                    count = listing.counts(name).images
                    stream.info.splits = datasets.SplitDict({name: datasets.SplitInfo(name, num_examples=count)})
                splits.update(streams)
            else:
                splits.update(prepared_tables(make, cache_dir, f"{group}-{listing.fingerprint}"))
        return splits

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
        return [
            datasets.SplitGenerator(name=split, gen_kwargs=self._shards(rows))
            for split, rows in self.listing.group_splits(self.config.name).items()
        ]

    def _shards(self, rows: SplitRows) -> dict[str, list]:
        """Lists of equal length: per shard its archive (None: files on disk), its files and its labels.

        Files on disk make shards of `SHARD_SIZE`; an archive is one shard, as it is read in one pass.
        """
        shards: dict[str, list] = {"archives": [], "files": [], "labels": []}
        by_archive: dict[str | None, SplitRows] = {}
        for file, label in zip(rows.files, rows.labels, strict=True):
            archive, name = self.listing.archive_member(file)
            part = by_archive.setdefault(archive, SplitRows([], []))
            part.files.append(name)
            part.labels.append(label)
        for archive, part in by_archive.items():
            step = SHARD_SIZE if archive is None else len(part.files)
            for start in range(0, len(part.files), step):
                shards["archives"].append(archive)
                shards["files"].append(part.files[start : start + step])
                shards["labels"].append(part.labels[start : start + step])
        return shards

    def _generate_examples(self, archives: list[str | None], files: list[list[str]], labels: list[list[int]]):
        for archive, shard_files, shard_labels in zip(archives, files, labels, strict=True):
            if archive is None:
                for file, label in zip(shard_files, shard_labels, strict=True):
                    yield file, {"image": {"path": file, "bytes": self._read_bytes(file)}, "label": label}
                continue
            label_of = dict(zip(shard_files, shard_labels, strict=True))
            prefix = archive.replace("\\", "/").rpartition("/")[2]
            for name, content in read_members(archive, label_of, self._show_progress):
                path = f"{prefix}/{name}"
                yield path, {"image": {"path": path, "bytes": content}, "label": label_of[name]}

    def read_images(self, split: str, positions: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read single rows without preparing anything.

        Args:
            split: One of this group's splits.
            positions: Rows of the listing.

        Yields:
            `(position, {"path": ..., "bytes": ...})`, in any order.
        """
        files = self.listing.splits[split].files
        inside: dict[str, dict[str, int]] = {}
        for position in positions:
            archive, name = self.listing.archive_member(files[position])
            if archive is None:
                yield position, {"path": name, "bytes": self._read_bytes(name)}
            else:
                inside.setdefault(archive, {})[name] = position
        for archive, names in inside.items():
            for name, content in read_members(archive, names, progress=True):
                yield names[name], {"path": f"{archive}/{name}", "bytes": content}

    def _read_bytes(self, file: str) -> bytes | None:
        """The contents to store in the row of a file that is in no archive; None (the default) stores the path."""
        return None

    def download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        """Write the Arrow tables, unless they are there already; quiet for small data sets.

        Raises:
            DataError: an archive can't be read to its end, or the disk has no room for its images.
        """
        splits = self.listing.group_splits(self.config.name)
        if self.listing.archives:
            # reading an archive shows a bar of its own, which knows the total
            self._show_progress = not datasets.are_progress_bars_disabled()
            self._check_room(sum(self.listing.num_bytes.get(split, 0) for split in splits))
        num_rows = sum(len(rows.files) for rows in splits.values())
        try:
            with quiet_progress(num_rows < SHOW_PROGRESS_FROM or bool(self.listing.archives)):
                super().download_and_prepare(*args, **kwargs)
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, DataError):
                raise error.__cause__ from None
            raise
        finally:
            self._show_progress = False

    def _check_room(self, needed: int) -> None:
        if os.path.isdir(self.cache_dir):  # noqa: PTH112 (`Path` is not to be used here, see the module)
            return
        free = free_bytes(self._cache_dir_root)
        if needed > free:
            raise DataError(
                f"the prepared images need {needed / 1e9:.1f} GB in {self._cache_dir_root}, where {free / 1e9:.1f} GB "
                "are free; name another folder (data_cache_dir), or unpack the archive, whose files are not copied"
            )
