"""Offloaded class prompts against the dense store, torch's optimisers and the lazy rule written out."""

import math
import threading

import psutil
import pytest
import torch
from conftest import tiny_vit_config
from safetensors.torch import save_file

from vptsp import VPTSPConfig, VPTSPForMetricLearning
from vptsp.training import host_table
from vptsp.training.class_prompts import ClassPrompts, OffloadedClassPrompts


SHAPE = (6, 5, 8)  # classes, prompts of all layers, width
LENGTHS = (3, 2)
KINDS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make_store(folder=None):
    torch.manual_seed(0)
    store = OffloadedClassPrompts(SHAPE[0], LENGTHS, LENGTHS[0], SHAPE[2])
    store.init_weights()
    if folder is not None:
        store.place(folder)
    return store


def make_optimizer(kind, tensor=None):
    cls, options = KINDS[kind]
    return cls([torch.nn.Parameter(torch.zeros(1)) if tensor is None else tensor], **options)


def backward(store, classes, weight):
    """Gradients that depend on the rows, so that mistakes add up: of sum(weight * rows ** 2) / 2."""
    rows = torch.cat(store(classes), dim=1)
    (weight[classes] * rows**2 / 2).sum().backward()


def slow_step(kind, row, gradient, state, lr):
    """One step of one row in float64, from the papers' formulas; `state` is a dict that this row keeps."""
    options = KINDS[kind][1]
    decay = options.get("weight_decay", 0.0)
    state["step"] = state.get("step", 0) + 1
    if kind == "adamw":
        b1, b2 = options["betas"]
        state["m"] = b1 * state.get("m", 0) + (1 - b1) * gradient
        state["v"] = b2 * state.get("v", 0) + (1 - b2) * gradient**2
        m = state["m"] / (1 - b1 ** state["step"])
        v = state["v"] / (1 - b2 ** state["step"])
        return row - lr * decay * row - lr * m / (v.sqrt() + 1e-8)
    gradient = gradient + decay * row
    if "momentum" in options:
        state["m"] = options["momentum"] * state.get("m", 0) + gradient
        gradient = gradient + options["momentum"] * state["m"] if options.get("nesterov") else state["m"]
    return row - lr * gradient


@kinds
def test_rows_in_every_batch_move_as_under_torch(kind):
    store, weight = make_store(), torch.rand(SHAPE)
    dense = torch.nn.Parameter(store.tokens.clone())
    of_dense, of_rows = make_optimizer(kind, dense), make_optimizer(kind)
    for _ in range(10):
        dense.grad = weight * dense.detach()
        of_dense.step()
        backward(store, torch.randperm(SHAPE[0]), weight)
        store.step(of_rows)
    assert (store.tokens - make_store().tokens).abs().max() > 0.05
    torch.testing.assert_close(store.tokens, dense.detach(), rtol=1e-6, atol=1e-6)


@kinds
@pytest.mark.parametrize("mapped", [False, True])
def test_lazy_rule(kind, mapped, tmp_path):
    store, weight = make_store(tmp_path if mapped else None), torch.rand(SHAPE)
    expected, states = store.tokens.double(), [{} for _ in range(SHAPE[0])]
    optimizer = make_optimizer(kind)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = lr = KINDS[kind][1]["lr"] * (1 - step / 20)
        classes = torch.randperm(SHAPE[0] - 1)[: 1 + step % 4]  # the last class is in no batch
        before = store.tokens.clone(), {name: state.clone() for name, state in store.states.items()}
        for c in classes:
            expected[c] = slow_step(kind, expected[c], weight[c].double() * expected[c], states[c], lr)
        backward(store, classes, weight)
        store.step(optimizer)
        absent = torch.tensor([c not in classes for c in range(SHAPE[0])])
        assert torch.equal(store.tokens[absent], before[0][absent])
        for name, state in before[1].items():
            assert torch.equal(store.states[name][absent], state[absent])
    torch.testing.assert_close(store.tokens.double(), expected, rtol=1e-5, atol=1e-6)
    if kind == "adamw":
        assert store.states["step"].tolist() == [state.get("step", 0) for state in states]


