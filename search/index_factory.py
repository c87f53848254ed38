"""Which faiss index for how many vectors, and how much of the exact result it finds.

A faiss index is named by a factory string: `Flat` (exact), `IVF1024,Flat` (lists around centroids, of which a search
visits some), `HNSW32` (a graph), `OPQ64,IVF4096,PQ64` (lists of compressed vectors).
"""

from __future__ import annotations

import math
import re

import faiss
import numpy as np

from ..names.registry import nearest
from .rescoring import rescoring_of


EXACT_UP_TO = 50_000
LISTS_UP_TO = 1_000_000
QUANTISATIONS = ("int8", "binary")
_GRAPH_LINKS = 32
_TRAINING_PER_CENTROID = 39  # below this faiss warns
_PQ_CENTROIDS = 256
_SAME = 1e-6


def choose_factory(num_items, embedding_dim, memory_gb=16.0, quantise=None):
    """A factory string by size, and why.

    Args:
        num_items: n.
        embedding_dim: E.
        memory_gb: What the index may take, in 10^9 bytes.
        quantise: `int8`, `binary` or None; see [`quantised_factory`].

    Returns:
        factory: For `faiss.index_factory`.
        reason: One sentence.

    Raises:
        ValueError: not even compressed vectors fit, or there are too few to learn a compression from.
    """
    if quantise == "binary":
        return _binary_factory(num_items, embedding_dim, memory_gb)
    plain = num_items * ((1 if quantise == "int8" else 4) * embedding_dim + 16) / 1e9
    graph = plain + num_items * (2 * _GRAPH_LINKS * 4 + 8) / 1e9
    if plain <= memory_gb and num_items <= EXACT_UP_TO:
        return "Flat", f"{num_items:,} items, no more than {EXACT_UP_TO:,}: exact search is fast enough"
    if plain <= memory_gb and (num_items <= LISTS_UP_TO or graph > memory_gb):
        lists = _num_lists(num_items)
        return f"IVF{lists},Flat", f"{num_items:,} items, {plain:.1f} GB: lists of whole vectors, can add and remove"
    if graph <= memory_gb:
        return (
            f"HNSW{_GRAPH_LINKS}",
            f"{num_items:,} items, more than {LISTS_UP_TO:,}, {graph:.1f} GB: a graph is fastest; it can't remove",
        )
    if quantise is not None:
        raise ValueError(f"memory_gb: {num_items:,} items take {plain:.2f} GB with {quantise}, got {memory_gb}")
    return _compressing_factory(num_items, embedding_dim, plain, memory_gb)


