"""Attention maps against attention written out with transformers' own layers."""

import numpy as np
import pytest
import test_families
import torch
from PIL import Image

from vptsp import VPTSPModel
from vptsp.eval import attention
from vptsp.eval.attention import cls_attention, save_attention


def make_retriever(backbone_folder, **fields):
    return VPTSPModel.from_backbone(backbone_folder, **{"num_prompts": 3, "embedding_dim": 8, **fields}).eval()


@torch.no_grad()
def slow_attention(model, image, with_prompts):
    """Attention of CLS in each layer of one image, from the eager attention of whole layers: list of `(P + N,)`."""
    hidden = model.backbone.embeddings(image[None])
    rows = []
    for index, layer in enumerate(model.backbone.layers):
        tables = model.prompts()
        prompts = tables[index] if with_prompts and index < len(tables) else hidden.new_zeros(0, hidden.shape[-1])
        joined = torch.cat([prompts[None], hidden], dim=1)
        own = layer.attention
        normed = layer.layernorm_before(joined)[0]
        heads = []
        for head in range(own.config.num_attention_heads):
            part = slice(head * own.head_dim, (head + 1) * own.head_dim)
            query = own.q_proj(normed)[len(prompts), part]
            key = own.k_proj(normed)[:, part]
            heads.append(torch.softmax(key @ query / own.head_dim**0.5, dim=0))
        rows.append(torch.stack(heads).mean(0))
        hidden = layer(joined)[:, len(prompts) :]
    return rows


@pytest.mark.parametrize("with_prompts", [True, False])
@pytest.mark.parametrize("fields", [{}, {"prompt_depth": 2, "prompt_step": 1}, {"pooling": "mean"}])
def test_equals_attention_written_out(backbone_folder, with_prompts, fields):
    model = make_retriever(backbone_folder, **fields)
    images = torch.randn(2, 3, 16, 16)
    got = cls_attention(model, images, with_prompts)
    assert got.to_patches.shape == (2, 4, 2, 2)
    for number, image in enumerate(images):
        for index, weights in enumerate(slow_attention(model, image, with_prompts)):
            prompts = got.num_prompts[index]
            assert len(weights) == prompts + got.num_tokens
            torch.testing.assert_close(got.to_patches[number, index].flatten(), weights[prompts + 1 :])
            torch.testing.assert_close(got.to_prompts[number, index], weights[:prompts].sum())
    if not with_prompts:
        assert got.num_prompts == [0] * 4
        assert not got.to_prompts.any()
    elif "prompt_depth" in fields:
        assert got.num_prompts == [3, 2, 0, 0]


@pytest.mark.parametrize("name", ["dinov2_with_registers", "dinov3_vit", "clip_vision_model", "mlcd_vision_model"])
def test_equals_what_transformers_gives_out(name):
    model, pixels = test_families.retriever(name, num_prompts=0), torch.randn(2, 3, 16, 24)
    tokens = model.embed_patches
    model.embed_patches = lambda pixel_values: tokens(pixel_values, interpolate_pos_encoding=True)
    got = cls_attention(model, pixels)
    model.backbone.set_attn_implementation("eager")
    options = {"interpolate_pos_encoding": True} if name == "clip_vision_model" else {}
    expected = model.backbone(pixels, output_attentions=True, **options).attentions
    for layer, weights in enumerate(expected):
        torch.testing.assert_close(got.to_patches[:, layer].flatten(1), weights.mean(1)[:, 0, -6:])


def test_without_a_class_token_there_is_nothing_to_show():
    with pytest.raises(ValueError, match="siglip_vision_model has no CLS token"):
        cls_attention(test_families.retriever("siglip_vision_model"), torch.randn(2, 3, 16, 16))


def test_looking_changes_nothing(backbone_folder):
    model = make_retriever(backbone_folder)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(images).embeddings
        cls_attention(model, images)
        assert torch.equal(model(images).embeddings, before)


def test_patches_of_wide_images():
    assert attention._patch_rows(12, 24, 32) == 3
    assert attention._patch_rows(196, 224, 224) == 14


def test_attention_picture(backbone_folder, tmp_path):
    model = make_retriever(backbone_folder)
    pixels = torch.randn(2, 3, 16, 16)
    images = [np.zeros((16, 16, 3), np.uint8)] * 2
    both = cls_attention(model, pixels, with_prompts=False), cls_attention(model, pixels)
    svg = save_attention(tmp_path / "attention.svg", images, ["Лён", "costs $5 $6"], *both, "Where").read_text("utf-8")
    for text in ("Лён", "costs $5 $6", "with", "without", "× uniform", "Where", "layer"):
        assert text in svg
    path = save_attention(tmp_path / "attention.png", images, ["a", "b"], *both, dpi=100)
    assert Image.open(path).size == (431, 644)
    with pytest.raises(ValueError, match=r"must be as many, at least one, got \[1, 2, 2, 2\]"):
        save_attention(tmp_path / "no.png", images[:1], ["a", "b"], *both)
    with pytest.raises(ValueError, match="at least one"):
        save_attention(tmp_path / "no.png", [], [], *both)
