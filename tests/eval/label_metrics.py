"""The retrieval metrics once more, plainly, from the labels of neighbours in a given order: an oracle.

`neighbour_labels` are `(Q, K)` integer, nearest first, the query itself excluded; `query_labels` `(Q,)` integer;
`num_relevant` `(Q,)` integer, R: other items of the query's class. Queries with R = 0 are left out.
"""

import torch


def recall_at_k(neighbour_labels, query_labels, k, num_relevant=None):
    """Share of queries with an item of their class among the first k; without R, lone queries are misses.

    >>> neighbour_labels = torch.tensor([[7, 3], [3, 7], [5, 5]])
    >>> recall_at_k(neighbour_labels, torch.tensor([3, 3, 3]), k=1)  # 1 of 3
    0.3333333333333333
    >>> recall_at_k(neighbour_labels, torch.tensor([3, 3, 3]), k=2)
    0.6666666666666666
    """
    hits = neighbour_labels == query_labels[:, None]
    answerable = slice(None) if num_relevant is None else num_relevant > 0
    return hits[answerable, :k].any(1).double().mean().item()


def map_at_r(neighbour_labels, query_labels, num_relevant):
    """Mean over queries of 1/R * sum_{i=1..R} [neighbour i is a hit] * (hits among the first i) / i.

    >>> map_at_r(torch.tensor([[3, 5, 3, 5]]), torch.tensor([3]), torch.tensor([3]))  # (1/1 + 2/3) / 3
    0.5555555555555555
    """
    return _mean_of_sums(_precision_terms, neighbour_labels, query_labels, num_relevant, lambda r: (r, r))


def map_at_r_published(neighbour_labels, query_labels, num_relevant):
    """The same with R + 1 in place of R. Where a class is the whole gallery, its neighbour R + 1 is any other label.

    >>> map_at_r_published(torch.tensor([[3, 5, 3, 5]]), torch.tensor([3]), torch.tensor([3]))  # (1/1 + 2/3) / 4
    0.41666666666666663
    """
    return _mean_of_sums(_precision_terms, neighbour_labels, query_labels, num_relevant, lambda r: (r + 1, r + 1))


def r_precision(neighbour_labels, query_labels, num_relevant):
    """Mean over queries of (hits among the first R) / R.

    >>> r_precision(torch.tensor([[3, 5, 3, 5]]), torch.tensor([3]), torch.tensor([3]))
    0.6666666666666666
    """
    return _mean_of_sums(lambda hits: hits.double(), neighbour_labels, query_labels, num_relevant, lambda r: (r, r))


def map_at_k(neighbour_labels, query_labels, num_relevant, k=1000):
    """Mean over queries of 1/min(R, k) * sum_{i=1..k} [neighbour i is a hit] * (hits among the first i) / i.

    >>> neighbour_labels = torch.tensor([[3, 5, 3, 5]])
    >>> map_at_k(neighbour_labels, torch.tensor([3]), torch.tensor([2]))  # (1/1 + 2/3) / 2
    0.8333333333333333
    >>> map_at_k(neighbour_labels, torch.tensor([3]), torch.tensor([2]), k=1)  # (1/1) / 1
    1.0
    """
    depth = min(k, neighbour_labels.shape[1])  # fewer than k only where they are the whole gallery
    return _mean_of_sums(_precision_terms, neighbour_labels, query_labels, num_relevant, lambda r: (depth, min(r, k)))


def _mean_of_sums(terms_of, neighbour_labels, query_labels, num_relevant, depth_and_divisor):
    """Mean over queries with R > 0 of their first terms' sum, by what `depth_and_divisor(R)` says of each."""
    means = []
    for row, label, relevant in zip(neighbour_labels, query_labels, num_relevant.tolist(), strict=True):
        if relevant:
            depth, divisor = depth_and_divisor(relevant)
            assert depth <= len(row)
            means.append(terms_of(row == label)[:depth].sum() / divisor)
    return torch.stack(means).mean().item()


def _precision_terms(hits):
    """`[hit at rank i] * precision among the first i`, `(K,)` float64."""
    return hits * hits.cumsum(0).double() / torch.arange(1, len(hits) + 1)
