"""Writing files so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import json
import math
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
        sync_path(temporary)  # what is renamed must be on the disk before its name is
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


def write_json(path, value, indent=2):
    """Write a JSON file (UTF-8) in one go, readable by every JSON reader.

    Args:
        path: The file.
        value: Dicts, lists, tuples, strings, numbers, booleans and None. JSON has no NaN and no infinities: such
            numbers (a score that there is none of) are written as `null`.
        indent: Spaces, or None for one line.

    Raises:
        TypeError: it holds something else.
    """
    write_text(path, json.dumps(json_value(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def json_value(value):
    """The same, with None in place of every number that JSON does not know."""
    if isinstance(value, dict):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync_path(path):
    """Wait until a file's contents, or the list of a folder's files, are on the disk."""
    path = Path(path)
    if path.is_dir():
        _sync_folder(path)
    else:
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())


__all__ = ["TEMPORARY_SUFFIX", "atomic_path", "json_value", "sync_path", "write_json", "write_text"]
