"""What a run is made of: data, model and settings, as a checkpoint remembers them and a resumed run must have them."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
from dataclasses import fields
from importlib import metadata

import numpy as np

from ..data_scripts.data_errors import some
from ..data_scripts.streaming import StreamedImages
from ..files.atomic import json_value
from .descriptions import describe


# Settings that don't change what is trained, or only by rounding: they may be others when a run goes on.
FREE_PREFIXES = (
    "activation_checkpointing",
    "dataloader_",
    "ddp_",
    "do_",
    "eval_",
    "gradient_checkpointing",
    "hub_",
    "log_",
    "logging_",
    "save_",
    "torch_compile",
    "trackio_",
)
FREE_SETTINGS = {
    "accelerator_config",
    "average_tokens_across_devices",
    "batch_eval_metrics",
    "bf16_full_eval",
    "bootstrap_samples",
    "class_prompt_folder",
    "debug",
    "disable_tqdm",
    "dtype",  # bf16 and fp16, which it sets, are compared
    "fp16_full_eval",
    "include_for_metrics",
    "include_num_input_tokens_seen",
    "label_names",
    "length_column_name",
    "load_best_model_at_end",
    "local_rank",
    "output_dir",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",  # what counts is the global batch
    "prediction_loss_only",
    "project",
    "push_to_hub",
    "recall_at",
    "remove_unused_columns",
    "report_to",
    "restore_callback_states_from_checkpoint",
    "resume_from_checkpoint",
    "run_name",
    "skip_memory_metrics",
    "torch_empty_cache_steps",
    "train_sampling_strategy",
    "use_cpu",
}
# Of a model's configuration: where things are, not what they are.
FREE_MODEL_FIELDS = {
    "architectures",
    "auto_map",
    "backbone",
    "backbone_revision",
    "dtype",
    "save_backbone",
    "transformers_version",
}

logger = logging.getLogger(__name__)


# Schedules that look at scores: with these, when and on what is evaluated changes what is trained.
_SCHEDULES_BY_SCORE = ("reduce_lr_on_plateau", "greedy")

# Of a schedule: where it is, not what it is.
_OF_THE_MOMENT = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial", "best")

# Data arguments that don't change what is trained: places, checks, and names of classes, which are compared apart.
# Leaving unreadable images out changes nothing before the first of them, and without that the run would have ended.
FREE_DATA_ARGUMENTS = (
    "data_dir",
    "data_cache_dir",
    "image_root",
    "train_classes",
    "test_classes",
    "verify_counts",
    "skip_corrupt",
    "max_image_pixels",
)


def is_free_setting(name, args) -> bool:
    """Whether a training argument may be another when a run goes on."""
    if name.startswith("eval_") and str(getattr(args.lr_scheduler_type, "value", "")) in _SCHEDULES_BY_SCORE:
        return False
    return name in FREE_SETTINGS or name.startswith(FREE_PREFIXES)


def record_data_arguments(data_args) -> dict:
    """What of `DataArguments` a run that goes on must have the same, beside what the data sets themselves can tell."""
    return {
        item.name: getattr(data_args, item.name) for item in fields(data_args) if item.name not in FREE_DATA_ARGUMENTS
    }


def record_run(args, model, train_dataset, eval_dataset, **parts) -> dict:
    """What goes into a checkpoint's `run.json`: nothing but what JSON knows.

    Args:
        args: A `VPTSPTrainingArguments`.
        model: The training model.
        train_dataset: As for `VPTSPTrainer`.
        eval_dataset: As for `VPTSPTrainer`; None leaves it out of the comparison.
        **parts: What else the result depends on, under a name each.

    Returns:
        Dict of `settings`, `model`, `tuned`, `train_data`, `eval_data`, `versions` and the other parts.
    """
    values = args.to_dict()
    names = [item.name for item in fields(args) if item.name in values]
    kept = [name for name in names if not is_free_setting(name, args)]
    record = {
        "settings": {name: values[name] for name in kept}
        | {"global_batch_size": args.train_batch_size * args.world_size},
        "model": _without_places(model.config.to_dict()),
        "tuned": [f"{n} {tuple(p.shape)} {p.dtype}" for n, p in model.named_parameters() if p.requires_grad],
        "train_data": _data_record(train_dataset),
        "versions": versions(),
    }
    if eval_dataset is not None:
        record["eval_data"] = _data_record(eval_dataset)
    return json.loads(json.dumps(json_value(record | parts, repr), allow_nan=False, default=repr))


def given_optimizer(optimizer, model) -> dict | None:
    """An optimiser that was made elsewhere: its class and options, and the parameters of each group, by name."""
    if optimizer is None:
        return None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {}
    for number, group in enumerate(optimizer.param_groups):
        options = {name: repr(value) for name, value in group.items() if name not in ("params", "initial_lr")}
        options["lr"] = repr(group.get("initial_lr", group.get("lr")))  # a schedule may have begun
        groups[f"group {number}"] = {"parameters": [names.get(id(p), "unknown") for p in group["params"]], **options}
    options = {name: repr(value) for name, value in optimizer.defaults.items()}
    return {"class": type(optimizer).__name__, "options": options, "groups": groups}


def given_scheduler(scheduler) -> dict | None:
    """A schedule that was made elsewhere: its class, its settings, and the functions that it goes by."""
    if scheduler is None:
        return None
    settings = {name: value for name, value in scheduler.state_dict().items() if name not in _OF_THE_MOMENT}
    settings.pop("lr_lambdas", None)
    factors = getattr(scheduler, "lr_lambdas", getattr(scheduler, "lr_lambda", None))
    return {"class": type(scheduler).__name__, "settings": describe(settings), "factors": describe(factors)}


# Parts of a record that are descriptions of objects.
_MADE_OF = ("data_collator", "lr_scheduler.factors", "transform_made_of")


def run_differences(saved, now) -> list[str]:
    """Where two runs differ in what changes the result, one line each. Only what both know of is compared.

    Args:
        saved: Record of a checkpoint.
        now: Record of the run that is to go on from it.
    """
    if changed := _differences(saved.get("versions", {}), now["versions"]):
        logger.warning("going on with other versions, which may round otherwise: %s", "; ".join(changed))
    parts = [name for name in now if name != "versions" and name in saved]
    return [line for name in parts for line in _differences(saved[name], now[name], name)]


def _differences(saved, now, place=""):
    if saved == now:
        return []
    if isinstance(saved, dict) and isinstance(now, dict):
        prefix = f"{place}." if place else ""
        lines = [line for key in saved if key in now for line in _differences(saved[key], now[key], prefix + key)]
        if place.startswith(("train_data", "eval_data")):  # of another kind: a stream, or queries with a gallery
            lines += [f"{prefix}{key}: only in the checkpoint" for key in saved if key not in now]
        elif any(name in place for name in _MADE_OF):  # what an object has not is a difference too
            lines += [f"{prefix}{key}: only in the checkpoint" for key in saved if key not in now]
            lines += [f"{prefix}{key}: only now" for key in now if key not in saved]
        return lines
    if isinstance(saved, list) and isinstance(now, list):
        before, after = set(map(repr, saved)), set(map(repr, now))
        gone, new = [name for name in saved if repr(name) not in after], [n for n in now if repr(n) not in before]
        found = [("only in the checkpoint", gone), ("only now", new)]
        shown = [f"{where} {some(names)}" for where, names in found if names]
        return [f"{place}: {', '.join(shown) or 'the same in another order'}"]
    return [f"{place}: checkpoint {saved!r}, now {now!r}"]


def _without_places(config):
    """A configuration's fields that say what the model is."""
    kept = {name: value for name, value in config.items() if name not in FREE_MODEL_FIELDS and str(name)[0] != "_"}
    return {name: _without_places(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _data_record(dataset):
    if isinstance(dataset, dict):  # of queries and gallery, or of names
        return {name: _data_record(part) for name, part in dataset.items()}
    record = {"kind": "stream" if isinstance(dataset, StreamedImages) else "table"}
    if hasattr(dataset, "class_names"):
        record["classes"] = list(dataset.class_names)
    if hasattr(dataset, "transform"):  # without the addresses in memory that default representations have
        shown = repr(dataset.transform)
        record["transform"] = re.sub(r" at 0x[0-9a-fA-F]+", "", shown)
        if record["transform"] != shown:  # then it says little
            record["transform_made_of"] = describe(dataset.transform)
    if hasattr(dataset, "fingerprint"):
        return record | dataset.fingerprint()
    record["class"] = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
    if not hasattr(dataset, "labels"):
        return record
    labels = np.asarray(dataset.labels, dtype=np.int64)
    return record | {"images": len(labels), "labels": hashlib.sha256(labels.tobytes()).hexdigest()}


def versions() -> dict[str, str]:
    """Of Python, this package and the libraries that results may depend on."""
    names = ("vptsp", "torch", "transformers", "datasets", "accelerate", "huggingface_hub", "safetensors")
    names += ("numpy", "pillow")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


__all__ = [
    "FREE_DATA_ARGUMENTS",
    "given_optimizer",
    "given_scheduler",
    "is_free_setting",
    "record_data_arguments",
    "record_run",
    "run_differences",
    "versions",
]
