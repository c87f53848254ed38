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

from .data_scripts.errors import some


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
    "fp16_full_eval",
    "ignore_data_skip",
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


def record_run(args, model, train_dataset, eval_dataset) -> dict:
    """What goes into a checkpoint's `run.json`: nothing but what JSON knows.

    Args:
        args: A `VPTSPTrainingArguments`.
        model: The training model.
        train_dataset: As for `VPTSPTrainer`.
        eval_dataset: As for `VPTSPTrainer`; None leaves it out of the comparison.

    Returns:
        Dict of `settings`, `model`, `tuned`, `train_data`, `eval_data` and `versions`.
    """
    values = args.to_dict()
    names = [item.name for item in fields(args) if item.name in values]
    kept = [name for name in names if name not in FREE_SETTINGS and not name.startswith(FREE_PREFIXES)]
    record = {
        "settings": {name: values[name] for name in kept}
        | {"global_batch_size": args.train_batch_size * args.world_size},
        "model": _without_places(model.config.to_dict()),
        "tuned": [f"{n} {tuple(p.shape)} {p.dtype}" for n, p in model.named_parameters() if p.requires_grad],
        "train_data": _data_record(train_dataset),
        "versions": _versions(),
    }
    if isinstance(eval_dataset, dict):
        record["eval_data"] = {name: _data_record(part) for name, part in eval_dataset.items()}
    elif eval_dataset is not None:
        record["eval_data"] = _data_record(eval_dataset)
    return json.loads(json.dumps(record))


def run_differences(saved, now) -> list[str]:
    """Where two runs differ in what changes the result, one line each. Only what both know of is compared.

    Args:
        saved: Record of a checkpoint.
        now: Record of the run that is to go on from it.
    """
    if saved.get("versions") != now["versions"]:
        changed = _differences(saved.get("versions", {}), now["versions"])
        logger.warning("going on with other versions, which may round otherwise: %s", "; ".join(changed))
    parts = [name for name in now if name != "versions"]
    return [line for name in parts if name in saved for line in _differences(saved[name], now[name], name)]


def _differences(saved, now, place=""):
    if saved == now:
        return []
    if isinstance(saved, dict) and isinstance(now, dict):
        prefix = f"{place}." if place else ""
        return [line for key in saved if key in now for line in _differences(saved[key], now[key], prefix + key)]
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
    record = {"classes": list(dataset.class_names)} if hasattr(dataset, "class_names") else {}
    if hasattr(dataset, "transform"):  # without the addresses in memory that default representations have
        record["transform"] = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(dataset.transform))
    if hasattr(dataset, "fingerprint"):
        return record | dataset.fingerprint()
    labels = np.asarray(dataset.labels, dtype=np.int64)
    return record | {"images": len(labels), "labels": hashlib.sha256(labels.tobytes()).hexdigest()}


def _versions():
    names = ("torch", "transformers", "accelerate", "numpy", "vptsp")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


__all__ = ["record_run", "run_differences"]
