"""Paths as people give them: what no file system can have is refused, and `~` stands for the home folder.

Nothing here imports torch or `datasets`.
"""

import argparse
import os
import unicodedata
from pathlib import Path

from .data_errors import DataError


__all__ = ["check_folder_to_write", "other_form", "place", "usable_path"]

# What Linux, macOS and Windows take, in bytes of UTF-8.
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 4095


def usable_path(given: str | os.PathLike) -> Path:
    """A path in which `~` and `~user` are replaced by the home folder.

    Raises:
        DataError: no file can have it (it is empty, too long, not valid UTF-8 or holds a NUL), or there is no such
            user.
    """
    path = Path(given)
    if not str(given):
        raise DataError("the path is empty")
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise DataError(f"{str(given)!r}: there is no user {path.parts[0][1:]!r} with a home folder") from error
    try:
        sizes = [len(part.encode()) for part in path.parts]
    except UnicodeEncodeError as error:
        raise DataError(
            f"the path {str(given)!r} is not valid UTF-8, and can't be stored in a file: rename it"
        ) from error
    if "\0" in str(path):
        raise DataError(f"the path {str(given)!r} holds a NUL character, which no file name can")
    if max(sizes, default=0) > _MAX_NAME_BYTES or sum(sizes) + len(sizes) > _MAX_PATH_BYTES:
        raise DataError(
            f"the path {str(given)[:60]!r}... of {len(str(given)):,} characters is longer than any file's: names take "
            f"{_MAX_NAME_BYTES} bytes and paths {_MAX_PATH_BYTES}"
        )
    return path


def place(word: str) -> str:
    """`type` of an option of `argparse` that is a path; an address (`http://...`) stays as it is."""
    try:
        return word if "://" in word else str(usable_path(word))
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def check_folder_to_write(given: str | os.PathLike, option: str) -> None:
    """Check that a folder is there or can be made.

    Raises:
        DataError: something else has its name or is above it, or it can't be written to.
    """
    try:
        folder = usable_path(given).absolute()
    except DataError as error:
        raise DataError(f"{option} must be a path: {error}") from error
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "can't be written to" if there.is_dir() else "is no folder"
        raise DataError(f"{option} must be a folder or a new one, got {folder}: {there} {what}")


def other_form(file: str) -> str:
    """What is said of a file that is not there, where one of the same letters is: accents are written in two ways.

    Args:
        file: Its path.

    Returns:
        The end of an error; empty where there is no such file.
    """
    folder, name = os.path.split(file)
    if not os.path.isdir(folder):  # noqa: PTH112 (that of Path raises where a name is too long)
        return ""
    same = unicodedata.normalize("NFC", name)
    found = next((other for other in os.listdir(folder) if unicodedata.normalize("NFC", other) == same), None)  # noqa: PTH208
    return (
        "" if found is None else f"; there is {found!a}, of the same letters in another form of Unicode than {name!a}"
    )
