"""How a trainer embeds images and scores embeddings: one test set, queries against a gallery, or several sets."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from functools import partial
from itertools import islice

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalPrediction, IntervalStrategy, SaveStrategy, speed_metrics
from transformers.utils import logging

from ..data_scripts.image_datasets import images_of
from ..data_scripts.overlap import has_names, pixel_digests, same_dataset_images
from ..data_scripts.preprocessing import normalisation_for
from ..eval.embedding_loop import embed_batches
from ..eval.metric_registry import registered_metrics
from ..eval.metrics import count_in_gallery, retrieval_metrics, select_pairs
from ..eval.summary import embedding_metrics
from .evaluation_checks import check_data_set, check_data_sets, check_evaluation, named_sets
from .interruption import leave_signals_to_main_process
from .run_errors import TrainingError
from .sharing import SharingTrainer
from .unsupported_arguments import refuse_given


logger = logging.get_logger(__name__)


class EvaluatingTrainer(SharingTrainer):
    """A [`SharingTrainer`] whose evaluation is retrieval, with the metrics of `vptsp.eval`.

    Args:
        *args: As for [`SharingTrainer`].
        compute_metrics: Optional; gets embeddings as `predictions` and labels as `label_ids`, and adds to the metrics.
        **kwargs: As for [`SharingTrainer`].
    """

    def __init__(self, *args, eval_dataset=None, compute_metrics=None, **kwargs):
        self._extra_metrics = compute_metrics
        self._backbone_only = False
        self.last_evaluated = None
        self._excluded = {}
        self._normalise = None
        if eval_dataset is None and kwargs["args"].eval_strategy != "no":
            kwargs["args"] = _without_evaluation(kwargs["args"], kwargs.get("train_dataset") is not None)
        super().__init__(*args, eval_dataset=eval_dataset, **kwargs)
        if self.args.eval_strategy != "no":
            check_evaluation(eval_dataset, self.args, self._measure, knows_all=compute_metrics is None)

    def _loader_options(self):
        return {
            "collate_fn": self.data_collator,
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory,
            "prefetch_factor": self.args.dataloader_prefetch_factor,
            "multiprocessing_context": getattr(
                self.args, "dataloader_multiprocessing_context", None
            ),  # newer than 5.8
            "worker_init_fn": leave_signals_to_main_process,
        }

    def on_device(self, batch):
        """A batch on the device, with uint8 images normalised there as the image processor does, bit for bit."""
        batch = {  # a copy from pinned memory need not wait for the step before
            name: value.to(self.args.device, non_blocking=value.is_pinned()) if torch.is_tensor(value) else value
            for name, value in batch.items()
        }
        pixels = batch["pixel_values"]
        if pixels.dtype == torch.uint8:
            if self._normalise is None:  # not before there are such images: others need no image processor
                self._normalise = normalisation_for(None, self.model.config, token=self.args.hub_token)
                logger.warning(f"there is no processing_class: images get the backbone's {self._normalise}")
            batch["pixel_values"] = self._normalise(pixels)
        return batch

    # ---- Evaluation

    def _evaluated(self, dataset):
        """A data set, or a dict of them, with tables of the library `datasets` made ready for evaluation."""
        if isinstance(dataset, dict):
            return {name: self._evaluated(part) for name, part in dataset.items()}
        return images_of(dataset, "eval_dataset", *self._cut)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Embed a batch, for `predict`: `(None, embeddings (B, E), labels (B,))`, classes of any number.

        Embeddings of images that could not be read and were to be skipped are NaN.

        Raises:
            ValueError: `prediction_loss_only` or `ignore_keys` is given; there is neither a loss nor other outputs.
        """
        refuse_given(ignore_keys=ignore_keys)
        if prediction_loss_only:
            raise ValueError(
                "prediction_loss_only must be false, got true: evaluation scores embeddings, without loss"
            )
        inputs = self.on_device(inputs)
        embeddings = self._embed_batch(inputs["pixel_values"])
        if "readable" in inputs:
            embeddings[~inputs["readable"]] = torch.nan
        return None, embeddings, inputs["labels"]

    def _embed_batch(self, pixel_values):
        if self._backbone_only:
            return self._compute(self.model.retriever.embed_with_backbone, pixel_values)
        return self._compute(self.model.retriever, pixel_values).embeddings

    @torch.no_grad()
    def _compute(self, function, pixel_values):
        with self.accelerator.autocast():
            return function(pixel_values)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """Embeddings and labels as arrays, as `Trainer.predict`; metrics are times and those of `compute_metrics`.

        Of a dict of data sets, such as `query` and `gallery`, as `evaluate` takes it, a dict of such by name, with
        metrics of `{metric_key_prefix}_{name}`.

        Raises:
            ValueError: `ignore_keys` is given; embeddings are the only output. Or it is no data set of images, or a
                dict is none for `evaluate`.
        """
        refuse_given(ignore_keys=ignore_keys)
        if isinstance(test_dataset, dict):
            named_sets(test_dataset)  # says what is wrong with it
            prefixes = {name: f"{metric_key_prefix}_{name}" for name in test_dataset}
            return {name: self.predict(part, None, prefixes[name]) for name, part in test_dataset.items()}
        test_dataset = self._evaluated(test_dataset)
        check_data_set(test_dataset, "test_dataset")
        if hasattr(test_dataset, "__len__") and not len(test_dataset):
            raise ValueError("test_dataset is empty")
        with self.shared_weights():
            output = super().predict(test_dataset, metric_key_prefix=metric_key_prefix)
        if self._extra_metrics is not None:
            readable = np.isfinite(output.predictions).all(1)
            pair = EvalPrediction(predictions=output.predictions[readable], label_ids=output.label_ids[readable])
            output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in self._extra_metrics(pair).items()})
        return output

    def embed(self, dataset, description="Embedding", with_unreadable=False):
        """Embed a data set, each image once whatever the number of processes.

        Args:
            dataset: An `ImageDataset`, a `StreamedImages`, or another with rows and a length, or with
                `evaluation_batches(batch_size)`.
            description: For the progress bar.
            with_unreadable: Keep the places of images that could not be read and were to be skipped.

        Returns:
            Embeddings `(n, E)` float32 and labels `(n,)` int64 on the CPU, in the data set's order, the same on every
            process. Images that could not be read and were to be skipped are not among them, unless they keep their
            places; then a third tensor, `(n,)` bool, says which could be read.

        Raises:
            ValueError: it is no data set of images, or there is none in it.
        """
        dataset = self._evaluated(dataset)
        check_data_set(dataset, "dataset")
        embedded = self._embed_all(dataset, description)
        return embedded if with_unreadable else _readable(*embedded)

    def _embed_all(self, dataset, description="Embedding", with_digests=False, embed=None):
        """As `embed`, of all images, with `(n,)` bool: which could be read.

        Args:
            dataset: As for `embed`.
            description: For the progress bar.
            with_digests: Give `pixel_digests` too.
            embed: Function of `(B, 3, S, S)` normalised pixels on the device, that gives something else than the
                embeddings, `(B, width)`.
        """
        with self.shared_weights():
            return self._embed_rows(dataset, description, with_digests, embed)

    def _embed_rows(self, dataset, description, with_digests, embed):
        rank, world_size = self.args.process_index, self.args.world_size
        batches = islice(_evaluation_batches(dataset, self.args.eval_batch_size), rank, None, world_size)
        # tqdm asks a loader for two iterators, but these batches come once
        options = self._loader_options()
        if with_digests:
            options["collate_fn"] = _WithDigests(self.data_collator)
        loader = iter(DataLoader(dataset, batch_sampler=_OneTime(batches), **options))
        self.model.to(self.args.device).eval()
        compute = self._embed_batch if embed is None else partial(self._compute, embed)
        columns = []
        embedded = embed_batches(
            ((len(batch["labels"]), batch) for batch in loader),
            lambda batch: compute(self.on_device(batch)["pixel_values"]),
            total=_share(dataset, world_size),
            description=description,
            hidden=self.args.disable_tqdm or rank > 0,
        )
        for batch, embeddings in embedded:
            readable = batch.get("readable", torch.ones(len(embeddings), dtype=torch.bool))
            digests = [batch["pixel_digests"]] if with_digests else []
            columns.append((embeddings, batch["labels"], readable, *digests))
        if world_size > 1:
            parts = gather_object([columns])  # a list of batches per rank
            columns = [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]
        if not columns:
            raise ValueError(f"{description}: there is no image in the data set")
        return tuple(torch.cat(column) for column in zip(*columns, strict=True))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", eval_metrics=None):
        """Metrics of a data set, of a dict with `query` and `gallery`, or of several under names of their own.

        `eval_metrics` says which, instead of the argument of that name: `retrieval` or `all`.

        Queries whose image is in the gallery too don't find it there; `num_in_gallery` and a warning say how many. Of
        data sets that don't say what holds their images (`stored_images`), equal pixels tell.

        The embeddings and labels are kept in `last_evaluated`, a dict of `query` and `gallery` (None where the queries
        are the gallery): embeddings, labels and which images could be read, of all images in the data set's order, so
        that whoever draws them need not embed again; `excluded` are the pairs of a query and a gallery item that is
        its image. Of several data sets, a dict of such by name.

        Returns:
            Dict of `{metric_key_prefix}_recall_at_1`, ..., `_map_at_r` and so on, all in 0..1, with times; of several
            data sets, `{metric_key_prefix}_{name}_recall_at_1` and so on.

        Raises:
            ValueError: there is nothing to evaluate, or not what evaluation needs; or `ignore_keys` is given.
        """
        refuse_given(ignore_keys=ignore_keys)
        dataset = self.eval_dataset if eval_dataset is None else self._evaluated(eval_dataset)
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset, got None")
        metrics, evaluated = {}, {}
        for name, part in named_sets(dataset).items():
            check_data_sets(name, part)
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            metrics |= self._evaluate_set(part, prefix, eval_metrics or self.args.eval_metrics)
            evaluated[name] = self.last_evaluated
        self.last_evaluated = evaluated.get("", evaluated)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._require_comparable(metrics)
        return metrics

    def _evaluate_set(self, dataset, prefix, eval_metrics):
        """Metrics of one data set, or of queries and gallery."""
        start, excluded = time.time(), None
        if isinstance(dataset, dict):
            unnamed = not all(map(has_names, dataset.values())) and dataset["query"] is not dataset["gallery"]
            options = (True,) if unnamed else ()
            query = self._embed_all(dataset["query"], "Embedding queries", *options)
            gallery = self._embed_all(dataset["gallery"], "Embedding gallery", *options)
            digests = [_digests(*part[2:]) for part in (query, gallery)] if unnamed else None
            query, gallery = query[:3], gallery[:3]
            excluded = self._find_excluded(prefix, dataset, len(query[1]), digests)
        else:
            query, gallery = self._embed_all(dataset), None
        num_images = len(query[1])
        self.last_evaluated = {"query": query, "gallery": gallery, "excluded": excluded}
        for name, part in (("query", query), ("gallery", gallery)):
            if part is not None and not part[2].any():
                what = name if isinstance(dataset, dict) else "eval_dataset"
                raise ValueError(
                    f"evaluation has nothing to score: none of the {len(part[2])} images of {what} is readable"
                )
        if excluded is not None:
            excluded = select_pairs(excluded, *(part[2].nonzero().flatten() for part in (query, gallery)))
        (embeddings, labels), gallery = _readable(*query), (None, None) if gallery is None else _readable(*gallery)
        sets = (embeddings, labels, *gallery, excluded)
        metrics = self._measure(sets, eval_metrics) | registered_metrics(*sets)
        if self._extra_metrics is not None:
            metrics |= self._extra_metrics(EvalPrediction(predictions=embeddings.numpy(), label_ids=labels.numpy()))
        metrics["num_unreadable"] = num_images - len(labels)
        metrics = {f"{prefix}_{name}": value for name, value in metrics.items()}
        return metrics | speed_metrics(prefix, start, num_samples=num_images)

    def _require_comparable(self, metrics):
        """End a run whose best checkpoint can't be told: the Trainer would pass over a score that is no number."""
        if self.args.metric_for_best_model is None or not (self.is_in_train and self.state.global_step):
            return
        name = f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}"
        chooses = self.args.load_best_model_at_end or self.args.save_strategy == SaveStrategy.BEST
        if chooses and math.isnan(metrics.get(name, 0.0)):
            raise TrainingError(
                f"metric_for_best_model: {name} is nan at step {self.state.global_step}, so no checkpoint can be "
                "the best: give another metric or test set, or load_best_model_at_end false"
            )

    def _find_excluded(self, prefix, datasets, num_queries, digests=None):
        """Pairs of a query and a gallery item of the same image, looked for once; None where there are none."""
        both = datasets["query"], datasets["gallery"]
        known, pairs = self._excluded.get(prefix, (None, None))
        if known is not None and all(a is b for a, b in zip(known, both, strict=True)):
            return pairs
        if digests is not None:
            logger.warning(
                "query or gallery does not say what holds its images (stored_images): queries that are in the gallery "
                "too are known by their pixels alone"
            )
        pairs = same_dataset_images(*both, num_queries, digests)
        if count := count_in_gallery(pairs).get("num_in_gallery"):
            logger.warning("%d queries are in the gallery too: they are excluded there", count)
        self._excluded[prefix] = both, pairs if len(pairs) else None
        return self._excluded[prefix][1]

    def _measure(self, sets, eval_metrics):
        *sets, excluded = sets
        options = {"recall_at": tuple(self.args.recall_at), "excluded": excluded}
        if self.args.device.type == "cuda":  # others lack float64
            options["device"] = self.args.device
        if eval_metrics == "retrieval":
            return retrieval_metrics(*sets, **options)
        if self.args.bootstrap_samples:
            options |= {"confidence": 0.95, "num_resamples": self.args.bootstrap_samples}
        return embedding_metrics(*sets, **options, seed=self.args.seed)

    def evaluate_backbone(self, eval_dataset=None, metric_key_prefix="frozen"):
        """Retrieval metrics of the backbone alone, without prompts or head: the line to beat. Before training.

        Raises:
            ValueError: the backbone has been tuned, here or before the model was saved.
        """
        if self.model.config.changes_backbone and not self.model.retriever.is_new:
            raise ValueError("the backbone itself has been tuned: evaluate_backbone must come before training")
        with self.backbone_alone():
            return self.evaluate(eval_dataset, metric_key_prefix=metric_key_prefix)

    @contextlib.contextmanager
    def backbone_alone(self):
        """Whatever is embedded meanwhile is what the backbone alone makes of it, without prompts or head."""
        self._backbone_only = True
        try:
            yield
        finally:
            self._backbone_only = False


