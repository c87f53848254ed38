"""Evaluation: exact neighbours, retrieval metrics, pictures of what was retrieved.

    from vptsp.eval import retrieval_metrics

    retrieval_metrics(embeddings, labels)  # {"recall_at_1": ..., "map_at_r": ..., ...}

Names are imported on first use, so that importing the package loads neither torch nor matplotlib.
"""

import importlib


_EXPORTS = {
    "BlockedSimilarity": "neighbours",
    "choose_queries": "pictures",
    "count_relevant": "metrics",
    "map_at_r": "metrics",
    "map_at_r_published": "metrics",
    "nearest_neighbours": "neighbours",
    "r_precision": "metrics",
    "recall_at_k": "metrics",
    "retrieval_metrics": "metrics",
    "retrieval_scores": "metrics",
    "save_neighbour_grid": "pictures",
}


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_EXPORTS])


__all__ = list(_EXPORTS)
