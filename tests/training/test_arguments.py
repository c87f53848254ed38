"""Every argument that `transformers` offers is honoured, refused, or said to have nothing to act on."""

import dataclasses
import inspect
import math
import re
from pathlib import Path

import pytest
from noise_runs import make_args, make_model
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from vptsp import VPTSPTrainer, VPTSPTrainingArguments
from vptsp.training.unsupported_arguments import REFUSED_FIELDS, REFUSED_TRAINER_ARGUMENTS


FIELDS = {item.name: item for item in dataclasses.fields(TrainingArguments)}
OWN = {item.name for item in dataclasses.fields(VPTSPTrainingArguments)} - set(FIELDS)

# Field -> a value other than the default, and the words of the refusal.
REFUSED = {
    "accelerator_config": ({"split_batches": True}, "accelerator_config must be left out"),
    "auto_find_batch_size": (True, "auto_find_batch_size must be false, got True"),
    "batch_eval_metrics": (True, "batch_eval_metrics"),
    "bf16_full_eval": (True, "bf16_full_eval must be false, got True: .*give bf16"),
    "dataloader_drop_last": (True, "dataloader_drop_last"),
    "dataloader_in_order": (False, "dataloader_in_order must be true, got False"),
    "ddp_broadcast_buffers": (True, "ddp_broadcast_buffers must be false, got True"),
    "deepspeed": ("zero.json", "deepspeed is not supported"),
    "do_predict": (True, "do_predict"),
    "enable_jit_checkpoint": (True, "enable_jit_checkpoint"),
    "eval_do_concat_batches": (False, "eval_do_concat_batches"),
    "eval_use_gather_object": (True, "eval_use_gather_object"),
    "fp16_full_eval": (True, "fp16_full_eval"),
    "fsdp": ("full_shard", "fsdp is not supported"),
    "fsdp_config": ({"version": 2}, "fsdp is not supported"),
    "ignore_data_skip": (True, "ignore_data_skip must be false, got True: a run that goes on"),
    "include_for_metrics": (["inputs"], r"include_for_metrics must be left out, got \['inputs'\]"),
    "include_num_input_tokens_seen": ("all", "include_num_input_tokens_seen must be no, got 'all'"),
    "label_names": (["label"], "label_names"),
    "label_smoothing_factor": (0.1, "label_smoothing_factor must be 0.0, got 0.1"),
    "length_column_name": ("width", "length_column_name must be length, got 'width'"),
    "liger_kernel_config": ({"rope": True}, "liger_kernel_config"),
    "logging_nan_inf_filter": (True, "logging_nan_inf_filter must be false, got True: a loss that is not"),
    "neftune_noise_alpha": (0.1, "neftune_noise_alpha"),
    "optim_args": ("betas=1", "optim_args must be left out"),
    "optim_target_modules": ("all-linear", "optim_target_modules"),
    "parallelism_config": (object(), "parallelism_config"),
    "prediction_loss_only": (True, "prediction_loss_only"),
    "remove_unused_columns": (True, "remove_unused_columns must be false, got True: images are decoded lazily"),
    "skip_memory_metrics": (False, "skip_memory_metrics must be true, got False"),
    "train_sampling_strategy": ("group_by_length", "train_sampling_strategy must be random, got 'group_by_length'"),
    "use_cache": (True, "use_cache"),
    "use_liger_kernel": (True, "use_liger_kernel"),
}

# Field -> why it has nothing to act on, at whatever value.
WITHOUT_EFFECT = {
    "average_tokens_across_devices": "the loss is a mean over images; it is read for counted tokens only",
    "do_eval": "for scripts: transformers sets it itself with eval_strategy, and train.py always evaluates",
    "do_train": "for scripts: train.py always trains",
    "eval_accumulation_steps": "every batch's embeddings go to the CPU at once",
    "local_rank": "launchers say the rank in the environment, and transformers reads it there",
}