def _without_evaluation(args, is_trained):
    """A run's arguments where there is nothing to evaluate; it is said where it matters."""
    for name, value in (("save_strategy", args.save_strategy), ("lr_scheduler_type", args.lr_scheduler_type)):
        if value in ("best", "reduce_lr_on_plateau", "greedy"):
            raise ValueError(f"{name} {getattr(value, 'value', value)} needs an eval_dataset, got None")
    if is_trained:
        logger.warning("there is no eval_dataset: eval_strategy is no, and the last model is the result")
    args = copy.copy(args)
    args.eval_strategy, args.do_eval, args.load_best_model_at_end = IntervalStrategy.NO, False, False
    return args


def _evaluation_batches(dataset, batch_size):
    """Batches of what a data set is asked for; of one that does not say, its rows in order."""
    if hasattr(dataset, "evaluation_batches"):
        return dataset.evaluation_batches(batch_size)
    rows = range(len(dataset))
    return (list(rows[start : start + batch_size]) for start in rows[::batch_size])


class _WithDigests:
    """A collator that adds `pixel_digests` to what another makes, where the images are decoded."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, examples):
        batch = self.collate(examples)
        return {**batch, "pixel_digests": pixel_digests(batch["pixel_values"])}


def _digests(readable, digests):
    """What tells images apart, for `same_items`; None for those that could not be read."""
    rows = zip(readable.tolist(), digests.tolist(), strict=True)
    return [tuple(digest) if is_readable else None for is_readable, digest in rows]


class _OneTime:
    """A batch sampler that is an iterator."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return self.batches


def _share(dataset, world_size):
    """Images of the main process in a data set, about; None for a stream that doesn't know."""
    try:
        return math.ceil(len(dataset) / world_size)
    except TypeError:
        return None


def _readable(embeddings, labels, readable):
    """Without the images that could not be read and were to be skipped."""
    return (embeddings, labels) if readable.all() else (embeddings[readable], labels[readable])


__all__ = ["EvaluatingTrainer"]
