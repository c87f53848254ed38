"""One kind of registry for everything that configurations call by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, MutableMapping
from typing import Generic, TypeVar


Entry = TypeVar("Entry")


def nearest(name, known: Iterable[str]) -> str:
    """`; did you mean 'vpt' or 'vptsp_g'?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(str(name), [str(item) for item in known], n=2)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


class Registry(Generic[Entry]):
    """Names and what they stand for, in the order in which they were registered.

    Args:
        kind: What the names are of, for errors: `loss`, `data set`.
        entries: Where they are kept; shipped code has dicts of its own, which know nothing of this class.

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

    def __init__(self, kind: str, entries: MutableMapping[str, Entry] | None = None):
        self.kind = kind
        self.entries = {} if entries is None else entries

    def register(self, name: str, entry: Entry | None = None):
        """Make an entry known: `register(name, entry)`, or `@register(name)` above a class or function.

        What is registered again under its name by the same file (a module that is run twice) takes its own place.

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
            raise ValueError(f"{self.kind} must be one of {known}, got {name!r}{nearest(name, self.entries)}")
        return self.entries[name]

    def __contains__(self, name):
        return name in self.entries

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)

    def items(self):
        """Pairs of name and entry."""
        return self.entries.items()


def _origin(entry):
    """What tells an entry from another of its name: the qualified name of a class or function, others by value."""
    return getattr(entry, "__qualname__", entry)


__all__ = ["Registry", "nearest"]