def test_backward_passes_before_a_step_are_summed():
    store, weight = make_store(), torch.rand(SHAPE)
    expected = store.tokens.clone()
    for classes in ([0, 1, 2], [2, 3, 0], [2, 5, 4]):
        backward(store, torch.tensor(classes), weight)
    store.step(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    times = torch.tensor([2, 1, 3, 1, 1, 1])[:, None, None]
    torch.testing.assert_close(store.tokens, expected - 0.1 * times * weight * expected)
    after = store.tokens.clone()
    store.step(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    assert torch.equal(store.tokens, after), "without a new gradient nothing moves"


def test_scaled_gradients_reduced_early_are_not_lost():
    store, weight = make_store(), torch.rand(SHAPE)
    expected = store.tokens.clone()
    backward(store, torch.tensor([1, 4]), 8 * weight)
    classes, gradients = store.reduce_gradients(scale=8.0)
    assert classes.tolist() == [1, 4]
    torch.testing.assert_close(gradients, (weight * expected)[[1, 4]])
    backward(store, torch.tensor([4, 2]), weight)
    store.step(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    times = torch.tensor([0, 1, 1, 0, 2, 0])[:, None, None]
    torch.testing.assert_close(store.tokens, expected - 0.1 * times * weight * expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_with_gradients_that_are_not_finite_stay(bad):
    store, weight = make_store(), torch.ones(SHAPE)
    weight[3, 1, 2] = bad
    before = store.tokens.clone()
    backward(store, torch.tensor([2, 3]), weight)
    store.step(make_optimizer("adamw"))
    assert torch.equal(store.tokens[3], before[3])
    assert not torch.equal(store.tokens[2], before[2])
    assert store.states["step"].tolist() == [0, 0, 1, 0, 0, 0]


def test_forward_without_backward_leaves_nothing_behind():
    store = make_store()
    with torch.no_grad():
        assert not store(torch.tensor([1]))[0].requires_grad
    store(torch.tensor([1]))
    assert store.reduce_gradients() is None


def test_table_stays_on_the_host_and_out_of_the_state():
    store = make_store()
    before = store.tokens.clone()
    assert not list(store.parameters())
    assert not store.state_dict()
    store.to(torch.float64).to("meta")
    assert torch.equal(store.tokens, before)
    assert store.anchor.device.type == "meta"


def test_moving_to_files_keeps_table_and_states(tmp_path):
    store, other, weight = make_store(), make_store(), torch.rand(SHAPE)
    for step in range(6):
        if step == 3:
            store.place(tmp_path / "new")
            assert str(tmp_path / "new") in store.tokens.untyped_storage().filename
            assert all(str(tmp_path) in state.untyped_storage().filename for state in store.states.values())
            assert not list((tmp_path / "new").iterdir()), "scratch files must not outlive the process"
        for each in (store, other):
            backward(each, torch.tensor([step % 6, (step + 1) % 6]), weight)
            each.step(make_optimizer("adamw"))
    assert other.tokens.untyped_storage().filename is None
    assert torch.equal(store.tokens, other.tokens)
    assert all(torch.equal(store.states[name], state) for name, state in other.states.items())


def test_what_does_not_fit_is_refused_with_a_way_out(tmp_path, monkeypatch):
    memory = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    store = make_store()
    with pytest.raises(MemoryError, match=r"do not fit in memory: call place\(folder\), or train with class_prompt_f"):
        store(torch.tensor([0]))
    disk = type("Disk", (), {"free": 4 * math.prod(SHAPE) * 2 - 1})
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"class_prompt_folder .* left, .* need"):
        patch.setattr(host_table.shutil, "disk_usage", lambda folder: disk)
        store.place(tmp_path, num_states=1)
    disk.free *= 2
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"\(2 processes\)"):
        patch.setattr(host_table.shutil, "disk_usage", lambda folder: disk)
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        store.place(tmp_path, num_states=1)
    store = make_store()
    torch.manual_seed(0)
    store.place(tmp_path)
    monkeypatch.undo()
    assert torch.equal(store.tokens, make_store().tokens), "drawn when it has a place, as it would have been at first"


def test_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    store, bytes_of_table = make_store(), 4 * math.prod(SHAPE)
    available = type("Memory", (), {"available": 0})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    available.available = math.ceil(3 * bytes_of_table / 0.8) - bytes_of_table  # the table itself is there already
    assert store.fits_in_memory(num_states=2)
    available.available -= 2
    assert not store.fits_in_memory(num_states=2)
    available.available = math.ceil(6 * bytes_of_table / 0.8) - 2 * bytes_of_table
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert store.fits_in_memory(num_states=2)
    available.available -= 2
    assert not store.fits_in_memory(num_states=2)


# ---- Prefetching


def test_prefetched_rows_are_those_of_the_table(tmp_path, monkeypatch):
    store, weight = make_store(tmp_path), torch.rand(SHAPE)
    readers = []
    read = store.read
    monkeypatch.setattr(store, "read", lambda *a: readers.append(threading.current_thread().name) or read(*a))
    optimizer = make_optimizer("adamw")
    batches = [torch.randperm(SHAPE[0])[:3] for _ in range(6)]
    store.prefetch(batches[0])
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        if following is not None:
            store.prefetch(following)  # before the step that moves rows which they share
        rows = torch.cat(store(batch), dim=1)
        assert torch.equal(rows, store.tokens[batch])
        (weight[batch] * rows**2).sum().backward()
        store.step(optimizer)
    prefetched = [name for name in readers if name.startswith("class_prompts")]
    assert len(prefetched) == len(batches)
    assert len(readers) > len(batches), "some batches share classes, whose rows must be read again"


def test_unexpected_classes_are_served_and_do_not_disturb(tmp_path):
    store = make_store(tmp_path)
    store.prefetch(torch.tensor([1, 2]))
    assert torch.equal(store(torch.tensor([3]))[0], store.tokens[[3], :3])
    assert torch.equal(store(torch.tensor([1, 2]))[1], store.tokens[[1, 2], 3:])
    store.prefetch(torch.tensor([4]))
    store.discard_prefetched()
    assert not store._prefetched._coming


def test_a_read_that_failed_does_not_come_up_again(tmp_path):
    store = make_store()
    store.place(tmp_path)
    store.prefetch(torch.tensor([SHAPE[0] + 5]))  # there is no such class
    store.discard_prefetched()
    store.prefetch(torch.tensor([1, 2]))
    assert torch.equal(torch.cat(store(torch.tensor([1, 2])), dim=1), store.tokens[1:3])


def test_nothing_is_prefetched_from_memory_to_the_cpu():
    store = make_store()
    store.prefetch(torch.tensor([1, 2]))
    assert not store._prefetched._coming


# ---- Files and errors


def test_files_are_read_back_strictly(tmp_path):
    store, weight = make_store(), torch.rand(SHAPE)
    backward(store, torch.tensor([1, 4]), weight)
    store.step(make_optimizer("adamw"))
    store.save(tmp_path / "table")
    store.save_states(tmp_path / "states")
    torch.manual_seed(1)
    other = OffloadedClassPrompts(SHAPE[0], LENGTHS, LENGTHS[0], SHAPE[2])
    other.init_weights()
    other.load(tmp_path / "table")
    other.load_states(tmp_path / "states")
    assert torch.equal(other.tokens, store.tokens)
    assert set(other.states) == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(other.states[name], state) for name, state in store.states.items())

    with pytest.raises(ValueError, match="must hold tokens, got exp_avg, exp_avg_sq, step"):
        other.load(tmp_path / "states")
    larger = OffloadedClassPrompts(SHAPE[0] + 1, LENGTHS, LENGTHS[0], SHAPE[2])
    for load, file in ((larger.load, "table"), (larger.load_states, "states")):
        with pytest.raises(ValueError, match=r"must have shape \(7, 5, 8\), got \(6, 5, 8\)|shape \(7,\), got \(6,\)"):
            load(tmp_path / file)
    with pytest.raises(ValueError, match=r"table must hold .* got tokens"):
        other.load_states(tmp_path / "table")
    save_file({"tokens": torch.ones(SHAPE, dtype=torch.int64)}, tmp_path / "whole")
    with pytest.raises(ValueError, match=r"tokens in .* must be torch.float32, got torch.int64"):
        other.load(tmp_path / "whole")
    save_file({"momentum_buffer": torch.ones(SHAPE, dtype=torch.float16)}, tmp_path / "half")
    with pytest.raises(ValueError, match=r"momentum_buffer in .* must be torch.float32, got torch.float16"):
        other.load_states(tmp_path / "half")
    assert torch.equal(other.tokens, store.tokens)
    backward(other, torch.tensor([1]), weight)
    with pytest.raises(ValueError, match="states exp_avg, exp_avg_sq, step, but SGD needs momentum_buffer"):
        other.step(make_optimizer("momentum"))


@pytest.mark.parametrize(
    "cls, options",
    [(torch.optim.Adam, {}), (torch.optim.SGD, {"dampening": 0.1}), (torch.optim.AdamW, {"amsgrad": True})],
)
def test_other_optimisers_are_refused(cls, options):
    with pytest.raises(ValueError, match=f"AdamW without amsgrad and .*SGD without dampening, got {cls.__name__}"):
        make_store().step(cls([torch.zeros(1)], **options))


# ---- In the model


def make_model(store, **fields):
    values = {"embedding_dim": 10, "num_classes": 7, "num_prompts": 5, "num_class_prompts": 3}
    torch.manual_seed(0)
    config = VPTSPConfig(backbone_config=tiny_vit_config(), class_prompt_store=store, **{**values, **fields})
    return VPTSPForMetricLearning(config).train()


@pytest.mark.parametrize("labels, k", [([4, 0, 6, 2], 1), ([4, 4, 0, 0, 6, 6], 2), ([3, 0, 3, 5, 0], None)])
@pytest.mark.parametrize("layout", [(3, None, 0), (3, 4, 2), (0, 0, 0)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_model_is_the_dense_one(labels, k, layout, checkpointing):
    fields = dict(zip(("num_class_prompts", "class_prompt_depth", "class_prompt_step"), layout, strict=True))
    dense, offloaded = make_model("dense", **fields), make_model("offloaded", **fields)
    expected = dense.state_dict()
    table = expected.pop("class_prompts.tokens", None)
    assert all(torch.equal(tensor, offloaded.state_dict()[name]) for name, tensor in expected.items())
    assert set(expected) == set(offloaded.state_dict())
    pixel_values, labels = torch.randn(len(labels), 3, 16, 16), torch.tensor(labels)
    outputs = []
    for model in (dense, offloaded):
        if checkpointing:
            model.gradient_checkpointing_enable()
        outputs.append(model(pixel_values, labels, images_per_class=k))
        outputs[-1].loss.backward()
    for name in ("loss", "embeddings", "similarity", "proxy_rows"):
        assert torch.equal(outputs[1][name], outputs[0][name]), name
    own = dict(offloaded.named_parameters())
    for name, parameter in dense.named_parameters():
        if name != "class_prompts.tokens" and parameter.grad is not None:
            assert torch.equal(own[name].grad, parameter.grad), name
    if table is None:
        assert offloaded.class_prompts.reduce_gradients() is None
        return
    assert torch.equal(table, offloaded.class_prompts.tokens)
    classes, gradients = offloaded.class_prompts.reduce_gradients()
    of_table = dense.class_prompts.tokens.grad
    assert sorted(classes.tolist()) == sorted(set(labels.tolist()))
    assert torch.equal(gradients, of_table[classes])
    of_table[classes] = 0
    assert (of_table == 0).all()


def test_saved_models_bring_their_class_prompts(tmp_path):
    model = make_model("offloaded")
    model.class_prompts.tokens.add_(1)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "class_prompts.safetensors").is_file()
    torch.manual_seed(5)
    loaded = VPTSPForMetricLearning.from_pretrained(tmp_path)
    assert torch.equal(loaded.class_prompts.tokens, model.class_prompts.tokens)
    model.class_prompts.tokens.zero_()
    model.load_saved(tmp_path)
    assert torch.equal(loaded.class_prompts.tokens, model.class_prompts.tokens)
    with pytest.raises(ValueError, match=r"has unknown class_prompts\.tokens|lacks class_prompts\.tokens"):
        VPTSPForMetricLearning.from_pretrained(tmp_path, class_prompt_store="dense")
    with pytest.raises(ValueError, match="save_pretrained does not push"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    (tmp_path / "class_prompts.safetensors").unlink()
    with pytest.raises(OSError, match=r"class_prompts\.safetensors"):
        VPTSPForMetricLearning.from_pretrained(tmp_path)


def test_class_prompts_start_anew_on_a_retriever(tmp_path):
    model = make_model("offloaded")
    model.retriever.save_pretrained(tmp_path)
    assert not (tmp_path / "class_prompts.safetensors").exists()
    loaded = VPTSPForMetricLearning.from_pretrained(tmp_path, num_classes=300)
    tokens = loaded.class_prompts.tokens
    assert tokens.shape == (300, 12, 24)
    assert tokens.std().item() == pytest.approx((2 / (3 + 24)) ** 0.5, rel=0.02)


def test_auto_is_dense_up_to_a_size(monkeypatch):
    fields = {"backbone_config": tiny_vit_config(), "num_classes": 7, "num_class_prompts": 3}
    assert VPTSPConfig(**fields).class_prompt_bytes == 4 * 7 * 3 * 4 * 24
    assert isinstance(make_model("auto").class_prompts, ClassPrompts)
    assert VPTSPConfig(**{**fields, "num_classes": 466_033}).resolved_class_prompt_store == "dense"
    assert VPTSPConfig(**{**fields, "num_classes": 466_034}).resolved_class_prompt_store == "offloaded"
    monkeypatch.setattr("vptsp.configuration_vptsp.DENSE_CLASS_PROMPT_BYTES", 1000)
    model = make_model("auto")
    assert isinstance(model.class_prompts, OffloadedClassPrompts)
    assert model.config.class_prompt_store == "auto", "another number of classes may want another store"
    with pytest.raises(ValueError, match="class_prompt_store must be one of auto, dense, offloaded, got 'disk'"):
        VPTSPConfig(class_prompt_store="disk")
