"""The data sets by name, and the one function that loads any of them. Importing this is cheap."""

import difflib
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import DataError


if TYPE_CHECKING:
    import datasets


__all__ = ["DATASETS", "DatasetEntry", "find_dataset", "load_splits", "refuse_unknown_options"]

_CLASS_SPLIT_OPTIONS = ("train_classes", "test_classes", "test_share", "class_split", "split_seed")


class DatasetEntry(NamedTuple):
    """One data set.

    Attributes:
        builder: `module:Class`, the module relative to this package.
        description: One line.
        options: The options that it takes, beside `data_dir`.
        needs_data_dir: Whether there must be a `data_dir`.
        any_of: Paths in `data_dir` of which one must exist (a check that costs nothing); empty: not checked.
    """

    builder: str
    description: str
    options: tuple[str, ...] = ()
    needs_data_dir: bool = True
    any_of: tuple[str, ...] = ()


DATASETS: dict[str, DatasetEntry] = {
    "folder": DatasetEntry(
        "folder:ImageFolders",
        "any folder of class folders; classes split here, or train/test, or train/query/gallery folders",
        (*_CLASS_SPLIT_OPTIONS, "layout"),
    ),
    "cub": DatasetEntry(
        "cub:CUB200",
        "CUB-200-2011 birds, unpacked; first 100 classes train, last 100 test",
        ("verify_counts",),
        any_of=("images", "CUB_200_2011/images"),
    ),
    "digits": DatasetEntry(
        "digits:Digits",
        "the 1,797 handwritten digits that scikit-learn ships; no download",
        (*_CLASS_SPLIT_OPTIONS, "digit_size"),
        needs_data_dir=False,
    ),
}


def find_dataset(name: str) -> DatasetEntry:
    """Look a data set up.

    Raises:
        DataError: there is none of this name; the message lists all.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(str(name), DATASETS, n=1)
        known = "; ".join(f"{key} ({entry.description})" for key, entry in DATASETS.items())
        raise DataError(
            f"unknown dataset_name {name!r}{f', did you mean {near[0]!r}?' if near else '.'} There are: {known}"
        )
    return DATASETS[name]


def refuse_unknown_options(name: str, options: Iterable[str]) -> None:
    """Check the names of options.

    Raises:
        DataError: unknown data set, or an option that it does not take; the message lists those it does.
    """
    known = find_dataset(name).options
    unknown = [option for option in options if option not in known]
    if unknown:
        raise DataError(
            f"the data set {name!r} has no option {', '.join(map(repr, unknown))}; its options are "
            f"{', '.join(known) or 'none'}"
        )


def load_splits(
    name: str, data_dir: str | Path | None = None, cache_dir: str | Path | None = None, **options: Any
) -> "datasets.DatasetDict":
    """Load a data set with all its splits.

    Everything is listed and checked first. Then the tables (paths and labels; no image is copied or decoded) are
    written, or found again if no file and no option has changed. Several processes may call this at once.

    Args:
        name: A key of `DATASETS`.
        data_dir: Folder of the data set.
        cache_dir: Where the prepared tables go; by default where `datasets` keeps them.
        options: What the data set takes, see `DatasetEntry.options`.

    Returns:
        `DatasetDict` with `train` and `test`, or `train`, `query` and `gallery`. Columns `image` (not decoded) and
        `label`. `train` has its own `ClassLabel`, the others share theirs; both number from 0.

    Raises:
        DataError: unknown name or option, or what the builder finds wrong with the data.
    """
    import datasets

    entry = find_dataset(name)
    refuse_unknown_options(name, options)
    module, _, class_name = entry.builder.partition(":")
    builder_class = getattr(importlib.import_module(f".{module}", __package__), class_name)
    data_dir = None if data_dir is None else str(data_dir)
    listing = builder_class.list_splits(data_dir, **options)
    splits = datasets.DatasetDict()
    for group in ("train", "test"):
        builder = builder_class(
            group, data_dir, cache_dir=None if cache_dir is None else str(cache_dir), listing=listing, **options
        )
        builder.download_and_prepare()
        splits.update(builder.as_dataset())
    return splits
