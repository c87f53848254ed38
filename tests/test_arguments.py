"""Every argument that `transformers` offers is honoured, refused, or said to have nothing to act on."""

import dataclasses
import inspect
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from vptsp import VPTSPForMetricLearning, VPTSPTrainer, VPTSPTrainingArguments
from vptsp.run_errors_vptsp import TrainingError
from vptsp.unsupported_arguments_vptsp import REFUSED_FIELDS, REFUSED_TRAINER_ARGUMENTS


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

# Field -> how it is shown to be honoured: a test here or elsewhere, or transformers' own code that nothing replaces.
HONOURED = {
    **dict.fromkeys(
        ["activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing"],
        "test_trainer.py::test_training_is_the_plain_loop; test_layers_are_checkpointed",
    ),
    "gradient_checkpointing_kwargs": "test_layers_are_checkpointed",
    **dict.fromkeys(["adam_beta1", "adam_beta2", "adam_epsilon", "optim", "weight_decay"], "test_optimiser_options"),
    **dict.fromkeys(["bf16", "fp16"], "test_trainer.py::test_bfloat16_autocast_is_close; mixed_precision"),
    "data_seed": "test_seeds",
    "seed": "test_seeds",
    "full_determinism": "Trainer.__init__, which is called",
    "dataloader_multiprocessing_context": "test_loader_options",
    "dataloader_num_workers": "test_loader_options",
    "dataloader_persistent_workers": "test_loader_options",
    "dataloader_pin_memory": "test_loader_options",
    "dataloader_prefetch_factor": "test_loader_options",
    **dict.fromkeys(
        ["ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph"],
        "test_ddp_options",
    ),
    **dict.fromkeys(["ddp_backend", "ddp_timeout", "use_cpu"], "TrainingArguments._setup_devices"),
    "debug": "test_underflow_is_looked_for",
    **dict.fromkeys(
        ["disable_tqdm", "log_level", "log_level_replica", "log_on_each_node"], "Trainer.__init__ and log"
    ),
    **dict.fromkeys(
        ["eval_delay", "eval_on_start", "eval_steps", "eval_strategy", "logging_first_step", "logging_steps"],
        "test_when_things_happen",
    ),
    **dict.fromkeys(["logging_strategy", "save_steps", "save_strategy", "max_steps"], "test_when_things_happen"),
    "num_train_epochs": "test_when_things_happen",
    "gradient_accumulation_steps": "test_trainer.py::test_training_is_the_plain_loop",
    "greater_is_better": "test_best_is_what_the_metric_says",
    "load_best_model_at_end": "test_trainer.py::test_best_checkpoint_is_loaded_at_the_end",
    "metric_for_best_model": "test_best_is_what_the_metric_says",
    **dict.fromkeys(
        ["hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token"],
        "test_hub.py",
    ),
    "push_to_hub": "test_hub.py",
    "ignore_data_skip": "Trainer._run_epoch",
    "learning_rate": "test_trainer.py::test_learning_rates_of_both_groups",
    "lr_scheduler_kwargs": "test_schedules",
    "lr_scheduler_type": "test_schedules",
    "warmup_steps": "test_trainer.py::test_learning_rates_of_both_groups",
    "max_grad_norm": "test_gradients_are_clipped",
    "output_dir": "test_trainer.py::test_what_is_saved",
    "per_device_eval_batch_size": "test_batch_sizes",
    "per_device_train_batch_size": "test_batch_sizes",
    **dict.fromkeys(
        ["project", "report_to", "run_name", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id"],
        "the integrations that report_to names, which get every log",
    ),
    "restore_callback_states_from_checkpoint": "test_checkpoints.py, the run called stopping",
    "resume_from_checkpoint": "test_resume_is_an_argument_too",
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
    """A field that another version of transformers adds or removes is to be looked at."""
    groups = [set(REFUSED), set(WITHOUT_EFFECT), set(HONOURED)]
    assert set().union(*groups) == set(FIELDS)
    assert sum(map(len, groups)) == len(FIELDS)
    elsewhere = {"ddp_broadcast_buffers", "deepspeed", "fsdp", "fsdp_config"}
    assert (set(REFUSED_FIELDS) - {"debug"}) | elsewhere == set(REFUSED)  # of debug, one of two values is refused


def make_args(folder, **fields):
    values = {"per_device_train_batch_size": 4, "eval_strategy": "no", "save_strategy": "no", "use_cpu": True}
    return VPTSPTrainingArguments(**{**values, "output_dir": str(folder), "disable_tqdm": True, **fields})


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_honoured_is_refused(tmp_path, name):
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **{name: value})


def test_defaults_and_copies_are_accepted(tmp_path):
    args = make_args(tmp_path)
    for name in set(FIELDS) | OWN:
        make_args(tmp_path, **{name: getattr(args, name)})
    dataclasses.replace(args, learning_rate=0.1)
    make_args(tmp_path, include_num_input_tokens_seen=False, debug="underflow_overflow", label_names=[])


@pytest.mark.parametrize("name", sorted(set(REFUSED_FIELDS) - {"debug"}))
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
        ({"save_total_limit": -1}, "save_total_limit must be >= 0, got -1"),
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
    "args": "needed",
    "train_dataset": "every test of training",
    "eval_dataset": "every test of evaluation",
    "processing_class": "test_trainer.py::test_images_are_normalised_as_the_image_processor_does",
    "data_collator": "test_own_collator_callbacks_and_optimisers",
    "callbacks": "test_own_collator_callbacks_and_optimisers",
    "optimizers": "test_own_collator_callbacks_and_optimisers",
    "optimizer_cls_and_kwargs": "test_optimizer_cls_and_kwargs",
    "compute_metrics": "test_trainer.py::test_own_metrics_are_added",
}


