"""Filters on columns: `class_name=mug`, `price<20`, or a dict of column -> value or values."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from ..names.registry import nearest
from .columns import check_texts


_WORD = re.compile(r"(.*?)(<=|>=|!=|=|<|>)(.*)", re.DOTALL)


class Condition(NamedTuple):
    """What an item must be like.

    Attributes:
        column: Name of a column, or `id`.
        operator: `=` (one of the values), `!=` (none of them, or no value at all), `<`, `<=`, `>` or `>=`.
        values: Texts, or numbers; one of them for an order.
    """

    column: str
    operator: str
    values: tuple


def parse_conditions(where, kinds):
    """Conditions that an item must all meet.

    Args:
        where: Dict of column -> value or list of values (one of them); or a text, or list of texts, such as
            `price<20` with one of = != < <= > >=. Several `=` of one column mean any of their values. None: none.
        kinds: Column -> `text`, `integer` or `number`, of all that can be asked for.

    Returns:
        List of [`Condition`].

    Raises:
        ValueError: there is no such column, or it holds another kind of value; the message names it.
    """
    if not where:
        return []
    if isinstance(where, str):
        where = [where]
    if isinstance(where, dict):
        found = [(name, "=", _as_list(values)) for name, values in where.items()]
    else:
        found = parse_words(where)
    conditions = []
    for name, operator, values in found:
        column = find_column(name, kinds)
        conditions.append(Condition(column, operator, _checked(column, operator, values, kinds[column])))
    return conditions


def _as_list(values):
    return list(values) if isinstance(values, (list, tuple, set, frozenset)) else [values]


def parse_words(words):
    """Columns, operators and lists of values of filters such as `price<20`.

    Raises:
        ValueError: one has none of the operators.
    """
    lists, orders = {}, []
    for word in words:
        match = _WORD.fullmatch(word)
        if match is None:
            raise ValueError(f"where must be COLUMN=VALUE, got {word!r} (there are = != < <= > >=)")
        name, operator, value = match[1].strip(), match[2], match[3]
        if operator in ("=", "!="):
            lists.setdefault((name.casefold(), operator), (name, operator, []))[2].append(value)
        else:
            orders.append((name, operator, [value]))
    return [*lists.values(), *orders]


def find_column(name, columns):
    """The column of this name, in any case.

    Raises:
        ValueError: there is none; the message names those that there are, and the nearest.
    """
    if name in columns:
        return name
    same = [column for column in columns if column.casefold() == str(name).casefold()]
    if len(same) == 1:
        return same[0]
    raise ValueError(f"there is no column {name!r}; the columns are {list(columns)}{nearest(name, columns)}")


def _checked(column, operator, values, kind):
    if kind == "text":
        if operator not in ("=", "!="):
            raise ValueError(f"{column} holds texts, which only = and != compare, got {column}{operator}{values[0]}")
        return tuple(check_texts(values, column))
    return tuple(_number(column, value) for value in values)


_LARGEST = 2**63


def _number(column, value):
    for kind in (int, float):
        try:
            number = kind(value) if isinstance(value, (str, kind)) and not isinstance(value, bool) else math.nan
        except ValueError:
            continue
        if isinstance(number, int) and not -_LARGEST <= number < _LARGEST:
            raise ValueError(f"{column} holds numbers of 64 bits, got {value!r}")
        if math.isfinite(number):
            return number
    raise ValueError(f"{column} holds numbers, got {value!r}")


__all__ = ["Condition", "find_column", "parse_conditions", "parse_words"]
