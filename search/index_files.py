"""The files of an index of one folder: written as a generation that belongs together, checked when they are read.

A folder has `index.json`, which names the two others and holds their sizes and SHA-256. Saving writes new files, then
replaces `index.json`, then deletes the old ones: whenever it stops, the folder holds the old index or the new one. All
files are data: faiss's own format, Parquet and JSON, nothing that can run code.

One process at a time writes: `.lock` is held from looking at what is there to the last deletion. Readers need no lock.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import faiss
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data_scripts.data_errors import DataError, some
from ..files.atomic import TEMPORARY_SUFFIX, atomic_path
from ..files.digests import file_record
from ..files.locks import LOCK_FILE, locked
from ..files.marks import INDEX_FILE
from ..names.field_values import AT_LEAST_ONE, NOT_NEGATIVE
from .columns import CONTENT_COLUMN, SOURCE_COLUMN, kind_of_arrow
from .faiss_probe import check_with_faiss
from .index_factory import inverted_lists
from .journal import JOURNAL_FILE, read_journal
from .model_names import near_folders
from .projection import unwrapped, wrapped
from .records import check_files, load_record, save_record


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


class DamagedIndexError(DataError, RuntimeError):
    """Vectors and rows don't belong together, which was noticed only in a search."""


class IndexChangedError(DataError):
    """Another process has saved to the folder since the index was opened: saving would undo its work."""


@dataclass
class IndexInfo:
    """What `index.json` says.

    Attributes:
        factory: faiss's name of the index.
        reason: Why this one.
        embedding_dim: E.
        model: Who made the embeddings, or None.
        image_root: Folder that the ids are relative to, or None.
        num_items: Items in the index.
        next_key: Key of the next item.
        recall_at_10: Measured against exact search when the index was built, in [0, 1]; 1 for an exact index.
        effort: What that took, as `nprobe 16`; None for an exact index.
        generation: Number in the names of the two other files.
        format_version: Of this layout.
        files: Name -> `bytes` and `sha256` of the two; None where an older version saved.
        sources: Where items come from; see [`VectorIndex`].
        projection: What is done to embeddings before they are compared: `kind` and `dim` of a [`Projection`],
            `num_items` that it was learned from, `variance` that it keeps; None for nothing.
        quantise: `int8` or `binary`, how vectors are kept; None for as they are, or as `factory` says.
    """

    factory: str
    reason: str
    embedding_dim: int
    model: dict | None = None
    image_root: str | None = None
    num_items: int = 0
    next_key: int = 0
    recall_at_10: float | None = None
    effort: str | None = None
    generation: int = 0
    format_version: int = FORMAT_VERSION
    files: Any = field(default=None, metadata={"optional": True})  # a dict, or `check_files` says so
    sources: list[dict] | None = field(default=None, metadata={"optional": True})
    projection: dict | None = field(default=None, metadata={"optional": True})
    quantise: str | None = field(default=None, metadata={"optional": True})

    BOUNDS: ClassVar = {
        "embedding_dim": AT_LEAST_ONE,
        "num_items": NOT_NEGATIVE,
        "next_key": NOT_NEGATIVE,
        "generation": NOT_NEGATIVE,
    }
    CHOICES: ClassVar = {}

    def __post_init__(self):
        self.sources = self.sources or []

    @property
    def index_name(self):
        return f"index-{self.generation:06d}.faiss"

    @property
    def metadata_name(self):
        return f"metadata-{self.generation:06d}.parquet"

    @property
    def state(self):
        """What tells one save to a folder from any other."""
        return self.generation, self.files


def folder_state(folder, info):
    """What tells what a folder holds, its journal included, from anything it held or will hold."""
    return info.state, read_journal(folder, info.state)[1]


def index_lock(folder, timeout):
    """Context that keeps other processes from changing the index of a folder; see [`locked`]."""
    return locked(Path(folder) / LOCK_FILE, f"the index {folder}", timeout)


def find_info(folder):
    """The [`IndexInfo`] of a folder; None where there is no index.

    Raises:
        DataError: the folder holds something else, or an index without its `index.json`.
    """
    folder = Path(folder)
    if (folder / INDEX_FILE).is_file():
        return load_record(IndexInfo, folder / INDEX_FILE, "index")
    others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    own = [name for name in others if name.startswith(("index-", "metadata-")) or name == JOURNAL_FILE]
    if foreign := [name for name in others if not name.startswith(".") and name not in own]:
        raise DataError(f"{folder} must be a new or empty folder or an index, got one with {some(foreign)}")
    if own:  # which would be deleted once another index is there
        raise DataError(
            f"{folder} lacks {INDEX_FILE}, but has other files of an index ({some(own)}): it is lost, or the first "
            f"save to this folder was stopped. Put {INDEX_FILE} back, or delete these files to build anew"
        )
    return None


