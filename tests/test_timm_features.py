"""timm's DINOv2, DINOv3, SigLIP and CLIP: features that timm itself computed, recorded by `make_timm_features.py`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_timm_checkpoints import timm_config
from torch import nn

from vptsp import VPTSPModel, loading_vptsp
from vptsp.backbones_vptsp import family_of, prompted_forward
from vptsp.loading_vptsp import find_backbone, open_backbone, timm_backbone_config, timm_backbone_weights


FIXTURES = Path(__file__).parent / "fixtures"
ARCHITECTURES = json.loads((FIXTURES / "timm_architectures.json").read_text())
with safe_open(FIXTURES / "timm_features.safetensors", "pt") as _opened:
    RECORDED = sorted({key.partition("/")[0] for key in _opened.keys()})  # noqa: SIM118
ACTIVATIONS = {
    "gelu": "GELU(approximate='none')",
    "gelu_pytorch_tanh": "GELUTanh()",
    "quick_gelu": "QuickGELU()",
    "silu": "SiLU()",
}


@pytest.fixture
def recorded(request, tmp_path, monkeypatch):
    """A tiny checkpoint as timm writes it (of the sizes recorded), images, features and pooled features."""
    name = request.param
    kinds = [kind._replace(sizes=dict.fromkeys(kind.sizes, (16, 2, 2, 64))) for kind in loading_vptsp._TIMM_KINDS]
    monkeypatch.setattr(loading_vptsp, "_TIMM_KINDS", kinds)
    tensors = load_file(FIXTURES / "timm_features.safetensors")
    tensors = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
    tensors = {key: value.float() for key, value in tensors.items()}
    weights = {key.removeprefix("weights."): tensors.pop(key) for key in list(tensors) if key.startswith("weights.")}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(timm_config(name, side=12)))
    return tmp_path, tensors


@pytest.mark.parametrize("recorded", RECORDED, indirect=True)
@torch.no_grad()
def test_features_are_those_of_timm(recorded):
    folder, expected = recorded
    model = VPTSPModel.from_backbone(folder, num_prompts=0, embedding_dim=10).eval()
    tokens = model.embed_patches(expected["images"])
    hidden = prompted_forward(model.family, model.backbone, tokens, ())
    torch.testing.assert_close(hidden, expected["features"], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.encode(tokens), expected["pooled"], rtol=0, atol=1e-5)
    backbone = open_backbone(find_backbone(folder))  # by transformers' own forward, so all buffers must be there
    assert not any(buffer.is_meta for buffer in backbone.buffers())
    output = backbone(expected["images"])
    hidden = output.last_hidden_state
    hidden = backbone.post_layernorm(hidden) if backbone.config.model_type == "clip_vision_model" else hidden
    torch.testing.assert_close(hidden, expected["features"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("recorded", RECORDED, indirect=True)
def test_half_precision_is_kept(recorded):
    folder, _ = recorded
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")
    backbone = open_backbone(find_backbone(folder))
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float16}


@pytest.mark.parametrize("recorded", RECORDED, indirect=True)
def test_every_tensor_is_accounted_for(recorded):
    folder, _ = recorded
    tensors = load_file(folder / "model.safetensors")
    config = find_backbone(folder).config
    with torch.device("meta"):
        backbone = family_of(config).build(config)
    weights = timm_backbone_weights(tensors, backbone, "a/b")
    assert weights.keys() == backbone.state_dict().keys()
    for name in tensors:
        with pytest.raises(ValueError, match=rf"timm checkpoint 'a/b' lacks {name}$"):
            timm_backbone_weights({key: tensors[key] for key in tensors if key != name}, backbone, "a/b")
        changed = torch.zeros(5, *tensors[name].shape)
        shapes = (
            rf"\({', '.join(map(str, changed.shape))}\) instead of \({', '.join(map(str, changed.shape[1:]))},?\)$"
        )
        with pytest.raises(ValueError, match=rf"has {name} {shapes}"):
            timm_backbone_weights({**tensors, name: changed}, backbone, "a/b")
    with pytest.raises(ValueError, match=r"has unknown blocks\.0\.attn\.q_norm\.weight$"):
        timm_backbone_weights({**tensors, "blocks.0.attn.q_norm.weight": torch.ones(8)}, backbone, "a/b")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_are_those_of_timm(name):
    parameters, heads, activation, eps, side = ARCHITECTURES[name]
    config = timm_backbone_config(timm_config(name, side=side), "a/b")
    with torch.device("meta"):
        backbone = family_of(config).build(config)
    count = sum(tensor.numel() for key, tensor in backbone.named_parameters() if not key.endswith("mask_token"))
    if config.model_type == "dinov2_with_registers":  # whose class token has a position of its own, always 0 here
        count -= config.hidden_size
    assert count == parameters
    assert config.num_attention_heads == heads
    swiglu = getattr(config, "use_swiglu_ffn", False)
    assert ACTIVATIONS["silu" if swiglu else config.hidden_act] == activation
    assert {module.eps for module in backbone.modules() if isinstance(module, nn.LayerNorm)} == {eps}
    assert config.image_size == side


@pytest.mark.parametrize(
    "name, message",
    [
        ("eva02_base_patch14_448", r"rotary positions in pairs.* The nearest name is vit_base_patch16_224"),
        (
            "eva02_large_patch14_clip_336",
            r"rotary positions in pairs.* The nearest name is vit_large_patch16_clip_224",
        ),
        ("vit_base_patch16_reg4_gap_256", r"registers but no class token.* The nearest name is vit_base_patch1\d_\w+"),
        ("naflexvit_base_patch16_siglip", r"patches of any number.* The nearest name is vit_base_patch16_siglip_256"),
        ("deit3_small_patch16_224", r"no layer scale.* The nearest name is vit_small_patch16_224"),
        ("vit_base_patch16_rope_224", r"rotary positions.* The nearest name is vit_base_patch16_224"),
        ("vit_small_patch16_dinov4", r"is not known.* The nearest name is vit_small_patch16_dinov3"),
        ("vit_gigantic_patch14_dinov2", r"is not known.* The nearest name is vit_\w+_patch14_dinov2"),
        ("resnet50", r"is not known.* The nearest name is \w+"),
    ],
)
def test_others_are_refused_with_the_reason_and_the_nearest(name, message):
    with pytest.raises(ValueError, match=rf"one like vit_<size>_patch16_224, .*, got '{name}': .*{message}"):
        timm_backbone_config(timm_config(name), "a/b")
