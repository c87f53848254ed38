"""What an evaluation needs, looked at before anything is trained: data sets, classes, and the metric that chooses."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..data_scripts.labels import check_labels
from ..data_scripts.streaming import StreamedImages
from ..data_scripts.transforms import TrainTransform
from ..eval.metric_registry import METRICS
from ..eval.metrics import count_relevant
from .run_errors import ConfigError


_UNANSWERED = {1: "no class has two images", 2: "no class of the queries is in the gallery"}


def named_sets(dataset) -> dict:
    """What to evaluate, by name: several data sets as they are given, one under an empty name.

    Args:
        dataset: A data set, a dict of `query` and `gallery`, or a dict of either by name.

    Raises:
        ValueError: a dict has one of `query` and `gallery` alone, or beside others, or a name is not text.
    """
    pair = {"query", "gallery"}
    if not isinstance(dataset, dict) or set(dataset) == pair:
        return {"": dataset}
    if pair & set(dataset):
        raise ValueError(f"a dict of eval datasets must have query and gallery, or other names, got {sorted(dataset)}")
    for name, part in dataset.items():
        if isinstance(part, dict) and set(part) != pair:
            raise ValueError(f"{name} of the eval datasets must have query and gallery, got {sorted(part)}")
    if not dataset or not all(isinstance(name, str) and name for name in dataset):
        raise ValueError(f"a dict of eval datasets must have names that are text, got {list(dataset)}")
    return dataset


def data_sets_in(dataset) -> list:
    """The single data sets of what `evaluate` takes, whatever they are; none of None."""
    if not isinstance(dataset, dict):
        return [] if dataset is None else [dataset]
    return [single for part in dataset.values() for single in (data_sets_in(part) if part is not None else [None])]


def check_evaluation(dataset, args, measure, knows_all):
    """Refuse an evaluation that can't work, or that does not give the metric by which checkpoints are chosen.

    Args:
        dataset: As for `VPTSPTrainer.evaluate`.
        args: A `VPTSPTrainingArguments`.
        measure: What computes metrics of `(queries, labels, gallery, labels, excluded)`, of a kind (`eval_metrics`).
        knows_all: Whether there are no further metrics, whose names only an evaluation would tell.

    Raises:
        ConfigError: the message names the data set or the metric, and what will do.
    """
    known = []
    for name, part in named_sets(dataset).items():
        where = check_data_sets(name, part)
        _check_answerable(part, where)
        known += [f"{name}_{metric}" if name else metric for metric in _metric_names(part, args, measure)]
    metric = args.metric_for_best_model
    if metric is not None and knows_all and metric.removeprefix("eval_") not in known:
        raise ConfigError(
            f"metric_for_best_model {metric} is none of what evaluation gives: {', '.join(known)}. Give one of these, "
            "or eval_strategy no"
        )


def check_data_sets(name, part):
    """[`check_data_set`] of one of [`named_sets`]; gives what errors call it."""
    where = f"eval_dataset {name!r}" if name else "eval_dataset"
    for single in data_sets_in({name: part}):
        check_data_set(single, where)
    return where


def check_data_set(dataset, where):
    """Refuse what is no data set of images, or one for training.

    Args:
        dataset: A single one.
        where: What it is, for the error.

    Raises:
        ConfigError: with what was expected.
    """
    rows = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, (str, bytes))
    if isinstance(dataset, (list, tuple)) and dataset:
        rows = isinstance(dataset[0], Mapping)
    if not hasattr(dataset, "evaluation_batches") and (not rows or isinstance(dataset, Mapping)):
        raise ConfigError(
            f"{where} must have evaluation_batches(batch_size), or rows and a length, as an ImageDataset or a "
            f"datasets.Dataset, got {_shown(dataset)}"
        )
    transform = getattr(dataset, "transform", None)
    if isinstance(transform, TrainTransform):
        raise ConfigError(
            f"{where} has the transform {transform}, which is for training: evaluation takes EvalTransform"
        )


def _shown(value):
    return repr(value) if value is None or isinstance(value, str) else type(value).__name__


def _check_answerable(part, where):
    """That some query can be answered, where the data sets say their classes; of streams as few rows as tell."""
    singles = [part["query"], part["gallery"]] if isinstance(part, dict) else [part]
    if all(isinstance(single, StreamedImages) for single in singles):
        if not singles[0].answered_classes(1, *singles[1:]):
            raise ConfigError(f"{where}: {_UNANSWERED[len(singles)]}, so no query can be answered")
        return
    if not all(hasattr(single, "labels") for single in singles):
        return
    labels = [torch.from_numpy(check_labels(single.labels, where=f"labels of {where}")) for single in singles]
    for single in labels:
        if not len(single):
            raise ConfigError(f"{where} is empty")
    if not count_relevant(*labels).any():
        raise ConfigError(f"{where}: {_UNANSWERED[len(labels)]}, so no query can be answered")


def _metric_names(part, args, measure):
    """Names of the metrics of a data set: those of an evaluation of four points, and the registered ones."""
    points, labels = torch.eye(2).repeat_interleave(2, dim=0), torch.tensor([0, 0, 1, 1])
    gallery = (points.flip(0), labels.flip(0)) if isinstance(part, dict) else (None, None)
    return [*measure((points, labels, *gallery, None), args.eval_metrics), *METRICS, "num_unreadable"]


__all__ = ["check_data_set", "check_data_sets", "check_evaluation", "data_sets_in", "named_sets"]
