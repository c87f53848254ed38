"""Embeddings on disk: a folder of Parquet shards with ids and classes, and `store.json` that says what they are.

    store = EmbeddingStore.open("runs/photos/embeddings")
    store.embeddings, store.labels, store.ids

    datasets.load_dataset("parquet", data_files="runs/photos/embeddings/*.parquet")

Parquet, since one file then holds ids, classes and vectors, any tool reads it, and its fixed-size lists come out as
one block of memory without a copy per row; safetensors would need a second file for the texts. Columns: `id` (text),
`label` (int64, -1 without a class), `class_name` (text), `content` (text: BLAKE2b of the image's file, in hexadecimal
digits), those that the data have (texts or numbers), `embedding` (list of E float32 or float16).

Shards hold `shard_size` rows each, in the order of the data, whoever wrote them: `shard-00003-of-00012.parquet` has
the rows from 3 * shard_size. They appear under their names only when they are complete, and `store.json` says
`complete` only when all are there. It then holds the size and SHA-256 of each, which are compared when it is opened.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ..data_scripts.data_errors import DataError, some
from ..data_scripts.labels import check_labels
from ..eval.checks import check_embeddings
from ..files.atomic import TEMPORARY_SUFFIX, atomic_path
from ..files.digests import file_record
from ..files.locks import LOCK_FILE, locked
from ..files.marks import STORE_FILE
from ..names.field_values import AT_LEAST_ONE
from .records import check_files, check_texts_of, load_record, save_record


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
EMBEDDING_DTYPES = ("float32", "float16")
_MAX_SHARDS = 1_000_000  # a folder takes no more in reasonable time
_SKIPPED = b"skipped"
_COLUMNS = ("id", "label", "class_name", "content", "embedding")
_TYPES = {"id": pa.string(), "label": pa.int64(), "class_name": pa.string()}
_NEVER_NULL = ("id", "class_name", "embedding")


class NothingReadableError(DataError):
    """None of the images of a store can be read."""


@dataclass
class StoreInfo:
    """What `store.json` says. Paths are relative to its folder where both lie in the same parent folder.

    Attributes:
        model: Who made the embeddings: `name`, `kind`, `fingerprint`, `dtype`; see `Embedder.description`.
        data: What was embedded: `description`, `fingerprint`.
        num_images: Rows to be written; there are fewer in the end where images were skipped.
        embedding_dim: E.
        embedding_dtype: `float32` or `float16`, of the column.
        shard_size: Rows of each shard but the last.
        image_root: Folder that the ids are relative to, or None.
        skipped: Ids of images that could not be read; known when the store is complete.
        complete: Whether all shards are there.
        format_version: Of this layout.
        files: Name -> `bytes` and `sha256` of each shard of a complete store; None where an older version wrote it.
    """

    model: dict
    data: dict
    num_images: int
    embedding_dim: int
    embedding_dtype: str = "float32"
    shard_size: int = 1024
    image_root: str | None = None
    skipped: list[str] = field(default_factory=list)
    complete: bool = False
    format_version: int = FORMAT_VERSION
    files: Any = field(default=None, metadata={"optional": True})  # a dict, or `check_files` says so

    BOUNDS: ClassVar = dict.fromkeys(("num_images", "embedding_dim", "shard_size"), AT_LEAST_ONE)
    CHOICES: ClassVar = {"embedding_dtype": EMBEDDING_DTYPES}

    def __post_init__(self):
        if self.num_shards > _MAX_SHARDS:
            raise ValueError(
                f"shard_size must be so large that {self.num_images:,} images (num_images) make at most "
                f"{_MAX_SHARDS:,} shards, got {self.shard_size}"
            )

    @property
    def num_shards(self):
        return -(-self.num_images // self.shard_size)

    def shard_name(self, shard):
        return f"shard-{shard:05d}-of-{self.num_shards:05d}.parquet"

    @property
    def shard_names(self):
        return [self.shard_name(shard) for shard in range(self.num_shards)]

    def shard_rows(self, shard):
        """The rows of the data that a shard holds, a range."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))


def load_store_info(folder):
    """The [`StoreInfo`] of a folder.

    Raises:
        DataError: it is no store.
    """
    path = Path(folder) / STORE_FILE
    info = load_record(StoreInfo, path, "store of embeddings")
    check_texts_of(info.model, ("name", "kind", "fingerprint", "dtype"), f"{path} must have a model")
    check_texts_of(info.data, ("description", "fingerprint"), f"{path} must have data")
    return info


def find_store(folder, info):
    """What an earlier run left in a folder that is to be a store; None in a new or empty one.

    Args:
        folder: New, empty, or that of a store of the same embeddings.
        info: What is to be stored.

    Raises:
        DataError: the folder holds something else: another model's embeddings, other data, other files.
    """
    folder = Path(folder)
    if (folder / STORE_FILE).is_file():
        found = load_store_info(folder)
        _refuse_other(folder, found, info)
        return found
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if others := sorted(name for name in names if name != LOCK_FILE and not _is_temporary(name)):
        raise DataError(f"{folder} must be a new or empty folder or a store, got one with {some(others)}")
    return None


