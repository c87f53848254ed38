"""An index of embeddings in Milvus: a file for one machine, a server's address for more than one.

    index = MilvusIndex.build("photos.db", store.ids, store.embeddings, metadata, model=store.info.model)
    index = MilvusIndex.open("http://milvus.example:19530#photos", embedder)

The same methods as [`RetrievalIndex`], through Milvus's own client (extra `milvus`). The file (`*.db`) is served by
`milvus-lite` inside this process. The name after `#` is the collection's, `vptsp` without one. Changes are written as
they are made. Who made the embeddings is kept in the collection's properties.
"""

from __future__ import annotations

import json
import logging
import math
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from ..data_scripts.data_errors import DataError, some
from ..eval.checks import check_embeddings
from .columns import (
    CLASS_COLUMN,
    CONTENT_COLUMN,
    HIDDEN_COLUMNS,
    SOURCE_COLUMN,
    check_items,
    check_texts,
    common_kind,
    kind_of,
)
from .records import check_model
from .vector_index import Hit, VectorIndex


_BATCH_ROWS = 1000
_ID_LENGTH, _TEXT_LENGTH = 1024, 4096
_LIMITS = {"max_id_bytes": _ID_LENGTH, "max_text_bytes": _TEXT_LENGTH}
_PROPERTY = "vptsp"
_TYPES = {"text": "VARCHAR", "integer": "INT64", "number": "DOUBLE"}
# What a text in double quotes must not hold as it is. Milvus and milvus-lite share these escapes, and no others.
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"})
_PATTERN_ESCAPES = str.maketrans({"%": r"\%", "_": r"\_", "\\": "_"})


