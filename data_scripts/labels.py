"""The one rule for labels: an integer of 0..C-1 for every image, C the number of classes. Nothing else is a label.

Nothing here imports torch or `datasets`.
"""

import re
from typing import Any

import numpy as np

from .data_errors import DataError


__all__ = ["NO_CLASS", "UNLABELLED", "check_class_name", "check_label", "check_labels"]

NO_CLASS = ("nan", "NaN", "null", "NULL", "None", "<NA>")
"""What tools write in place of nothing: no names of classes."""
UNLABELLED = "unlabelled"
"""The class of images whose class nobody knows, in prepared tables and in the record of a run's splits."""
_NEGATIVE = re.compile(r"-\d+")


def check_class_name(name: str | None, where: str, may_lack: bool = False) -> None:
    """Check the name of a class, where labels are text.

    Args:
        name: What stands in place of it.
        where: What to call the row in errors.
        may_lack: Let rows without a class pass.

    Raises:
        DataError: it is empty, a negative integer or one of `NO_CLASS`, or has a line break.
    """
    if name is None or not name.strip():
        if may_lack:
            return
        raise DataError(f"{where} has the label {name!r}; expected the name of a class")
    text = name.strip()
    if text in NO_CLASS or _NEGATIVE.fullmatch(text):
        instead = "leave it empty" if may_lack else "leave the row out"
        raise DataError(
            f"{where} has the label {name!r}, which means no class in many tools: {instead} or name the class"
        )
    if len(text.splitlines()) > 1:
        raise DataError(f"{where} has the label {name!r}, with a line break in it (a quotation mark too many?)")


def check_label(label: Any, num_classes: int | None, where: str) -> int:
    """One label as an int.

    Args:
        label: What stands in place of a label.
        num_classes: C; None where it is not known.
        where: What to call the row in errors.

    Raises:
        DataError: it is missing, not an integer (bools and text are none), negative, or not below C.
    """
    is_integer = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
    if is_integer and 0 <= label < (2**63 if num_classes is None else num_classes):
        return int(label)
    label = label.item() if isinstance(label, np.generic) else label
    expected = "an integer >= 0" if num_classes is None else f"0..{num_classes - 1}"
    raise DataError(f"{where} has the label {label!r}; expected {expected}")


def check_labels(labels: Any, num_classes: int | None = None, where: str = "labels") -> np.ndarray:
    """Labels as an array.

    Args:
        labels: n labels: a sequence, an array of numpy, a tensor on the CPU, or a column of Arrow.
        num_classes: C; None where it is not known.
        where: What to call them in errors.

    Returns:
        `(n,)` int64.

    Raises:
        DataError: a label is not what `check_label` takes (the message names the row and the value), or they are not
            one-dimensional.
    """
    if hasattr(labels, "null_count"):  # of Arrow, whose missing values would become numbers in numpy
        labels = labels.to_pylist() if labels.null_count else labels.to_numpy()
    elif hasattr(labels, "__array__"):
        labels = np.asarray(labels)
    if not isinstance(labels, np.ndarray):
        labels = list(labels)
    elif labels.ndim != 1:
        raise DataError(f"{where} must be one-dimensional, got shape {labels.shape}")
    rows = range(len(labels))
    if isinstance(labels, np.ndarray) and np.issubdtype(labels.dtype, np.integer):
        most = np.iinfo(np.int64).max if num_classes is None else num_classes - 1
        rows = np.flatnonzero((labels < 0) | (labels > most))[:1]
    for row in rows:
        check_label(labels[row], num_classes, f"{where}: row {row}")
    return np.array(labels, dtype=np.int64)
