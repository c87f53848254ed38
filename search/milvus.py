"""An index of embeddings in Milvus: a file for one machine, a server's address for more than one.

    index = MilvusIndex.build("photos.db", store.ids, store.embeddings, metadata, model=store.info.model)
    index = MilvusIndex.open("http://milvus.example:19530#photos", embedder)

The same methods as [`RetrievalIndex`], through Milvus's own client (extra `milvus`). The file (`*.db`) is served by
`milvus-lite` inside this process. The name after `#` is the collection's, `vptsp` without one. Changes are written as
they are made. Who made the embeddings is kept in the collection's properties.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from ..data_scripts.data_errors import DataError, some
from .records import check_model
from .vector_index import Hit, VectorIndex, check_items, check_texts


_BATCH_ROWS = 1000
_ID_LENGTH, _TEXT_LENGTH = 1024, 4096
_LIMITS = {"max_id_bytes": _ID_LENGTH, "max_text_bytes": _TEXT_LENGTH}
_PROPERTY = "vptsp"
# What a text in double quotes must not hold as it is. Milvus and milvus-lite share these escapes, and no others.
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"})
_PATTERN_ESCAPES = str.maketrans({"%": r"\%", "_": r"\_", "\\": "_"})


class MilvusIndex(VectorIndex):
    """A collection of Milvus; see [`MilvusIndex.build`] and [`MilvusIndex.open`]."""

    def __init__(self, client, collection, columns, properties):
        self._client = client
        self._collection = collection
        self.columns = columns
        self.model = properties["model"]
        self.image_root = properties["image_root"]
        self.embedding_dim = properties["embedding_dim"]

    @classmethod
    def build(cls, place, ids, embeddings, metadata=None, *, model=None, image_root=None):
        """A new collection.

        Args:
            place: `FILE.db` or `http://HOST:PORT`, with `#COLLECTION` if it isn't `vptsp`.
            ids, embeddings, metadata, model, image_root: As for [`RetrievalIndex.build`].

        Raises:
            DataError: the collection exists, or the place can't be reached.
            TypeError, ValueError: as for [`RetrievalIndex.build`].
        """
        from pymilvus import DataType

        client, collection = _connect(place)
        if client.has_collection(collection):
            raise DataError(f"{place}: the collection {collection!r} exists; open it, or name another after '#'")
        columns = list(metadata or {})
        values = {
            "model": model,
            "image_root": None if image_root is None else str(image_root),
            "embedding_dim": embeddings.shape[1],
        }
        check_model(model, place)
        self = cls(client, collection, columns, values)
        embeddings = self._check_width(embeddings)
        ids, checked = check_items(ids, embeddings, metadata, **_LIMITS)
        if strange := [name for name in columns if not (name.isascii() and name.isidentifier())]:
            raise ValueError(f"Milvus's columns have names of letters, digits and _, got {some(strange)}")
        schema = client.create_schema(auto_id=False)
        schema.add_field("id", DataType.VARCHAR, max_length=_ID_LENGTH, is_primary=True)
        for name in columns:
            schema.add_field(name, DataType.VARCHAR, max_length=_TEXT_LENGTH)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=embeddings.shape[1])
        parameters = client.prepare_index_params()
        parameters.add_index("embedding", index_type="AUTOINDEX", metric_type="IP")
        client.create_collection(
            collection,
            schema=schema,
            index_params=parameters,
            properties={_PROPERTY: json.dumps(values)},
            consistency_level="Strong",  # what was added is found at once, or it could be added again
        )
        try:
            self._insert(ids, embeddings, checked)
        except BaseException:
            client.drop_collection(collection)
            raise
        client.load_collection(collection)
        return self

    @classmethod
    def open(cls, place, embedder=None):
        """Open a collection that [`MilvusIndex.build`] made.

        Raises:
            DataError: there is none, or the place can't be reached.
            IndexMismatchError: the embedder is not the model that made the embeddings.
        """
        client, collection = _connect(place, must_exist=True)
        if not client.has_collection(collection):
            raise DataError(f"{place}: there is no collection {collection!r}, there are {client.list_collections()}")
        description = client.describe_collection(collection)
        if _PROPERTY not in description.get("properties", {}):
            raise DataError(f"{place}: the collection {collection!r} is not one that this project made")
        columns = [field["name"] for field in description["fields"] if field["name"] not in ("id", "embedding")]
        client.load_collection(collection)
        self = cls(client, collection, columns, json.loads(description["properties"][_PROPERTY]))
        return self if embedder is None else self.use_embedder(embedder)

    def __len__(self):
        return self._client.query(self._collection, output_fields=["count(*)"])[0]["count(*)"]

    def add(self, ids, embeddings, metadata=None):
        """See [`VectorIndex.add`]; what is written when the server gives up halfway is taken out again."""
        ids, embeddings, columns = self._check_added(ids, embeddings, metadata, **_LIMITS)
        try:
            self._insert(ids, embeddings, columns)
        except BaseException:
            self._delete(ids)  # none of them was there before
            raise

    def _insert(self, ids, embeddings, columns):
        for rows in _batches(range(len(ids))):
            items = [
                {"id": ids[row], "embedding": embeddings[row].tolist()}
                | {name: values[row] for name, values in columns.items()}
                for row in rows
            ]
            self._client.insert(self._collection, items)

    def remove(self, ids):
        """See [`VectorIndex.remove`]."""
        self._delete(self.require(ids))

    def _delete(self, ids):
        for batch in _batches(ids):
            self._client.delete(self._collection, filter=_one_of("id", batch))

    def search(self, embeddings, k=10, where=None, containing=None):
        """See [`VectorIndex.search`]. With a backslash in `containing` there may be fewer than k, since Milvus can't
        look for it: it looks for any letter there, and what has another is left out afterwards."""
        queries = self._check_queries(embeddings, k)
        found = self._client.search(
            self._collection,
            data=queries.tolist(),
            limit=k,
            filter=self._expression(where, containing),
            output_fields=self.columns,
            search_params={"metric_type": "IP"},
        )
        results = [[Hit(hit["id"], hit["distance"], dict(hit["entity"])) for hit in hits] for hits in found]
        if containing and "\\" in containing:
            results = [[hit for hit in hits if _contains(hit, containing)] for hits in results]
        return results

    def embeddings_of(self, ids):
        """See [`VectorIndex.embeddings_of`]."""
        ids = self.require(ids)
        vectors = {row["id"]: row["embedding"] for row in self._rows(ids, ["id", "embedding"])}
        return F.normalize(torch.tensor([vectors[name] for name in ids]), dim=1)

    def close(self):
        """Disconnect."""
        self._client.close()

    def sample_ids(self, count):
        """See [`VectorIndex.sample_ids`]."""
        return [row["id"] for row in self._client.query(self._collection, limit=count, output_fields=["id"])]

    def list_items(self, count, start=0, containing=None, one_per=None):
        """See [`VectorIndex.list_items`]; in Milvus's own order, 16,384 items at most, and never one per value."""
        if one_per is not None:
            raise ValueError("one item of each value can't be listed from Milvus: list all, or search")
        expression = self._expression(None, containing)
        total = self._client.query(self._collection, filter=expression, output_fields=["count(*)"])[0]["count(*)"]
        fields = ["id", *self.columns]
        options = {"filter": expression, "limit": count, "offset": start, "output_fields": fields}
        rows = [dict(row) for row in self._client.query(self._collection, **options)] if start < total else []
        return [Hit(row.pop("id"), math.nan, row) for row in rows], total

    def _expression(self, where, containing=None):
        parts, columns = [], ["id", *self.columns]
        for name, values in (where or {}).items():
            if name not in columns:
                raise ValueError(f"there is no column {name!r}; the columns are {columns}")
            parts.append(_one_of(name, [values] if isinstance(values, str) else list(values)))
        if containing:
            pattern = _quoted(f"%{containing.translate(_PATTERN_ESCAPES)}%")
            parts.append(f"({' or '.join(f'{name} like {pattern}' for name in columns)})")
        return " and ".join(parts)

    def present(self, ids):
        """See [`VectorIndex.present`]."""
        return {row["id"] for row in self._rows(list(ids), ["id"])}

    def _rows(self, ids, fields):
        """Rows of those ids that are there."""
        for batch in _batches(ids):
            yield from self._client.query(self._collection, filter=_one_of("id", batch), output_fields=fields)


