"""VPTSPTrainer with class prompts in host memory, against a plain loop over the dense table with the lazy rule."""

import json
import logging
import math
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from vptsp import ClassBalancedBatchSampler, VPTSPForMetricLearning, VPTSPTrainer, VPTSPTrainingArguments
from vptsp.training.offloading import ClassPromptCallback, describe_class_prompts
from vptsp.training.run_errors import CheckpointError


NUM_CLASSES = 7


class FloatImages(torch.utils.data.Dataset):
    """Ready float images of 7 classes, 3 of each."""

    def __init__(self):
        self.labels = np.arange(3 * NUM_CLASSES) % NUM_CLASSES
        self.images = torch.randn(len(self.labels), 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        return {"pixel_values": self.images[key.index], "labels": int(self.labels[key.index])}

    def evaluation_batches(self, batch_size):
        keys = [SimpleNamespace(index=i) for i in range(len(self))]
        return (keys[start : start + batch_size] for start in range(0, len(self), batch_size))


def make_model(backbone_folder, store="offloaded", **fields):
    values = {"num_classes": NUM_CLASSES, "embedding_dim": 12, "num_prompts": 3, "num_class_prompts": 2}
    torch.manual_seed(0)
    return VPTSPForMetricLearning.from_backbone(backbone_folder, class_prompt_store=store, **{**values, **fields})


def make_args(folder, **fields):
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "images_per_class": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "proxy_learning_rate": 1e-1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return VPTSPTrainingArguments(**{**values, **fields})


def make_trainer(backbone_folder, folder, fields, **model_fields):
    model = make_model(backbone_folder, **model_fields)
    return VPTSPTrainer(model=model, args=make_args(folder, **fields), train_dataset=FloatImages())


def plain_loop(model, args):
    """The same training of the dense model, but that each row of the table has an optimiser of its own, which steps
    when a batch has the row's class."""
    table = model.class_prompts.tokens
    slow = [p for p in model.parameters() if p.requires_grad and p is not model.proxies.original_proxies]
    groups = [
        {"params": [p for p in slow if p is not table], "lr": args.learning_rate},
        {"params": [model.proxies.original_proxies], "lr": args.proxy_learning_rate},
    ]

    def make_optimizer(parameters):
        if args.optim == "sgd":
            return torch.optim.SGD(parameters, lr=args.learning_rate, momentum=0.9, weight_decay=args.weight_decay)
        return torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay)

    main = make_optimizer(groups)
    rows = [torch.nn.Parameter(row.detach().clone()) for row in table]
    of_rows = [make_optimizer([row]) for row in rows]
    bases = [group["lr"] for group in main.param_groups]
    dataset, accumulation, step = FloatImages(), args.gradient_accumulation_steps, 0
    sampler = ClassBalancedBatchSampler(dataset.labels, 4, args.images_per_class, seed=args.seed)
    epochs = int(args.num_train_epochs)
    num_steps = epochs * math.ceil(len(sampler) / accumulation)
    model.train()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        for start in range(0, len(batches), accumulation):
            window, present = batches[start : start + accumulation], set()
            for keys in window:
                labels = torch.tensor([int(dataset.labels[key.index]) for key in keys])
                images = torch.stack([dataset.images[key.index] for key in keys])
                output = model(images, labels, images_per_class=args.images_per_class)
                (output.loss / len(window)).backward()
                model.commit_proxies(output)
                present |= set(labels.tolist())
            decay = (1 + math.cos(math.pi * step / num_steps)) / 2
            for group, base in zip(main.param_groups, bases, strict=True):
                group["lr"] = base * decay
            for c in present:
                rows[c].grad = table.grad[c].clone()
                of_rows[c].param_groups[0]["lr"] = args.learning_rate * decay
                of_rows[c].step()
            main.step()
            model.zero_grad()
            table.data.copy_(torch.stack([row.detach() for row in rows]))
            step += 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"optim": "adamw_torch", "weight_decay": 0.1},
        {"optim": "sgd", "weight_decay": 0.01, "learning_rate": 1e-3},
        {"gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True},
        {"images_per_class": 1},
        {"class_prompt_folder": "mapped", "gradient_accumulation_steps": 2},
    ],
    ids=lambda fields: "-".join(fields) or "default",
)
def test_training_is_the_plain_loop(backbone_folder, tmp_path, fields):
    fields = {**fields, "adam_epsilon": 1e-8}
    if "class_prompt_folder" in fields:
        fields["class_prompt_folder"] = str(tmp_path / "mapped")
    trainer = make_trainer(backbone_folder, tmp_path, fields)
    initial = trainer.model.class_prompts.tokens.clone()
    trainer.train()
    expected = make_model(backbone_folder, "dense")
    assert torch.equal(initial, expected.class_prompts.tokens)
    plain_loop(expected, trainer.args)
    for name, tensor in trainer.model.state_dict().items():
        if not name.endswith("k_proj.bias"):  # their gradients are rounding errors, which AdamW scales up
            torch.testing.assert_close(
                tensor, expected.state_dict()[name], rtol=2e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    tokens = trainer.model.class_prompts.tokens
    torch.testing.assert_close(tokens, expected.class_prompts.tokens.detach(), rtol=2e-4, atol=1e-5)
    assert (tokens - initial).abs().max() > 1e-4


@pytest.mark.parametrize(
    "fields", [{}, {"optim": "sgd"}, {"class_prompt_folder": "mapped"}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_resume_goes_on_bit_for_bit(backbone_folder, tmp_path, fields):
    if "class_prompt_folder" in fields:
        fields = {"class_prompt_folder": str(tmp_path / "mapped")}
    fields = {**fields, "save_strategy": "steps", "save_steps": 4, "save_total_limit": None}
    uninterrupted = make_trainer(backbone_folder, tmp_path, fields, rnn_dropout=0.2)
    uninterrupted.train()
    resumed = make_trainer(backbone_folder, tmp_path, fields, rnn_dropout=0.2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == uninterrupted.state.global_step > 4
    expected, store = uninterrupted.model.class_prompts, resumed.model.class_prompts
    assert torch.equal(store.tokens, expected.tokens)
    assert set(store.states) == set(expected.states) != set()
    for name, state in expected.states.items():
        assert torch.equal(store.states[name], state), name
    for name, tensor in uninterrupted.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_checkpoints_hold_table_and_states_and_miss_nothing_silently(backbone_folder, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = make_trainer(backbone_folder, tmp_path, fields)
    trainer.train()
    checkpoint, store = tmp_path / "checkpoint-2", trainer.model.class_prompts
    assert torch.equal(load_file(checkpoint / "class_prompts.safetensors")["tokens"], store.tokens)
    states = load_file(checkpoint / "class_prompts_optimizer.safetensors")
    assert set(states) == set(store.states) and all(torch.equal(states[name], store.states[name]) for name in states)
    trainer.save_model()
    assert not (tmp_path / "class_prompts.safetensors").exists(), "a retriever has no class prompts"
    for name in ("class_prompts_optimizer.safetensors", "class_prompts.safetensors"):
        (checkpoint / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            make_trainer(backbone_folder, tmp_path, fields).train(resume_from_checkpoint=str(checkpoint))


def test_best_checkpoint_brings_its_class_prompts(backbone_folder, tmp_path):
    scores = iter([0.9, 0.2])
    trainer = VPTSPTrainer(
        model=make_model(backbone_folder),
        args=make_args(
            tmp_path, num_train_epochs=2, eval_strategy="epoch", save_strategy="epoch", metric_for_best_model="chosen"
        ),
        train_dataset=FloatImages(),
        eval_dataset=FloatImages(),
        compute_metrics=lambda prediction: {"chosen": next(scores)},
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert json.loads((best / "trainer_state.json").read_text())["epoch"] == 1
    tokens = trainer.model.class_prompts.tokens
    assert torch.equal(tokens, load_file(best / "class_prompts.safetensors")["tokens"])


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_norm_and_clipping_of_gradients_count_the_rows(backbone_folder, tmp_path, max_grad_norm):
    fields = {"max_steps": 1, "max_grad_norm": max_grad_norm, "optim": "sgd", "per_device_train_batch_size": 14}
    trainers = [make_trainer(backbone_folder, tmp_path, fields, store=store) for store in ("dense", "offloaded")]
    for trainer in trainers:
        trainer.train()
    logged = [trainer.state.log_history[0]["grad_norm"] for trainer in trainers]
    assert logged[0] > 0.05
    assert logged[1] == pytest.approx(logged[0], rel=1e-6)
    tables = [trainer.model.class_prompts.tokens.detach() for trainer in trainers]
    torch.testing.assert_close(tables[1], tables[0], rtol=1e-6, atol=1e-8)


def test_skipped_steps_leave_the_rows(backbone_folder, tmp_path):
    trainer = make_trainer(backbone_folder, tmp_path, {})
    store = trainer.model.class_prompts
    before = store.tokens.clone()
    trainer.create_optimizer()
    callback = ClassPromptCallback(SimpleNamespace(model=trainer.model, accelerator=SimpleNamespace()))
    for skipped in (True, False):
        callback.trainer.accelerator.optimizer_step_was_skipped = skipped
        store(torch.tensor([1, 2]))[0].sum().backward()
        callback.on_optimizer_step(trainer.args, trainer.state, trainer.control, optimizer=trainer.optimizer)
        assert store.reduce_gradients() is None
        assert torch.equal(store.tokens, before) == skipped


def test_rows_from_files_are_always_read_ahead(backbone_folder, tmp_path, monkeypatch):
    fields = {"class_prompt_folder": str(tmp_path / "mapped"), "gradient_accumulation_steps": 2}
    trainer = make_trainer(backbone_folder, tmp_path, fields)
    store, taken, steps = trainer.model.class_prompts, [], []
    prefetched, begin = store._prefetched, trainer.training_step
    take, coming = prefetched.take, prefetched._coming
    monkeypatch.setattr(prefetched, "take", lambda *a: taken.append(bool(coming)) or take(*a))
    readers, read = [], store.read
    monkeypatch.setattr(
        store, "read", lambda *a: readers.append((len(a[0]), threading.current_thread().name)) or read(*a)
    )
    monkeypatch.setattr(trainer, "training_step", lambda *a: steps.append(len(coming)) or begin(*a))
    trainer.train()
    per_epoch = len(trainer.get_train_dataloader())
    assert taken == [True] * 2 * per_epoch
    assert max(steps) == 1, "at most this batch and the next are held"
    assert [name for size, name in readers if size == 2].count("MainThread") <= len(steps) / 2
    assert sum(name.startswith("class_prompts") for _, name in readers) == 2 * per_epoch
    assert not coming


@pytest.mark.parametrize("optim", ["adafactor", "rmsprop"])
def test_other_optimisers_are_refused_before_training(backbone_folder, tmp_path, optim):
    with pytest.raises(ValueError, match=f"one of adamw_torch, adamw_torch_fused, sgd with .*, got '{optim}'"):
        make_trainer(backbone_folder, tmp_path, {"optim": optim})
    make_trainer(backbone_folder, tmp_path, {"optim": optim}, store="dense")


def test_ready_optimisers_are_checked_too(backbone_folder, tmp_path):
    model = make_model(backbone_folder)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"torch\.optim\.AdamW .*, got Adam"):
        VPTSPTrainer(model=model, args=make_args(tmp_path), optimizers=(optimizer, None))


def test_what_was_picked_is_said(backbone_folder, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="vptsp")
    make_trainer(backbone_folder, tmp_path, {}, store="auto")
    assert caplog.messages == ["class prompts: dense, 0.0 MiB on the device (auto: dense up to 512 MiB)"]
    assert caplog.records[0].levelno == logging.INFO
    caplog.clear()
    monkeypatch.setattr("vptsp.configuration_vptsp.DENSE_CLASS_PROMPT_BYTES", 10)
    make_trainer(backbone_folder, tmp_path, {}, store="auto")
    assert caplog.messages[0].startswith("class prompts: offloaded, 0.0 MiB in host memory (auto: dense up to")
    assert caplog.records[0].levelno == logging.WARNING
    assert describe_class_prompts(make_model(backbone_folder, proxy_update="none")) == "none"


def test_what_does_not_fit_in_memory_goes_to_files(backbone_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    trainer = make_trainer(backbone_folder, tmp_path, {"max_steps": 2})
    assert "do not fit in memory: they are memory-mapped in" in caplog.text
    trainer.train()
    store = trainer.model.class_prompts
    assert store.folder == tmp_path / "class_prompts"
    assert all(state.untyped_storage().filename for state in (store.tokens, *store.states.values()))
