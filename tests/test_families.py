"""Every family of backbones against transformers' own forward: one line in the table makes a family tested."""

import copy
import json

import accelerate
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_vit_config
from remote_code import remote_model
from safetensors.torch import save_file
from test_modeling_exact import assert_same_step, make_model
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    IJepaConfig,
    MLCDVisionConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    ViTMSNConfig,
)

from vptsp import VPTSPConfig, VPTSPForMetricLearning, VPTSPModel, backbones_vptsp
from vptsp.training.half_precision import frozen_weights_in


BASE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 8}
SIZED = {**BASE, "image_size": 16}
MLP = {**SIZED, "intermediate_size": 40}
DINOV2 = {**SIZED, "mlp_ratio": 2, "layerscale_value": 0.7}
DINOV3 = {**MLP, "hidden_size": 48, "layerscale_value": 0.7, "num_register_tokens": 2}

# Name -> configuration, poolings (the default first).
FAMILIES = {
    "vit": (tiny_vit_config(num_hidden_layers=2), "cls mean cls+mean"),
    "deit": (DeiTConfig(**MLP), "cls mean cls+mean"),
    "vit_msn": (ViTMSNConfig(**MLP), "cls mean cls+mean"),
    "ijepa": (IJepaConfig(**MLP), "mean"),
    "dinov2": (Dinov2Config(**DINOV2), "cls mean cls+mean"),
    "dinov2 swiglu": (Dinov2Config(**DINOV2, use_swiglu_ffn=True), "cls mean cls+mean"),
    "dinov2_with_registers": (Dinov2WithRegistersConfig(**DINOV2, num_register_tokens=3), "cls mean cls+mean"),
    "dinov3_vit": (DINOv3ViTConfig(**DINOV3), "cls mean cls+mean"),
    "dinov3_vit gated": (DINOv3ViTConfig(**DINOV3, use_gated_mlp=True, hidden_act="silu"), "cls mean cls+mean"),
    "clip_vision_model": (CLIPVisionConfig(**MLP), "cls mean cls+mean"),
    "mlcd_vision_model": (MLCDVisionConfig(**MLP), "cls mean cls+mean"),
    "siglip_vision_model": (SiglipVisionConfig(**MLP), "head mean"),
    "siglip without head": (SiglipVisionConfig(**MLP, vision_use_head=False), "mean"),
    "siglip2_vision_model": (Siglip2VisionConfig(**BASE, intermediate_size=40, num_patches=4), "head mean"),
}
LABELS = torch.tensor([4, 4, 0, 6, 6])

every_family = pytest.mark.parametrize("name", FAMILIES)
KINDS = [name for name in FAMILIES if name in backbones_vptsp.FAMILIES]
every_kind = pytest.mark.parametrize("name", KINDS)


def backbone_config(name):
    return copy.deepcopy(FAMILIES[name][0])


@torch.no_grad()
def perturb(model):
    """Nothing stays at a value that hides a mistake: zeros, ones, or weights so small that tokens are alike."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def training_model(name, dtype=torch.float64, **fields):
    return perturb(make_model(dtype, backbone_config=backbone_config(name), loss_alpha=2.0, **fields)).train()


def retriever(name, **fields):
    values = {"embedding_dim": 10, "num_prompts": 5, "prompt_step": 2, **fields}
    return perturb(VPTSPModel(VPTSPConfig(backbone_config=backbone_config(name), **values))).eval()


def prompted(model, pixel_values):
    """Embeddings by the model's own forward, with prompts among the tokens of every layer."""
    with oracle.plain_prompts(model, model.prompts.tokens):
        output = model.backbone(**oracle.stock_inputs(model.backbone, pixel_values))
    return model.head(oracle.stock_pooled(model.backbone, output, model.config.pooling))


def stock_of_any_size(backbone, pixel_values):
    """Output of the model's own forward, whatever the size of the images."""
    asked = backbone.config.model_type in (
        "vit",
        "deit",
        "vit_msn",
        "ijepa",
        "clip_vision_model",
        "siglip_vision_model",
    )
    options = {"interpolate_pos_encoding": True} if asked else {}  # the others take any size
    return backbone(**oracle.stock_inputs(backbone, pixel_values), **options)


