"""Classes of the training side that are kept apart for choosing the best epoch, so that test classes are not used."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import datasets
import numpy as np

from .class_split import split_classes
from .data_errors import DataError


__all__ = ["split_off_validation"]


def split_off_validation(
    splits: Mapping[str, Any], share: float, class_split: str = "first", split_seed: int = 0
) -> datasets.DatasetDict:
    """Split the training classes into those that train and those of `validation`.

    Args:
        splits: Of `load_splits`, as tables.
        share: Of the training classes, 0 < share < 1; `floor(C * share)` validate.
        class_split, split_seed: Which; see `split_classes`.

    Returns:
        The splits with a smaller `train`, and with `validation`, each with labels of its own from 0.

    Raises:
        DataError: fewer than two classes are left for either, or `class_split` is `seen`.
    """
    if class_split == "seen":
        raise DataError("validation_share keeps classes apart, but with class_split 'seen' all train and test")
    train = splits["train"]
    names = train.features["label"].names
    count = math.floor(len(names) * Fraction(str(share)))
    if not 2 <= count <= len(names) - 2:
        raise DataError(
            f"validation_share {share} of {len(names)} training classes gives {len(names) - count} for training and "
            f"{count} for validation; expected at least two of each"
        )
    chosen = split_classes(names, test_share=share, class_split=class_split, split_seed=split_seed, keep_order=True)
    labels = np.asarray(train.with_format("numpy", columns=["label"])[:]["label"])
    parts = {
        name: _with_classes(train, labels, names, own)
        for name, own in zip(("train", "validation"), chosen, strict=True)
    }
    return datasets.DatasetDict({**parts, **{name: part for name, part in splits.items() if name != "train"}})


def _with_classes(table, labels, names, own):
    """Rows of some of the classes, with these classes alone. No image is copied: rows are selected last."""
    number = {name: label for label, name in enumerate(own)}
    new = np.array([number.get(name, -1) for name in names], dtype=np.int64)[labels]
    order = table.column_names
    feature = datasets.ClassLabel(names=own)
    table = table.remove_columns("label").add_column("label", new, feature=feature).select_columns(order)
    return table.select(np.flatnonzero(new >= 0))
