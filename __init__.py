"""VPTSP: semantic proxies from visual prompts, for image retrieval with Hugging Face vision transformers.

Names are imported on first use, so that `import vptsp` costs nothing and the modelling files are each loaded once.
"""

import importlib
from typing import TYPE_CHECKING

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
    "FAMILIES": "training.model_registry",
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
    "LOSSES": "losses.loss_registry",
    "METRICS": "eval.metric_registry",
    "MilvusIndex": "search.milvus",
    "PairedComparison": "eval.intervals",
    "RetrievalIndex": "search.index",
    "SampleKey": "data_scripts.sampler",
    "StanfordOnlineProducts": "data_scripts.benchmarks.sop",
    "StoreInfo": "search.store",
    "StreamedImages": "data_scripts.streaming",
    "TUNINGS": "training.model_registry",
    "TableImages": "data_scripts.tables",
    "TrainTransform": "data_scripts.transforms",
    "VPTSPConfig": "configuration_vptsp",
    "VPTSPForMetricLearning": "training.model",
    "VPTSPModel": "modeling_vptsp",
    "VPTSPTrainer": "training.trainer",
    "VPTSPTrainingArguments": "training.arguments",
    "bootstrap_interval": "eval.intervals",
    "build_image_processor": "data_scripts.preprocessing",
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
    "edit_index": "search.open_index",
    "embed_to_store": "search.embed",
    "embedding_metrics": "eval.summary",
    "evaluate_stores": "eval.report",
    "find_failures": "eval.failures",
    "folder_source": "search.image_sources",
    "geometry_metrics": "eval.geometry",
    "image_datasets": "data_scripts.image_datasets",
    "inter_class_distance": "eval.geometry",
    "intra_class_distance": "eval.geometry",
    "joined_source": "search.image_sources",
    "kmeans_clusters": "eval.clustering",
    "list_images": "data_scripts.image_files",
    "list_source": "search.image_sources",
    "load_splits": "data_scripts.dataset_registry",
    "make_transforms": "data_scripts.image_datasets",
    "map_embeddings": "eval.embedding_map",
    "mean_scores": "eval.metrics",
    "metric_folder": "eval.summary",
    "nearest_neighbours": "eval.neighbours",
    "normalized_mutual_information": "eval.clustering",
    "open_image": "data_scripts.images",
    "open_index": "search.open_index",
    "pairwise_f1": "eval.clustering",
    "place_source": "search.image_sources",
    "register_dataset": "data_scripts.dataset_registry",
    "register_family": "training.model_registry",
    "register_loss": "losses.loss_registry",
    "register_metric": "eval.metric_registry",
    "register_tuning": "training.model_registry",
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
    "table_source": "search.image_sources",
    "write_report": "eval.report",
}