def saved_stock(name, folder):
    """A model of transformers, saved in a folder; without BERT's pooler, which retrieval leaves out."""
    stock = perturb(AutoModel.from_config(backbone_config(name))).eval()
    stock.save_pretrained(folder)
    if name in ("vit", "deit"):
        stock.pooler = None
    return stock


def images(number=3, height=16, width=None, dtype=torch.float32):
    return torch.randn(number, 3, height, width or height, dtype=dtype)


# ---- Without prompts


@every_family
def test_frozen_features_are_those_of_transformers(name):
    poolings = FAMILIES[name][1].split()
    assert VPTSPConfig(backbone_config=backbone_config(name)).pooling == poolings[0]
    rounded = name == "mlcd_vision_model"  # transformers rotates in float32 whatever the model is in
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-6 if rounded else 1e-10)):
        model = retriever(name, num_prompts=0).to(dtype)
        pixel_values = images(dtype=dtype)
        output = model.backbone(**oracle.stock_inputs(model.backbone, pixel_values))
        for pooling in poolings:
            model.config.pooling = pooling
            expected = oracle.stock_pooled(model.backbone, output, pooling)
            got = model.encode(model.embed_patches(pixel_values))
            torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
            expected = F.normalize(expected.mean(1) if expected.dim() == 3 else expected, dim=-1)
            torch.testing.assert_close(model.embed_with_backbone(pixel_values), expected, rtol=0, atol=tolerance)


@every_kind
@pytest.mark.parametrize("size", [(24, 24), (16, 24), (32, 16), (8, 32)])
def test_images_of_other_sizes(name, size):
    model = retriever(name, num_prompts=0)
    pixel_values = images(2, *size)
    expected = stock_of_any_size(model.backbone, pixel_values)
    expected = oracle.stock_pooled(model.backbone, expected, model.config.pooling)
    got = model.encode(model.embed_patches(pixel_values, interpolate_pos_encoding=True))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=rf"\({size[0]}\*{size[1]}\) doesn't match model \(16\*16\)"):
        model(pixel_values)
    with pytest.raises(ValueError, match=r"multiples of the patch size 8, got \(16, 20\)"):
        model(images(1, 16, 20), interpolate_pos_encoding=True)


@every_kind
def test_a_frozen_backbone_computes_as_in_evaluation_from_the_start(name):
    model, pixel_values = VPTSPModel(VPTSPConfig(backbone_config=backbone_config(name), embedding_dim=10)), images()
    with torch.inference_mode():  # which leaves nothing behind that gradients can't pass
        first = model(pixel_values).embeddings
    model(pixel_values).embeddings[0].sum().backward()
    for state in (model.train(), model.eval()):
        torch.testing.assert_close(state(pixel_values).embeddings, first)


# ---- Prompted, with gradients, both passes


@every_family
def test_step_of_prompts_biases_and_adapters(name):
    model = training_model(name, num_class_prompts=2, adapter_layers=1, adapter_dim=4)
    assert_same_step(model, LABELS)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@every_family
def test_step_with_lora_and_mean(name):
    pytest.importorskip("peft")
    model = training_model(name, pooling="mean", lora_rank=2, bitfit=False, prompt_depth=1)
    lora = {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n}
    assert len(lora) == 2 * 2 * 2  # A and B beside queries and values of both layers
    assert_same_step(model, LABELS)
    assert all(model.get_parameter(n).grad.norm() > 0 for n in lora)


LAYERS_HAVE = {  # with LoRA: linear layers of each family's layers
    **dict.fromkeys(FAMILIES, "q_proj k_proj v_proj o_proj fc1 fc2"),
    **dict.fromkeys(
        (name for name in FAMILIES if "lip" in name or "mlcd" in name), "q_proj k_proj v_proj out_proj fc1 fc2"
    ),
    "dinov2 swiglu": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "dinov3_vit": "q_proj k_proj v_proj o_proj up_proj down_proj",
    "dinov3_vit gated": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
}


@every_family
@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_beside_every_linear_layer(name, use_dora, tmp_path):
    pytest.importorskip("peft")
    targets = LAYERS_HAVE[name].split()
    with pytest.raises(ValueError, match=rf"\({', '.join(sorted(targets))}\), got 'dense'"):
        retriever(name, lora_rank=2, lora_targets=["dense"])
    model = training_model(name, lora_rank=2, lora_targets=targets, use_dora=use_dora, bitfit=False)
    lora = {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n}
    assert len(lora) == 2 * len(targets) * (3 if use_dora else 2)
    assert_same_step(model, LABELS)
    assert all(model.get_parameter(n).grad.norm() > 0 for n in lora)
    model, pixel_values = retriever(name, lora_rank=2, lora_targets=targets, use_dora=use_dora), images()
    model.save_pretrained(tmp_path)
    loaded = VPTSPModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixel_values).embeddings, model(pixel_values).embeddings)


