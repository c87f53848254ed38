"""Digests of files: written beside what is saved, compared when it is opened."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath


class DamagedFileError(ValueError):
    """A file is missing, or is not the one that was written."""


def file_digest(path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_record(path) -> dict:
    """What `check_file` compares a file with later: `bytes` and `sha256`."""
    return {"bytes": Path(path).stat().st_size, "sha256": file_digest(path)}


def folder_record(folder, exclude=()) -> dict:
    """`file_record` of every file below a folder, under its path from there with slashes.

    Args:
        folder: Existing folder.
        exclude: Such paths that are left out, for instance that of the file which will hold the record.
    """
    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: file_record(path) for name, path in files.items() if name not in exclude}


def check_file(folder, name, expected):
    """Compare a file with its record, the size first.

    Args:
        folder: Where it lies.
        name: Its path from there, with slashes.
        expected: As from `file_record`; without `sha256` (older versions wrote none) only the size is compared.

    Raises:
        DamagedFileError: it is missing, of another size or content, or outside of the folder, or its record is none;
            the message names it.
    """
    if not isinstance(expected, dict) or not isinstance(expected.get("bytes"), int):
        raise DamagedFileError(f"{folder} lists no size and checksum of {name}: it is damaged")
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts:
        raise DamagedFileError(f"{folder} lists the file {name!r}, which is outside of it")
    path = Path(folder) / place
    if not path.is_file():
        raise DamagedFileError(f"{folder} lacks {name}")
    if (size := path.stat().st_size) != expected["bytes"]:
        raise DamagedFileError(f"{path} has {size} bytes, expected {expected['bytes']}: it is damaged")
    if expected.get("sha256") not in (None, file_digest(path)):
        raise DamagedFileError(f"{path} has another content than was written (its SHA-256 differs): it is damaged")


__all__ = ["DamagedFileError", "check_file", "file_digest", "file_record", "folder_record"]
