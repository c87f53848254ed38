"""The fast path against the naive computation: embeddings, loss, every gradient and the new proxy state."""

import oracle
import pytest
import torch
from conftest import tiny_vit_config

from vptsp import VPTSPConfig, VPTSPForMetricLearning


def make_model(dtype=torch.float64, **fields):
    values = {"embedding_dim": 10, "num_classes": 7, "num_prompts": 5, "num_class_prompts": 3, "loss_alpha": 8.0}
    config = VPTSPConfig(**{"backbone_config": tiny_vit_config(), **values, **fields})
    model = VPTSPForMetricLearning(config).to(dtype)
    with torch.no_grad():  # nothing stays at a value that hides a mistake
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model.train()


def assert_same_step(model, labels, images_per_class=None, rtol=1e-5, rounding=None):
    dtype = model.proxies.original_proxies.dtype
    rounding = rounding or torch.finfo(dtype).eps
    pixel_values = torch.randn(len(labels), 3, 16, 16, dtype=dtype)

    embeddings, loss, state = oracle.forward(model, pixel_values, labels)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    old_state = None if state is None else model.proxies.state.clone()
    output = model(pixel_values, labels, images_per_class=images_per_class)
    output.loss.backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if state is not None:
        assert torch.equal(model.proxies.state, old_state), "forward must not change the state"
    model.commit_proxies(output)

    def close(a, b, what):
        error = (a - b).norm() / b.norm().clamp(min=1e-12)
        assert error < rtol, f"{what}: relative error {error:.2e}"

    close(output.embeddings, embeddings, "embeddings")
    close(output.loss, loss, "loss")
    if state is not None:
        close(model.proxies.state, state, "state")
    # What no image reaches may have zeros in the one computation and nothing in the other.
    tuned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(expected) | set(actual) <= tuned
    assert all(expected[name].norm() == 0 for name in set(expected) - set(actual))
    assert len(set(expected) & set(actual)) > len(tuned) / 2
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in actual.items():
        reference = expected.get(name, torch.zeros_like(gradient))
        rotated = model.config.backbone_config.model_type == "mlcd_vision_model"  # by angles of each token
        if name.endswith("k_proj.bias") and not rotated:  # shifts all scores of a query alike: zero but for rounding
            assert max(gradient.norm(), reference.norm()) < 10 * rounding * largest
        elif reference.norm() > 0:
            close(gradient, reference, f"gradient of {name}")
        else:
            assert gradient.norm() == 0, f"gradient of {name} must be zero"


K1 = torch.tensor([4, 0, 6, 2])
K2 = torch.tensor([4, 4, 0, 0, 6, 6])


@pytest.mark.parametrize("prompts", [(5, None, 0), (5, 2, 0), (5, 4, 2), (7, 3, 1), (0, 4, 0), (4, 0, 0)])
@pytest.mark.parametrize("class_prompts", [(3, None, 0), (3, 4, 2), (2, 1, 0), (0, 0, 0)])
def test_prompt_layouts(prompts, class_prompts):
    fields = ("num_prompts", "prompt_depth", "prompt_step")
    fields += ("num_class_prompts", "class_prompt_depth", "class_prompt_step")
    model = make_model(**dict(zip(fields, prompts + class_prompts, strict=True)))
    assert_same_step(model, K2, images_per_class=2)


@pytest.mark.parametrize("bitfit", [True, False])
@pytest.mark.parametrize("update", ["gru_relu", "gru", "mean", "none"])
@pytest.mark.parametrize("normalization", ["per_step", "per_batch"])
@pytest.mark.parametrize("labels, k", [(K1, 1), (K2, 2)])
def test_proxy_updates(update, normalization, labels, k, bitfit):
    model = make_model(proxy_update=update, proxy_normalization=normalization, bitfit=bitfit)
    assert_same_step(model, labels, images_per_class=k)


@pytest.mark.parametrize("bias_ratio", [0.0, 0.3])
@pytest.mark.parametrize("proxy_range", ["all", "batch"])
@pytest.mark.parametrize("reduction", ["all_classes", "batch_positives"])
@pytest.mark.parametrize("loss", ["proxy_anchor", "proxy_nca"])
def test_losses(loss, reduction, proxy_range, bias_ratio):
    model = make_model(
        loss=loss, proxy_anchor_reduction=reduction, proxy_range=proxy_range, proxy_bias_ratio=bias_ratio
    )
    assert_same_step(model, K2, images_per_class=2)


@pytest.mark.parametrize("proxy_head", ["own", "shared"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
def test_pooling_and_heads(pooling, proxy_head):
    assert_same_step(make_model(pooling=pooling, proxy_head=proxy_head), K2, images_per_class=2)


@pytest.mark.parametrize("update", ["gru_relu", "mean"])
@pytest.mark.parametrize("normalization", ["per_step", "per_batch"])
def test_batches_in_any_order_with_classes_of_any_size(update, normalization):
    model = make_model(proxy_update=update, proxy_normalization=normalization)
    assert_same_step(model, torch.tensor([3, 0, 3, 5, 0, 3, 1]))


@pytest.mark.parametrize("normalization", ["per_step", "per_batch"])
def test_float32(normalization):
    assert_same_step(make_model(torch.float32, proxy_normalization=normalization), K2, images_per_class=2)


def test_eager_attention():
    model = make_model()
    model.vptsp.backbone.set_attn_implementation("eager")
    assert model.vptsp.backbone.layers[0].attention.config._attn_implementation == "eager"
    # transformers takes this softmax in float32, whatever the model's dtype
    assert_same_step(model, K2, images_per_class=2, rounding=torch.finfo(torch.float32).eps)


def test_gradient_checkpointing():
    model = make_model()
    model.gradient_checkpointing_enable()
    calls = []
    for layer in model.vptsp.backbone.layers:
        recompute = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *args, f=recompute: calls.append(1) or f(*args)
    assert_same_step(model, K2, images_per_class=2)
    assert len(calls) == 2 * len(model.vptsp.backbone.layers)


def test_known_grouping_is_the_counted_one():
    model = make_model()
    pixel_values = torch.randn(len(K2), 3, 16, 16, dtype=torch.float64)
    known, counted = model(pixel_values, K2, images_per_class=2), model(pixel_values, K2)
    order = known.proxy_classes.argsort()
    torch.testing.assert_close(known.proxy_classes[order], counted.proxy_classes)
    torch.testing.assert_close(known.proxy_rows[order], counted.proxy_rows)
    torch.testing.assert_close(known.loss, counted.loss)


def test_per_step_and_per_batch_agree_for_one_image_per_class_only():
    rows = {}
    for normalization in ("per_step", "per_batch"):
        for labels, k in ((K1, 1), (K2, 2)):
            torch.manual_seed(3)
            model = make_model(proxy_normalization=normalization)
            pixel_values = torch.randn(len(labels), 3, 16, 16, dtype=torch.float64)
            rows[normalization, k] = model(pixel_values, labels, images_per_class=k).proxy_rows
    torch.testing.assert_close(rows["per_step", 1], rows["per_batch", 1])
    assert (rows["per_step", 2] - rows["per_batch", 2]).abs().max() > 1e-4
