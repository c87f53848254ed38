"""Opening an index by its place, whatever kind it is: a folder, or a collection of Milvus."""

from __future__ import annotations

import os
from contextlib import contextmanager

from .index import RetrievalIndex
from .index_files import find_info
from .milvus import MilvusIndex


@contextmanager
def edit_index(place, timeout=60.0):
    """Open an index to change it, and keep what was changed.

        with edit_index("runs/photos/index") as index:
            index.add(ids, embeddings, {"class_name": names})

    An index in a folder is locked from opening to saving, so that of two processes the second goes on from what the
    first has saved. It is saved at the end of the block, if it was changed and the block didn't raise. Milvus writes
    each change as it is made.

    Args:
        place: As for [`open_index`].
        timeout: Seconds to wait for another process that is changing the index.

    Yields:
        The index.

    Raises:
        InUseError: another process was changing it all that time.
        DataError: there is no index.
    """
    if is_milvus(place):
        index = open_index(place)
        try:
            yield index
        finally:
            index.close()
        return
    with RetrievalIndex.edit(place, timeout) as index:
        yield index


def open_index(place, embedder=None, **options):
    """Open an index that was built before.

    Args:
        place: Folder of a [`RetrievalIndex`], or what [`MilvusIndex`] takes: a file `*.db` or the address of a
            server, `http://host:19530`.
        embedder: The model that searches by image will use; it must be the one that made the embeddings.
        **options: As for the class's `open`.
    """
    if is_milvus(place):
        return MilvusIndex.open(place, embedder, **options)
    return RetrievalIndex.open(place, embedder, **options)


def index_exists(place):
    """Whether there is an index.

    Raises:
        DataError: the folder holds something else, or the place can't be reached.
    """
    return MilvusIndex.exists(place) if is_milvus(place) else find_info(place) is not None


def is_milvus(place):
    """Whether this is the place of a Milvus collection: a file `*.db` or an address, perhaps with `#collection`.

    Raises:
        TypeError: it is no place at all.
    """
    if not isinstance(place, (str, os.PathLike)):
        raise TypeError(f"an index must be a folder, or a file or address of Milvus, got {type(place).__name__}")
    place = str(place)
    return place.startswith(("http://", "https://")) or place.partition("#")[0].endswith(".db")


__all__ = ["edit_index", "index_exists", "is_milvus", "open_index"]