def write_index(folder, index, table, info, projection=None):
    """Write a generation, make it the folder's, and delete the one before. The caller holds the lock.

    Args:
        folder: Existing folder, of an index or empty.
        index, table: As of [`RetrievalIndex`].
        info: Its generation, number of items and records of files are set anew.
        projection: [`Projection`] that goes into the index's file, or None.

    Returns:
        The [`IndexInfo`] of what was written.

    Raises:
        ValueError: rows and vectors are not of the same items; nothing is written.
    """
    check_tied(index, table, "this index")
    before = find_info(folder)
    info = replace(info, num_items=len(table), generation=0 if before is None else before.generation + 1, files=None)
    with atomic_path(folder / info.index_name) as path:
        _write_vectors(wrapped(index, projection), path)
    with atomic_path(folder / info.metadata_name) as path:
        pq.write_table(table, path, compression="zstd")
    info.files = {name: file_record(folder / name) for name in (info.index_name, info.metadata_name)}
    save_record(folder / INDEX_FILE, info)
    (folder / JOURNAL_FILE).unlink(missing_ok=True)  # what it holds is in the files now, or was replaced with them
    for pattern in ("index-*.faiss", "metadata-*.parquet", f".*{TEMPORARY_SUFFIX}"):
        for path in folder.glob(pattern):
            if path.name not in info.files and path.is_file():
                path.unlink()
    return info


def _write_vectors(index, path):
    """As faiss writes to a file, which does not say when the last of it finds the disk full."""
    failures = []

    def write(content):
        try:
            return stream.write(content)
        except OSError as error:
            failures.append(error)
            raise

    with Path(path).open("wb") as stream:
        try:
            faiss.write_index(index, faiss.PyCallbackIOWriter(write, 1 << 20))
        except Exception:
            if failures:
                raise failures[0] from None
            raise


def read_index(folder, mmap, verify):
    """Index, its [`Projection`] (or None), table and [`IndexInfo`] of a folder; changes of its journal, which are not
    in these; its [`folder_state`].

    Args:
        folder: Where it was saved.
        mmap: Leave the vectors on disk.
        verify: Read the files through, and compare them with what was written.

    Raises:
        DataError: there is no index, a file of it is damaged, or they don't belong together.
    """
    folder = Path(folder)
    if not folder.exists():
        raise DataError(f"index: there is no folder {folder}{near_folders(folder)}")
    while True:
        info = load_record(IndexInfo, folder / INDEX_FILE, "index")
        try:
            index, projection, table = _read_generation(folder, info, mmap, verify)
            changes, size = read_journal(folder, info.state)
        except (DataError, FileNotFoundError) as error:
            # Another process may have saved meanwhile, and deleted what was to be read
            if load_record(IndexInfo, folder / INDEX_FILE, "index").state == info.state:
                raise error if isinstance(error, DataError) else DataError(str(error)) from error
        else:  # nor must it have taken in the journal before that was read
            if load_record(IndexInfo, folder / INDEX_FILE, "index").state == info.state:
                return index, projection, table, info, changes, (info.state, size)


def _read_generation(folder, info, mmap, verify):
    flags = 0
    if mmap and _maps_nothing(info):
        raise ValueError(f"faiss can't memory-map {info.factory}: open it with mmap=False")
    if mmap:  # lists are mapped by one flag, plain vectors and graphs by the other
        lists = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
        flags = lists if "IVF" in info.factory else faiss.IO_FLAG_MMAP_IFC
    path = folder / info.index_name
    if verify and info.files is None:
        logger.warning(
            "the index in %s was saved without checksums: damage to its files can't be noticed. Saving it once more "
            "adds them",
            folder,
        )
    elif info.files is not None:
        check_files(folder, info.files, (info.index_name, info.metadata_name), contents=verify)
    try:
        if not verify or info.files is None:  # nobody knows whether these are the bytes that were written
            check_with_faiss(path, flags or (0 if _maps_nothing(info) else faiss.IO_FLAG_MMAP_IFC))
        index = faiss.read_index(str(path), flags)
        with pq.ParquetFile(folder / info.metadata_name) as file:
            table = file.read()
        index, projection = _unwrapped(index, info)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError) as error:
        raise DataError(f"the index in {folder} can't be read: {error}") from error
    _check_kinds(index, table, info, folder)
    if not index.ntotal == len(table) == info.num_items:
        raise DataError(
            f"the files of the index in {folder} don't belong together: {index.ntotal} vectors, {len(table)} rows "
            f"of metadata, {info.num_items} expected"
        )
    if verify:
        try:
            check_tied(index, table, f"the index in {folder}")
        except ValueError as error:
            raise DataError(str(error)) from error
    return index, projection, table


