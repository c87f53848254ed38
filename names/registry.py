"""One kind of registry for everything that configurations call by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, MutableMapping
from itertools import islice
from typing import Generic, TypeVar


Entry = TypeVar("Entry")
_MANY = 5000
"""Texts whose likeness with another is computed within a second."""


def near_names(name, known: Iterable[str], most: int = 2, likeness: float = 0.6) -> list[str]:
    """At most so many of the known names, the most alike first; none that is less alike than that (0 to 1)."""
    return difflib.get_close_matches(str(name), [str(item) for item in known], n=most, cutoff=likeness)


def near_values(value, known: Iterable, likeness: float = 0.6) -> list:
    """At most two of the known values that may be meant: texts that are alike or contain it, in any case; or the
    numbers next to it."""
    if not isinstance(value, str):
        known = [item for item in known if not isinstance(item, str)]
        below, above = [item for item in known if item < value], [item for item in known if item > value]
        return [*([max(below)] if below else []), *([min(above)] if above else [])]
    value, texts = value.casefold(), {item.casefold(): item for item in known if isinstance(item, str)}
    candidates, middle = list(texts), len(value) // 2
    if len(candidates) > _MANY:  # where one half is as it is written
        candidates = [text for text in texts if value[:middle] in text or value[middle:] in text][:_MANY]
    containing = (text for text in texts if value and value in text)
    return [texts[text] for text in near_names(value, candidates, likeness=likeness) or islice(containing, 2)]


def did_you_mean(names: Iterable) -> str:
    """`; did you mean 'vpt' or 'vptsp_g'?`; nothing for no names."""
    shown = " or ".join(map(repr, names))
    return f"; did you mean {shown}?" if shown else ""


def nearest(name, known: Iterable[str], most: int = 2) -> str:
    """[`did_you_mean`] of the known names that are near, at most so many."""
    return did_you_mean(near_names(name, known, most))


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Names and what they stand for, in the order of registering: a mapping that only `register` changes.

    Args:
        kind: What the names are of, for errors: `loss`, `data set`.
        entries: Where they are kept; shipped code has dicts of its own, which know nothing of this class.
        also: What a name may be beside these, for the error of `find`: `or pml.<Name>`.

    Example:
        >>> metrics = Registry("metric")
        >>> @metrics.register("zero")
        ... def zero():
        ...     return 0
        >>> metrics.find("zero")()
        0
        >>> metrics.find("zeros")
        Traceback (most recent call last):
            ...
        ValueError: metric must be one of zero, got 'zeros'; did you mean 'zero'?
    """

    def __init__(self, kind: str, entries: MutableMapping[str, Entry] | None = None, also: str = ""):
        self.kind = kind
        self.entries = {} if entries is None else entries
        self._also = also and f" {also}"

    def register(self, name: str, entry: Entry | None = None):
        """Make an entry known: `register(name, entry)`, or `@register(name)` above a class or function.

        What is registered again under its name by the same file (a module that is run twice) takes its own place. Of
        an entry of several fields, the first says what it is: the class or function.

        Raises:
            ValueError: the name is another entry's.
        """

        def add(item: Entry) -> Entry:
            known = self.entries.get(name)
            if known is not None and _origin(known) != _origin(item):
                raise ValueError(f"there is a {self.kind} {name!r} already")
            self.entries[name] = item
            return item

        return add if entry is None else add(entry)

    def find(self, name: str) -> Entry:
        """What a name stands for.

        Raises:
            ValueError: nothing; the message lists all names, and near ones.
        """
        if name not in self.entries:
            known = ", ".join(self.entries) or "none"
            near = nearest(name, self.entries)
            raise ValueError(f"{self.kind} must be one of {known}{self._also}, got {name!r}{near}")
        return self.entries[name]

    def __getitem__(self, name):
        return self.entries[name]

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)


def _origin(entry):
    """What tells an entry from another of its name: the qualified name of a class or function, others by value."""
    made = entry[0] if isinstance(entry, tuple) else entry
    return getattr(made, "__qualname__", made)


__all__ = ["Registry", "near_names", "near_values", "nearest"]
