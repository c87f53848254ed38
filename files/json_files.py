"""Reading JSON so that nothing in it is passed over."""

from __future__ import annotations

import json
from pathlib import Path


class JsonError(ValueError):
    """A file that is not JSON, or not what was expected. The message names it."""


def read_json(path):
    """What a JSON file (UTF-8) holds.

    Raises:
        OSError: the file can't be read.
        JsonError: it is not JSON, nested too deeply to be read, or has a key twice; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise JsonError(f"{path} is not JSON: {error}") from error


def read_json_object(path, what="a JSON object") -> dict:
    """The object that a JSON file (UTF-8) holds.

    Args:
        path: The file.
        what: What the object should be, for the error.

    Raises:
        OSError: the file can't be read.
        JsonError: as of [`read_json`], or it is no object.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise JsonError(f"{path} must hold {what}, got a {type(values).__name__}")
    return values


def without_duplicates(pairs):
    """A JSON object, as `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: a key is there twice, of which the last would win.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        seen = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r} is there twice")
    return values


__all__ = ["JsonError", "read_json", "read_json_object", "without_duplicates"]
