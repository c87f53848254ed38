"""timm's checkpoints, compared with a vision transformer written from its definition on timm's tensors."""

import json

import pytest
import torch
import torch.nn.functional as F
from remote_code import remote_model
from safetensors.torch import load_file, save_file
from transformers.image_utils import PILImageResampling

from vptsp import VPTSPModel
from vptsp.backbones_vptsp import family_of
from vptsp.data_scripts.preprocessing import build_image_processor
from vptsp.loading_vptsp import timm_backbone_config, timm_backbone_weights


LAYERS, HEADS, PATCH, SIDE = 12, 3, 16, 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def timm_config(architecture, side=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), **pretrained):
    return {
        "architecture": architecture,
        "num_classes": 5,
        "num_features": 192,
        "global_pool": "token",
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "mean": list(mean),
            "std": list(std),
            "num_classes": 5,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **pretrained,
        },
    }


def random_tensors(distilled, width=192):
    """Random weights under timm's names, classifiers among them."""
    tokens = (SIDE // PATCH) ** 2 + (2 if distilled else 1)
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, tokens, width)}
    linear = {"patch_embed.proj": (width, 3, PATCH, PATCH), "head": (5, width)}
    norms = ["norm"]
    if distilled:
        shapes["dist_token"] = (1, 1, width)
        linear["head_dist"] = (5, width)
    for i in range(LAYERS):
        linear[f"blocks.{i}.attn.qkv"] = (3 * width, width)
        linear[f"blocks.{i}.attn.proj"] = (width, width)
        linear[f"blocks.{i}.mlp.fc1"] = (4 * width, width)
        linear[f"blocks.{i}.mlp.fc2"] = (width, 4 * width)
        norms += [f"blocks.{i}.norm1", f"blocks.{i}.norm2"]
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name, shape in linear.items():
        tensors[f"{name}.weight"] = torch.randn(shape) * torch.tensor(shape[1:]).prod() ** -0.5
        tensors[f"{name}.bias"] = 0.2 * torch.randn(shape[0])
    for name in norms:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + 0.2 * torch.randn(width), 0.2 * torch.randn(width)
    return tensors


