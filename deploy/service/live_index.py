"""An index that many threads search while others change it, and whose changes outlast whatever stops the process."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ...data_scripts.data_errors import DataError
from ...search.columns import CLASS_COLUMN, SOURCE_COLUMN
from ...search.index import RetrievalIndex
from ...search.index_files import find_info, index_lock
from ...search.journal import Journal, apply_change, encode_embeddings
from ...search.milvus import MilvusIndex
from ...search.open_index import is_milvus


logger = logging.getLogger(__name__)

SOURCE_NAME = "items added by the service"
# Bytes of the journal beyond which an index is saved as a whole, of however few changes; of a large index, a quarter
# of its own, since saving it takes as long as it is large.
COMPACT_BYTES = 64 << 20


class UnknownItemError(ValueError):
    """There is no item of this id."""


class ItemExistsError(ValueError):
    """There is an item of this id already."""


class NotSavedError(RuntimeError):
    """The disk did not take a change; it was undone."""


class Item(NamedTuple):
    """What is to be an item of the index.

    Attributes:
        id: Its id.
        columns: Column -> value of those that are given; the others are None (a class: empty).
        embedding: `(1, E)` float32, L2-normalised.
        content: Digest of its image's file, or None.
    """

    id: str
    columns: dict
    embedding: object = None
    content: str | None = None


class LiveIndex:
    """A [`VectorIndex`] for many threads; see [`LiveIndex.open`].

    Searches go on side by side; a change waits until those that run have ended, and others wait for it.
    """

    def __init__(self, index, folder=None, journal=None, compact_after=1000):
        self.index = index
        self._folder = folder
        self._journal = journal
        self._compact_after = compact_after
        self._access = _ReadersAndWriters()
        self._changing = threading.Lock()  # one change at a time, from looking at what is there to the disk

    @classmethod
    @contextmanager
    def open(cls, place, embedder=None, lock_timeout=0.0, compact_after=1000):
        """Open an index to search and to change it; other processes that would change it are kept out.

        Args:
            place: As for [`open_index`].
            embedder: The model that made its embeddings, or None.
            lock_timeout: Seconds to wait for another process that is changing the index.
            compact_after: Changes after which the index is saved as a whole, which also happens once the journal takes
                64 MiB and a quarter of what the index's files take, and at the end.

        Raises:
            DataError: there is no index, or it is damaged.
            IndexMismatchError: the embedder is not the model that made the embeddings.
            InUseError: another process is changing it.
        """
        if is_milvus(place):
            self = cls(MilvusIndex.open(place, embedder))
            try:
                yield self
            finally:
                self.index.close()
            return
        if find_info(place) is None:
            raise DataError(f"there is no index in {place}: `vptsp index` builds one")
        with index_lock(place, lock_timeout):
            index = RetrievalIndex.open(place, embedder)
            self = cls(index, place, Journal.open(place, index.info.state), compact_after)
            try:
                yield self
            finally:
                self.compact()

    @property
    def pending(self):
        """Changes that the journal holds."""
        return 0 if self._journal is None else self._journal.count

    @contextmanager
    def reading(self):
        """The index, which nobody changes while the block runs."""
        with self._access.reading():
            yield self.index

    # ---- Changes

    def put(self, items, *, replace=True):
        """Add items, or replace those that are there; all of them or none (in Milvus, not if that fails halfway).

        Args:
            items: List of [`Item`] of different ids, all with an embedding.
            replace: Whether items may be there. What they hold in columns that are not given stays.

        Returns:
            For each whether it is new.

        Raises:
            ItemExistsError: one is there, and is not to be replaced.
            ValueError: columns or embeddings don't fit the index, or it can't remove.
            NotSavedError: the disk did not take it; the index is as it was.
        """
        with self._changing:
            ids = [item.id for item in items]
            there = self.index.present(ids)
            if there and not replace:
                raise ItemExistsError(f"there is an item {sorted(there)[0]!r} already")
            known = self.index.items(sorted(there)) if there else {}
            embeddings = torch.cat([item.embedding for item in items])
            metadata = self._columns(items, known)
            self.index.check_replacement(ids, embeddings, metadata)
            number, steps = self._source()
            if there:
                steps.append({"step": "remove", "ids": sorted(there)})
            sources = [known[name][SOURCE_COLUMN] if name in there else number for name in ids]
            for source in dict.fromkeys(sources):  # items that are replaced keep theirs
                rows = [row for row, own in enumerate(sources) if own == source]
                steps.append(
                    {
                        "step": "add",
                        "ids": [ids[row] for row in rows],
                        "embeddings": encode_embeddings(embeddings[rows]),
                        "metadata": {name: [values[row] for row in rows] for name, values in metadata.items()},
                        "contents": [items[row].content for row in rows],
                        "source": source,
                    }
                )
            self._change(steps)
            return [name not in there for name in ids]

    def update(self, name, columns):
        """Give an item other values in some columns.

        Raises:
            UnknownItemError, ValueError, NotSavedError: as above.
        """
        with self._changing:
            self._require([name])
            known = self.index.items([name])
            metadata = self._columns([Item(name, columns)], known)
            self.index.check_columns(metadata)
            source = known[name][SOURCE_COLUMN]
            self._change([{"step": "update", "ids": [name], "metadata": metadata, "source": source}])

    def remove(self, ids):
        """Remove items; all of them or none.

        Raises:
            UnknownItemError: one is not there.
            ValueError: this index can't remove.
            NotSavedError: as for `put`.
        """
        with self._changing:
            self._require(ids)
            self.index.check_removable()
            self._change([{"step": "remove", "ids": list(ids)}])

    def compact(self):
        """Save the index as a whole, if the journal holds changes; searches go on meanwhile, changes wait."""
        with self._changing:
            self._compact()

    def _compact(self):
        if self._journal is not None and self._journal.count:
            self.index.save_held(self._folder)
            self._journal = Journal.open(self._folder, self.index.info.state)

    def _require(self, ids):
        there = self.index.present(ids)
        if unknown := [name for name in ids if name not in there]:
            raise UnknownItemError(f"there is no item {unknown[0]!r}")

    def _source(self):
        """Number of the source that the service's items have, and the steps that make it, if it isn't there."""
        for number, source in enumerate(self.index.sources):
            if source["root"] is None and source["name"] == SOURCE_NAME:
                return number, []
        step = {"step": "add_source", "source": {"root": None, "name": SOURCE_NAME, "prefix": ""}}
        return len(self.index.sources), [step]

    def _columns(self, items, known):
        """Column -> values of items; what is not given is as it was, or None (a class: empty)."""
        names = self.index.columns
        for item in items:
            if unknown := sorted(set(item.columns) - set(names)):
                raise ValueError(f"there is no column {unknown[0]!r}; the columns are {names}")
        empty = dict.fromkeys(names) | {CLASS_COLUMN: ""}
        rows = [empty | known.get(item.id, {}) | item.columns for item in items]
        return {name: [row[name] for row in rows] for name in names}

    def _change(self, steps):
        """Bring steps, of which is known that the index can take them, to the disk, and do them."""
        if self._journal is not None:
            try:
                self._journal.append(steps)
            except OSError as error:
                raise NotSavedError(f"the change could not be saved: {error}") from error
        with self._access.writing():
            try:
                apply_change(self.index, steps)
            except BaseException:
                self._go_back()
                raise
        if self._is_due():
            try:
                self._compact()
            except OSError as error:  # the journal has it all
                logger.error("the index could not be saved as a whole, and goes on with its journal: %s", error)

    def _is_due(self):
        """Whether the journal has grown so far that the index is to be saved as a whole."""
        if self._journal is None:
            return False
        own = sum(record["bytes"] for record in (self.index.info.files or {}).values())
        return self._journal.count >= self._compact_after or self._journal.size >= max(COMPACT_BYTES, own // 4)

    def _go_back(self):
        """To what the disk held before a change that turned out not to be possible."""
        if self._journal is not None:
            self._journal.undo()
            before, self.index = self.index, RetrievalIndex.open(self._folder)
            self.index.embedder = before.embedder


class _ReadersAndWriters:
    """Any number of readers, or one writer, who goes first of those that wait."""

    def __init__(self):
        self._condition = threading.Condition()
        self._readers = 0
        self._writers = 0  # that wait or write

    @contextmanager
    def reading(self):
        with self._condition:
            self._condition.wait_for(lambda: not self._writers)
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextmanager
    def writing(self):
        """Writers take turns by themselves."""
        with self._condition:
            self._writers += 1
            self._condition.wait_for(lambda: not self._readers)
        try:
            yield
        finally:
            with self._condition:
                self._writers -= 1
                self._condition.notify_all()


__all__ = ["Item", "ItemExistsError", "LiveIndex", "NotSavedError", "UnknownItemError"]
