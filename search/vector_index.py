"""What all indexes of embeddings have in common: who made the embeddings, search by image, results.

[`RetrievalIndex`] holds them in a faiss index and a table, in one folder; [`MilvusIndex`] in a Milvus server or file.
`open_index` opens either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch

from ..data_scripts.data_errors import some
from ..eval.checks import check_embeddings
from ..eval.reranking import check_reordering
from ..names.registry import did_you_mean, near_values
from .columns import check_items, check_metadata
from .filters import find_column, parse_conditions
from .views import views_of


class Hit(NamedTuple):
    """One item that a search found.

    Attributes:
        id: Its id.
        similarity: Cosine similarity with the query, in [-1, 1] up to rounding (of a compressing index: about).
        metadata: Column -> value: a text, a number, or None.
        path: Its file, absolute; None where the index doesn't know in which folder its images are.
    """

    id: str
    similarity: float
    metadata: dict
    path: str | None = None


class IndexMismatchError(ValueError):
    """Embeddings of another model than those in the index, which nothing can compare."""


class VectorIndex(ABC):
    """L2-normalised embeddings with ids and metadata, searched by cosine similarity.

    Attributes:
        model: Who made the embeddings: dict with `name` and `fingerprint`; None where nobody said.
        embedding_dim: E.
        image_root: Folder that the ids of items without a source are relative to, or None.
        columns: Names of the metadata.
        sources: Where items come from, as [`sync_index`] and `add` count them: dicts of `root` (folder of the files,
            or None), `name` (which of that folder's images), and `prefix` (of the ids, before the path from `root`).
        embedder: [`Embedder`] for searches by image, or None.
        max_results: What one search can give at most, or None.
    """

    max_results = None
    _limits: ClassVar = {}  # of ids and texts, as [`check_items`] takes them

    model: dict | None
    embedding_dim: int
    image_root: str | None
    columns: list[str]
    sources: list[dict]
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
            made_by = "nobody said which" if here is None else _model_text(self.model)
            raise IndexMismatchError(
                f"the index holds embeddings of another model: {made_by}, got {_model_text(model)}; similarities "
                "between the two would mean nothing"
            )

    @abstractmethod
    def __len__(self):
        """Number of items."""

    @abstractmethod
    def add(self, ids, embeddings, metadata=None, *, contents=None, source=None):
        """Add items. All is checked before anything is changed: after an error the index is as it was.

        Args:
            ids: n different texts, none of them in the index.
            embeddings: `(n, E)` floating point, a tensor or an array of numpy, L2-normalised.
            metadata: Column -> n texts, or n numbers, or None among either; the columns of the index.
            contents: n digests of the images' files, by which [`sync_index`] knows changed ones; None: not known.
            source: Number of the items' source in `sources`; None: none of them.

        Raises:
            ValueError: the arguments don't fit together or with the index.
        """

    @abstractmethod
    def update(self, ids, metadata, *, source=None):
        """Give items other metadata, and another source; their embeddings and contents stay.

        Args:
            ids: Of n items of the index.
            metadata: All of the index's columns, as for `add`.
            source: As for `add`.

        Raises:
            ValueError: an id is not in the index, or the metadata don't fit.
        """

    @abstractmethod
    def remove(self, ids):
        """Remove items.

        Raises:
            ValueError: an id is not in the index, or this index can't remove.
        """

    @abstractmethod
    def set_columns(self, columns):
        """Have these columns of metadata from now on; what items hold in new ones is None.

        Raises:
            ValueError: this index can't have other columns than it was built with.
        """

    @abstractmethod
    def add_source(self, source):
        """Know another source; its number in `sources`.

        Args:
            source: Dict as in `sources`.

        Raises:
            ValueError: this index was built by a version that couldn't.
        """

    @abstractmethod
    def items(self, ids=None):
        """What is known of each item, id -> dict: the metadata, `vptsp_content` and `vptsp_source` (or None).

        Args:
            ids: Only of these, which are in the index; None: of all.
        """

    @abstractmethod
    def ids_where(self, where, containing=None):
        """Ids of all items that pass a filter; see `search`."""

    @abstractmethod
    def values_of(self, column):
        """The different values of a column (or `id`) but None, in no order."""

    @abstractmethod
    def _kinds(self):
        """Column (and `id`) -> `text`, `integer` or `number`."""

    @abstractmethod
    def _nearest(self, queries, k, conditions, containing):
        """What `search` gives, all of it checked: conditions are [`Condition`] with values as they are spelt here."""

    def _project(self, embeddings):
        """Embeddings `(n, E)` to the space that this index compares them in."""
        return embeddings

    def search(
        self,
        embeddings,
        k=10,
        where=None,
        containing=None,
        *,
        min_similarity=None,
        group_by=None,
        rerank=None,
        expand=None,
    ):
        """The items most similar to each query.

        A filter acts as though the index held nothing else, also for `rerank` and `expand`.

        Args:
            embeddings: `(Q, E)` floating point, a tensor or an array of numpy, L2-normalised.
            k: >= 1.
            where: Column -> value or list of values: only items with one of them in every column, whatever the case;
                or a list of texts such as `price<20`; see [`parse_conditions`]. None: all items.
            containing: Only items with this text in their id or in a column, in any case (in Milvus: in this case).
            min_similarity: Only items of at least this similarity, in [-1, 1].
            group_by: Column: of all items with the same value only the most similar, so that k different values come
                out. An item without a value (None, or no class) stands for itself.
            rerank: [`Reranking`]: the order of the `depth` most similar items is another; their similarities are what
                they are. What min_similarity leaves out is left out afterwards.
            expand: [`QueryExpansion`]: the query is replaced, and similarities are those with what replaces it.

        Returns:
            Q lists of at most k [`Hit`], most similar first; with `rerank` in its order.

        Raises:
            TypeError, ValueError: embeddings, k or min_similarity are not as above, or there is no such column.
        """
        queries = self._project(self._check_width(embeddings))
        return self._find(queries, k, where, containing, min_similarity, group_by, rerank, expand)

    def _find(self, queries, k, where, containing, min_similarity, group_by, rerank, expand, own=None):
        """See `search`; of queries in this index's space. `own` are their ids, which they don't find, or None."""
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}")
        check_reordering(rerank, expand)
        if min_similarity is not None and not -1 <= min_similarity <= 1:
            raise ValueError(f"min_similarity must be in [-1, 1], got {min_similarity}")
        passing = self._conditions(where), containing
        if expand is not None:
            queries = self._expanded(queries, passing, own, expand)
        if group_by is None:
            found = self._in_order(queries, k, passing, own, rerank)
        else:
            column = find_column(group_by, self._kinds())
            return self._best_of_groups(queries, k, passing, own, rerank, min_similarity, column)
        return [_similar(hits, min_similarity)[:k] for hits in found]

    def _in_order(self, queries, k, passing, own=None, rerank=None):
        """The first k items of each query, or more, without the query itself; re-ranked ones first."""
        depth = k if rerank is None else max(k, rerank.depth)
        asked = depth + (own is not None)
        if self.max_results is not None and asked > self.max_results:
            name = "k" if depth == k else "rerank: depth"
            raise ValueError(f"{name} must be at most {self.max_results:,} in this index, got {asked:,}")
        found = self._nearest(queries, asked, *passing)
        found = [_others(hits, own, row)[:depth] for row, hits in enumerate(found)]
        return found if rerank is None else self._reranked(queries, found, rerank)

    def _vectors_of(self, found):
        """Id -> `(E,)` of the items of some results, each looked up once."""
        ids = list(dict.fromkeys(hit.id for hits in found for hit in hits))
        return dict(zip(ids, self.embeddings_of(ids), strict=True)) if ids else {}

    def _reranked(self, queries, found, rerank):
        vectors = self._vectors_of([hits[: rerank.depth] for hits in found])
        results = []
        for query, hits in zip(queries, found, strict=True):
            if shortlist := hits[: rerank.depth]:
                distance = rerank.distances(query, torch.stack([vectors[hit.id] for hit in shortlist]))
                hits = [*(hits[row] for row in distance.argsort(stable=True).tolist()), *hits[rerank.depth :]]
            results.append(hits)
        return results

    def _expanded(self, queries, passing, own, expand):
        found = self._in_order(queries, expand.neighbours, passing, own)
        vectors = self._vectors_of(found)
        similarity = torch.full((len(queries), expand.neighbours), -torch.inf)
        items = torch.zeros(len(queries), expand.neighbours, queries.shape[1])
        for row, hits in enumerate(found):
            for place, hit in enumerate(hits):
                similarity[row, place], items[row, place] = hit.similarity, vectors[hit.id]
        return expand.expand(queries, similarity, items)

    def _best_of_groups(self, queries, k, passing, own, rerank, min_similarity, column):
        """The first item of each of the k groups that come first, looking as deep as that takes."""
        results, unfinished, depth = [[] for _ in queries], list(range(len(queries))), 4 * k + 1
        most = None if self.max_results is None else self.max_results - (own is not None)
        while unfinished:
            depth = min(depth, most or depth)
            names = None if own is None else [own[row] for row in unfinished]
            found = self._in_order(queries[unfinished], depth, passing, names, rerank)
            left = []
            for row, hits in zip(unfinished, found, strict=True):
                results[row] = _firsts(_similar(hits, min_similarity), column)[:k]
                if len(results[row]) < k and len(hits) >= depth:  # what lies deeper may be of other groups
                    left.append(row)
            if left and depth == most:
                raise ValueError(
                    f"group_by: the {depth:,} most similar items, which are all that this index gives, hold "
                    f"{len(results[left[0]])} groups of {k}: ask for fewer"
                )
            unfinished, depth = left, 4 * depth
        return results

    def _conditions(self, where):
        """Conditions of a filter, with the values of texts as they are spelt in the index, whatever the case."""
        conditions, kinds = parse_conditions(where, self._kinds()), self._kinds()
        return [c._replace(values=self._spelt(c)) if kinds[c.column] == "text" else c for c in conditions]

    def _spelt(self, condition):
        if condition.column == "id" and len(self.present(condition.values)) == len(set(condition.values)):
            return condition.values  # all of them: no need to look through the ids
        wanted = {value.casefold() for value in condition.values}
        return tuple(value for value in self.values_of(condition.column) if value.casefold() in wanted)

    def require_values(self, where):
        """A ValueError if a filter asks for a value that no item has; it names the nearest."""
        for column, operator, values in parse_conditions(where, self._kinds()):
            if operator not in ("=", "!="):
                continue
            there = {_folded(value): value for value in self.values_of(column)}
            for value in values:
                if _folded(value) not in there:
                    near = did_you_mean(near_values(value, there.values()))
                    some_values = "" if near else f"; there are {some(sorted(there.values()))}"
                    raise ValueError(f"where: no item has {column} {value!r}{near or some_values}")

    @abstractmethod
    def embeddings_of(self, ids):
        """Embeddings of items, `(n, E)` float32; of a compressing index what it kept of them. Not for `search` where
        the index has a projection: `search_ids` takes items as queries.

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
            known = self.values_of("id")
            near = dict.fromkeys(item for name in unknown[:3] for item in near_values(name, known))
            raise ValueError(f"{len(unknown)} ids are not in the index: {some(unknown)}{did_you_mean(near)}")
        return ids

    def refuse_present(self, ids):
        """A ValueError if some of these ids are in the index already."""
        if present := self.present(ids):
            raise ValueError(f"{len(present)} ids are in the index already: {some(sorted(present))}")

    def image_path(self, name):
        """File of an item, absolute; None where the index doesn't know.

        Raises:
            ValueError: the id is not in the index.
        """
        self.require([name])
        return self._paths([name])[0]

    @abstractmethod
    def _paths(self, ids):
        """[`image_path`] of ids that are in the index."""

    def path_of(self, name, source):
        """File of an item with this id of the source of this number (or None)."""
        there = {"root": self.image_root, "prefix": ""} if source is None else self.sources[source]
        if there["root"] is None:
            return None
        return str(Path(there["root"]).absolute() / name.removeprefix(there["prefix"]))

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

    def search_ids(
        self,
        ids,
        k=10,
        where=None,
        containing=None,
        *,
        min_similarity=None,
        group_by=None,
        rerank=None,
        expand=None,
    ):
        """The items most similar to items of the index, each without itself; see `search`."""
        ids = self.require(ids)
        queries = self.embeddings_of(ids)
        return self._find(queries, k, where, containing, min_similarity, group_by, rerank, expand, own=ids)

    def find_items(self, ids):
        """The [`Hit`] of each of some ids, whose similarity is that with itself.

        Raises:
            ValueError: an id is not in the index.
        """
        ids = self.require(ids)
        return [
            self._nearest(vector[None], 1, self._conditions({"id": [name]}), None)[0][0]
            for name, vector in zip(ids, self.embeddings_of(ids), strict=True)
        ]

    def search_images(self, images, k=10, where=None, containing=None, **options):
        """The items most similar to images; see `search`.

        Args:
            images: In any form that `Embedder.embed_images` takes.
            k, where, containing, **options: As for `search`.

        Raises:
            ImageError: an image can't be read.
            ValueError: the index has no embedder; see `use_embedder`.
        """
        if self.embedder is None:
            raise ValueError("searching by image needs a model: open the index with embedder=..., or use_embedder")
        return self.search(self.embedder.embed_images(images), k, where, containing, **options)

    def _check_added(self, ids, embeddings, metadata, **limits):
        """Ids, embeddings `(n, E)` float32 on the CPU, and metadata, if `add` can take them; else its errors."""
        embeddings = self._check_width(embeddings)
        ids, columns = check_items(ids, embeddings, metadata, **limits)
        self._check_columns(columns)
        self.refuse_present(ids)
        return ids, embeddings, columns

    def check_replacement(self, ids, embeddings, metadata):
        """Raise what removing these ids, where they are there, and adding them anew would raise."""
        embeddings = self._check_width(embeddings)
        ids, columns = check_items(ids, embeddings, metadata, **self._limits)
        self.check_columns(columns)
        self._project(embeddings)
        if self.present(ids):
            self.check_removable()

    def check_columns(self, columns):
        """A ValueError if these are not the index's columns, or values are of another kind than theirs."""
        self._check_columns(check_metadata(columns, self._limits.get("max_text_bytes")))
        self._check_kinds(columns)

    def _project(self, embeddings):
        """Embeddings as this index keeps them; a ValueError if nothing is left of one."""
        return embeddings

    @abstractmethod
    def _check_kinds(self, columns):
        """A ValueError if values are of another kind than those of their columns."""

    @abstractmethod
    def check_removable(self):
        """A ValueError if this index can't remove items."""

    def _check_updated(self, ids, metadata, **limits):
        """Ids and metadata, if `update` can take them; else its errors."""
        ids, columns = self.require(ids), check_metadata(metadata, limits.get("max_text_bytes"))
        self._check_columns(columns)
        if wrong := [name for name, values in columns.items() if len(values) != len(ids)]:
            raise ValueError(f"metadata must have one value per id, {len(ids)}, got others of {some(wrong)}")
        return ids, columns

    def _check_columns(self, columns):
        if sorted(columns) != sorted(self.columns):
            raise ValueError(f"metadata must have the columns {self.columns}, got {sorted(columns)}")

    def _check_width(self, embeddings):
        embeddings = check_embeddings(embeddings, "embeddings")
        if embeddings.shape[1] != self.embedding_dim:
            raise ValueError(f"embeddings must have the index's width {self.embedding_dim}, got {embeddings.shape[1]}")
        return embeddings.detach().float().cpu()


def _model_text(model):
    views = "" if views_of(model) == "one" else f", views {views_of(model)}"
    return f"{model['name']} (fingerprint {model['fingerprint'][:12]}{views})"


def _folded(value):
    return value.casefold() if isinstance(value, str) else value


def _others(hits, own, row):
    return hits if own is None else [hit for hit in hits if hit.id != own[row]]


def _similar(hits, least):
    return hits if least is None else [hit for hit in hits if hit.similarity >= least]


def _firsts(hits, column):
    """The first of each value of a column; each of those without one."""
    seen, firsts = set(), []
    for hit in hits:
        value = hit.id if column == "id" else hit.metadata[column]
        if value in (None, "") or value not in seen:
            firsts.append(hit)
            seen.add(value)
    return firsts


__all__ = ["Hit", "IndexMismatchError", "VectorIndex"]
