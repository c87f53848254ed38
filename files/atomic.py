"""Writing files so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import json
import logging
import math
import os
from contextlib import contextmanager
from pathlib import Path


TEMPORARY_SUFFIX = ".tmp"

logger = logging.getLogger(__name__)


@contextmanager
def atomic_path(path):
    """A path beside `path` to write to. It takes the place of `path` when the block ends, and vanishes if it raises.

    Args:
        path: The file to write or to replace; its folder must exist.

    Yields:
        `Path` of a file that is not there yet, hidden, ending in `.tmp`.

    Raises:
        OSError: it can't be written, as on a full disk; the error names the file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        sync_path(temporary)  # what is renamed must be on the disk before its name is
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error  # writing doesn't say which
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
            numbers (a score that there is none of) are written as `null`, and a warning names them.
        indent: Spaces, or None for one line.

    Raises:
        TypeError: it holds something else.
    """
    if names := _without_number(value):
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        verbs = "is no finite number and is" if len(names) == 1 else "are no finite numbers and are"
        logger.warning("%s: %s%s %s written as null", Path(path).name, ", ".join(names[:8]), more, verbs)
    write_text(path, json.dumps(json_value(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def json_value(value, replace=lambda number: None):
    """The same, with `replace(number)` in place of every number that JSON does not know."""
    if isinstance(value, dict):
        return {key: json_value(item, replace) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item, replace) for item in value]
    return replace(value) if isinstance(value, float) and not math.isfinite(value) else value


def _without_number(value, place=()):
    """Where a value holds numbers that JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return [".".join(place)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return [name for key, item in items for name in _without_number(item, (*place, str(key)))]


def sync_path(path):
    """Wait until a file's contents, or the list of a folder's files, are on the disk."""
    path = Path(path)
    if path.is_dir():
        _sync_folder(path)
    else:
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())


__all__ = ["TEMPORARY_SUFFIX", "atomic_path", "json_value", "sync_path", "write_json", "write_text"]
