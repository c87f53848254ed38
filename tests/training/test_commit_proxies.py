"""Training without VPTSPTrainer: a loop that never commits the proxies is stopped, one that does is not."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from vptsp import VPTSPForMetricLearning


class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": index % 4}


def make_model(backbone_folder, **fields):
    fields = {"num_classes": 4, "embedding_dim": 8, "num_prompts": 2, "num_class_prompts": 1, **fields}
    return VPTSPForMetricLearning.from_backbone(backbone_folder, **fields)


def batch(start=0):
    examples = [Noise()[start + i] for i in range(4)]
    return torch.stack([e["pixel_values"] for e in examples]), torch.tensor([e["labels"] for e in examples])


@pytest.mark.parametrize("proxy_update", ["gru_relu", "mean"])
def test_a_trainer_that_never_commits_is_stopped(backbone_folder, tmp_path, proxy_update):
    model = make_model(backbone_folder, proxy_update=proxy_update)
    args = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=4, save_strategy="no")
    with pytest.raises(RuntimeError, match=r"never committed.* train with VPTSPTrainer .*commit_proxies\(output\)"):
        Trainer(model, args, train_dataset=Noise()).train()


def test_without_a_proxy_state_any_trainer_will_do(backbone_folder, tmp_path):
    model = make_model(backbone_folder, proxy_update="none")
    args = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=4, save_strategy="no")
    assert Trainer(model, args, train_dataset=Noise()).train().global_step == 6


def test_loops_that_commit_are_not_stopped(backbone_folder):
    model = make_model(backbone_folder).train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        for start in (0, 1, 2):  # gradients of three batches add up
            output = model(*batch(start))
            output.loss.backward()
            model.commit_proxies(output)
    output = model(*batch())
    model.commit_proxies(output)  # too early, but committed
    output.loss.backward()
    first, second = model(*batch()), model(*batch(1))  # two passes before one backward
    (first.loss + second.loss).backward()
    model.commit_proxies(first)
    model.commit_proxies(second)
    model(*batch())  # a loss that nothing is done with
    model(*batch())
    with torch.no_grad():
        model(*batch())
    output = model(*batch())
    output.loss.backward()
    model.eval()
    model(*batch()).loss.backward()  # in evaluation there is nothing to commit
    model.train()
    with torch.no_grad():
        model(*batch())
    with pytest.raises(RuntimeError, match="never committed"):
        model(*batch())
    model.commit_proxies(output)
    model(*batch())


def test_a_compiled_model_is_watched_too(backbone_folder, tmp_path):
    """By the Trainer's own option, in place, and as a part of a compiled function; without the code generator."""
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=4, save_strategy="no", max_steps=2, **options
    )
    with pytest.raises(RuntimeError, match=r"never committed.* train with VPTSPTrainer"):
        Trainer(make_model(backbone_folder), args, train_dataset=Noise()).train()

    pixel_values, labels = batch()
    labels = labels.sort().values  # class-major, one image of each class
    for how in ("in place", "wrapped", "inside"):
        torch._dynamo.reset()
        model = make_model(backbone_folder).train()
        if how == "in place":
            model.compile(backend="eager", fullgraph=True)
            step = model
        elif how == "wrapped":
            step = torch.compile(model, backend="eager", fullgraph=True)
        else:
            step = torch.compile(lambda *inputs, model=model: model(*inputs), backend="eager")
        for commits in (True, False):
            output = step(pixel_values, labels, 1)
            output.loss.backward()
            if commits:
                model.commit_proxies(output)
        with pytest.raises(RuntimeError, match="never committed"):
            step(pixel_values, labels, 1)