def store_lock(folder, timeout):
    """Context that keeps other processes from writing to a store; see [`locked`]."""
    return locked(Path(folder) / LOCK_FILE, f"the store {folder}", timeout)


def begin_store(folder, info):
    """Make a folder a store, or clear away what an interrupted run left half written. The caller holds the lock.

    Args:
        folder, info: As for [`find_store`].

    Returns:
        The [`StoreInfo`] of the folder: `info`, or that of an earlier run.

    Raises:
        DataError: as [`find_store`].
    """
    folder = Path(folder)
    found = find_store(folder, info)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        save_record(folder / STORE_FILE, info)
    for path in folder.iterdir():
        if _is_temporary(path.name):
            path.unlink()
    return found or info


def _is_temporary(name):
    return name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)


def _refuse_other(folder, found, wanted):
    checks = (
        ("another model", found.model["fingerprint"], wanted.model["fingerprint"]),
        ("other data", found.data["fingerprint"], wanted.data["fingerprint"]),
        ("another dtype of the model", found.model["dtype"], wanted.model["dtype"]),
        ("another embedding_dtype", found.embedding_dtype, wanted.embedding_dtype),
        ("another shard_size", found.shard_size, wanted.shard_size),
    )
    for what, there, here in checks:
        if there != here:
            raise DataError(
                f"{folder} holds embeddings of {what}: {_short(there)} there, {_short(here)} asked for. Give another "
                "folder, or delete this one"
            )


def _short(value):
    return f"fingerprint {value[:12]}" if isinstance(value, str) and len(value) == 64 else value


def missing_shards(folder, info):
    """Numbers of the shards that are still to be written."""
    return [shard for shard in range(info.num_shards) if not (Path(folder) / info.shard_name(shard)).is_file()]


def write_shard(folder, info, shard, ids, labels, class_names, embeddings, skipped=(), contents=None, columns=None):
    """Write one shard, in one go.

    Args:
        folder: Of a store that was begun with `info`.
        shard: Its number.
        ids, labels, class_names: Of its rows.
        embeddings: `(rows, E)` float32.
        skipped: Ids of the rows that are left out, since their images can't be read.
        contents: Digests of the rows' images (`content_digest`); None where they are not known.
        columns: Name -> Arrow array, further columns of the rows.
    """
    values = embeddings.numpy().astype(info.embedding_dtype).ravel()
    own = {
        "id": pa.array(ids, pa.string()),
        "label": pa.array(labels, pa.int64()),
        "class_name": pa.array(class_names, pa.string()),
        **({} if contents is None else {"content": pa.array(contents, pa.string())}),
        **(columns or {}),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(values), info.embedding_dim),
    }
    table = pa.table(own).replace_schema_metadata({_SKIPPED: json.dumps(list(skipped))})
    with atomic_path(Path(folder) / info.shard_name(shard)) as path:
        # No compression: embeddings have no redundancy that it would find
        pq.write_table(table, path, compression="none", use_dictionary=["class_name"], write_page_checksum=True)


def finish_store(folder, info):
    """Declare a store complete, once all shards are there; collect what was skipped, and the shards' checksums.

    Raises:
        DataError: a shard is missing or damaged.
        NothingReadableError: all images were skipped.
    """
    folder = Path(folder)
    missing = missing_shards(folder, info)
    if missing:
        raise DataError(f"{folder}: {len(missing)} of {info.num_shards} shards are missing, the first is {missing[0]}")
    info.skipped, info.files = [], {}
    for shard, name in enumerate(info.shard_names):
        skipped = _check_shard(folder / name, len(info.shard_rows(shard)))
        info.skipped += skipped
        info.files[name] = file_record(folder / name)
    if len(info.skipped) == info.num_images:
        raise NothingReadableError(f"{folder}: none of the {info.num_images} images can be read")
    info.complete = True
    save_record(folder / STORE_FILE, info)