def _batches(values):
    return (values[start : start + _BATCH_ROWS] for start in range(0, len(values), _BATCH_ROWS))


def _one_of(name, values):
    """Milvus's expression for a column with one of these values.

    The client's own `get(ids=...)` and `delete(ids=...)` put ids between apostrophes as they are, and milvus-lite
    knows no `filter_params`, so the quoting is here.
    """
    return f"{name} in [{', '.join(map(_quoted, check_texts(values, name)))}]"


def _quoted(text):
    """A text as Milvus's grammar writes it, whatever it holds."""
    return f'"{text.translate(_ESCAPES)}"'


def _contains(hit, text):
    return any(text in value for value in (hit.id, *hit.metadata.values()))


def _connect(place, must_exist=False):
    """Client and name of the collection."""
    try:
        from pymilvus import MilvusClient, MilvusException
    except ImportError as error:
        raise DataError(f"{place} needs Milvus's client: pip install 'vptsp[milvus]'") from error
    uri, _, collection = str(place).partition("#")
    if must_exist and not uri.startswith("http") and not Path(uri).exists():
        raise DataError(f"there is no index {uri}")
    try:
        return MilvusClient(uri), collection or "vptsp"
    except MilvusException as error:
        hint = "" if uri.startswith("http") else "; a file can be open in one process at a time"
        raise DataError(f"{place}: can't connect to Milvus ({error}){hint}") from error


__all__ = ["MilvusIndex"]