def test_lora_lies_in_the_layers_alone():
    """PyTorch's attention in SigLIP's head reads the weights of its `out_proj` without calling it."""
    pytest.importorskip("peft")
    model = retriever("siglip_vision_model", lora_rank=2, lora_targets=["out_proj", "fc1"])
    lora = {n for n in model.tuned_names() if ".lora_" in n}
    assert len(lora) == 2 * 2 * 2
    assert all(n.startswith("backbone.encoder.layers.") for n in lora)
    model(images()).embeddings[0].sum().backward()
    assert all(model.get_parameter(n).grad is not None for n in lora)
    with pytest.raises(ValueError, match=r"the backbone \(fc1, fc2, k_proj, .*\), got 'head.attention.out_proj'"):
        retriever("siglip_vision_model", lora_rank=2, lora_targets=["head.attention.out_proj"])


@every_kind
def test_step_of_the_whole_backbone_with_shallow_prompts(name):
    model = training_model(name, tune_backbone=True, bitfit=False, prompt_mode="shallow", proxy_update="none")
    model.vptsp.backbone.eval()  # where DINOv3 does not draw its positions anew
    assert_same_step(model, LABELS)
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, "a tuned parameter without a gradient stops DistributedDataParallel"


@every_kind
def test_what_bitfit_tunes(name):
    for pooling in FAMILIES[name][1].split():
        model = retriever(name, pooling=pooling)
        tuned = {n for n in model.tuned_names() if n.startswith("backbone.")}
        biases = {n for n, _ in model.named_parameters() if n.startswith("backbone.") and n.endswith("bias")}
        unused = set() if pooling == "head" else {n for n in biases if n.startswith("backbone.head.")}
        assert tuned == biases - unused
        model(images()).embeddings[0].sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ---- The same by other ways


@every_kind
@pytest.mark.parametrize("number", [1, 3])
def test_kept_keys_and_values_and_a_batch_of_one(name, number):
    for pooling in FAMILIES[name][1].split()[:2]:
        model, pixel_values = retriever(name, pooling=pooling), images(number)
        expected = prompted(model, pixel_values)
        torch.testing.assert_close(model(pixel_values).embeddings, expected, rtol=0, atol=1e-5)
        kept = model(pixel_values, prompt_key_values=model.project_prompts()).embeddings
        torch.testing.assert_close(kept, expected, rtol=0, atol=1e-5)


@every_kind
def test_hooks(name):
    for part in ("", "attention", "mlp"):
        for mode in ("deep", "shallow"):
            model = retriever(name, prompt_mode=mode, prompt_step=0)
            layer = oracle.layers_of(model.backbone)[1]
            own = {"": layer, "attention": getattr(layer, "attention", None) or layer.self_attn, "mlp": layer.mlp}
            calls = []
            own[part].register_forward_hook(lambda *_, calls=calls: calls.append(1))
            pixel_values = images()
            got = model(pixel_values).embeddings
            assert calls, part
            torch.testing.assert_close(got, prompted(model, pixel_values), rtol=0, atol=1e-5)
            torch.testing.assert_close(model(pixel_values[:1]).embeddings, got[:1], rtol=0, atol=1e-5)
    for module in model.family.never_called(model.backbone):
        handle = module.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="never run"):
            model(pixel_values)
        handle.remove()


@every_kind
@torch.no_grad()
def test_offloaded_weights_are_right_or_refused(name):
    model, pixel_values = retriever(name), images()
    expected = model(pixel_values).embeddings
    accelerate.cpu_offload(model, execution_device="cpu")
    if name == "mlcd_vision_model" or model.config.pooling == "head":
        with pytest.raises(ValueError, match="can't be offloaded"):
            model(pixel_values)
    else:
        torch.testing.assert_close(model(pixel_values).embeddings, expected)


