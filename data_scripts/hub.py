"""A data set repository on the Hub (or a local copy of one) with a column of images and a column of labels.

Its splits are used as they are, if they have different classes:

    train, test            or    train, query, gallery

or those that are chosen are put together and split anew by classes (`layout="classes"`, `train_split="train+test"`,
and the options of `class_split.split_classes`). No split is ever taken without being asked for, or named like that.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import datasets
import numpy as np

from .builder import ClassSplitConfig
from .class_folders import LAYOUT_SPLITS, LAYOUTS, existing_folder
from .data_errors import DataError, some
from .dataset_options import HubOptions
from .labels import check_labels
from .listing import GROUP_SPLITS


__all__ = ["HubImages", "HubImagesConfig"]

logger = logging.getLogger(__name__)

_SAVED = ("dataset_dict.json", "state.json")
"""What `save_to_disk` writes."""


@dataclass
class HubImagesConfig(HubOptions, ClassSplitConfig):
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
        """All splits, with the columns `image` (not decoded) and `label`; see `registry.load_splits`.

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
        layout = _choose_layout(found, config, where)
        chosen = _choose_splits(found, config, where, layout)
        wanted = [name for names in chosen.values() for name in names]
        left = [name for name in found if name not in wanted]
        if left:
            logger.warning("%s: the splits %s are not part of the layout %r, ignored", where, some(left), layout)
        splits = {name: _two_columns(found[name], config, f"{where}, split {name}") for name in wanted}
        labels = {name: _labels(split, f"{where}, split {name}") for name, split in splits.items()}
        names = _ordered_names(splits, labels, where)
        parts = {
            role: _Part(_joined([splits[name] for name in of_role]), [x for name in of_role for x in labels[name]])
            for role, of_role in chosen.items()
        }
        if layout == "classes":
            return _split_by_classes(parts["train"], names, config, where)
        return _splits_as_given(parts, names, where, layout)


class _Part(NamedTuple):
    """Rows of a repository, and the label of each."""

    rows: Any
    labels: list


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
        if config.data_dir is not None and any((folder / name).is_file() for name in _SAVED):
            saved = datasets.load_from_disk(where)
            saved = saved if isinstance(saved, dict) else {"train": saved}
            return where, {name: split.to_iterable_dataset() if streaming else split for name, split in saved.items()}
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


def _two_columns(split, config: HubImagesConfig, where: str):
    """The columns `image` and `label` alone; nothing is decoded."""
    features = split.features if split.features is not None else split.resolve_features().features
    for option in ("image_column", "label_column"):
        column = getattr(config, option)
        if features is None or column not in features:
            raise DataError(f"{where}: there is no {option} {column!r}; the columns are {', '.join(features or ())}")
    if not isinstance(features[config.image_column], datasets.Image):
        raise DataError(
            f"{where}: image_column {config.image_column!r} must hold images (datasets.Image), got "
            f"{features[config.image_column]}"
        )
    label = features[config.label_column]
    if not isinstance(label, datasets.ClassLabel) and not (
        isinstance(label, datasets.Value) and ("int" in label.dtype or "string" in label.dtype)
    ):
        raise DataError(
            f"{where}: label_column {config.label_column!r} must hold ClassLabel, integers or strings, got {label}"
        )
    # before anything else: a stream decodes images to rename their column, and would write them anew
    split = split.cast_column(config.image_column, datasets.Image(decode=False))
    split = split.select_columns([config.image_column, config.label_column])
    for old, new in ((config.label_column, "label_"), (config.image_column, "image"), ("label_", "label")):
        split = split if old == new else split.rename_column(old, new)  # by way of a third name: they may be swapped
    return split


def _choose_layout(splits: Mapping[str, Any], config: HubImagesConfig, where: str) -> str:
    if config.layout != "auto":
        layout = config.layout
    elif config.test_split is not None:
        layout = "train_test"
    else:
        train = _names_of(config.train_split, "train")
        fitting = [
            layout
            for layout, (_, *others) in reversed(LAYOUT_SPLITS.items())
            if splits.keys() >= {*train, *others} and not set(train) & set(others)
        ]
        layout = fitting[0] if fitting else "classes"
    if layout == "classes":
        return layout
    config.refuse_split(
        f"classes, but the splits of {where} already say which classes train and which test (layout {layout!r}); "
        "layout='classes' with train_split='train+test' (or other names) puts splits together and splits them anew"
    )
    return layout


def _choose_splits(
    splits: Mapping[str, Any], config: HubImagesConfig, where: str, layout: str
) -> dict[str, list[str]]:
    """The splits that a layout takes, by what they are for; of the layout `classes`, `train` are all of them."""
    if layout == "classes" and config.train_split is None:
        if len(splits) > 1:
            raise DataError(
                f"{where} has the splits {', '.join(splits)}: give train_split and test_split, or the splits whose "
                "classes are to be split anew, as in layout='classes' with train_split='train+test'"
            )
        chosen = {"train": list(splits)}
    else:
        roles = LAYOUT_SPLITS.get(layout, ("train",))
        given = {"train": config.train_split, "test": config.test_split}
        chosen = {role: _names_of(given.get(role), role) for role in roles}
    if config.test_split is not None and "test" not in chosen:
        raise DataError(f"test_split {config.test_split!r} goes with the layout 'train_test', got {layout!r}")
    wanted = [name for names in chosen.values() for name in names]
    if any(name not in splits for name in wanted):
        raise DataError(f"layout {layout!r} needs the splits {', '.join(wanted)}; {where} has {', '.join(splits)}")
    if len(set(wanted)) < len(wanted):
        raise DataError(f"each split of {where} can be taken once, got {', '.join(wanted)}")
    return chosen


