"""What all indexes of embeddings have in common: who made the embeddings, search by image, results.

[`RetrievalIndex`] holds them in a faiss index and a table, in one folder; [`MilvusIndex`] in a Milvus server or file.
`open_index` opens either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from ..data_scripts.data_errors import some
from ..eval.checks import check_embeddings


# What the indexes call their own columns
RESERVED_COLUMNS = ("key", "id", "embedding")


class Hit(NamedTuple):
    """One item that a search found.

    Attributes:
        id: Its id.
        similarity: Cosine similarity with the query, in [-1, 1] up to rounding (of a compressing index: about).
        metadata: Column -> value.
    """

    id: str
    similarity: float
    metadata: dict


class IndexMismatchError(ValueError):
    """Embeddings of another model than those in the index, which nothing can compare."""


class VectorIndex(ABC):
    """L2-normalised embeddings with ids and metadata, searched by cosine similarity.

    Attributes:
        model: Who made the embeddings: dict with `name` and `fingerprint`; None where nobody said.
        embedding_dim: E.
        image_root: Folder that the ids are relative to, or None.
        columns: Names of the metadata.
        embedder: [`Embedder`] for searches by image, or None.
    """

    model: dict | None
    embedding_dim: int
    image_root: str | None
    columns: list[str]
    embedder = None

    def use_embedder(self, embedder):
        """Search by image with this model from now on.

        Raises:
            IndexMismatchError: it is not the one that made the embeddings, or that isn't known.
        """
        self.check_model(embedder.description())
        self.embedder = embedder
        return self

    def check_model(self, model):
        """Raise an [`IndexMismatchError`] unless the embeddings are known to be of this model."""
        here = None if self.model is None else self.model["fingerprint"]
        if here != model["fingerprint"]:
            made_by = "nobody said which" if here is None else f"{self.model['name']} (fingerprint {here[:12]})"
            raise IndexMismatchError(
                f"the index holds embeddings of another model: {made_by}, got {model['name']} (fingerprint "
                f"{model['fingerprint'][:12]}); similarities between the two would mean nothing"
            )

    @abstractmethod
    def __len__(self):
        """Number of items."""

    @abstractmethod
    def add(self, ids, embeddings, metadata=None):
        """Add items. All is checked before anything is changed: after an error the index is as it was.

        Args:
            ids: n different texts, none of them in the index.
            embeddings: `(n, E)` floating point, L2-normalised.
            metadata: Column -> n texts; the columns of the index.

        Raises:
            ValueError: the arguments don't fit together or with the index.
        """

    @abstractmethod
    def remove(self, ids):
        """Remove items.

        Raises:
            ValueError: an id is not in the index, or this index can't remove.
        """

    @abstractmethod
    def search(self, embeddings, k=10, where=None, containing=None):
        """The items most similar to each query.

        Args:
            embeddings: `(Q, E)` floating point, L2-normalised.
            k: >= 1.
            where: Column -> value or list of values: only items with one of them in every column. None: all items.
            containing: Only items with this text in their id or in a column, in any case (in Milvus: in this case).

        Returns:
            Q lists of at most k [`Hit`], most similar first.

        Raises:
            TypeError, ValueError: embeddings or k are not as above, or there is no such column.
        """

    @abstractmethod
    def embeddings_of(self, ids):
        """Embeddings of items, `(n, E)` float32; of a compressing index what it kept of them.

        Raises:
            ValueError: an id is not in the index.
        """

    @abstractmethod
    def present(self, ids):
        """Those of some ids that are in the index, a set."""

    def require(self, ids):
        """Ids as a list, all of them in the index; else a ValueError that names those that are not."""
        ids = [ids] if isinstance(ids, str) else list(ids)
        present = self.present(ids)
        if unknown := [name for name in ids if name not in present]:
            raise ValueError(f"{len(unknown)} ids are not in the index: {some(unknown)}")
        return ids

    def refuse_present(self, ids):
        """A ValueError if some of these ids are in the index already."""
        if present := self.present(ids):
            raise ValueError(f"{len(present)} ids are in the index already: {some(sorted(present))}")

    @abstractmethod
    def sample_ids(self, count):
        """At most `count` of the ids, the same each time."""

    @abstractmethod
    def list_items(self, count, start=0, containing=None, one_per=None):
        """Items without a query, in an order that stays while the index does.

        Args:
            count: How many at most, >= 1.
            start: How many to pass over.
            containing: As for `search`.
            one_per: A column: only the first item of each of its values; items without a value stay.

        Returns:
            items: List of [`Hit`], whose similarity is NaN.
            total: How many there are in all.

        Raises:
            ValueError: there is no such column, or this index can't do that.
        """

    def search_ids(self, ids, k=10, where=None, containing=None):
        """The items most similar to items of the index, each without itself; see `search`."""
        ids = self.require(ids)
        found = self.search(self.embeddings_of(ids), k + 1, where, containing)
        return [[hit for hit in hits if hit.id != own][:k] for own, hits in zip(ids, found, strict=True)]

    def search_images(self, images, k=10, where=None, containing=None):
        """The items most similar to images; see `search`.

        Args:
            images: Paths, bytes, PIL images or tensors, as `Embedder.embed_images` takes them.
            k, where, containing: As for `search`.

        Raises:
            ImageError: an image can't be read.
            ValueError: the index has no embedder; see `use_embedder`.
        """
        if self.embedder is None:
            raise ValueError("searching by image needs a model: open the index with embedder=..., or use_embedder")
        return self.search(self.embedder.embed_images(images), k, where, containing)

    def _check_added(self, ids, embeddings, metadata, **limits):
        """Ids, embeddings `(n, E)` float32 on the CPU, and metadata, if `add` can take them; else its errors."""
        embeddings = self._check_width(embeddings)
        ids, columns = check_items(ids, embeddings, metadata, **limits)
        if sorted(columns) != sorted(self.columns):
            raise ValueError(f"metadata must have the columns {self.columns}, got {sorted(columns)}")
        self.refuse_present(ids)
        return ids, embeddings, columns

    def _check_queries(self, embeddings, k):
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}")
        return self._check_width(embeddings)

    def _check_width(self, embeddings):
        check_embeddings(embeddings, "embeddings")
        if embeddings.shape[1] != self.embedding_dim:
            raise ValueError(f"embeddings must have the index's width {self.embedding_dim}, got {embeddings.shape[1]}")
        return embeddings.detach().float().cpu()


def check_items(ids, embeddings, metadata, max_id_bytes=None, max_text_bytes=None):
    """Ids and metadata as lists, if there is one of each per embedding and a file can hold them all.

    Args:
        ids: n different texts.
        embeddings: n of them.
        metadata: Column -> n texts, or None.
        max_id_bytes, max_text_bytes: What an id and another text may take in UTF-8; None: anything.

    Returns:
        List of ids, and dict of column -> list.

    Raises:
        ValueError: something else, which the message names.
    """
    ids = check_texts(ids, "ids", max_id_bytes)
    if len(set(ids)) < len(ids):
        raise ValueError(f"ids must differ, got {len(ids) - len(set(ids))} that occur more than once")
    names = check_texts(metadata or {}, "names of columns")
    if reserved := sorted(set(names) & set(RESERVED_COLUMNS)):
        raise ValueError(f"a column of metadata can't be called {some(reserved)}: the index has its own")
    columns = {name: check_texts(values, name, max_text_bytes) for name, values in (metadata or {}).items()}
    for name, values in (("ids", ids), *columns.items()):
        if len(values) != len(embeddings):
            raise ValueError(f"{name} must have one entry per embedding, {len(embeddings)}, got {len(values)}")
    return ids, columns


def check_texts(values, name, max_bytes=None):
    """Values as a list, if all of them are texts that UTF-8 can hold, in `max_bytes` at most; else a ValueError."""
    if isinstance(values, (str, bytes)):
        raise ValueError(f"{name} must be texts, got a single one: {values!r}")
    values = list(values)
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be texts, got {value!r} among them")
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise ValueError(f"{name} must be texts that UTF-8 can hold, got {value!r} among them") from None
        if max_bytes is not None and size > max_bytes:
            raise ValueError(f"{name} must take at most {max_bytes} bytes in UTF-8, got {size}: {value[:50]!r}...")
    return values


__all__ = [
    "RESERVED_COLUMNS",
    "Hit",
    "IndexMismatchError",
    "VectorIndex",
    "check_items",
    "check_texts",
]