@torch.no_grad()
def test_a_pooling_head_that_stays_while_the_layers_are_offloaded(tmp_path):
    model, pixel_values = retriever("siglip_vision_model"), images()
    expected = model(pixel_values).embeddings
    places = dict.fromkeys((f"backbone.{part}" for part in ("embeddings", "post_layernorm", "head")), "cpu")
    places |= {"backbone.encoder": "disk", "prompts": "disk", "head": "cpu", "embedding_dropout": "cpu"}
    places["adapters"] = "cpu"
    model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    torch.testing.assert_close(model(pixel_values).embeddings, expected)


@every_family
def test_linear_layers_are_multiplied_fast(name, monkeypatch):
    """All of the layers' linear layers, the MLP's among them, and no module in between."""
    model, seen = retriever(name, pooling="mean"), set()
    whole = backbones_vptsp.fast_linear
    monkeypatch.setattr(backbones_vptsp, "fast_linear", lambda layer, x: seen.add(layer) or whole(layer, x))
    model(images())
    layers = oracle.layers_of(model.backbone)
    assert {module for module in layers.modules() if isinstance(module, torch.nn.Linear)} <= seen


@every_kind
def test_half_precision(name):
    model, pixel_values = retriever(name), images()
    expected = model(pixel_values).embeddings
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(pixel_values).embeddings
        with frozen_weights_in(torch.bfloat16, model):
            assert torch.equal(model(pixel_values).embeddings, mixed)
    half = model.to(torch.bfloat16)(pixel_values.bfloat16()).embeddings
    for got in (mixed, half):
        assert got.dtype == torch.float32
        assert F.cosine_similarity(got, expected).min() > 0.98


@every_family
def test_gradient_checkpointing(name):
    model, pixel_values = training_model(name, num_class_prompts=1), images(5, dtype=torch.float64)

    def gradients(model):
        model(pixel_values, LABELS).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(copy.deepcopy(model))
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in oracle.layers_of(model.vptsp.backbone))
    torch.testing.assert_close(gradients(model), expected)


@every_kind
def test_compiles_to_one_graph(name):
    config = backbone_config(name)
    config.num_hidden_layers = 1
    model = perturb(VPTSPModel(VPTSPConfig(backbone_config=config, embedding_dim=10, num_prompts=2)))
    pixel_values = images()
    expected = model(pixel_values).embeddings
    expected[0].sum().backward()
    gradient = model.prompts.tokens.grad.clone()
    model.zero_grad()
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(pixel_values).embeddings
    got[0].sum().backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(model.prompts.tokens.grad, gradient)


# ---- Configuration, saving


@every_kind
def test_saved_with_its_backbone_and_loaded(name, tmp_path):
    for pooling in FAMILIES[name][1].split()[:2]:
        model, pixel_values = retriever(name, pooling=pooling), images()
        model.save_pretrained(tmp_path / pooling)
        loaded = VPTSPModel.from_pretrained(tmp_path / pooling)
        assert torch.equal(loaded(pixel_values).embeddings, model(pixel_values).embeddings)
        assert loaded.config.pooling == pooling
        assert loaded.config.backbone_config.image_size == 16
    trained = VPTSPForMetricLearning.from_pretrained(tmp_path / pooling, num_classes=3)
    torch.testing.assert_close(trained.eval()(pixel_values).embeddings, model(pixel_values).embeddings)
    remote = remote_model(tmp_path / pooling)
    torch.testing.assert_close(remote(pixel_values).embeddings, model(pixel_values).embeddings)


@every_kind
@pytest.mark.parametrize("side", [8, 24, 40])
def test_loaded_for_images_of_another_size(name, side, tmp_path, caplog):
    stock = saved_stock(name, tmp_path / "stock")
    with caplog.at_level("WARNING", logger="vptsp"):
        built = VPTSPModel.from_backbone(tmp_path / "stock", embedding_dim=10, num_prompts=2, image_size=side)
    pixel_values = images(2, side)
    expected = oracle.stock_pooled(stock, stock_of_any_size(stock, pixel_values), built.config.pooling)
    expected = F.normalize(expected.mean(1) if expected.dim() == 3 else expected, dim=-1)
    torch.testing.assert_close(built.embed_with_backbone(pixel_values), expected, rtol=0, atol=1e-5)
    how = "computed" if name in ("dinov3_vit", "mlcd_vision_model") else "interpolated"
    assert f"images of 16 pixels and is used with {side}: its positions are {how}" in caplog.text
    assert built.config.backbone_config.image_size == side
    built.save_pretrained(tmp_path / "retriever")
    loaded = VPTSPModel.from_pretrained(tmp_path / "retriever")
    assert torch.equal(loaded(pixel_values).embeddings, built(pixel_values).embeddings)
    with pytest.raises(ValueError, match=rf"\(16\*16\) doesn't match model \({side}\*{side}\)"):
        loaded(images())
    with pytest.raises(ValueError, match="image_size must be a multiple of the backbone's patch size 8, got 20"):
        VPTSPModel.from_backbone(tmp_path / "stock", image_size=20)