def _check_shard(path, num_rows):
    """Ids that a shard skipped, if it can be read through (Parquet's own checksums included) and is complete."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            skipped = json.loads(file.schema_arrow.metadata[_SKIPPED])
            found = sum(len(batch) for batch in file.iter_batches())
    except (OSError, KeyError, ValueError) as error:  # pyarrow's errors are among them
        raise DataError(f"{path} can't be read ({error}): delete it, and it will be made anew") from error
    if found + len(skipped) != num_rows:
        raise DataError(
            f"{path} has {found} rows and {len(skipped)} skipped images, expected {num_rows} in all: delete it, and "
            "it will be made anew"
        )
    return skipped


class EmbeddingStore:
    """A complete store, read when it is asked for.

    Args:
        folder: Of the store.
        info: Its [`StoreInfo`].
    """

    def __init__(self, folder, info):
        self.folder = Path(folder)
        self.info = info

    @classmethod
    def open(cls, folder):
        """Open a store.

        Raises:
            DataError: the folder is no store, its embedding was interrupted, or a shard is missing or damaged.
        """
        info = load_store_info(folder)
        if not info.complete:
            done = info.num_shards - len(missing_shards(folder, info))
            raise DataError(
                f"{folder} is not complete ({done} of {info.num_shards} shards): run the command that wrote it once "
                "more, it will go on where it stopped"
            )
        self = cls(folder, info)
        try:
            self._check()
        except DataError as error:
            raise DataError(f"{error}. Delete the store, and the command that wrote it makes it anew") from error
        return self

    def _check(self):
        if self.info.files is not None:
            check_files(self.folder, self.info.files, self.info.shard_names)
        elif missing := missing_shards(self.folder, self.info):
            raise DataError(f"{self.folder} lacks {some(self.info.shard_name(shard) for shard in missing)}")
        else:
            logger.warning("the store %s was written without checksums: damage can't be noticed", self.folder)
        found = len(self._names)
        if found != len(self):
            raise DataError(f"{self.folder} has {found} rows, expected {len(self)}: it is damaged")
        if pc.count_distinct(self._names.column("id")).as_py() != found:
            raise DataError(f"{self.folder} has ids that occur more than once: it is damaged")

    def __len__(self):
        return self.info.num_images - len(self.info.skipped)

    def _read(self, columns):
        return pa.concat_tables([self._read_shard(shard, columns) for shard in range(self.info.num_shards)])

    def _read_shard(self, shard, columns):
        path = self.folder / self.info.shard_name(shard)
        try:
            with pq.ParquetFile(path) as file:
                self._check_columns(path, file.schema_arrow)
                table = file.read(columns)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} can't be read ({error}): it is damaged") from error
        for name in _NEVER_NULL:
            if name in table.column_names and table.column(name).null_count:
                raise DataError(f"{path} has rows without {name}: it is damaged")
        return table

    def _check_columns(self, path, schema):
        dtype = pa.from_numpy_dtype(np.dtype(self.info.embedding_dtype))
        expected = {**_TYPES, "embedding": pa.list_(dtype, self.info.embedding_dim)}
        for name, kind in expected.items():
            found = schema.field(name).type if name in schema.names else None
            if found != kind:
                raise DataError(f"{path} must have a column {name} of {kind}, got {found or 'none'}")

    @cached_property
    def _names(self):
        return self._read(["id", "label", "class_name"])

    @property
    def ids(self):
        """n different texts."""
        return self._names.column("id").to_pylist()

    @property
    def labelled(self):
        """`(n,)` bool tensor: which items have a class."""
        return torch.tensor([name != "" for name in self.class_names])

    @property
    def labels(self):
        """`(n,)` int64 tensor.

        Raises:
            DataError: an item has no class, and so no label; see `labelled`.
        """
        return torch.from_numpy(check_labels(self._names.column("label"), where=f"{self.folder}"))

    @property
    def class_names(self):
        """n texts, empty without a class."""
        return self._names.column("class_name").to_pylist()

    @cached_property
    def columns(self):
        """Further columns of the data: dict of name -> n texts or numbers, or None among them."""
        with pq.ParquetFile(self.folder / self.info.shard_name(0)) as file:
            names = [name for name in file.schema_arrow.names if name not in _COLUMNS]
        return {name: values.to_pylist() for name, values in zip(names, self._read(names).columns, strict=True)}

    @cached_property
    def contents(self):
        """n digests of the images' files, in hexadecimal; None where the store doesn't know them (older versions)."""
        shards = [self._read_shard(shard, ["content"]) for shard in range(self.info.num_shards)]
        if not all(shard.num_columns for shard in shards):
            return None
        return pa.concat_tables(shards).column("content").to_pylist()

    @cached_property
    def embeddings(self):
        """`(n, E)` float32 tensor, L2-normalised; read shard by shard into one block of memory."""
        block = torch.empty(len(self), self.info.embedding_dim)
        start = 0
        for shard in range(self.info.num_shards):
            for chunk in self._read_shard(shard, ["embedding"]).column(0).chunks:
                block[start : start + len(chunk)] = torch.from_numpy(_as_matrix(chunk, self.info.embedding_dim))
                start += len(chunk)
        try:
            return check_embeddings(block, f"embeddings of {self.folder}")
        except ValueError as error:
            raise DataError(str(error)) from error


def _as_matrix(column, embedding_dim):
    values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, embedding_dim)
    return np.array(values)  # a copy: the memory of Arrow is read-only, which torch warns of


__all__ = [
    "EMBEDDING_DTYPES",
    "STORE_FILE",
    "EmbeddingStore",
    "NothingReadableError",
    "StoreInfo",
    "begin_store",
    "find_store",
    "finish_store",
    "missing_shards",
    "store_lock",
    "write_shard",
]