if TYPE_CHECKING:  # what type checkers and editors see
    from .configuration_vptsp import VPTSPConfig as VPTSPConfig
    from .data_scripts.benchmarks.cars import Cars196 as Cars196
    from .data_scripts.benchmarks.cub import CUB200 as CUB200
    from .data_scripts.benchmarks.inaturalist import INaturalist2018 as INaturalist2018
    from .data_scripts.benchmarks.inshop import InShop as InShop
    from .data_scripts.benchmarks.sop import StanfordOnlineProducts as StanfordOnlineProducts
    from .data_scripts.data_arguments import DataArguments as DataArguments
    from .data_scripts.data_arguments import check_data_arguments as check_data_arguments
    from .data_scripts.data_arguments import check_output_apart as check_output_apart
    from .data_scripts.data_errors import DataError as DataError
    from .data_scripts.data_errors import ImageError as ImageError
    from .data_scripts.dataset_registry import DATASETS as DATASETS
    from .data_scripts.dataset_registry import load_splits as load_splits
    from .data_scripts.dataset_registry import register_dataset as register_dataset
    from .data_scripts.digits import Digits as Digits
    from .data_scripts.folder import ImageFolders as ImageFolders
    from .data_scripts.hub import HubImages as HubImages
    from .data_scripts.image_datasets import image_datasets as image_datasets
    from .data_scripts.image_datasets import make_transforms as make_transforms
    from .data_scripts.image_files import list_images as list_images
    from .data_scripts.images import open_image as open_image
    from .data_scripts.labels import check_labels as check_labels
    from .data_scripts.overlap import same_items as same_items
    from .data_scripts.preprocessing import build_image_processor as build_image_processor
    from .data_scripts.sampler import ClassBalancedBatchSampler as ClassBalancedBatchSampler
    from .data_scripts.sampler import SampleKey as SampleKey
    from .data_scripts.streaming import StreamedImages as StreamedImages
    from .data_scripts.tables import TableImages as TableImages
    from .data_scripts.torch_dataset import ImageDataset as ImageDataset
    from .data_scripts.torch_dataset import collate_images as collate_images
    from .data_scripts.transforms import EvalTransform as EvalTransform
    from .data_scripts.transforms import TrainTransform as TrainTransform
    from .eval.attention import cls_attention as cls_attention
    from .eval.attention import save_attention as save_attention
    from .eval.clustering import clustering_metrics as clustering_metrics
    from .eval.clustering import kmeans_clusters as kmeans_clusters
    from .eval.clustering import normalized_mutual_information as normalized_mutual_information
    from .eval.clustering import pairwise_f1 as pairwise_f1
    from .eval.confusion import confused_pairs as confused_pairs
    from .eval.confusion import confusion_shares as confusion_shares
    from .eval.confusion import save_confusion as save_confusion
    from .eval.curves import save_training_curves as save_training_curves
    from .eval.embedding_map import map_embeddings as map_embeddings
    from .eval.embedding_map import save_embedding_map as save_embedding_map
    from .eval.failures import find_failures as find_failures
    from .eval.failures import save_failure_grid as save_failure_grid
    from .eval.geometry import class_distances as class_distances
    from .eval.geometry import geometry_metrics as geometry_metrics
    from .eval.geometry import inter_class_distance as inter_class_distance
    from .eval.geometry import intra_class_distance as intra_class_distance
    from .eval.geometry import spectral_decay as spectral_decay
    from .eval.intervals import Interval as Interval
    from .eval.intervals import PairedComparison as PairedComparison
    from .eval.intervals import bootstrap_interval as bootstrap_interval
    from .eval.intervals import compare_paired as compare_paired
    from .eval.metric_registry import METRICS as METRICS
    from .eval.metric_registry import register_metric as register_metric
    from .eval.metrics import count_relevant as count_relevant
    from .eval.metrics import mean_scores as mean_scores
    from .eval.metrics import retrieval_metrics as retrieval_metrics
    from .eval.metrics import retrieval_scores as retrieval_scores
    from .eval.neighbours import BlockedSimilarity as BlockedSimilarity
    from .eval.neighbours import nearest_neighbours as nearest_neighbours
    from .eval.pictures import choose_queries as choose_queries
    from .eval.pictures import save_neighbour_grid as save_neighbour_grid
    from .eval.proxy_curves import save_proxy_movement as save_proxy_movement
    from .eval.report import compare_stores as compare_stores
    from .eval.report import evaluate_stores as evaluate_stores
    from .eval.report import write_report as write_report
    from .eval.run_pictures import EvaluatedImages as EvaluatedImages
    from .eval.run_pictures import draw_attention as draw_attention
    from .eval.run_pictures import draw_confusion as draw_confusion
    from .eval.run_pictures import draw_curves as draw_curves
    from .eval.run_pictures import draw_failures as draw_failures
    from .eval.run_pictures import draw_map as draw_map
    from .eval.run_pictures import draw_neighbours as draw_neighbours
    from .eval.run_pictures import draw_proxies as draw_proxies
    from .eval.run_pictures import draw_run as draw_run
    from .eval.summary import compute_retrieval_metrics as compute_retrieval_metrics
    from .eval.summary import embedding_metrics as embedding_metrics
    from .eval.summary import metric_folder as metric_folder
    from .losses.loss_registry import LOSSES as LOSSES
    from .losses.loss_registry import register_loss as register_loss
    from .modeling_vptsp import VPTSPModel as VPTSPModel
    from .search.embed import cached_store as cached_store
    from .search.embed import embed_to_store as embed_to_store
    from .search.embedder import Embedder as Embedder
    from .search.image_sources import ImageSource as ImageSource
    from .search.image_sources import folder_source as folder_source
    from .search.image_sources import joined_source as joined_source
    from .search.image_sources import list_source as list_source
    from .search.image_sources import place_source as place_source
    from .search.image_sources import split_source as split_source
    from .search.image_sources import table_source as table_source
    from .search.index import RetrievalIndex as RetrievalIndex
    from .search.index_factory import choose_factory as choose_factory
    from .search.index_files import IndexChangedError as IndexChangedError
    from .search.milvus import MilvusIndex as MilvusIndex
    from .search.open_index import edit_index as edit_index
    from .search.open_index import open_index as open_index
    from .search.store import EmbeddingStore as EmbeddingStore
    from .search.store import StoreInfo as StoreInfo
    from .search.vector_index import Hit as Hit
    from .search.vector_index import IndexMismatchError as IndexMismatchError
    from .training.arguments import VPTSPTrainingArguments as VPTSPTrainingArguments
    from .training.model import VPTSPForMetricLearning as VPTSPForMetricLearning
    from .training.model_registry import FAMILIES as FAMILIES
    from .training.model_registry import TUNINGS as TUNINGS
    from .training.model_registry import register_family as register_family
    from .training.model_registry import register_tuning as register_tuning
    from .training.trainer import VPTSPTrainer as VPTSPTrainer

else:

    def __getattr__(name):
        if name in _EXPORTS:
            return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_EXPORTS])


__all__ = ["__version__", *_EXPORTS]