class MilvusIndex(VectorIndex):
    """A collection of Milvus; see [`MilvusIndex.build`] and [`MilvusIndex.open`]."""

    max_results = 16_384
    _limits = _LIMITS

    def __init__(self, client, collection, fields, properties):
        self._client = client
        self._collection = collection
        self._fields = fields  # column -> its kind, and whether it takes None
        self._knows_sources = set(HIDDEN_COLUMNS) <= set(fields)  # not where older versions built it
        self.columns = [name for name in fields if name not in HIDDEN_COLUMNS]
        self.model = properties["model"]
        self.image_root = properties["image_root"]
        self.embedding_dim = properties["embedding_dim"]
        self.sources = properties.get("sources", [])

    @classmethod
    def build(
        cls,
        place,
        ids,
        embeddings,
        metadata=None,
        *,
        model=None,
        image_root=None,
        contents=None,
        source=None,
        replace=False,
    ):
        """A new collection.

        Args:
            place: `FILE.db` or `http://HOST:PORT`, with `#COLLECTION` if it isn't `vptsp`.
            ids, embeddings, metadata, model, image_root, contents, source: As for [`RetrievalIndex.build`].
            replace: Take the place of a collection that is there, once the new one is complete.

        Raises:
            DataError: the collection exists, or the place can't be reached.
            TypeError, ValueError: as for [`RetrievalIndex.build`].
        """
        client, collection = _connect(place)
        if client.has_collection(collection) and not replace:
            raise DataError(f"{place}: the collection {collection!r} exists; open it, or name another after '#'")
        embeddings = check_embeddings(embeddings, "embeddings")
        properties = {
            "model": model,
            "image_root": None if image_root is None else str(image_root),
            "embedding_dim": embeddings.shape[1],
            "sources": [] if source is None else [source],
        }
        check_model(model, place)
        ids, checked = check_items(ids, embeddings, metadata, **_LIMITS)
        if strange := [name for name in checked if not (name.isascii() and name.isidentifier())]:
            raise ValueError(f"Milvus's columns have names of letters, digits and _, got {some(strange)}")
        fields = {name: (kind_of(values) or "text", name != CLASS_COLUMN) for name, values in checked.items()}
        fields |= {CONTENT_COLUMN: ("text", True), SOURCE_COLUMN: ("integer", True)}
        self = cls(client, f"{collection}_new" if replace else collection, fields, properties)
        client.drop_collection(self._collection)  # half of one, that an interruption left
        self._create(properties)
        try:
            self._insert(ids, embeddings.detach().float().cpu(), checked, contents, None if source is None else 0)
        except BaseException:
            client.drop_collection(self._collection)
            raise
        if replace:
            client.drop_collection(collection)
            client.rename_collection(self._collection, collection)
            self._collection = collection
        client.load_collection(collection)
        return self

    def _create(self, properties):
        from pymilvus import DataType

        schema = self._client.create_schema(auto_id=False)
        schema.add_field("id", DataType.VARCHAR, max_length=_ID_LENGTH, is_primary=True)
        for name, (kind, nullable) in self._fields.items():
            length = {"max_length": _TEXT_LENGTH} if kind == "text" else {}
            schema.add_field(name, DataType[_TYPES[kind]], nullable=nullable, **length)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=self.embedding_dim)
        parameters = self._client.prepare_index_params()
        parameters.add_index("embedding", index_type="AUTOINDEX", metric_type="IP")
        self._client.create_collection(
            self._collection,
            schema=schema,
            index_params=parameters,
            properties={_PROPERTY: json.dumps(properties)},
            consistency_level="Strong",  # what was added is found at once, or it could be added again
        )

    @classmethod
    def open(cls, place, embedder=None):
        """Open a collection that [`MilvusIndex.build`] made.

        Raises:
            DataError: there is none, or the place can't be reached.
            IndexMismatchError: the embedder is not the model that made the embeddings.
        """
        client, collection = _connect(place, must_exist=True)
        from pymilvus import DataType

        if not client.has_collection(collection):
            raise DataError(f"{place}: there is no collection {collection!r}, there are {client.list_collections()}")
        description = client.describe_collection(collection)
        if _PROPERTY not in description.get("properties", {}):
            raise DataError(f"{place}: the collection {collection!r} is not one that this project made")
        kinds = {DataType[name]: kind for kind, name in _TYPES.items()}
        fields = {
            field["name"]: (kinds[field["type"]], bool(field.get("nullable")))
            for field in description["fields"]
            if field["name"] not in ("id", "embedding")
        }
        client.load_collection(collection)
        self = cls(client, collection, fields, json.loads(description["properties"][_PROPERTY]))
        return self if embedder is None else self.use_embedder(embedder)

    @staticmethod
    def exists(place):
        """Whether there is such a collection.

        Raises:
            DataError: the place can't be reached.
        """
        uri = str(place).partition("#")[0]
        if not uri.startswith("http") and not Path(uri).exists():
            return False
        client, collection = _connect(place)
        try:
            return client.has_collection(collection)
        finally:
            client.close()

    def __len__(self):
        return self._client.query(self._collection, output_fields=["count(*)"])[0]["count(*)"]

    def add(self, ids, embeddings, metadata=None, *, contents=None, source=None):
        """See [`VectorIndex.add`]; what is written when the server gives up halfway is taken out again."""
        ids, embeddings, columns = self._check_added(ids, embeddings, metadata, **_LIMITS)
        self._check_kinds(columns)
        try:
            self._insert(ids, embeddings, columns, contents, source)
        except BaseException:
            self._delete(ids)  # none of them was there before
            raise

    def _check_kinds(self, columns):
        for name, values in columns.items():
            kind, nullable = self._fields[name]
            if common_kind(name, kind, kind_of(values)) != kind:
                raise ValueError(f"the column {name!r} holds whole numbers in Milvus, got others: build it anew")
            if None in values and not nullable:
                raise ValueError(f"the column {name!r} takes no None where an older version built it: build it anew")

    def _insert(self, ids, embeddings, columns, contents=None, source=None):
        for items in self._rows_of(ids, embeddings, columns, contents or [None] * len(ids), source):
            self._client.insert(self._collection, items)

    def _rows_of(self, ids, embeddings, columns, contents, source):
        """Rows as Milvus's client takes them, in batches."""
        for rows in _batches(range(len(ids))):
            yield [
                {"id": ids[row], "embedding": embeddings[row].tolist()}
                | {name: values[row] for name, values in columns.items()}
                | ({CONTENT_COLUMN: contents[row], SOURCE_COLUMN: source} if self._knows_sources else {})
                for row in rows
            ]

    def update(self, ids, metadata, *, source=None):
        """See [`VectorIndex.update`]."""
        ids, columns = self._check_updated(ids, metadata, **_LIMITS)
        self._check_kinds(columns)
        fields = ["id", "embedding", *([CONTENT_COLUMN] if self._knows_sources else [])]
        there = {row["id"]: row for row in self._rows(ids, fields)}
        embeddings = torch.tensor([there[name]["embedding"] for name in ids])
        contents = [there[name].get(CONTENT_COLUMN) for name in ids]
        for items in self._rows_of(ids, embeddings, columns, contents, source):
            self._client.upsert(self._collection, items)

    def set_columns(self, columns):
        """See [`VectorIndex.set_columns`]; a collection keeps the columns that it was built with."""
        if sorted(columns) != sorted(self.columns):
            raise ValueError(
                f"the collection has the columns {self.columns}, which can't become {list(columns)}: build it anew"
            )

    def add_source(self, source):
        """See [`VectorIndex.add_source`]."""
        if not self._knows_sources:
            raise ValueError(
                "an older version built the collection, which can't say where items come from: build anew"
            )
        self.sources.append(source)
        properties = self._client.describe_collection(self._collection)["properties"]
        values = json.loads(properties[_PROPERTY]) | {"sources": self.sources}
        self._client.alter_collection_properties(self._collection, properties={_PROPERTY: json.dumps(values)})
        return len(self.sources) - 1

    def items(self, ids=None):
        """See [`VectorIndex.items`]."""
        hidden, fields = dict.fromkeys(HIDDEN_COLUMNS), ["id", *self._fields]
        rows = self._all_rows(fields) if ids is None else self._rows(ids, fields)
        return {row["id"]: hidden | {name: row[name] for name in self._fields} for row in rows}

    def check_removable(self):
        """See [`VectorIndex.check_removable`]: it can."""

    def remove(self, ids):
        """See [`VectorIndex.remove`]."""
        self._delete(self.require(ids))

    def _delete(self, ids):
        for batch in _batches(ids):
            self._client.delete(self._collection, filter=_one_of("id", batch))

    def _nearest(self, queries, k, conditions, containing):
        """See [`VectorIndex.search`]. With a backslash in `containing` there may be fewer than k, since Milvus can't
        look for it: it looks for any letter there, and what has another is left out afterwards."""
        expression = self._expression(conditions, containing)
        if expression is None:
            return [[] for _ in queries]
        found = self._client.search(
            self._collection,
            data=queries.tolist(),
            limit=k,
            filter=expression,
            output_fields=[*self.columns, *([SOURCE_COLUMN] if self._knows_sources else [])],
            search_params={"metric_type": "IP"},
        )
        results = [[self._hit(hit) for hit in hits] for hits in found]
        if containing and "\\" in containing:
            results = [[hit for hit in hits if _contains(hit, containing)] for hits in results]
        return results

    def _hit(self, found):
        metadata = dict(found["entity"])
        source = metadata.pop(SOURCE_COLUMN, None)
        return Hit(found["id"], found["distance"], metadata, self.path_of(found["id"], source))

    def _paths(self, ids):
        fields = ["id", *([SOURCE_COLUMN] if self._knows_sources else [])]
        sources = {row["id"]: row.get(SOURCE_COLUMN) for row in self._rows(ids, fields)}
        return [self.path_of(name, sources[name]) for name in ids]

    def ids_where(self, where, containing=None):
        """See [`VectorIndex.ids_where`]."""
        expression = self._expression(self._conditions(where), containing)
        if expression is None:
            return []
        hits = (Hit(row["id"], 0.0, row) for row in self._all_rows(["id", *self.columns], expression))
        return [hit.id for hit in hits if not containing or "\\" not in containing or _contains(hit, containing)]

    def values_of(self, column):
        """See [`VectorIndex.values_of`]."""
        return list({row[column] for row in self._all_rows(["id", column])} - {None})

    def _kinds(self):
        return {"id": "text"} | {name: self._fields[name][0] for name in self.columns}

    def embeddings_of(self, ids):
        """See [`VectorIndex.embeddings_of`]."""
        ids = self.require(ids)
        vectors = {row["id"]: row["embedding"] for row in self._rows(ids, ["id", "embedding"])}
        return F.normalize(torch.tensor([vectors[name] for name in ids]), dim=1)

    def close(self):
        """Disconnect."""
        self._client.close()

    def list_items(self, count, start=0, containing=None, one_per=None):
        """See [`VectorIndex.list_items`]; in Milvus's own order, 16,384 items at most, and never one per value."""
        if one_per is not None:
            raise ValueError("one item of each value can't be listed from Milvus: list all, or search")
        expression = self._expression([], containing)
        total = self._client.query(self._collection, filter=expression, output_fields=["count(*)"])[0]["count(*)"]
        fields = ["id", *self.columns]
        options = {"filter": expression, "limit": count, "offset": start, "output_fields": fields}
        rows = [dict(row) for row in self._client.query(self._collection, **options)] if start < total else []
        return [Hit(row.pop("id"), math.nan, row) for row in rows], total

    def _expression(self, conditions, containing=None):
        """Milvus's expression for what passes; None where nothing can."""
        parts = []
        for column, operator, values in conditions:
            kind, nullable = self._fields.get(column, ("text", False))
            if kind == "integer" and operator in ("=", "!="):
                values = [value for value in values if value == int(value)]
            if operator == "=" and not values:
                return None
            if operator == "!=":
                parts += [_none_of(column, values, nullable)] if values else []
            else:
                parts.append(_one_of(column, values) if operator == "=" else f"{column} {operator} {values[0]!r}")
        if containing:
            pattern = _quoted(f"%{containing.translate(_PATTERN_ESCAPES)}%")
            texts = [name for name, kind in self._kinds().items() if kind == "text"]
            parts.append(f"({' or '.join(f'{name} like {pattern}' for name in texts)})")
        return " and ".join(parts)

    def present(self, ids):
        """See [`VectorIndex.present`]."""
        return {row["id"] for row in self._rows(list(ids), ["id"])}

    def _rows(self, ids, fields):
        """Rows of those ids that are there."""
        for batch in _batches(ids):
            yield from self._client.query(self._collection, filter=_one_of("id", batch), output_fields=fields)

    def _all_rows(self, fields, expression=""):
        """All rows of the collection that pass."""
        with _quiet_client():
            rows = self._client.query_iterator(
                self._collection, batch_size=_BATCH_ROWS, filter=expression, output_fields=fields
            )
        try:
            while batch := rows.next():
                yield from batch
        finally:
            rows.close()


@contextmanager
def _quiet_client():
    """The embedded form has no clock of a server, of which the client would warn."""
    logger = logging.getLogger("pymilvus")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _batches(values):
    return (values[start : start + _BATCH_ROWS] for start in range(0, len(values), _BATCH_ROWS))


def _one_of(name, values):
    """Milvus's expression for a column with one of these values.

    The client's own `get(ids=...)` and `delete(ids=...)` put ids between apostrophes as they are, and milvus-lite
    knows no `filter_params`, so the quoting is here.
    """
    texts = all(isinstance(value, str) for value in values)
    return f"{name} in [{', '.join(map(_quoted, check_texts(values, name)) if texts else map(repr, values))}]"


def _none_of(name, values, nullable):
    expression = f"not ({_one_of(name, values)})"
    return f"({expression} or {name} is null)" if nullable else expression


def _quoted(text):
    """A text as Milvus's grammar writes it, whatever it holds."""
    return f'"{text.translate(_ESCAPES)}"'


def _contains(hit, text):
    return any(text in value for value in (hit.id, *hit.metadata.values()) if isinstance(value, str))


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