def timm_forward(tensors, images):
    """All tokens `(B, N, D)` after the final norm: pre-norm blocks, fused qkv, exact GELU, epsilon 1e-6."""

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps=1e-6)

    patches = F.conv2d(images, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=PATCH)
    prefix = [tensors[name].expand(len(images), -1, -1) for name in ("cls_token", "dist_token") if name in tensors]
    x = torch.cat([*prefix, patches.flatten(2).transpose(1, 2)], dim=1) + tensors["pos_embed"]
    batch, num_tokens, width = x.shape
    for i in range(LAYERS):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.reshape(batch, num_tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) / (width // HEADS) ** 0.5).softmax(dim=-1)
        x = x + linear((attention @ v).transpose(1, 2).reshape(batch, num_tokens, width), f"blocks.{i}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")


ARCHITECTURES = {"vit": "vit_tiny_patch16_32", "deit": "deit_tiny_distilled_patch16_32"}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request, tmp_path_factory):
    """Folder of a timm checkpoint, and its tensors."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp(request.param)
    tensors = random_tensors(distilled=request.param == "deit")
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(timm_config(ARCHITECTURES[request.param], SIDE)))
    return folder, tensors


def test_same_features_as_the_definition(checkpoint):
    folder, tensors = checkpoint
    retriever = VPTSPModel.from_backbone(folder, num_prompts=0, embedding_dim=10).eval()
    images = torch.randn(2, 3, SIDE, SIDE)
    hidden = timm_forward(tensors, images)
    assert retriever.config.backbone_config.layer_norm_eps == 1e-6
    prefix = 2 if "dist_token" in tensors else 1
    with torch.no_grad():
        pooled = retriever.encode(retriever.embed_patches(images))
        torch.testing.assert_close(pooled, hidden[:, :prefix].squeeze(1), atol=1e-5, rtol=1e-5)
        alone = F.normalize(hidden[:, :prefix].mean(1), dim=-1)
        torch.testing.assert_close(retriever.embed_with_backbone(images), alone, atol=1e-5, rtol=0)


def test_retriever_is_saved_and_loaded_without_the_package(checkpoint, tmp_path):
    folder, _ = checkpoint
    retriever = VPTSPModel.from_backbone(folder, embedding_dim=10, image_size=48).eval()
    retriever.save_pretrained(tmp_path)
    assert (tmp_path / "loading_vptsp.py").is_file()
    loaded = remote_model(tmp_path)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).embeddings, retriever(images).embeddings)
    assert loaded.config.backbone_fingerprint == retriever.config.backbone_fingerprint
    loaded.save_pretrained(tmp_path / "whole", save_backbone=True)  # fails where tensors share memory


@pytest.mark.parametrize(
    "architecture, millions",
    [
        ("vit_small_patch16_224", 21.67),
        ("vit_base_patch16_224", 85.80),
        ("deit_small_distilled_patch16_224", 21.67),
        ("deit_base_distilled_patch16_384", 86.09),
    ],
)
def test_published_sizes(architecture, millions):
    config = timm_backbone_config(timm_config(architecture, side=int(architecture[-3:])), "a/b")
    with torch.device("meta"):
        backbone = family_of(config).build(config)
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def converted(tensors, architecture="vit_tiny_patch16_32"):
    config = timm_backbone_config(timm_config(architecture, SIDE), "a/b")
    with torch.device("meta"):
        backbone = family_of(config).build(config)
    return timm_backbone_weights(tensors, backbone, "a/b")


def test_every_tensor_is_accounted_for():
    with torch.device("meta"):
        tensors = random_tensors(distilled=False)
    assert len(converted(tensors)) == 4 + 2 + LAYERS * 16
    tensors |= {"pre_logits.fc.weight": tensors["head.weight"], "pre_logits.fc.bias": tensors["head.bias"]}
    converted(tensors)

    def changed(remove=(), **added):
        return {name: tensor for name, tensor in tensors.items() if name not in remove} | added

    lost = ("blocks.3.attn.qkv.bias", "cls_token")
    with pytest.raises(ValueError, match=r"timm checkpoint 'a/b' lacks blocks\.3\.attn\.qkv\.bias, cls_token$"):
        converted(changed(lost))
    last = [name for name in tensors if name.startswith("blocks.11.")]
    with pytest.raises(ValueError, match=r"lacks blocks\.11\.attn\.proj\.bias, .*blocks\.11\.norm2\.weight$"):
        converted(changed(last))
    with pytest.raises(ValueError, match=r"lacks norm\.bias, norm\.weight and has unknown fc_norm\.bias, fc_norm\.we"):
        fc_norm = {f"fc_norm.{part}": tensors[f"norm.{part}"] for part in ("weight", "bias")}
        converted(changed(("norm.weight", "norm.bias"), **fc_norm))
    with pytest.raises(ValueError, match=r"has unknown blocks\.0\.ls1\.gamma$"):
        converted(changed(**{"blocks.0.ls1.gamma": torch.ones(192)}))
    with pytest.raises(ValueError, match=r"has blocks\.0\.attn\.qkv\.weight \(576, 96\) instead of \(576, 192\)$"):
        converted(changed(**{"blocks.0.attn.qkv.weight": torch.empty(576, 96)}))
    with pytest.raises(ValueError, match=r"has pos_embed \(1, 197, 192\) instead of \(1, 5, 192\)$"):
        converted(changed(pos_embed=torch.empty(1, 197, 192)))
    with pytest.raises(
        ValueError, match=r"lacks dist_token and has pos_embed \(1, 5, 192\) instead of \(1, 6, 192\)$"
    ):
        converted(tensors, "deit_tiny_distilled_patch16_32")


def test_incomplete_checkpoint_is_refused_through_from_backbone(checkpoint, tmp_path):
    folder, _ = checkpoint
    tensors = load_file(folder / "model.safetensors")
    del tensors["blocks.7.mlp.fc1.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"lacks blocks\.7\.mlp\.fc1\.weight"):
        VPTSPModel.from_backbone(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"must hold model\.safetensors; no other format is read"):
        VPTSPModel.from_backbone(tmp_path)


@pytest.mark.parametrize(
    "values, message",
    [
        (timm_config("resnet50"), r"architecture of the timm checkpoint 'a/b' must be .*, got 'resnet50'"),
        (timm_config("vit_base_patch16_gap_224"), "got 'vit_base_patch16_gap_224'"),
        (timm_config("deit3_small_patch16_224"), "got 'deit3_small_patch16_224'"),
        (timm_config("vit_base_patch16_224") | {"model_args": {"img_size": 96, "act_layer": "relu"}}, ": act_layer"),
        (timm_config("vit_base_patch16_224", input_size=[3, 224, 96]), "must take square images, got 224 x 96"),
        (timm_config("vit_base_patch16_224", interpolation="random"), "must be bicubic or bilinear, got 'random'"),
        ({"architecture": "vit_base_patch16_224", "pretrained_cfg": {"mean": [0.5] * 3}}, "lacks crop_pct, input_siz"),
    ],
)
def test_other_architectures_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        timm_backbone_config(values, "a/b")


def test_image_processor_of_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(timm_config("vit_small_patch16_224")))
    own = build_image_processor(backbone=tmp_path)
    assert tuple(own.image_mean) == tuple(own.image_std) == (0.5, 0.5, 0.5)
    assert (own.size["shortest_edge"], own.crop_size["height"]) == (248, 224)
    assert own.resample == PILImageResampling.BICUBIC
    as_evaluated = build_image_processor(224, 256, backbone=tmp_path)
    assert (as_evaluated.size["shortest_edge"], as_evaluated.crop_size["height"]) == (256, 224)
    assert as_evaluated.resample == PILImageResampling.BILINEAR
    assert build_image_processor(448, backbone=tmp_path).size["shortest_edge"] == 497

    deit = timm_config("deit_small_distilled_patch16_224", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    (tmp_path / "config.json").write_text(json.dumps(deit))
    processor = build_image_processor(224, 256, backbone=tmp_path)
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (IMAGENET_MEAN, IMAGENET_STD)
    del deit["pretrained_cfg"]["mean"]
    (tmp_path / "config.json").write_text(json.dumps(deit))
    with pytest.raises(ValueError, match="lacks mean"):
        build_image_processor(backbone=tmp_path)
