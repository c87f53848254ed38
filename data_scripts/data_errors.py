"""What the data code raises when a data set, a file or a list is not what it should be."""

from collections.abc import Iterable


__all__ = ["DataError", "ImageError", "some"]


class DataError(ValueError):
    """The data set on disk, or the way it was asked for, is wrong. The message names the folder, file or class."""


class ImageError(DataError):
    """One image can't be read. The message names the file and what was wrong with it."""


def some(names: Iterable[str], limit: int = 5) -> str:
    """Names for a message: the first few, quoted, and how many more there are."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
