"""Ranks with ties: what a metric is worth on average over the orders that equal similarities leave open.

Items of equal similarity have no order. Any order that one picks (by row, by whatever the sort did) can favour hits or
misses: if all embeddings are equal and the files are sorted by class, "first come" scores far from chance. So every
metric here is the mean over all orders of the tied items, each equally likely, in closed form. It depends neither on
the order of the rows nor on a seed; without ties it is the plain metric, and equal embeddings score exactly chance.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass
class TiedRanking:
    """The first K ranks of some queries, each rank with the group of tied items that it falls into.

    A group occupies the ranks `before + 1 ... before + size`, in any order; an item without ties is a group of one.
    The last group may reach beyond rank K. All fields are `(b, K)` int64, one entry per rank.

    Attributes:
        before: Items ranked above the group.
        size: Items in the group.
        hits_before: Items of the query's class above the group.
        hits: Items of the query's class in the group.
    """

    before: torch.Tensor
    size: torch.Tensor
    hits_before: torch.Tensor
    hits: torch.Tensor

    def first(self, depth):
        """The first `depth` ranks of these."""
        return TiedRanking(*(getattr(self, part.name)[:, :depth] for part in fields(self)))

    def chance_of_hit(self, k):
        """Probability that one of the first k items is a hit, `(b,)` float64: Recall@K of each query.

        If none stands above the group of rank k, t = k - before of its m items come among the first k, and all t miss
        with probability C(m - h, t) / C(m, t).
        """
        at = k - 1
        drawn = (k - self.before[:, at]).double()
        size, hits = self.size[:, at].double(), self.hits[:, at].double()
        misses = size - hits
        # in pairs that cancel exactly where h = 0
        log_all_miss = (torch.lgamma(misses + 1) - torch.lgamma(size + 1)) + (
            torch.lgamma(size - drawn + 1) - torch.lgamma((misses - drawn).clamp(min=0) + 1)
        )
        chance = torch.where(drawn > misses, 1.0, -torch.expm1(log_all_miss))
        return torch.where(self.hits_before[:, at] > 0, 1.0, chance)

    def expected_hits(self):
        """Probability that the item at each rank is a hit, `(b, K)` float64: h / m."""
        return self.hits.double() / self.size

    def expected_precision_terms(self):
        """Mean of `[hit at rank i] * precision among the first i`, `(b, K)` float64: the terms of average precision.

        At the j-th rank of a group of m items with h hits and H hits above it,

            (h / m) * (H + 1 + (j - 1) * (h - 1) / (m - 1)) / i

        since the j - 1 tied items above a hit are drawn from the other m - 1, of which h - 1 are hits.
        """
        ranks = torch.arange(1, self.size.shape[1] + 1, device=self.size.device)
        place = ranks - self.before - 1  # j - 1
        hits_above = self.hits_before + (place * (self.hits - 1)).double() / (self.size - 1).clamp(min=1)
        return self.expected_hits() * (hits_above + 1) / ranks


def rank_with_ties(similarity, query_labels, gallery_labels, depth):
    """The first ranks of some queries, with their ties counted over the whole gallery.

    Args:
        similarity: `(b, G)` float; -inf where an item may not be found: it comes last, and is no hit.
        query_labels: `(b,)` int64.
        gallery_labels: `(G,)` int64.
        depth: Number of ranks K <= G.

    Returns:
        `TiedRanking` with fields of shape `(b, depth)`.
    """
    values, columns = similarity.topk(min(depth + 1, similarity.shape[1]), dim=1)
    hits = gallery_labels[columns[:, :depth]] == query_labels[:, None]
    hits &= values[:, :depth].isfinite()
    ranking = rank_sorted(values[:, :depth], hits)
    if values.shape[1] > depth:
        cut = (values[:, depth] == values[:, depth - 1]).nonzero().squeeze(1)
        if len(cut):  # the top items hold only part of the last group: count all of it
            last = ranking.before[cut] + ranking.size[cut] == depth
            equal = similarity[cut] == values[cut, depth, None]
            ranking.size[cut] = torch.where(last, equal.sum(1, keepdim=True), ranking.size[cut])
            equal &= (gallery_labels == query_labels[cut, None]) & similarity[cut].isfinite()
            ranking.hits[cut] = torch.where(last, equal.sum(1, keepdim=True), ranking.hits[cut])
    return ranking


def rank_sorted(values, hits):
    """All ranks of items in order, with their ties among one another.

    Args:
        values: `(b, K)` float, similarities, largest first.
        hits: `(b, K)` bool, whether they are of the query's class.

    Returns:
        `TiedRanking` with fields of shape `(b, K)`.
    """
    depth = values.shape[1]
    ranks = torch.arange(depth, device=values.device).expand(len(values), depth)
    hits_so_far = torch.nn.functional.pad(hits.cumsum(1), (1, 0))  # (b, depth + 1)

    starts = torch.ones_like(hits)
    starts[:, 1:] = values[:, 1:] != values[:, :-1]
    before = torch.where(starts, ranks, 0).cummax(1).values
    ends = torch.full_like(before, depth)  # a group ends where the next one starts
    ends[:, :-1] = torch.where(starts[:, 1:], ranks[:, 1:], depth)
    ends = ends.flip(1).cummin(1).values.flip(1)

    hits_before = hits_so_far.gather(1, before)
    group_hits = hits_so_far.gather(1, ends) - hits_before
    return TiedRanking(before=before, size=ends - before, hits_before=hits_before, hits=group_hits)


__all__ = ["TiedRanking", "rank_sorted", "rank_with_ties"]
