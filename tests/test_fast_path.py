"""What the fast path keeps or computes another way must never show in the results."""

import copy
import json
import time

import accelerate
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vptsp import VPTSPForMetricLearning, VPTSPModel, backbones_vptsp
from vptsp.backbones_vptsp import LinearProducts, fast_linear


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


@pytest.mark.parametrize("faster", ["torch", "onednn"])
def test_the_faster_library_is_chosen_for_each_kind_of_product(monkeypatch, faster):
    """Products that note who was asked, one of them slow, against `nn.Linear` in float64."""
    products = LinearProducts("measured")
    if "onednn" not in products.available:
        pytest.skip("PyTorch without oneDNN")
    monkeypatch.setattr(backbones_vptsp, "linear_products", products)
    asked = []

    def noted(library, product):
        def multiply(kind, a, b, bias):
            asked.append(library)
            if library != faster:
                end = time.thread_time() + 0.01
                while time.thread_time() < end:
                    pass
            return product(kind, a, b, bias)

        return multiply

    monkeypatch.setattr(products, "_by_torch", noted("torch", products._by_torch))
    monkeypatch.setattr(products, "_by_onednn", noted("onednn", products._by_onednn))
    layer, x = nn.Linear(160, 240), torch.randn(3, 70, 160, requires_grad=True)
    fast_linear(layer, x).square().sum().backward()
    kinds = {(kind, inputs, outputs) for kind, _, inputs, outputs, _ in products.choices}
    assert kinds == {("output", 160, 240), ("input", 160, 240), ("weight", 160, 240)}
    assert set(products.choices.values()) == {faster}
    asked.clear()
    layer.zero_grad()
    x.grad = None
    output = fast_linear(layer, x)
    output.square().sum().backward()
    assert asked == [faster] * 3  # nothing is timed again
    exact, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    exact.zero_grad()
    expected = exact(x64)
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, x64.grad.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, exact.weight.grad.float(), rtol=1e-4, atol=1e-4)


def test_small_products_are_not_timed(monkeypatch):
    products = LinearProducts("measured")
    monkeypatch.setattr(backbones_vptsp, "linear_products", products)
    fast_linear(nn.Linear(24, 40), torch.randn(9, 24, requires_grad=True)).sum().backward()
    assert not products.choices


def test_choices_are_kept_for_the_same_machine(monkeypatch):
    products, other = LinearProducts("measured"), LinearProducts("measured")
    products.choices = {("input", 64, 384, 1536, 1): "onednn", ("output", 64, 384, 1536, 2): "torch"}
    saved = json.loads(json.dumps(products.saved()))
    other.restore(saved)
    assert other.choices == products.choices
    elsewhere = LinearProducts("measured")
    elsewhere.restore(saved | {"machine": "another processor"})
    assert not elsewhere.choices


def test_a_library_can_be_forced_and_others_are_refused(monkeypatch):
    products = LinearProducts("torch")
    assert products.library == "torch"
    with pytest.raises(ValueError, match=r"VPTSP_LINEAR must be one of measured, torch.* got 'mkl'"):
        products.library = "mkl"
    with pytest.raises(ValueError, match="got 'mkl'"):
        LinearProducts("mkl")


@pytest.mark.parametrize("operator", [None, "other result", "other arguments"])
def test_without_the_private_operator_everything_is_pytorchs_own(monkeypatch, operator):
    def other_arguments(x, weight):
        raise AssertionError("never reached")

    found = {None: None, "other result": lambda *arguments: torch.zeros(2, 4), "other arguments": other_arguments}
    monkeypatch.setattr(backbones_vptsp, "_onednn_operator", lambda: found[operator])
    products = LinearProducts("measured")
    assert products.available == ("torch",) and products.library == "torch"
    with pytest.raises(ValueError, match="measured, torch with this PyTorch, got 'onednn'"):
        products.library = "onednn"


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


# ---- Attention


