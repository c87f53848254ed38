"""The small JSON files that say what a store or an index is: dataclasses, with paths that can be moved."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path

from ..data_scripts.errors import DataError, some
from ..files.atomic import write_json


def save_record(path, record):
    """Write a dataclass with `model` (dict with a `name`, or None) and `image_root` as JSON, in one go.

    Both may be local paths; these are written relative to the file's folder where both lie in the same parent folder,
    so that folder can be moved as a whole.
    """
    values, folder = asdict(record), Path(path).parent
    values["image_root"] = _portable(record.image_root, folder)
    if record.model is not None:
        values["model"]["name"] = _portable(record.model["name"], folder)
    write_json(path, values)


def load_record(cls, path, what):
    """Read what [`save_record`] wrote.

    Args:
        cls: The dataclass; its default `format_version` is the only one it reads.
        path: The file.
        what: What its folder would be, for errors.

    Raises:
        DataError: there is no such file, or it is not of this format.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path.parent} is no {what}: it has no {path.name}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    expected = {item.name: item.default for item in fields(cls)}
    version = values.get("format_version")
    if version != expected["format_version"]:
        raise DataError(f"{path} must have format_version {expected['format_version']}, got {version!r}")
    if different := set(expected) ^ set(values):
        raise DataError(f"{path} has missing or unknown fields: {some(sorted(different))}")
    values["image_root"] = _resolve(values["image_root"], path.parent)
    if values["model"] is not None:
        values["model"]["name"] = _resolve(values["model"]["name"], path.parent)
    return cls(**values)


def _portable(path, folder):
    """A path as `./...` from the folder if both lie in the same parent, else absolute; other names as they are."""
    if path is None or not Path(path).exists():
        return path
    path, folder = Path(path).resolve(), Path(folder).resolve()
    if folder.parent in (path, *path.parents):
        return f"./{Path(os.path.relpath(path, folder)).as_posix()}"
    return str(path)


def _resolve(name, folder):
    if name is not None and name.startswith("./"):
        return str((Path(folder) / name).resolve())
    return name


__all__ = ["load_record", "save_record"]
