"""A data set repository on the Hub (or a local copy of one) with a column of images and a column of labels.

Its splits are used as they are, if they have different classes:

    train, test            or    train, query, gallery

or those that are chosen are put together and split anew by classes (`layout="classes"`, `train_split="train+test"`,
and the options of `class_split.split_classes`). No split is ever taken without being asked for, or named like that.

What tests may come from another repository, or from two: `test_repo`, which may be a retrieval set (see
`retrieval_sets`), or `query_repo` and `gallery_repo`.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import datasets

from .class_folders import LAYOUTS
from .data_errors import DataError, some
from .dataset_options import HubOptions
from .given_splits import ColumnsConfig, LazySplits, joined_rows, named_columns, split_given, split_names
from .hub_places import HubPlace, hub_places
from .label_names import labels_by_name
from .retrieval_sets import read_retrieval_set, retrieval_parts
from .table_files import is_saved_folder


__all__ = ["HubImages", "HubImagesConfig", "load_saved"]

logger = logging.getLogger(__name__)


@dataclass
class HubImagesConfig(HubOptions, ColumnsConfig):
    """What `HubImages` is configured by."""


class HubImages:
    """Images and labels of a repository; see `HubOptions` for the options.

    `dataset_repo` names the repository, or `data_dir` a local folder that `datasets.load_dataset` reads (a clone, or
    parquet files) or that `save_to_disk` wrote. Class order is that of the `ClassLabel`, else that of the numbers,
    else the sorted one (of repositories whose `ClassLabel`s differ, too); labels of each group of splits count from 0
    in this order. Only classes with an image count.
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
        places = hub_places(config, data_dir)
        if len(places) > 1:
            return _of_several(places, config, cache_dir, streaming)
        place = places["train"]
        found = _load(place, _configuration_names(place, cache_dir), cache_dir, streaming)
        splits = LazySplits(found, lambda name, split: named_columns(split, config, f"{place.name}, split {name}"))
        return split_given(splits, config, place.name)


def _of_several(places: Mapping[str, HubPlace], config: HubImagesConfig, cache_dir: str | None, streaming: bool):
    """Training from one repository, test from another, or queries and gallery from two others."""
    found = {}
    for role, place in places.items():
        names = _configuration_names(place, cache_dir)
        parts = retrieval_parts(names, place.config) if role == "test" else None
        if parts is None:
            found |= _splits_for(role, _load(place, names, cache_dir, streaming), config, place.name)
        elif streaming:
            raise DataError(f"{place.name} is a retrieval set, whose rows are found by id: leave streaming out")
        else:
            found |= read_retrieval_set(
                lambda part, place=place: _load_one(place._replace(config=part), cache_dir, False),
                parts,
                config.test_split,
                config,
                place.name,
            )
    where = " and ".join(dict.fromkeys(place.name for place in places.values()))
    layout = "train_test" if "test" in found else "query_gallery"
    if config.layout not in ("auto", layout):
        raise DataError(
            f"layout {config.layout!r}: what trains and what tests come apart, as {layout!r}, from {where}"
        )
    as_named = dict.fromkeys(("train_split", "test_split", "query_split", "gallery_split"))
    config = replace(config, layout=layout, **as_named)
    return split_given(labels_by_name(found, where), config, where)


def _splits_for(role: str, splits: Mapping[str, Any], config: HubImagesConfig, where: str) -> dict[str, Any]:
    """What a repository gives for a role: the split that is chosen, that of the role's name, or the only one."""
    given = getattr(config, f"{role}_split")
    if role == "test" and given is None and splits.keys() >= {"query", "gallery"} and "test" not in splits:
        chosen = {"query": ["query"], "gallery": ["gallery"]}
    else:
        usual = role if role in splits or len(splits) > 1 else next(iter(splits))
        chosen = {role: split_names(given, usual)}
    wanted = [name for names in chosen.values() for name in names]
    if absent := [name for name in wanted if name not in splits]:
        raise DataError(
            f"{where} has the splits {', '.join(splits)}, not {', '.join(absent)}: give {role}_split, one of these or "
            "several as in a+b"
        )
    if len(set(wanted)) < len(wanted):
        raise DataError(f"each split of {where} can be taken once, got {', '.join(wanted)}")
    if left := [name for name in splits if name not in wanted]:
        logger.warning("%s: of its splits, %s is taken, and not %s", where, some(wanted), some(left))
    return {
        part: joined_rows([named_columns(splits[name], config, f"{where}, split {name}") for name in names])
        for part, names in chosen.items()
    }


def _configuration_names(place: HubPlace, cache_dir: str | None) -> list[str]:
    """The configurations of a repository; none of what `save_to_disk` wrote."""
    if _is_saved(place):
        return []
    download = datasets.DownloadConfig(cache_dir=cache_dir)
    with _explained(place):
        return datasets.get_dataset_config_names(place.name, revision=place.revision, download_config=download)


def _load(place: HubPlace, names: list[str], cache_dir: str | None, streaming: bool) -> dict:
    if parts := retrieval_parts(names, place.config):
        raise DataError(
            f"{place.name} is a retrieval set ({', '.join(parts.values())}): it says which image answers which query, "
            "and can only test. Give it as test_repo, and images of classes that train as dataset_repo or data_dir"
        )
    return _load_one(place, cache_dir, streaming)


def _load_one(place: HubPlace, cache_dir: str | None, streaming: bool) -> dict:
    with _explained(place):
        if _is_saved(place):
            return load_saved(place.name, streaming)
        return dict(
            datasets.load_dataset(
                place.name,
                place.config,
                revision=place.revision,
                cache_dir=cache_dir,
                streaming=streaming,
                token=None,  # that of `hf auth login`, where there is one
            )
        )


def _is_saved(place: HubPlace) -> bool:
    return place.is_folder and is_saved_folder(place.name)


@contextlib.contextmanager
def _explained(place: HubPlace) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # not found, offline, no such revision, no such configuration: many types
        revision = "" if place.revision is None else f" at revision {place.revision!r}"
        reason = " ".join(str(error).split())
        raise DataError(
            f"can't load the data set {place.name!r}{revision} ({type(error).__name__}: {reason})"
        ) from error


def load_saved(folder: str, streaming: bool = False) -> dict:
    """Per split what `save_to_disk` wrote; one data set is `train`."""
    saved = datasets.load_from_disk(folder)
    saved = saved if isinstance(saved, dict) else {"train": saved}
    return {name: split.to_iterable_dataset() if streaming else split for name, split in saved.items()}