class Images(torch.utils.data.Dataset):
    """Seeded noise of three classes, as ready float images."""

    labels = (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)

    def __len__(self):
        return 12

    def __getitem__(self, key):
        index = getattr(key, "index", key)
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": self.labels[index]}

    def evaluation_batches(self, batch_size):
        return (list(range(start, min(start + batch_size, 12))) for start in range(0, 12, batch_size))


@pytest.fixture
def model(backbone_folder):
    return make_model(backbone_folder)


def make_model(backbone_folder, **fields):
    torch.manual_seed(0)
    fields = {"num_classes": 3, "embedding_dim": 8, "num_prompts": 2, "num_class_prompts": 1, **fields}
    return VPTSPForMetricLearning.from_backbone(backbone_folder, **fields)


def make_trainer(model, folder, trainer=None, **fields):
    options = {"train_dataset": Images(), "eval_dataset": Images(), **(trainer or {})}
    return VPTSPTrainer(model, make_args(folder, **fields), **options)


def test_every_argument_of_the_trainer_is_one_of_two():
    names = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert names == set(TRAINER_ARGUMENTS) | set(REFUSED_TRAINER_ARGUMENTS)
    assert not set(TRAINER_ARGUMENTS) & set(REFUSED_TRAINER_ARGUMENTS)


@pytest.mark.parametrize("name", sorted(REFUSED_TRAINER_ARGUMENTS))
def test_arguments_of_the_trainer_that_would_be_ignored_are_refused(tmp_path, model, name):
    with pytest.raises(ValueError, match=f"VPTSPTrainer takes no {name}: "):
        VPTSPTrainer(model, make_args(tmp_path), **{name: lambda *args: None})
    with pytest.raises(TypeError, match="args must be a VPTSPTrainingArguments, got TrainingArguments"):
        VPTSPTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True))


