"""The nearest of every item among all the others, where the queries are the gallery: each similarity serves both.

Items are taken a square of the table at a time, on and above its diagonal: half the products of going through whole
rows. What a square adds to the lists of nearest items is little, and quickly found: of each few similarities the
largest is compared with the last of the list that it might enter.

Products of squares don't give copies of an item the same last bits. So the lists are a few items longer than asked
for, their similarities are computed again, in a way that depends on the two vectors alone, and a list counts only if
nothing outside can belong to it.

Shapes: N items, E embedding width, K length of the lists, s side of a square.
"""

from __future__ import annotations

import torch
from tqdm.auto import tqdm

from .neighbours import full_precision


SIDE = 2048  # of a square: large enough for products at full speed
MAX_DEPTH = 64  # beyond, whole rows are as fast
_SPARE = 8  # items beyond what is asked for, so that hardly any list is in doubt
_SEGMENT = 64  # similarities of which the largest is looked at first
_CACHE_BYTES = 2**20  # of a processor


class NearestOthers:
    """The `depth` most similar others of each of N items, by cosine similarity.

    Args:
        embeddings: `(N, E)` float32 or float64, L2-normalised.
        depth: 1 <= depth < N.
        side: s, items at a time; None for [`SIDE`].
        progress: Show a progress bar, of similarities, where it takes more than some seconds.

    Attributes:
        items: `(N, K)` int64, K >= depth, not in order.
    """

    def __init__(self, embeddings, depth, side=None, progress=False):
        self._embeddings, self._depth, self._side = embeddings, depth, side or SIDE
        num_items = len(embeddings)
        length = min(depth + _SPARE, num_items - 1)
        self._values = embeddings.new_full((num_items, length), -torch.inf)
        self.items = torch.zeros(num_items, length, dtype=torch.int64, device=embeddings.device)
        total = num_items * (num_items - 1) // 2
        with tqdm(
            total=total, desc="Similarities", unit_scale=True, disable=not progress, leave=False, delay=5
        ) as bar:
            self._search(bar)

    def _search(self, bar):
        embeddings, side = self._embeddings, self._side
        buffer = embeddings.new_empty(min(side, len(embeddings)) ** 2)
        for start in range(0, len(embeddings), side):
            queries = embeddings[start : start + side]
            for other in range(start, len(embeddings), side):
                gallery = embeddings[other : other + side]
                square = buffer[: len(queries) * len(gallery)].view(len(queries), len(gallery))
                with full_precision():  # and `out` keeps autocast away
                    torch.mm(queries, gallery.T, out=square)
                if other == start:
                    square.fill_diagonal_(-torch.inf)
                self._take(square, start, other, new=start == other == 0)
                if other != start:
                    self._take(square.T, other, start, new=start == 0)
                bar.update(square.numel() if other != start else len(queries) * (len(queries) - 1) // 2)

    def _take(self, similarity, first_query, first_item, new):
        """Put the similarities `(q, i)` of consecutive queries and items into the queries' lists; `new`: the first."""
        if new:
            queries = torch.arange(first_query, first_query + len(similarity), device=similarity.device)
            best, where = similarity.contiguous().topk(min(self.items.shape[1], similarity.shape[1]), dim=1)
            self._merge(queries, best, where + first_item)
            return
        whole = similarity.shape[1] // _SEGMENT * _SEGMENT
        for begin, end, width in ((0, whole, _SEGMENT), (whole, similarity.shape[1], similarity.shape[1] - whole)):
            if begin == end:
                continue
            lowest = self._values[first_query : first_query + len(similarity), -1]
            segments = similarity[:, begin:end].unflatten(1, (-1, width))  # (q, segments, width)
            if similarity.stride(0) == 1:  # a transposed square, of which `amax` would not see what lies together
                largest = similarity.T[begin:end].unflatten(0, (-1, width)).amax(1).T
            else:
                largest = segments.amax(2)
            query, segment = (largest > lowest[:, None]).nonzero(as_tuple=True)
            values = segments[query, segment]
            found, offset = (values > lowest[query, None]).nonzero(as_tuple=True)
            if len(found):
                items = segment[found] * width + offset + begin + first_item
                self._merge(*_as_table(query[found] + first_query, values[found, offset], items))

    def _merge(self, queries, values, items):
        """Put `(q, n)` items with their similarities into the lists of queries `(q,)`; each item is new there."""
        values = torch.cat([self._values[queries], values], dim=1)
        items = torch.cat([self.items[queries], items], dim=1)
        values, places = values.topk(self.items.shape[1], dim=1)
        self._values[queries], self.items[queries] = values, items.gather(1, places)

    def rows(self, queries):
        """The lists of some queries, by similarities of which equal vectors have equal ones, to the last bit.

        Args:
            queries: `(b,)` int64.

        Returns:
            similarity: `(b, K)`, largest first.
            items: `(b, K)` int64.
            certain: `(b,)` bool, whether the first `depth`, and all that are as similar as the last of these, are in
                the list whatever the rounding.
        """
        items, embeddings = self.items[queries], self._embeddings
        at_once = max(1, _CACHE_BYTES // (items.shape[1] * embeddings[0].nbytes))
        parts = zip(queries.split(at_once), items.split(at_once), strict=True)
        similarity = torch.cat([(embeddings[part][:, None] * embeddings[found]).sum(dim=2) for part, found in parts])
        similarity, places = similarity.sort(dim=1, descending=True)
        if items.shape[1] == len(embeddings) - 1:  # all others
            return similarity, items.gather(1, places), torch.ones_like(queries, dtype=torch.bool)
        # Twice the most by which two sums of E products, of vectors of norm 1, are apart
        rounding = 2 * embeddings.shape[1] * torch.finfo(embeddings.dtype).eps
        certain = similarity[:, self._depth - 1] > self._values[queries, -1] + rounding
        return similarity, items.gather(1, places), certain


def _as_table(queries, values, items):
    """Entries `(n,)` in rows of one query each: queries `(q,)`, values and items `(q, most entries of one)`."""
    order = queries.sort(stable=True).indices
    queries, row, counts = queries[order].unique_consecutive(return_inverse=True, return_counts=True)
    column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    shape = (len(queries), int(counts.max()))
    value_table = values.new_full(shape, -torch.inf).index_put_((row, column), values[order])
    return queries, value_table, items.new_zeros(shape).index_put_((row, column), items[order])


__all__ = ["MAX_DEPTH", "SIDE", "NearestOthers"]
