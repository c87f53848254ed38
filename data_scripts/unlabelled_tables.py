"""Tables whose training rows have no labels, or not all of them."""

from collections.abc import Mapping

import datasets
import numpy as np

from .data_errors import DataError
from .given_splits import ColumnsConfig, choose_layout, choose_splits, joined_rows, split_given, with_class_names
from .labels import UNLABELLED, check_class_name


__all__ = ["split_unlabelled", "without_labels"]


def without_labels(rows: datasets.Dataset) -> datasets.Dataset:
    """Rows whose labels are all put away: one class, `UNLABELLED`."""
    feature = datasets.ClassLabel(names=[UNLABELLED])
    if "label" in rows.column_names:
        rows = rows.remove_columns("label")
    return rows.add_column("label", np.zeros(len(rows), dtype=np.int64), feature=feature)


def split_unlabelled(found: Mapping[str, datasets.Dataset], config: ColumnsConfig, where: str) -> datasets.DatasetDict:
    """Training and test sets from splits whose training rows may lack labels; those of a test need them.

    Args:
        found: As for `split_given`; training splits may have no column of labels.
        config: Options; `labels` is `none` or `partial`.
        where: What it is, for errors.

    Returns:
        As `split_given`; training rows without a label have the class `UNLABELLED`. Where nothing says which rows
        test, all train.

    Raises:
        DataError: as `split_given`; `partial` lacks a column of labels, or a class is called `UNLABELLED`.
    """
    layout = choose_layout(found, config, where)
    chosen = choose_splits(found, config, where, layout)
    parts = {
        name: _with_texts(found[name], f"{where}, split {name}", config.labels, trains=role == "train")
        for role, names in chosen.items()
        for name in names
    }
    if layout != "classes":
        return split_given(parts, config, where)
    all_train = f"with labels {config.labels} all rows of {where} train, as nothing says which of them test"
    config.refuse_split(f"classes, but {all_train}")
    if config.seen:
        raise DataError(f"class_split 'seen' splits labelled rows, but {all_train}")
    rows = joined_rows(list(parts.values()))
    return datasets.DatasetDict({"train": with_class_names(rows, where)})


def _with_texts(rows: datasets.Dataset, where: str, labels: str, trains: bool) -> datasets.Dataset:
    """The rows with names of classes, `UNLABELLED` where a training row has none."""
    if trains and labels == "none":
        values = [UNLABELLED] * len(rows)
    elif "label" not in rows.column_names:
        needs = "labels partial" if trains else "a test"
        raise DataError(f"{where}: {needs} needs a column of labels: give label_column, or labels none without a test")
    else:
        values = _class_names(rows, where, trains)
    if "label" in rows.column_names:
        rows = rows.remove_columns("label")
    return rows.add_column("label", values, feature=datasets.Value("string"))


def _class_names(rows: datasets.Dataset, where: str, may_lack: bool) -> list[str]:
    feature = rows.features["label"]
    values = rows.with_format("arrow", columns=["label"])[:].column("label").to_pylist()
    if isinstance(feature, datasets.ClassLabel):
        values = [None if value is None or value < 0 else feature.int2str(value) for value in values]
    names = [None if value is None or not str(value).strip() else str(value).strip() for value in values]
    for row, name in enumerate(names):
        check_class_name(name, f"{where}: row {row}", may_lack=may_lack)
        if name == UNLABELLED:
            raise DataError(
                f"{where}: row {row} has the class {name!r}, a name that stands for no class: leave it empty"
            )
    return [UNLABELLED if name is None else name for name in names]
