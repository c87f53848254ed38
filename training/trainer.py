"""Trainer for VPTSP: class-balanced batches, the proxy state's commits, retrieval evaluation."""

from __future__ import annotations

import math
import time
from itertools import islice
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.trainer_utils import EvalPrediction, SaveStrategy, speed_metrics
from transformers.utils import logging

from ..data_scripts.image_datasets import images_of
from ..data_scripts.labels import check_labels
from ..data_scripts.normalisation import Normalisation
from ..data_scripts.overlap import same_dataset_images, select_pairs
from ..data_scripts.preprocessing import check_geometry, normalisation_for
from ..data_scripts.sampler import ClassBalancedBatchSampler
from ..data_scripts.streaming import StreamedImages
from ..data_scripts.torch_dataset import collate_images
from ..eval.metric_registry import registered_metrics
from ..eval.metrics import count_in_gallery, retrieval_metrics
from ..eval.summary import embedding_metrics
from ..losses.loss_registry import find_loss
from ..modeling_vptsp import refuse_other_adapters
from .argument_values import check_arguments
from .arguments import VPTSPTrainingArguments
from .checkpoints import check_files
from .class_prompts import CLASS_PROMPT_STATES_NAME
from .half_precision import frozen_weights_in
from .interruption import leave_signals_to_main_process
from .offloading import BatchesAhead, prepare_class_prompts
from .optimisation import build_optimizer, cosine_schedule
from .output_folder import refuse_other_model
from .run_errors import TrainingError
from .sharing import SharingTrainer
from .unsupported_arguments import check_trainer_arguments


logger = logging.get_logger(__name__)


class ClassBalancedDataLoader(DataLoader):
    """A `DataLoader` that tells its batch sampler which epoch it is, as the Trainer expects of a loader."""

    def set_epoch(self, epoch: int):
        self.batch_sampler.set_epoch(epoch)


