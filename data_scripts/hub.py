"""A data set repository on the Hub (or a local copy of one) with a column of images and a column of labels.

Its splits are used as they are, if they have different classes:

    train, test            or    train, query, gallery

or those that are chosen are put together and split anew by classes (`layout="classes"`, `train_split="train+test"`,
and the options of `class_split.split_classes`). No split is ever taken without being asked for, or named like that.
"""

from dataclasses import dataclass
from typing import Any

import datasets

from .class_folders import LAYOUTS, existing_folder
from .data_errors import DataError
from .dataset_options import HubOptions
from .given_splits import ColumnsConfig, LazySplits, named_columns, split_given
from .table_files import SAVED_FILES


__all__ = ["HubImages", "HubImagesConfig", "load_saved"]


@dataclass
class HubImagesConfig(HubOptions, ColumnsConfig):
    """What `HubImages` is configured by."""


class HubImages:
    """Images and labels of a repository; see `HubOptions` for the options.

    `dataset_repo` names the repository, or `data_dir` a local folder that `datasets.load_dataset` reads (a clone, or
    parquet files) or that `save_to_disk` wrote. Class order is that of the `ClassLabel`, else that of the numbers,
    else the sorted one; labels of each group of splits count from 0 in this order. Only classes with an image count.
    """

    BUILDER_CONFIG_CLASS = HubImagesConfig
    DESCRIPTION = "Images and labels of a data set repository on the Hub."

    @classmethod
    def load_splits(
        cls, data_dir: str | None = None, cache_dir: str | None = None, streaming: bool = False, **options: Any
    ) -> datasets.DatasetDict | datasets.IterableDatasetDict:
        """All splits, with the columns `image` (not decoded), `label` and those of text and numbers that go along.

        A stream reads the labels once beforehand, to know which classes there are (of a repository that is not a
        local folder, it goes through the data for that).

        Raises:
            DataError: the repository, a configuration, a revision or a column is not there, images have no label,
                the layout is not what is there, or classes are in training and test.
        """
        config = HubImagesConfig(data_dir=data_dir, **options)
        if config.layout not in LAYOUTS:
            raise DataError(f"layout must be one of {', '.join(LAYOUTS)}, got {config.layout!r}")
        where, found = _load(config, cache_dir, streaming)
        splits = LazySplits(found, lambda name, split: named_columns(split, config, f"{where}, split {name}"))
        return split_given(splits, config, where)


def _load(config: HubImagesConfig, cache_dir: str | None, streaming: bool) -> tuple[str, dict]:
    if (config.dataset_repo is None) == (config.data_dir is None):
        got = "neither" if config.data_dir is None else "both"
        raise DataError(f"give either dataset_repo (a repository) or data_dir (a local copy of one), got {got}")
    where = config.dataset_repo
    if config.data_dir is not None:
        folder = existing_folder(config.data_dir)
        if config.dataset_revision is not None:
            raise DataError(
                f"dataset_revision {config.dataset_revision!r} is of a repository, but {folder} is a local folder"
            )
        where = str(folder)
    try:
        if config.data_dir is not None and any((folder / name).is_file() for name in SAVED_FILES):
            return where, load_saved(where, streaming)
        loaded = datasets.load_dataset(
            where,
            config.dataset_config,
            revision=config.dataset_revision,
            cache_dir=cache_dir,
            streaming=streaming,
            token=None,  # that of `hf auth login`, where there is one
        )
    except Exception as error:  # not found, offline, no such revision, no such configuration: many types
        revision = "" if config.dataset_revision is None else f" at revision {config.dataset_revision!r}"
        reason = " ".join(str(error).split())
        raise DataError(f"can't load the data set {where!r}{revision} ({type(error).__name__}: {reason})") from error
    return where, dict(loaded)


def load_saved(folder: str, streaming: bool = False) -> dict:
    """Per split what `save_to_disk` wrote; one data set is `train`."""
    saved = datasets.load_from_disk(folder)
    saved = saved if isinstance(saved, dict) else {"train": saved}
    return {name: split.to_iterable_dataset() if streaming else split for name, split in saved.items()}
