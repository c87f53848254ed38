"""Families of backbones: the fast path of each against the naive computation, and images of other sizes."""

import json

import pytest
import torch
from conftest import tiny_vit_config
from remote_code import remote_model
from test_modeling_exact import K2, assert_same_step, make_model
from transformers import AutoModel, AutoModelForImageClassification, DeiTConfig, Dinov2Config

from vptsp import VPTSPModel


TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.3,
}
CONFIGS = {
    "vit": tiny_vit_config(num_hidden_layers=3),
    "dino": tiny_vit_config(num_hidden_layers=2, patch_size=4, layer_norm_eps=1e-6),
    "without qkv bias": tiny_vit_config(num_hidden_layers=2, qkv_bias=False),
    "deit": DeiTConfig(**TINY, intermediate_size=40, layer_norm_eps=1e-6),
    "dinov2": Dinov2Config(**TINY, mlp_ratio=2, layerscale_value=0.7, layer_norm_eps=1e-6),
    "dinov2 swiglu": Dinov2Config(**TINY, mlp_ratio=2, layerscale_value=0.7, use_swiglu_ffn=True),
}


@pytest.fixture(params=["vit", "deit", "dinov2"])
def folder(request, tmp_path):
    """A pretrained-looking backbone on disk, with nothing left at zero."""
    backbone = AutoModel.from_config(CONFIGS[request.param])
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    backbone.save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


@pytest.mark.parametrize("family", ["dino", "without qkv bias", "deit", "dinov2", "dinov2 swiglu"])
def test_fast_path_is_exact(family):
    model = make_model(backbone_config=CONFIGS[family])
    with torch.no_grad():  # DeiT's tokens start as zeros
        for parameter in model.vptsp.backbone.embeddings.parameters():
            parameter.normal_(std=0.5)
    assert_same_step(model, K2, images_per_class=2)


@pytest.mark.parametrize("proxy_head", ["own", "shared"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
def test_pooling_of_distilled_deit(pooling, proxy_head):
    model = make_model(backbone_config=CONFIGS["deit"], pooling=pooling, proxy_head=proxy_head)
    assert hasattr(model.vptsp.head, "distillation_norm") == (pooling == "cls")
    assert_same_step(model, K2, images_per_class=2)


def test_both_tokens_of_deit_matter_and_are_tuned():
    model = make_model(backbone_config=CONFIGS["deit"]).vptsp
    assert {name for name in model.tuned_names() if "distillation" in name} == {
        f"head.distillation_{layer}.{part}" for layer in ("norm", "projection") for part in ("weight", "bias")
    }
    pixel_values = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    pooled = model.encode(model.embed_patches(pixel_values))
    expected = model.backbone(pixel_values).last_hidden_state[:, :2]
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(
        model.embed_with_backbone(pixel_values), torch.nn.functional.normalize(expected.mean(1), dim=-1)
    )
    other = pooled.clone()
    other[:, 1] = torch.randn_like(other[:, 1])
    assert (model.head(pooled) - model.head(other)).abs().max() > 1e-3


def test_without_prompts_the_backbone_is_the_stock_one(folder):
    retriever = VPTSPModel.from_backbone(folder, num_prompts=0, embedding_dim=10, pooling="mean").eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    hidden = AutoModel.from_pretrained(folder).eval()(pixel_values).last_hidden_state
    pooled = hidden[:, retriever.family.num_prefix_tokens :].mean(dim=1)
    torch.testing.assert_close(retriever.encode(retriever.embed_patches(pixel_values)), pooled)


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2"])
def test_classifiers_are_backbones_too(family, tmp_path):
    classifier = AutoModelForImageClassification.from_config(CONFIGS[family]).eval()
    classifier.save_pretrained(tmp_path)
    retriever = VPTSPModel.from_backbone(tmp_path, num_prompts=0, embedding_dim=10, pooling="mean").eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    hidden = classifier.base_model(pixel_values).last_hidden_state
    pooled = hidden[:, retriever.family.num_prefix_tokens :].mean(dim=1)
    torch.testing.assert_close(retriever.encode(retriever.embed_patches(pixel_values)), pooled)


def test_another_image_size(folder, tmp_path, caplog):
    retriever = VPTSPModel.from_backbone(folder, num_prompts=0, embedding_dim=10, image_size=40).eval()
    assert "trained with images of 16 pixels and is used with 40" in caplog.text
    stock = AutoModel.from_pretrained(folder).eval()
    pixel_values = torch.randn(2, 3, 40, 40)
    options = {} if stock.config.model_type == "dinov2" else {"interpolate_pos_encoding": True}
    expected = stock(pixel_values, **options).last_hidden_state[:, : retriever.family.num_class_tokens]
    pooled = retriever.encode(retriever.embed_patches(pixel_values))
    torch.testing.assert_close(pooled, expected.squeeze(1))
    with pytest.raises(ValueError, match=r"\(16\*16\) doesn't match model \(40\*40\)"):
        retriever(torch.randn(2, 3, 16, 16))

    retriever.save_pretrained(tmp_path / "tuned only")
    retriever.save_pretrained(tmp_path / "whole", save_backbone=True)
    for name in ("tuned only", "whole"):
        loaded = remote_model(tmp_path / name)
        torch.testing.assert_close(loaded(pixel_values).embeddings, retriever(pixel_values).embeddings)
    positions = "backbone.embeddings.position_embeddings"
    num_tokens = retriever.family.num_prefix_tokens + 25
    assert loaded.state_dict()[positions].shape == (1, num_tokens, 24)  # so no pass interpolates


def test_fingerprint_is_that_of_the_checkpoint_whatever_the_image_size(folder, tmp_path):
    fingerprints = [
        VPTSPModel.from_backbone(folder, embedding_dim=10, image_size=size).config.backbone_fingerprint
        for size in (None, 16, 24)
    ]
    assert len(set(fingerprints)) == 1
    VPTSPModel.from_backbone(folder, embedding_dim=10, image_size=24).save_pretrained(tmp_path / "retriever")
    config = json.loads((tmp_path / "retriever" / "config.json").read_text())
    assert config["backbone_fingerprint"] == fingerprints[0]
    assert config["backbone_config"]["image_size"] == 24


def test_sizes_that_do_not_fit_patches_are_refused(folder):
    for size in (20, 0, 4, -8):
        with pytest.raises(
            ValueError, match=f"image_size must be a multiple of the backbone's patch size 8, got {size}"
        ):
            VPTSPModel.from_backbone(folder, image_size=size)
    retriever = VPTSPModel.from_backbone(folder, embedding_dim=10)
    with pytest.raises(ValueError, match=r"multiples of the patch size 8, got \(32, 20\)"):
        retriever(torch.randn(1, 3, 32, 20), interpolate_pos_encoding=True)


def test_backbone_of_rectangles_keeps_its_size(tmp_path):
    AutoModel.from_config(tiny_vit_config(image_size=[16, 24])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"backbones of square images and patches, got \[16, 24\] and 8"):
        VPTSPModel.from_backbone(tmp_path, image_size=32)
    assert VPTSPModel.from_backbone(tmp_path, embedding_dim=10)(torch.randn(1, 3, 16, 24)).embeddings.shape == (1, 10)
