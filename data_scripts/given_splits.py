"""Data sets that come in splits, or in one table: which split does what, and labels that count from 0 on each side.

What a builder has found (per split a data set of `datasets`, with a column of images, one of labels and others) is
used split by split if training and test have different classes, or put together and split anew.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import datasets
import numpy as np

from .builder import ClassSplitConfig
from .class_folders import LAYOUT_SPLITS, LAYOUTS
from .class_split import asked_images
from .data_errors import DataError, some
from .dataset_options import ColumnOptions
from .labels import check_class_name, check_labels
from .listing import GROUP_SPLITS
from .table_columns import IMAGE_NAMES, LABEL_NAMES, choose_column, free_name


__all__ = [
    "ColumnsConfig",
    "LazySplits",
    "choose_layout",
    "choose_splits",
    "further_columns",
    "image_column_of",
    "joined_rows",
    "labels_of",
    "named_columns",
    "split_given",
    "split_names",
    "with_class_names",
]

logger = logging.getLogger(__name__)

_KINDS = ("string", "large_string", "bool", "int", "uint", "float")


@dataclass
class ColumnsConfig(ColumnOptions, ClassSplitConfig):
    """What such a data set is configured by; a builder's own class inherits it."""


class _Part(NamedTuple):
    """Rows of one or several splits, and the label of each."""

    rows: Any
    labels: list