class VPTSPTrainer(SharingTrainer):
    """`transformers.Trainer` for [`VPTSPForMetricLearning`], whose runs can be interrupted ([`ResumableTrainer`]) and
    give a retriever to share ([`SharingTrainer`]).

    Args:
        model: A `VPTSPForMetricLearning`.
        args: A `VPTSPTrainingArguments`.
        train_dataset: An [`ImageDataset`] (or another map-style dataset with `labels`, a sequence of class indices)
            whose classes are 0..C-1, a `datasets.Dataset` with a column of images and one of labels, whose images are
            cut as `processing_class` does (else to the backbone's size), or a [`StreamedImages`].
        eval_dataset: One of these, of classes that training does not see, or a dict with `query` and `gallery`.
        processing_class: The image processor; what it does to pixels is done to the images, and it is saved along.
            Without one, pixels are treated as the backbone's own processor does, and none is saved.
        compute_metrics: Optional; gets embeddings as `predictions` and labels as `label_ids`, and adds to the metrics.
        data_settings: As for [`ResumableTrainer`].
        kwargs: As for `Trainer`: `callbacks`, `data_collator`, `optimizers` and `optimizer_cls_and_kwargs`, whose
            `lr` and `weight_decay` are, unless given there, those of `args`.

    Raises:
        OutputFolderError: `output_dir` holds a model that is no retriever, the backbone's for instance.
        ValueError: the training set does not fit the model or the batches; the image processor does what training
            can't or cuts images in another way than evaluation; PEFT has changed the model; or `compute_loss_func`,
            `model_init` or `preprocess_logits_for_metrics` is given, which can't be honoured. Before anything starts.
    """

    def __init__(self, model, args, train_dataset=None, eval_dataset=None, **kwargs):
        check_trainer_arguments(kwargs)
        if not isinstance(args, VPTSPTrainingArguments):
            raise TypeError(f"args must be a VPTSPTrainingArguments, got {type(args).__name__}")
        check_arguments(args)  # they may have been changed since they were made
        refuse_other_adapters(model)
        refuse_other_model(args.output_dir, model.config.backbone)
        kwargs.setdefault("data_collator", collate_images)
        self._cut = (kwargs.get("processing_class"), getattr(model.config.backbone_config, "image_size", None))
        train_dataset = images_of(train_dataset, "train_dataset", *self._cut, training=True)
        eval_dataset = self._evaluated(eval_dataset)
        self._extra_metrics = kwargs.pop("compute_metrics", None)
        self._backbone_only = False
        self.last_evaluated = None
        self._excluded = None
        if args.push_to_hub:
            model.require_shareable()
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        if train_dataset is not None:
            self._check_train_dataset()
            self._check_loss()
        self._normalise = None
        if self.processing_class is not None:
            self._normalise = Normalisation.of(self.processing_class)
            for part in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
                check_geometry(self.processing_class, getattr(part, "transform", None))
        self._output = None
        self._offloaded = model.offloaded_class_prompts
        self._ahead = None
        prepare_class_prompts(self)

    def _evaluated(self, dataset):
        """A data set, or a dict of them, with tables of the library `datasets` made ready for evaluation."""
        if isinstance(dataset, dict):
            return {name: self._evaluated(part) for name, part in dataset.items()}
        return images_of(dataset, "eval_dataset", *self._cut)

    def _check_train_dataset(self):
        dataset, num_classes = self.train_dataset, self.model.config.num_classes
        if isinstance(dataset, StreamedImages):  # looks at every label as it reads it
            if dataset.num_classes > num_classes:
                raise ValueError(
                    f"labels of train_dataset must be in 0..{num_classes - 1} (num_classes of the model), "
                    f"but it has {dataset.num_classes} classes"
                )
        elif self.args.stream_buffer_size is not None:
            raise ValueError(
                f"stream_buffer_size is of streams, got {self.args.stream_buffer_size} with a train_dataset that is "
                "a table: leave it out"
            )
        elif not hasattr(dataset, "labels"):
            raise ValueError("train_dataset must have `labels`, the class of every image; see ImageDataset")
        else:
            if len(dataset.labels) == 0:
                raise ValueError("train_dataset is empty")
            rule = f"labels of train_dataset must be in 0..{num_classes - 1} (num_classes of the model)"
            check_labels(dataset.labels, num_classes, rule)
        self._train_batch_sampler()  # says so now if batches can't be drawn

    def _check_loss(self):
        loss, images_per_class = self.model.config.loss, self.args.images_per_class
        if images_per_class < (least := find_loss(loss).min_images_per_class):
            raise ValueError(f"images_per_class must be >= {least} with the loss {loss!r}, got {images_per_class}")

    def _train_batch_sampler(self):
        args, dataset = self.args, self.train_dataset
        options = {
            "batch_size": args.train_batch_size * args.world_size,
            "images_per_class": args.images_per_class,
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "rank": args.process_index,
            "world_size": args.world_size,
        }
        if isinstance(dataset, StreamedImages):
            return dataset.batch_sampler(**options, buffer_size=args.stream_buffer_size)
        return ClassBalancedBatchSampler(dataset.labels, **options)

    def get_train_dataloader(self):
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset, got None")
        return ClassBalancedDataLoader(
            self.train_dataset,
            batch_sampler=self._train_batch_sampler(),
            persistent_workers=self.args.dataloader_persistent_workers,
            **self._loader_options(),
        )

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

    # ---- Training

    def train(self, *args, **kwargs):
        """As `Trainer.train`; with mixed precision, frozen weights are in the half precision meanwhile."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        if self.model.config.save_backbone:  # checkpoints hold the backbone, in full precision
            dtype = None
        with frozen_weights_in(dtype, self.model):
            return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, images_per_class=self.args.images_per_class, gather=self.args.world_size > 1)
        self._output = outputs
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward, then the commit of the batch's rows to the proxy state (once per batch)."""
        if self._ahead is not None:
            self._ahead.begin_batch()
        loss = super().training_step(model, self.on_device(inputs), num_items_in_batch)
        if loss.device.type == "cpu":  # elsewhere `log` looks, since asking every step would stall the device
            self._require_finite(loss)
        self.model.commit_proxies(self._output)
        self._output = None
        if self._offloaded is not None and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            self._offloaded.reduce_gradients(gather=self.args.world_size > 1, scale=scale)
        return loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step; the rows of the next batch's class prompts are prefetched where that helps."""
        if self._offloaded is not None and self._offloaded.prefetches:
            if self._ahead is None or self._ahead.source is not epoch_iterator:
                self._ahead = BatchesAhead(epoch_iterator, self._offloaded, self.args.images_per_class)
            epoch_iterator = self._ahead
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def clip_gradients(self, model, max_norm):
        """Scale gradients down to a norm, those of offloaded class prompts among them; returns the norm before."""
        with_gradient = list(model.parameters())
        if self._offloaded is not None and (reduced := self._offloaded.reduce_gradients()) is not None:
            rows = reduced[1].detach()
            rows.grad = reduced[1]
            with_gradient.append(rows)
        return self.accelerator.clip_grad_norm_(with_gradient, max_norm)

    def log(self, logs, start_time=None):
        for name in ("loss", "train_loss"):  # the latter is of the whole run, the steps after the last log included
            if name in logs:
                self._require_finite(torch.tensor(logs[name]))
        super().log(logs, start_time)

    def _require_finite(self, loss):
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step}: an image is not finite, or a learning "
                f"rate ({self.args.learning_rate}, proxies {self.args.proxy_learning_rate}) is too high. "
                f"Checkpoints in {self.args.output_dir} are intact."
            )

    def create_optimizer(self, model=None):
        """See [`build_optimizer`]."""
        if self.optimizer is None:
            model = self.model if model is None else model
            named = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            own = self.optimizer_cls_and_kwargs
            self.optimizer = build_optimizer(model.named_parameters(), self.args, named, own)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """That of `lr_scheduler_type`; for `cosine` see [`cosine_schedule`]."""
        if self.args.lr_scheduler_type != "cosine":
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            steps = num_training_steps
            if self.args.cosine_epochs is not None:
                steps_per_epoch = math.ceil(len(self._train_batch_sampler()) / self.args.gradient_accumulation_steps)
                steps = max(round(self.args.cosine_epochs * steps_per_epoch), 1)
            optimizer = self.optimizer if optimizer is None else optimizer
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.set_scheduler(cosine_schedule(optimizer, steps, warmup, self.args.min_learning_rate))
        return self.lr_scheduler

    # ---- Evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Embed a batch, for `predict`: `(None, embeddings (B, E), labels (B,))`, classes of any number.

        Embeddings of images that could not be read and were to be skipped are NaN.
        """
        inputs = self.on_device(inputs)
        embeddings = self._embed_batch(inputs["pixel_values"])
        if "readable" in inputs:
            embeddings[~inputs["readable"]] = torch.nan
        return None, embeddings, inputs["labels"]

    @torch.no_grad()
    def _embed_batch(self, pixel_values):
        with self.accelerator.autocast():
            if self._backbone_only:
                return self.model.retriever.embed_with_backbone(pixel_values)
            return self.model.retriever(pixel_values).embeddings

    def embed(self, dataset, description="Embedding"):
        """Embed a data set, each image once whatever the number of processes.

        Args:
            dataset: An `ImageDataset`, a `StreamedImages`, or another with `evaluation_batches(batch_size)`.
            description: For the progress bar.

        Returns:
            Embeddings `(n, E)` float32 and labels `(n,)` int64 on the CPU, in the data set's order, the same on every
            process. Images that could not be read and were to be skipped are not among them.
        """
        return _readable(*self._embed_all(self._evaluated(dataset), description))

    def _embed_all(self, dataset, description="Embedding"):
        """As `embed`, of all images, with `(n,)` bool that says which could be read."""
        rank, world_size = self.args.process_index, self.args.world_size
        batches = islice(dataset.evaluation_batches(self.args.eval_batch_size), rank, None, world_size)
        # tqdm asks a loader for two iterators, but these batches come once
        loader = iter(DataLoader(dataset, batch_sampler=_OneTime(batches), **self._loader_options()))
        self.model.to(self.args.device).eval()
        embeddings, labels, readable = [], [], []
        for batch in tqdm(
            loader, description, disable=True if self.args.disable_tqdm or rank > 0 else None, leave=False
        ):
            inputs = self.on_device(batch)
            embeddings.append(self._embed_batch(inputs["pixel_values"]).float().cpu())
            labels.append(inputs["labels"].cpu())
            readable.append(inputs.get("readable", torch.ones(len(labels[-1]), dtype=torch.bool)).cpu())
        if world_size > 1:
            parts = gather_object([list(zip(embeddings, labels, readable, strict=True))])  # a list of batches per rank
            in_order = [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]
            embeddings, labels, readable = zip(*in_order, strict=True)
        if not len(labels):
            raise ValueError(f"{description}: there is no image in the data set")
        return torch.cat(tuple(embeddings)), torch.cat(tuple(labels)), torch.cat(tuple(readable))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", eval_metrics=None):
        """Metrics of a dataset, or of a dict with `query` and `gallery`.

        `eval_metrics` says which, instead of the argument of that name: `retrieval` or `all`.

        Queries whose image is in the gallery too don't find it there; `num_in_gallery` and a warning say how many.

        The embeddings and labels are kept in `last_evaluated`, a dict of `query` and `gallery` (None where the queries
        are the gallery): embeddings, labels and which images could be read, of all images in the data set's order, so
        that whoever draws them need not embed again; `excluded` are the pairs of a query and a gallery item that is
        its image.

        Returns:
            Dict of `{metric_key_prefix}_recall_at_1`, ..., `_map_at_r` and so on, all in 0..1, with times.
        """
        start = time.time()
        dataset = self.eval_dataset if eval_dataset is None else self._evaluated(eval_dataset)
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset, got None")
        if isinstance(dataset, dict):
            if set(dataset) != {"query", "gallery"}:
                raise ValueError(f"a dict of eval datasets must have query and gallery, got {sorted(dataset)}")
            query = self._embed_all(dataset["query"], "Embedding queries")
            gallery = self._embed_all(dataset["gallery"], "Embedding gallery")
        else:
            query, gallery = self._embed_all(dataset), None
        num_images = len(query[1])
        excluded = None if gallery is None else self._find_excluded(dataset, num_images)
        self.last_evaluated = {"query": query, "gallery": gallery, "excluded": excluded}
        if excluded is not None:
            excluded = select_pairs(excluded, *(part[2].nonzero().flatten() for part in (query, gallery)))
        (embeddings, labels), gallery = _readable(*query), (None, None) if gallery is None else _readable(*gallery)
        sets = (embeddings, labels, *gallery, excluded)
        metrics = self._measure(sets, eval_metrics or self.args.eval_metrics) | registered_metrics(*sets)
        if self._extra_metrics is not None:
            metrics |= self._extra_metrics(EvalPrediction(predictions=embeddings.numpy(), label_ids=labels.numpy()))
        metrics["num_unreadable"] = num_images - len(labels)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=num_images)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._require_comparable(metrics)
        return metrics

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

    def _find_excluded(self, datasets, num_queries):
        """Pairs of a query and a gallery item of the same image, looked for once; None where there are none."""
        both = datasets["query"], datasets["gallery"]
        if self._excluded is None or any(a is not b for a, b in zip(self._excluded[0], both, strict=True)):
            pairs = same_dataset_images(*both, num_queries)
            self._excluded = both, pairs if len(pairs) else None
            if count := count_in_gallery(pairs).get("num_in_gallery"):
                logger.warning("%d queries are in the gallery too: they are excluded there", count)
        return self._excluded[1]

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
        """Retrieval metrics of the backbone alone, without prompts or head: the line to beat. Before training."""
        if self.model.config.changes_backbone and self.state.global_step > 0:
            raise ValueError("the backbone itself has been tuned: evaluate_backbone must come before training")
        self._backbone_only = True
        try:
            return self.evaluate(eval_dataset, metric_key_prefix=metric_key_prefix)
        finally:
            self._backbone_only = False

    # ---- Checkpoints

    def save_weights(self, folder):
        """Write what a checkpoint has of the model: all that training needs."""
        self.model.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self._offloaded is not None and not self.args.save_only_model:
            self._offloaded.save_states(folder / CLASS_PROMPT_STATES_NAME)

    def load_checkpoint(self, folder):
        self.model.load_saved(folder)
        if self._offloaded is not None:
            self._offloaded.load_states(Path(folder) / CLASS_PROMPT_STATES_NAME)

    def load_best(self):
        check_files(self.state.best_model_checkpoint)
        self.model.load_saved(self.state.best_model_checkpoint)


class _OneTime:
    """A batch sampler that is an iterator."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return self.batches


def _readable(embeddings, labels, readable):
    """Without the images that could not be read and were to be skipped."""
    return (embeddings, labels) if readable.all() else (embeddings[readable], labels[readable])


__all__ = ["VPTSPTrainer"]
