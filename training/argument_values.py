"""What each field of `VPTSPTrainingArguments` may hold: types from the annotations, and a table of ranges."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
from dataclasses import fields
from typing import get_type_hints

from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import trainer_log_levels

from ..data_scripts.data_errors import DataError
from ..data_scripts.paths import usable_path
from ..names.field_values import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, SEED, Bounds, check_fields, check_value
from ..names.registry import nearest
from .command_line import EVAL_METRICS
from .photo_clusters import CLUSTERINGS
from .unsupported_arguments import REFUSED_FIELDS, check_together, refuse_unsupported


_SHARE = Bounds(0, 1, open_high=True)

TRAINING_BOUNDS = {
    **dict.fromkeys(("gradient_accumulation_steps", "per_device_train_batch_size"), AT_LEAST_ONE),
    **dict.fromkeys(
        ("per_device_eval_batch_size", "images_per_class", "recall_at", "stream_buffer_size"), AT_LEAST_ONE
    ),
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout"), AT_LEAST_ONE),
    **dict.fromkeys(("torch_empty_cache_steps", "eval_accumulation_steps"), AT_LEAST_ONE),
    **dict.fromkeys(("learning_rate", "proxy_learning_rate", "min_learning_rate", "weight_decay"), NOT_NEGATIVE),
    **dict.fromkeys(("max_grad_norm", "adam_epsilon", "warmup_steps", "eval_delay"), NOT_NEGATIVE),
    **dict.fromkeys(("dataloader_num_workers", "bootstrap_samples", "save_total_limit"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "sgd_momentum", "ema_decay"), _SHARE),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    **dict.fromkeys(("cosine_epochs", "num_train_epochs"), POSITIVE),
    "local_rank": Bounds(-1),
    "clusters": Bounds(2),
    "min_cluster_size": Bounds(2),
    "rounds": AT_LEAST_ONE,
    "cluster_dims": NOT_NEGATIVE,
    "cluster_keep": Bounds(0, 1, open_low=True),
    "link_similarity": Bounds(-1, 1),
}
TRAINING_CHOICES = {
    "eval_metrics": EVAL_METRICS,
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "head_init": ("xavier", "identity", "pca"),
    **dict.fromkeys(("log_level", "log_level_replica"), tuple(trainer_log_levels)),
    "dataloader_multiprocessing_context": tuple(multiprocessing.get_all_start_methods()),
    "ddp_backend": ("nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl", "ccl"),
    "hub_strategy": ("end", "every_save"),
    "clustering": CLUSTERINGS,
}
# Mappings, which the command line gives as JSON.
JSON_FIELDS = ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
# Fields that are refused by a word of their own, whatever they hold.
_NOT_TYPED = {*REFUSED_FIELDS, "ddp_broadcast_buffers", "deepspeed", "fsdp", "fsdp_config", "hub_strategy"}


@functools.cache
def training_hints(cls) -> dict:
    """Name -> annotation of every field that is looked at. Where `TrainingArguments` has an enumeration, a subclass
    that sets another default has text: the enumeration counts."""
    hints = {**get_type_hints(cls), **get_type_hints(TrainingArguments)}
    hints["resume_from_checkpoint"] = str | bool | None
    return {item.name: hints[item.name] for item in fields(cls) if item.name not in _NOT_TYPED}


def check_arguments(args):
    """Refuse what can't be honoured, each field that holds what it must not, and fields that don't go together.

    Args:
        args: A `VPTSPTrainingArguments`, when it is made and when it is used, since it may be changed in between.

    Raises:
        ValueError: with the field, what was expected and what was got.
    """
    refuse_unsupported(args)
    check_values(args)
    check_together(args)


def check_values(args):
    """Check every field of a `VPTSPTrainingArguments` alone: type, finiteness, range.

    Raises:
        ValueError: the message names the field, what was expected and what was got.
    """
    hints = training_hints(type(args))
    check_fields({name: getattr(args, name) for name in hints}, hints, TRAINING_BOUNDS, TRAINING_CHOICES)
    for name in ("output_dir", "class_prompt_folder", "resume_from_checkpoint"):
        if isinstance(value := getattr(args, name), (str, os.PathLike)):
            try:
                usable_path(value)
            except DataError as error:
                raise DataError(f"{name} must be a path: {error}") from error
    for name in JSON_FIELDS:
        if isinstance(value := getattr(args, name, None), str):
            _check_json(name, value)
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    if strategy not in TRAINING_CHOICES["hub_strategy"]:
        raise ValueError(f"hub_strategy must be end or every_save, got {strategy!r}: checkpoints are not for sharing")
    if args.max_steps != -1 and args.max_steps < 1:
        raise ValueError(f"max_steps must be an integer >= 1, or -1 for num_train_epochs, got {args.max_steps!r}")
    for name in ("logging", "save", "eval"):
        how = getattr(args, f"{name}_strategy")
        if str(getattr(how, "value", how)) == "steps":  # eval_steps may be None, for logging_steps
            check_value(f"{name}_steps", getattr(args, f"{name}_steps"), float | None, POSITIVE)
    if not args.recall_at:
        raise ValueError("recall_at must hold integers >= 1, got none")
    if args.per_device_train_batch_size % args.images_per_class:
        raise ValueError(
            f"per_device_train_batch_size must be divisible by images_per_class, got "
            f"{args.per_device_train_batch_size} and {args.images_per_class}"
        )


def _check_json(name, text):
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping (as text, one in JSON), got {text!r}")


def check_packages(args):
    """Check that what `optim` and `report_to` name is installed, and that the device computes in half precision.

    Raises:
        ValueError: it isn't; the message names the field and the package.
    """
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(("none", "all", *INTEGRATION_TO_CALLBACK))
            raise ValueError(f"report_to must be of {known}, got {name!r}{nearest(name, INTEGRATION_TO_CALLBACK)}")
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to: the package of {name!r} is not installed")
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"optim {args.optim.value} is not to be had here: {reason}") from error
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16 must be false on a CPU, which has no float16 training, got True; bf16 works there")


__all__ = [
    "EVAL_METRICS",
    "TRAINING_BOUNDS",
    "TRAINING_CHOICES",
    "check_arguments",
    "check_packages",
    "check_values",
    "training_hints",
]
