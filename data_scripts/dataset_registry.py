"""The data sets by name, and the one function that loads any of them. Importing this is cheap."""

import importlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..names.registry import Registry, nearest
from .data_errors import DataError
from .dataset_options import (
    BenchmarkOptions,
    DigitsOptions,
    HubOptions,
    LabelOptions,
    LayoutOptions,
    TableOptions,
    option_names,
)
from .sources import tar_names


if TYPE_CHECKING:
    import datasets


__all__ = [
    "DATASETS",
    "DatasetEntry",
    "builder_class",
    "find_dataset",
    "load_splits",
    "refuse_unknown_options",
    "register_dataset",
]


class DatasetEntry(NamedTuple):
    """One data set.

    Attributes:
        builder: `module:Class`, the module relative to this package; or the class itself, for one from elsewhere.
        description: One line.
        options: Names of the options that it takes, beside `data_dir`.
        data_dir: What `data_dir` is: `folder`, `folder or archive`, `folder or none`, `table` (a file or a folder), or
            `none`.
        any_of: Paths in `data_dir` of which one must exist (a check that costs nothing); empty: not checked. One may
            be a pattern such as `*/list.txt`.
    """

    builder: str | type
    description: str
    options: tuple[str, ...]
    data_dir: str = "folder"
    any_of: tuple[str, ...] = ()


_SPLITS = ("train", "test")
_PUBLISHED = option_names(BenchmarkOptions)

DATASETS: Registry[DatasetEntry] = Registry(
    "data set",
    {
        "folder": DatasetEntry(
            "folder:ImageFolders",
            "any folder of class folders; classes split here, or train/test, or train/query/gallery folders",
            (*option_names(LayoutOptions), *option_names(LabelOptions)),
        ),
        "cub": DatasetEntry(
            "benchmarks.cub:CUB200",
            "CUB-200-2011, birds; first 100 classes train, last 100 test",
            _PUBLISHED,
            "folder or archive",
            (
                *("images", "CUB_200_2011/images", "CUB_200_2011.zip", "cub200.zip"),
                *tar_names("cub200"),
                *tar_names("CUB_200_2011"),
            ),
        ),
        "cars": DatasetEntry(
            "benchmarks.cars:Cars196",
            "Cars-196, models of cars; first 98 classes train, last 98 test",
            _PUBLISHED,
            "folder or archive",
            (
                *("images", "cars196/images", "car_ims", "cars_train", "cars_test", "train", "test", "car_data"),
                *(name for part in ("car_ims", "cars_train", "cars_test") for name in tar_names(part)),
            ),
        ),
        "sop": DatasetEntry(
            "benchmarks.sop:StanfordOnlineProducts",
            "Stanford Online Products; split by the official lists",
            _PUBLISHED,
            "folder or archive",
            (
                *("Ebay_train.txt", "Info_Files", "*/Ebay_train.txt"),
                *("Stanford_Online_Products", "Stanford_Online_Products.zip"),
                *tar_names("Stanford_Online_Products"),
            ),
        ),
        "inshop": DatasetEntry(
            "benchmarks.inshop:InShop",
            "In-Shop Clothes (DeepFashion); train, query and gallery by the official list",
            _PUBLISHED,
            "folder or archive",
            tuple(f"{folder}list_eval_partition.txt" for folder in ("", "Eval/", "Anno/", "*/")),
        ),
        "inaturalist": DatasetEntry(
            "benchmarks.inaturalist:INaturalist2018",
            "iNaturalist 2018, species; 5,690 classes train, 2,452 test, by two lists",
            _PUBLISHED,
            "folder or archive",
            tuple(
                f"{folder}Inaturalist_{split}_set1.txt"
                for folder in ("", "Inat_dataset_splits/", "*/")
                for split in _SPLITS
            ),
        ),
        "table": DatasetEntry(
            "tables:TableImages",
            "a table (CSV, TSV, JSONL, Parquet, Arrow) with a column of image paths or contents and one of classes",
            option_names(TableOptions),
            "table",
        ),
        "imagefolder": DatasetEntry(
            "tables:TableImages",
            "a folder of images with metadata.csv, .jsonl or .parquet",
            option_names(TableOptions),
            "table",
        ),
        "saved": DatasetEntry(
            "tables:TableImages",
            "what save_to_disk of the library datasets wrote, or a folder of Parquet files",
            option_names(TableOptions),
            "table",
        ),
        "hub": DatasetEntry(
            "hub:HubImages",
            "a data set repository on the Hub, or a local copy, with a column of images and one of labels",
            option_names(HubOptions),
            "folder or none",
        ),
        "digits": DatasetEntry(
            "digits:Digits",
            "the 1,797 handwritten digits that scikit-learn ships; no download",
            option_names(DigitsOptions),
            "none",
        ),
    },
)


