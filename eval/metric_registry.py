"""Metrics that every evaluation of the trainer computes beside its own, by name."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable

from ..names.registry import Registry


logger = logging.getLogger(__name__)

METRICS: Registry[Callable] = Registry("metric")


def register_metric(name: str):
    """Decorator: make a function a metric of every evaluation.

    The function gets `query_embeddings (Q, E)` L2-normalised, `query_labels (Q,)`, and `gallery_embeddings (G, E)` and
    `gallery_labels (G,)`, which are None where the queries are the gallery; it returns a float. If it has a parameter
    `excluded`, it gets the pairs of a query and a gallery item that it may not find (None for none), and a warning
    says so if it has none and there are some. In the results it is
    `eval_<name>`, and `--metric_for_best_model <name>` chooses checkpoints by it.

    Raises:
        ValueError: the name is another metric's.
    """
    return METRICS.register(name)


def registered_metrics(query_embeddings, query_labels, gallery_embeddings=None, gallery_labels=None, excluded=None):
    """All registered metrics of embeddings, as a dict of name and float."""
    inputs = (query_embeddings, query_labels, gallery_embeddings, gallery_labels)
    results = {}
    for name, function in METRICS.items():
        takes = "excluded" in inspect.signature(function).parameters
        if not takes and excluded is not None and len(excluded):
            logger.warning("the metric %s has no parameter `excluded`: queries in the gallery find themselves", name)
        results[name] = float(function(*inputs, **({"excluded": excluded} if takes else {})))
    return results


__all__ = ["METRICS", "register_metric", "registered_metrics"]
