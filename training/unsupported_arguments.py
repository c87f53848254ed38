"""What `transformers.TrainingArguments` and `Trainer` offer and this Trainer does not: refused, never ignored."""

from __future__ import annotations

import logging
from dataclasses import MISSING, fields


logger = logging.getLogger(__name__)

# Field -> why only its default will do.
REFUSED_FIELDS = {
    "accelerator_config": "batches are drawn and shared among processes by a sampler of this project",
    "auto_find_batch_size": "another batch size is another loss; give one that fits",
    "batch_eval_metrics": "retrieval is scored over all images at once",
    "bf16_full_eval": "embeddings are computed in the precision of training; give bf16",
    "dataloader_drop_last": "training has whole batches only, and evaluation counts every image",
    "dataloader_in_order": "the order of batches is the order of the scores, and what a resumed run relies on",
    "debug": "only underflow_overflow is supported",
    "do_predict": "train.py evaluates; trainer.predict(...) gives embeddings",
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C save a checkpoint in any case",
    "eval_do_concat_batches": "retrieval is scored over all images at once",
    "eval_use_gather_object": "embeddings are gathered in any case",
    "fp16_full_eval": "embeddings are computed in the precision of training; give fp16",
    "ignore_data_skip": "a run that goes on sees the batches that come next, as if nothing had interrupted it",
    "include_for_metrics": "compute_metrics gets embeddings and labels",
    "include_num_input_tokens_seen": "images have no tokens to count",
    "label_names": "labels are called labels",
    "label_smoothing_factor": "losses compare embeddings and proxies; there are no class probabilities to smooth",
    "length_column_name": "images have no length",
    "liger_kernel_config": "there are no such kernels for these models",
    "logging_nan_inf_filter": "a loss that is not a number ends the run",
    "neftune_noise_alpha": "it is for embeddings of text",
    "optim_args": "sgd_momentum, weight_decay and adam_beta1 are fields; the Trainer takes optimizer_cls_and_kwargs",
    "optim_target_modules": "it belongs to optimisers that choose their own parameters, which are not supported",
    "parallelism_config": "several processes share a batch (DDP), and nothing else is sharded",
    "prediction_loss_only": "evaluation scores embeddings and has no loss",
    "remove_unused_columns": "images are decoded lazily",
    "skip_memory_metrics": "peak_memory_megabytes is in all_results.json",
    "train_sampling_strategy": "batches are class-balanced",
    "use_cache": "it is for the generation of text",
    "use_liger_kernel": "there are no such kernels for these models",
}
# Fields of which the list of options need not speak, since but one value will do.
NOT_OFFERED = {*REFUSED_FIELDS, "ddp_broadcast_buffers", "deepspeed", "fsdp", "fsdp_config"} - {"debug"}
# Arguments of `Trainer.__init__` that can't be honoured.
REFUSED_TRAINER_ARGUMENTS = {
    "compute_loss_func": "the loss is a field of the model's configuration, and own losses are registered",
    "preprocess_logits_for_metrics": "compute_metrics gets embeddings, which nothing needs to be made of",
}
# Arguments of the Trainer's methods that can't be honoured.
REFUSED_METHOD_ARGUMENTS = {
    "ignore_keys": "embeddings are the only output of an evaluation",
    "ignore_keys_for_eval": "embeddings are the only output of an evaluation",
    "trial": "a search for hyperparameters gives each trial a trainer of its own, see hyperparameter_search",
}
_WITHOUT_WARMUP = {"constant": "constant_with_warmup", "reduce_lr_on_plateau": "another", "greedy": "another"}
_UNSUPPORTED_OPTIM = ("galore", "apollo", "lomo", "schedule_free")
_NOT_ADAM = ("sgd", "adagrad", "rmsprop", "adafactor")
_ADAM_OPTIONS = ("adam_beta1", "adam_beta2", "adam_epsilon")


def refuse_unsupported(args):
    """Refuse what would be ignored.

    Args:
        args: A `VPTSPTrainingArguments`.

    Raises:
        ValueError: a field has a value that can't be honoured; the message names it and says what will do.
    """
    for item in fields(args):
        value = getattr(args, item.name)
        if item.name in REFUSED_FIELDS and not _is_allowed(item, value):
            expected = str(item.default).lower() if isinstance(item.default, (bool, float, str)) else ""
            reason = REFUSED_FIELDS[item.name]
            raise ValueError(f"{item.name} must be {expected or 'left out'}, got {value!r}: {reason}")
    if args.ddp_broadcast_buffers is not False:
        raise ValueError(
            f"ddp_broadcast_buffers must be false, got {args.ddp_broadcast_buffers!r}: the proxy state is exchanged "
            "by this project, and rank 0's would overwrite the others'"
        )


