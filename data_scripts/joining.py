"""Two data sets or more as one, whose classes are numbered anew."""

import logging
from collections.abc import Mapping
from typing import Literal

import datasets
import numpy as np

from .data_errors import DataError, some
from .given_splits import ColumnsConfig, named_columns, with_class_names
from .labels import check_labels
from .torch_dataset import ImageDataset


__all__ = ["join_datasets"]

logger = logging.getLogger(__name__)


def join_datasets(
    parts: Mapping[str, datasets.Dataset | ImageDataset], classes: Literal["apart", "merged"] = "apart"
) -> datasets.Dataset | ImageDataset:
    """Join data sets whose labels mean different classes, which simply concatenated would become the same ones.

    Rows come in the order of the parts, classes too; only classes that have an image get a label.

    Args:
        parts: By name, two or more: all `datasets.Dataset`, of which each has a column of images and one of labels (as
            `VPTSPTrainer` takes them), or all [`ImageDataset`] with the same transform and options.
        classes: `apart` keeps classes of different parts apart, whatever they are called: they become `part/class`.
            `merged` takes classes of the same name for the same class.

    Returns:
        One of the same kind, with labels 0..C-1 and a `ClassLabel` of their names. Of tables, further columns go along
        that all parts have.

    Raises:
        DataError: there are fewer than two parts, of another kind or of several, or with different transforms or
            options; a name is empty or has a `/`; a column is not there or can't be told by its name; or labels to be
            merged are numbers without names.
    """
    if classes not in ("apart", "merged"):
        raise DataError(f"classes must be apart or merged, got {classes!r}")
    if not isinstance(parts, Mapping) or len(parts) < 2:
        raise DataError(f"join_datasets takes two or more data sets by name, got {some(list(parts)) or 'none'}")
    for name in parts:
        if not isinstance(name, str) or not name.strip() or "/" in name:
            raise DataError(f"the name of a data set to join must be text without '/', got {name!r}")
    kinds = {type(part) for part in parts.values()}
    if kinds == {ImageDataset}:
        return _join_images(parts, classes)
    if kinds == {datasets.Dataset}:
        rows = {name: named_columns(part, ColumnsConfig(), name) for name, part in parts.items()}
        return _join_tables(rows, classes).cast_column("image", datasets.Image())
    found = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise DataError(f"join_datasets takes tables of the library datasets or ImageDatasets, all of a kind, got {found}")


def _join_images(parts, classes):
    """Join `ImageDataset`s."""
    options = {
        name: {
            "transform": part.transform,
            "skip_corrupt": part.skips_corrupt,
            "max_image_pixels": part.max_image_pixels,
        }
        for name, part in parts.items()
    }
    first, expected = next(iter(options.items()))
    for name, own in options.items():
        for option, value in own.items():
            if value is not expected[option] and repr(value) != repr(expected[option]):
                raise DataError(
                    f"{option} of the data sets to join must be the same, got {expected[option]} for {first} and "
                    f"{value} for {name}"
                )
    rows = {
        name: part.hf_dataset.rename_columns({part.image_column: "image", part.label_column: "label"})
        for name, part in parts.items()
    }
    return ImageDataset(_join_tables(rows, classes), **expected)


def _join_tables(rows, classes):
    """Join tables with columns `image` and `label`."""
    columns = _common_columns(rows)
    numbers, joined = {}, []
    for name, table in rows.items():
        table = with_class_names(table.with_format(None), name)
        feature = table.features["label"]
        names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        if names is None and classes == "merged":
            raise DataError(f"{name}: the labels are numbers, not names, so that classes can't be merged by them")
        column = table.with_format("arrow", columns=["label"])[:].column("label")
        labels = check_labels(column, None if names is None else len(names), f"labels of {name}")
        new = np.empty_like(labels)
        for label in np.unique(labels).tolist():
            title = str(label) if names is None else names[label]
            title = f"{name}/{title}" if classes == "apart" else title
            new[labels == label] = numbers.setdefault(title, len(numbers))
        joined.append((table, new))
    feature = datasets.ClassLabel(names=list(numbers))
    tables = [
        table.remove_columns("label").add_column("label", new, feature=feature).select_columns(columns)
        for table, new in joined
    ]
    return datasets.concatenate_datasets(tables)


def _common_columns(rows):
    """`image`, `label` and further columns of one type that all tables have; it is said which are left out."""
    first, *others = (table.features for table in rows.values())
    kept = [name for name in first if all(other.get(name) == first[name] for other in others)]
    kept = ["image", "label", *(name for name in kept if name not in ("image", "label"))]
    left = sorted({name for table in rows.values() for name in table.features} - set(kept))
    if left:
        logger.warning("columns that not all of %s have alike are left out: %s", ", ".join(rows), ", ".join(left))
    return kept
