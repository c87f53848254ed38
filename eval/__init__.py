"""Evaluation: exact neighbours, measures of retrieval, clustering and geometry, stores and indexes of embeddings.

    from vptsp.eval import embedding_metrics, retrieval_metrics

    retrieval_metrics(embeddings, labels)  # {"recall_at_1": ..., "map_at_r": ..., ...}
    embedding_metrics(embeddings, labels, confidence=0.95)  # all measures, with confidence intervals

Names are imported on first use, so that importing the package loads neither torch nor matplotlib.
"""

import importlib


_EXPORTS = {
    "BlockedSimilarity": "neighbours",
    "Embedder": "embedder",
    "EmbeddingStore": "store",
    "EvaluatedImages": "run_pictures",
    "Hit": "vector_index",
    "ImageSource": "sources",
    "IndexChangedError": "index_files",
    "IndexMismatchError": "vector_index",
    "Interval": "intervals",
    "MilvusIndex": "milvus",
    "PairedComparison": "intervals",
    "RetrievalIndex": "index",
    "StoreInfo": "store",
    "bootstrap_interval": "intervals",
    "cached_store": "embed",
    "choose_factory": "factory",
    "choose_queries": "pictures",
    "class_distances": "geometry",
    "cls_attention": "attention",
    "clustering_metrics": "clustering",
    "compare_paired": "intervals",
    "compare_stores": "report",
    "compute_retrieval_metrics": "summary",
    "confused_pairs": "confusion",
    "confusion_shares": "confusion",
    "count_relevant": "metrics",
    "draw_attention": "run_pictures",
    "draw_confusion": "run_pictures",
    "draw_curves": "run_pictures",
    "draw_failures": "run_pictures",
    "draw_map": "run_pictures",
    "draw_neighbours": "run_pictures",
    "draw_proxies": "run_pictures",
    "draw_run": "run_pictures",
    "edit_index": "vector_index",
    "embed_to_store": "embed",
    "embedding_metrics": "summary",
    "evaluate_stores": "report",
    "find_failures": "failures",
    "folder_source": "sources",
    "geometry_metrics": "geometry",
    "inter_class_distance": "geometry",
    "intra_class_distance": "geometry",
    "kmeans_clusters": "clustering",
    "list_source": "sources",
    "map_at_k": "metrics",
    "map_at_r": "metrics",
    "map_at_r_published": "metrics",
    "map_embeddings": "embedding_map",
    "mean_scores": "metrics",
    "metric_folder": "summary",
    "nearest_neighbours": "neighbours",
    "normalized_mutual_information": "clustering",
    "open_index": "vector_index",
    "pairwise_f1": "clustering",
    "r_precision": "metrics",
    "recall_at_k": "metrics",
    "register_metric": "registry",
    "retrieval_metrics": "metrics",
    "retrieval_scores": "metrics",
    "same_items": "overlap",
    "save_attention": "attention",
    "save_confusion": "confusion",
    "save_embedding_map": "embedding_map",
    "save_failure_grid": "failures",
    "save_neighbour_grid": "pictures",
    "save_proxy_movement": "proxy_curves",
    "save_training_curves": "curves",
    "spectral_decay": "geometry",
    "split_source": "sources",
    "write_report": "report",
}


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_EXPORTS])


__all__ = list(_EXPORTS)