def test_patches_that_leave_a_margin_out(tmp_path):
    """As SigLIP's of 14 pixels do of images of 384."""
    config = SiglipVisionConfig(**{**MLP, "image_size": 20})
    stock = perturb(AutoModel.from_config(config)).eval()
    stock.save_pretrained(tmp_path)
    built, pixel_values = VPTSPModel.from_backbone(tmp_path, embedding_dim=10, image_size=20), images(2, 20)
    expected = F.normalize(stock(pixel_values).pooler_output, dim=-1)
    torch.testing.assert_close(built.embed_with_backbone(pixel_values), expected, rtol=0, atol=1e-5)


@every_family
def test_built_on_a_checkpoint_of_transformers(name, tmp_path):
    stock = saved_stock(name, tmp_path / "stock")
    built = VPTSPModel.from_backbone(tmp_path / "stock", embedding_dim=10, num_prompts=2)
    pixel_values = images()
    output = stock(**oracle.stock_inputs(stock, pixel_values))
    expected = oracle.stock_pooled(stock, output, FAMILIES[name][1].split()[0])
    expected = F.normalize(expected.mean(1) if expected.dim() == 3 else expected, dim=-1)
    torch.testing.assert_close(built.embed_with_backbone(pixel_values), expected, rtol=0, atol=1e-5)
    built.save_pretrained(tmp_path / "retriever")
    loaded = VPTSPModel.from_pretrained(tmp_path / "retriever")
    torch.testing.assert_close(loaded(pixel_values).embeddings, built(pixel_values).embeddings)


def test_mlcd_under_its_authors_name(tmp_path):
    stock = perturb(AutoModel.from_config(backbone_config("mlcd_vision_model"))).eval()
    stock.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mlcd"}))
    weights = {f"vision_model.{name}": tensor.clone() for name, tensor in stock.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    built, pixel_values = VPTSPModel.from_backbone(tmp_path, embedding_dim=10, num_prompts=2), images()
    expected = F.normalize(stock(pixel_values).pooler_output, dim=-1)
    torch.testing.assert_close(built.embed_with_backbone(pixel_values), expected, rtol=0, atol=1e-5)
    built.save_pretrained(tmp_path / "retriever")
    loaded = VPTSPModel.from_pretrained(tmp_path / "retriever")
    torch.testing.assert_close(loaded(pixel_values).embeddings, built(pixel_values).embeddings)


@every_kind
def test_a_model_made_on_the_meta_device_has_all_its_buffers(name, tmp_path):
    """Loading makes models there, and what is not in the file has to be filled in: positions, frequencies."""
    model, pixel_values = retriever(name), images()
    model.save_pretrained(tmp_path)
    loaded = VPTSPModel.from_pretrained(tmp_path)
    assert {n for n, _ in loaded.named_buffers()} == {n for n, _ in model.named_buffers()}
    for n, buffer in model.named_buffers():
        assert torch.equal(loaded.get_buffer(n), buffer), n
    half = VPTSPModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert F.cosine_similarity(half(pixel_values).embeddings, model(pixel_values).embeddings).min() > 0.98


@every_family
def test_what_a_family_cannot_pool_is_refused(name):
    possible = FAMILIES[name][1].split()
    for pooling in {"cls", "mean", "cls+mean", "head"} - set(possible):
        reason = "has no class token" if "cls" in pooling else "has no pooling head of its own"
        with pytest.raises(
            ValueError, match=rf"with this \w+ backbone, got '{pooling.replace('+', '.')}': it {reason}"
        ):
            VPTSPConfig(backbone_config=backbone_config(name), pooling=pooling)
    config = VPTSPConfig(backbone_config=backbone_config(name))
    config.pooling = None
    with pytest.raises(ValueError, match="pooling must be set with a backbone_config, got None"):
        config.validate_fields()
