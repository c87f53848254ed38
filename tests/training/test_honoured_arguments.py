"""Arguments of `transformers` that are honoured, as `test_arguments.py` lists them: what each of them does."""

import math

import pytest
import torch
from noise_runs import make_model, make_trainer
from transformers import TrainerCallback, TrainingArguments

from vptsp.training.progress import RunProgress, ScoreTable
from vptsp.training.run_errors import TrainingError


@pytest.fixture
def model(backbone_folder):
    return make_model(backbone_folder)


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


def test_own_arguments_that_have_nothing_to_act_on(tmp_path, model, caplog):
    with pytest.raises(
        ValueError, match="stream_buffer_size is of streams, got 9 with a train_dataset that is a table"
    ):
        make_trainer(model, tmp_path, stream_buffer_size=9)
    make_trainer(model, tmp_path, class_prompt_folder=str(tmp_path))
    assert f"class_prompt_folder {tmp_path} is not used: no class prompts are offloaded" in caplog.text


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


@pytest.mark.parametrize(
    "name",
    [n for n in ("activation_checkpointing", "gradient_checkpointing") if n in TrainingArguments.__annotations__],
)
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


@pytest.mark.parametrize(
    ("options", "logged"),
    [
        ({"logging_steps": 4}, [4, 8]),
        ({"logging_steps": 5, "logging_first_step": True}, [1, 5]),
        ({"logging_strategy": "epoch"}, [3, 6, 9]),
        ({"logging_strategy": "no"}, []),
        ({"logging_steps": 50, "progress": True, "eval_strategy": "epoch"}, [3, 6, 9]),
        ({"logging_steps": 50, "progress": True, "eval_strategy": "steps", "eval_steps": 4}, [4, 8, 9]),
    ],
)
def test_gradients_are_measured_only_where_the_log_shows_it(tmp_path, model, monkeypatch, options, logged):
    measured, expected = [], {}
    monkeypatch.setattr("vptsp.training.progress.LEAST_LOGS", 1)
    options = dict(options)
    progress = options.pop("progress", False)
    trainer = make_trainer(
        model, tmp_path, num_train_epochs=3, save_strategy="no", load_best_model_at_end=False, **options
    )
    if progress:
        RunProgress.of(trainer, ScoreTable([1], write=lambda line: None))
    measure, step = trainer.measure_gradients, trainer.training_step

    def remember(*args):
        loss = step(*args)
        squares = [
            parameter.grad.double().square().sum() for parameter in model.parameters() if parameter.requires_grad
        ]
        expected[trainer.state.global_step + 1] = float(sum(squares)) ** 0.5
        return loss

    monkeypatch.setattr(trainer, "training_step", remember)
    monkeypatch.setattr(
        trainer, "measure_gradients", lambda m: measured.append(trainer.state.global_step + 1) or measure(m)
    )
    trainer.train()
    entries = {entry["step"]: entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry}
    assert measured == list(entries) == logged
    assert entries == pytest.approx({step: expected[step] for step in logged}, rel=1e-5)


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
