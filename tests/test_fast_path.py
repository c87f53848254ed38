"""What the fast path keeps or computes another way must never show in the results."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vptsp import VPTSPModel, modeling_vptsp
from vptsp.linear_vptsp import fast_linear


# ---- Linear layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (1, 24), (0, 24), (2, 0, 24)])
def test_linear_values_and_gradients(shape, bias):
    layer = nn.Linear(24, 40, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    gradient = torch.randn(*shape[:-1], 40)
    fast_linear(layer, x).backward(gradient)
    actual = [x.grad, *(p.grad for p in layer.parameters())]
    exact = copy.deepcopy(layer).double().requires_grad_()
    exact.zero_grad()
    x64 = x.detach().double().requires_grad_()
    expected_output = F.linear(x64, exact.weight, exact.bias)
    expected_output.backward(gradient.double())
    torch.testing.assert_close(fast_linear(layer, x), expected_output.float(), rtol=1e-5, atol=1e-5)
    for got, expected in zip(actual, [x64.grad, *(p.grad for p in exact.parameters())], strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_linear_of_a_view_and_of_a_gradient_that_is_one():
    layer = nn.Linear(24, 40)
    x = torch.randn(6, 5, 24).transpose(0, 1).requires_grad_()
    fast_linear(layer, x).transpose(0, 1)[:, ::2].sum().backward()
    expected = torch.zeros(5, 6, 24)
    expected[::2] = layer.weight.sum(0).detach()
    torch.testing.assert_close(x.grad, expected)


def test_linear_of_a_frozen_layer_keeps_no_input():
    layer = nn.Linear(24, 40).requires_grad_(False)
    layer.bias.requires_grad_(True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fast_linear(layer, torch.randn(9, 24, requires_grad=True))
    assert [tensor.shape for tensor in saved] == [layer.weight.shape]


def test_linear_leaves_other_layers_and_precisions_to_pytorch():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = Doubled(4, 3), torch.randn(2, 4)
    torch.testing.assert_close(fast_linear(layer, x), 2 * F.linear(x, layer.weight, layer.bias))
    plain = nn.Linear(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast_linear(plain, x).dtype == torch.bfloat16
    assert fast_linear(plain.double(), x.double()).dtype == torch.float64


# ---- Keys and values of the shared prompts


@pytest.fixture
def retriever(backbone_folder):
    return VPTSPModel.from_backbone(backbone_folder, embedding_dim=10, num_prompts=5, prompt_step=2).eval()


@pytest.fixture
def projections(monkeypatch):
    """Counts how often a layer's prompts are turned into keys and values ahead of time."""
    calls = []
    project = modeling_vptsp.project_prompts
    monkeypatch.setattr(modeling_vptsp, "project_prompts", lambda *args: calls.append(1) or project(*args))
    return calls


PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def embed(retriever, pixels=PIXELS):
    with torch.no_grad():
        return retriever(pixels).embeddings


def embed_afresh(retriever, pixels=PIXELS):
    """With a graph, nothing is kept."""
    return retriever(pixels).embeddings.detach()


def test_prompts_are_projected_once(retriever, projections):
    expected = embed_afresh(retriever)
    assert not projections
    for _ in range(3):
        torch.testing.assert_close(embed(retriever), expected, rtol=1e-6, atol=1e-6)
    assert len(projections) == 4  # one a layer
    with torch.inference_mode():
        torch.testing.assert_close(retriever(PIXELS).embeddings, expected, rtol=1e-6, atol=1e-6)
    assert len(projections) == 4


def change_prompts(retriever):
    retriever.prompts.tokens.copy_(torch.randn_like(retriever.prompts.tokens))


def change_bias(retriever):
    retriever.backbone.layers[1].attention.v_proj.bias.add_(0.5)


def change_norm(retriever):
    retriever.backbone.layers[0].layernorm_before.weight.mul_(1.5)


def load_others(retriever):
    retriever.load_state_dict({name: tensor + 0.01 for name, tensor in retriever.state_dict().items()})


def load_others_in_place_of_these(retriever):
    state = {name: tensor + 0.01 for name, tensor in retriever.state_dict().items()}
    retriever.load_state_dict(state, assign=True)


@pytest.mark.parametrize(
    "change", [change_prompts, change_bias, change_norm, load_others, load_others_in_place_of_these]
)
def test_any_change_of_weights_is_seen(retriever, change):
    before = embed(retriever)
    with torch.no_grad():
        change(retriever)
    after = embed(retriever)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, embed_afresh(retriever), rtol=1e-6, atol=1e-6)


def test_changes_of_dtype_are_seen(retriever):
    expected = embed(retriever)
    torch.testing.assert_close(embed(retriever.double(), PIXELS.double()).float(), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = embed(retriever.float())
        torch.testing.assert_close(half, embed_afresh(retriever), rtol=1e-6, atol=1e-6)
    assert (half - expected).abs().max() > 1e-4
    torch.testing.assert_close(embed(retriever), expected, rtol=1e-6, atol=1e-6)
    embed(retriever.to(torch.bfloat16))
    rounded = retriever.float()
    torch.testing.assert_close(embed(rounded), embed_afresh(rounded), rtol=1e-6, atol=1e-6)


def test_training_after_evaluation_uses_the_tokens(retriever):
    embed(retriever)
    retriever.train()(PIXELS).embeddings.sum().backward()
    assert retriever.prompts.tokens.grad.norm() > 0


def test_weights_without_a_version_are_projected_every_time(backbone_folder):
    with torch.inference_mode():
        retriever = VPTSPModel.from_backbone(backbone_folder, embedding_dim=10, num_prompts=5).eval()
        before = retriever(PIXELS).embeddings
        retriever.prompts.tokens.copy_(torch.randn_like(retriever.prompts.tokens))
        assert (retriever(PIXELS).embeddings - before).abs().max() > 1e-4
