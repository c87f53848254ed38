"""Rows of classes that move, and classes that take no part."""

import numpy as np
import pytest
import torch
from torch.optim import AdamW

from vptsp import VPTSPConfig, VPTSPForMetricLearning
from vptsp.training.class_rows import move_class_rows


SOURCE = np.array([0, 3, -1, 1])  # of six classes; the last two get fresh rows


def model_of(vit_config, num_classes=6, **fields):
    torch.manual_seed(0)
    values = {"embedding_dim": 12, "num_prompts": 3, "num_class_prompts": 2, **fields}
    return VPTSPForMetricLearning(VPTSPConfig(backbone_config=vit_config, num_classes=num_classes, **values))


def step(model, optimizer, labels=(0, 0, 1, 1, 3, 3, 5, 5)):
    labels = torch.tensor(labels)
    torch.manual_seed(1)
    output = model.train()(torch.randn(len(labels), 3, 16, 16), labels)
    output.loss.backward()
    model.commit_proxies(output)
    optimizer.step()
    if model.offloaded_class_prompts is not None:
        model.class_prompts.step(optimizer)
    optimizer.zero_grad()
    return output.loss.item()


def tables(model, optimizer):
    """Name -> a copy of every table that has a row for each class."""
    found = {"state": model.proxies.state}
    parameters = {"original": model.proxies.original_proxies}
    store = model.class_prompts
    if model.offloaded_class_prompts is None:
        parameters["prompts"] = store.tokens
    else:
        found |= {"prompts": store.tokens, **{f"prompts.{name}": state for name, state in store.states.items()}}
    for name, parameter in parameters.items():
        found[name] = parameter
        found |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items() if value.dim()}
    return {name: table.detach().clone() for name, table in found.items()}


@pytest.mark.parametrize("store", ["dense", "offloaded"])
def test_rows_and_optimiser_states_follow(vit_config, store):
    model = model_of(vit_config, class_prompt_store=store)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step(model, optimizer)
    step(model, optimizer)
    before = tables(model, optimizer)
    assert len(before) == {"dense": 7, "offloaded": 8}[store]
    shared = model.vptsp.state_dict()
    shared = {name: tensor.clone() for name, tensor in shared.items()}
    move_class_rows(model, optimizer, SOURCE, seed=5)
    after = tables(model, optimizer)
    for name, table in after.items():
        for row, source in enumerate([0, 3, -1, 1, -1, -1]):
            if source >= 0:
                assert torch.equal(table[row], before[name][source]), (name, row)
            elif "." in name:
                assert not table[row].any(), (name, row)
            else:
                assert not any(torch.equal(table[row], old) for old in before[name]), (name, row)
    assert torch.allclose(after["state"].norm(dim=1), torch.ones(6))
    assert after["original"][[2, 4, 5]].abs().max() <= (6 / 18) ** 0.5 / 8
    assert all(torch.equal(tensor, shared[name]) for name, tensor in model.vptsp.state_dict().items())
    step(model, optimizer)


def test_the_seed_decides_what_is_fresh(vit_config):
    drawn = []
    for seed in (5, 5, 6):
        model = model_of(vit_config)
        torch.manual_seed(seed + len(drawn))  # which counts for nothing
        state = torch.get_rng_state()
        move_class_rows(model, None, SOURCE, seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(model.proxies.state.clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("fields", [{}, {"loss": "proxy_nca"}, {"proxy_update": "none"}])
def test_classes_that_take_no_part_change_no_loss(vit_config, fields):
    small, large = model_of(vit_config, 6, **fields), model_of(vit_config, 9, **fields)
    own = small.state_dict()
    widened = large.state_dict()
    for name, tensor in own.items():
        widened[name] = torch.cat([tensor, widened[name][6:]]) if widened[name].shape != tensor.shape else tensor
    large.load_state_dict(widened)
    losses = []
    for model in (small, large):
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if model is large:
            assert step(model_copy(large), torch.optim.SGD([torch.zeros(1)], 0.1)) != pytest.approx(losses[0][0])
            model.proxies.num_active = 6
        losses.append([step(model, optimizer) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def model_copy(model):
    copy = VPTSPForMetricLearning(model.config)
    copy.load_state_dict(model.state_dict())
    return copy