def _binary_factory(num_items, embedding_dim, memory_gb):
    size = num_items * (embedding_dim // 8 + 8 + embedding_dim + 16) / 1e9
    if size > memory_gb:
        raise ValueError(f"memory_gb: {num_items:,} items take {size:.2f} GB with binary, got {memory_gb}")
    return "Flat", f"{num_items:,} items: their bits are compared one by one"


def quantised_factory(factory, quantise):
    """The factory string of an index that keeps its vectors in fewer bytes.

    Args:
        factory: Of whole vectors: `Flat`, `IVF1024,Flat`, `HNSW32`.
        quantise: `int8`: a byte for each value (queries stay as they are); `binary`: a bit for each value to look
            with (RaBitQ: Gao and Long, SIGMOD 2024), and a byte, by which what was found is scored anew; or None.

    Raises:
        ValueError: no such quantisation, or not of this factory.
    """
    if quantise is None:
        return factory
    if quantise not in QUANTISATIONS:
        names = ", ".join(QUANTISATIONS)
        raise ValueError(f"quantise must be one of {names}, got {quantise!r}{nearest(quantise, QUANTISATIONS)}")
    if quantise == "binary" and factory == "Flat":
        return "RaBitQ,Refine(SQ8)"
    if quantise == "int8" and (factory == "Flat" or factory.endswith(",Flat")):
        return f"{factory.removesuffix('Flat')}SQ8"
    if quantise == "int8" and re.fullmatch(r"HNSW\d*", factory):
        return f"{factory}_SQ8"
    takes = "Flat, IVF<lists>,Flat or HNSW<links>" if quantise == "int8" else "Flat"
    raise ValueError(f"quantise {quantise!r} goes with factory {takes}, got {factory!r}")


def _compressing_factory(num_items, embedding_dim, plain, memory_gb):
    needed = _TRAINING_PER_CENTROID * _PQ_CENTROIDS
    room = int(memory_gb * 1e9 / num_items) - 16  # bytes per vector, less its id and its place
    sizes = [size for size in range(1, 65) if embedding_dim % size == 0 and size <= room]
    if not sizes or num_items < needed:
        raise ValueError(
            f"memory_gb must be enough for {num_items:,} embeddings of width {embedding_dim}, which take {plain:.2f} "
            f"GB (compressed at least {17e-9 * num_items:.2f}, from {needed:,} items on), got {memory_gb}"
        )
    size = max(sizes)
    return (
        f"OPQ{size},IVF{_num_lists(num_items)},PQ{size}",
        f"{num_items:,} items take {plain:.1f} GB, above the {memory_gb:g} allowed: compressed to {size} bytes each",
    )


def _num_lists(num_items):
    """About 4 sqrt(n), a power of two, few enough that each gets its training points."""
    wanted = 2 ** round(math.log2(4 * math.sqrt(num_items)))
    return max(1, min(wanted, num_items // _TRAINING_PER_CENTROID))


def inverted_lists(index):
    """The IVF part of an index that keeps items in lists under ids of its own, or None."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index if isinstance(index, faiss.IndexIVF) else None


def graph_of(index):
    """The HNSW part of an index, or None."""
    index = faiss.downcast_index(index)
    while isinstance(index, (faiss.IndexIDMap, faiss.IndexPreTransform)):
        index = faiss.downcast_index(index.index)
    return index if isinstance(index, faiss.IndexHNSW) else None


def effort_of(index):
    """Name and value of what trades time for recall, or None twice where there is no such thing.

    `nprobe`, `efSearch`, or `k_factor`: how many times k are scored anew.
    """
    owner, name, _, _ = _effort(index)
    return name, None if owner is None else getattr(owner, name)


def _effort(index):
    """Object and attribute of the effort, its least and its largest value."""
    lists, graph, rescoring = inverted_lists(index), graph_of(index), rescoring_of(index)
    if lists is not None:
        return lists, "nprobe", 1, lists.nlist
    if graph is not None:
        return graph.hnsw, "efSearch", 16, min(index.ntotal, 4096)
    return (None, None, 0, 0) if rescoring is None else (rescoring, "k_factor", 1, 256)


def tune_effort(index, embeddings, keys, target_recall, k=10, num_queries=200, seed=0):
    """Double an approximate index's effort until a sample of its own items finds what exact search finds.

    Args:
        index: faiss index, filled; its effort is changed.
        embeddings: `(n, E)` float32, all of its items.
        keys: `(n,)` int64, their ids in the index.
        target_recall: Recall@k to reach, in [0, 1].
        k: Neighbours of each query, the query itself not counted.
        num_queries: Size of the sample.
        seed: Of the sample.

    Returns:
        The recall reached, in [0, 1]: below the target where the index can't do better.
    """
    rows = np.random.default_rng(seed).permutation(len(embeddings))[:num_queries]
    reference = _exact_threshold(embeddings, rows, k)
    owner, name, effort, most = _effort(index)
    while True:
        if owner is not None:
            setattr(owner, name, min(effort, most))
        recall = _recall(index, embeddings, keys, rows, reference, k)
        if owner is None or recall >= target_recall or effort >= most:
            return recall
        effort *= 2


def _exact_threshold(embeddings, rows, k):
    """Similarity of each sampled row's k-th neighbour, itself excluded by index."""
    similarity, found = faiss.knn(embeddings[rows], embeddings, k + 1, metric=faiss.METRIC_INNER_PRODUCT)
    own = found == rows[:, None]
    own[~own.any(1), -1] = True  # k copies came before it
    return similarity[~own].reshape(len(rows), k)[:, -1]


def _recall(index, embeddings, keys, rows, threshold, k):
    """Share of the k places that hold one of the k nearest: any item as similar as the k-th, so copies count alike."""
    _, found = index.search(embeddings[rows], k + 1)
    order = np.argsort(keys)
    positions = order[np.searchsorted(keys, found.clip(0), sorter=order).clip(max=len(keys) - 1)]
    valid = (found >= 0) & (positions != rows[:, None])
    similarity = np.einsum("qe,qke->qk", embeddings[rows], embeddings[positions])
    hits = (valid & (similarity >= threshold[:, None] - _SAME)).sum(1).clip(max=k)
    return float(hits.mean() / k)


__all__ = [
    "EXACT_UP_TO",
    "LISTS_UP_TO",
    "QUANTISATIONS",
    "choose_factory",
    "effort_of",
    "graph_of",
    "inverted_lists",
    "quantised_factory",
    "tune_effort",
]
