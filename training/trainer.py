"""Trainer for VPTSP: class-balanced batches, the proxy state's commits, retrieval evaluation."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.trainer_utils import number_of_arguments
from transformers.utils import logging

from ..backbones_vptsp import linear_products
from ..data_scripts.image_datasets import images_of
from ..data_scripts.labels import check_labels
from ..data_scripts.normalisation import Normalisation
from ..data_scripts.preprocessing import check_geometry
from ..data_scripts.sampler import ClassBalancedBatchSampler
from ..data_scripts.streaming import StreamedImages
from ..data_scripts.torch_dataset import collate_images
from ..data_scripts.unlabelled import ClusteredImages
from ..losses.loss_registry import find_loss
from ..modeling_vptsp import refuse_other_adapters
from .argument_values import check_arguments
from .arguments import VPTSPTrainingArguments
from .checkpoints import check_files
from .class_prompts import CLASS_PROMPT_STATES_NAME
from .cluster_rounds import ClusterRounds, refuse_cluster_arguments
from .evaluating import EvaluatingTrainer
from .evaluation_checks import data_sets_in
from .half_precision import frozen_weights_in
from .head_start import as_evaluated, check_head_init, head_inputs, start_head
from .hyperparameters import objective_of, search_hyperparameters
from .offloading import BatchesAhead, ClassPromptCallback, prepare_class_prompts
from .optimisation import build_optimizer, cosine_schedule
from .output_folder import refuse_other_model
from .run_errors import ConfigError
from .unsupported_arguments import check_trainer_arguments
from .weight_average import AveragedWeights


logger = logging.get_logger(__name__)


class ClassBalancedDataLoader(DataLoader):
    """A `DataLoader` that tells its batch sampler which epoch it is, as the Trainer expects of a loader."""

    def set_epoch(self, epoch: int):
        self.batch_sampler.set_epoch(epoch)


class VPTSPTrainer(EvaluatingTrainer):
    """`transformers.Trainer` for [`VPTSPForMetricLearning`], whose runs can be interrupted ([`ResumableTrainer`]) and
    give a retriever to share ([`SharingTrainer`]) with the scores of retrieval ([`EvaluatingTrainer`]).

    Args:
        model: A `VPTSPForMetricLearning`; or a retriever (`VPTSPModel`), which can be evaluated, but not trained.
        args: A `VPTSPTrainingArguments`; None for its defaults.
        train_dataset: An [`ImageDataset`] (or another map-style dataset with `labels`, a sequence of class indices)
            whose classes are 0..C-1, a `datasets.Dataset` with a column of images and one of labels, whose images are
            cut as `processing_class` does (else to the backbone's size), or a [`StreamedImages`].
        eval_dataset: One of these, of classes that training does not see, a dict with `query` and `gallery`, or a dict
            of either under names of their own: the metrics of `birds` are then `eval_birds_recall_at_1` and so on.
        processing_class: The image processor; what it does to pixels is done to the images, and it is saved along.
            Without one, pixels are treated as the backbone's own processor does, and none is saved.
        compute_metrics: Optional; gets embeddings as `predictions` and labels as `label_ids`, and adds to the metrics.
        model_init: Function that gives the model in place of `model`, a new one for every training, seeded by `args`;
            of no argument, or of the trial of a `hyperparameter_search` (else None).
        data_settings: As for [`ResumableTrainer`].
        kwargs: As for `Trainer`: `callbacks`, `data_collator`, `optimizers` and `optimizer_cls_and_kwargs`, whose
            `lr` and `weight_decay` are, unless given there, those of `args`.

    Raises:
        OutputFolderError: `output_dir` holds a model that is no retriever, the backbone's for instance.
        ValueError: the training set does not fit the model or the batches; the image processor does what training
            can't or cuts images in another way than evaluation; PEFT has changed the model; there is both a model and
            `model_init`, or neither; or `compute_loss_func` or `preprocess_logits_for_metrics` is given, which can't
            be honoured. Before anything starts.
        TypeError: `model` or `args` is something else.
    """

    def __init__(
        self,
        model=None,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        model_init=None,
        data_settings=None,
        **kwargs,
    ):
        check_trainer_arguments(kwargs)
        args = VPTSPTrainingArguments() if args is None else args
        if not isinstance(args, VPTSPTrainingArguments):
            raise TypeError(f"args must be a VPTSPTrainingArguments, got {type(args).__name__}")
        check_arguments(args)  # they may have been changed since they were made
        if (model is None) == (model_init is None):
            raise ValueError(f"VPTSPTrainer needs a model or a model_init, got {'none' if model is None else 'both'}")
        if model_init is not None and any(kwargs.get("optimizers") or ()):
            raise ValueError("optimizers must be left out with model_init: they are of another model's parameters")
        given = {
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "data_settings": data_settings,
            **kwargs,
        }
        self._given = {**given, "callbacks": copy.deepcopy(kwargs.get("callbacks"))} if model_init else None
        model = new_model(model_init, args.seed) if model is None else model
        _check_model(model, train_dataset)
        refuse_other_adapters(model)
        refuse_other_model(args.output_dir, model.config.backbone)
        kwargs["data_collator"] = kwargs.get("data_collator") or collate_images
        self._cut = (kwargs.get("processing_class"), getattr(model.config.backbone_config, "image_size", None))
        train_dataset = images_of(train_dataset, "train_dataset", *self._cut, training=True)
        if not (
            train_dataset is None or isinstance(train_dataset, StreamedImages) or hasattr(train_dataset, "labels")
        ):
            raise ValueError(
                "train_dataset must have `labels`, the class of every image, as an ImageDataset, or be a "
                f"datasets.Dataset or StreamedImages; got {type(train_dataset).__name__}"
            )
        eval_dataset = self._evaluated(eval_dataset)
        if args.push_to_hub:
            model.require_shareable()
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "data_settings": data_settings}
        super().__init__(model=model, args=args, **data, **kwargs)
        if self.args.full_determinism and linear_products.library == "measured":
            linear_products.library = "torch"  # what a clock chooses may differ from run to run
        self._next_model, self.model_init = model, model_init
        if train_dataset is not None:
            self._check_train_dataset()
            self._check_loss()
            self._check_head_init()
        if self.processing_class is not None:
            self._normalise = Normalisation.of(self.processing_class)
            for part in data_sets_in(self.eval_dataset):
                check_geometry(self.processing_class, getattr(part, "transform", None))
        self._output = None
        self._averages = None
        if args.ema_decay is not None:
            self._averages = AveragedWeights(self, args.ema_decay)
            self.add_callback(self._averages)
        self._ahead = self._offloaded = None
        if model.retriever_prefix:
            self._offloaded = model.offloaded_class_prompts
            prepare_class_prompts(self)
        self.rounds = None
        if isinstance(train_dataset, ClusteredImages):
            self.rounds = ClusterRounds(self)
            self.add_callback(self.rounds)

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
        elif isinstance(dataset, ClusteredImages):
            if not 0 < dataset.num_active <= dataset.num_classes == num_classes:
                raise ValueError(
                    f"num_classes of the model must be that of train_dataset, which has {dataset.num_active} clusters "
                    f"of {dataset.num_classes} at most, got {num_classes}; first_clusters makes those of a first round"
                )
        else:
            if len(dataset.labels) == 0:
                raise ValueError("train_dataset is empty")
            rule = f"labels of train_dataset must be in 0..{num_classes - 1} (num_classes of the model)"
            check_labels(dataset.labels, num_classes, rule)
        if not isinstance(dataset, ClusteredImages):
            refuse_cluster_arguments(self.args)
        self._train_batch_sampler()  # says so now if batches can't be drawn

    def _check_loss(self):
        loss, images_per_class = self.model.config.loss, self.args.images_per_class
        if images_per_class < (least := find_loss(loss).min_images_per_class):
            raise ValueError(f"images_per_class must be >= {least} with the loss {loss!r}, got {images_per_class}")

    def _check_head_init(self):
        counted = not isinstance(self.train_dataset, StreamedImages)
        check_head_init(self.args.head_init, self.model.config, len(self.train_dataset.labels) if counted else None)

    def sampler_options(self):
        """What of the arguments decides which images are drawn for batches."""
        args = self.args
        return {
            "batch_size": args.train_batch_size * args.world_size,
            "images_per_class": args.images_per_class,
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "rank": args.process_index,
            "world_size": args.world_size,
        }

    def _train_batch_sampler(self):
        dataset, options = self.train_dataset, self.sampler_options()
        if isinstance(dataset, StreamedImages):
            return dataset.batch_sampler(**options, buffer_size=self.args.stream_buffer_size)
        if isinstance(dataset, ClusteredImages):
            return dataset.batch_sampler(**options)
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
        """As `Trainer.train`; with mixed precision, frozen weights are in the half precision meanwhile.

        With `model_init`, each training has a new model. With `ema_decay`, the model has the averages at the end.
        """
        if not self.model.retriever_prefix:
            raise TypeError(
                f"model is a {type(self.model).__name__}, which can be evaluated: training needs a "
                "VPTSPForMetricLearning, whose from_pretrained takes a retriever too"
            )
        self._take_new_model()
        if self.args.head_init != "xavier" and not self.model.retriever.is_new:
            raise ConfigError(
                f"head_init {self.args.head_init} is for a new model, but this one has been tuned: leave it out"
            )
        self.model.refuse_unheard_hooks()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        if self.model.config.save_backbone:  # checkpoints hold the backbone, in full precision
            dtype = None
        if self._averages is not None:
            self._averages.begin()
        with frozen_weights_in(dtype, self.model):
            outcome = super().train(*args, **kwargs)
        if self._averages is not None:
            self._averages.settle()
        return outcome

    def _take_new_model(self):
        """With `model_init`, the first training has the model that the constructor made, each further one its own."""
        if self.model_init is None or self._next_model is not None:
            return
        model = new_model(self.model_init, self.args.seed)
        _check_model(model, self.train_dataset)
        refuse_other_adapters(model)
        self.model = self.model_wrapped = self._next_model = model
        self.optimizer = self.lr_scheduler = None
        if self.train_dataset is not None:
            self._check_train_dataset()
            self._check_loss()
            self._check_head_init()
        self._offloaded, self._ahead, self._normalise = model.offloaded_class_prompts, None, None
        if self.processing_class is not None:
            self._normalise = Normalisation.of(self.processing_class)
        for callback in [c for c in self.callback_handler.callbacks if isinstance(c, ClassPromptCallback)]:
            self.remove_callback(callback)
        prepare_class_prompts(self)

    def call_model_init(self, trial=None):
        """The model of the training that begins, which `train` has made of `model_init` and checked."""
        model, self._next_model = self._next_model, None
        return super().call_model_init(trial) if model is None else model

    def carry_on(self):
        super().carry_on()
        model = self.model.retriever
        if self._resumed_from is None:
            dataset = as_evaluated(self.train_dataset, self.processing_class)
            start_head(model, self.args.head_init, lambda: self._head_inputs(dataset))
        model.is_new = False

    def _head_inputs(self, dataset):
        columns = self._embed_all(
            dataset, "Features for pca", embed=lambda pixel_values: head_inputs(self.model.retriever, pixel_values)
        )
        return columns[0][columns[2]]

    def shared_weights(self):
        return nullcontext() if self._averages is None else self._averages.in_place()

    def hyperparameter_search(
        self,
        hp_space=None,
        compute_objective=None,
        n_trials=20,
        direction=None,
        backend="optuna",
        hp_name=None,
        **kwargs,
    ):
        """Train a model of `model_init` for each of several settings, and say which was best; by Optuna.

        Each trial is a run of its own, with a trainer of its own in a folder of its own in `output_dir` (`run-0` and
        so on). This trainer and its arguments stay as they are: give the best hyperparameters to another run.

        Args:
            hp_space: Function of an `optuna.Trial` that gives values of fields of `VPTSPTrainingArguments`; None for
                both learning rates. What the model is, `model_init(trial)` says.
            compute_objective: Function of the metrics of an evaluation; None for `metric_for_best_model`.
            n_trials: Number of trials, at least 1; None for as many as `timeout` allows.
            direction: `maximize` or `minimize`; None for what suits `metric_for_best_model`.
            backend: `optuna`.
            hp_name: Function of a trial that names its folder.
            **kwargs: For `optuna.create_study` (`sampler`, `pruner`, `storage`, ...), and `timeout` and `catch` for
                its `optimize`. Trials are pruned by the evaluations of their training.

        Returns:
            `transformers.trainer_utils.BestRun`, whose `run_summary` is the study; None on processes but the first.

        Raises:
            ImportError: Optuna is not installed.
            OutputFolderError: a trial's folder holds an earlier run.
            ValueError: there is no `model_init` or no `eval_dataset`; an argument is something else; or `hp_space`
                gives what is no field, or no value of it.
        """
        if self.model_init is None:
            raise ValueError("hyperparameter_search needs a model_init, which gives every trial a new model")
        if self.eval_dataset is None:
            raise ValueError("hyperparameter_search needs an eval_dataset, by which trials are compared")
        if str(getattr(backend, "value", backend)) != "optuna":
            raise ValueError(f"backend must be optuna, got {backend!r}")
        if compute_objective is None:
            compute_objective = objective_of(self.args.metric_for_best_model)
        direction = direction or ("maximize" if self.args.greater_is_better else "minimize")
        if direction not in ("maximize", "minimize"):
            raise ValueError(f"direction must be maximize or minimize, got {direction!r}")
        if "n_jobs" in kwargs:
            raise ValueError("n_jobs must be left out: trials in threads would share the random generators")

        def make_trainer(model, args):
            given = {**self._given, "callbacks": copy.deepcopy(self._given["callbacks"])}
            return type(self)(model=model, args=args, **given)

        def make_model(trial, seed):
            return new_model(self.model_init, seed, trial)

        options = (hp_space, compute_objective, n_trials, direction, hp_name, kwargs)
        return search_hyperparameters(self.args, make_trainer, make_model, *options)

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
        with self.shared_weights():
            self.model.save_pretrained(folder)
        if self._averages is not None and not self.args.save_only_model:
            self._averages.save_raw(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self._offloaded is not None and not self.args.save_only_model:
            self._offloaded.save_states(folder / CLASS_PROMPT_STATES_NAME)

        if self.rounds is not None:
            self.rounds.save(folder)

    def load_checkpoint(self, folder):
        self.model.load_saved(folder)
        if self._averages is not None:
            self._averages.load_raw(Path(folder))
        if self._offloaded is not None:
            self._offloaded.load_states(Path(folder) / CLASS_PROMPT_STATES_NAME)
        if self.rounds is not None:
            self.rounds.load(folder)

    def load_best(self):
        check_files(self.state.best_model_checkpoint)
        self.model.load_saved(self.state.best_model_checkpoint)
        if self._averages is not None:
            self._averages.adopt()


def new_model(model_init, seed, trial=None):
    """A model of `model_init`, drawn with a seed.

    Raises:
        ValueError: the function takes more than a trial.
    """
    count = number_of_arguments(model_init)
    if count > 1:
        raise ValueError(f"model_init must be a function of no argument or of a trial, got one of {count}")
    set_seed(seed)
    return model_init(trial) if count else model_init()


def _check_model(model, train_dataset):
    """Refuse what is neither a training model nor a retriever, and a retriever that is to be trained.

    A retriever may be of the code that came along with it, and so of a class of another module.
    """
    if getattr(getattr(model, "config", None), "model_type", None) != "vptsp" or not hasattr(model, "retriever"):
        kind = type(model).__name__
        raise TypeError(f"model must be a VPTSPForMetricLearning, or a VPTSPModel to evaluate, got {kind}")
    if not hasattr(model.retriever, "is_new"):
        raise TypeError("model was loaded by code of another version: load it by VPTSPModel.from_pretrained")
    if train_dataset is not None and not model.retriever_prefix:
        raise TypeError(
            f"model must be a VPTSPForMetricLearning where there is a train_dataset, got {type(model).__name__}; its "
            "from_pretrained takes a retriever too, with num_classes=..."
        )


__all__ = ["VPTSPTrainer"]
