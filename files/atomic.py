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
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder):
    """Bring renamings to the disk in their order, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path, text):
    """Write a text file (UTF-8) in one go."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


__all__ = ["TEMPORARY_SUFFIX", "atomic_path", "write_text"]