def attention_gradients(attend, tensors, gradient):
    """Output of `attend` and its gradients."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    output = attend(*tensors)
    return [output.detach(), *torch.autograd.grad(output, tensors, gradient)]


@pytest.mark.parametrize("block_weights", [1, 200, 10**9], ids=["one image", "some", "all"])
@pytest.mark.parametrize("num_queries", [7, 1])
def test_blockwise_attention_in_bfloat16(monkeypatch, block_weights, num_queries):
    monkeypatch.setattr(backbones_vptsp, "_BLOCK_WEIGHTS", block_weights)
    torch.manual_seed(0)
    tensors = [torch.randn(5, 3, n, 8).transpose(1, 2).bfloat16().transpose(1, 2) for n in (num_queries, 9, 9)]
    gradient = torch.randn(5, 3, num_queries, 8).bfloat16()

    def fused(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, scale=0.3)

    def blockwise(query, key, value):
        return backbones_vptsp._BlockwiseAttention.apply(query, key, value, 0.3)

    expected = attention_gradients(fused, [tensor.double() for tensor in tensors], gradient.double())
    actual = attention_gradients(blockwise, tensors, gradient)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as embedding does, and under what training sets
        assert torch.equal(actual[0], blockwise(*tensors))
    for got, exact in zip(actual, expected, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - exact).norm() < 1e-2 * exact.norm()


def test_blockwise_attention_stands_for_the_fused_one_alone(monkeypatch):
    monkeypatch.setattr(backbones_vptsp, "_MULTIPLIES_BFLOAT16", True)
    half = torch.randn(2, 3, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    goes = backbones_vptsp._goes_blockwise
    assert goes("sdpa", 0.0, half, half, half)
    assert not goes("eager", 0.0, half, half, half)
    assert not goes("sdpa", 0.1, half, half, half)
    assert not goes("sdpa", 0.0, half.float(), half.float(), half.float())
    assert goes("sdpa", 0.0, *[half.detach()] * 3)
    monkeypatch.setattr(backbones_vptsp, "_MULTIPLIES_BFLOAT16", False)
    assert not goes("sdpa", 0.0, half, half, half)


def test_training_in_bfloat16_takes_blockwise_attention(monkeypatch, backbone_folder):
    calls = []
    blockwise = backbones_vptsp._BlockwiseAttention.apply
    monkeypatch.setattr(backbones_vptsp, "_MULTIPLIES_BFLOAT16", True)
    monkeypatch.setattr(
        backbones_vptsp._BlockwiseAttention, "apply", lambda *args: calls.append(args) or blockwise(*args)
    )
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=2, embedding_dim=10, num_prompts=5)
    gradients = {}
    for way in ("blockwise", "fused", "exact"):
        monkeypatch.setattr(backbones_vptsp, "_MULTIPLIES_BFLOAT16", way == "blockwise")
        own = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=way != "exact"):
            own(PIXELS[:2], labels=torch.tensor([0, 1])).loss.backward()
        gradients[way] = torch.cat([p.grad.flatten() for p in own.parameters() if p.grad is not None])
        assert bool(calls)
    assert len(calls) == 2 * model.config.backbone_config.num_hidden_layers  # two passes, and in one way alone
    error = {way: (gradients[way] - gradients["exact"]).norm() for way in gradients}
    assert error["blockwise"] < 1.5 * error["fused"]


@pytest.fixture
def retriever(backbone_folder):
    return VPTSPModel.from_backbone(backbone_folder, embedding_dim=10, num_prompts=5, prompt_step=2).eval()


PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def embed(retriever, pixels=PIXELS):
    with torch.no_grad():
        return retriever(pixels).embeddings


# ---- Layers that something waits for: hooks, offloading, quantisation


def plain_embedding(retriever, pixels=PIXELS):
    """By calling whole layers on prompts and tokens, as transformers would."""
    hidden = retriever.backbone.embeddings(pixels)
    for layer, prompts in zip(retriever.backbone.layers, retriever.prompts(), strict=True):
        hidden = layer(torch.cat([prompts.expand(len(hidden), -1, -1), hidden], 1))[:, len(prompts) :]
    return retriever.head(retriever.backbone.layernorm(hidden)[:, 0])


PARTS = ["", ".attention", ".mlp", ".attention.q_proj", ".attention.k_proj", ".attention.o_proj", ".mlp.fc1"]
KINDS = ["forward", "pre", "backward", "own forward"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS)
def test_hooks_of_a_layer_run_and_change_what_they_change(retriever, part, kind):
    module, calls = retriever.backbone.get_submodule(f"layers.1{part}"), []

    def doubled(output):
        return tuple(2 * o if torch.is_tensor(o) else o for o in output) if isinstance(output, tuple) else 2 * output

    if kind == "forward":
        module.register_forward_hook(lambda m, inputs, output: calls.append(1) or doubled(output))
    elif kind == "pre":
        module.register_forward_pre_hook(lambda m, inputs: calls.append(1) or doubled(inputs))
    elif kind == "backward":
        module.register_full_backward_hook(lambda m, to_inputs, to_outputs: calls.append(1) and None)
    else:
        forward = module.forward
        module.forward = lambda *args, **kwargs: calls.append(1) or doubled(forward(*args, **kwargs))
    pixels = PIXELS.clone().requires_grad_()
    embeddings = retriever(pixels).embeddings
    embeddings.sum().backward()
    assert calls
    torch.testing.assert_close(embeddings, plain_embedding(retriever), rtol=1e-5, atol=1e-6)
    single = embed(retriever, PIXELS[:1])
    torch.testing.assert_close(single, plain_embedding(retriever, PIXELS[:1]), rtol=1e-5, atol=1e-6)


def test_global_hooks_run(retriever):
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    embed(retriever)
    handle.remove()
    linear = {m for m in retriever.backbone.layers.modules() if isinstance(m, nn.Linear)}
    assert linear <= seen


@pytest.mark.parametrize("place", ["", "layers"])
def test_hooks_that_could_never_run_are_refused(retriever, place):
    retriever.backbone.get_submodule(place).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"hooks on (ViTModel|ModuleList) never run"):
        embed(retriever)


def test_hooks_on_an_adapted_layer_are_refused(backbone_folder):
    retriever = VPTSPModel.from_backbone(backbone_folder, embedding_dim=10, adapter_layers=1).eval()
    retriever.backbone.layers[-1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="don't go with an adapter"):
        embed(retriever)


def test_keys_and_values_computed_before_a_hook_came_are_refused(retriever):
    kept = retriever.project_prompts()
    retriever.backbone.layers[1].register_forward_hook(lambda *_: None)
    with torch.no_grad(), pytest.raises(ValueError, match="compute them again"):
        retriever(PIXELS, prompt_key_values=kept)
    torch.testing.assert_close(
        retriever(PIXELS, prompt_key_values=retriever.project_prompts()).embeddings, embed(retriever)
    )


def test_hooks_in_the_semantic_pass(backbone_folder):
    """Class prompts go through layers that are called as a whole too, gradients included."""
    model = VPTSPForMetricLearning.from_backbone(
        backbone_folder, num_classes=3, embedding_dim=10, num_prompts=2, num_class_prompts=2
    ).eval()
    labels = torch.tensor([0, 0, 2])

    def gradients():
        model.zero_grad()
        output = model(PIXELS, labels)
        output.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return grads | {"rows": output.proxy_rows.detach()}

    expected = gradients()
    for layer in (0, 2):
        model.vptsp.backbone.layers[layer].register_forward_hook(lambda *_: None)
    actual = gradients()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)


def offloaded(retriever, how, folder):
    if how == "cpu_offload":
        return accelerate.cpu_offload(retriever, execution_device="cpu")
    if how == "disk_offload":
        return accelerate.disk_offload(retriever, folder, execution_device="cpu")
    device_map = {"backbone.layers": "disk", "backbone.embeddings": "cpu", "backbone.layernorm": "disk", "head": "cpu"}
    device_map |= {"prompts": "disk", "embedding_dropout": "cpu", "adapters": "cpu"}
    return accelerate.dispatch_model(retriever, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map"])
def test_offloaded_weights(retriever, tmp_path, how):
    expected = embed(retriever)
    alone = retriever.embed_with_backbone(PIXELS).detach()
    retriever = offloaded(retriever, how, tmp_path)
    assert any(p.device.type == "meta" for p in retriever.parameters())
    for _ in range(2):
        torch.testing.assert_close(embed(retriever), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(embed(retriever, PIXELS[:1]), expected[:1], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(retriever.embed_with_backbone(PIXELS), alone, rtol=1e-5, atol=1e-6)


class Halved(torch.Tensor):
    """A tensor subclass whose memory is not what it stands for, as those of quantised weights are."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not F.linear:
            return super().__torch_function__(function, types, args, kwargs or {})
        return function(*[arg.as_subclass(torch.Tensor) / 2 if isinstance(arg, Halved) else arg for arg in args])


