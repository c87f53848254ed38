"""The small JSON files that say what a store or an index is: dataclasses, with paths that can be moved."""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import get_type_hints

from ..data_scripts.data_errors import DataError, some
from ..files.atomic import write_json
from ..files.digests import DamagedFileError, check_file
from ..files.json_files import JsonError, read_json_object
from ..names.field_values import check_fields


_SOURCE_TYPES = {"root": (str, NoneType), "name": (str, NoneType), "prefix": str}


def save_record(path, record):
    """Write a dataclass with `model` (dict with a `name`, or None) and `image_root` as JSON, in one go.

    Both may be local paths, and so may the `root` of each of its `sources`, if it has any. They are written relative
    to the file's folder where both lie in the same parent folder, so that folder can be moved as a whole.
    """
    values, folder = asdict(record), Path(path).parent
    values["image_root"] = _portable(record.image_root, folder)
    if record.model is not None:
        values["model"]["name"] = _portable(record.model["name"], folder)
    for source in values.get("sources", []):
        source["root"] = _portable(source["root"], folder)
    write_json(path, values)


def load_record(cls, path, what):
    """Read what [`save_record`] wrote.

    Args:
        cls: The dataclass; its default `format_version` is the only one it reads, and values are compared with its
            annotations, `BOUNDS` and `CHOICES` (see [`check_fields`]). Fields whose metadata say `optional` may be
            missing, since older versions didn't write them; they have their defaults then.
        path: The file.
        what: What its folder would be, for errors.

    Raises:
        DataError: there is no such file, or it is not of this format.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path.parent} is no {what}: it has no {path.name}")
    try:
        values = read_json_object(path, f"the fields of a {what}")
    except JsonError as error:
        raise DataError(str(error)) from error
    expected = {item.name: item.default for item in fields(cls)}
    values = {item.name: item.default for item in fields(cls) if item.metadata.get("optional")} | values
    version = values.get("format_version")
    if version != expected["format_version"]:
        raise DataError(f"{path} must have format_version {expected['format_version']}, got {version!r}")
    if different := set(expected) ^ set(values):
        raise DataError(f"{path} has missing or unknown fields: {some(sorted(different))}")
    try:
        check_fields(values, get_type_hints(cls), cls.BOUNDS, cls.CHOICES)
    except ValueError as error:
        raise DataError(f"{path} must have a value of the right kind in each field: {error}") from error
    check_model(values["model"], path)
    values["image_root"] = _resolve(values["image_root"], path.parent)
    for source in _check_sources(values.get("sources"), path):
        source["root"] = _resolve(source["root"], path.parent)
    if values["model"] is not None:
        values["model"]["name"] = _resolve(values["model"]["name"], path.parent)
    try:
        return cls(**values)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def check_model(model, owner):
    """A DataError unless this says who made embeddings: a dict with at least `name` and `fingerprint`, or None."""
    if model is not None:
        check_texts_of(model, ("name", "fingerprint"), f"{owner} must have a model", "or none")


def check_texts_of(values, names, what, *more):
    """A DataError unless values are a dict with texts under these names; `what` begins the message, `more` ends it."""
    if not (isinstance(values, dict) and all(isinstance(values.get(name), str) for name in names)):
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        raise DataError(f"{', '.join([f'{what} with {listed}', *more])}, got {values!r}")


def _check_sources(sources, owner):
    """The sources of an index, none where it has none; else a DataError."""
    for source in sources or []:
        known = isinstance(source, dict) and set(source) == set(_SOURCE_TYPES)
        if not known or not all(isinstance(source[name], kind) for name, kind in _SOURCE_TYPES.items()):
            raise DataError(f"{owner} must have sources with root, name and prefix, got {source!r}")
    return sources or []


def check_files(folder, records, names, contents=True):
    """Compare the files of a folder with the records that were made when they were written.

    Args:
        folder: Where they lie.
        records: Name -> what `file_record` gave.
        names: Those that there must be a record of.
        contents: Read them through; else only their sizes are compared.

    Raises:
        DataError: a file is missing or damaged, or has no record; the message names it.
    """
    try:
        for name in names:
            check_file(folder, name, records[name] if contents else {"bytes": records[name]["bytes"]})
    except DamagedFileError as error:
        raise DataError(str(error)) from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder} lists no size and checksum of {name}: it is damaged") from error


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


__all__ = ["check_files", "check_model", "check_texts_of", "load_record", "save_record"]