TESTS = "test_honoured_arguments.py::"
# Field -> how it is shown to be honoured: a test here or elsewhere, or transformers' own code that nothing replaces.
HONOURED = {
    **dict.fromkeys(
        ["activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing"],
        "test_trainer.py::test_training_is_the_plain_loop; test_honoured_arguments.py::test_layers_are_checkpointed",
    ),
    "gradient_checkpointing_kwargs": "test_honoured_arguments.py::test_layers_are_checkpointed",
    **dict.fromkeys(
        ["adam_beta1", "adam_beta2", "adam_epsilon", "optim", "weight_decay"],
        TESTS + "test_optimiser_options",
    ),
    **dict.fromkeys(["bf16", "fp16"], "test_trainer.py::test_bfloat16_autocast_is_close; mixed_precision"),
    "data_seed": "test_honoured_arguments.py::test_seeds",
    "seed": "test_honoured_arguments.py::test_seeds",
    "full_determinism": "Trainer.__init__, which is called",
    "dataloader_multiprocessing_context": "test_honoured_arguments.py::test_loader_options",
    "dataloader_num_workers": "test_honoured_arguments.py::test_loader_options",
    "dataloader_persistent_workers": "test_honoured_arguments.py::test_loader_options",
    "dataloader_pin_memory": "test_honoured_arguments.py::test_loader_options",
    "dataloader_prefetch_factor": "test_honoured_arguments.py::test_loader_options",
    **dict.fromkeys(
        ["ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph"],
        "test_honoured_arguments.py::test_ddp_options",
    ),
    **dict.fromkeys(["ddp_backend", "ddp_timeout", "use_cpu"], "TrainingArguments._setup_devices"),
    "debug": "test_honoured_arguments.py::test_underflow_is_looked_for",
    **dict.fromkeys(
        ["disable_tqdm", "log_level", "log_level_replica", "log_on_each_node"], "Trainer.__init__ and log"
    ),
    **dict.fromkeys(
        ["eval_delay", "eval_on_start", "eval_steps", "eval_strategy", "logging_first_step", "logging_steps"],
        "test_honoured_arguments.py::test_when_things_happen",
    ),
    **dict.fromkeys(
        ["logging_strategy", "save_steps", "save_strategy", "max_steps"],
        "test_honoured_arguments.py::test_when_things_happen",
    ),
    "num_train_epochs": "test_honoured_arguments.py::test_when_things_happen",
    "gradient_accumulation_steps": "test_trainer.py::test_training_is_the_plain_loop",
    "greater_is_better": "test_honoured_arguments.py::test_best_is_what_the_metric_says",
    "load_best_model_at_end": "test_trainer.py::test_best_checkpoint_is_loaded_at_the_end",
    "metric_for_best_model": "test_honoured_arguments.py::test_best_is_what_the_metric_says",
    **dict.fromkeys(
        ["hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token"],
        "test_hub.py",
    ),
    "push_to_hub": "test_hub.py",
    "learning_rate": "test_trainer.py::test_learning_rates_of_both_groups",
    "lr_scheduler_kwargs": "test_honoured_arguments.py::test_schedules",
    "lr_scheduler_type": "test_honoured_arguments.py::test_schedules",
    "warmup_steps": "test_trainer.py::test_learning_rates_of_both_groups",
    "max_grad_norm": "test_honoured_arguments.py::test_gradients_are_clipped",
    "output_dir": "test_trainer.py::test_what_is_saved",
    "per_device_eval_batch_size": "test_honoured_arguments.py::test_batch_sizes",
    "per_device_train_batch_size": "test_honoured_arguments.py::test_batch_sizes",
    **dict.fromkeys(
        ["project", "report_to", "run_name", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id"],
        "the integrations that report_to names, which get every log",
    ),
    "restore_callback_states_from_checkpoint": "test_checkpoints.py, the run called stopping",
    "resume_from_checkpoint": "test_honoured_arguments.py::test_resume_is_an_argument_too",
    "save_on_each_node": "args.should_save",
    "save_only_model": "test_checkpoint_files.py::test_a_checkpoint_of_the_model_alone_is_refused",
    "save_total_limit": "test_checkpoint_files.py::test_rotation_keeps_the_new_one_and_the_best",
    "tf32": "TrainingArguments.__post_init__",
    "torch_compile": "test_trainer.py::test_compiled_training_is_the_same",
    "torch_compile_backend": "test_trainer.py::test_compiled_training_is_the_same",
    "torch_compile_mode": "Trainer._build_accelerator_args",
    "torch_empty_cache_steps": "Trainer.training_step, which is called",
}


def test_every_field_is_one_of_three():
    """A field that a newer version of transformers adds is to be looked at; an older one has fewer."""
    groups = [set(REFUSED), set(WITHOUT_EFFECT), set(HONOURED)]
    assert set(FIELDS) <= set().union(*groups)
    assert sum(map(len, groups)) == len(set().union(*groups))
    elsewhere = {"ddp_broadcast_buffers", "deepspeed", "fsdp", "fsdp_config"}
    assert (set(REFUSED_FIELDS) - {"debug"}) | elsewhere == set(REFUSED)  # of debug, one of two values is refused


@pytest.mark.parametrize("name", sorted(set(REFUSED) & set(FIELDS)))
def test_what_can_not_be_honoured_is_refused(tmp_path, name):
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **{name: value})


def test_the_tests_that_show_it_exist():
    tests = {path.name: path for path in Path(__file__).resolve().parents[1].rglob("test_*.py")}
    named = re.findall(r"(test_\w+\.py)(?:::(test_\w+))?", " ".join([*HONOURED.values(), *TRAINER_ARGUMENTS.values()]))
    assert len(named) > 60
    for file, test in set(named):
        assert f"def {test}" in tests[file].read_text(), (file, test)


def test_defaults_and_copies_are_accepted(tmp_path):
    args = make_args(tmp_path)
    for name in set(FIELDS) | OWN:
        make_args(tmp_path, **{name: getattr(args, name)})
    dataclasses.replace(args, learning_rate=0.1)
    make_args(tmp_path, include_num_input_tokens_seen=False, debug="underflow_overflow", label_names=[])


