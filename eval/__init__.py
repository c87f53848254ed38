"""Evaluation: exact neighbours, measures of retrieval, clustering and geometry with intervals, pictures.

    from vptsp.eval import embedding_metrics, retrieval_metrics

    retrieval_metrics(embeddings, labels)  # {"recall_at_1": ..., "map_at_r": ..., ...}
    embedding_metrics(embeddings, labels, confidence=0.95)  # all measures, with confidence intervals

Names are imported on first use, so that importing the package loads neither torch nor matplotlib.
"""

import importlib


_EXPORTS = {
    "BlockedSimilarity": "neighbours",
    "Interval": "intervals",
    "PairedComparison": "intervals",
    "bootstrap_interval": "intervals",
    "choose_queries": "pictures",
    "class_distances": "geometry",
    "clustering_metrics": "clustering",
    "compare_paired": "intervals",
    "compute_retrieval_metrics": "summary",
    "count_relevant": "metrics",
    "embedding_metrics": "summary",
    "geometry_metrics": "geometry",
    "inter_class_distance": "geometry",
    "intra_class_distance": "geometry",
    "kmeans_clusters": "clustering",
    "map_at_k": "metrics",
    "map_at_r": "metrics",
    "map_at_r_published": "metrics",
    "mean_scores": "metrics",
    "metric_folder": "summary",
    "nearest_neighbours": "neighbours",
    "normalized_mutual_information": "clustering",
    "pairwise_f1": "clustering",
    "r_precision": "metrics",
    "recall_at_k": "metrics",
    "retrieval_metrics": "metrics",
    "retrieval_scores": "metrics",
    "save_neighbour_grid": "pictures",
    "spectral_decay": "geometry",
}


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_EXPORTS])


__all__ = list(_EXPORTS)
