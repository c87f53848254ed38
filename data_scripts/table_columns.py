"""Columns of tables: which holds the images, which the classes, and which of the others go along.

Nothing here imports torch or `datasets`.
"""

import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..names.registry import nearest
from .data_errors import DataError


__all__ = [
    "IMAGE_NAMES",
    "LABEL_NAMES",
    "RESERVED_COLUMNS",
    "SPLIT_NAMES",
    "Value",
    "alike_column",
    "check_column",
    "choose_column",
    "free_name",
    "plain_value",
    "say_mixed",
    "typed_column",
]

logger = logging.getLogger(__name__)

Value = str | int | float | None
"""What a further column holds."""
IMAGE_NAMES = (
    ("image", "file_name", "filename", "file", "path"),
    ("image_path", "image_file", "filepath", "file_path", "photo", "picture", "img"),
)
LABEL_NAMES = (
    ("label", "class", "class_name"),
    ("product", "category"),
    ("product_id", "item", "item_id"),
    ("sku",),
)
"""Names by which a column is found; the first line of names of which there is one decides."""
SPLIT_NAMES = (("split",),)
RESERVED_COLUMNS = frozenset(
    {"key", "id", "class_name", "similarity", "embedding", "image", "label", "content", "path"}
    | {"vptsp_content", "vptsp_source"}
)
"""Names that data sets, stores, indexes and results give a meaning of their own."""
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")


def choose_column(
    option: str, given: str | None, columns: Sequence[str], names: Iterable[Sequence[str]], where: str
) -> str | None:
    """The column that an option names, or the one whose name says what it is.

    Args:
        option: Name of the option, for errors.
        given: Its value; None to look.
        columns: All columns.
        names: As `LABEL_NAMES`; capital letters are the same.
        where: File, for errors.

    Returns:
        Its name; None where it was not given and there is none.

    Raises:
        DataError: there is none of the name that was given, or several could be meant.
    """
    shown = ", ".join(map(str, columns))
    if given is not None:
        if given not in columns:
            hint = nearest(given, columns, most=1)
            raise DataError(f"{where}: there is no {option} {given!r}; the columns are {shown}{hint}")
        return given
    for line in names:
        found = [column for column in columns if str(column).strip().lower() in line]
        if len(found) > 1:
            raise DataError(
                f"{where}: {option} could be {' or '.join(map(repr, found))}: say which (the columns are {shown})"
            )
        if found:
            return found[0]
    return None


def free_name(column: str) -> str:
    """The name under which a further column goes along: its own, unless that is reserved."""
    return f"table_{column}" if column in RESERVED_COLUMNS else column


def plain_value(value: Any) -> Value:
    """A value of a table as text or number; None for nothing, NaN among it.

    Raises:
        TypeError: it holds other values, such as a list.
    """
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if value is None or value != value:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple, dict, set, bytes)) or hasattr(value, "__array__"):
        raise TypeError(f"no text and no number: {type(value).__name__}")
    return str(value)  # dates, decimals


def typed_column(values: Sequence[str]) -> list[Value]:
    """A column of text as integers or numbers, if every value is written as one; nothing becomes None.

    Codes keep their leading zeros, as a column with such a value is text.

    >>> typed_column(["3", "", "10"]), typed_column(["007", "10"]), typed_column(["1.50", "2"])
    ([3, None, 10], ['007', '10'], [1.5, 2.0])
    """
    there = [value for value in values if value]
    for pattern, kind in ((_INTEGER, int), (_NUMBER, float)):
        if there and all(map(pattern.fullmatch, there)):
            return [kind(value) if value else None for value in values]
    return [value or None for value in values]


def alike_column(values: Sequence[Any], column: str, name: str, place: Callable[[int], str]) -> list | None:
    """Values of one type: numbers, or text where some are no numbers; None for a column of others, which is said."""
    try:
        plain = [plain_value(value) for value in values]
    except TypeError:
        logger.warning("%s: the column %r holds neither text nor numbers, left out", name, column)
        return None
    kinds = {type(value) for value in plain if value is not None}
    for row, value in enumerate(plain):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise DataError(f"{place(row)}: the column {column!r} holds {value}, more than 64 bits: write it as text")
    if kinds <= {int} or kinds <= {float} or kinds <= {str}:
        return plain
    to = float if kinds <= {int, float} else str
    return [None if value is None else to(value) for value in plain]


def check_column(name: Any, values: Sequence[Any], count: int, where: str) -> None:
    """Check a further column.

    Raises:
        DataError: it has not `count` values, one is neither text, number nor None, or its name is reserved.
    """
    if not isinstance(name, str) or not name or name in RESERVED_COLUMNS:
        reserved = ", ".join(sorted(RESERVED_COLUMNS))
        raise DataError(f"{where}: a column can't be called {name!r} (reserved are {reserved})")
    if len(values) != count:
        raise DataError(f"{where}: the column {name!r} has {len(values)} values for {count} images")
    for row, value in enumerate(values):
        if value is not None and type(value) not in (str, int, float):
            raise DataError(
                f"{where}: the column {name!r} must hold text, numbers or None, got {value!r} in row {row}"
            )


def say_mixed(
    values: Sequence[Any], kept: Sequence[Value], column: str, place: Callable[[int], str], typed: bool
) -> None:
    """Say of a column with numbers that it is text, as filters and sorting notice, and which row makes it so.

    Args:
        values: As the table holds them.
        kept: As they go along.
        column: Its name.
        place: File and line of a row.
        typed: The table knows no types, and so codes and names are numbers too: said only where most are numbers.
    """
    if not any(isinstance(value, str) for value in kept):
        return
    numbers = [row for row, value in enumerate(values) if _is_number(value)]
    others = [row for row, value in enumerate(kept) if value is not None and not _is_number(values[row])]
    if numbers and others and (not typed or len(numbers) >= len(others)):
        logger.warning(
            "%s: the column %r is text, no numbers to compare, as it holds %s here (so do %d of %d rows) and %s at %s",
            place(others[0]),
            column,
            repr(values[others[0]]),
            len(others),
            len(values),
            repr(values[numbers[0]]),
            place(numbers[0]),
        )


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, or text that could be one, with leading zeros too."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
