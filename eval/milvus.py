"""An index of embeddings in Milvus: a file for one machine, a server's address for more than one.

    index = MilvusIndex.build("photos.db", store.ids, store.embeddings, metadata, model=store.info.model)
    index = MilvusIndex.open("http://milvus.example:19530#photos", embedder)

The same methods as [`RetrievalIndex`], through Milvus's own client (extra `milvus`). The file (`*.db`) is served by
`milvus-lite` inside this process. The name after `#` is the collection's, `vptsp` without one. Changes are written as
they are made. Who made the embeddings is kept in the collection's properties.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from ..data_scripts.errors import DataError
from .vector_index import Hit, VectorIndex, check_items


_BATCH_ROWS = 1000
_ID_LENGTH, _TEXT_LENGTH = 1024, 4096
_PROPERTY = "vptsp"


class MilvusIndex(VectorIndex):
    """A collection of Milvus; see [`MilvusIndex.build`] and [`MilvusIndex.open`]."""

    def __init__(self, client, collection, columns, properties):
        self._client = client
        self._collection = collection
        self._columns = columns
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
        schema = client.create_schema(auto_id=False)
        schema.add_field("id", DataType.VARCHAR, max_length=_ID_LENGTH, is_primary=True)
        for name in columns:
            schema.add_field(name, DataType.VARCHAR, max_length=_TEXT_LENGTH)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=embeddings.shape[1])
        parameters = client.prepare_index_params()
        parameters.add_index("embedding", index_type="AUTOINDEX", metric_type="IP")
        values = {
            "model": model,
            "image_root": None if image_root is None else str(image_root),
            "embedding_dim": embeddings.shape[1],
        }
        self = cls(client, collection, columns, values)
        ids, checked = check_items(ids, self._check_width(embeddings), metadata)
        client.create_collection(
            collection,
            schema=schema,
            index_params=parameters,
            properties={_PROPERTY: json.dumps(values)},
            consistency_level="Strong",
        )
        self._insert(ids, embeddings, checked)
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
        """See [`VectorIndex.add`]."""
        ids, columns = check_items(ids, self._check_width(embeddings), metadata)
        if sorted(columns) != sorted(self._columns):
            raise ValueError(f"metadata must have the columns {self._columns}, got {sorted(columns)}")
        self.refuse_present(ids)
        self._insert(ids, embeddings, columns)

    def _insert(self, ids, embeddings, columns):
        vectors = embeddings.detach().float().cpu()
        for start in range(0, len(ids), _BATCH_ROWS):
            rows = range(start, min(start + _BATCH_ROWS, len(ids)))
            items = [
                {"id": ids[row], "embedding": vectors[row].tolist()}
                | {name: values[row] for name, values in columns.items()}
                for row in rows
            ]
            self._client.insert(self._collection, items)

    def remove(self, ids):
        """See [`VectorIndex.remove`]."""
        ids = self.require(ids)
        for start in range(0, len(ids), _BATCH_ROWS):
            self._client.delete(self._collection, ids=ids[start : start + _BATCH_ROWS])

    def search(self, embeddings, k=10, where=None, containing=None):
        """See [`VectorIndex.search`]; in `containing`, `%` stands for any text and `_` for any letter."""
        queries = self._check_queries(embeddings, k)
        found = self._client.search(
            self._collection,
            data=queries.tolist(),
            limit=k,
            filter=self._expression(where, containing),
            output_fields=self._columns,
            search_params={"metric_type": "IP"},
        )
        return [[Hit(hit["id"], hit["distance"], dict(hit["entity"])) for hit in hits] for hits in found]

    def embeddings_of(self, ids):
        """See [`VectorIndex.embeddings_of`]."""
        ids = self.require(ids)
        rows = self._client.get(self._collection, ids=ids, output_fields=["embedding"])
        vectors = {row["id"]: row["embedding"] for row in rows}
        return F.normalize(torch.tensor([vectors[name] for name in ids]), dim=1)

    def close(self):
        """Disconnect."""
        self._client.close()

    def sample_ids(self, count):
        """See [`VectorIndex.sample_ids`]."""
        return [row["id"] for row in self._client.query(self._collection, limit=count, output_fields=["id"])]

    def _expression(self, where, containing=None):
        """Milvus's filter; values are written as JSON texts, which its grammar shares."""
        parts, columns = [], ["id", *self._columns]
        for name, values in (where or {}).items():
            if name not in columns:
                raise ValueError(f"there is no column {name!r}; the columns are {columns}")
            values = [values] if isinstance(values, str) else list(values)
            parts.append(f"{name} in {json.dumps(values, ensure_ascii=False)}")
        if containing:
            pattern = json.dumps(f"%{containing}%", ensure_ascii=False)
            parts.append(f"({' or '.join(f'{name} like {pattern}' for name in columns)})")
        return " and ".join(parts)

    def present(self, ids):
        """See [`VectorIndex.present`]."""
        ids, found = list(ids), set()
        for start in range(0, len(ids), _BATCH_ROWS):
            rows = self._client.get(self._collection, ids=ids[start : start + _BATCH_ROWS], output_fields=["id"])
            found |= {row["id"] for row in rows}
        return found


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
        raise DataError(f"{place}: can't connect to Milvus ({error})") from error


__all__ = ["MilvusIndex"]
