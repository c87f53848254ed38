"""All measures of one set of embeddings in one call, and where the same lies as a module of the library `evaluate`."""

from __future__ import annotations

from pathlib import Path

import torch

from .checks import as_tensor
from .clustering import clustering_metrics
from .geometry import geometry_metrics
from .intervals import bootstrap_interval
from .metrics import count_in_gallery, mean_scores, retrieval_metrics, retrieval_scores


def embedding_metrics(
    query_embeddings,
    query_labels,
    gallery_embeddings=None,
    gallery_labels=None,
    recall_at=(1, 2, 4, 8),
    map_at=(1000,),
    clustering=True,
    geometry=True,
    confidence=None,
    resample="classes",
    num_resamples=2000,
    seed=0,
    device=None,
    excluded=None,
    rerank=None,
    expand=None,
    progress=False,
):
    """Retrieval, clustering and geometry of embeddings, with confidence intervals on demand.

    Similarities are computed once. Clustering and geometry look at all items: those of the gallery too, where there
    is one, and each once.

    Args:
        query_embeddings, query_labels, gallery_embeddings, gallery_labels, recall_at, map_at, device, excluded,
            rerank, expand: As of [`retrieval_metrics`]. Clustering and geometry are of the embeddings as they are.
            progress: As of [`retrieval_metrics`].
        clustering: Whether to add [`clustering_metrics`]; k-means takes longest where there are many classes.
        geometry: Whether to add [`geometry_metrics`].
        confidence: In (0, 1), such as 0.95: adds a percentile bootstrap interval to each retrieval metric. None: none.
        resample: What the bootstrap draws: `"classes"` of queries or single `"queries"`; see [`bootstrap_interval`].
        num_resamples: Of the bootstrap.
        seed: Of k-means and of the bootstrap.

    Returns:
        Flat dict of floats and counts, as those functions return them; with confidence, `NAME_low` and `NAME_high` for
        each retrieval metric.

    Raises:
        TypeError, ValueError: as for those functions (geometry needs two classes, and a class with two items), or
            resample is neither of the two.

    Example:
        >>> embeddings = torch.eye(3).repeat_interleave(4, dim=0)
        >>> metrics = embedding_metrics(embeddings, torch.arange(3).repeat_interleave(4), confidence=0.95)
        >>> metrics["map_at_r"], metrics["map_at_r_low"], metrics["map_at_1000"], metrics["nmi"]
        (1.0, 1.0, 1.0, 1.0)
        >>> metrics["intra_class_distance"], metrics["spectral_decay"]
        (0.0, 0.0)
    """
    if resample not in ("classes", "queries"):
        raise ValueError(f"resample must be 'classes' or 'queries', got {resample!r}")
    sets = query_embeddings, query_labels, gallery_embeddings, gallery_labels = [
        as_tensor(values) for values in (query_embeddings, query_labels, gallery_embeddings, gallery_labels)
    ]
    excluded = as_tensor(excluded)
    how = {"rerank": rerank, "expand": expand, "progress": progress}
    scores = retrieval_scores(*sets, recall_at, device=device, map_at=map_at, excluded=excluded, **how)
    metrics = mean_scores(scores) | count_in_gallery(excluded)
    if confidence is not None:
        clusters = query_labels if resample == "classes" else None
        for name, values in scores.items():
            interval = bootstrap_interval(values, clusters, confidence, num_resamples, seed)
            metrics[f"{name}_low"], metrics[f"{name}_high"] = interval.low, interval.high
    if not clustering and not geometry:
        return metrics
    embeddings, labels = query_embeddings, query_labels
    if gallery_embeddings is not None:
        if excluded is not None:  # they are in the gallery
            alone = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
            alone[excluded[:, 0].to(labels.device)] = False
            embeddings, labels = embeddings[alone.to(embeddings.device)], labels[alone]
        embeddings = torch.cat([embeddings, gallery_embeddings.to(embeddings.device)])
        labels = torch.cat([labels, gallery_labels.to(labels.device)])
    if clustering:
        metrics |= clustering_metrics(embeddings, labels, seed)
    if geometry:
        metrics |= geometry_metrics(embeddings, labels)
    return metrics


def compute_retrieval_metrics(eval_prediction, recall_at=(1, 2, 4, 8), map_at=()):
    """[`retrieval_metrics`] as the `compute_metrics` of any `transformers.Trainer`.

    For a model whose `forward` returns embeddings (after the loss, if there is one). Options go in by
    `functools.partial`. `VPTSPTrainer` needs none of this: it computes these metrics by itself, and can evaluate
    queries against a gallery.

    Args:
        eval_prediction: A `transformers.EvalPrediction`: `predictions` are the embeddings, `(N, E)` float and
            L2-normalised, or a tuple that begins with them; `label_ids` the classes, `(N,)` integer.
        recall_at, map_at: As of [`retrieval_metrics`].

    Returns:
        Dict of floats in [0, 1] and counts, as of [`retrieval_metrics`].

    Raises:
        TypeError, ValueError: as for [`retrieval_metrics`].

    Example:
        >>> from transformers import EvalPrediction
        >>> prediction = EvalPrediction(torch.eye(2).repeat_interleave(2, dim=0).numpy(), torch.tensor([0, 0, 1, 1]))
        >>> compute_retrieval_metrics(prediction)["map_at_r"]
        1.0
    """
    predictions = eval_prediction.predictions
    embeddings = torch.as_tensor(predictions[0] if isinstance(predictions, tuple) else predictions)
    labels = torch.as_tensor(eval_prediction.label_ids)
    return retrieval_metrics(embeddings, labels, recall_at=recall_at, map_at=map_at)


def metric_folder():
    """Folder of the module for the library `evaluate`: `evaluate.load(metric_folder())`, offline too.

    Returns:
        The path as a string.

    Example:
        >>> metric_folder().endswith("retrieval_metric")
        True
    """
    return str(Path(__file__).resolve().parent / "retrieval_metric")


__all__ = ["compute_retrieval_metrics", "embedding_metrics", "metric_folder"]