def test_weights_of_other_types_go_through_their_own_products():
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    expected = F.linear(x, layer.weight / 2, layer.bias)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Halved), requires_grad=False)
    torch.testing.assert_close(fast_linear(layer, x), expected)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_reparametrised_weights_are_recomputed(retriever, norm):
    norm(retriever.backbone.layers[0].mlp.fc1)
    norm(retriever.backbone.layers[1].attention.k_proj)
    for module in (retriever.backbone.layers[0].mlp.fc1, retriever.backbone.layers[1].attention.k_proj):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "bias" not in name:
                    parameter.mul_(1.7)
    torch.testing.assert_close(embed(retriever), plain_embedding(retriever), rtol=1e-5, atol=1e-6)


# ---- Keys and values of the shared prompts


@pytest.mark.parametrize("num_images", [1, 3])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_keys_and_values_computed_before_give_the_same(backbone_folder, pooling, num_images):
    retriever = VPTSPModel.from_backbone(
        backbone_folder, embedding_dim=10, num_prompts=5, prompt_step=2, pooling=pooling
    ).eval()
    pixels = PIXELS[:num_images]
    with torch.no_grad():
        kept = retriever.project_prompts()
        with_kept = retriever(pixels, prompt_key_values=kept).embeddings
    torch.testing.assert_close(with_kept, embed(retriever, pixels), rtol=1e-6, atol=1e-6)