def _names_of(option: str | None, default: str) -> list[str]:
    return [name.strip() for name in (default if option is None else option).split("+")]


def _joined(splits: list):
    return splits[0] if len(splits) == 1 else datasets.concatenate_datasets(splits)


# ---- labels


def _labels(split, where: str) -> list:
    """The label of every row; no image is decoded."""
    if isinstance(split, datasets.Dataset) and not len(split):
        return []
    if isinstance(split, datasets.Dataset):
        labels = split.with_format("arrow", columns=["label"])[:]["label"].to_pylist()
    else:
        labels = [row["label"] for row in split.select_columns(["label"])]
    feature = split.features["label"]
    if isinstance(feature, datasets.Value) and "string" in feature.dtype:
        missing = next((row for row, label in enumerate(labels) if label is None or not label.strip()), None)
        if missing is not None:
            raise DataError(f"{where}: row {missing} has the label {labels[missing]!r}; expected the name of a class")
        return labels
    num_classes = len(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return check_labels(labels, num_classes, where).tolist()


def _ordered_names(splits: Mapping[str, Any], labels: Mapping[str, list], where: str) -> dict[Any, str]:
    """Per label that occurs, its name; in class order."""
    occurring = {label for values in labels.values() for label in values}
    features = [split.features["label"] for split in splits.values()]
    if len({isinstance(feature, datasets.ClassLabel) for feature in features}) > 1:
        raise DataError(f"{where}: the labels of some splits have names, those of others have none")
    if not isinstance(features[0], datasets.ClassLabel):
        return {label: str(label) for label in sorted(occurring)}
    if any(feature.names != features[0].names for feature in features):
        raise DataError(f"{where}: the splits have different class names; expected one ClassLabel for all")
    return {label: name for label, name in enumerate(features[0].names) if label in occurring}


def _split_by_classes(part: _Part, names: Mapping[Any, str], config: HubImagesConfig, where: str):
    if len(names) < 2:
        raise DataError(
            f"{where} holds {len(names)} classes; expected at least two, one to train on and one to test on"
        )
    class_names = config.split(list(names.values()), keep_order=True)
    by_name = {name: label for label, name in names.items()}
    return _as_dict(
        {group: _renumber(part, {by_name[name]: name for name in class_names[group]}) for group in GROUP_SPLITS}
    )


def _splits_as_given(parts: Mapping[str, _Part], names: Mapping[Any, str], where: str, layout: str):
    for role, part in parts.items():
        if not part.labels:
            raise DataError(f"{where}: the split {role} is empty")
    train = set(parts["train"].labels)
    test = {label for role, part in parts.items() if role != "train" for label in part.labels}
    shared = sorted(names[label] for label in train & test)
    if shared:
        raise DataError(
            f"{len(shared)} classes of {where} are in both training and test ({some(shared)}); they must be disjoint. "
            "layout='classes' with train_split='train+test' puts the splits together and splits them anew by classes"
        )
    if layout == "query_gallery":
        lone = sorted(names[label] for label in set(parts["query"].labels) - set(parts["gallery"].labels))
        if lone:
            logger.warning("%s: %d query classes have no image in the gallery: %s", where, len(lone), some(lone))
    return _as_dict(
        {
            role: _renumber(
                part, {label: text for label, text in names.items() if label in (train if role == "train" else test)}
            )
            for role, part in parts.items()
        }
    )


def _renumber(part: _Part, names: Mapping[Any, str]):
    """The rows of some classes, with labels from 0 in the order of `names`."""
    split, labels = part
    number = {label: position for position, label in enumerate(names)}
    feature = datasets.ClassLabel(names=list(names.values()))
    features = datasets.Features({"image": datasets.Image(decode=False), "label": feature})
    if isinstance(split, datasets.IterableDataset):
        # functions of this module, not closures, so that workers can unpickle them
        split = split.filter(partial(_is_in, number), input_columns=["label"])
        return split.map(partial(_numbered, number), input_columns=["label"], features=features)
    kept = [row for row, label in enumerate(labels) if label in number]
    new = np.zeros(len(labels), dtype=np.int64)  # of rows that don't stay, any label
    new[kept] = [number[labels[row]] for row in kept]
    split = split.remove_columns("label").add_column("label", new, feature=feature)
    return split if len(kept) == len(labels) else split.select(kept)


def _is_in(number: Mapping[Any, int], label: Any) -> bool:
    return label in number


def _numbered(number: Mapping[Any, int], label: Any) -> dict[str, int]:
    return {"label": number[label]}


def _as_dict(splits: Mapping[str, Any]):
    streaming = any(isinstance(split, datasets.IterableDataset) for split in splits.values())
    return datasets.IterableDatasetDict(splits) if streaming else datasets.DatasetDict(splits)
