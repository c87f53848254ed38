"""Exact nearest neighbours by cosine similarity, a block of queries at a time.

Shapes: Q queries, G gallery items, E embedding width, b queries of one block.

Where there is no separate gallery, the queries are the gallery and no query finds itself: its own row is masked by
index. Taking the most similar item away instead goes wrong as soon as an image is there twice, since the copy is as
similar as the query itself and either of them may come first.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch

from .checks import NORM_TOLERANCE, as_tensor, check_embeddings


_BLOCK_BYTES = 256 * 2**20
_KEY_COLUMNS = 8  # of a row that tell it from others


class BlockedSimilarity:
    """Cosine similarity of L2-normalised queries with a gallery, computed for some queries at a time.

    Identical gallery rows have identical similarities to every query, to the last bit. Matrix products don't promise
    that (the columns at the edge of a tile may be summed in another order), so the column of each row's first copy is
    used for all its copies.

    Args:
        query_embeddings: `(Q, E)` float of any precision, L2-normalised.
        gallery_embeddings: `(G, E)` likewise; None: the queries, and no query finds itself.
        device: Where to compute; None: where the queries are.
        excluded: `(n, 2)` integer, pairs of a query and a gallery item that it may not find, since it is that item;
            see [`same_items`]. None: the gallery holds none of the queries.

    Raises:
        TypeError: embeddings aren't floating-point tensors, or excluded isn't an integer tensor.
        ValueError: wrong shape, empty, NaN or infinite values, or not L2-normalised; excluded is out of range or
            given without a gallery.

    Attributes:
        num_queries: Q.
        num_gallery: G.
        gallery: `(G, E)`, the gallery's embeddings.
        num_retrievable: Gallery items that a query can find: G, or Q - 1 where the queries are the gallery. Those that
            are excluded for it are among them, and come last.
        excluded: As above.
        dtype: float64 if either input is, else float32.
        queries: `(Q, E)`, in this dtype, on the device.
    """

    def __init__(self, query_embeddings, gallery_embeddings=None, *, device=None, excluded=None):
        query_embeddings = check_embeddings(query_embeddings, "query_embeddings")
        self.excludes_self = gallery_embeddings is None
        if self.excludes_self:
            gallery_embeddings = query_embeddings
        else:
            gallery_embeddings = check_embeddings(gallery_embeddings, "gallery_embeddings")
            if gallery_embeddings.shape[1] != query_embeddings.shape[1]:
                raise ValueError(
                    "query_embeddings and gallery_embeddings must have the same width, got "
                    f"{query_embeddings.shape[1]} and {gallery_embeddings.shape[1]}"
                )
        dtypes = torch.promote_types(query_embeddings.dtype, gallery_embeddings.dtype)
        self.dtype = torch.promote_types(dtypes, torch.float32)
        self.device = torch.device(device) if device is not None else query_embeddings.device
        self.num_queries, self.num_gallery = len(query_embeddings), len(gallery_embeddings)
        self.num_retrievable = self.num_gallery - int(self.excludes_self)
        self.queries = query_embeddings.detach().to(self.device, self.dtype)
        self.gallery = self.queries if self.excludes_self else gallery_embeddings.detach().to(self.device, self.dtype)
        self._copies, self._originals = _find_copies(self.gallery)
        self.excluded = None if excluded is None else self._check_excluded(excluded)
        self._buffer = None

    def _check_excluded(self, excluded):
        excluded = as_tensor(excluded)
        if not isinstance(excluded, torch.Tensor) or excluded.is_floating_point() or excluded.dtype == torch.bool:
            got = excluded.dtype if isinstance(excluded, torch.Tensor) else type(excluded).__name__
            raise TypeError(f"excluded must be an integer tensor, got {got}")
        if self.excludes_self:
            raise ValueError("excluded is for a gallery of its own: without one, each query's own row is excluded")
        if excluded.ndim != 2 or excluded.shape[1] != 2:
            raise ValueError(f"excluded must have shape (pairs, 2), got {tuple(excluded.shape)}")
        excluded = excluded.to(self.device, torch.int64)
        sizes = torch.tensor([self.num_queries, self.num_gallery], device=self.device)
        if ((excluded < 0) | (excluded >= sizes)).any():
            raise ValueError(
                f"excluded must hold rows of the {self.num_queries} queries and {self.num_gallery} gallery items, got "
                f"{excluded.amin(0).tolist()} to {excluded.amax(0).tolist()}"
            )
        return excluded.unique(dim=0)

    def block_size(self, k, num_bytes=_BLOCK_BYTES):
        """Number of queries whose similarities and k best fit into `num_bytes`, temporaries included; at least 1."""
        per_query = self.num_gallery * (3 * self.dtype.itemsize + 8) + 96 * k
        return max(1, min(self.num_queries, num_bytes // per_query))

    @torch.no_grad()
    def rows(self, indices, queries=None):
        """Similarities of some queries with the whole gallery.

        Args:
            indices: `(b,)` int64, which queries.
            queries: `(b, E)` to take in place of their embeddings, expanded ones say; None: their embeddings.

        Returns:
            `(b, G)` in [-1, 1] up to rounding; -inf where a query meets what it may not find. The memory is used again
            by the next call.
        """
        if self._buffer is None or len(self._buffer) < len(indices):
            self._buffer = torch.empty(len(indices), self.num_gallery, dtype=self.dtype, device=self.device)
        similarity = self._buffer[: len(indices)]
        indices = indices.to(self.device)
        with full_precision():  # and `out` keeps autocast away
            queries = self.queries[indices.to(self.device)] if queries is None else queries
            torch.mm(queries, self.gallery.T, out=similarity)
        if len(self._copies):
            similarity.index_copy_(1, self._copies, similarity.index_select(1, self._originals))
        if self.excludes_self:  # after the copies, or a copy of the query would be masked with it
            similarity[torch.arange(len(indices), device=self.device), indices] = -torch.inf
        if self.excluded is not None:
            places = torch.full((self.num_queries,), -1, device=self.device)
            places[indices] = torch.arange(len(indices), device=self.device)
            rows, columns = places[self.excluded[:, 0]], self.excluded[:, 1]
            similarity[rows[rows >= 0], columns[rows >= 0]] = -torch.inf
        return similarity


@torch.no_grad()
def nearest_neighbours(query_embeddings, k, gallery_embeddings=None, *, block_size=None, device=None, excluded=None):
    """The k most similar gallery items of every query, exactly.

    Among items of equal similarity (copies of one image, say) the one with the lower gallery index comes first, also
    at the k-th place. That is for looking at; [`retrieval_metrics`] doesn't depend on any such order.

    Args:
        query_embeddings: `(Q, E)` float of any precision, L2-normalised.
        k: 1 <= k <= G, or <= Q - 1 where the queries are the gallery.
        gallery_embeddings: `(G, E)` likewise; None: the queries, each one's own row excluded by index.
        block_size: Queries at a time; None: as many as fit into 256 MiB.
        device: Where to compute; None: where the queries are.
        excluded: `(n, 2)` integer, pairs of a query and a gallery item that it may not find ([`same_items`]). k must
            leave room for them.

    Returns:
        similarity: `(Q, k)` float32 (float64 for float64 embeddings), in [-1, 1] up to rounding, largest first.
        index: `(Q, k)` int64, rows of the gallery. Both on the queries' device.

    Raises:
        TypeError: embeddings aren't floating-point tensors.
        ValueError: as for [`BlockedSimilarity`], or k or block_size is out of range.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> similarity, index = nearest_neighbours(embeddings, 1)
        >>> index.flatten().tolist()
        [1, 2, 1]
    """
    blocks = BlockedSimilarity(query_embeddings, gallery_embeddings, device=device, excluded=excluded)
    can_find = blocks.num_retrievable
    if excluded is not None and len(excluded):
        can_find -= int(blocks.excluded[:, 0].bincount().max())
    if not 1 <= k <= can_find:
        raise ValueError(
            f"k must be between 1 and the {can_find} items that a query can find, got {k}"
            + (" (the queries are the gallery, and no query finds itself)" if blocks.excludes_self else "")
        )
    similarity = torch.empty(blocks.num_queries, k, dtype=blocks.dtype, device=query_embeddings.device)
    index = torch.empty(blocks.num_queries, k, dtype=torch.int64, device=query_embeddings.device)
    for rows in torch.arange(blocks.num_queries).split(check_block_size(block_size) or blocks.block_size(k)):
        best, where = stable_top_k(blocks.rows(rows), k)
        similarity[rows[0] : rows[-1] + 1] = best.to(similarity.device)
        index[rows[0] : rows[-1] + 1] = where.to(index.device)
    return similarity, index


def check_block_size(block_size):
    """`block_size` itself, if it is None or a positive number of queries; else a ValueError."""
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be >= 1 or None, got {block_size}")
    return block_size


def stable_top_k(similarity, k):
    """Top k of each row, the lower column first among equals; `topk` alone leaves that open."""
    values, columns = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(1).nonzero().squeeze(1)
    values, columns = values[:, :k], columns[:, :k]
    if len(tied):  # rare, so a full sort of these rows will do
        in_order = similarity[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = in_order.values[:, :k], in_order.indices[:, :k]
    return values, columns


def _find_copies(gallery):
    """Rows that repeat an earlier row, and the first row equal to each: two `(number of copies,)` int64 tensors.

    Comparing whole rows takes sorting them. Equal rows have equal keys and hardly any others do, so only rows that
    share a key are compared. A key sums a few columns, one after the other: unlike that of a product, its rounding
    can't depend on where a row stands.
    """
    columns = torch.linspace(0, gallery.shape[1] - 1, min(_KEY_COLUMNS, gallery.shape[1])).long().unique().tolist()
    keys = gallery.new_zeros(len(gallery), dtype=torch.float64)
    for number, column in enumerate(columns, start=2):
        keys += gallery[:, column].double() * number**0.5
    _, key, counts = keys.unique(return_inverse=True, return_counts=True)
    rows = (counts[key] > 1).nonzero().squeeze(1)
    if not len(rows):
        return rows, rows
    distinct, group = torch.unique(gallery[rows], dim=0, return_inverse=True)
    first = torch.full((len(distinct),), len(gallery), device=gallery.device)
    first = first.scatter_reduce(0, group, rows, "amin")[group]
    copies = first != rows
    return rows[copies], first[copies]


@contextmanager
def full_precision():
    """Matrix products in the precision of their inputs, whatever TF32 or bfloat16 setting training has made."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through the newer switches, which the older one can't describe
        before = None
        switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
        values = [switch.fp32_precision for switch in switches]
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)
        else:
            for switch, value in zip(switches, values, strict=True):
                switch.fp32_precision = value


__all__ = [
    "NORM_TOLERANCE",
    "BlockedSimilarity",
    "check_block_size",
    "full_precision",
    "nearest_neighbours",
    "stable_top_k",
]