def test_optimizer_cls_and_kwargs(tmp_path, model):
    given = (torch.optim.Adagrad, {"lr_decay": 0.25})
    trainer = make_trainer(model, tmp_path, {"optimizer_cls_and_kwargs": given}, learning_rate=0.125, weight_decay=0.5)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.Adagrad
    found = [(group["lr"], group["lr_decay"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [(0.125, 0.25, 0.5), (0.01, 0.25, 0.5)]
    given = (torch.optim.Rprop, {"lr": 0.5})  # has no weight_decay
    trainer = make_trainer(model, tmp_path, {"optimizer_cls_and_kwargs": given})
    assert [group["lr"] for group in trainer.create_optimizer().param_groups] == [0.5, 0.01]
    trainer = make_trainer(model, tmp_path, {"optimizer_cls_and_kwargs": given}, weight_decay=0.1)
    with pytest.raises(TypeError, match="weight_decay"):
        trainer.create_optimizer()


def test_offloaded_class_prompts_look_at_it_too(tmp_path, backbone_folder):
    model = make_model(backbone_folder, class_prompt_store="offloaded")
    with pytest.raises(ValueError, match=r"offloaded class prompts can be tuned by .* got Adagrad"):
        make_trainer(model, tmp_path, {"optimizer_cls_and_kwargs": (torch.optim.Adagrad, {})})
    make_trainer(model, tmp_path, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"momentum": 0.5})})


def test_own_collator_callbacks_and_optimisers(tmp_path, model):
    seen = []

    def collate(examples):
        seen.append(len(examples))
        return {name: torch.stack([torch.as_tensor(e[name]) for e in examples]) for name in examples[0]}

    class Notes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append("step")

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.25)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = make_trainer(
        model,
        tmp_path,
        {"data_collator": collate, "callbacks": [Notes()], "optimizers": (optimizer, schedule)},
        max_steps=1,
        logging_steps=1,
    )
    trainer.train()
    assert seen == [4, 4, 4, "step"] or seen == [4, "step"]
    assert trainer.optimizer.optimizer is optimizer and trainer.lr_scheduler is schedule
    assert trainer.state.log_history[0]["learning_rate"] == 0.25


# ---- What is honoured


def test_optimiser_options(tmp_path, model):
    adam = {"adam_beta1": 0.5, "adam_beta2": 0.75, "adam_epsilon": 0.125, "weight_decay": 0.25}
    (group, *_) = make_trainer(model, tmp_path, optim="adamw_torch", **adam).create_optimizer().param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.5, 0.75), 0.125, 0.25)
    for optim in ("sgd", "adagrad", "rmsprop", "adafactor"):
        optimizer = make_trainer(model, tmp_path, optim=optim, weight_decay=0.25).create_optimizer()
        assert type(optimizer).__name__.lower() == optim
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.25}


def test_schedules(tmp_path, model):
    trainer = make_trainer(
        model, tmp_path, lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": 2.0, "lr_end": 0.0}
    )
    trainer.create_optimizer_and_scheduler(4)
    rates = []
    for _ in range(4):
        rates.append(trainer.optimizer.param_groups[0]["lr"] / 5e-4)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == pytest.approx([1, 0.75**2, 0.5**2, 0.25**2])


def test_seeds(tmp_path, model):
    def batches(**fields):
        return list(make_trainer(model, tmp_path, **fields)._train_batch_sampler())

    assert batches(seed=1) == batches(seed=1) != batches(seed=2)
    assert batches(seed=1, data_seed=2) == batches(seed=2)


def test_loader_options(tmp_path, model):
    workers = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True}
    loader = make_trainer(
        model, tmp_path, **workers, dataloader_multiprocessing_context="spawn"
    ).get_train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers) == (1, 3, True)
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    assert make_trainer(model, tmp_path)._loader_options()["pin_memory"] is False


def test_ddp_options(tmp_path, model):
    options = {"ddp_bucket_cap_mb": 3, "ddp_find_unused_parameters": True, "ddp_static_graph": True}
    (given,) = make_trainer(model, tmp_path, **options)._build_accelerator_args()["kwargs_handlers"]
    assert (given.bucket_cap_mb, given.find_unused_parameters, given.static_graph) == (3, True, True)
    assert given.broadcast_buffers is False


def test_underflow_is_looked_for(tmp_path, model, monkeypatch):
    looked = []
    monkeypatch.setattr("transformers.trainer.DebugUnderflowOverflow", looked.append)
    make_trainer(model, tmp_path, debug="underflow_overflow", max_steps=1).train()
    assert looked == [model]


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_layers_are_checkpointed(tmp_path, model, name):
    trainer = make_trainer(model, tmp_path, max_steps=1, **{name: True, f"{name}_kwargs": {"use_reentrant": True}})
    with pytest.raises(ValueError, match="needs use_reentrant=False, got True"):
        trainer.train()


