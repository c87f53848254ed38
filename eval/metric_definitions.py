"""What each metric is: the one table of them, which reports, model cards and the documentation show.

The formulas and their sources are where the metrics are computed: `metrics`, `clustering`, `geometry`.
"""

from __future__ import annotations

from typing import NamedTuple


class MetricDefinition(NamedTuple):
    """One metric.

    Attributes:
        kind: `retrieval` (a mean over queries) and `clustering` lie in [0, 1]; `geometry`; `count`.
        meaning: What it is, in a line.
        title: As the field writes it; empty where that is its name.
    """

    kind: str
    meaning: str
    title: str = ""

    @property
    def in_percent(self) -> bool:
        """Whether tables show it in percent."""
        return self.kind in ("retrieval", "clustering")


DEFINITIONS = {
    "recall_at_K": MetricDefinition(
        "retrieval", "share of queries with an item of their class among the K nearest", "R@K"
    ),
    "map_at_r": MetricDefinition(
        "retrieval",
        "precision at the ranks of the hits among the first R, summed and divided by R, the number of other items of "
        "the query's class (Musgrave et al., ECCV 2020)",
        "MAP@R",
    ),
    "map_at_r_published": MetricDefinition(
        "retrieval",
        "the same over the first R + 1 and divided by R + 1, as in the tables of the VPTSP paper; compare only these",
        "MAP@R, as published",
    ),
    "r_precision": MetricDefinition("retrieval", "share of the first R that are of the query's class", "R-precision"),
    "map_at_K": MetricDefinition(
        "retrieval",
        "precision at the ranks of the hits among the first K, summed and divided by R or, if that is less, by K",
        "mAP@K",
    ),
    "nmi": MetricDefinition(
        "clustering",
        "normalised mutual information of classes and as many k-means clusters, by the arithmetic mean of the two "
        "entropies; not corrected for chance",
    ),
    "pairwise_f1": MetricDefinition(
        "clustering", "F1 of pairs that share such a cluster, against pairs that share a class"
    ),
    "intra_class_distance": MetricDefinition("geometry", "root mean square distance of two items of a class"),
    "inter_class_distance": MetricDefinition("geometry", "root mean square distance of the means of two classes"),
    "intra_inter_ratio": MetricDefinition(
        "geometry", "the former by the latter: small where classes are dense and far apart"
    ),
    "spectral_decay": MetricDefinition(
        "geometry",
        "KL divergence of the normalised singular values from uniform, in nats: 0 if all directions are used alike",
    ),
    "num_queries": MetricDefinition("count", "queries that can be answered"),
    "num_unanswerable": MetricDefinition("count", "queries left out, since their class has no other item"),
    "num_in_gallery": MetricDefinition(
        "count", "queries that are in the gallery too, where they may not find themselves"
    ),
    "num_clusters": MetricDefinition("count", "clusters of k-means"),
}
"""By name; `K` stands for a number."""


def definition_of(name: str) -> MetricDefinition | None:
    """What a metric of this name is, with its K filled in; None for one that is not of this package.

    Example:
        >>> definition_of("recall_at_10").title
        'R@10'
    """
    stem, _, k = name.rpartition("_")
    if not k.isdecimal():
        return DEFINITIONS.get(name)
    found = DEFINITIONS.get(f"{stem}_K")
    return found and found._replace(meaning=found.meaning.replace("K", k), title=found.title.replace("K", k))


__all__ = ["DEFINITIONS", "MetricDefinition", "definition_of"]
