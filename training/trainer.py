"""Trainer for VPTSP: class-balanced batches, the proxy state's commits, retrieval evaluation."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..data_scripts.image_datasets import images_of
from ..data_scripts.labels import check_labels
from ..data_scripts.normalisation import Normalisation
from ..data_scripts.preprocessing import check_geometry
from ..data_scripts.sampler import ClassBalancedBatchSampler
from ..data_scripts.streaming import StreamedImages
from ..data_scripts.torch_dataset import collate_images
from ..losses.loss_registry import find_loss
from ..modeling_vptsp import refuse_other_adapters
from .argument_values import check_arguments
from .arguments import VPTSPTrainingArguments
from .checkpoints import check_files
from .class_prompts import CLASS_PROMPT_STATES_NAME
from .evaluating import EvaluatingTrainer
from .evaluation_checks import data_sets_in
from .half_precision import frozen_weights_in
from .offloading import BatchesAhead, prepare_class_prompts
from .optimisation import build_optimizer, cosine_schedule
from .output_folder import refuse_other_model
from .unsupported_arguments import check_trainer_arguments


logger = logging.get_logger(__name__)


class ClassBalancedDataLoader(DataLoader):
    """A `DataLoader` that tells its batch sampler which epoch it is, as the Trainer expects of a loader."""

    def set_epoch(self, epoch: int):
        self.batch_sampler.set_epoch(epoch)


class VPTSPTrainer(EvaluatingTrainer):
    """`transformers.Trainer` for [`VPTSPForMetricLearning`], whose runs can be interrupted ([`ResumableTrainer`]) and
    give a retriever to share ([`SharingTrainer`]) with the scores of retrieval ([`EvaluatingTrainer`]).

    Args:
        model: A `VPTSPForMetricLearning`.
        args: A `VPTSPTrainingArguments`.
        train_dataset: An [`ImageDataset`] (or another map-style dataset with `labels`, a sequence of class indices)
            whose classes are 0..C-1, a `datasets.Dataset` with a column of images and one of labels, whose images are
            cut as `processing_class` does (else to the backbone's size), or a [`StreamedImages`].
        eval_dataset: One of these, of classes that training does not see, a dict with `query` and `gallery`, or a dict
            of either under names of their own: the metrics of `birds` are then `eval_birds_recall_at_1` and so on.
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
        kwargs["data_collator"] = kwargs.get("data_collator") or collate_images
        self._cut = (kwargs.get("processing_class"), getattr(model.config.backbone_config, "image_size", None))
        train_dataset = images_of(train_dataset, "train_dataset", *self._cut, training=True)
        eval_dataset = self._evaluated(eval_dataset)
        if args.push_to_hub:
            model.require_shareable()
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        if train_dataset is not None:
            self._check_train_dataset()
            self._check_loss()
        if self.processing_class is not None:
            self._normalise = Normalisation.of(self.processing_class)
            for part in data_sets_in(self.eval_dataset):
                check_geometry(self.processing_class, getattr(part, "transform", None))
        self._output = None
        self._offloaded = model.offloaded_class_prompts
        self._ahead = None
        prepare_class_prompts(self)

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

    # ---- Training

    def train(self, *args, **kwargs):
        """As `Trainer.train`; with mixed precision, frozen weights are in the half precision meanwhile."""
        self.model.refuse_unheard_hooks()
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
        return self.accelerator.clip_grad_norm_(self._with_gradients(model), max_norm)

    def measure_gradients(self, model):
        """The norm of all gradients, which stay as they are."""
        self.accelerator.unscale_gradients()
        gradients = [tensor.grad for tensor in self._with_gradients(model) if tensor.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _with_gradients(self, model):
        tensors = list(model.parameters())
        if self._offloaded is not None and (reduced := self._offloaded.reduce_gradients()) is not None:
            rows = reduced[1].detach()
            rows.grad = reduced[1]
            tensors.append(rows)
        return tensors

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


__all__ = ["VPTSPTrainer"]