def _maps_nothing(info):
    """Whether faiss can't memory-map an index of this kind."""
    return "fs" in info.factory.rpartition("PQ")[2]


def _unwrapped(index, info):
    """Index and projection (or None), if they are those that `index.json` describes; else a ValueError."""
    if info.projection is None:
        lists = inverted_lists(index)
        if isinstance(index, faiss.IndexPreTransform) and (lists is None or info.factory.startswith("IVF")):
            raise ValueError(f"it holds a projection, of which {INDEX_FILE} says nothing")
        return index, None
    index, projection = unwrapped(index)
    shape = projection.transform.d_in, projection.dim, index.d
    expected = info.embedding_dim, info.projection["dim"], info.projection["dim"]
    if shape != expected:
        raise ValueError(f"its projection has the widths {shape}, {INDEX_FILE} says {expected}")
    return index, projection


def _check_kinds(index, table, info, folder):
    """A DataError unless both files of an index in `folder` are of the kind that `write_index` writes."""
    path = folder / info.index_name
    if not isinstance(index, faiss.IndexIDMap2) and inverted_lists(index) is None:
        raise DataError(f"{path} must be an index of faiss with keys, got a {type(index).__name__}")
    width = info.embedding_dim if info.projection is None else info.projection["dim"]
    if (index.d, index.metric_type) != (width, faiss.METRIC_INNER_PRODUCT):
        raise DataError(
            f"{path} must be an index by inner product of width {width}, got one of metric "
            f"{index.metric_type} and width {index.d}"
        )
    path = folder / info.metadata_name
    for name in ("key", "id"):
        if name not in table.column_names or table.column(name).null_count:
            raise DataError(f"{path} must have a column {name} without gaps")
    own = {"key": "integer", "id": "text", CONTENT_COLUMN: "text", SOURCE_COLUMN: "integer"}
    for column in table.schema:
        kinds = (own[column.name],) if column.name in own else ("text", "integer", "number")
        if kind_of_arrow(column.type) not in kinds:
            raise DataError(f"{path} must have a column {column.name} of {' or '.join(kinds)}, got {column.type}")
    if pc.count_distinct(table.column("id")).as_py() != len(table):
        raise DataError(f"{path} has ids that occur more than once: it is damaged")
    sources = pc.min_max(table.column(SOURCE_COLUMN)).as_py() if SOURCE_COLUMN in table.column_names else {}
    if any(number is not None and not 0 <= number < len(info.sources) for number in sources.values()):
        raise DataError(
            f"{path} has items of source {sources['max']}, but {INDEX_FILE} has {len(info.sources)} sources"
        )


def check_tied(index, table, what):
    """A ValueError unless rows and vectors are of the same items: the same keys, in the table ascending."""
    keys = table.column("key").to_numpy()
    if (np.diff(keys) <= 0).any():
        raise ValueError(f"{what} is damaged: the rows of its metadata are not in the order of their keys")
    vectors = np.sort(_keys_of(index))
    if not np.array_equal(vectors, keys):
        raise ValueError(
            f"{what} is damaged: it has {len(vectors)} vectors and {len(keys)} rows of metadata, which are not of the "
            "same items"
        )


def _keys_of(index):
    """Keys of all vectors, in no order."""
    lists = inverted_lists(index)
    if lists is None:
        return faiss.vector_to_array(faiss.downcast_index(index).id_map)
    lists = lists.invlists
    sizes = [lists.list_size(number) for number in range(lists.nlist)]
    parts = [faiss.rev_swig_ptr(lists.get_ids(number), size).copy() for number, size in enumerate(sizes) if size]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


__all__ = [
    "INDEX_FILE",
    "DamagedIndexError",
    "IndexChangedError",
    "IndexInfo",
    "check_tied",
    "find_info",
    "folder_state",
    "index_lock",
    "read_index",
    "write_index",
]
