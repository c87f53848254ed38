"""Writing files so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path


TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def atomic_path(path):
    """A path beside `path` to write to. It takes the place of `path` when the block ends, and vanishes if it raises.

    Args:
        path: The file to write or to replace; its folder must exist.

    Yields:
        `Path` of a file that is not there yet, hidden, ending in `.tmp`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        with temporary.open("rb+") as stream:  # what is renamed must be on the disk before its name is
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file (UTF-8) in one go."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def portable_path(path, folder):
    """How a file in `folder` names `path`: relative if both lie in the same parent folder, so that they can be moved.

    Args:
        path: Local path, or a name on the Hub; None stays None.
        folder: Where the name will be written.

    Returns:
        Text; a Hub name as it is. [`resolve_path`] reads it back.
    """
    if path is None or not Path(path).exists():
        return None if path is None else str(path)
    path, folder = Path(path).resolve(), Path(folder).resolve()
    if folder.parent in (path, *path.parents):
        return f"./{Path(os.path.relpath(path, folder)).as_posix()}"
    return str(path)


def resolve_path(name, folder):
    """What a name written by [`portable_path`] stands for, as text."""
    if name is not None and name.startswith("./"):
        return str((Path(folder) / name).resolve())
    return name


__all__ = ["TEMPORARY_SUFFIX", "atomic_path", "portable_path", "resolve_path", "write_text"]