class LazySplits(Mapping):
    """Splits that are made ready when they are asked for: one that no run takes need have no classes.

    Args:
        found: Per name what there is.
        prepare: Gives the data set of a name and what there is.
    """

    def __init__(self, found: Mapping[str, Any], prepare: Callable[[str, Any], Any]):
        self._found, self._prepare = found, prepare

    def __getitem__(self, name: str) -> Any:
        return self._prepare(name, self._found[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def split_given(found: Mapping[str, Any], config: ColumnsConfig, where: str):
    """Training and test sets from the splits that were found.

    Args:
        found: Per name a data set of `datasets` (all tables, or all streams) as `named_columns` gives it.
        config: Options.
        where: What it is, for errors.

    Returns:
        `DatasetDict` or `IterableDatasetDict`, see `load_splits`; further columns stay, those that all splits have.

    Raises:
        DataError: the layout is not what is there, classes are in training and test, or a label is missing.
    """
    if config.layout not in LAYOUTS:
        raise DataError(f"layout must be one of {', '.join(LAYOUTS)}, got {config.layout!r}")
    layout = choose_layout(found, config, where)
    chosen = choose_splits(found, config, where, layout)
    wanted = [name for names in chosen.values() for name in names]
    left = [name for name in found if name not in wanted]
    if left:
        logger.warning("%s: the splits %s are not part of the layout %r, ignored", where, some(left), layout)
    splits = _with_same_columns({name: found[name] for name in wanted}, where)
    labels = {name: labels_of(split, f"{where}, split {name}") for name, split in splits.items()}
    names = _ordered_names(splits, labels, where)
    parts = {
        role: _Part(joined_rows([splits[name] for name in of_role]), [x for name in of_role for x in labels[name]])
        for role, of_role in chosen.items()
    }
    if layout == "classes":
        return _split_by_classes(parts["train"], names, config, where)
    return _splits_as_given(parts, names, config, where, layout)


# ---- columns


def image_column_of(features: Mapping[str, Any], config: ColumnsConfig, where: str) -> str:
    """The column of images: the one that the options name, the only one of that kind, or one that is called so.

    Raises:
        DataError: there is none, or several could be meant.
    """
    given = config.image_column or _only(features, datasets.Image)
    found = choose_column("image_column", given, list(features), IMAGE_NAMES, where)
    if found is None:
        raise DataError(
            f"{where}: no column is called image, file or path: give image_column (of {', '.join(features)})"
        )
    return found


def named_columns(
    split, config: ColumnsConfig, where: str, image: str | None = None, label: str | None = None, labelled: bool = True
):
    """The images as `image`, the labels as `label`, and what goes along; nothing is decoded.

    Args:
        split: Data set of `datasets`.
        config: Options.
        where: What it is, for errors.
        image, label: The columns, where they are known already.
        labelled: Refuse a table without a column of labels.

    Raises:
        DataError: a column is not there, is of another kind, or is not known from its name.
    """
    features = dict(split.features if split.features is not None else split.resolve_features().features or {})
    image = image or image_column_of(features, config, where)
    label = label or choose_column("label_column", config.label_column, list(features), LABEL_NAMES, where)
    label = label or _only(features, datasets.ClassLabel)
    if label is None and labelled:
        names = ", ".join(features)
        raise DataError(f"{where}: no column is called label, class or product: give label_column (of {names})")
    if not isinstance(features[image], datasets.Image):
        raise DataError(f"{where}: image_column {image!r} must hold images (datasets.Image), got {features[image]}")
    kind = None if label is None else features[label]
    if (
        label is not None
        and not isinstance(kind, datasets.ClassLabel)
        and not (isinstance(kind, datasets.Value) and ("int" in kind.dtype or "string" in kind.dtype))
    ):
        raise DataError(f"{where}: label_column {label!r} must hold ClassLabel, integers or strings, got {kind}")
    others = further_columns(features, (image, label), where)
    if (image, label) != (config.image_column or "image", config.label_column or "label"):
        along = f"; along go {', '.join(others)}" if others else ""
        named = "" if label is None else " (class_name in stores and indexes)"
        logger.warning("%s: image_column is %r, label_column %r%s%s", where, image, label, named, along)
    # before anything else: a stream decodes images to rename their column, and would write them anew
    split = split.cast_column(image, datasets.Image(decode=False)).select_columns(
        [image, *([] if label is None else [label]), *others]
    )
    names = {image: "image", label: "label"} | {name: free_name(name) for name in others}
    changed = {old: new for old, new in names.items() if old not in (None, new)}
    for old in changed:  # by way of third names: they may be swapped
        split = split.rename_column(old, f"{old} before")
    for old, new in changed.items():
        split = split.rename_column(f"{old} before", new)
    return split


def _only(features, kind: type) -> str | None:
    """The one column of a kind, if there is one."""
    found = [name for name, feature in (features or {}).items() if isinstance(feature, kind)]
    return found[0] if len(found) == 1 else None


def further_columns(features: Mapping[str, Any], taken: Iterable[str | None], where: str) -> list[str]:
    """The columns of text and numbers beside those that are taken; what others are left out is said."""
    rest = {name: feature for name, feature in features.items() if name not in taken}
    kept = [name for name, kind in rest.items() if isinstance(kind, datasets.Value) and kind.dtype.startswith(_KINDS)]
    if left := [name for name in rest if name not in kept]:
        logger.warning("%s: the columns %s hold neither text nor numbers, left out", where, some(left))
    for name in kept:
        if name != free_name(name):
            logger.warning("%s: the column %r goes along as %r", where, name, free_name(name))
    return kept


def _with_same_columns(splits: dict[str, Any], where: str) -> dict[str, Any]:
    """The splits, with the further columns that all of them have, and of one kind."""
    every = [split.features for split in splits.values()]
    common = [
        name
        for name in every[0]
        if name in ("image", "label") or all(features.get(name) == every[0][name] for features in every)
    ]
    if left := sorted({name for features in every for name in features} - set(common)):
        logger.warning("%s: the splits don't have the same columns %s, left out", where, some(left))
        return {name: split.select_columns(common) for name, split in splits.items()}
    return splits


# ---- splits


def choose_layout(splits: Mapping[str, Any], config: ColumnsConfig, where: str) -> str:
    """The layout that splits of these names have: `classes` where nothing says which rows test."""
    if config.layout != "auto":
        layout = config.layout
    elif config.test_split is not None:
        layout = "train_test"
    elif config.query_split is not None or config.gallery_split is not None:
        layout = "query_gallery"
    else:
        train = split_names(config.train_split, "train")
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


def choose_splits(splits: Mapping[str, Any], config: ColumnsConfig, where: str, layout: str) -> dict[str, list[str]]:
    """The splits that a layout takes, by what they are for; of the layout `classes`, `train` are all of them."""
    if layout == "classes" and config.train_split is None:
        if len(splits) > 1:
            raise DataError(
                f"{where} has the splits {', '.join(splits)}: give train_split and test_split, or the splits whose "
                "classes are to be split anew, as in layout='classes' with train_split='train+test' (query_split and "
                "gallery_split are for queries against a gallery)"
            )
        chosen = {"train": list(splits)}
    else:
        roles = LAYOUT_SPLITS.get(layout, ("train",))
        chosen = {role: split_names(getattr(config, f"{role}_split"), role) for role in roles}
    for of_layout, roles in LAYOUT_SPLITS.items():
        for role in roles:
            given = getattr(config, f"{role}_split")
            if given is not None and role not in chosen:
                raise DataError(f"{role}_split {given!r} goes with the layout {of_layout!r}, got {layout!r}")
    wanted = [name for names in chosen.values() for name in names]
    if any(name not in splits for name in wanted):
        raise DataError(f"layout {layout!r} needs the splits {', '.join(wanted)}; {where} has {', '.join(splits)}")
    if len(set(wanted)) < len(wanted):
        raise DataError(f"each split of {where} can be taken once, got {', '.join(wanted)}")
    return chosen


def split_names(option: str | None, default: str) -> list[str]:
    """The splits that an option names, with `+` between several."""
    return [name.strip() for name in (default if option is None else option).split("+")]


def joined_rows(splits: list):
    """The rows of several splits as one data set."""
    return splits[0] if len(splits) == 1 else datasets.concatenate_datasets(splits)


# ---- labels


def labels_of(split, where: str) -> list:
    """The label of every row; no image is decoded."""
    if isinstance(split, datasets.Dataset) and not len(split):
        return []
    if isinstance(split, datasets.Dataset):
        labels = split.with_format("arrow", columns=["label"])[:]["label"].to_pylist()
    else:
        labels = [row["label"] for row in split.select_columns(["label"])]
    feature = split.features["label"]
    if isinstance(feature, datasets.Value) and "string" in feature.dtype:
        for row, label in enumerate(labels):
            check_class_name(label, f"{where}: row {row}")
        return labels
    num_classes = len(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return check_labels(labels, num_classes, where).tolist()


def with_class_names(rows: datasets.Dataset, where: str) -> datasets.Dataset:
    """Rows of `named_columns` whose labels are numbers: texts become a `ClassLabel` of the sorted classes.

    Raises:
        DataError: a label is empty.
    """
    feature = rows.features["label"]
    if not (isinstance(feature, datasets.Value) and "string" in feature.dtype):
        return rows
    labels = labels_of(rows, where)
    return _renumber(_Part(rows, labels), {name: name for name in sorted(set(labels))})


def _ordered_names(splits: Mapping[str, Any], labels: Mapping[str, list], where: str) -> dict[Any, str]:
    """Per label that occurs, its name; in class order."""
    occurring = {label for values in labels.values() for label in values}
    features = [split.features["label"] for split in splits.values()]
    if len({isinstance(feature, datasets.ClassLabel) for feature in features}) > 1:
        raise DataError(f"{where}: the labels of some splits have names, those of others have none")
    if len({type(label) for label in occurring}) > 1:
        raise DataError(f"{where}: the labels of some splits are text, those of others numbers")
    if not isinstance(features[0], datasets.ClassLabel):
        return {label: str(label) for label in sorted(occurring)}
    if any(feature.names != features[0].names for feature in features):
        raise DataError(f"{where}: the splits have different class names; expected one ClassLabel for all")
    return {label: name for label, name in enumerate(features[0].names) if label in occurring}


def _split_by_classes(part: _Part, names: Mapping[Any, str], config: ColumnsConfig, where: str):
    if len(names) < 2:
        raise DataError(
            f"{where} holds {len(names)} classes; expected at least two, one to train on and one to test on"
        )
    if config.seen:
        return _split_by_images(part, names, config, where)
    class_names = config.split(list(names.values()), keep_order=True)
    by_name = {name: label for label, name in names.items()}
    return _as_dict(
        {
            group: _renumber(part, {by_name[name]: name for name in class_names[group]})
            for group in GROUP_SPLITS
            if class_names[group]
        }
    )


def _split_by_images(part: _Part, names: Mapping[Any, str], config: ColumnsConfig, where: str):
    """All classes on both sides, each asked for by some of its images."""
    if isinstance(part.rows, datasets.IterableDataset):
        raise DataError(f"class_split 'seen' takes single rows of {where}, which a stream can't: leave streaming out")
    rows_of: dict[Any, list[int]] = {label: [] for label in names}
    for row, label in enumerate(part.labels):
        rows_of[label].append(row)
    asked = {
        rows[place]
        for label, rows in rows_of.items()
        for place in asked_images(len(rows), names[label], config.test_share, config.split_seed)
    }
    if not asked:
        raise DataError(
            f"class_split 'seen' asks for a class by another image of it, but each of the {len(names)} classes of "
            f"{where} has one only; test_share 0 trains without a test"
        )
    sides = {"train": [row for row in range(len(part.labels)) if row not in asked], "query": sorted(asked)}
    parts = {
        side: _renumber(_Part(part.rows.select(rows), [part.labels[row] for row in rows]), names)
        for side, rows in sides.items()
    }
    return _as_dict(parts | {"gallery": parts["train"]})


def _splits_as_given(
    parts: dict[str, _Part], names: Mapping[Any, str], config: ColumnsConfig, where: str, layout: str
):
    if config.seen and layout == "train_test":
        parts = {"train": parts["train"], "query": parts["test"], "gallery": parts["train"]}
    for role, part in parts.items():
        if not part.labels:
            raise DataError(f"{where}: the split {role} is empty")
    train = set(parts["train"].labels)
    test = {label for role, part in parts.items() if role != "train" for label in part.labels}
    shared = sorted(names[label] for label in train & test)
    if shared and not config.seen:
        raise DataError(
            f"{len(shared)} classes of {where} are in both training and test ({some(shared)}); they must be disjoint. "
            "layout='classes' with train_split='train+test' puts the splits together and splits them anew by classes; "
            "class_split='seen' tests known classes, by other images of them"
        )
    if "query" in parts:
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
    features = datasets.Features({**split.features, "label": feature})
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
