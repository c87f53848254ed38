"""Digests by which a run that goes on recognises its data."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .data_errors import DataError


__all__ = ["CONTENTS_READ", "content_digest", "digest", "evenly_spaced", "image_contents", "relative_names"]

CONTENTS_READ = 16
"""Images whose contents a fingerprint looks at."""


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of some parts, each with its length, in hexadecimal."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


def content_digest(stored):
    """BLAKE2b of an image's file, 32 bytes.

    Args:
        stored: Its path or contents.

    Raises:
        DataError: the file can't be read; the message names it.
    """
    if isinstance(stored, bytes):
        return hashlib.blake2b(stored, digest_size=32).digest()
    try:
        with Path(stored).open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).digest()
    except OSError as error:
        raise DataError(f"{stored}: can't read this file ({error.strerror or error})") from error


def relative_names(paths: Sequence[str | None]) -> list[str | None]:
    """Paths as seen from the folder that all share, so that they stay the same where that folder has been moved.

    >>> relative_names(["/data/birds/a/1.jpg", "/data/birds/b/1.jpg"])
    ['a/1.jpg', 'b/1.jpg']
    """
    slashes = [None if path is None else path.replace("\\", "/") for path in paths]
    known = [path for path in slashes if path is not None]
    if not known:
        return slashes
    first, last = min(known), max(known)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    start = first[:shared].rfind("/") + 1
    return [None if path is None else path[start:] for path in slashes]


def evenly_spaced(count: int) -> list[int]:
    """Rows whose contents are looked at, of `count`."""
    return np.unique(np.linspace(0, count - 1, CONTENTS_READ).astype(int)).tolist() if count else []


def image_contents(source: str | bytes) -> bytes:
    """The encoded image, or nothing where its file can't be read (which is for training to say, or to skip)."""
    if isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except OSError:
        return b""
