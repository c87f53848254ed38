"""What the fields of argument classes may hold: the type that they are annotated with, finite numbers, a range."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from enum import Enum
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from .registry import nearest


class Bounds(NamedTuple):
    """A range of numbers.

    Attributes:
        low: The least.
        high: The largest.
        open_low: Whether `low` itself is out.
        open_high: Whether `high` itself is out.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def hold(self, value) -> bool:
        """Whether a number is in the range."""
        above = self.low < value if self.open_low else self.low <= value
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self):
        if self.high == math.inf:
            return f"{'>' if self.open_low else '>='} {self.low}"
        return f"in {'(' if self.open_low else '['}{self.low}, {self.high}{')' if self.open_high else ']'}"


NOT_NEGATIVE, POSITIVE = Bounds(0), Bounds(0, open_low=True)
AT_LEAST_ONE = Bounds(1)
SEED = Bounds(0, 2**32 - 1)
"""What NumPy takes as a seed."""


def check_fields(values: Mapping, hints: Mapping, bounds: Mapping | None = None, choices: Mapping | None = None):
    """Compare values with the annotations of their fields, and with their ranges.

    Args:
        values: Name -> value. Those without an annotation are not looked at.
        hints: Name -> annotation, as from `typing.get_type_hints`.
        bounds: Name -> [`Bounds`] of its numbers.
        choices: Name -> the words that it may be.

    Raises:
        ValueError: one is not what it must be; the message names it.
    """
    for name, value in values.items():
        if name in hints:
            check_value(name, value, hints[name], (bounds or {}).get(name), (choices or {}).get(name))


def check_value(name: str, value, hint, bounds: Bounds | None = None, choices: Collection[str] | None = None):
    """Compare one value; see [`check_fields`].

    Raises:
        ValueError: it is not what it must be.
    """
    kinds = _kinds(hint)
    if value is None and NoneType in kinds:
        return
    expected = [_expectation(kind, bounds, choices) for kind in kinds if kind is not NoneType]
    if any(accepts(value) for _, accepts in expected):
        return
    words = " or ".join(dict.fromkeys(text for text, _ in expected))
    if isinstance(value, Real) and not isinstance(value, bool) and words == "text":
        raise ValueError(f"{name} must be text, got the number {value!r}: put it in quotes")
    near = nearest(value, choices or _words_of(kinds), most=1) if isinstance(value, str) else ""
    raise ValueError(f"{name} must be {words}, got {value!r}{near}")


def from_text(value, hint):
    """A value for a field, from the text that a file or a command line gives it in; other values as they are.

    Text that is not what the field needs comes back as it is, for [`check_value`] to refuse.
    """
    kinds = _kinds(hint)
    if not isinstance(value, str) or str in kinds:
        return value
    if bool in kinds and value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(value)
            except ValueError:
                pass
    return value


def _kinds(hint) -> tuple:
    """What a union is of; an enumeration has its words, so that `str` beside it says nothing more."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(kind for kind in kinds if kind is not str) if any(map(_is_enum, kinds)) else kinds


def _is_enum(kind) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _words_of(kinds) -> list[str]:
    enums = [[item.value for item in kind] for kind in kinds if _is_enum(kind)]
    literals = [get_args(kind) for kind in kinds if get_origin(kind) is Literal]
    return [str(word) for words in (*enums, *literals) for word in words]


def _expectation(kind, bounds, choices):
    """What a type asks for, in words, and a function that says whether a value is that."""
    if kind in (int, float):
        number = Integral if kind is int else Real
        words = "an integer" if kind is int else ("a number" if bounds is None else "")
        words = words if bounds is None else f"{words} {bounds}".strip()
        return (
            words,
            lambda value: (
                isinstance(value, number)
                and not isinstance(value, bool)
                and math.isfinite(value)
                and (bounds is None or bounds.hold(value))
            ),
        )
    if kind is str and choices is not None:
        return f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices
    if _is_enum(kind) or get_origin(kind) is Literal:
        words = [item.value for item in kind] if _is_enum(kind) else get_args(kind)
        text = f"one of {', '.join(map(str, words))}"
        return text, lambda value: any(value == word and isinstance(value, type(word)) for word in words)
    if get_origin(kind) is list or kind is list:
        inner = [_expectation(part, bounds, choices) for item in get_args(kind) for part in _kinds(item)]
        words = " or ".join(text.replace("an integer", "integers").replace("a number", "numbers") for text, _ in inner)
        return (
            f"a list of {words}" if inner else "a list",
            lambda value: (
                isinstance(value, (list, tuple))
                and (not inner or all(any(accepts(item) for _, accepts in inner) for item in value))
            ),
        )
    plain = {bool: "true or false", dict: "a mapping"}
    kind = get_origin(kind) or kind
    if kind is str:  # a path is as good
        return "text", lambda value: isinstance(value, (str, os.PathLike))
    if kind is Any or not isinstance(kind, type):
        return "anything", lambda value: True
    return plain.get(kind, f"a {kind.__name__}"), lambda value: isinstance(value, kind)


__all__ = ["AT_LEAST_ONE", "NOT_NEGATIVE", "POSITIVE", "SEED", "Bounds", "check_fields", "check_value", "from_text"]