def register_dataset(
    name: str, description: str, data_dir: str = "folder", any_of: tuple[str, ...] = ()
) -> Callable[[type], type]:
    """Decorator: make a builder known as `dataset_name: name`, with the options of its `BUILDER_CONFIG_CLASS`.

    Args:
        name: Of the data set in configurations.
        description, data_dir, any_of: As in `DatasetEntry`.

    Raises:
        ValueError: the name is another data set's.
    """

    def register(builder: type) -> type:
        options = builder.BUILDER_CONFIG_CLASS.option_names()
        DATASETS.register(name, DatasetEntry(builder, description, options, data_dir, any_of))
        return builder

    return register


def find_dataset(name: str) -> DatasetEntry:
    """Look a data set up.

    Raises:
        DataError: there is none of this name; the message lists all.
    """
    if name not in DATASETS:
        known = "; ".join(f"{key} ({entry.description})" for key, entry in DATASETS.items())
        raise DataError(f"unknown dataset_name {name!r}{nearest(name, DATASETS, most=1) or '.'} There are: {known}")
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


def builder_class(name: str) -> type:
    """The class that loads a data set.

    Raises:
        DataError: there is no data set of this name.
    """
    builder = find_dataset(name).builder
    if isinstance(builder, type):
        return builder
    module, _, class_name = builder.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), class_name)


def load_splits(
    name: str,
    data_dir: Any = None,
    cache_dir: str | Path | None = None,
    streaming: bool = False,
    **options: Any,
) -> "datasets.DatasetDict | datasets.IterableDatasetDict":
    """Load a data set with all its splits.

    Everything is listed and checked first. Then the tables are written, or found again if no file and no option has
    changed: paths and labels of files on disk (no image is copied or decoded), the images themselves where they come
    from an archive (which takes their size in `cache_dir`). Several processes may call this at once.

    Args:
        name: A key of `DATASETS`.
        data_dir: Folder of the data set, its archive, or its table; of `table` also a pandas DataFrame, whose paths
            are relative to `image_root` or the current folder.
        cache_dir: Where the prepared tables go; by default where `datasets` keeps them.
        streaming: Write nothing, and read the rows as they are asked for. The rows are the same, in the same order.
        options: What the data set takes, see `DatasetEntry.options`.

    Returns:
        `DatasetDict` (streaming: `IterableDatasetDict`) with `train` and `test`, or `train`, `query` and `gallery`.
        Columns `image` (not decoded) and `label`, and the further ones of a table. With `test_share=0` there is only
        `train`; with `class_split="seen"` `gallery` holds the images of `train`. `train` has its own
        `ClassLabel`, the others share theirs; both number from 0.

    Raises:
        DataError: unknown name or option, or what the builder finds wrong with the data.
    """
    refuse_unknown_options(name, options)
    return builder_class(name).load_splits(
        str(data_dir) if isinstance(data_dir, os.PathLike) else data_dir,
        None if cache_dir is None else str(cache_dir),
        streaming,
        **options,
    )