@pytest.mark.parametrize("name", sorted(set(REFUSED_FIELDS) & set(FIELDS) - {"debug"}))
def test_what_is_set_later_is_refused_by_the_trainer(tmp_path, model, name):
    args = make_args(tmp_path)
    setattr(args, name, REFUSED[name][0])
    with pytest.raises(ValueError, match=REFUSED[name][1]):
        VPTSPTrainer(model, args)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_train_epochs": -1}, "num_train_epochs must be > 0, got -1"),
        ({"num_train_epochs": 0}, "num_train_epochs must be > 0, got 0"),
        ({"num_train_epochs": math.nan}, "num_train_epochs must be > 0, got nan"),
        ({"num_train_epochs": None}, "num_train_epochs must be > 0, got None"),
        ({"max_steps": 0}, "max_steps must be an integer >= 1, or -1 for num_train_epochs, got 0"),
        ({"max_steps": -2}, "max_steps must be an integer >= 1"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps must be an integer >= 1, got -1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be an integer >= 1, got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be an integer >= 1, got 0"),
        ({"per_device_eval_batch_size": -4}, "per_device_eval_batch_size must be an integer >= 1, got -4"),
        ({"learning_rate": math.nan}, "learning_rate must be >= 0, got nan"),
        ({"proxy_learning_rate": math.inf}, "proxy_learning_rate must be >= 0, got inf"),
        ({"weight_decay": math.nan}, "weight_decay must be >= 0, got nan"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be >= 0, got nan"),
        ({"cosine_epochs": math.nan}, "cosine_epochs must be > 0, got nan"),
        ({"logging_steps": -1}, "logging_steps must be > 0, got -1"),
        ({"save_strategy": "steps", "save_steps": -1}, "save_steps must be > 0, got -1"),
        ({"eval_strategy": "steps", "eval_steps": -3}, "eval_steps must be > 0, got -3"),
        ({"save_total_limit": -1}, "save_total_limit must be an integer >= 0, got -1"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs must be left out with .* cosine"),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 3},
            "which has no warm-up, got 3; take constant_with_warmup",
        ),
        ({"debug": "tpu_metrics_debug"}, "debug must be left out, got 'tpu_metrics_debug': only underflow_overflow"),
        ({"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1 is not read by optim sgd, got 0.8"),
        ({"sgd_momentum": 0.5}, "sgd_momentum is not read by optim adamw_torch_fused, got 0.5"),
    ],
)
def test_numbers_and_pairs_with_which_nothing_would_happen(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **fields)


@pytest.mark.parametrize(
    "optim", [item.value for item in OptimizerNames if "galore" in item.value or "lomo" in item.value]
)
def test_optimisers_with_groups_of_their_own_are_refused(tmp_path, optim):
    with pytest.raises(ValueError, match=f"optim must be one that takes any groups of parameters, got {optim}"):
        make_args(tmp_path, optim=optim)


def test_options_of_another_schedule_are_said(tmp_path, caplog):
    make_args(tmp_path, lr_scheduler_type="linear", min_learning_rate=1e-5, cosine_epochs=2)
    assert "min_learning_rate 1e-05 is not used: it is of lr_scheduler_type cosine" in caplog.text
    assert "cosine_epochs 2 is not used" in caplog.text


# ---- The Trainer's own arguments

TRAINER_ARGUMENTS = {
    "model": "needed",
    "model_init": "test_hyperparameters.py::test_every_training_has_a_new_model",
    "args": "needed",
    "train_dataset": "every test of training",
    "eval_dataset": "every test of evaluation",
    "processing_class": "test_trainer.py::test_images_are_normalised_as_the_image_processor_does",
    "data_collator": "test_honoured_arguments.py::test_own_collator_callbacks_and_optimisers",
    "callbacks": "test_honoured_arguments.py::test_own_collator_callbacks_and_optimisers",
    "optimizers": "test_honoured_arguments.py::test_own_collator_callbacks_and_optimisers",
    "optimizer_cls_and_kwargs": "test_honoured_arguments.py::test_optimizer_cls_and_kwargs",
    "compute_metrics": "test_trainer.py::test_own_metrics_are_added",
}


@pytest.fixture
def model(backbone_folder):
    return make_model(backbone_folder)


def test_every_argument_of_the_trainer_is_one_of_two():
    names = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert names <= set(TRAINER_ARGUMENTS) | set(REFUSED_TRAINER_ARGUMENTS)
    assert not set(TRAINER_ARGUMENTS) & set(REFUSED_TRAINER_ARGUMENTS)


@pytest.mark.parametrize("name", sorted(REFUSED_TRAINER_ARGUMENTS))
def test_arguments_of_the_trainer_that_would_be_ignored_are_refused(tmp_path, model, name):
    with pytest.raises(ValueError, match=f"VPTSPTrainer takes no {name}: "):
        VPTSPTrainer(model, make_args(tmp_path), **{name: lambda *args: None})
    with pytest.raises(TypeError, match="args must be a VPTSPTrainingArguments, got TrainingArguments"):
        VPTSPTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True))