def test_gradients_are_clipped(tmp_path, backbone_folder):
    moved = []
    for norm in (0.0, 1e-3):
        model = make_model(backbone_folder)
        before = model.vptsp.prompts.tokens.detach().clone()
        options = {"optim": "sgd", "sgd_momentum": 0.0, "learning_rate": 1.0, "max_grad_norm": norm, "max_steps": 1}
        make_trainer(model, tmp_path, **options).train()
        moved.append(float((model.vptsp.prompts.tokens.detach() - before).norm()))
    assert 0 < moved[1] <= 1e-3 * 1.01 < moved[0]


def test_when_things_happen(tmp_path, model):
    trainer = make_trainer(
        model,
        tmp_path,
        num_train_epochs=4,  # of 3 steps
        eval_strategy="steps",
        eval_steps=2,
        eval_delay=4,
        eval_on_start=True,
        logging_first_step=True,
        logging_steps=5,
        save_strategy="steps",
        save_steps=4,
        save_total_limit=None,
    )
    trainer.train()
    log = trainer.state.log_history
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 5, 10]
    assert [entry["step"] for entry in log if "eval_recall_at_1" in entry] == [0, 4, 6, 8, 10, 12]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-12",
        "checkpoint-4",
        "checkpoint-8",
    ]
    trainer = make_trainer(model, tmp_path / "b", max_steps=2, logging_strategy="no")
    assert trainer.train().global_step == 2
    assert not [entry for entry in trainer.state.log_history if "loss" in entry]


def test_batch_sizes(tmp_path, model):
    trainer = make_trainer(model, tmp_path, per_device_train_batch_size=6, per_device_eval_batch_size=5)
    assert {len(batch["labels"]) for batch in trainer.get_train_dataloader()} == {6}
    seen = []
    embed = trainer._embed_batch
    trainer._embed_batch = lambda pixels: seen.append(len(pixels)) or embed(pixels)
    trainer.evaluate()
    assert seen == [5, 5, 2]


@pytest.mark.parametrize("greater, best", [(True, 6), (False, 3)])
def test_best_is_what_the_metric_says(tmp_path, model, greater, best):
    scores = iter([0.25, 0.75, 0.5])
    trainer = make_trainer(
        model,
        tmp_path,
        {"compute_metrics": lambda prediction: {"own": next(scores)}},
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        metric_for_best_model="own",
        greater_is_better=greater,
    )
    trainer.train()
    assert trainer.state.best_global_step == best


def test_a_score_that_is_no_number_can_not_be_the_best(tmp_path, model):
    trainer = make_trainer(
        model,
        tmp_path,
        {"compute_metrics": lambda prediction: {"own": math.nan}},
        num_train_epochs=1,
        eval_strategy="epoch",
        save_strategy="epoch",
        metric_for_best_model="own",
    )
    with pytest.raises(ValueError, match="metric_for_best_model: eval_own is nan at step 3, so no checkpoint"):
        trainer.train()


def test_resume_is_an_argument_too(tmp_path, model, backbone_folder):
    fields = {"num_train_epochs": 2, "save_strategy": "epoch", "load_best_model_at_end": False}
    make_trainer(model, tmp_path, **fields).train()
    resumed = make_trainer(
        make_model(backbone_folder), tmp_path, **fields, resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    steps = []

    class Notes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    resumed.add_callback(Notes())
    resumed.train()
    assert steps == [4, 5, 6]


class NoBatches:
    """A sampler that promises batches and has none."""

    def __len__(self):
        return 3

    def __iter__(self):
        return iter(())

    def set_epoch(self, epoch):
        pass


def test_a_run_without_a_step_is_an_error(tmp_path, model):
    trainer = make_trainer(model, tmp_path)
    trainer._train_batch_sampler = NoBatches
    with pytest.raises(TrainingError, match="training ended without a single step"):
        trainer.train()
