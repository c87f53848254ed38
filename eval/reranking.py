"""Other orders of what a search finds: k-reciprocal re-ranking and query expansion.

- [`Reranking`]: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding" (CVPR 2017), as the
  authors' code computes it, of one query and its nearest neighbours.
- [`QueryExpansion`]: alpha-weighted query expansion of Radenovic et al., "Fine-tuning CNN Image Retrieval with No
  Human Annotation" (TPAMI 2019), section 3.5.

Both see embeddings alone, and one query at a time: what a query finds never depends on which others are asked with it.

Shapes: Q queries, G gallery items, E embedding width, N items of a shortlist.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

from ..names.registry import nearest
from .neighbours import stable_top_k


# The paper's share of an item's reciprocal neighbours that must be the query's too
_OVERLAP = 2 / 3
_DECIMALS = 12  # of distances: what differs by less is of copies


class _Options:
    """Fields that can be given as words, `depth=50 k1=10`."""

    @classmethod
    def of_words(cls, words):
        """Options of a list of texts `NAME=VALUE`; the defaults of an empty one.

        Raises:
            ValueError: no such name, given twice, or not a number of its kind.
        """
        kinds, values = {item.name: type(item.default) for item in fields(cls)}, {}
        for word in words:
            name, equals, text = word.partition("=")
            if name not in kinds or not equals:
                known = ", ".join(f"{known}=..." for known in kinds)
                raise ValueError(
                    f"{cls.option} takes {known}, or nothing for the defaults, got {word!r}{nearest(name, kinds)}"
                )
            if name in values:
                raise ValueError(f"{cls.option}: {name} was given twice")
            try:
                values[name] = kinds[name](text)
            except ValueError:
                what = "a whole number" if kinds[name] is int else "a number"
                raise ValueError(f"{cls.option}: {name} must be {what}, got {text!r}") from None
        return cls(**values)

    def _whole(self, *names):
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.option}: {name} must be a whole number >= 1, got {value!r}")


@dataclass(frozen=True)
class Reranking(_Options):
    """k-reciprocal re-ranking of the nearest neighbours of a query.

    The distance of an item is `(1 - weight) * Jaccard distance of the k-reciprocal neighbourhoods + weight * d`, where
    d is the squared Euclidean distance, divided by the query's largest. Neighbourhoods are looked for among the query
    and its `depth` nearest; with `depth` of the size of the gallery that is the original method for one query. What
    comes behind the `depth` nearest stays in its order.

    Args:
        depth: N, items that are re-ranked, >= 1.
        k1: Neighbours in which two items must find each other, >= 1.
        k2: Items over whose neighbourhoods each neighbourhood is averaged, itself included, >= 1.
        weight: Of the original distance (lambda), in [0, 1]; 1 leaves the order as it is.

    Raises:
        ValueError: a value is out of range.
    """

    depth: int = 100
    k1: int = 20
    k2: int = 6
    weight: float = 0.3

    option = "rerank"

    def __post_init__(self):
        self._whole("depth", "k1", "k2")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"rerank: weight must be in [0, 1], got {self.weight!r}")

    def distances(self, query, items):
        """Distances of the items of a shortlist from the query.

        Args:
            query: `(E,)` float tensor, L2-normalised.
            items: `(N, E)` float tensor, L2-normalised, the most similar first; the query itself is not among them.

        Returns:
            `(N,)` float64 tensor in [0, 1], the smallest first to be shown.
        """
        universe = F.normalize(torch.cat([query[None], items]).double().cpu(), dim=1).numpy()
        distance = (2 - 2 * universe @ universe.T).clip(0)
        np.fill_diagonal(distance, 0)
        largest = distance.max(1, keepdims=True)
        distance = distance / np.where(largest > 0, largest, 1)  # 0: all of them are copies of the query
        distance = distance.round(_DECIMALS)
        limits = _limits(distance, self.k2 - 1, round(self.k1 / 2), self.k1)
        nearest, half, first = (distance <= limit for limit in limits)
        expanded = _reciprocal_neighbours(first, half)
        weights = np.exp(-distance) * expanded
        weights /= weights.sum(1, keepdims=True)
        weights = nearest @ weights / nearest.sum(1, keepdims=True)
        shared = np.minimum(weights[0], weights[1:]).sum(1)
        jaccard = 1 - shared / (2 - shared)
        return torch.from_numpy(jaccard * (1 - self.weight) + distance[0, 1:] * self.weight)


def _limits(distance, *places):
    """For each place, `(n, 1)`: the distance that stands there in each row, counted from 0, the row's own item.

    All items up to such a distance are among the first, so that copies of one image are treated alike.
    """
    places = [min(place, distance.shape[1] - 1) for place in places]
    ordered = np.partition(distance, places, axis=1)
    return [ordered[:, place, None] for place in places]


def _reciprocal_neighbours(first, half):
    """`(n, n)` bool: each row's expanded set of k-reciprocal neighbours, R* of the paper (equation 4).

    Args:
        first, half: `(n, n)` bool, whether an item is among the first k1, or k1 / 2, of a row.
    """
    reciprocal, of_half = first & first.T, half & half.T
    shared = reciprocal.astype(np.float32) @ of_half.astype(np.float32)  # how many of the item's own the row has too
    joins = reciprocal & (shared > _OVERLAP * of_half.sum(1))
    return reciprocal | (joins.astype(np.float32) @ of_half.astype(np.float32) > 0)


@dataclass(frozen=True)
class QueryExpansion(_Options):
    """A query is replaced by the weighted mean of itself and its nearest neighbours, and asked once more.

    The weight of an item is its similarity to the power of alpha (0 if that is negative), of the query 1; alpha 0
    counts all alike (average query expansion).

    Args:
        neighbours: How many of them, >= 1.
        alpha: >= 0.

    Raises:
        ValueError: a value is out of range.
    """

    neighbours: int = 10
    alpha: float = 3.0

    option = "expand"

    def __post_init__(self):
        self._whole("neighbours")
        if not (self.alpha >= 0 and np.isfinite(self.alpha)):
            raise ValueError(f"expand: alpha must be >= 0, got {self.alpha!r}")

    def expand(self, queries, similarity, items):
        """Expanded queries.

        Args:
            queries: `(Q, E)` float, L2-normalised.
            similarity: `(Q, n)` of the neighbours, in [-1, 1]; -inf where there is none.
            items: `(Q, n, E)` float, L2-normalised.

        Returns:
            `(Q, E)` in the queries' dtype, L2-normalised.
        """
        there = similarity.isfinite()
        weights = torch.where(there, similarity.clamp(min=0) ** self.alpha, 0)
        total = queries + torch.einsum("qn,qne->qe", weights.to(items.dtype), torch.where(there[..., None], items, 0))
        return F.normalize(total, dim=1)


def reordered_rows(blocks, rows, rerank=None, expand=None):
    """Similarities of some queries with the gallery, as numbers whose order is that of re-ranked results.

    Args:
        blocks: [`BlockedSimilarity`].
        rows: `(b,)` int64, which queries.
        rerank: [`Reranking`] or None.
        expand: [`QueryExpansion`] or None; it comes first.

    Returns:
        `(b, G)`: with `expand` alone cosine similarities with the expanded queries; re-ranked items have 3 minus their
        distance, above all others. -inf where a query meets what it may not find.
    """
    similarity, queries = blocks.rows(rows), blocks.queries[rows.to(blocks.device)]
    if expand is not None:
        best, columns = stable_top_k(similarity, min(expand.neighbours, similarity.shape[1]))
        queries = expand.expand(queries, best, blocks.gallery[columns])
        similarity = blocks.rows(rows, queries)
    if rerank is not None:
        best, columns = stable_top_k(similarity, min(rerank.depth, similarity.shape[1]))
        for row, query in enumerate(queries):
            shortlist = columns[row][best[row].isfinite()]
            distance = rerank.distances(query, blocks.gallery[shortlist])
            similarity[row, shortlist] = (3 - distance).to(similarity)
    return similarity


def check_reordering(rerank, expand):
    """A TypeError unless these are a [`Reranking`] and a [`QueryExpansion`], or None."""
    for name, value, kind in (("rerank", rerank, Reranking), ("expand", expand, QueryExpansion)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__} or None, got {value!r}")


__all__ = ["QueryExpansion", "Reranking", "check_reordering", "reordered_rows"]