def check_together(args):
    """Refuse what has no effect beside another field.

    Args:
        args: A `VPTSPTrainingArguments`, each field of which is what it must be.

    Raises:
        ValueError: two fields don't go together; the message names both.
    """
    _check_schedule(args)
    _check_optimizer(args)


def _is_allowed(item, value):
    """Whether a field is at its default; what is false is one value, be it None, False, "" or []."""
    if item.name == "accelerator_config" and not hasattr(value, "to_dict"):
        return value is None or value == {}  # others are taken for the name of a file
    if item.name == "accelerator_config":  # as `TrainingArguments` leaves it
        return all(getattr(value, part.name) == getattr(type(value)(), part.name) for part in fields(value))
    if item.name == "debug":
        values = value.split() if isinstance(value, str) else value or []
        return all(_text(part) == "underflow_overflow" for part in values)
    if item.name == "include_num_input_tokens_seen":
        return value in (False, "no")
    has_default = item.default is not MISSING and item.default
    return value == item.default if has_default else not value


def _check_schedule(args):
    schedule, warmup = _text(args.lr_scheduler_type), args.warmup_steps
    if schedule == "cosine" and args.lr_scheduler_kwargs:
        raise ValueError(
            f"lr_scheduler_kwargs must be left out with lr_scheduler_type cosine, got {args.lr_scheduler_kwargs!r}: "
            "cosine_epochs and min_learning_rate say how it falls"
        )
    if schedule == "constant" and args.lr_scheduler_kwargs:
        raise ValueError(f"lr_scheduler_kwargs must be left out with constant, got {args.lr_scheduler_kwargs!r}")
    if schedule != "cosine":  # said, not refused: a preset brings them, and another schedule may be given beside it
        for name, default in (("cosine_epochs", None), ("min_learning_rate", 0.0)):
            if getattr(args, name) != default:
                logger.warning("%s %s is not used: it is of lr_scheduler_type cosine", name, getattr(args, name))
    if warmup and schedule in _WITHOUT_WARMUP:
        raise ValueError(
            f"warmup_steps must be 0 with lr_scheduler_type {schedule}, which has no warm-up, got {warmup}; take "
            f"{_WITHOUT_WARMUP[schedule]} schedule"
        )


def _check_optimizer(args):
    optim = _text(args.optim)
    if any(family in optim for family in _UNSUPPORTED_OPTIM):
        raise ValueError(
            f"optim must be one that takes any groups of parameters, got {optim}: it chooses its own, or keeps other "
            "weights for evaluation than for training"
        )
    defaults = {item.name: item.default for item in fields(args)}
    unread = () if optim == "sgd" else ("sgd_momentum",)
    unread += _ADAM_OPTIONS if optim in _NOT_ADAM else ()
    for name in unread:
        if getattr(args, name) != defaults[name]:
            raise ValueError(f"{name} is not read by optim {optim}, got {getattr(args, name)}: leave it out")


def refuse_given(**given):
    """Refuse arguments of the Trainer's methods that would be ignored.

    Args:
        **given: What was given for them.

    Raises:
        ValueError: one of them is not None; the message names it.
    """
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} must be left out, got {value!r}: {REFUSED_METHOD_ARGUMENTS[name]}")


def check_trainer_arguments(given):
    """Refuse arguments of `Trainer.__init__` that would be ignored.

    Args:
        given: Dict of those that were given.

    Raises:
        ValueError: one of them is not None; the message names it.
    """
    for name, reason in REFUSED_TRAINER_ARGUMENTS.items():
        if given.get(name) is not None:
            raise ValueError(f"VPTSPTrainer takes no {name}: {reason}")


def _text(value):
    return str(getattr(value, "value", value))


__all__ = [
    "NOT_OFFERED",
    "REFUSED_FIELDS",
    "REFUSED_TRAINER_ARGUMENTS",
    "check_together",
    "check_trainer_arguments",
    "refuse_given",
    "refuse_unsupported",
]