def test_keys_and_values_of_another_precision_are_refused(retriever):
    kept = retriever.project_prompts()
    with pytest.raises(ValueError, match=r"prompts are torch.float32, those of images torch.float64"):
        retriever.double()(PIXELS.double(), prompt_key_values=kept)


def fused_step(optimizer_class):
    def change(retriever):
        optimizer = optimizer_class([retriever.prompts.tokens], lr=0.5, fused=True)
        retriever.prompts.tokens.grad = torch.randn_like(retriever.prompts.tokens)
        optimizer.step()

    return change


def copy_into_data(retriever):
    retriever.prompts.tokens.data.copy_(torch.randn_like(retriever.prompts.tokens))


def write_through_numpy(retriever):
    retriever.prompts.tokens.detach().numpy()[:] = 0.7


def hook_a_projection(retriever):
    retriever.backbone.layers[1].attention.v_proj.register_forward_hook(lambda m, inputs, output: output * 3)


CHANGES = {
    "fused AdamW": fused_step(torch.optim.AdamW),
    "fused SGD": fused_step(torch.optim.SGD),
    "data.copy_": copy_into_data,
    "numpy": write_through_numpy,
    "hook": hook_a_projection,
    "in place": lambda r: r.prompts.tokens.copy_(torch.randn_like(r.prompts.tokens)),
    "bias": lambda r: r.backbone.layers[1].attention.v_proj.bias.add_(0.5),
    "norm": lambda r: r.backbone.layers[0].layernorm_before.weight.mul_(1.5),
    "load_state_dict": lambda r: r.load_state_dict({name: t + 0.01 for name, t in r.state_dict().items()}),
    "assign": lambda r: r.load_state_dict({name: t + 0.01 for name, t in r.state_dict().items()}, assign=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_weights_is_seen(retriever, change):
    before = embed(retriever)
    with torch.no_grad():
        CHANGES[change](retriever)
    after = embed(retriever)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, plain_embedding(retriever).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embed(retriever, PIXELS[:1]), after[:1], rtol=1e-5, atol=1e-5)


def test_peft_adapters_that_are_switched_off_and_on(backbone_folder):
    peft = pytest.importorskip("peft")
    retriever = VPTSPModel.from_backbone(backbone_folder, embedding_dim=10, num_prompts=5).eval()
    config = peft.LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(retriever, config)
    with_lora = embed(wrapped)
    with wrapped.disable_adapter():
        without = embed(wrapped)
    assert (with_lora - without).abs().max() > 1e-4
    torch.testing.assert_close(embed(wrapped), with_lora, rtol=1e-6, atol=1e-6)


def test_changes_of_dtype_are_seen(retriever):
    expected = embed(retriever)
    torch.testing.assert_close(embed(retriever.double(), PIXELS.double()).float(), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = embed(retriever.float())
    assert (half - expected).abs().max() > 1e-4
    torch.testing.assert_close(embed(retriever), expected, rtol=1e-6, atol=1e-6)
    embed(retriever.to(torch.bfloat16))
    rounded = retriever.float()
    torch.testing.assert_close(embed(rounded), plain_embedding(rounded).detach(), rtol=1e-5, atol=1e-5)


def test_training_after_evaluation_uses_the_tokens(retriever):
    embed(retriever)
    retriever.train()(PIXELS).embeddings.sum().backward()
    assert retriever.prompts.tokens.grad.norm() > 0


# ---- What can't be had


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_intermediate_outputs_are_refused(backbone_folder, name):
    retriever = VPTSPModel.from_backbone(backbone_folder, embedding_dim=10).eval()
    with pytest.raises(ValueError, match=f"{name} must be false"):
        retriever(PIXELS, **{name: True})
    embed(retriever)
    retriever(PIXELS, **{name: False})
    retriever.set_attn_implementation("eager")
    setattr(retriever.config, name, True)
    with pytest.raises(ValueError, match=f"{name} must be false"):
        retriever(PIXELS)
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, embedding_dim=10, num_classes=2)
    model.set_attn_implementation("eager")
    setattr(model.config, name, True)
    with pytest.raises(ValueError, match=f"{name} must be false"):
        model(PIXELS)


@pytest.mark.parametrize(
    "keywords", [{"interpolate_pos_encodings": True}, {"bool_masked_pos": None}, {"head_mask": 1}]
)
def test_unknown_keywords_are_refused(retriever, keywords):
    with pytest.raises(TypeError, match=next(iter(keywords))):
        retriever(PIXELS, **keywords)


def test_the_configuration_s_return_dict(retriever):
    retriever.config.return_dict = False
    assert isinstance(retriever(PIXELS), tuple)
    assert not isinstance(retriever(PIXELS, return_dict=True), tuple)
