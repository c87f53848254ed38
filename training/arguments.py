"""Arguments of a training run: how a run goes, not what the model or the data is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..backbones_vptsp import fastest_dtype
from .argument_values import EVAL_METRICS, check_arguments, check_packages
from .photo_clusters import CLUSTERINGS


@dataclass
class VPTSPTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with what metric learning needs, and with defaults that suit it.

    Among the defaults that differ: evaluation and saving after every epoch, the best checkpoint by Recall@1 is loaded
    at the end, no gradient clipping, and a loss that is not a number ends the run instead of vanishing from the log.

    Args:
        images_per_class: Images (k) of each class in a batch; the batch size must be divisible by it.
        proxy_learning_rate: Learning rate of the original proxies and of a loss's own parameters; `learning_rate` is
            that of everything else.
        sgd_momentum: Momentum where `optim` is `sgd`.
        cosine_epochs: Epochs over which the learning rates fall to their minimum, where they stay; None for the whole
            run. Only with `lr_scheduler_type="cosine"`.
        min_learning_rate: The minimum, for both learning rates.
        head_init: How the embedding head's projection starts in a new model: `xavier`, drawn at random; `identity`,
            which takes an `embedding_dim` that is the width of the pooled features; or `pca`, the principal axes of
            the training images' features, which one pass over them finds before training.
        ema_decay: Evaluate and save an exponential moving average of the tuned weights, of this decay a step (0.99,
            say), in their place; None for the weights themselves.
        recall_at: The K of Recall@K.
        class_prompt_folder: Folder on a fast local disk for class prompts in memory-mapped files, with
            `class_prompt_store="offloaded"`; None for memory, or `output_dir/class_prompts` where they would take more
            than 80 % of what is available.
        eval_metrics: What evaluations compute: `retrieval` (Recall@K, MAP@R, R-precision), or `all`: mAP@1000, NMI
            and F1 of k-means, distances and spectral decay as well, and confidence intervals.
        bootstrap_samples: Of the 95 % confidence intervals that come with `all`; 0 for no intervals.
        clustering: What takes the place of labels where photos lack them: clusters of `kmeans` or `hdbscan`, or
            `instances`, each photo a class.
        clusters: How many of `kmeans`; None to choose by the silhouette, in the first round.
        min_cluster_size: Photos of a cluster of `hdbscan`, at least.
        cluster_dims: Whitened principal components that distances are measured in; 0 for embeddings as they are.
        cluster_keep: Share of the photos, those nearest the centre of their cluster, that take part with `kmeans`.
        rounds: How often photos are clustered; after the first time, by what has been tuned.
        link_similarity: Photos at least as similar by the backbone alone (cosine) always share a cluster; None for
            none.
        stream_buffer_size: Rows that the class-balanced batches of a stream are drawn from; None for enough.
        hub_strategy: With `push_to_hub`, upload the retriever at the `end`, or at `every_save` too. Checkpoints are
            never uploaded.

    Raises:
        ValueError: a value is of another type or out of range, the batch size is not divisible by `images_per_class`,
            FSDP or DeepSpeed is asked for, a field of `TrainingArguments` that has no meaning here is not at its
            default, or a package that `optim` or `report_to` needs is not installed.
    """

    output_dir: str | None = field(
        default="runs/vptsp", metadata={"help": "Folder for the retriever and its results."}
    )
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images per batch and device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images per batch and device."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Of everything but the original proxies."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "cosine falls to min_learning_rate."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str | None = field(default="recall_at_1", metadata={"help": "What best means."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether more of it is better."})
    logging_steps: float = field(default=50, metadata={"help": "Log loss and learning rate every so many steps."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients to this norm; 0 for no clipping."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must be false: a loss that is no number ends the run."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be false: images are decoded lazily."})
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Must be false: S is exchanged apart."}
    )
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Every tuned tensor is used."})

    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Callbacks such as early stopping go on counting where a run was interrupted."}
    )

    dtype: str | None = field(
        default=None,
        metadata={"help": "To compute in: float32, bfloat16, float16, or auto: bfloat16 where it is fast."},
    )
    images_per_class: int = field(default=2, metadata={"help": "Images (k) of each class in a batch."})
    proxy_learning_rate: float = field(
        default=0.01, metadata={"help": "Of the original proxies and a loss's parameters."}
    )
    sgd_momentum: float = field(default=0.9, metadata={"help": "Momentum where optim is sgd."})
    cosine_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of the cosine decay, after which the rates stay; default: all."}
    )
    min_learning_rate: float = field(default=0.0, metadata={"help": "Where the cosine decay ends, for both rates."})
    head_init: str = field(
        default="xavier", metadata={"help": "How the embedding head starts: xavier, identity or pca."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Of an average of the tuned weights, to evaluate and save; default: none."}
    )
    recall_at: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "The K of Recall@K."})
    class_prompt_folder: str | None = field(
        default=None, metadata={"help": "Folder for offloaded class prompts as memory-mapped files."}
    )
    eval_metrics: str = field(default="retrieval", metadata={"help": "What evaluations compute: retrieval or all."})
    bootstrap_samples: int = field(
        default=2000, metadata={"help": "Of the confidence intervals that come with all metrics; 0 for none."}
    )
    clustering: str = field(
        default="kmeans", metadata={"help": f"Of photos without labels: {', '.join(CLUSTERINGS)} (each a class)."}
    )
    clusters: int | None = field(
        default=None, metadata={"help": "How many clusters kmeans makes; by default chosen by the silhouette."}
    )
    min_cluster_size: int = field(default=5, metadata={"help": "Photos of a cluster of hdbscan at least."})
    cluster_dims: int = field(
        default=64, metadata={"help": "Whitened principal components to cluster by; 0: embeddings as they are."}
    )
    cluster_keep: float = field(
        default=1.0, metadata={"help": "Share of the photos, those nearest their centre, that kmeans leaves in."}
    )
    rounds: int = field(default=1, metadata={"help": "How often photos without labels are clustered in a run."})
    link_similarity: float | None = field(
        default=None, metadata={"help": "Photos as similar as this (cosine, backbone alone) share a cluster."}
    )
    stream_buffer_size: int | None = field(
        default=None, metadata={"help": "Rows that a stream's batches are drawn from; by default enough."}
    )

    hub_strategy: HubStrategy | str = field(default="end", metadata={"help": "When to upload: end or every_save."})

    def __post_init__(self):
        self._refuse_sharding()
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):  # as the command line gives it
            self.resume_from_checkpoint = str(self.resume_from_checkpoint).lower() == "true"
        check_arguments(self)
        self._set_precision()
        if self.eval_strategy == "no":
            self.load_best_model_at_end = False
        super().__post_init__()
        check_packages(self)
        if self.device.type == "cpu":  # pinned memory speeds up copies to an accelerator, and warns without one
            self.dataloader_pin_memory = False

    def _set_precision(self):
        """Turn `dtype` into `bf16` and `fp16`, which `Trainer` reads."""
        asked = "bf16" if self.bf16 else "fp16" if self.fp16 else None
        if self.dtype is None:
            return
        found, gpu = self.dtype, None if self.use_cpu else torch.accelerator.current_accelerator(check_available=True)
        if found == "auto":
            found = str(fastest_dtype(gpu or "cpu")).removeprefix("torch.")
        wanted = {"float32": None, "bfloat16": "bf16", "float16": "fp16"}[found]
        if asked not in (None, wanted):
            raise ValueError(f"dtype is {self.dtype}, which is {found} here, and {asked} is true: give one of them")
        if wanted:
            setattr(self, wanted, True)
            self.use_cpu |= gpu is None  # there is nothing else, and transformers wants to be told

    def _refuse_sharding(self):
        """FSDP and DeepSpeed, however they were asked for."""
        asked = {
            "fsdp": self.fsdp or self.fsdp_config or _is_on("ACCELERATE_USE_FSDP"),
            "deepspeed": self.deepspeed or _is_on("ACCELERATE_USE_DEEPSPEED"),
        }
        for name, value in asked.items():
            if value:
                raise ValueError(
                    f"{name} is not supported: it shards weights, gradients and optimiser states, but here the "
                    "backbone is frozen, and a retriever tunes a few megabytes. Start the same command without it, "
                    "with torchrun or accelerate launch --multi_gpu: several processes then share the batch (DDP)"
                )


def _is_on(variable):
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "y", "on", "t")


__all__ = ["EVAL_METRICS", "VPTSPTrainingArguments"]
