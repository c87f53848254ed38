"""VPTSP: semantic proxies from visual prompts, for image retrieval with Hugging Face vision transformers.

Names are imported on first use, so that `import vptsp` costs nothing and the modelling files are each loaded once.
"""

import importlib

from ._version import __version__


_EXPORTS = {
    "BlockedSimilarity": "eval.neighbours",
    "CUB200": "data_scripts.benchmarks.cub",
    "Cars196": "data_scripts.benchmarks.cars",
    "ClassBalancedBatchSampler": "data_scripts.sampler",
    "DATASETS": "data_scripts.dataset_registry",
    "DataArguments": "data_scripts.data_arguments",
    "DataError": "data_scripts.data_errors",
    "Digits": "data_scripts.digits",
    "Embedder": "search.embedder",
    "EmbeddingStore": "search.store",
    "EvalTransform": "data_scripts.transforms",
    "EvaluatedImages": "eval.run_pictures",
    "Hit": "search.vector_index",
    "HubImages": "data_scripts.hub",
    "INaturalist2018": "data_scripts.benchmarks.inaturalist",
    "ImageDataset": "data_scripts.torch_dataset",
    "ImageError": "data_scripts.data_errors",
    "ImageFolders": "data_scripts.folder",
    "ImageSource": "search.image_sources",
    "InShop": "data_scripts.benchmarks.inshop",
    "IndexChangedError": "search.index_files",
    "IndexMismatchError": "search.vector_index",
    "Interval": "eval.intervals",
    "MilvusIndex": "search.milvus",
    "PairedComparison": "eval.intervals",
    "RetrievalIndex": "search.index",
    "SampleKey": "data_scripts.sampler",
    "StanfordOnlineProducts": "data_scripts.benchmarks.sop",
    "StoreInfo": "search.store",
    "StreamedImages": "data_scripts.streaming",
    "TrainTransform": "data_scripts.transforms",
    "VPTSPConfig": "configuration_vptsp",
    "VPTSPForMetricLearning": "training.model",
    "VPTSPModel": "modeling_vptsp",
    "VPTSPTrainer": "training.trainer",
    "VPTSPTrainingArguments": "training.arguments",
    "bootstrap_interval": "eval.intervals",
    "cached_store": "search.embed",
    "check_data_arguments": "data_scripts.data_arguments",
    "check_labels": "data_scripts.labels",
    "check_output_apart": "data_scripts.data_arguments",
    "choose_factory": "search.index_factory",
    "choose_queries": "eval.pictures",
    "class_distances": "eval.geometry",
    "cls_attention": "eval.attention",
    "clustering_metrics": "eval.clustering",
    "collate_images": "data_scripts.torch_dataset",
    "compare_paired": "eval.intervals",
    "compare_stores": "eval.report",
    "compute_retrieval_metrics": "eval.summary",
    "confused_pairs": "eval.confusion",
    "confusion_shares": "eval.confusion",
    "count_relevant": "eval.metrics",
    "draw_attention": "eval.run_pictures",
    "draw_confusion": "eval.run_pictures",
    "draw_curves": "eval.run_pictures",
    "draw_failures": "eval.run_pictures",
    "draw_map": "eval.run_pictures",
    "draw_neighbours": "eval.run_pictures",
    "draw_proxies": "eval.run_pictures",
    "draw_run": "eval.run_pictures",
    "edit_index": "search.vector_index",
    "embed_to_store": "search.embed",
    "embedding_metrics": "eval.summary",
    "evaluate_stores": "eval.report",
    "find_failures": "eval.failures",
    "folder_source": "search.image_sources",
    "geometry_metrics": "eval.geometry",
    "inter_class_distance": "eval.geometry",
    "intra_class_distance": "eval.geometry",
    "kmeans_clusters": "eval.clustering",
    "list_images": "data_scripts.image_files",
    "list_source": "search.image_sources",
    "load_splits": "data_scripts.dataset_registry",
    "make_transforms": "data_scripts.transforms",
    "map_at_k": "eval.metrics",
    "map_at_r": "eval.metrics",
    "map_at_r_published": "eval.metrics",
    "map_embeddings": "eval.embedding_map",
    "mean_scores": "eval.metrics",
    "metric_folder": "eval.summary",
    "nearest_neighbours": "eval.neighbours",
    "normalized_mutual_information": "eval.clustering",
    "open_image": "data_scripts.images",
    "open_index": "search.vector_index",
    "pairwise_f1": "eval.clustering",
    "r_precision": "eval.metrics",
    "recall_at_k": "eval.metrics",
    "register_metric": "eval.metric_registry",
    "retrieval_metrics": "eval.metrics",
    "retrieval_scores": "eval.metrics",
    "same_items": "data_scripts.overlap",
    "save_attention": "eval.attention",
    "save_confusion": "eval.confusion",
    "save_embedding_map": "eval.embedding_map",
    "save_failure_grid": "eval.failures",
    "save_neighbour_grid": "eval.pictures",
    "save_proxy_movement": "eval.proxy_curves",
    "save_training_curves": "eval.curves",
    "spectral_decay": "eval.geometry",
    "split_source": "search.image_sources",
    "write_report": "eval.report",
}


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_EXPORTS])


__all__ = ["__version__", *_EXPORTS]
