"""Frozen weights are cast once instead of in every pass, with the same results."""

import pytest
import torch
from conftest import tiny_vit_config

from vptsp import VPTSPConfig, VPTSPForMetricLearning
from vptsp.training.half_precision import frozen_weights_in


def make_model(**fields):
    torch.manual_seed(0)
    values = {"num_classes": 5, "embedding_dim": 10, "num_prompts": 3, "num_class_prompts": 2}
    return VPTSPForMetricLearning(VPTSPConfig(backbone_config=tiny_vit_config(), **{**values, **fields})).eval()


def step(model):
    """Loss and gradients of a batch under autocast."""
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(4, 3, 16, 16), torch.tensor([0, 0, 3, 3]), images_per_class=2).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


@pytest.mark.parametrize("bitfit", [True, False])
def test_a_step_is_that_of_autocast_alone(bitfit):
    model = make_model(bitfit=bitfit)
    expected = step(model)
    with frozen_weights_in(torch.bfloat16, model):
        actual = step(model)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
        assert tensor.dtype == torch.float32


def test_only_frozen_matrices_change_and_come_back_bit_for_bit():
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(KeyError), frozen_weights_in(torch.bfloat16, model):
        for name, parameter in model.named_parameters():
            is_frozen_matrix = not parameter.requires_grad and name.split(".")[-2].endswith(
                ("_proj", "fc1", "fc2", "projection")
            )
            assert parameter.dtype == (torch.bfloat16 if is_frozen_matrix else torch.float32), name
        raise KeyError
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_no_precision_changes_nothing():
    model = make_model()
    with frozen_weights_in(None, model):
        assert all(p.dtype == torch.float32 for p in model.parameters())
