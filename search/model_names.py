"""Names of models: folders, or repositories on the Hub. What can only be a folder is not looked for on the Hub."""

from __future__ import annotations

import os

from ..data_scripts.data_errors import DataError
from ..data_scripts.paths import usable_path
from ..names.registry import did_you_mean, near_names


def check_model_name(name, option="model"):
    """The name of a model as text, if there is such a folder or it may be one on the Hub.

    Args:
        name: Folder, or `OWNER/NAME` on the Hub.
        option: What the caller calls it.

    Raises:
        DataError: it can only be a folder (it begins with a dot, a slash or a tilde, has no slash or more than one, or
            begins with a folder that is there), and there is none; the message names near ones.
        TypeError: it is neither text nor a path.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"{option} must be a folder or OWNER/NAME on the Hub, got {type(name).__name__}")
    name, path = os.fspath(name), usable_path(name)
    if path.is_dir():
        return str(path) if name.startswith("~") else name
    if path.exists():
        raise DataError(f"{option}: {name} is a file, expected a folder or OWNER/NAME on the Hub")
    on_hub = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.parent.is_dir()
    if on_hub or "://" in name:
        return name
    hint = near_folders(path)
    also = "" if "/" in name or hint else " (on the Hub, models are called OWNER/NAME)"
    raise DataError(f"{option}: there is no folder {name}{hint}{also}")


def near_folders(path):
    """The end of an error on a folder that is not there: folders of nearly that name beside it, if there are any."""
    return did_you_mean(str(path.parent / name) for name in near_names(path.name, _folders_beside(path)))


def _folders_beside(path):
    try:
        return sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir())
    except OSError:
        return []


def model_name_of(index, place, given=None, options="--model"):
    """Name of the model that searches an index by image: the one that is given, or that which the index names.

    Args:
        index: [`VectorIndex`].
        place: Of it, for the error.
        given: Folder or Hub name, or None.
        options: What would say it.

    Raises:
        DataError: neither says which.
    """
    name = given or (index.model or {}).get("name")
    if name is None:
        raise DataError(f"{place} doesn't say which model made its embeddings: give {options}")
    return name


__all__ = ["check_model_name", "model_name_of", "near_folders"]
